// Multiplies with tiles. Nothing is gathered and no dense weight is made: a few rows of the output at a time are summed
// in registers over all active blocks of a line (a block row, or a block column), and written once.
//
// A product is C (rows, width) = sum over blocks of A (rows, depth) B (depth, width). B is repacked into panels of
// PANEL columns, so that it is read in order; widths that are no multiple are filled with zeros.
#include "vectors.h"

namespace {

// Holds one block's part in a panel: where its A and its B start, and how many numbers deep it is.
template <class Kind>
struct Segment {
    const typename Kind::Number* a;
    const typename Kind::Step* b;
    int64_t depth;
};

// Sums ROWS x (VECTORS * LANES) products over all segments, on top of `start` (one row for all, or null). Where it adds to
// `out`, it adds whole sums, so that few terms are added one by one. A lies at a[row * row_stride + step * step_stride].
template <class Kind, int ROWS, int VECTORS>
void sum_up(
    const Segment<Kind>* segments, int64_t num_segments, int64_t row_stride, int64_t step_stride, int64_t row,
    const float* start, bool adds, float* out, int64_t out_stride
) {
    using Step = typename Kind::Step;
    Vector sum[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sum[r][v] = start ? *(const Vector*)(start + v * LANES) : Vector{};
    for (int64_t s = 0; s < num_segments; s++) {
        const auto* a = segments[s].a + row * row_stride;
        const Step* b = segments[s].b;
        const int64_t whole = segments[s].depth / Kind::DEPTH;
        for (int64_t k = 0; k < whole; k++, a += step_stride, b += VECTORS * LANES) {
            Vector panel[VECTORS];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) panel[v] = *(const Vector*)(b + v * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                Step x;
                std::memcpy(&x, a + r * row_stride, sizeof(Step));
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++) Kind::accumulate(sum[r][v], x, panel[v]);
            }
        }
        if (Kind::DEPTH > 1 && segments[s].depth % Kind::DEPTH)
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++)
                    Kind::accumulate(sum[r][v], Kind::last(a + r * row_stride), *(const Vector*)(b + v * LANES));
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            Vector* to = (Vector*)(out + r * out_stride + v * LANES);  // `auto` would assume alignment
            *to = adds ? *to + sum[r][v] : sum[r][v];
        }
}

template <class Kind>
using SumUp = void (*)(
    const Segment<Kind>*, int64_t, int64_t, int64_t, int64_t, const float*, bool, float*, int64_t
);

// Finds the function for a number of rows (1 to MAX_ROWS) and vectors (1 or 2).
template <class Kind, int ROWS>
struct Table {
    static SumUp<Kind> find(int64_t rows, int vectors) {
        if (rows == ROWS) return vectors == 1 ? sum_up<Kind, ROWS, 1> : sum_up<Kind, ROWS, 2>;
        return Table<Kind, ROWS - 1>::find(rows, vectors);
    }
};
template <class Kind>
struct Table<Kind, 0> {
    static SumUp<Kind> find(int64_t, int) { return nullptr; }
};
template <class Kind>
SumUp<Kind> sum_up_for(int64_t rows, int vectors) {
    return Table<Kind, MAX_ROWS>::find(rows, vectors);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int vectors_of(int64_t width) { return width > LANES ? 2 : 1; }

// Rounds a width up to whole vectors: two for a panel, one for a short rest.
inline int64_t padded(int64_t width) { return ceil_div(width, LANES) * LANES; }

struct Masked {
    const void* input;      // (T, I)
    const void* values;     // (N, bm, bn)
    const void* bias;       // (O,) or null
    void* out;              // (T, O)
    void* scratch;          // N * ceil(depth / DEPTH) * padded(width) steps
    const int32_t* positions;
    const int32_t* by_column;   // null for block rows
    const int32_t* starts;      // of the first line
    int64_t num_tokens, input_stride, out_stride;
    int64_t num_lines, block_rows, block_cols, bm, bn, rows, cols, tokens_at_once;
    int64_t transposed, num_threads;
};

struct Sampled {
    const void* left;       // (T, R)
    const void* right;      // (T, C)
    float* out;             // (N, bm, bn), fp32
    void* scratch;          // see sampled()
    const int32_t* positions;
    const int32_t* starts;
    int64_t num_tokens, left_stride, right_stride;
    int64_t num_lines, block_rows, block_cols, bm, bn, rows, cols, tokens_at_once;
    int64_t num_threads;
};

// Repacks one block as panels: B[k][o] of each panel, in steps. A transposed product reads the block's rows as outputs.
template <class Kind>
void pack_block(const Masked& m, const typename Kind::Number* block, typename Kind::Step* to) {
    using Number = typename Kind::Number;
    const int64_t width = m.transposed ? m.bm : m.bn, depth = m.transposed ? m.bn : m.bm;
    const int64_t by_output = m.transposed ? m.bn : 1, by_depth = m.transposed ? 1 : m.bn;
    const int64_t steps = ceil_div(depth, Kind::DEPTH);
    for (int64_t first = 0; first < width; first += PANEL) {
        const int64_t lanes = padded(std::min<int64_t>(PANEL, width - first));
        const int64_t filled = std::min<int64_t>(lanes, width - first);
        Number* panel = (Number*)to;
        if (filled < lanes || depth % Kind::DEPTH) std::memset(to, 0, steps * lanes * sizeof(*to));
        for (int64_t k = 0; k < depth; k++) {
            Number* row = panel + k / Kind::DEPTH * lanes * Kind::DEPTH + k % Kind::DEPTH;
            const Number* from = block + k * by_depth + first * by_output;
            if (Kind::DEPTH == 1 && by_output == 1) std::memcpy(row, from, filled * sizeof(Number));
            else for (int64_t o = 0; o < filled; o++) row[o * Kind::DEPTH] = from[o * by_output];
        }
        to += steps * lanes;
    }
}

template <class Kind>
void masked(const Masked& m) {
    using Number = typename Kind::Number;
    using Step = typename Kind::Step;
    const int64_t width = m.transposed ? m.bm : m.bn, depth = m.transposed ? m.bn : m.bm;
    const int64_t num_outputs = m.transposed ? m.rows : m.cols, num_inputs = m.transposed ? m.cols : m.rows;
    const int64_t steps = ceil_div(depth, Kind::DEPTH);
    const int64_t packed = (width / PANEL * PANEL + padded(width % PANEL)) * steps;
    const int64_t chunks = ceil_div(m.num_tokens, m.tokens_at_once);
    const auto* input = (const Number*)m.input;
    const auto* values = (const Number*)m.values;
    auto* scratch = (Step*)m.scratch;
    const int32_t first_block = m.starts[0], num_blocks = m.starts[m.num_lines] - first_block;
#pragma omp parallel num_threads(m.num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < num_blocks; n++) {
            const int64_t row = m.by_column ? m.by_column[first_block + n] : first_block + n;
            pack_block<Kind>(m, values + row * m.bm * m.bn, scratch + n * packed);
        }
        Segment<Kind>* segments = new Segment<Kind>[std::max(m.block_rows, m.block_cols)];
        float* line_out = new float[m.tokens_at_once * PANEL];
        float start[PANEL];
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < chunks * m.num_lines; task++) {
            const int64_t line = task % m.num_lines, first_token = task / m.num_lines * m.tokens_at_once;
            const int64_t tokens = std::min(m.tokens_at_once, m.num_tokens - first_token);
            const int64_t begin = m.starts[line], end = m.starts[line + 1];
            for (int64_t first = 0; first < width; first += PANEL) {
                const int64_t output = line * width + first;
                const int64_t valid = std::min<int64_t>({PANEL, width - first, num_outputs - output});
                if (valid <= 0) break;
                const int64_t lanes = padded(std::min<int64_t>(PANEL, width - first));
                for (int64_t n = begin; n < end; n++) {
                    const int64_t row = m.by_column ? m.by_column[n] : n;
                    const int64_t position = m.positions[row];
                    const int64_t across = m.transposed ? position % m.block_cols : position / m.block_cols % m.block_rows;
                    segments[n - begin] = {
                        input + first_token * m.input_stride + across * depth,
                        scratch + (n - first_block) * packed + first * steps,
                        std::min(depth, num_inputs - across * depth),
                    };
                }
                std::fill(start, start + PANEL, 0.0f);
                if (m.bias)
                    for (int64_t o = 0; o < valid; o++) start[o] = Kind::widened(((const Number*)m.bias)[output + o]);
                const bool direct = Kind::DEPTH == 1 && valid == lanes;
                auto* out = (Number*)m.out + first_token * m.out_stride + output;
                const int64_t groups = ceil_div(tokens, MAX_ROWS);
                for (int64_t group = 0; group < groups; group++) {  // of nearly equal size
                    const int64_t row = group * tokens / groups, rows = (group + 1) * tokens / groups - row;
                    float* to = direct ? (float*)(out + row * m.out_stride) : line_out;
                    sum_up_for<Kind>(rows, vectors_of(lanes))(
                        segments, end - begin, m.input_stride, Kind::DEPTH, row, start, false, to,
                        direct ? m.out_stride : lanes
                    );
                    if (!direct)
                        for (int64_t r = 0; r < rows; r++)
                            for (int64_t o = 0; o < valid; o++)
                                out[(row + r) * m.out_stride + o] = Kind::narrowed(line_out[r * lanes + o]);
                }
            }
        }
        delete[] segments;
        delete[] line_out;
    }
}

// Repacks the tokens of one block column (or row) as panels of B, or as A: [step][width padded], zeros in the padding.
template <class Kind>
void pack_tokens(
    const typename Kind::Number* from, int64_t stride, int64_t tokens, int64_t filled, int64_t lanes,
    typename Kind::Step* to
) {
    using Number = typename Kind::Number;
    const int64_t steps = ceil_div(tokens, Kind::DEPTH);
    if (filled < lanes || tokens % Kind::DEPTH) std::memset(to, 0, steps * lanes * sizeof(*to));
    for (int64_t t = 0; t < tokens; t++) {
        Number* row = (Number*)to + t / Kind::DEPTH * lanes * Kind::DEPTH + t % Kind::DEPTH;
        const Number* token = from + t * stride;
        if (Kind::DEPTH == 1) std::memcpy(row, token, filled * sizeof(Number));
        else for (int64_t o = 0; o < filled; o++) row[o * Kind::DEPTH] = token[o];
    }
}

// Sets what hangs over an edge to zero, also where left or right are not finite.
void clear_edges(const Sampled& m, int64_t row, int64_t col, float* block) {
    const int64_t height = std::min(m.bm, m.rows - row * m.bm), width = std::min(m.bn, m.cols - col * m.bn);
    for (int64_t r = 0; r < m.bm; r++) {
        const int64_t from = r < height ? width : 0;
        std::fill(block + r * m.bn + from, block + (r + 1) * m.bn, 0.0f);
    }
}

// Sums over chunks of tokens, repacked: left as [block row][step][bm], right as [block column][panel][step][lanes].
template <class Kind>
void sampled(const Sampled& m) {
    using Number = typename Kind::Number;
    using Step = typename Kind::Step;
    const auto* left = (const Number*)m.left;
    const auto* right = (const Number*)m.right;
    const int64_t max_steps = ceil_div(m.tokens_at_once, Kind::DEPTH);
    const int64_t padded_bn = m.bn / PANEL * PANEL + padded(m.bn % PANEL);
    auto* packed_left = (Step*)m.scratch;
    auto* packed_right = packed_left + m.block_rows * m.bm * max_steps;
    const int64_t row_groups = ceil_div(m.bm, MAX_ROWS), first_block = m.starts[0];
    const int64_t per_matrix = m.block_rows * m.block_cols;
#pragma omp parallel num_threads(m.num_threads)
    for (int64_t first_token = 0; first_token < m.num_tokens; first_token += m.tokens_at_once) {
        const int64_t tokens = std::min(m.tokens_at_once, m.num_tokens - first_token);
        const int64_t steps = ceil_div(tokens, Kind::DEPTH);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < m.block_rows; i++)
            pack_tokens<Kind>(
                left + first_token * m.left_stride + i * m.bm, m.left_stride, tokens,
                std::min(m.bm, m.rows - i * m.bm), m.bm, packed_left + i * m.bm * steps
            );
#pragma omp for schedule(static)
        for (int64_t j = 0; j < m.block_cols; j++)
            for (int64_t first = 0; first < m.bn; first += PANEL) {
                const int64_t lanes = padded(std::min<int64_t>(PANEL, m.bn - first));
                const int64_t filled = std::min<int64_t>({lanes, m.bn - first, m.cols - j * m.bn - first});
                pack_tokens<Kind>(
                    right + first_token * m.right_stride + j * m.bn + first, m.right_stride, tokens,
                    std::max<int64_t>(filled, 0), lanes, packed_right + (j * padded_bn + first) * steps
                );
            }
#pragma omp for schedule(dynamic)
        for (int64_t line = 0; line < m.num_lines; line++)
            for (int64_t n = m.starts[line]; n < m.starts[line + 1]; n++) {
                const int64_t j = m.positions[n] % per_matrix % m.block_cols;
                float* block = m.out + n * m.bm * m.bn;
                for (int64_t first = 0; first < m.bn; first += PANEL) {
                    const int64_t lanes = padded(std::min<int64_t>(PANEL, m.bn - first));
                    const int64_t valid = std::min<int64_t>(lanes, m.bn - first);
                    const Step* b = packed_right + (j * padded_bn + first) * steps;
                    for (int64_t group = 0; group < row_groups; group++) {
                        const int64_t row = group * m.bm / row_groups, rows = (group + 1) * m.bm / row_groups - row;
                        const Segment<Kind> segment = {
                            (const Number*)(packed_left + line * m.bm * steps), b, steps * Kind::DEPTH
                        };
                        float sums[MAX_ROWS * PANEL];
                        float* to = block + row * m.bn + first;
                        const bool direct = valid == lanes;
                        if (!direct && first_token)
                            for (int64_t r = 0; r < rows; r++) {
                                std::memset(sums + r * lanes, 0, lanes * sizeof(float));
                                std::memcpy(sums + r * lanes, to + r * m.bn, valid * sizeof(float));
                            }
                        float* target = direct ? to : sums;
                        const int64_t stride = direct ? m.bn : lanes;
                        sum_up_for<Kind>(rows, vectors_of(lanes))(
                            &segment, 1, Kind::DEPTH, m.bm * Kind::DEPTH, row, nullptr, first_token > 0, target,
                            stride
                        );
                        if (!direct)
                            for (int64_t r = 0; r < rows; r++)
                                std::memcpy(to + r * m.bn, sums + r * lanes, valid * sizeof(float));
                    }
                }
                clear_edges(m, line, j, block);
            }
    }
    if (m.num_tokens == 0)
        std::memset(m.out + first_block * m.bm * m.bn, 0, (m.starts[m.num_lines] - first_block) * m.bm * m.bn * sizeof(float));
}

}  // namespace

extern "C" {

int lanes() { return LANES; }

int has_bf16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

void masked_fp32(const Masked* m) { masked<Float32>(*m); }
void sampled_fp32(const Sampled* m) { sampled<Float32>(*m); }
#if defined(__AVX512BF16__)
void masked_bf16(const Masked* m) { masked<BFloat16>(*m); }
void sampled_bf16(const Sampled* m) { sampled<BFloat16>(*m); }
#endif
}
