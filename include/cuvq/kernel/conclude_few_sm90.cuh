// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What the leads of a row say once all are there, in the search of few rows: its code, or the candidates that are to be
// measured, or that there are too many of these.
#pragma once

#include <cuda_runtime.h>

#include <cuvq/kernel/few_cluster_sm90.cuh>
#include <cuvq/kernel/filter_sm90.cuh>
#include <cuvq/kernel/outputs.cuh>

namespace cuvq::kernel {

/// Stands for the code of a row that leads do not settle, and of one that they narrow down to candidates.
inline constexpr int code_aside = -2, code_listed = -3;
static_assert(code_aside == row_left_open, "rows of the whole cluster are written later");

#if CUVQ_HAS_WGMMA

__device__ inline int code_of(int tagged_score, int tile, int lead) {
    return scored_code(tile, place_of(tagged_score), lead & 3);
}

/// What the lanes of a row conclude from its leads.
struct few_conclusion {
    int least;  // what a lead must reach to be a candidate; 0 where leads say nothing
    int total;  // candidates
    int code;   // of the row, or code_aside, or code_listed
};

/// A value of all `Lanes` lanes of a row, from each one's: joined two by two, or of a whole warp at once.
template <int Lanes, class Two, class Warp>
__device__ int join_lanes(int v, const Two& two, const Warp& warp) {
    if constexpr (Lanes == 32) {
        return warp(0xFFFFFFFFu, v);
    } else {
#pragma unroll
        for (int step = 1; step < Lanes; step *= 2) v = two(v, __shfl_xor_sync(0xFFFFFFFFu, v, step));
        return v;
    }
}

/// From the `count` leads of the threads that scored a row, four for every warpgroup; a row has at most `most`
/// candidates one by one. `Lanes` lanes a row; whole warps, converged: shuffles of diverged ones are slow. Loops over
/// leads are not unrolled: they are short, and run from a cold instruction cache.
template <int Lanes>
__device__ few_conclusion conclude_few(const few_leads& leads, int count, int most, float error, bool exact) {
    const int lane = static_cast<int>(threadIdx.x) % Lanes;
    int best = leaders::least;
#pragma unroll 1
    for (int i = lane; i < count; i += Lanes) best = max(best, leads.best(i));
    best = join_lanes<Lanes>(
        best, [](int a, int b) { return max(a, b); }, [](unsigned all, int v) { return __reduce_max_sync(all, v); });
    const int top = best & tag_mask, least = exact ? least_candidate(best, error) : top;
    int code = 0x7FFFFFFF, total = 0;
    constexpr int lost = 1 << 16;  // more than all candidates
#pragma unroll 1
    for (int i = lane; i < count; i += Lanes) {
        const few_lead l = leads[i];
        const bool may_win = exact ? l.best >= least : (l.best & tag_mask) == top;
        if (may_win) code = min(code, code_of(l.best, l.best_tile, i));
        if (!exact) continue;
        total += may_win + (l.best_runner >= least) + (l.next >= least) + (l.next_runner >= least);
        if (l.rest >= least) total += lost;  // something dropped could win
    }
    code = join_lanes<Lanes>(
        code, [](int a, int b) { return min(a, b); }, [](unsigned all, int v) { return __reduce_min_sync(all, v); });
    total = join_lanes<Lanes>(
        total, [](int a, int b) { return a + b; }, [](unsigned all, int v) { return __reduce_add_sync(all, v); });
    if (!(least > 0 && error == error)) return {0, 0, code_aside};  // integers order positive scores only
    return {least, total, total > most ? code_aside : total > 1 ? code_listed : code};
}

/// Lists the candidates of row `own` from `at` on: those of its `count` leads that reach `least`. Whole warp.
__device__ inline void list_few(const few_leads& leads, int count, int least, int own, int* candidate,
                                int* candidate_row, int at) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int from = 0; from < count; from += 32) {
        const int i = from + lane;
        const few_lead l = i < count ? leads[i] : few_lead{};  // which reaches nothing
        const auto list = [&](int score, int tile) {
            const unsigned reach = __ballot_sync(0xFFFFFFFFu, score >= least);
            if (score >= least) {
                const int to = at + __popc(reach & ((1u << lane) - 1));
                candidate[to] = code_of(score, tile, i);
                candidate_row[to] = own;
            }
            at += __popc(reach);
        };
        list(l.best, l.best_tile);
        list(l.best_runner, l.best_tile);
        list(l.next, l.next_tile);
        list(l.next_runner, l.next_tile);
    }
    __syncwarp();
}

#endif  // CUVQ_HAS_WGMMA

}  // namespace cuvq::kernel
