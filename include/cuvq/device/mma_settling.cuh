// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What the scores of a block of the search on tensor cores leave open, settled in float64.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/device/certificate.cuh>
#include <cuvq/device/mma_leaders.cuh>
#include <cuvq/device/mma_shape.cuh>

namespace cuvq::device {

#if CUVQ_HAS_MMA

/// Considers the codes that `slots`, a bit each, have scored of a row, or if there are none, the whole codebook, but
/// nothing then if the row is not finite: of part `part` of `parts` of these, what group `group` of `groups` groups of
/// eight lanes is to take. Each lane has its own choice then. Whole warps call it.
template <class X, class C>
__device__ void consider_slots(exact_choice& choice, const X* row, const matrix_ref<const C>& codebook,
                               std::int64_t columns, unsigned slots, const slot_layout& layout, int group, int groups,
                               int part = 0, int parts = 1) {
    const auto consider = [&](std::int64_t all, const auto& code_at) {
        const share_of own(all, part, parts);
        consider_codes(choice, row, codebook, columns, own.count, group, groups,
                       [&](std::int64_t i) { return code_at(own.first + i); });
    };
    if (slots == 0) {
        if (is_row_finite(row, columns)) consider(codebook.rows, [](std::int64_t i) { return i; });
    }
    const std::int64_t tiles = (codebook.rows - 1) / layout.codes + 1;
    const int in_tile = layout.in_tile();
    for (; slots != 0; slots &= slots - 1) {
        const int slot = __ffs(static_cast<int>(slots)) - 1;
        consider(tiles * in_tile, [&](std::int64_t i) {  // beyond K: another look at the last code
            const int tile = static_cast<int>(i / in_tile), at = static_cast<int>(i % in_tile);
            return min(std::int64_t{layout.code(slot, tile, at)}, codebook.rows - 1);
        });
    }
    __syncwarp();
}

/// From the slots of a block's rows to their codes.
template <class Policy, class X, class C>
struct mma_settling : mma_block<Policy, X, C> {
    using block = mma_block<Policy, X, C>;
    using block::columns, block::memory, block::rows, block::codebook, block::warp, block::lane;
    using block::group, block::group_lane, block::words, block::errors, block::tiles, block::code_at;
    using typename block::shape;

    __device__ explicit mma_settling(const block& b) : block(b) {}

    /// Every row's code from its slots. Rows with candidates that the slots do not know are listed as hard.
    __device__ void settle_rows(std::int64_t* codes) const {
        const auto* all_slots = reinterpret_cast<const typename shape::slot*>(memory + shape::slots_at);
        auto* candidates = reinterpret_cast<typename shape::candidate*>(memory + shape::candidates_at);
        int* open = reinterpret_cast<int*>(memory + shape::open);
        int* hard = reinterpret_cast<int*>(memory + shape::hard);
        int* hard_count = words() + shape::hard_count;
        int* candidate_count = words() + shape::candidate_count;
        const unsigned first_lane = static_cast<unsigned>(lane) & 24u, mask = 0xFFu << first_lane;
        constexpr int per_lane = (shape::slots - 1) / exact_lanes + 1, kept = shape::kept;
        for (int r = group; r < rows.rows; r += shape::groups) {
            typename shape::slot mine[per_lane];
            int best = least_score;
#pragma unroll
            for (int i = 0; i < per_lane; ++i) {
                const int slot = i * exact_lanes + group_lane;
                if (slot < shape::slots) {
                    mine[i] = all_slots[r * shape::slots + slot];
                } else {
                    mine[i] = {};
                    for (int& score : mine[i].score) score = least_score;
                    mine[i].rest = least_score;
                }
                best = max(best, mine[i].score[0]);
            }
#pragma unroll
            for (int step = 1; step < exact_lanes; step *= 2) best = max(best, __shfl_xor_sync(mask, best, step));
            const int limit = least_candidate(best, errors()[r]), least = max(limit, 1);
            const bool decided = limit > 0;

            unsigned among[per_lane][kept], slots = 0;
            int count = 0;
            bool missed = false;
#pragma unroll
            for (int i = 0; i < per_lane; ++i) {
#pragma unroll
                for (int j = 0; j < kept; ++j) {
                    among[i][j] = __ballot_sync(mask, mine[i].score[j] >= least);
                    count += __popc(among[i][j]);
                }
                slots |= among[i][0] >> first_lane << (i * exact_lanes);
                missed = missed || mine[i].rest >= least;
            }
            missed = __any_sync(mask, missed);
            bool listed = decided && !missed;
            int at = 0;
            if (listed && count > 1) {
                if (group_lane == 0) at = atomicAdd(candidate_count, count);
                at = __shfl_sync(mask, at, static_cast<int>(first_lane));
                listed = at + count <= shape::most_candidates;
                if (!listed)  // what of its places there is stays empty
                    for (int i = at + group_lane; i < min(at + count, shape::most_candidates); i += exact_lanes)
                        candidates[i].code = -1;
            }
            if (group_lane == 0) {
                open[r] = listed && count > 1 ? at << 8 | count : 0;
                if (!listed) hard[atomicAdd(hard_count, 1)] = r | (decided ? slots << 8 : 0u);
            }
            if (!listed) continue;
#pragma unroll
            for (int i = 0; i < per_lane; ++i) {
#pragma unroll
                for (int j = 0; j < kept; ++j) {
                    if (among[i][j] >> lane & 1u) {
                        const int code = mine[i].code[j];
                        if (count == 1)
                            codes[r] = code;
                        else
                            candidates[at + __popc(among[i][j] & ((1u << lane) - 1))] = {0, r, code};
                    }
                    at += __popc(among[i][j]);
                }
            }
        }
        __syncthreads();
        // The candidates of all rows, shared out evenly.
        const int listed = min(*candidate_count, shape::most_candidates);
        for (int i = group; i < listed; i += shape::groups) {
            typename shape::candidate& c = candidates[i];
            if (c.code < 0) continue;
            const double distance = exact_distance(rows.row(c.row), codebook.row(c.code), columns);
            if (group_lane == 0) c.distance = distance;
        }
        __syncthreads();
        if (threadIdx.x < rows.rows && open[threadIdx.x] != 0) {
            const int first = open[threadIdx.x] >> 8, count = open[threadIdx.x] & 255;
            exact_choice choice;
            for (int i = first; i < first + count; ++i) choice.consider(candidates[i].distance, candidates[i].code);
            codes[threadIdx.x] = choice.code;
        }
        __syncthreads();
    }

    /// A row that is listed as hard, and its slots with candidates; 0: the whole codebook.
    struct hard_row {
        int row;
        unsigned slots;
    };
    __device__ int hard_count() const { return words()[shape::hard_count]; }
    __device__ hard_row hard(int i) const {
        const unsigned listed = reinterpret_cast<const unsigned*>(memory + shape::hard)[i];
        return {static_cast<int>(listed & 255u), listed >> 8};
    }

    /// The hard rows, each by the whole block.
    __device__ void settle_hard_rows(std::int64_t* codes) const {
        auto* choices = reinterpret_cast<exact_choice*>(memory + shape::choices);
        const int count = hard_count();
        for (int h = 0; h < count; ++h) {
            const auto [r, slots] = hard(h);
            exact_choice choice;
            consider_slots(choice, rows.row(r), codebook, columns, slots, shape::layout(), group, shape::groups);
            merge_block<shape::warps>(choice, choices);
            if (threadIdx.x == 0) codes[r] = choice.code;
            __syncthreads();
        }
    }
};

#endif  // CUVQ_HAS_MMA

}  // namespace cuvq::device
