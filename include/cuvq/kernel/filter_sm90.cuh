// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What threads make of the scores of 64 rows and a tile of codes, code by code: the best, and those that could win.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/device/leaders.cuh>
#include <cuvq/kernel/prepare.cuh>

namespace cuvq::kernel {

/// Rows that a warpgroup scores at once.
inline constexpr int scored_rows = 64;

/// The code whose score thread q of the four that share a row has in such a place, of its 32 of that row and tile.
CUVQ_HOST_DEVICE constexpr int scored_code(int tile, int place, int q) {
    return tile * image_tile + (place >> 1) * 8 + 2 * q + (place & 1);
}

/// Clears the bits of a score that its tag takes: its place among the 32 that a thread holds of a row and tile.
inline constexpr int tag_mask = ~(image_tile / 4 - 1);

#if CUVQ_HAS_WGMMA

/// The place of a tagged score among the 32 that a thread holds of a row and tile. Tags descend, so that of equal
/// scores the first is the largest.
__device__ inline int place_of(int tagged_score) { return ~tagged_score & ~tag_mask; }

/// The float bits of a score with a tag in the low bits: still ordered, as integers, among positive scores.
__device__ inline int tagged(float score, int mask, int tag) {
    int r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(__float_as_int(score)), "r"(mask), "r"(tag));  // (a & b) | c
    return r;
}

using device::least_candidate;

/// What a thread keeps of one row's columns.
struct leaders : device::wide_row_leaders {
    static constexpr int least = device::least_score;

    /// The largest of some scores only: for the best alone. Of equal scores the first stays, whatever their tags.
    __device__ void lead(int score, int tile) {
        const bool leads = score > (best | ~tag_mask);
        best = leads ? score : best;
        best_tile = leads ? tile : best_tile;
    }
};

/// Largest of the four threads of a row.
__device__ inline int row_largest(int v) {
    v = max(v, __shfl_xor_sync(0xFFFFFFFFu, v, 1));
    return max(v, __shfl_xor_sync(0xFFFFFFFFu, v, 2));
}

/// A thread's scores of a tile with tags: (16 pairs of codes, 2 rows, 2).
struct tagged_scores {
    int s[64];

    __device__ tagged_scores(const float (&score)[64], int mask) {
#pragma unroll
        for (int i = 0; i < 64; ++i) s[i] = tagged(score[i], mask, 31 - (i / 4 * 2 + i % 2));
    }
    __device__ int largest(int half) const {
        int top = max(s[2 * half], s[2 * half + 1]);
#pragma unroll
        for (int j = 4 + 2 * half; j < 64; j += 4) top = __vimax3_s32(top, s[j], s[j + 1]);
        return top;
    }
    /// The largest below `from`, one of them; where that is negative, maybe the largest of all.
    __device__ int below(int half, int from) const {
        // As unsigned, `from` less itself is 0, and what is below wraps to the larger, the closer.
        unsigned near[2] = {0, 0};
#pragma unroll
        for (int j = 2 * half; j < 64; j += 4) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
                near[i] = __viaddmax_u32(static_cast<unsigned>(s[j + i]), 0u - static_cast<unsigned>(from), near[i]);
        }
        return static_cast<int>(max(near[0], near[1]) + static_cast<unsigned>(from));
    }
};

/// Offers the best code of a tile to each of the leaders of a thread's two rows.
__device__ inline void offer_best(const float (&score)[64], int tile, int mask, leaders& lead0, leaders& lead1) {
    const tagged_scores scores(score, mask);
    lead0.lead(scores.largest(0), tile);
    lead1.lead(scores.largest(1), tile);
}

/// Offers the scores of a tile to the leaders of a thread's two rows with their error bounds. The four threads of a row
/// tell each other their best first, which pays where there are few tiles to learn from.
__device__ inline void offer_scores(const float (&score)[64], int tile, int mask, float error0, float error1,
                                    leaders& lead0, leaders& lead1) {
    const tagged_scores scores(score, mask);
    const int top0 = scores.largest(0), top1 = scores.largest(1);
    const int runner0 = scores.below(0, top0), runner1 = scores.below(1, top1);
    // Seldom is a runner-up so close that it may matter; only then may a third one.
    const bool close0 = runner0 >= least_candidate(row_largest(max(top0, lead0.best)), error0);
    const bool close1 = runner1 >= least_candidate(row_largest(max(top1, lead1.best)), error1);
    if (__any_sync(0xFFFFFFFFu, close0 || close1)) {
        if (close0) lead0.rest = max(lead0.rest, scores.below(0, runner0));
        if (close1) lead1.rest = max(lead1.rest, scores.below(1, runner1));
    }
    lead0.offer(top0, runner0, tile);
    lead1.offer(top1, runner1, tile);
}

#endif  // CUVQ_HAS_WGMMA

}  // namespace cuvq::kernel
