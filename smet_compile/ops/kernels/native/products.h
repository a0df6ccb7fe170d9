// Holds what products with single weights and with runs share: their arguments, and blocks of tokens.
//
// Shape suffixes: T tokens, I inputs, O outputs, R rows, C columns.
#pragma once
#include <type_traits>

#include "entries.h"
#include "transpose.h"
#include "vectors.h"

constexpr int64_t TOKENS = 64;              // of a block: as many sums of one line as registers hold
constexpr int VECTORS = TOKENS / LANES;
constexpr int64_t BYTES_OF_TOKENS = TOKENS * sizeof(float);
constexpr int64_t BYTES_OF_BLOCKS = 1 << 22;
constexpr int64_t MAX_BLOCKS = 16;
constexpr int64_t MAX_LINES = 128;          // of a chunk
constexpr int64_t STRIP = 64;               // columns that are transposed as one task

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Masked {
    const float* input;         // (T, I)
    const float* values;        // (N,) or (N, 1, bn)
    const float* bias;          // (O,) or null
    float* out;                 // (T, O)
    Active weight;
    int64_t num_tokens, input_stride, out_stride, transposed, num_threads;
};

struct Sampled {
    const float* left;          // (T, R)
    const float* right;         // (T, C)
    float* out;                 // (N,) or (N, 1, bn)
    Active weight;
    int64_t num_tokens, left_stride, right_stride, num_threads;
};

// Holds some blocks of tokens, zeros after the last token. They are transposed, [block][column][token], or cut into
// panels of some columns, [block][panel][token][column of the panel], zeros after the last column.
class Blocks {
  public:
    Blocks(const float* tokens, int64_t stride, int64_t num_tokens, int64_t cols, int64_t panel = 0)
        : tokens_(tokens), stride_(stride), num_tokens_(num_tokens), cols_(cols), panel_(panel),
          held_cols_(panel ? ceil_div(cols, panel) * panel : cols) {}

    static int64_t at_once(int64_t cols, int64_t num_tokens) {
        const int64_t fitting = BYTES_OF_BLOCKS / (cols * BYTES_OF_TOKENS);
        return std::max<int64_t>(1, std::min({fitting, MAX_BLOCKS, ceil_div(num_tokens, TOKENS)}));
    }

    void hold(int64_t num_blocks) {
        bytes_.reset(new char[num_blocks * held_cols_ * BYTES_OF_TOKENS + 64]);
        held_ = (float*)(((uintptr_t)bytes_.get() + 63) / 64 * 64);
    }

    const float* block(int64_t number) const { return held_ + number * held_cols_ * TOKENS; }

    // Reads the blocks whose tokens begin at first_token. All threads of a parallel region call it.
    void fill(int64_t first_token, int64_t num_blocks) {
        const int64_t strip = panel_ ? panel_ : STRIP, strips = ceil_div(cols_, strip);
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < num_blocks * strips; task++) {
            const int64_t col = task % strips * strip, token = first_token + task / strips * TOKENS;
            const int64_t width = std::min(strip, cols_ - col), height = std::min(TOKENS, num_tokens_ - token);
            const float* from = tokens_ + token * stride_ + col;
            float* to = held_ + (task / strips * held_cols_ + col) * TOKENS;
            if (height < TOKENS || width < panel_) std::memset(to, 0, (panel_ ? panel_ : width) * BYTES_OF_TOKENS);
            if (!panel_) transpose(from, stride_, height, width, to, TOKENS);
            else
                for (int64_t i = 0; i < height; i++) std::copy_n(from + i * stride_, width, to + i * panel_);
        }
    }

  private:
    const float* const tokens_;
    const int64_t stride_, num_tokens_, cols_, panel_, held_cols_;
    std::unique_ptr<char[]> bytes_;
    float* held_ = nullptr;
};

inline const Vector* at(const float* tokens, const Entry& entry) {
    return (const Vector*)((const char*)tokens + entry.offset);
}

// Calls use(number), at most MAX, with a number that the compiler knows.
template <int MAX, class Use>
inline void with_constant(int64_t number, Use use) {
    if constexpr (MAX > 1)
        if (number < MAX) return with_constant<MAX - 1>(number, use);
    use(std::integral_constant<int, MAX>());
}
