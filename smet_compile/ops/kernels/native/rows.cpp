// Multiplies the values of each block row by a factor of its own, in one pass over them.
#include <cstdint>

namespace {

struct Rows {
    const void* grad;
    const void* factors;        // of each block row, in the dtype of the gradient
    const int64_t* starts;      // the numbers in `grad` at which each block row begins, and the end of the last
    void* out;
    int64_t num_rows, num_threads;
};

template <class Number>
void scale(const Rows& r) {
    const auto* grad = (const Number*)r.grad;
    const auto* factors = (const Number*)r.factors;
    auto* out = (Number*)r.out;
#pragma omp parallel for schedule(static) num_threads(r.num_threads)
    for (int64_t row = 0; row < r.num_rows; row++) {
        const Number factor = factors[row];
        for (int64_t n = r.starts[row]; n < r.starts[row + 1]; n++) out[n] = grad[n] * factor;
    }
}

}  // namespace

extern "C" {
void scale_fp32(const Rows* r) { scale<float>(*r); }
void scale_fp64(const Rows* r) { scale<double>(*r); }
}
