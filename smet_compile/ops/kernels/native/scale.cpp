// The optimizer steps of SCALE of many parameters: each output unit moves by its gradient over the gradient's norm.
//
// The rule is that of optim/scale.py; roundings are those of ops/law.py. Compiled without fused multiply-adds, results
// are the same bits, but for norms whose squares add up in another order, in fp64.
#include <cfloat>
#include <cmath>
#include <vector>

#include "noise.h"
#include "stored.h"

namespace {

constexpr int64_t NUM_PARTS = 16;  // of the lines, whose squares add up in this order with any number of threads

struct Update {
    void *values, *grad, *exp_avg;  // exp_avg: null where the gradient itself is normalized
    int64_t *num_skipped, *step;
    const uint8_t* bits;            // null: a plain parameter, whose entries are counted
    const void* positions;          // of runs and tiles
    const void* group_starts;       // of single weights
    int64_t num_blocks, num_positions, wide_index, num_matrices, rows, cols, block_rows, block_cols, bm, bn;
    int64_t units_are_columns, weight_kind, moment_kind, rounds, seed;
    double rate, momentum, weight_decay;
};

// Memory for one piece of work, in a core's cache.
struct Scratch {
    std::vector<float> grad, mean, weight, norms;
    std::vector<uint32_t> columns, places;
    std::vector<double> squares;

    Scratch(int64_t entries, int64_t units)
        : grad(entries), mean(entries), weight(entries), norms(units), columns(entries), places(entries),
          squares(units) {}
};

// Holds entries that lie one after another in `values`, in rows of one length. Row r belongs to unit `unit` + r, or its
// entries to the units `unit` + column.
struct Piece {
    int64_t first, rows, length, row, unit;
    const uint32_t* columns;  // of each entry of a row, from 0; null: they are counted
    int64_t block;            // the position of a block; -1 where each entry is one
};

class Worker {
  public:
    int64_t num_skipped = 0;

    Worker(const Update& u, Scratch& scratch, uint32_t key)
        : u_(u), scratch_(scratch), key_(key), group_starts_{u.group_starts, u.wide_index},
          positions_{u.positions, u.wide_index} {}

    // Adds the squares of a line to those of its units.
    void measure(int64_t line, double* squares, int64_t first_unit) {
        for_pieces(line, [&](const Piece& piece) {
            const float* grad = grad_of(piece);
            const float* mean = mean_of(piece, grad);
            if (mean) add_squares(piece, grad, mean, squares + piece.unit - first_unit);
        });
    }

    // Moves the weights of a line. The units' norms begin with that of first_unit.
    void move(int64_t line, const float* norms, int64_t first_unit) {
        for_pieces(line, [&](const Piece& piece) {
            const float* grad = grad_of(piece);
            const float* mean = mean_of(piece, grad);
            if (mean) move_piece(piece, grad, mean, norms + piece.unit - first_unit);
            else num_skipped++;
        });
    }

    // Moves a line whose units are rows of its own: norms and weights in one go.
    void run(int64_t line) {
        double* squares = scratch_.squares.data();
        const int64_t first_unit = unit_of(line), units = line_rows(line);
        std::fill_n(squares, units, 0.0);
        measure(line, squares, first_unit);
        for (int64_t i = 0; i < units; i++) scratch_.norms[i] = float(std::sqrt(squares[i]));
        move(line, scratch_.norms.data(), first_unit);
    }

  private:
    int64_t unit_of(int64_t line) const { return line / u_.block_rows * u_.rows + line % u_.block_rows * u_.bm; }
    int64_t line_rows(int64_t line) const { return std::min(u_.bm, u_.rows - line % u_.block_rows * u_.bm); }

    // Calls use(piece) for the pieces of a line: the active entries of a row, or the blocks of a row of blocks.
    template <class Use>
    void for_pieces(int64_t line, Use use) {
        const int64_t matrix = line / u_.block_rows;
        if (u_.positions) return for_blocks(line, matrix, use);
        const int64_t unit = u_.units_are_columns ? matrix * u_.cols : line;
        if (!u_.bits) return use(Piece{line * u_.cols, 1, u_.cols, line, unit, nullptr, -1});
        const int64_t first = count_before(u_.bits, group_starts_, line * u_.cols);
        const int64_t n = list_columns(line);
        if (n) use(Piece{first, 1, n, line, unit, scratch_.columns.data(), -1});
    }

    template <class Use>
    void for_blocks(int64_t line, int64_t matrix, Use use) {
        const int64_t begin = line * u_.block_cols, end = begin + u_.block_cols, size = u_.bm * u_.bn;
        for (int64_t n = lower_bound(positions_, u_.num_blocks, begin); n < u_.num_blocks; n++) {
            const int64_t position = positions_[n];
            if (position >= end) return;
            const int64_t unit =
                u_.units_are_columns ? matrix * u_.cols + (position - begin) * u_.bn : unit_of(line);
            use(Piece{n * size, u_.bm, u_.bn, line, unit, nullptr, position});
        }
    }

    // Lists the columns of a row's active weights, and returns how many there are.
    int64_t list_columns(int64_t row) {
        uint32_t* to = scratch_.columns.data();
        int64_t position = row * u_.cols;
        for (int64_t column = 0; column < u_.cols;) {
            const int64_t skip = position % 8, count = std::min<int64_t>(64 - skip, u_.cols - column);
            uint64_t word = bits_at(u_.bits, position - skip, count + skip) >> skip;
            for (; word; word &= word - 1) *to++ = uint32_t(column + __builtin_ctzll(word));
            position += count;
            column += count;
        }
        return to - scratch_.columns.data();
    }

    const float* grad_of(const Piece& piece) {
        return widened(u_.grad, u_.weight_kind, piece.first, piece.rows * piece.length, scratch_.grad.data());
    }

    // Returns what is normalized; null for a block whose gradient is not finite.
    const float* mean_of(const Piece& piece, const float* grad) {
        const int64_t n = piece.rows * piece.length;
        if (piece.block >= 0 && !all_finite(n, grad)) return nullptr;
        if (!u_.exp_avg) return grad;
        float* __restrict mean = scratch_.mean.data();
        const float* before = widened(u_.exp_avg, u_.moment_kind, piece.first, n, mean);
        const float momentum = float(u_.momentum), rest = float(1 - u_.momentum);
        for (int64_t i = 0; i < n; i++) mean[i] = momentum * before[i] + rest * grad[i];
        return mean;
    }

    // A single weight or an entry of a plain parameter is left out alone where its gradient is not finite.
    void add_squares(const Piece& piece, const float* grad, const float* mean, double* squares) const {
        for (int64_t r = 0; r < piece.rows; r++) {
            const float *x = mean + r * piece.length, *g = grad + r * piece.length;
            if (u_.units_are_columns) {
                const int64_t n = within(piece, u_.cols);
                for (int64_t i = 0; i < n; i++)
                    squares[piece.columns ? piece.columns[i] : i] += is_finite(g[i]) ? double(x[i]) * x[i] : 0.0;
                continue;
            }
            if (!is_inside(piece, r)) return;
            double sums[8] = {};
            int64_t i = 0;
            for (; i + 8 <= piece.length; i += 8)
                for (int lane = 0; lane < 8; lane++)
                    sums[lane] += is_finite(g[i + lane]) ? double(x[i + lane]) * x[i + lane] : 0.0;
            for (; i < piece.length; i++) sums[i % 8] += is_finite(g[i]) ? double(x[i]) * x[i] : 0.0;
            for (double sum : sums) squares[r] += sum;
        }
    }

    // Rows and columns beyond the edge hold zeros.
    bool is_inside(const Piece& piece, int64_t r) const {
        return piece.block < 0 || piece.row % u_.block_rows * u_.bm + r < u_.rows;
    }
    int64_t within(const Piece& piece, int64_t cols) const {
        return piece.block < 0 ? piece.length : std::min(u_.bn, cols - piece.block % u_.block_cols * u_.bn);
    }

    void move_piece(const Piece& piece, const float* grad, const float* mean, const float* norms) {
        const int64_t n = piece.rows * piece.length;
        float* weight = widened(u_.values, u_.weight_kind, piece.first, n, scratch_.weight.data());
        for (int64_t r = 0; r < piece.rows; r++) {
            const int64_t at = r * piece.length;
            if (!is_inside(piece, r)) break;
            if (u_.units_are_columns) move_columns(piece, grad + at, mean + at, norms, weight + at);
            else move_row(piece.length, grad + at, mean + at, norms[r], weight + at);
        }
        if (u_.rounds) find_places(piece, n);
        if (u_.weight_kind == BF16) store<0>(n, grad, weight, (uint16_t*)u_.values + piece.first);
        if (u_.exp_avg) store_mean(piece, n, grad, mean);
    }

    void move_row(int64_t n, const float* __restrict grad, const float* mean, float norm, float* __restrict weight) {
        const float rate = float(u_.rate), decay = float(u_.weight_decay), divisor = std::max(norm, FLT_MIN);
        int32_t finite = 0;
        for (int64_t i = 0; i < n; i++) {
            const float moved = weight[i] - rate * (mean[i] / divisor + decay * weight[i]);
            const bool moves = is_finite(grad[i]);
            finite += moves;
            weight[i] = moves ? moved : weight[i];
        }
        num_skipped += n - finite;
    }

    void move_columns(const Piece& piece, const float* grad, const float* mean, const float* norms, float* weight) {
        const float rate = float(u_.rate), decay = float(u_.weight_decay);
        const int64_t n = within(piece, u_.cols);
        for (int64_t i = 0; i < n; i++) {
            if (!is_finite(grad[i])) {
                num_skipped++;
                continue;
            }
            const float divisor = std::max(norms[piece.columns ? piece.columns[i] : i], FLT_MIN);
            weight[i] -= rate * (mean[i] / divisor + decay * weight[i]);
        }
    }

    void store_mean(const Piece& piece, int64_t n, const float* grad, const float* mean) {
        if (u_.moment_kind == BF16) return store<1>(n, grad, mean, (uint16_t*)u_.exp_avg + piece.first);
        float* to = (float*)u_.exp_avg + piece.first;
        for (int64_t i = 0; i < n; i++) to[i] = is_finite(grad[i]) ? mean[i] : to[i];
    }

    // Stores bf16 where the gradient is finite. STREAM: 0 for weights, 1 for the first slot.
    template <int STREAM>
    void store(int64_t n, const float* __restrict grad, const float* __restrict from, uint16_t* __restrict to) const {
        if (!u_.rounds) {
            for (int64_t i = 0; i < n; i++) to[i] = is_finite(grad[i]) ? to_bf16(from[i]) : to[i];
            return;
        }
        const uint32_t* __restrict places = scratch_.places.data();
        for (int64_t i = 0; i < n; i++) {
            const uint32_t noise = STREAM ? hash32(places[i] ^ WORD) & 0xFFFF : hash32(places[i]) >> 16;
            to[i] = is_finite(grad[i]) ? round_by(from[i], noise) : to[i];
        }
    }

    // Finds what is hashed for the noise of each entry.
    void find_places(const Piece& piece, int64_t n) {
        uint32_t* __restrict to = scratch_.places.data();
        if (piece.block >= 0) return count_places(to, n, 0, block_key(key_, piece.block));
        const int64_t begin = piece.row * u_.cols;
        const uint32_t* columns = piece.columns;
        for (int64_t i = 0; i < n;) {  // a row may cross from one span to the next, which has a key of its own
            const int64_t span = (begin + (columns ? columns[i] : i)) / SPAN, end = (span + 1) * SPAN - begin;
            const int64_t stop = columns ? std::lower_bound(columns + i, columns + n, end) - columns : std::min(n, end);
            const uint32_t key = block_key(key_, span), first = uint32_t(begin - span * SPAN);
            if (columns) for (int64_t j = i; j < stop; j++) to[j] = (first + columns[j]) ^ key;
            else for (int64_t j = i; j < stop; j++) to[j] = (first + uint32_t(j)) ^ key;
            i = stop;
        }
    }

    const Update& u_;
    Scratch& scratch_;
    const uint32_t key_;
    const List group_starts_, positions_;
};

// Moves a parameter whose units are columns: first all norms, by parts of the lines, then all weights.
void run_by_columns(const Update& u, Worker& worker, int64_t num_lines, std::vector<double>& squares, float* norms) {
    const int64_t num_units = u.num_matrices * u.cols;
#pragma omp for schedule(static)
    for (int64_t part = 0; part < NUM_PARTS; part++)
        for (int64_t line = num_lines * part / NUM_PARTS; line < num_lines * (part + 1) / NUM_PARTS; line++)
            worker.measure(line, squares.data() + part * num_units, 0);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < num_units; unit++) {
        double sum = 0;
        for (int64_t part = 0; part < NUM_PARTS; part++) sum += squares[part * num_units + unit];
        norms[unit] = float(std::sqrt(sum));
    }
#pragma omp for schedule(static)
    for (int64_t line = 0; line < num_lines; line++) worker.move(line, norms, 0);
}

}  // namespace

extern "C" void update_all(const Update* updates, int64_t num_updates, int64_t num_threads) {
    std::vector<std::vector<double>> squares(num_updates);
    std::vector<std::vector<float>> norms(num_updates);
    int64_t num_entries = 0;
    for (int64_t i = 0; i < num_updates; i++) {
        const Update& u = updates[i];
        ++*u.step;
        num_entries += u.num_blocks * u.bm * u.bn;
        if (!u.units_are_columns) continue;
        squares[i].assign(NUM_PARTS * u.num_matrices * u.cols, 0.0);
        norms[i].resize(u.num_matrices * u.cols);
    }
    // One team of threads for all parameters: threads that sleep in between are slow to wake.
#pragma omp parallel num_threads(num_threads) if (num_entries > 32 * GROUP)
    for (int64_t i = 0; i < num_updates; i++) {
        const Update& u = updates[i];
        Scratch scratch(u.positions ? u.bm * u.bn : u.cols, u.bm);
        Worker worker(u, scratch, noise_key(u.seed, *u.step));
        const int64_t num_lines = u.num_matrices * u.block_rows;
        if (u.units_are_columns) {
            run_by_columns(u, worker, num_lines, squares[i], norms[i].data());
        } else {
#pragma omp for schedule(static) nowait
            for (int64_t line = 0; line < num_lines; line++) worker.run(line);
        }
#pragma omp atomic
        *u.num_skipped += worker.num_skipped;
    }
}
