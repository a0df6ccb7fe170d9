// Multiplies with single weights, and with runs along a row. No dense weight is made: tokens lie along the vectors, and
// an active weight multiplies some vectors of tokens at a time, read from a transposed block of the input. The columns of
// active weights are read from the bits once, for all tokens. A piece of a line is short, so that its tokens come from L1:
// from L2 they would come at half the speed.
#if defined(__AVX__)
#include <immintrin.h>
#endif
#include "products.h"
#include "runs.h"

namespace {

constexpr int64_t WEIGHTS_AT_ONCE = 1 << 20;
constexpr int64_t PLACES = 192;             // of a piece

// Returns how many lines make a chunk: as many as leave each thread something to do.
int64_t lines_of_chunk(int64_t lines, int64_t num_threads) {
    return std::max<int64_t>(16, std::min(MAX_LINES, ceil_div(lines, 32 * num_threads) * 16));
}

// Returns how many lines are listed at once, so that their entries take some megabytes.
int64_t lines_at_once(const Active& weight, int64_t lines, int64_t size) {
    const double in_matrix = weight.first_of_row(weight.rows) - weight.first_of_row(0);
    const double per_line = in_matrix / lines + 1;
    return std::max<int64_t>(1, int64_t(WEIGHTS_AT_ONCE / per_line) / size) * size;
}

// Multiplies one block of tokens with a chunk of lines. The sums of line i are at sums[i * TOKENS]; they stay in registers
// for a piece of the line.
template <int SIZE>
void add_up(const Entries& entries, const float* block, int64_t chunk, int64_t lines, const float* bias, float* sums) {
    for (int64_t piece = 0; piece < entries.num_pieces(); piece++) {
        const int64_t slot = entries.slot(chunk, piece, 0);
        const Entry* entry = entries.begin(slot);
        for (int64_t i = 0; i < lines; i++) {
            const Entry* const end = entries.end(slot + i);
            if (piece && entry == end) continue;
            Vector sum[SIZE];
#pragma GCC unroll 8
            for (int v = 0; v < SIZE; v++)
                sum[v] = piece ? *(Vector*)(sums + i * TOKENS + v * LANES) : Vector{} + (bias ? bias[i] : 0.0f);
            for (; entry < end; entry++) {
                const Vector* x = at(block, *entry);
                const float weight = entry->weight;
#pragma GCC unroll 8
                for (int v = 0; v < SIZE; v++) sum[v] += weight * x[v];
            }
#pragma GCC unroll 8
            for (int v = 0; v < SIZE; v++) *(Vector*)(sums + i * TOKENS + v * LANES) = sum[v];
        }
    }
}

// Writes the products of one block of tokens with a chunk of lines, the first of which is `line`.
void multiply(const Masked& m, const Entries& entries, const float* block, int64_t token, int64_t chunk, int64_t line,
              int64_t lines) {
    alignas(64) float sums[MAX_LINES * TOKENS];
    const int64_t tokens = std::min(TOKENS, m.num_tokens - token);
    const float* bias = m.bias ? m.bias + line : nullptr;
    with_constant<VECTORS>(ceil_div(tokens, LANES), [&](auto size) {
        add_up<size>(entries, block, chunk, lines, bias, sums);
    });
    transpose(sums, TOKENS, lines, tokens, m.out + token * m.out_stride + line, m.out_stride);
}

void masked(const Masked& m) {
    const Active& weight = m.weight;
    const int64_t inputs = m.transposed ? weight.cols : weight.rows, outputs = m.transposed ? weight.rows : weight.cols;
    const int64_t size = lines_of_chunk(outputs, m.num_threads), at_once = lines_at_once(weight, outputs, size);
    const Cut cut = {bool(m.transposed), size, PLACES, BYTES_OF_TOKENS};
    const int64_t blocks_at_once = Blocks::at_once(inputs, m.num_tokens);
    Blocks blocks(m.input, m.input_stride, m.num_tokens, inputs);
    blocks.hold(blocks_at_once);
    for (int64_t line = 0; line < outputs; line += at_once) {
        const int64_t last = std::min(line + at_once, outputs);
        const Entries entries(weight, m.values, cut, line, last, int(m.num_threads));
        const int64_t chunks = entries.num_chunks();
#pragma omp parallel num_threads(m.num_threads)
        for (int64_t first = 0; first < m.num_tokens; first += blocks_at_once * TOKENS) {
            const int64_t num_blocks = std::min(blocks_at_once, ceil_div(m.num_tokens - first, TOKENS));
            blocks.fill(first, num_blocks);
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < num_blocks * chunks; task++) {
                const int64_t number = task / chunks, chunk = task % chunks, begin = line + chunk * size;
                const int64_t lines = std::min(size, last - begin);
                multiply(m, entries, blocks.block(number), first + number * TOKENS, chunk, begin, lines);
            }
        }
    }
}

// Adds up the lanes of four vectors.
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
inline Four add_lanes(const Vector* sums) {
#if defined(__AVX__)
    __m256 half[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
        const __m512 all = (__m512)sums[i];
        half[i] = _mm256_add_ps(
            _mm512_castps512_ps256(all), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
#else
        half[i] = (__m256)sums[i];
#endif
    }
    const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(half[0], half[1]), _mm256_unpackhi_ps(half[0], half[1]));
    const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(half[2], half[3]), _mm256_unpackhi_ps(half[2], half[3]));
    const __m256 c = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
    return (Four)_mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
#else
    Four total = {};
    for (int i = 0; i < 4; i++)
        for (int lane = 0; lane < LANES; lane++) total[i] += sums[i][lane];
    return total;
#endif
}

// Adds the products of a row's gradient with the tokens of its entries to `out`, or writes them there. Four entries are
// multiplied at a time; those that follow the last are read and left out.
template <int SIZE>
[[gnu::noinline]] void dot_line(const Entry* entry, const Entry* end, const float* grad, const float* tokens, bool adds, float* out) {
    Vector g[SIZE];
#pragma GCC unroll 8
    for (int v = 0; v < SIZE; v++) g[v] = *(const Vector*)(grad + v * LANES);
    for (; entry < end; entry += 4, out += 4) {
        const Vector *x0 = at(tokens, entry[0]), *x1 = at(tokens, entry[1]);
        const Vector *x2 = at(tokens, entry[2]), *x3 = at(tokens, entry[3]);
        Vector sums[4] = {g[0] * x0[0], g[0] * x1[0], g[0] * x2[0], g[0] * x3[0]};
#pragma GCC unroll 8
        for (int v = 1; v < SIZE; v++) {
            sums[0] += g[v] * x0[v];
            sums[1] += g[v] * x1[v];
            sums[2] += g[v] * x2[v];
            sums[3] += g[v] * x3[v];
        }
        const Four total = add_lanes(sums);
        if (entry + 4 <= end) *(Four*)out = adds ? *(Four*)out + total : total;
        else
            for (int i = 0; i < end - entry; i++) out[i] = adds ? out[i] + total[i] : total[i];
    }
}

// Sets what hangs over the edge to zero, also where left or right are not finite.
void clear_edges(const Sampled& m) {
    const Active& weight = m.weight;
    const int64_t across = weight.blocks_of_row(), inside = weight.cols - (across - 1) * weight.bn;
    if (inside == weight.bn) return;
    const int64_t last = weight.first_of_row(weight.rows) / weight.bn;
    for (int64_t n = weight.first_of_row(0) / weight.bn; n < last; n++)
        if (weight.positions[n] % across == across - 1)
            std::fill(m.out + n * weight.bn + inside, m.out + (n + 1) * weight.bn, 0.0f);
}

// Adds to the gradients of some rows' pieces, from `slot` on, what one block of tokens gives.
template <int SIZE>
void differentiate(const Sampled& m, const Entries& entries, const float* grads, const float* block, bool adds,
                   int64_t slot, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
        const Entry *begin = entries.begin(slot + i), *end = entries.end(slot + i);
        if (begin == end) continue;
        dot_line<SIZE>(begin, end, grads + i * TOKENS, block, adds, m.out + entries.first_value(slot + i));
    }
}

void sampled(const Sampled& m) {
    const Active& weight = m.weight;
    if (m.num_tokens == 0) {
        std::fill(m.out + weight.first_of_row(0), m.out + weight.first_of_row(weight.rows), 0.0f);
        return;
    }
    const int64_t size = lines_of_chunk(weight.rows, m.num_threads), at_once = lines_at_once(weight, weight.rows, size);
    const Cut cut = {true, size, PLACES, BYTES_OF_TOKENS};
    const int64_t blocks_at_once = Blocks::at_once(weight.cols + std::min(at_once, weight.rows), m.num_tokens);
    Blocks rights(m.right, m.right_stride, m.num_tokens, weight.cols);
    rights.hold(blocks_at_once);
    for (int64_t line = 0; line < weight.rows; line += at_once) {
        const int64_t last = std::min(line + at_once, weight.rows);
        const Entries entries(weight, nullptr, cut, line, last, int(m.num_threads));
        Blocks lefts(m.left + line, m.left_stride, m.num_tokens, last - line);
        lefts.hold(blocks_at_once);
#pragma omp parallel num_threads(m.num_threads)
        for (int64_t first = 0; first < m.num_tokens; first += blocks_at_once * TOKENS) {
            const int64_t num_blocks = std::min(blocks_at_once, ceil_div(m.num_tokens - first, TOKENS));
            lefts.fill(first, num_blocks);
            rights.fill(first, num_blocks);
#pragma omp barrier
            const int64_t pieces = entries.num_pieces();
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < entries.num_chunks() * pieces; task++)
                for (int64_t number = 0; number < num_blocks; number++) {
                    const int64_t token = first + number * TOKENS, row = task / pieces * size;
                    const float* grads = lefts.block(number) + row * TOKENS;
                    const int64_t rows = std::min(size, last - line - row);
                    const int64_t tokens = std::min(TOKENS, m.num_tokens - token);
                    with_constant<VECTORS>(ceil_div(tokens, LANES), [&](auto vectors) {
                        differentiate<vectors>(m, entries, grads, rights.block(number), token > 0, task * size, rows);
                    });
                }
        }
    }
}

}  // namespace

extern "C" {
void masked_fp32(const Masked* m) { fill_vectors(m->weight) ? masked_runs(*m) : masked(*m); }
void sampled_fp32(const Sampled* m) {
    fill_vectors(m->weight) && m->num_tokens ? sampled_runs(*m) : sampled(*m);
    clear_edges(*m);
}
}
