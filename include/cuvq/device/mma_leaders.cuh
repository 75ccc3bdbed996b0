// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What the threads of a block of the search on tensor cores keep of the scores they see.
#pragma once

#include <type_traits>

#include <cuda_runtime.h>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/device/leaders.cuh>
#include <cuvq/device/mma_shape.cuh>

namespace cuvq::device {

#if CUVQ_HAS_MMA

/// The `Count` scores at(0), at(1), ... that a thread has of a row and tile, as integers. The low bits of each have
/// given way to its number; `mask` clears them, and the compiler must not know it: else that is two instructions.
template <int Count>
struct tagged_scores {
    int s[Count];
    int top, runner;  // the largest and the second largest

    template <class At>
    __device__ tagged_scores(At at, int mask) {
#pragma unroll
        for (int j = 0; j < Count; ++j) {
            const int bits = __float_as_int(at(j));
            asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(s[j]) : "r"(bits), "r"(mask), "r"(j));  // (bits & mask) | j
        }
        top = max(s[0], s[1]);
#pragma unroll
        for (int j = 2; j < Count; j += 2) top = __vimax3_s32(top, s[j], s[j + 1]);
        // The second largest: as unsigned, s - top is 0 for the largest and wraps to the larger, the closer.
        const unsigned from_top = 0u - static_cast<unsigned>(top);
        unsigned near[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < Count; ++j)
            near[j % 2] = __viaddmax_u32(static_cast<unsigned>(s[j]), from_top, near[j % 2]);
        runner = static_cast<int>(max(near[0], near[1]) + static_cast<unsigned>(top));
    }
    __device__ int third() const {
        int most = least_score;
#pragma unroll
        for (int j = 0; j < Count; ++j) most = max(most, s[j] < runner ? s[j] : least_score);
        return most;
    }
};

/// What threads keep of a row under this policy.
template <class Policy>
using leaders_of = std::conditional_t<mma_shape<Policy>::kept == 5, wide_row_leaders, row_leaders>;

/// Offers a tile's scores to the leaders of their row, whose error bound is `error`. Whole warps.
template <int Count>
__device__ void offer(row_leaders& leaders, const tagged_scores<Count>& scores, int tile, float) {
    leaders.offer(scores.top, scores.runner, tile);
}
template <int Count>
__device__ void offer(wide_row_leaders& leaders, const tagged_scores<Count>& scores, int tile, float error) {
    // Seldom is a runner-up so close that it may matter; only then may a third one.
    const bool close = scores.runner >= least_candidate(max(scores.top, leaders.best), error);
    if (__any_sync(0xFFFFFFFFu, close) && close) leaders.rest = max(leaders.rest, scores.third());
    leaders.offer(scores.top, scores.runner, tile);
}

/// Writes the slots of a thread's rows, 8 r + lane / 4 of its warp's. The buffers of codes are in use no more.
template <class Policy, class X, class C, int Rows>
__device__ void leave_slots(const mma_block<Policy, X, C>& b, const leaders_of<Policy> (&leaders)[Rows]) {
    using shape = mma_shape<Policy>;
    auto* slots = reinterpret_cast<typename shape::slot*>(b.memory + shape::slots_at);
    const int slot = b.warp / shape::warps_down * 4 + b.lane % 4;
    const int row = b.warp % shape::warps_down * shape::warp_rows + b.lane / 4;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
        typename shape::slot& to = slots[(row + 8 * r) * shape::slots + slot];
#pragma unroll
        for (int i = 0; i < shape::kept; ++i) {
            to.score[i] = leaders[r].score(i);
            to.code[i] = b.code_at(slot, leaders[r].tile(i), leaders[r].score(i));
        }
        to.rest = leaders[r].rest;
    }
}

#endif  // CUVQ_HAS_MMA

}  // namespace cuvq::device
