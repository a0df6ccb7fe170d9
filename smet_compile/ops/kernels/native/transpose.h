// Transposes matrices of fp32.
#pragma once
#include <algorithm>
#include <cstdint>

#if defined(__AVX__)
#include <immintrin.h>
#endif

inline void transpose_8x8(const float* from, int64_t stride, float* to, int64_t to_stride) {
#if defined(__AVX__)
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(from + i * stride);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0xEE);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
#else
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) to[j * to_stride + i] = from[i * stride + j];
#endif
}

// Transposes whole cache lines of both.
inline void transpose_16x16(const float* from, int64_t stride, float* to, int64_t to_stride) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(from + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    // a[4 i + j] holds column 4 k + j of rows 4 i to 4 i + 3 in its k-th quarter.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_shuffle_ps(b[i + j], b[i + 2 + j], 0x44);
            a[i + 2 * j + 1] = _mm512_shuffle_ps(b[i + j], b[i + 2 + j], 0xEE);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512 even_low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xDD);
        const __m512 even_high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
        const __m512 odd_high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xDD);
        _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
        _mm512_storeu_ps(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
        _mm512_storeu_ps(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(even_low, even_high, 0xDD));
        _mm512_storeu_ps(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD));
    }
#else
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 16; j += 8) transpose_8x8(from + i * stride + j, stride, to + j * to_stride + i, to_stride);
#endif
}

// Writes to[column][row] for each from[row][column].
inline void transpose(const float* from, int64_t stride, int64_t rows, int64_t cols, float* to, int64_t to_stride) {
    for (int64_t row = 0; row < rows; row += 16)
        for (int64_t col = 0; col < cols; col += 16) {
            if (row + 16 <= rows && col + 16 <= cols) {
                transpose_16x16(from + row * stride + col, stride, to + col * to_stride + row, to_stride);
                continue;
            }
            for (int64_t i = row; i < std::min(row + 16, rows); i += 8)
                for (int64_t j = col; j < std::min(col + 16, cols); j += 8) {
                    if (i + 8 <= rows && j + 8 <= cols) {
                        transpose_8x8(from + i * stride + j, stride, to + j * to_stride + i, to_stride);
                        continue;
                    }
                    for (int64_t k = i; k < std::min(i + 8, rows); k++)
                        for (int64_t l = j; l < std::min(j + 8, cols); l++)
                            to[l * to_stride + k] = from[k * stride + l];
                }
        }
}
