// The optimizer step of many parameters: each weight, gradient and moment is read once and written once, by all cores.
//
// The rule, its roundings and its 8-bit codes are those of ops/reference.py and ops/codes.py; compiled without fused
// multiply-adds, fp32 arithmetic gives the same bits.
#include <cfloat>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

enum Kind : int64_t { FP32 = 0, BF16 = 1, CODES = 2 };
enum Stream : uint32_t { WEIGHT = 0, EXP_AVG = 1, EXP_AVG_SQ = 2 };

constexpr int64_t AT_ONCE = 1024;
constexpr uint32_t TOP_V = 255, TOP_M = 127, ONE = 1016;  // ONE: the fp32 1.0, without its low 20 bits
constexpr uint32_t LOW = 0xFFFFF, HALF = 0x80000;

struct Update {
    void *values, *grad, *exp_avg, *exp_avg_sq;
    float* scales;              // (2, num_groups), of codes
    int64_t *num_skipped, *step;
    const void* generation;     // null: a plain parameter
    const int64_t* births;
    const uint8_t* bits;        // null: positions are counted
    const void* positions;      // of runs and tiles
    const void* group_starts;   // of single weights and runs
    int64_t num_blocks, num_positions, num_births, generation_bytes, wide_index, num_groups, blocks_per_group;
    int64_t block_rows, block_cols, bm, bn, rows, cols;
    int64_t weight_kind, moment_kind, warmup_steps, shared_step, rounds, seed;
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

struct Scalars {
    float keep1, beta2, keep2, eps, weight_decay;

    // unbias1, unbias2: what moments are multiplied with, one over the bias corrections
    void move(float grad, float& w, float& m, float& v, float rate, float unbias1, float unbias2) const {
        m = m + keep1 * (grad - m);
        v = beta2 * v + keep2 * grad * grad;
        const float direction = (m * unbias1) / (std::sqrt(v * unbias2) + eps);
        w = w - rate * (direction + weight_decay * w);
    }
};

// What a step of one parameter needs, and the tables that a block's generation is looked up in.
struct Rule {
    Scalars scalars;
    std::vector<float> rate, unbias1, unbias2;
    uint32_t keys[3];

    explicit Rule(const Update& u) {
        const int64_t step = *u.step, num = u.generation ? u.num_births : 1;
        scalars = {
            float(1 - u.beta1), float(u.beta2), float(1 - u.beta2), float(std::max(u.eps, double(FLT_MIN))),
            float(u.weight_decay)
        };
        for (int64_t g = 0; g < num; g++) {
            const double age = double(std::max<int64_t>(1, u.generation ? step - u.births[g] : step));
            const double bias_age = u.shared_step ? double(step) : age;
            const double warm = u.warmup_steps ? std::min(1.0, age / double(u.warmup_steps)) : 1.0;
            rate.push_back(float(u.rate * warm));
            unbias1.push_back(float(1 / (1 - std::pow(u.beta1, bias_age))));
            unbias2.push_back(float(1 / (1 - std::pow(u.beta2, bias_age))));
        }
        for (uint32_t stream : {WEIGHT, EXP_AVG, EXP_AVG_SQ})
            keys[stream] = hash32(hash32(hash32(uint32_t(u.seed)) ^ uint32_t(step)) ^ stream);
    }
};

// Entries of one age, all finite.
void move_alike(
    const Scalars s, int64_t n, const float* __restrict grad, float* __restrict w, float* __restrict m,
    float* __restrict v, float rate, float unbias1, float unbias2
) {
    for (int64_t i = 0; i < n; i++) s.move(grad[i], w[i], m[i], v[i], rate, unbias1, unbias2);
}

// Entries of an age each; those whose gradient is not finite keep what they have.
void move_each(
    const Scalars s, int64_t n, const float* __restrict grad, float* __restrict w, float* __restrict m,
    float* __restrict v, const float* __restrict rate, const float* __restrict unbias1, const float* __restrict unbias2
) {
    for (int64_t i = 0; i < n; i++) {
        float new_w = w[i], new_m = m[i], new_v = v[i];
        s.move(grad[i], new_w, new_m, new_v, rate[i], unbias1[i], unbias2[i]);
        const bool moves = is_finite(grad[i]);
        w[i] = moves ? new_w : w[i];
        m[i] = moves ? new_m : m[i];
        v[i] = moves ? new_v : v[i];
    }
}

void gather(int64_t n, const uint32_t* __restrict places, const float* __restrict table, float* __restrict to) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_i32gather_ps(_mm512_loadu_si512(places + i), table, 4));
#endif
    for (; i < n; i++) to[i] = table[places[i]];
}

int64_t count_finite(int64_t n, const float* grad) {
    int64_t finite = 0;
    for (int64_t i = 0; i < n; i++) finite += is_finite(grad[i]);
    return finite;
}

// Room for one unit of work, in a core's cache.
struct Room {
    std::vector<float> grad, w, m, v, rate, unbias1, unbias2;
    std::vector<uint32_t> low, noise;

    Room(int64_t block, int64_t unit)
        : grad(block), w(block), m(unit), v(unit), rate(block), unbias1(block), unbias2(block), low(block + 16), noise(unit) {}
};

// Numbers first ... first + n as fp32: where they lie if they are, else widened into `room`.
float* widened(void* storage, int64_t kind, int64_t first, int64_t n, float* room) {
    if (kind == FP32) return (float*)storage + first;
    const auto* from = (const uint16_t*)storage + first;
    for (int64_t i = 0; i < n; i++) room[i] = widen(from[i]);
    return room;
}

// 32 random bits for consecutive dense positions.
void noise_of_run(uint32_t key, int64_t position, int64_t n, uint32_t* noise) {
    while (n > 0) {
        const uint32_t low = uint32_t(position), high = uint32_t(position >> 32);
        const int64_t count = std::min<int64_t>(n, (int64_t(1) << 32) - low);
        uint32_t* __restrict to = noise;
        for (int64_t i = 0; i < count; i++) to[i] = hash32(hash32((low + uint32_t(i)) ^ key) ^ high);
        position += count, noise += count, n -= count;
    }
}

struct Worker {
    const Update& u;
    const Rule& rule;
    Room& room;
    const int64_t size = u.bm * u.bn;
    int64_t num_skipped = 0;

    int64_t generation(int64_t block) const {
        if (!u.generation) return 0;
        if (u.generation_bytes == 1) return ((const uint8_t*)u.generation)[block];
        if (u.generation_bytes == 2) return ((const int16_t*)u.generation)[block];
        return ((const int32_t*)u.generation)[block];
    }

    // Noise of the entries first ... first + n, of single weights a whole group.
    void noise(Stream stream, int64_t group, int64_t first, int64_t n) {
        const uint32_t key = rule.keys[stream];
        if (!u.bits) return noise_of_run(key, first, n, room.noise.data());
        if (size == 1) {  // `low` holds the positions, all of one group
            const uint32_t high = uint32_t(uint64_t(group) * AT_ONCE >> 32);
            const uint32_t* __restrict low = room.low.data();
            uint32_t* __restrict to = room.noise.data();
            for (int64_t i = 0; i < n; i++) to[i] = hash32(hash32(low[i] ^ key) ^ high);
            return;
        }
        for (int64_t done = 0; done < n; done += u.bn) {
            const int64_t row = (first + done) / u.bn, in_block = row % u.bm;
            const int64_t position = at(u.positions, u.wide_index, row / u.bm);
            const int64_t line = position / u.block_cols, matrix = line / u.block_rows;
            const int64_t dense_row = matrix * u.rows + line % u.block_rows * u.bm + in_block;
            noise_of_run(key, dense_row * u.cols + position % u.block_cols * u.bn, u.bn, room.noise.data() + done);
        }
    }

    // Dense positions of a group's active single weights.
    void find_positions(int64_t group) {
        const int64_t first = group * AT_ONCE, last = std::min(first + AT_ONCE, u.num_positions);
        uint32_t* to = room.low.data();
        for (int64_t at = first; at < last; at += 16) {
            uint32_t bits = u.bits[at / 8];
            if (at + 8 < last) bits |= uint32_t(u.bits[at / 8 + 1]) << 8;
#if defined(__AVX512F__)
            const __m512i counted = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(int32_t(at)), counted);
            _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(bits), places));  // the rest is overwritten
            to += __builtin_popcount(bits);
#else
            for (; bits; bits &= bits - 1) *to++ = uint32_t(at + __builtin_ctz(bits));
#endif
        }
    }

    void store(
        void* storage, int64_t kind, Stream stream, int64_t group, int64_t first, int64_t n, const float* from
    ) {
        if (kind != BF16) return;  // fp32 was changed where it lies, codes are made of whole groups
        uint16_t* __restrict to = (uint16_t*)storage + first;
        if (!u.rounds) {
            for (int64_t i = 0; i < n; i++) to[i] = to_bf16(from[i]);
            return;
        }
        noise(stream, group, first, n);
        const uint32_t* __restrict bits = room.noise.data();
        for (int64_t i = 0; i < n; i++) to[i] = to_bf16(bits_of(from[i]), bits[i] & 0xFFFF);
    }

    void decode(int64_t group, int64_t first, int64_t n) const {
        const auto* __restrict codes_m = (const uint8_t*)u.exp_avg + first;
        const auto* __restrict codes_v = (const uint8_t*)u.exp_avg_sq + first;
        float* __restrict m = room.m.data();
        float* __restrict v = room.v.data();
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

    // Codes of a whole group, under scales of its own. Not negative, floats are in the order of their bits.
    void encode(int64_t group, int64_t first, int64_t n) {
        float* __restrict m = room.m.data();
        float* __restrict v = room.v.data();
        uint32_t largest_m = 0, largest_v = 0;
        for (int64_t i = 0; i < n; i++) v[i] = v[i] < FLT_MAX ? v[i] : FLT_MAX;
        for (int64_t i = 0; i < n; i++) largest_m = std::max(largest_m, bits_of(m[i]) & 0x7FFFFFFF);
        for (int64_t i = 0; i < n; i++) largest_v = std::max(largest_v, bits_of(v[i]));
        const float scale_m = float_of(largest_m), scale_v = float_of(largest_v);
        u.scales[group] = scale_m, u.scales[u.num_groups + group] = scale_v;
        if (u.rounds) noise(EXP_AVG, group, first, n);
        else std::fill(room.noise.begin(), room.noise.begin() + n, HALF);
        code_m(n, m, scale_m, (uint8_t*)u.exp_avg + first);
        if (u.rounds) noise(EXP_AVG_SQ, group, first, n);
        code_v(n, v, scale_v, (uint8_t*)u.exp_avg_sq + first);
    }

    void code_m(int64_t n, const float* __restrict m, float scale, uint8_t* __restrict codes) const {
        const uint32_t* __restrict noise = room.noise.data();
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
        const uint32_t* __restrict noise = room.noise.data();
        const float divisor = scale > 0 ? scale : 1.0f;
        for (int64_t i = 0; i < n; i++) {
            const int32_t code = int32_t((bits_of(v[i] / divisor) + (noise[i] & LOW)) >> 20) - int32_t(ONE - TOP_V);
            codes[i] = uint8_t(code < 1 ? v[i] > 0 : std::min(code, int32_t(TOP_V)));
        }
    }

    // Single weights, and plain parameters: each entry has an age of its own, and is skipped alone.
    int64_t entries(int64_t first, int64_t n, const float* grad, float* w, float* m, float* v) {
        const int64_t oldest = generation(first), finite = count_finite(n, grad);
        int64_t others = 0;
        if (u.generation_bytes == 1) {
            const auto* bytes = (const uint8_t*)u.generation + first;
            for (int64_t i = 0; i < n; i++) others += bytes[i] != oldest;
        } else if (u.generation) {
            others = n;
        }
        if (others == 0 && finite == n) {
            move_alike(rule.scalars, n, grad, w, m, v, rule.rate[oldest], rule.unbias1[oldest], rule.unbias2[oldest]);
            return finite;
        }
        look_up(first, n);
        move_each(rule.scalars, n, grad, w, m, v, room.rate.data(), room.unbias1.data(), room.unbias2.data());
        return finite;
    }

    void look_up(int64_t first, int64_t n) {
        uint32_t* __restrict g = room.low.data();  // its positions were used, or come after
        if (u.generation_bytes == 1) {
            const auto* bytes = (const uint8_t*)u.generation + first;
            for (int64_t i = 0; i < n; i++) g[i] = bytes[i];
        } else {
            for (int64_t i = 0; i < n; i++) g[i] = uint32_t(generation(first + i));
        }
        gather(n, g, rule.rate.data(), room.rate.data());
        gather(n, g, rule.unbias1.data(), room.unbias1.data());
        gather(n, g, rule.unbias2.data(), room.unbias2.data());
    }

    // Blocks first ... last, of `group` where groups matter.
    void run(int64_t first_block, int64_t last_block, int64_t group) {
        const int64_t first = first_block * size, n = (last_block - first_block) * size;
        const bool codes = u.moment_kind == CODES;
        if (n == 0) return;
        if (codes) decode(group, first, n);
        int64_t updated = 0;
        if (size == 1) updated = pieces_of_entries(group, first, n);
        else for (int64_t block = first_block; block < last_block; block++) updated += pieces(group, block, first, codes);
        if (codes && updated) encode(group, first, n);
    }

    int64_t pieces_of_entries(int64_t group, int64_t first, int64_t n) {
        const bool codes = u.moment_kind == CODES;
        const float* grad = widened(u.grad, u.weight_kind, first, n, room.grad.data());
        float* w = widened(u.values, u.weight_kind, first, n, room.w.data());
        float* m = codes ? room.m.data() : widened(u.exp_avg, u.moment_kind, first, n, room.m.data());
        float* v = codes ? room.v.data() : widened(u.exp_avg_sq, u.moment_kind, first, n, room.v.data());
        const int64_t finite = entries(first, n, grad, w, m, v);
        num_skipped += n - finite;
        if (u.bits && u.rounds) find_positions(group);
        if (finite) store_all(group, first, n, w, m, v);
        return finite;
    }

    // One block of several weights, some rows at a time; returns whether it was updated.
    int64_t pieces(int64_t group, int64_t block, int64_t first_of_unit, bool codes) {
        const int64_t begin = block * size, rows_at_once = std::max<int64_t>(1, AT_ONCE / u.bn);
        for (int64_t row = 0; row < u.bm; row += rows_at_once) {
            const int64_t n = std::min(rows_at_once, u.bm - row) * u.bn;
            const float* grad = widened(u.grad, u.weight_kind, begin + row * u.bn, n, room.grad.data());
            if (count_finite(n, grad) < n) {
                num_skipped++;
                return 0;
            }
        }
        const int64_t g = generation(block);
        const float rate = rule.rate[g], unbias1 = rule.unbias1[g], unbias2 = rule.unbias2[g];
        for (int64_t row = 0; row < u.bm; row += rows_at_once) {
            const int64_t n = std::min(rows_at_once, u.bm - row) * u.bn, first = begin + row * u.bn;
            const float* grad = widened(u.grad, u.weight_kind, first, n, room.grad.data());
            float* w = widened(u.values, u.weight_kind, first, n, room.w.data());
            float* m = codes ? room.m.data() + first - first_of_unit
                             : widened(u.exp_avg, u.moment_kind, first, n, room.m.data());
            float* v = codes ? room.v.data() + first - first_of_unit
                             : widened(u.exp_avg_sq, u.moment_kind, first, n, room.v.data());
            move_alike(rule.scalars, n, grad, w, m, v, rate, unbias1, unbias2);
            store_all(group, first, n, w, m, v);
        }
        return 1;
    }

    void store_all(int64_t group, int64_t first, int64_t n, float* w, float* m, float* v) {
        store(u.values, u.weight_kind, WEIGHT, group, first, n, w);
        store(u.exp_avg, u.moment_kind, EXP_AVG, group, first, n, m);
        store(u.exp_avg_sq, u.moment_kind, EXP_AVG_SQ, group, first, n, v);
    }
};

// Work is cut into units: whole groups where groups matter (codes; noise of single weights), else about AT_ONCE entries.
struct Units {
    const Update& u;
    const int64_t size = u.bm * u.bn;
    const bool by_group = u.group_starts && (u.moment_kind == CODES || (u.rounds && size == 1));
    const int64_t at_once = u.moment_kind == CODES && !by_group ? u.blocks_per_group : std::max<int64_t>(1, AT_ONCE / size);

    int64_t count() const { return by_group ? u.num_groups : (u.num_blocks + at_once - 1) / at_once; }

    void run(int64_t unit, Worker& worker) const {
        if (by_group)
            return worker.run(
                at(u.group_starts, u.wide_index, unit), at(u.group_starts, u.wide_index, unit + 1), unit
            );
        const int64_t first = unit * at_once, last = std::min(first + at_once, u.num_blocks);
        // A tile is a group of its own, at its position; of a plain parameter a unit is a group.
        worker.run(first, last, u.positions && at_once == 1 ? at(u.positions, u.wide_index, first) : unit);
    }
};

}  // namespace

extern "C" void update_all(const Update* updates, int64_t num_updates, int64_t num_threads) {
    for (int64_t i = 0; i < num_updates; i++) {
        const Update& u = updates[i];
        ++*u.step;
        if (u.num_blocks == 0) continue;
        const Rule rule(u);
        const Units units{u};
        const int64_t block_room = std::max(AT_ONCE, u.bn);
        const int64_t unit_room = u.moment_kind == CODES ? std::max(block_room, u.bm * u.bn * u.blocks_per_group) : block_room;
        int64_t num_skipped = 0;
#pragma omp parallel num_threads(num_threads) reduction(+ : num_skipped) if (u.num_blocks * u.bm * u.bn > 32 * AT_ONCE)
        {
            Room room(block_room, unit_room);
            Worker worker{u, rule, room};
#pragma omp for schedule(static)
            for (int64_t unit = 0; unit < units.count(); unit++) units.run(unit, worker);
            num_skipped += worker.num_skipped;
        }
        *u.num_skipped += num_skipped;
    }
}
