// Turns groups of moments into 8-bit codes and back, as ops/law.py defines.
#pragma once
#include <cfloat>
#include <cmath>

#include "noise.h"

constexpr uint32_t TOP_V = 255, TOP_M = 127, ONE = 1016;  // ONE: the fp32 1.0, without its low 20 bits
constexpr uint32_t HALF = 0x80000;

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline void decode_m(int64_t n, const uint8_t* __restrict codes, float scale, float* __restrict m) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t c = codes[i], magnitude = c & TOP_M;
        const float x = scale * float_of((magnitude + ONE - TOP_M) << 20 | (c >> 7) << 31);
        m[i] = magnitude ? x : 0.0f;
    }
}

inline void decode_v(int64_t n, const uint8_t* __restrict codes, float scale, float* __restrict v) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t c = codes[i];
        const float x = scale * float_of((c + ONE - TOP_V) << 20);
        v[i] = c ? x : 0.0f;
    }
}

// Floats that are not negative are in the order of their bits.
inline uint32_t largest_m(int64_t n, const float* m) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) largest = std::max(largest, bits_of(m[i]) & 0x7FFFFFFF);
    return largest;
}

// Cuts v off at the largest number, and returns the bits of its largest.
inline uint32_t largest_v(int64_t n, float* v) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        v[i] = v[i] < FLT_MAX ? v[i] : FLT_MAX;
        largest = std::max(largest, bits_of(v[i]));
    }
    return largest;
}

inline float scale_of(uint32_t largest) {
    const float x = float_of(largest);
    return x > 0 ? std::max(x, FLT_MIN) : 0.0f;
}

inline float inverse_of(float scale) { return scale > 0 ? 1 / scale : 0.0f; }

// Returns what is added to the bits of a ratio before they are cut off, from 16 bits of noise.
inline uint32_t fraction_of(uint32_t noise) { return (noise << 4) + 8; }

template <bool ROUNDS>
inline uint8_t code_of_m(float m, float inverse, uint32_t noise) {
    constexpr uint32_t smallest_bits = (ONE - TOP_M + 1) << 20;
    constexpr float smallest = 1.25f / 65536, per_noise = 65536 / smallest, whole = 8388608;
    const float ratio = std::fabs(m) * inverse;
    const uint32_t bits = bits_of(ratio), fraction = ROUNDS ? fraction_of(noise) : HALF;
    const uint32_t code = std::min(((bits + fraction) >> 20) - (ONE - TOP_M), TOP_M);
    const uint32_t rounded = bits_of(ratio * per_noise + whole) - bits_of(whole);  // to the nearest whole number
    const uint32_t one = ROUNDS ? (noise < rounded ? 1u : 0u) : (ratio >= smallest / 2 ? 1u : 0u);
    const uint32_t magnitude = bits < smallest_bits ? one : code;
    return uint8_t(magnitude | (m < 0 ? 128u : 0u));
}

template <bool ROUNDS>
inline uint8_t code_of_v(float v, float inverse, uint32_t noise) {
    const uint32_t fraction = ROUNDS ? fraction_of(noise) : HALF;
    const int32_t code = int32_t((bits_of(v * inverse) + fraction) >> 20) - int32_t(ONE - TOP_V);
    return uint8_t(std::min(std::max(code, int32_t(v > 0)), int32_t(TOP_V)));
}

// Makes the codes of a whole group. `places` is what is hashed for each entry.
template <bool ROUNDS>
void encode(
    int64_t n, const uint32_t* __restrict places, const float* __restrict m, const float* __restrict v, float scale_m,
    float scale_v, uint8_t* __restrict codes_m, uint8_t* __restrict codes_v
) {
    const float inverse_m = inverse_of(scale_m), inverse_v = inverse_of(scale_v);
    for (int64_t i = 0; i < n; i++) {
        const uint32_t noise = ROUNDS ? hash32(places[i] ^ WORD) : 0;
        codes_m[i] = code_of_m<ROUNDS>(m[i], inverse_m, noise & 0xFFFF);
        codes_v[i] = code_of_v<ROUNDS>(v[i], inverse_v, noise >> 16);
    }
}
