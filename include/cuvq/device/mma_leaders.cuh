// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What the threads of a block of the search on tensor cores keep of the scores they see.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/device/mma_shape.cuh>

namespace cuvq::device {

/// What the threads of a row leave for settling it, from one thread: its two best tiles and the best of all that it
/// dropped.
struct row_leaders {
    static constexpr int least = -0x7FFFFFFF;
    int best = least, best_tile = 0;
    int next = least, next_tile = 0;
    int rest = least;

    /// A tile's largest score and its second largest, as integers.
    __device__ void offer(int score, int runner, int tile) {
        const bool leads = score > best;
        const int second = min(score, best), second_tile = leads ? best_tile : tile;
        best = max(score, best);
        best_tile = leads ? tile : best_tile;
        const bool follows = second > next;
        rest = max(max(rest, runner), min(second, next));
        next = max(second, next);
        next_tile = follows ? second_tile : next_tile;
    }
};

#if CUVQ_HAS_MMA

/// Offers the `Count` scores at(0), at(1), ... that a thread has of a row and tile. The low bits of each give way to
/// its number; `mask` clears them, and the compiler must not know it: else clearing and tagging are two instructions.
template <int Count, class At>
__device__ void offer_scores(row_leaders& leaders, At at, int mask, int tile) {
    int s[Count];
#pragma unroll
    for (int j = 0; j < Count; ++j) {
        const int bits = __float_as_int(at(j));
        asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(s[j]) : "r"(bits), "r"(mask), "r"(j));  // (bits & mask) | j
    }
    int top = max(s[0], s[1]);
#pragma unroll
    for (int j = 2; j < Count; j += 2) top = __vimax3_s32(top, s[j], s[j + 1]);
    // The second largest: as unsigned, s - top is 0 for the largest and wraps to the larger, the closer.
    const unsigned from_top = 0u - static_cast<unsigned>(top);
    unsigned near[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < Count; ++j) near[j % 2] = __viaddmax_u32(static_cast<unsigned>(s[j]), from_top, near[j % 2]);
    leaders.offer(top, static_cast<int>(max(near[0], near[1]) + static_cast<unsigned>(top)), tile);
}

/// Writes the slots of a thread's rows, 8 r + lane / 4 of its warp's. The buffers of codes are in use no more.
template <class Policy, class X, class C, int Rows>
__device__ void leave_slots(const mma_block<Policy, X, C>& b, const row_leaders (&leaders)[Rows]) {
    using shape = mma_shape<Policy>;
    auto* slots = reinterpret_cast<typename shape::slot*>(b.memory + shape::slots_at);
    const int slot = b.warp / shape::warps_down * 4 + b.lane % 4;
    const int row = b.warp % shape::warps_down * shape::warp_rows + b.lane / 4;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
        const row_leaders& l = leaders[r];
        slots[(row + 8 * r) * shape::slots + slot] = {l.best, b.code_at(slot, l.best_tile, l.best), l.next,
                                                      b.code_at(slot, l.next_tile, l.next), l.rest};
    }
}

#endif  // CUVQ_HAS_MMA

}  // namespace cuvq::device
