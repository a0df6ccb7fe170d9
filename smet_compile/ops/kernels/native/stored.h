// Reads weights, gradients and moments as an optimizer step has them in memory, and tells whether they are finite.
#pragma once
#include "vectors.h"

enum Kind : int64_t { FP32 = 0, BF16 = 1, CODES = 2 };  // KINDS in jobs.py

inline bool is_finite(float x) { return (bits_of(x) & 0x7F800000) != 0x7F800000; }

inline bool all_finite(int64_t n, const float* x) {
    int32_t finite = 0;
    for (int64_t i = 0; i < n; i++) finite += is_finite(x[i]);
    return finite == n;
}

// Returns the numbers first ... first + n as fp32: in place if they are fp32, else widened into `scratch`.
inline float* widened(void* storage, int64_t kind, int64_t first, int64_t n, float* scratch) {
    if (kind == FP32) return (float*)storage + first;
    const auto* from = (const uint16_t*)storage + first;
    for (int64_t i = 0; i < n; i++) scratch[i] = widen(from[i]);
    return scratch;
}
