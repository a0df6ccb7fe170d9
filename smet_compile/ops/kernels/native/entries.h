// Lists the active weights of some lines of a matrix in the order in which products read them. A line is a row of the
// weight, or a column. Lines are taken some at a time (a chunk), and so are the numbers across them (a piece), whose
// tokens stay in a core's cache: entries are ordered by chunk, piece, line, and place across.
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
        int64_t n = count_before(bits, group_starts, (first_row + row) * cols + begin);
        words(row, begin, end, [&](int64_t column, uint64_t word) {
            for (; word; word &= word - 1) use(column + __builtin_ctzll(word), n++);
        });
    }

    // Counts the active weights of a row whose column is in [begin, end).
    int64_t count(int64_t row, int64_t begin, int64_t end) const {
        int64_t found = 0;
        if (positions.numbers) visit_runs(row, begin, end, [&](int64_t, int64_t) { found++; });
        else words(row, begin, end, [&](int64_t, uint64_t word) { found += __builtin_popcountll(word); });
        return found;
    }

  private:
    // Calls use(first column, bits) for each word of a row.
    template <class Use>
    void words(int64_t row, int64_t begin, int64_t end, Use use) const {
        int64_t position = (first_row + row) * cols + begin;
        for (int64_t column = begin; column < end;) {
            const int64_t skip = position % 8, count = std::min<int64_t>(64 - skip, end - column);
            use(column, bits_at(bits, position - skip, count + skip) >> skip);
            position += count;
            column += count;
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

// Is an active weight: where its tokens begin, in bytes, and the number that multiplies them, or its own in `values`.
struct Entry {
    uint32_t offset;
    union {
        float weight;
        uint32_t number;
    };
};

// Says how the lines are cut.
struct Cut {
    bool by_row;
    int64_t lines_of_chunk, across_of_piece, bytes_of_tokens;
};

class Entries {
  public:
    // Lists lines [first, last), with all threads. Without values, entries hold their numbers in `values`.
    Entries(const Active& active, const float* values, const Cut& cut, int64_t first, int64_t last, int num_threads)
        : active_(active), cut_(cut), first_(first), last_(last), num_threads_(num_threads) {
        const int64_t across = cut.by_row ? active.cols : active.rows;
        num_pieces_ = (across + cut.across_of_piece - 1) / cut.across_of_piece;
        num_chunks_ = (last - first + cut.lines_of_chunk - 1) / cut.lines_of_chunk;
        const int64_t num_slots = num_chunks_ * num_pieces_ * cut.lines_of_chunk;
        starts_.assign(num_slots + 1, 0);
        if (cut.by_row) count_rows();
        else count_columns();
        for (int64_t slot = 0; slot < num_slots; slot++) starts_[slot + 1] += starts_[slot];
        entries_.reset(new Entry[starts_.back() + AHEAD]);
        std::fill_n(entries_.get() + starts_.back(), AHEAD, Entry{});
        if (cut.by_row) fill_rows(values);
        else fill_columns(values);
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
    // Calls use(slot, row, first column, column after the last) for each row and piece; threads share the rows.
    template <class Use>
    void for_rows(Use use) const {
#pragma omp parallel for schedule(static) num_threads(num_threads_)
        for (int64_t row = first_; row < last_; row++)
            for (int64_t piece = 0; piece < num_pieces_; piece++) {
                const int64_t begin = piece * cut_.across_of_piece;
                use(slot_of(row, piece), row, begin, std::min(begin + cut_.across_of_piece, active_.cols));
            }
    }

    // Calls use(slot, row, number in `values`) for each active weight; threads share the columns.
    template <class Use>
    void for_columns(Use use) const {
        // A row is searched for each range of columns: wide ones are fewer, narrow ones are shared more evenly.
        const int64_t at_once = std::min<int64_t>(256, ((last_ - first_) / (4 * num_threads_) + 64) / 64 * 64);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads_)
        for (int64_t begin = first_; begin < last_; begin += at_once) {
            const int64_t end = std::min(begin + at_once, last_);
            std::vector<int64_t> slots;
            for (int64_t piece = 0; piece < num_pieces_; piece++) {
                slots.clear();
                for (int64_t column = begin; column < end; column++) slots.push_back(slot_of(column, piece));
                const int64_t last_row = std::min((piece + 1) * cut_.across_of_piece, active_.rows);
                for (int64_t row = piece * cut_.across_of_piece; row < last_row; row++)
                    active_.visit(row, begin, end, [&](int64_t column, int64_t n) {
                        use(slots[column - begin], row, n);
                    });
            }
        }
    }

    Entry made(int64_t across, const float* values, int64_t n) const {
        Entry entry = {uint32_t(across * cut_.bytes_of_tokens), {}};
        if (values) entry.weight = values[n];
        else entry.number = uint32_t(n);
        return entry;
    }

    int64_t slot_of(int64_t line, int64_t piece) const {
        return slot((line - first_) / cut_.lines_of_chunk, piece, (line - first_) % cut_.lines_of_chunk);
    }

    void count_rows() {
        for_rows([this](int64_t slot, int64_t row, int64_t begin, int64_t end) {
            starts_[slot + 1] = active_.count(row, begin, end);
        });
    }

    void count_columns() {
        for_columns([this](int64_t slot, int64_t, int64_t) { starts_[slot + 1]++; });
    }

    void fill_rows(const float* values) {
        first_values_.resize(starts_.size());
        for_rows([&](int64_t slot, int64_t row, int64_t begin, int64_t end) {
            Entry *const first = entries_.get() + starts_[slot], *entry = first;
            active_.visit(row, begin, end, [&](int64_t column, int64_t n) {
                if (entry == first) first_values_[slot] = n;
                *entry++ = made(column, values, n);
            });
        });
    }

    void fill_columns(const float* values) {
        std::vector<int64_t> next(starts_);
        for_columns([&](int64_t slot, int64_t row, int64_t n) {
            entries_[next[slot]++] = made(row, values, n);
        });
    }

    const Active& active_;
    const Cut cut_;
    const int64_t first_, last_;
    const int num_threads_;
    int64_t num_pieces_, num_chunks_;
    std::vector<int64_t> starts_, first_values_;
    std::unique_ptr<Entry[]> entries_;      // not set to zero before they are filled
};
