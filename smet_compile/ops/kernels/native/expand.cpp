// Writes the dense weight of compact values, and reads it back. Single weights are moved 1024 dense positions (a group)
// at a time, runs and tiles row by row. Unpacking writes every dense weight once; packing reads only active entries.
#include "bits.h"

#if defined(__AVX512F__) && defined(__AVX512VBMI2__)
#include <immintrin.h>
#define WIDE_MOVES 1
#endif

namespace {

struct Weights {
    const uint8_t* bits;
    const void* index;          // group_starts of single weights, positions of others
    void* values;
    void* dense;                // of the dense positions first ... last
    int64_t first, last;        // single weights: dense positions; others: rows of all matrices
    int64_t num_active, block_rows, block_cols, bm, bn, rows, cols, element_bytes, wide_index, num_threads;
};

inline List index_of(const Weights& w) { return {w.index, w.wide_index}; }

// Writes up to 64 dense positions, of which those in `bits` are active.
template <class Number>
inline void expand_word(uint64_t bits, const Number* values, Number* dense, int64_t count) {
#if WIDE_MOVES
    if (count == 64 && sizeof(Number) == 4) {
        for (int part = 0; part < 4; part++, bits >>= 16) {
            const auto mask = __mmask16(bits);
            _mm512_storeu_si512(dense + part * 16, _mm512_maskz_expandloadu_epi32(mask, values));
            values += __builtin_popcount(mask);
        }
        return;
    }
    if (count == 64 && sizeof(Number) == 2) {
        for (int part = 0; part < 2; part++, bits >>= 32) {
            const auto mask = __mmask32(bits);
            _mm512_storeu_si512(dense + part * 32, _mm512_maskz_expandloadu_epi16(mask, values));
            values += __builtin_popcount(mask);
        }
        return;
    }
#endif
    for (int64_t i = 0; i < count; i++) {
        const bool active = bits >> i & 1;
        dense[i] = active ? *values : Number(0);
        values += active;
    }
}

template <class Number>
inline void compress_word(uint64_t bits, const Number* dense, Number* values, int64_t count) {
#if WIDE_MOVES
    if (count == 64 && sizeof(Number) == 4) {
        for (int part = 0; part < 4; part++, bits >>= 16) {
            const auto mask = __mmask16(bits);
            const int active = __builtin_popcount(mask);
            const __m512i moved = _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(dense + part * 16));
            _mm512_mask_storeu_epi32(values, __mmask16((1u << active) - 1), moved);
            values += active;
        }
        return;
    }
    if (count == 64 && sizeof(Number) == 2) {
        for (int part = 0; part < 2; part++, bits >>= 32) {
            const auto mask = __mmask32(bits);
            const int active = __builtin_popcount(mask);
            const __m512i moved = _mm512_maskz_compress_epi16(mask, _mm512_loadu_si512(dense + part * 32));
            _mm512_mask_storeu_epi16(values, __mmask32((uint64_t(1) << active) - 1), moved);
            values += active;
        }
        return;
    }
#endif
    for (; bits; bits &= bits - 1) *values++ = dense[__builtin_ctzll(bits)];
}

template <class Number, bool PACK>
void single(const Weights& w) {
    auto* values = (Number*)w.values;
    auto* dense = (Number*)w.dense - w.first;
    const int64_t first_group = w.first / GROUP, last_group = (w.last + GROUP - 1) / GROUP;
#pragma omp parallel for schedule(static) num_threads(w.num_threads)
    for (int64_t group = first_group; group < last_group; group++) {
        const int64_t end = std::min((group + 1) * GROUP, w.last);
        int64_t position = std::max(group * GROUP, w.first);
        int64_t n = count_before(w.bits, index_of(w), position);
        while (position < end) {
            const int64_t skip = position % 8, count = std::min<int64_t>(64 - skip, end - position);
            const uint64_t bits = bits_at(w.bits, position - skip, count + skip) >> skip;
            if (PACK) compress_word(bits, dense + position, values + n, count);
            else expand_word(bits, values + n, dense + position, count);
            n += __builtin_popcountll(bits);
            position += count;
        }
    }
}

template <bool PACK>
void by_rows(const Weights& w) {
    const int64_t size = w.element_bytes, block = w.bm * w.bn * size;
    auto* values = (char*)w.values;
    auto* dense = (char*)w.dense - w.first * w.cols * size;
    const List positions = index_of(w);
#pragma omp parallel for schedule(static) num_threads(w.num_threads)
    for (int64_t row = w.first; row < w.last; row++) {
        const int64_t in_matrix = row % w.rows;
        const int64_t line = row / w.rows * w.block_rows + in_matrix / w.bm;
        char* to = dense + row * w.cols * size;
        int64_t done = 0;
        for (int64_t n = lower_bound(positions, w.num_active, line * w.block_cols); n < w.num_active; n++) {
            const int64_t col = positions[n] - line * w.block_cols;
            if (col >= w.block_cols) break;
            const int64_t width = std::min(w.bn, w.cols - col * w.bn);
            char* entry = values + n * block + in_matrix % w.bm * w.bn * size;
            if (PACK) {
                std::memcpy(entry, to + col * w.bn * size, width * size);
                std::memset(entry + width * size, 0, (w.bn - width) * size);
                const bool last_row = in_matrix == w.rows - 1;
                for (int64_t over = 1; last_row && over < w.bm - in_matrix % w.bm; over++)
                    std::memset(entry + over * w.bn * size, 0, w.bn * size);
                continue;
            }
            std::memset(to + done * size, 0, (col * w.bn - done) * size);
            std::memcpy(to + col * w.bn * size, entry, width * size);
            done = col * w.bn + width;
        }
        if (!PACK) std::memset(to + done * size, 0, (w.cols - done) * size);
    }
}

template <bool PACK>
void move(const Weights& w) {
    if (w.bm * w.bn > 1) by_rows<PACK>(w);
    else if (w.element_bytes == 8) single<uint64_t, PACK>(w);
    else if (w.element_bytes == 4) single<uint32_t, PACK>(w);
    else single<uint16_t, PACK>(w);
}

}  // namespace

extern "C" {
void unpack(const Weights* w) { move<false>(*w); }
void pack(const Weights* w) { move<true>(*w); }
}
