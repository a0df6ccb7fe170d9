// Lists the active weights of some lines of a matrix in the order in which products read them. A line is a row of the
// weight, or a column. Lines are taken some at a time (a chunk), and across them some numbers at a time (a piece), whose
// tokens stay in the nearest cache: entries are ordered by chunk, piece, line, and place across.
#pragma once
#include <memory>
#include <vector>

#include "bits.h"

// Holds the active weights of one matrix: single weights, or runs of bn along a row.
struct Active {
    const uint8_t* bits;
    List group_starts;
    List positions;         // of runs; null for single weights, of which group_starts are read
    int64_t num_active, first_row, rows, cols, bn;      // of all matrices; first_row counts the rows of earlier ones

    // Returns the number in `values` of the first active weight that is not before a row.
    int64_t first_of_row(int64_t row) const {
        if (!positions.numbers) return count_before(bits, group_starts, (first_row + row) * cols);
        return lower_bound(positions, num_active, (first_row + row) * blocks_of_row()) * bn;
    }

    int64_t blocks_of_row() const { return (cols + bn - 1) / bn; }

    // Calls use(column, number in `values`) for each active weight of a row whose column is in [begin, end).
    template <class Use>
    void visit(int64_t row, int64_t begin, int64_t end, Use use) const {
        if (positions.numbers) return visit_runs(row, begin, end, use);
        int64_t position = (first_row + row) * cols + begin;
        const int64_t last = position + end - begin, before = position - begin;
        int64_t n = count_before(bits, group_starts, position);
        while (position < last) {
            const int64_t skip = position % 8, count = std::min<int64_t>(64 - skip, last - position);
            uint64_t word = bits_at(bits, position - skip, count + skip) >> skip;
            for (; word; word &= word - 1) use(position - before + __builtin_ctzll(word), n++);
            position += count;
        }
    }

    template <class Use>
    void visit_runs(int64_t row, int64_t begin, int64_t end, Use use) const {
        const int64_t first = (first_row + row) * blocks_of_row();
        for (int64_t n = lower_bound(positions, num_active, first + begin / bn); n < num_active; n++) {
            const int64_t column = (positions[n] - first) * bn;
            if (column >= end) return;
            const int64_t stop = std::min(column + bn, end);
            for (int64_t c = std::max(column, begin); c < stop; c++) use(c, n * bn + c - column);
        }
    }
};

// Is an active weight: where its tokens begin, in bytes, and the number that multiplies them.
struct Entry {
    uint32_t offset;
    float weight;
};

// Says how the lines are cut.
struct Cut {
    bool by_row;
    int64_t lines_of_chunk, across_of_piece, bytes_of_tokens;
};

class Entries {
  public:
    // Lists lines [first, last). Without values, weights are not filled in. Both times it runs on all threads.
    Entries(const Active& active, const float* values, const Cut& cut, int64_t first, int64_t last, int num_threads)
        : active_(active), cut_(cut), first_(first), last_(last), num_threads_(num_threads) {
        const int64_t across = cut.by_row ? active.cols : active.rows;
        num_pieces_ = (across + cut.across_of_piece - 1) / cut.across_of_piece;
        const int64_t per_chunk = num_pieces_ * cut.lines_of_chunk;
        num_chunks_ = (last - first + cut.lines_of_chunk - 1) / cut.lines_of_chunk;
        for (int64_t line = 0; line < last - first; line++)
            slot_of_line_.push_back(line / cut.lines_of_chunk * per_chunk + line % cut.lines_of_chunk);
        for (int64_t place = 0; place < across; place++)
            slot_of_place_.push_back(place / cut.across_of_piece * cut.lines_of_chunk);
        starts_.assign(num_chunks_ * per_chunk + 1, 0);
        count();
        fill(values);
    }

    static constexpr int64_t AHEAD = 8;     // entries that may be read after the last

    int64_t num_pieces() const { return num_pieces_; }
    int64_t num_chunks() const { return num_chunks_; }
    int64_t slot(int64_t chunk, int64_t piece, int64_t line) const {
        return (chunk * num_pieces_ + piece) * cut_.lines_of_chunk + line;
    }
    const Entry* begin(int64_t slot) const { return entries_.get() + starts_[slot]; }
    const Entry* end(int64_t slot) const { return entries_.get() + starts_[slot + 1]; }
    // Returns the number in `values` of a slot's first entry, of a row; the others follow it.
    int64_t first_value(int64_t slot) const { return first_values_[slot]; }

  private:
    // Calls use(slot, place across, number in `values`) for all active weights; threads share the lines.
    template <class Use>
    void visit(Use use) const {
        // A row is searched for each range of columns: wide ones are fewer, narrow ones are shared more evenly.
        const int64_t at_once = std::min<int64_t>(256, ((last_ - first_) / (4 * num_threads_) + 64) / 64 * 64);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads_)
        for (int64_t begin = first_; begin < last_; begin += at_once) {
            const int64_t end = std::min(begin + at_once, last_);
            if (cut_.by_row) {
                for (int64_t row = begin; row < end; row++) {
                    const int64_t of_line = slot_of_line_[row - first_];
                    active_.visit(row, 0, active_.cols, [&](int64_t column, int64_t n) {
                        use(of_line + slot_of_place_[column], column, n);
                    });
                }
            } else {
                for (int64_t row = 0; row < active_.rows; row++) {
                    const int64_t of_place = slot_of_place_[row];
                    active_.visit(row, begin, end, [&](int64_t column, int64_t n) {
                        use(slot_of_line_[column - first_] + of_place, row, n);
                    });
                }
            }
        }
    }

    void count() {
        visit([this](int64_t slot, int64_t, int64_t) { starts_[slot + 1]++; });
        for (size_t slot = 1; slot < starts_.size(); slot++) starts_[slot] += starts_[slot - 1];
    }

    void fill(const float* values) {
        entries_.reset(new Entry[starts_.back() + AHEAD]);
        std::fill_n(entries_.get() + starts_.back(), AHEAD, Entry{});
        first_values_.resize(starts_.size());
        std::vector<int64_t> next(starts_);
        visit([&](int64_t slot, int64_t place, int64_t n) {
            const int64_t i = next[slot]++;
            if (i == starts_[slot]) first_values_[slot] = n;
            entries_[i] = {uint32_t(place * cut_.bytes_of_tokens), values ? values[n] : 0.0f};
        });
    }

    const Active& active_;
    const Cut cut_;
    const int64_t first_, last_;
    const int num_threads_;
    int64_t num_pieces_, num_chunks_;
    std::vector<int64_t> slot_of_line_, slot_of_place_, starts_, first_values_;
    std::unique_ptr<Entry[]> entries_;      // not set to zero before they are filled
};
