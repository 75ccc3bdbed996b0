// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What one thread keeps of the filter's scores of a row: float bits as integers, which order positive scores, with a
// tag in their low bits.
#pragma once

#include <cuda_runtime.h>

namespace cuvq::device {

/// Below every score.
inline constexpr int least_score = -0x7FFFFFFF;

/// The two best tiles of a row in one thread, by their best scores, and the best of all that it dropped.
struct row_leaders {
    int best = least_score, best_tile = 0;
    int next = least_score, next_tile = 0;
    int rest = least_score;

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
    /// The `i`th score that it kept, and the tile of that.
    __device__ int score(int i) const { return i == 0 ? best : next; }
    __device__ int tile(int i) const { return i == 0 ? best_tile : next_tile; }
};

/// The same with the two best scores of each of these tiles, and the best one of a third: where a thread sees so many
/// codes of a row that those it drops would take long to look through.
struct wide_row_leaders {
    int best = least_score, best_runner = least_score, best_tile = 0;
    int next = least_score, next_runner = least_score, next_tile = 0;
    int third = least_score, third_tile = 0;
    int rest = least_score;

    /// A tile's largest score and its second largest. The third largest, if it matters, goes to `rest` before.
    __device__ void offer(int score, int runner, int tile) {
        const bool leads = score > best;
        const int second = min(score, best), second_runner = leads ? best_runner : runner;
        const int second_tile = leads ? best_tile : tile;
        best = max(score, best);
        best_runner = leads ? runner : best_runner;
        best_tile = leads ? tile : best_tile;
        const bool follows = second > next;
        const int dropped = min(second, next), dropped_tile = follows ? next_tile : second_tile;
        rest = __vimax3_s32(rest, min(dropped, third), follows ? next_runner : second_runner);
        third_tile = dropped > third ? dropped_tile : third_tile;
        third = max(dropped, third);
        next = max(second, next);
        next_runner = follows ? second_runner : next_runner;
        next_tile = follows ? second_tile : next_tile;
    }
    __device__ int score(int i) const {
        return i == 0 ? best : i == 1 ? best_runner : i == 2 ? next : i == 3 ? next_runner : third;
    }
    __device__ int tile(int i) const { return i < 2 ? best_tile : i < 4 ? next_tile : third_tile; }
};

/// The least tagged score that a row's nearest code can have when `best` is the largest and `error` its bound;
/// `least_score` where none can be told: not above 0, where integers do not order scores, or NaN. While `best` rises,
/// it falls by no more than its slack allows. `TagBits`: how many low bits a tag takes, five at least.
template <int TagBits = 5>
__device__ int least_candidate(int best, float error) {
    // A tag moved the two scores by up to 2^TagBits units in the last place each.
    constexpr float slack = 0x1.2p-17f * (1 << (TagBits - 5));
    const float score = __int_as_float(best), limit = score - 2.0002f * error - slack * score;
    // No score but 0 is below 2^-48 in magnitude, the last place of a product of halves. Of 0 a tag makes something
    // larger, which says nothing.
    return limit > 0x1p-100f ? __float_as_int(limit) : least_score;
}

}  // namespace cuvq::device
