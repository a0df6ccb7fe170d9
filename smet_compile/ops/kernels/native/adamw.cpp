// The optimizer step of many parameters: each weight, gradient and moment is read once and written once, by all cores.
//
// The rule is that of optim/adamw.py; roundings and 8-bit codes are those of ops/law.py. Compiled without fused
// multiply-adds, results are the same bits, except that roots are the nearest here and not always in torch.
#include <vector>

#include "ages.h"
#include "codes.h"
#include "stored.h"

namespace {

constexpr int64_t AT_ONCE = 256, LARGE = 256;  // entries; blocks of LARGE or more are updated one by one

struct Update {
    void *values, *grad, *exp_avg, *exp_avg_sq;
    float* scales;              // (2, num_groups), of codes
    int64_t *num_skipped, *step;
    const void* generation;     // null: every block has the age of the parameter
    const int64_t* births;
    const uint8_t* bits;        // null: entries are counted
    const void* positions;      // of runs and tiles
    const void* group_starts;   // of single weights and runs
    int64_t num_blocks, num_positions, block_size, num_births, generation_bytes, wide_index, num_groups;
    int64_t blocks_per_group, weight_kind, moment_kind, warmup_steps, initial_warmup_steps, shared_step, rounds, seed;
    int64_t first_place;        // of a shard of a plain parameter
    double rate, beta1, beta2, eps, weight_decay;
};

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
    uint32_t key;  // of the noise

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
            step.push_back(float(rate) * float(1 / (1 - std::pow(u.beta1, bias_age))));
            unbias.push_back(float(1 / (1 - std::pow(u.beta2, bias_age))));
            decay.push_back(float(rate) * float(u.weight_decay));
            if (u.generation && u.births[g] >= 0) num_used = g + 1;
        }
        key = noise_key(u.seed, now);
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

// Memory for one unit of work, in a core's cache.
struct Scratch {
    std::vector<float> grad, w, m, v, step, unbias, decay;
    std::vector<uint32_t> places;  // what is hashed for the noise of each entry

    explicit Scratch(int64_t n)
        : grad(n), w(n), m(n), v(n), step(n), unbias(n), decay(n), places(n + BEHIND) {}
};

struct Worker {
    const Update& u;
    const Rule& rule;
    Scratch& scratch;
    const int64_t size = u.block_size;
    const bool codes = u.moment_kind == CODES;
    const List positions{u.positions, u.wide_index};
    int64_t num_skipped = 0;

    int64_t generation(int64_t block) const {
        if (!u.generation) return 0;
        if (u.generation_bytes == 1) return ((const uint8_t*)u.generation)[block];
        if (u.generation_bytes == 2) return ((const int16_t*)u.generation)[block];
        return ((const int32_t*)u.generation)[block];
    }

    // Finds what is hashed for the entries first ... first + n; for single weights, those of whole groups.
    void find_places(int64_t first, int64_t n, int64_t first_group, int64_t last_group) {
        uint32_t* to = scratch.places.data();
        if (u.bits && size == 1) {
            const int64_t begin = first_group * GROUP, end = std::min(last_group * GROUP, u.num_positions);
            return list_places(to, u.bits, begin, end, block_key(rule.key, begin / SPAN));
        }
        // Entries of a plain parameter have a key for each span, and a unit of a shard may cross from one to the next.
        const int64_t begin = u.first_place + first, length = u.bits ? size : SPAN;
        for (int64_t done = 0; done < n;) {
            const int64_t block = (begin + done) / length, place = (begin + done) % length;
            const int64_t count = std::min(n - done, length - place);
            count_places(to + done, count, place, block_key(rule.key, u.bits ? positions[block] : block));
            done += count;
        }
    }

    // Stores bf16; fp32 was changed in place, and codes are made for whole groups.
    void store_weights(int64_t first, int64_t n, const float* from) {
        if (u.weight_kind != BF16) return;
        uint16_t* __restrict to = (uint16_t*)u.values + first;
        if (!u.rounds) return store_nearest(n, from, to);
        const uint32_t* __restrict places = scratch.places.data();
        for (int64_t i = 0; i < n; i++) to[i] = round_by(from[i], hash32(places[i]) >> 16);
    }

    void store_moments(int64_t first, int64_t n, const float* __restrict m, const float* __restrict v) {
        if (u.moment_kind != BF16) return;
        uint16_t* __restrict to_m = (uint16_t*)u.exp_avg + first;
        uint16_t* __restrict to_v = (uint16_t*)u.exp_avg_sq + first;
        if (!u.rounds) return store_nearest(n, m, to_m), store_nearest(n, v, to_v);
        const uint32_t* __restrict places = scratch.places.data();
        for (int64_t i = 0; i < n; i++) {
            const uint32_t noise = hash32(places[i] ^ WORD);
            to_m[i] = round_by(m[i], noise & 0xFFFF);
            to_v[i] = round_by(v[i], noise >> 16);
        }
    }

    static void store_nearest(int64_t n, const float* __restrict from, uint16_t* __restrict to) {
        for (int64_t i = 0; i < n; i++) to[i] = to_bf16(from[i]);
    }

    void store_all(int64_t first, int64_t n, const float* w, const float* m, const float* v) {
        store_weights(first, n, w);
        store_moments(first, n, m, v);
    }

    void decode(int64_t group, int64_t first, int64_t n) const {
        decode_m(n, (const uint8_t*)u.exp_avg + first, u.scales[group], scratch.m.data());
        decode_v(n, (const uint8_t*)u.exp_avg_sq + first, u.scales[u.num_groups + group], scratch.v.data());
    }

    // Makes the codes and scales of a whole group.
    void encode_all(int64_t group, int64_t first, int64_t n) {
        const float scale_m = scale_of(largest_m(n, scratch.m.data()));
        const float scale_v = scale_of(largest_v(n, scratch.v.data()));
        u.scales[group] = scale_m, u.scales[u.num_groups + group] = scale_v;
        auto* codes_m = (uint8_t*)u.exp_avg + first;
        auto* codes_v = (uint8_t*)u.exp_avg_sq + first;
        const auto encode_group = u.rounds ? encode<true> : encode<false>;
        const float *m = scratch.m.data(), *v = scratch.v.data();
        encode_group(n, scratch.places.data(), m, v, scale_m, scale_v, codes_m, codes_v);
    }

    // Updates the blocks first ... last. They are the whole groups first_group ... last_group where groups matter, and
    // one group where there are codes.
    void run(int64_t first_block, int64_t last_block, int64_t first_group, int64_t last_group) {
        const int64_t first = first_block * size, n = (last_block - first_block) * size;
        if (n == 0) return;
        const bool whole = codes || size < LARGE;
        if (u.rounds && whole) find_places(first, n, first_group, last_group);
        if (codes) decode(first_group, first, n);
        int64_t updated = 0;
        if (size < LARGE) updated = small_blocks(first_block, last_block);
        else for (int64_t block = first_block; block < last_block; block++) updated += large_block(block, first);
        if (!codes || !updated) return;
        if (u.rounds && size >= LARGE) find_places(first, n, first_group, last_group);  // not those of one block
        encode_all(first_group, first, n);
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
        const int64_t begin = block * size, end = begin + size;
        for (int64_t first = begin; first < end; first += AT_ONCE) {
            const int64_t n = std::min(AT_ONCE, end - first);
            if (!all_finite(n, widened(u.grad, u.weight_kind, first, n, scratch.grad.data()))) {
                num_skipped++;
                return 0;
            }
        }
        const int64_t g = generation(block);
        for (int64_t first = begin; first < end; first += AT_ONCE) {
            const int64_t n = std::min(AT_ONCE, end - first), in_scratch = codes ? first - first_of_unit : 0;
            prefetch_gradient(first + size, n);
            prefetch_state(first + n, n);
            const float* grad = widened(u.grad, u.weight_kind, first, n, scratch.grad.data());
            float* w = widened(u.values, u.weight_kind, first, n, scratch.w.data());
            float *m = scratch.m.data() + in_scratch, *v = scratch.v.data() + in_scratch;
            if (!codes) m = widened(u.exp_avg, u.moment_kind, first, n, m);
            if (!codes) v = widened(u.exp_avg_sq, u.moment_kind, first, n, v);
            move_alike(rule.scalars, n, grad, w, m, v, rule.step[g], rule.unbias[g], rule.decay[g]);
            if (u.rounds && (!codes || u.weight_kind == BF16)) find_places(first, n, 0, 0);
            store_all(first, n, w, m, v);
        }
        return 1;
    }
};

// Cuts the work into units of about AT_ONCE entries. Units are whole groups where groups matter: for codes, since a
// group has a scale, and for the noise of single weights, whose places are found by groups and have one key in a unit.
struct Units {
    const Update& u;
    const int64_t size = u.block_size;
    const bool codes = u.moment_kind == CODES;
    const bool by_group = u.group_starts && (codes || (u.rounds && size == 1));
    const int64_t blocks_at_once = codes ? u.blocks_per_group : std::max<int64_t>(1, AT_ONCE / size);
    const int64_t groups_at_once = codes ? 1 : groups_of(AT_ONCE);
    const List group_starts{u.group_starts, u.wide_index}, positions{u.positions, u.wide_index};

    // Returns the power of two, at most 16, of groups that hold about so many entries.
    int64_t groups_of(int64_t entries) const {
        int64_t groups = 1;
        while (groups < 16 && 2 * groups * u.num_blocks <= entries * u.num_groups) groups *= 2;
        return groups;
    }

    int64_t count() const {
        return by_group ? (u.num_groups + groups_at_once - 1) / groups_at_once
                        : (u.num_blocks + blocks_at_once - 1) / blocks_at_once;
    }

    int64_t scratch_size() const {
        const int64_t blocks = by_group ? groups_at_once * u.blocks_per_group : blocks_at_once;
        return codes || size < LARGE ? std::max(AT_ONCE, blocks * size) : AT_ONCE;
    }

    void run(int64_t unit, Worker& worker) const {
        if (by_group) {
            const int64_t first = unit * groups_at_once, last = std::min(first + groups_at_once, u.num_groups);
            return worker.run(group_starts[first], group_starts[last], first, last);
        }
        const int64_t first = unit * blocks_at_once, last = std::min(first + blocks_at_once, u.num_blocks);
        // The group of a tile is its position. A unit of a plain parameter is a group.
        const int64_t group = codes && u.positions ? positions[first] : unit;
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
        num_entries += updates[i].num_blocks * updates[i].block_size;
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
