// The optimizer step of many parameters: each weight, gradient and moment is read once and written once, by all cores.
//
// The rule is that of optim/adamw.py; roundings and 8-bit codes are those of ops/law.py and ops/codes.py. Compiled
// without fused multiply-adds, moments are the same bits. A weight's step is computed in another order and differs in
// the last bits.
#include <cfloat>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

enum Kind : int64_t { FP32 = 0, BF16 = 1, CODES = 2 };
enum Stream : uint32_t { WEIGHT = 0, EXP_AVG = 1, EXP_AVG_SQ = 2 };

constexpr int64_t GROUP = 1024;              // dense weights that share a scale
constexpr int64_t AT_ONCE = 256, LARGE = 256;  // entries; blocks of LARGE or more are updated one by one
constexpr uint32_t TOP_V = 255, TOP_M = 127, ONE = 1016;  // ONE: the fp32 1.0, without its low 20 bits
constexpr uint32_t LOW = 0xFFFFF, HALF = 0x80000;

struct Update {
    void *values, *grad, *exp_avg, *exp_avg_sq;
    float* scales;              // (2, num_groups), of codes
    int64_t *num_skipped, *step;
    const void* generation;     // null: every block has the age of the parameter
    const int64_t* births;
    const uint8_t* bits;        // null: positions are counted
    const void* positions;      // of runs and tiles
    const void* group_starts;   // of single weights and runs
    int64_t num_blocks, num_positions, num_births, generation_bytes, wide_index, num_groups, blocks_per_group;
    int64_t block_rows, block_cols, bm, bn, rows, cols;
    int64_t weight_kind, moment_kind, warmup_steps, initial_warmup_steps, shared_step, rounds, seed;
    double rate, beta1, beta2, eps, weight_decay;
};

inline uint32_t hash32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ x >> 16;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline bool is_finite(float x) { return (bits_of(x) & 0x7F800000) != 0x7F800000; }

inline int64_t at(const void* list, bool wide, int64_t i) {
    return wide ? ((const int64_t*)list)[i] : ((const int32_t*)list)[i];
}

// θ ← θ - (step · m / (√(v · unbias) + ε) + decay · θ), where step is the rate over one bias correction, unbias one over
// the other, and decay the rate times λ. They depend on a block's age: see Rule.
struct Scalars {
    float keep1, beta2, keep2, eps;

    void move(float grad, float& w, float& m, float& v, float step, float unbias, float decay) const {
        m = m + keep1 * (grad - m);
        v = beta2 * v + keep2 * grad * grad;
        w = w - (step * m / (std::sqrt(v * unbias) + eps) + decay * w);
    }
};

// Holds the numbers of one parameter's step, and the tables in which a block's generation is looked up.
struct Rule {
    Scalars scalars;
    std::vector<float> step, unbias, decay;
    int64_t num_used = 1;  // generations from here on have no blocks
    uint32_t keys[3];

    explicit Rule(const Update& u) {
        const int64_t now = *u.step, num = u.generation ? u.num_births : 1;
        scalars = {
            float(1 - u.beta1), float(u.beta2), float(1 - u.beta2), float(std::max(u.eps, double(FLT_MIN)))
        };
        for (int64_t g = 0; g < num; g++) {
            if (g > 0 && u.births[g] == u.births[g - 1]) {  // as all that are free
                step.push_back(step.back());
                unbias.push_back(unbias.back());
                decay.push_back(decay.back());
                if (u.births[g] >= 0) num_used = g + 1;
                continue;
            }
            const double age = double(std::max<int64_t>(1, u.generation ? now - u.births[g] : now));
            const double bias_age = u.shared_step ? double(now) : age;
            const bool initial = !u.generation || u.births[g] == 0;
            const int64_t warmup_steps = initial ? u.initial_warmup_steps : u.warmup_steps;
            const double rate = u.rate * (warmup_steps ? std::min(1.0, age / double(warmup_steps)) : 1.0);
            step.push_back(float(rate / (1 - std::pow(u.beta1, bias_age))));
            unbias.push_back(float(1 / (1 - std::pow(u.beta2, bias_age))));
            decay.push_back(float(rate * u.weight_decay));
            if (u.generation && u.births[g] >= 0) num_used = g + 1;
        }
        for (uint32_t stream : {WEIGHT, EXP_AVG, EXP_AVG_SQ})
            keys[stream] = hash32(hash32(hash32(uint32_t(u.seed)) ^ uint32_t(now)) ^ stream);
    }
};

// Moves entries of one age, all finite.
void move_alike(
    const Scalars s, int64_t n, const float* __restrict grad, float* __restrict w, float* __restrict m,
    float* __restrict v, float step, float unbias, float decay
) {
    for (int64_t i = 0; i < n; i++) s.move(grad[i], w[i], m[i], v[i], step, unbias, decay);
}

// Moves entries that have an age each. Entries whose gradient is not finite stay. Returns how many are finite.
int64_t move_each(
    const Scalars s, int64_t n, const float* __restrict grad, float* __restrict w, float* __restrict m,
    float* __restrict v, const float* __restrict step, const float* __restrict unbias, const float* __restrict decay
) {
    int32_t finite = 0;
    for (int64_t i = 0; i < n; i++) {
        float new_w = w[i], new_m = m[i], new_v = v[i];
        s.move(grad[i], new_w, new_m, new_v, step[i], unbias[i], decay[i]);
        const bool moves = is_finite(grad[i]);
        finite += moves;
        w[i] = moves ? new_w : w[i];
        m[i] = moves ? new_m : m[i];
        v[i] = moves ? new_v : v[i];
    }
    return finite;
}

bool all_finite(int64_t n, const float* grad) {
    int32_t finite = 0;
    for (int64_t i = 0; i < n; i++) finite += is_finite(grad[i]);
    return finite == n;
}

// Keeps a table of up to 32 * PAIRS floats in registers, and looks up 16 entries at a time.
#if defined(__AVX512F__)
template <int PAIRS>
struct RegisterTable {
    __m512 parts[2 * PAIRS];

    explicit RegisterTable(const float* table) {
        for (int i = 0; i < 2 * PAIRS; i++) parts[i] = _mm512_loadu_ps(table + 16 * i);
    }
    __m512 at(__m512i index) const {
        __m512 found = _mm512_permutex2var_ps(parts[0], index, parts[1]);
#pragma GCC unroll 8
        for (int pair = 1; pair < PAIRS; pair++) {
            const __mmask16 here = _mm512_cmpge_epu32_mask(index, _mm512_set1_epi32(32 * pair));
            const __m512 in_pair = _mm512_permutex2var_ps(parts[2 * pair], index, parts[2 * pair + 1]);
            found = _mm512_mask_mov_ps(found, here, in_pair);
        }
        return found;
    }
};

template <int PAIRS>
int64_t look_up_in_registers(
    int64_t n, const uint8_t* indices, const float* table, const float* table2, float* to, float* to2
) {
    const RegisterTable<PAIRS> in_registers(table), in_registers2(table2);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(indices + i)));
        _mm512_storeu_ps(to + i, in_registers.at(index));
        _mm512_storeu_ps(to2 + i, in_registers2.at(index));
    }
    return i;
}
#endif

// Looks entries up in two tables of 256 at once. Only the first num_used entries of a table are used.
void look_up(
    int64_t n, const uint8_t* indices, int64_t num_used, const float* table, const float* table2, float* to, float* to2
) {
    int64_t i = 0;
#if defined(__AVX512F__)
    if (num_used <= 32) i = look_up_in_registers<1>(n, indices, table, table2, to, to2);
    else if (num_used <= 64) i = look_up_in_registers<2>(n, indices, table, table2, to, to2);
    else if (num_used <= 128) i = look_up_in_registers<4>(n, indices, table, table2, to, to2);
    else i = look_up_in_registers<8>(n, indices, table, table2, to, to2);
#endif
    for (; i < n; i++) to[i] = table[indices[i]], to2[i] = table2[indices[i]];
}

// Memory for one unit of work, in a core's cache.
struct Scratch {
    std::vector<float> grad, w, m, v, step, unbias, decay;
    std::vector<uint32_t> low, high, noise;  // dense positions in two halves, and bits made of them

    explicit Scratch(int64_t n)
        : grad(n), w(n), m(n), v(n), step(n), unbias(n), decay(n), low(n + 16), high(n), noise(n) {}
};

// Returns the numbers first ... first + n as fp32: in place if they are fp32, else widened into `scratch`.
float* widened(void* storage, int64_t kind, int64_t first, int64_t n, float* scratch) {
    if (kind == FP32) return (float*)storage + first;
    const auto* from = (const uint16_t*)storage + first;
    for (int64_t i = 0; i < n; i++) scratch[i] = widen(from[i]);
    return scratch;
}

struct Worker {
    const Update& u;
    const Rule& rule;
    Scratch& scratch;
    const int64_t size = u.bm * u.bn;
    const bool codes = u.moment_kind == CODES, far = u.num_positions * size > int64_t(1) << 32;
    int64_t num_skipped = 0;

    int64_t generation(int64_t block) const {
        if (!u.generation) return 0;
        if (u.generation_bytes == 1) return ((const uint8_t*)u.generation)[block];
        if (u.generation_bytes == 2) return ((const int16_t*)u.generation)[block];
        return ((const int32_t*)u.generation)[block];
    }

    // Finds the dense positions of the entries first ... first + n; of single weights, those of whole groups.
    void find_positions(int64_t first, int64_t n, int64_t first_group, int64_t last_group) {
        if (!u.bits) return count_up(first, n, 0);
        if (size == 1) return find_single(first_group, last_group);
        for (int64_t done = 0; done < n; done += u.bn) {
            const int64_t row = (first + done) / u.bn, in_block = row % u.bm;
            const int64_t position = at(u.positions, u.wide_index, row / u.bm);
            const int64_t line = position / u.block_cols, matrix = line / u.block_rows;
            const int64_t dense_row = matrix * u.rows + line % u.block_rows * u.bm + in_block;
            count_up(dense_row * u.cols + position % u.block_cols * u.bn, u.bn, done);
        }
    }

    void count_up(int64_t position, int64_t n, int64_t done) {
        uint32_t* low = scratch.low.data() + done;
        for (int64_t i = 0; i < n; i++) low[i] = uint32_t(position) + uint32_t(i);
        if (!far) return;
        for (int64_t i = 0; i < n; i++) scratch.high[done + i] = uint32_t((position + i) >> 32);
    }

    void find_single(int64_t first_group, int64_t last_group) {
        uint32_t* to = scratch.low.data();
        const int64_t last = std::min(last_group * GROUP, u.num_positions);
        for (int64_t at = first_group * GROUP; at < last; at += 16) {
            uint32_t bits = u.bits[at / 8];
            if (at + 8 < last) bits |= uint32_t(u.bits[at / 8 + 1]) << 8;
            uint32_t* high = scratch.high.data() + (to - scratch.low.data());
            if (far) std::fill_n(high, __builtin_popcount(bits), uint32_t(at >> 32));
#if defined(__AVX512F__)
            const __m512i counted = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const __m512i indices = _mm512_add_epi32(_mm512_set1_epi32(int32_t(at)), counted);
            _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(bits), indices));  // the rest is overwritten
            to += __builtin_popcount(bits);
#else
            for (; bits; bits &= bits - 1) *to++ = uint32_t(at + __builtin_ctz(bits));
#endif
        }
    }

    // Makes 32 random bits for each of the positions that were found.
    void make_noise(Stream stream, int64_t n) {
        const uint32_t key = rule.keys[stream];
        const uint32_t* __restrict low = scratch.low.data();
        const uint32_t* __restrict high = scratch.high.data();
        uint32_t* __restrict to = scratch.noise.data();
        if (far) for (int64_t i = 0; i < n; i++) to[i] = hash32(hash32(low[i] ^ key) ^ high[i]);
        else for (int64_t i = 0; i < n; i++) to[i] = hash32(hash32(low[i] ^ key));
    }

    void store(void* storage, int64_t kind, Stream stream, int64_t first, int64_t n, const float* from) {
        if (kind != BF16) return;  // fp32 is changed in place, codes are made for whole groups
        uint16_t* __restrict to = (uint16_t*)storage + first;
        if (!u.rounds) {
            for (int64_t i = 0; i < n; i++) to[i] = to_bf16(from[i]);
            return;
        }
        make_noise(stream, n);
        const uint32_t* __restrict bits = scratch.noise.data();
        for (int64_t i = 0; i < n; i++) to[i] = to_bf16(bits_of(from[i]), bits[i] & 0xFFFF);
    }

    void store_all(int64_t first, int64_t n, const float* w, const float* m, const float* v) {
        store(u.values, u.weight_kind, WEIGHT, first, n, w);
        store(u.exp_avg, u.moment_kind, EXP_AVG, first, n, m);
        store(u.exp_avg_sq, u.moment_kind, EXP_AVG_SQ, first, n, v);
    }

    void decode(int64_t group, int64_t first, int64_t n) const {
        const auto* __restrict codes_m = (const uint8_t*)u.exp_avg + first;
        const auto* __restrict codes_v = (const uint8_t*)u.exp_avg_sq + first;
        float* __restrict m = scratch.m.data();
        float* __restrict v = scratch.v.data();
        const float scale_m = u.scales[group], scale_v = u.scales[u.num_groups + group];
        for (int64_t i = 0; i < n; i++) {
            const uint32_t c = codes_m[i], magnitude = c & TOP_M;
            const float x = scale_m * float_of((magnitude + ONE - TOP_M) << 20 | (c >> 7) << 31);
            m[i] = magnitude ? x : 0.0f;
        }
        for (int64_t i = 0; i < n; i++) {
            const float x = scale_v * float_of((codes_v[i] + ONE - TOP_V) << 20);
            v[i] = codes_v[i] ? x : 0.0f;
        }
    }

    // Makes the codes and scales of a whole group. Floats that are not negative are in the order of their bits.
    void encode(int64_t group, int64_t first, int64_t n) {
        float* __restrict m = scratch.m.data();
        float* __restrict v = scratch.v.data();
        uint32_t largest_m = 0, largest_v = 0;
        for (int64_t i = 0; i < n; i++) v[i] = v[i] < FLT_MAX ? v[i] : FLT_MAX;
        for (int64_t i = 0; i < n; i++) largest_m = std::max(largest_m, bits_of(m[i]) & 0x7FFFFFFF);
        for (int64_t i = 0; i < n; i++) largest_v = std::max(largest_v, bits_of(v[i]));
        const float scale_m = float_of(largest_m), scale_v = float_of(largest_v);
        u.scales[group] = scale_m, u.scales[u.num_groups + group] = scale_v;
        if (u.rounds) make_noise(EXP_AVG, n);
        else std::fill(scratch.noise.begin(), scratch.noise.begin() + n, HALF);
        code_m(n, m, scale_m, (uint8_t*)u.exp_avg + first);
        if (u.rounds) make_noise(EXP_AVG_SQ, n);
        code_v(n, v, scale_v, (uint8_t*)u.exp_avg_sq + first);
    }

    void code_m(int64_t n, const float* __restrict m, float scale, uint8_t* __restrict codes) const {
        const uint32_t* __restrict noise = scratch.noise.data();
        const uint32_t smallest_bits = (ONE - TOP_M + 1) << 20;
        const float smallest = float_of(smallest_bits), divisor = scale > 0 ? scale : 1.0f;
        const bool rounds = u.rounds;
        for (int64_t i = 0; i < n; i++) {
            const float r = std::fabs(m[i]) / divisor;
            const uint32_t bits = bits_of(r), low = noise[i] & LOW;
            const uint32_t code = std::min(((bits + low) >> 20) - (ONE - TOP_M), TOP_M);
            const uint32_t by_chance = float(int32_t(low)) < r / smallest * 1048576.0f, by_half = r >= smallest / 2;
            const uint32_t magnitude = bits < smallest_bits ? (rounds ? by_chance : by_half) : code;
            codes[i] = uint8_t(magnitude | uint32_t(m[i] < 0) << 7);
        }
    }

    void code_v(int64_t n, const float* __restrict v, float scale, uint8_t* __restrict codes) const {
        const uint32_t* __restrict noise = scratch.noise.data();
        const float divisor = scale > 0 ? scale : 1.0f;
        for (int64_t i = 0; i < n; i++) {
            const int32_t code = int32_t((bits_of(v[i] / divisor) + (noise[i] & LOW)) >> 20) - int32_t(ONE - TOP_V);
            codes[i] = uint8_t(code < 1 ? v[i] > 0 : std::min(code, int32_t(TOP_V)));
        }
    }

    // Updates the blocks first ... last. They are the whole groups first_group ... last_group where groups matter, and
    // one group where there are codes.
    void run(int64_t first_block, int64_t last_block, int64_t first_group, int64_t last_group) {
        const int64_t first = first_block * size, n = (last_block - first_block) * size;
        if (n == 0) return;
        const bool whole = codes || size < LARGE;
        if (u.rounds && whole) find_positions(first, n, first_group, last_group);
        if (codes) decode(first_group, first, n);
        int64_t updated = 0;
        if (size < LARGE) updated = small_blocks(first_block, last_block);
        else for (int64_t block = first_block; block < last_block; block++) updated += large_block(block, first);
        if (!codes || !updated) return;
        if (u.rounds && size >= LARGE) find_positions(first, n, first_group, last_group);  // not those of one block
        encode(first_group, first, n);
    }

    // Asks early for what is read next: four streams arrive faster together than one after another.
    void prefetch_gradient(int64_t first, int64_t n) const { prefetch(u.grad, u.weight_kind, first, n); }
    void prefetch_state(int64_t first, int64_t n) const {
        prefetch(u.values, u.weight_kind, first, n);
        prefetch(u.exp_avg, u.moment_kind, first, n);
        prefetch(u.exp_avg_sq, u.moment_kind, first, n);
    }
    void prefetch(const void* storage, int64_t kind, int64_t first, int64_t n) const {
        const int64_t bytes = kind == FP32 ? 4 : kind == BF16 ? 2 : 1, end = std::min(first + n, u.num_blocks * size);
        for (int64_t i = first; i < end; i += 64 / bytes) __builtin_prefetch((const char*)storage + i * bytes);
    }

    // Updates blocks below LARGE. Returns how many were updated.
    int64_t small_blocks(int64_t first_block, int64_t last_block) {
        const int64_t first = first_block * size, n = (last_block - first_block) * size;
        const float* grad = widened(u.grad, u.weight_kind, first, n, scratch.grad.data());
        float* w = widened(u.values, u.weight_kind, first, n, scratch.w.data());
        float* m = codes ? scratch.m.data() : widened(u.exp_avg, u.moment_kind, first, n, scratch.m.data());
        float* v = codes ? scratch.v.data() : widened(u.exp_avg_sq, u.moment_kind, first, n, scratch.v.data());
        prefetch_gradient(first + n, n);
        prefetch_state(first + n, n);
        look_up_ages(first_block, last_block);
        int64_t updated = 0;
        if (size == 1 || all_finite(n, grad)) {
            updated = move(0, n, grad, w, m, v) / size;
        } else {
            for (int64_t at = 0; at < n; at += size)
                if (all_finite(size, grad + at)) updated += move(at, size, grad, w, m, v) / size;
        }
        num_skipped += last_block - first_block - updated;
        store_all(first, n, w, m, v);
        return updated;
    }

    int64_t move(int64_t at, int64_t n, const float* grad, float* w, float* m, float* v) const {
        return move_each(
            rule.scalars, n, grad + at, w + at, m + at, v + at, scratch.step.data() + at, scratch.unbias.data() + at,
            scratch.decay.data() + at
        );
    }

    void look_up_ages(int64_t first_block, int64_t last_block) {
        const int64_t n = last_block - first_block;
        if (!u.generation) {
            std::fill_n(scratch.step.data(), n * size, rule.step[0]);
            std::fill_n(scratch.unbias.data(), n * size, rule.unbias[0]);
            std::fill_n(scratch.decay.data(), n * size, rule.decay[0]);
            return;
        }
        if (size == 1 && u.generation_bytes == 1) {
            const auto* indices = (const uint8_t*)u.generation + first_block;
            const float *step = rule.step.data(), *unbias = rule.unbias.data();
            look_up(n, indices, rule.num_used, step, unbias, scratch.step.data(), scratch.unbias.data());
            if (u.weight_decay)  // without it, the scratch is zero from the start
                look_up(n, indices, rule.num_used, rule.decay.data(), step, scratch.decay.data(), scratch.step.data());
            return;
        }
        for (int64_t block = 0; block < n; block++) {
            const int64_t g = generation(first_block + block);
            std::fill_n(scratch.step.data() + block * size, size, rule.step[g]);
            std::fill_n(scratch.unbias.data() + block * size, size, rule.unbias[g]);
            std::fill_n(scratch.decay.data() + block * size, size, rule.decay[g]);
        }
    }

    // Updates one block, some rows at a time. Returns whether it was updated.
    int64_t large_block(int64_t block, int64_t first_of_unit) {
        const int64_t begin = block * size, at_once = std::max<int64_t>(1, AT_ONCE / u.bn) * u.bn, end = begin + size;
        for (int64_t first = begin; first < end; first += at_once) {
            const int64_t n = std::min(at_once, end - first);
            if (!all_finite(n, widened(u.grad, u.weight_kind, first, n, scratch.grad.data()))) {
                num_skipped++;
                return 0;
            }
        }
        const int64_t g = generation(block);
        for (int64_t first = begin; first < end; first += at_once) {
            const int64_t n = std::min(at_once, end - first), in_scratch = codes ? first - first_of_unit : 0;
            prefetch_gradient(first + size, n);
            prefetch_state(first + n, n);
            const float* grad = widened(u.grad, u.weight_kind, first, n, scratch.grad.data());
            float* w = widened(u.values, u.weight_kind, first, n, scratch.w.data());
            float *m = scratch.m.data() + in_scratch, *v = scratch.v.data() + in_scratch;
            if (!codes) m = widened(u.exp_avg, u.moment_kind, first, n, m);
            if (!codes) v = widened(u.exp_avg_sq, u.moment_kind, first, n, v);
            move_alike(rule.scalars, n, grad, w, m, v, rule.step[g], rule.unbias[g], rule.decay[g]);
            if (u.rounds && (!codes || u.weight_kind == BF16)) find_positions(first, n, 0, 0);
            store_all(first, n, w, m, v);
        }
        return 1;
    }
};

// Cuts the work into units of about AT_ONCE entries. Units are whole groups where groups matter: for codes, since a
// group has a scale, and for the noise of single weights, whose positions are found by groups.
struct Units {
    const Update& u;
    const int64_t size = u.bm * u.bn;
    const bool codes = u.moment_kind == CODES;
    const bool by_group = u.group_starts && (codes || (u.rounds && size == 1));
    const int64_t blocks_at_once = codes ? u.blocks_per_group : std::max<int64_t>(1, AT_ONCE / size);
    const int64_t groups_at_once =
        codes ? 1 : std::clamp<int64_t>(AT_ONCE * u.num_groups / std::max<int64_t>(1, u.num_blocks), 1, 16);

    int64_t count() const {
        return by_group ? (u.num_groups + groups_at_once - 1) / groups_at_once
                        : (u.num_blocks + blocks_at_once - 1) / blocks_at_once;
    }

    int64_t scratch_size() const {
        const int64_t blocks = by_group ? groups_at_once * u.blocks_per_group : blocks_at_once;
        const int64_t rows_of_large = std::max<int64_t>(1, AT_ONCE / u.bn) * u.bn;
        return codes || size < LARGE ? std::max(AT_ONCE, blocks * size) : rows_of_large;
    }

    void run(int64_t unit, Worker& worker) const {
        if (by_group) {
            const int64_t first = unit * groups_at_once, last = std::min(first + groups_at_once, u.num_groups);
            const int64_t begin = at(u.group_starts, u.wide_index, first);
            return worker.run(begin, at(u.group_starts, u.wide_index, last), first, last);
        }
        const int64_t first = unit * blocks_at_once, last = std::min(first + blocks_at_once, u.num_blocks);
        // The group of a tile is its position. A unit of a plain parameter is a group.
        const int64_t group = codes && u.positions ? at(u.positions, u.wide_index, first) : unit;
        worker.run(first, last, group, group + 1);
    }
};

}  // namespace

extern "C" void update_all(const Update* updates, int64_t num_updates, int64_t num_threads) {
    std::vector<Rule> rules;
    int64_t num_entries = 0;
    for (int64_t i = 0; i < num_updates; i++) {
        ++*updates[i].step;
        rules.emplace_back(updates[i]);
        num_entries += updates[i].num_blocks * updates[i].bm * updates[i].bn;
    }
    // One team of threads for all parameters: threads that sleep in between are slow to wake.
#pragma omp parallel num_threads(num_threads) if (num_entries > 32 * GROUP)
    for (int64_t i = 0; i < num_updates; i++) {
        const Update& u = updates[i];
        const Units units{u};
        Scratch scratch(units.scratch_size());
        Worker worker{u, rules[i], scratch};
#pragma omp for schedule(static) nowait
        for (int64_t unit = 0; unit < units.count(); unit++) units.run(unit, worker);
#pragma omp atomic
        *u.num_skipped += worker.num_skipped;
    }
}
