// Looks up the numbers of each entry's generation in two tables at once, which stay in registers while they are short.
#pragma once
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Holds a table of up to SIZE floats, and looks up as many entries at a time as a register has.
#if defined(__AVX512F__)
constexpr int AGES_AT_ONCE = 16;

template <int SIZE>
struct RegisterTable {
    static constexpr int PAIRS = (SIZE + 31) / 32;
    __m512 parts[2 * PAIRS];

    explicit RegisterTable(const float* table) {
        for (int i = 0; i < 2 * PAIRS; i++) parts[i] = _mm512_loadu_ps(table + 16 * i);
    }
    void write(const uint8_t* indices, float* to) const {
        const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)indices));
        __m512 found = _mm512_permutex2var_ps(parts[0], index, parts[1]);
#pragma GCC unroll 8
        for (int pair = 1; pair < PAIRS; pair++) {
            const __mmask16 here = _mm512_cmpge_epu32_mask(index, _mm512_set1_epi32(32 * pair));
            const __m512 in_pair = _mm512_permutex2var_ps(parts[2 * pair], index, parts[2 * pair + 1]);
            found = _mm512_mask_mov_ps(found, here, in_pair);
        }
        _mm512_storeu_ps(to, found);
    }
};
#elif defined(__AVX2__)
constexpr int AGES_AT_ONCE = 8;

template <int SIZE>
struct RegisterTable {
    static constexpr int PARTS = SIZE / 8;
    __m256 parts[PARTS];

    explicit RegisterTable(const float* table) {
        for (int i = 0; i < PARTS; i++) parts[i] = _mm256_loadu_ps(table + 8 * i);
    }
    void write(const uint8_t* indices, float* to) const {
        const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)indices));
        __m256 found = _mm256_permutevar8x32_ps(parts[0], index);
#pragma GCC unroll 4
        for (int part = 1; part < PARTS; part++) {
            const __m256i here = _mm256_cmpgt_epi32(index, _mm256_set1_epi32(8 * part - 1));
            const __m256 in_part = _mm256_permutevar8x32_ps(parts[part], index);
            found = _mm256_blendv_ps(found, in_part, _mm256_castsi256_ps(here));
        }
        _mm256_storeu_ps(to, found);
    }
};
#endif

#if defined(__AVX2__)
template <int SIZE>
int64_t look_up_in_registers(
    int64_t n, const uint8_t* indices, const float* table, const float* table2, float* to, float* to2
) {
    const RegisterTable<SIZE> in_registers(table), in_registers2(table2);
    int64_t i = 0;
    for (; i + AGES_AT_ONCE <= n; i += AGES_AT_ONCE) {
        in_registers.write(indices + i, to + i);
        in_registers2.write(indices + i, to2 + i);
    }
    return i;
}
#endif

// Looks entries up in two tables of 256. Only the first num_used entries of a table are used.
inline void look_up(
    int64_t n, const uint8_t* indices, int64_t num_used, const float* table, const float* table2, float* to, float* to2
) {
    int64_t i = 0;
#if defined(__AVX2__)
    if (num_used <= 8) i = look_up_in_registers<8>(n, indices, table, table2, to, to2);
    else if (num_used <= 16) i = look_up_in_registers<16>(n, indices, table, table2, to, to2);
    else if (num_used <= 32) i = look_up_in_registers<32>(n, indices, table, table2, to, to2);
#endif
#if defined(__AVX512F__)
    else if (num_used <= 64) i = look_up_in_registers<64>(n, indices, table, table2, to, to2);
    else if (num_used <= 128) i = look_up_in_registers<128>(n, indices, table, table2, to, to2);
    else i = look_up_in_registers<256>(n, indices, table, table2, to, to2);
#endif
    for (; i < n; i++) to[i] = table[indices[i]], to2[i] = table2[indices[i]];
}
