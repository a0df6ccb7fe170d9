// Multiplies with runs along a row that are some vectors long. An entry is a run: the product with its inputs, or with its
// outputs, holds sums in registers for several rows or columns, which share what they read of the tokens.
#pragma once
#include "products.h"

constexpr int64_t LONGEST_RUN = MAX_LINES;
constexpr int ROWS_AT_ONCE = LANES == 16 ? 8 : 4;   // rows of which two vectors of sums are in registers
constexpr int COLUMNS_AT_ONCE = 4;                  // columns of which WIDE vectors of sums are in registers
constexpr int WIDE = LANES == 16 ? 4 : 2;
constexpr int AHEAD = Entries::AHEAD / 2;   // entries whose tokens and weights are fetched early

inline bool fill_vectors(const Active& weight) {
    return weight.positions.numbers && weight.bn % LANES == 0 && weight.bn <= LONGEST_RUN;
}

// Lists the runs of a matrix by columns of runs, and in pieces of MAX_LINES rows.
class Runs {
  public:
    Runs(const Active& weight, int64_t num_threads)
        : weight_(weight), whole_(as_single(weight)),
          entries_(whole_, nullptr, {false, 1, MAX_LINES, BYTES_OF_TOKENS}, 0, whole_.cols, int(num_threads)) {}

    int64_t num_columns() const { return whole_.cols; }
    int64_t columns_of_chunk() const { return MAX_LINES / weight_.bn; }
    int64_t num_chunks() const { return ceil_div(num_columns(), columns_of_chunk()); }
    int64_t num_pieces() const { return entries_.num_pieces(); }
    int64_t rows(int64_t piece) const { return std::min(MAX_LINES, weight_.rows - piece * MAX_LINES); }
    // Returns how many columns of the matrix a column of runs has.
    int64_t width(int64_t column) const { return std::min(weight_.bn, weight_.cols - column * weight_.bn); }
    const Entry* begin(int64_t column, int64_t piece) const { return entries_.begin(entries_.slot(column, piece, 0)); }
    const Entry* end(int64_t column, int64_t piece) const { return entries_.end(entries_.slot(column, piece, 0)); }

  private:
    static Active as_single(Active weight) {
        weight.cols = weight.blocks_of_row();
        weight.bn = 1;
        return weight;
    }

    const Active& weight_;
    const Active whole_;
    const Entries entries_;
};

// Adds the products of one run of each row with its inputs to a vector pair of the rows' sums.
template <int ROWS>
void add_inputs(const float* const* weights, const float* x, int64_t width, float* const* sums, int64_t token) {
    Vector sum[ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < 2; v++) sum[i][v] = *(const Vector*)(sums[i] + token + v * LANES);
    for (int64_t k = 0; k < width; k++) {
        const Vector x0 = *(const Vector*)(x + k * TOKENS + token);
        const Vector x1 = *(const Vector*)(x + k * TOKENS + token + LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            sum[i][0] += weights[i][k] * x0;
            sum[i][1] += weights[i][k] * x1;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < 2; v++) *(Vector*)(sums[i] + token + v * LANES) = sum[i][v];
}

// Multiplies a piece of the rows with one block of tokens.
inline void multiply_rows(const Masked& m, const Runs& runs, const float* block, int64_t first_token, int64_t piece) {
    alignas(64) float sums[MAX_LINES * TOKENS];
    const int64_t row = piece * MAX_LINES, rows = runs.rows(piece), bn = m.weight.bn;
    const int64_t tokens = std::min(TOKENS, m.num_tokens - first_token);
    for (int64_t i = 0; i < rows; i++)
        std::fill_n(sums + i * TOKENS, TOKENS, m.bias ? m.bias[row + i] : 0.0f);
    for (int64_t column = 0; column < runs.num_columns(); column++) {
        const Entry* const end = runs.end(column, piece);
        for (const Entry* entry = runs.begin(column, piece); entry < end; entry += ROWS_AT_ONCE) {
            const int64_t count = std::min<int64_t>(ROWS_AT_ONCE, end - entry);
            const float* weights[ROWS_AT_ONCE];
            float* to[ROWS_AT_ONCE];
            for (int64_t i = 0; i < count; i++) {
                weights[i] = m.values + int64_t(entry[i].number) * bn;
                to[i] = sums + entry[i].offset / sizeof(float) - row * TOKENS;
            }
            with_constant<ROWS_AT_ONCE>(count, [&](auto size) {
                for (int64_t token = 0; token < tokens; token += PANEL)
                    add_inputs<size>(weights, block + column * bn * TOKENS, runs.width(column), to, token);
            });
        }
    }
    transpose(sums, TOKENS, rows, tokens, m.out + first_token * m.out_stride + row, m.out_stride);
}

// Adds the products of runs with the tokens of their rows to some vectors of the sums of some columns.
template <int COLS>
void add_outputs(const Entry* entry, const Entry* end, const float* values, int64_t bn, const float* block, float* sums) {
    Vector sum[COLS][WIDE];
#pragma GCC unroll 8
    for (int i = 0; i < COLS; i++)
        for (int v = 0; v < WIDE; v++) sum[i][v] = *(const Vector*)(sums + i * TOKENS + v * LANES);
    for (; entry < end; entry++) {
        const Vector *x = at(block, *entry), *x_ahead = at(block, entry[AHEAD]);
        const float* weights = values + int64_t(entry->number) * bn;
        __builtin_prefetch(values + int64_t(entry[AHEAD].number) * bn);
        Vector each[WIDE];
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; v++) each[v] = x[v];
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; v++) __builtin_prefetch(x_ahead + v);
#pragma GCC unroll 4
        for (int i = 0; i < COLS; i++)
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; v++) sum[i][v] += weights[i] * each[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < COLS; i++)
        for (int v = 0; v < WIDE; v++) *(Vector*)(sums + i * TOKENS + v * LANES) = sum[i][v];
}

// Multiplies a chunk of the columns of runs with one block of tokens.
inline void multiply_columns(const Masked& m, const Runs& runs, const float* block, int64_t first_token, int64_t chunk) {
    alignas(64) float sums[MAX_LINES * TOKENS];
    const int64_t bn = m.weight.bn, first = chunk * runs.columns_of_chunk(), line = first * bn;
    const int64_t last = std::min(first + runs.columns_of_chunk(), runs.num_columns());
    const int64_t tokens = std::min(TOKENS, m.num_tokens - first_token), lines = std::min(last * bn, m.weight.cols) - line;
    for (int64_t i = 0; i < lines; i++) std::fill_n(sums + i * TOKENS, TOKENS, m.bias ? m.bias[line + i] : 0.0f);
    for (int64_t piece = 0; piece < runs.num_pieces(); piece++)
        for (int64_t column = first; column < last; column++)
            for (int64_t i = 0; i < runs.width(column); i += COLUMNS_AT_ONCE)
                with_constant<COLUMNS_AT_ONCE>(runs.width(column) - i, [&](auto size) {
                    float* const to = sums + (column * bn + i - line) * TOKENS;
                    for (int64_t token = 0; token < tokens; token += WIDE * LANES)
                        add_outputs<size>(runs.begin(column, piece), runs.end(column, piece), m.values + i, bn,
                                          block + token, to + token);
                });
    transpose(sums, TOKENS, lines, tokens, m.out + first_token * m.out_stride + line, m.out_stride);
}

inline void masked_runs(const Masked& m) {
    const Runs runs(m.weight, m.num_threads);
    const int64_t inputs = m.transposed ? m.weight.cols : m.weight.rows;
    const int64_t parts = m.transposed ? runs.num_pieces() : runs.num_chunks();
    const int64_t at_once = Blocks::at_once(inputs, m.num_tokens);
    Blocks blocks(m.input, m.input_stride, m.num_tokens, inputs);
    blocks.hold(at_once);
#pragma omp parallel num_threads(m.num_threads)
    for (int64_t first = 0; first < m.num_tokens; first += at_once * TOKENS) {
        const int64_t num_blocks = std::min(at_once, ceil_div(m.num_tokens - first, TOKENS));
        blocks.fill(first, num_blocks);
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num_blocks * parts; task++) {
            const auto multiply = m.transposed ? multiply_rows : multiply_columns;
            const int64_t number = task % num_blocks;
            multiply(m, runs, blocks.block(number), first + number * TOKENS, task / num_blocks);
        }
    }
}

// Adds to a vector of each row's gradient of a run what some tokens give, or writes it there.
template <int ROWS>
void add_gradients(const float* const* grads, const float* x, int64_t stride, int64_t tokens, bool adds,
                   float* const* out) {
    Vector sum[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) sum[i] = adds ? *(const Vector*)out[i] : Vector{};
    for (int64_t token = 0; token < tokens; token++) {
        const Vector each = *(const Vector*)(x + token * stride);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) sum[i] += grads[i][token] * each;
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) *(Vector*)out[i] = sum[i];
}

// Adds to the gradients of runs of one piece and column what one block of tokens gives.
inline void differentiate_runs(const Sampled& m, const Entry* entry, const Entry* end, const float* grads,
                               const float* panel, int64_t first_token) {
    const int64_t bn = m.weight.bn, tokens = std::min(TOKENS, m.num_tokens - first_token);
    for (; entry < end; entry += ROWS_AT_ONCE) {
        const int64_t count = std::min<int64_t>(ROWS_AT_ONCE, end - entry);
        for (int64_t col = 0; col < bn; col += LANES) {
            const float* of_rows[ROWS_AT_ONCE];
            float* out[ROWS_AT_ONCE];
            for (int64_t i = 0; i < count; i++) {
                of_rows[i] = (const float*)at(grads, entry[i]);
                out[i] = m.out + int64_t(entry[i].number) * bn + col;
            }
            with_constant<ROWS_AT_ONCE>(count, [&](auto size) {
                add_gradients<size>(of_rows, panel + col, bn, tokens, first_token > 0, out);
            });
        }
    }
}

inline void sampled_runs(const Sampled& m) {
    const Runs runs(m.weight, m.num_threads);
    const int64_t rows = m.weight.rows, cols = m.weight.cols, bn = m.weight.bn;
    const int64_t at_once = Blocks::at_once(rows + cols, m.num_tokens);
    Blocks lefts(m.left, m.left_stride, m.num_tokens, rows), rights(m.right, m.right_stride, m.num_tokens, cols, bn);
    lefts.hold(at_once);
    rights.hold(at_once);
#pragma omp parallel num_threads(m.num_threads)
    for (int64_t first = 0; first < m.num_tokens; first += at_once * TOKENS) {
        const int64_t num_blocks = std::min(at_once, ceil_div(m.num_tokens - first, TOKENS));
        lefts.fill(first, num_blocks);
        rights.fill(first, num_blocks);
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < runs.num_pieces() * runs.num_chunks(); task++) {
            const int64_t piece = task % runs.num_pieces(), begin = task / runs.num_pieces() * runs.columns_of_chunk();
            const int64_t end = std::min(begin + runs.columns_of_chunk(), runs.num_columns());
            for (int64_t number = 0; number < num_blocks; number++)
                for (int64_t column = begin; column < end; column++)
                    differentiate_runs(m, runs.begin(column, piece), runs.end(column, piece), lefts.block(number),
                                       rights.block(number) + column * bn * TOKENS, first + number * TOKENS);
        }
    }
}
