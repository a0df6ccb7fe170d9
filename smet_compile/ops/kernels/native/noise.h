// Makes the noise of stochastic rounding that ops/law.py defines: a hash of an entry's place and its block's key.
#pragma once
#include "bits.h"
#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

constexpr uint32_t WORD = 0x9E3779B9u;       // tells the second hash of an entry from its first
constexpr int64_t SPAN = int64_t(1) << 16;  // consecutive single weights that have one key

inline uint32_t hash32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ x >> 16;
}

inline uint32_t noise_key(int64_t seed, int64_t step) { return hash32(hash32(uint32_t(seed)) ^ uint32_t(step)); }

inline uint32_t block_key(uint32_t key, int64_t block) {
    return hash32(hash32(uint32_t(block) ^ key) ^ uint32_t(uint64_t(block) >> 32));
}

// Writes what is hashed for n consecutive places: the place xor the key of its block.
inline void count_places(uint32_t* __restrict to, int64_t n, int64_t place, uint32_t key) {
    for (int64_t i = 0; i < n; i++) to[i] = (uint32_t(place) + uint32_t(i)) ^ key;
}

// Holds for each byte the numbers of its bits that are set, in order.
struct BitsOfByte {
    alignas(8) uint8_t numbers[256][8] = {};

    constexpr BitsOfByte() {
        for (int byte = 0; byte < 256; byte++)
            for (int bit = 0, count = 0; bit < 8; bit++)
                if (byte >> bit & 1) numbers[byte][count++] = uint8_t(bit);
    }
};
constexpr BitsOfByte bits_of_byte;

// Holds the numbers of the bits of a word.
struct NumbersOfBits {
    uint8_t numbers[64] = {};

    constexpr NumbersOfBits() {
        for (int bit = 0; bit < 64; bit++) numbers[bit] = uint8_t(bit);
    }
};
constexpr NumbersOfBits numbers_of_bits;

// Writes 8 small numbers, each xor the same one.
inline void write_eight(uint32_t* to, const uint8_t* numbers, uint32_t other) {
#if defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)numbers));
    _mm256_storeu_si256((__m256i*)to, _mm256_xor_si256(wide, _mm256_set1_epi32(int32_t(other))));
#else
    for (int i = 0; i < 8; i++) to[i] = numbers[i] ^ other;
#endif
}

// Writes what is hashed for the bits that are set in a word, and returns the end. The lowest 6 bits of the word's place
// are 0, so that xor adds a bit's number to it. Up to BEHIND numbers behind the end are overwritten.
constexpr int64_t BEHIND = 32;
inline uint32_t* list_bits(uint32_t* to, uint64_t word, uint32_t place_and_key) {
#if defined(__AVX512VBMI2__)
    alignas(64) uint8_t found[64];
    const __m512i numbers = _mm512_loadu_si512(&numbers_of_bits), other = _mm512_set1_epi32(int32_t(place_and_key));
    _mm512_store_si512(found, _mm512_maskz_compress_epi8(word, numbers));
    const int count = __builtin_popcountll(word);
    for (int i = 0; i < 32 || i < count; i += 16) {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)(found + i)));
        _mm512_storeu_si512(to + i, _mm512_xor_si512(wide, other));
    }
    return to + count;
#elif defined(__AVX512F__)
    const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (uint32_t at = 0; word; word >>= 16, at += 16) {
        const __m512i found = _mm512_maskz_compress_epi32(__mmask16(word), numbers);
        _mm512_storeu_si512(to, _mm512_xor_si512(found, _mm512_set1_epi32(int32_t(place_and_key ^ at))));
        to += __builtin_popcount(uint32_t(word & 0xFFFF));
    }
#else
    if (__builtin_popcountll(word) < 8) {
        for (; word; word &= word - 1) *to++ = uint32_t(__builtin_ctzll(word)) ^ place_and_key;
        return to;
    }
    for (uint32_t at = 0; at < 64; word >>= 8, at += 8) {
        write_eight(to, bits_of_byte.numbers[word & 0xFF], place_and_key ^ at);
        to += __builtin_popcount(uint32_t(word & 0xFF));
    }
#endif
    return to;
}

// Writes what is hashed for the active ones among the single weights first ... last, which have one key.
inline void list_places(uint32_t* to, const uint8_t* bits, int64_t first, int64_t last, uint32_t key) {
    for (int64_t at = first; at < last; at += 64)
        to = list_bits(to, bits_at(bits, at, std::min<int64_t>(64, last - at)), uint32_t(at % SPAN) ^ key);
}

// Turns fp32 into bf16 by adding 16 bits of noise below the bits that stay.
inline uint16_t round_by(float x, uint32_t noise) {
    const uint32_t bits = bits_of(x);
    return uint16_t(x != x ? bits >> 16 | 0x40 : (bits + noise) >> 16);
}
