// Defines vectors of fp32 lanes, and the two kinds of numbers that products read: fp32, and bf16 in pairs.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;      // 32 registers: 14 rows of 2 vectors, the 2 vectors of B and what is broadcast
constexpr int MAX_ROWS = 14;
#else
constexpr int LANES = 8;       // 16 registers
constexpr int MAX_ROWS = 6;
#endif
constexpr int PANEL = 2 * LANES;

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline float widen(uint16_t bf16) {
    uint32_t bits = uint32_t(bf16) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// Turns fp32 into bf16 by adding `extra` below the bits that stay: 0x7FFF and the lowest of them round to nearest even.
inline uint16_t to_bf16(uint32_t bits, uint32_t extra) {
    const uint32_t nan = (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x40 : 0, cut = bits >> 16;
    return uint16_t((bits & 0x7F800000) == 0x7F800000 ? cut | nan : (bits + extra) >> 16);
}
inline uint16_t to_bf16(float x) { return to_bf16(bits_of(x), 0x7FFF + (bits_of(x) >> 16 & 1)); }

// A step of a product consumes DEPTH numbers of A and DEPTH lanes of B: one fp32, or a pair of bf16.
struct Float32 {
    using Number = float;
    using Step = float;
    static constexpr int DEPTH = 1;
    static Step last(const Number* a) { return *a; }
    static void accumulate(Vector& sum, Step a, const Vector& b) { sum += a * b; }
    static float widened(Number x) { return x; }
    static Number narrowed(float x) { return x; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
    using Number = uint16_t;
    using Step = uint32_t;
    static constexpr int DEPTH = 2;
    static Step last(const Number* a) { return *a; }  // its partner is zero
    static void accumulate(Vector& sum, Step a, const Vector& b) {
        sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
    }
    static float widened(Number x) { return widen(x); }
    static Number narrowed(float x) { return to_bf16(x); }
};
#endif
