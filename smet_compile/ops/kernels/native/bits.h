// Reads the lists of a topology: its bits, the active weights before each group of them, and positions of blocks.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

constexpr int64_t GROUP = 1024;

// Holds a list of int32 or int64.
struct List {
    const void* numbers;
    int64_t wide;
    int64_t operator[](int64_t i) const {
        return wide ? ((const int64_t*)numbers)[i] : ((const int32_t*)numbers)[i];
    }
};

// Returns `count` bits, at most 64; position is a multiple of 8.
inline uint64_t bits_at(const uint8_t* all, int64_t position, int64_t count) {
    uint64_t bits = 0;
    if (count > 56) std::memcpy(&bits, all + position / 8, 8);  // one load, where a copy of unknown size takes many
    else std::memcpy(&bits, all + position / 8, (count + 7) / 8);
    return count < 64 ? bits & ((uint64_t(1) << count) - 1) : bits;
}

// Counts the active weights before a dense position.
inline int64_t count_before(const uint8_t* bits, List group_starts, int64_t position) {
    int64_t count = group_starts[position / GROUP], from = position / GROUP * GROUP;
    for (; from < position; from += 64)
        count += __builtin_popcountll(bits_at(bits, from, std::min<int64_t>(64, position - from)));
    return count;
}

// Returns the first of `size` sorted positions that is not below `position`.
inline int64_t lower_bound(List positions, int64_t size, int64_t position) {
    int64_t low = 0, high = size;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (positions[middle] < position) low = middle + 1;
        else high = middle;
    }
    return low;
}
