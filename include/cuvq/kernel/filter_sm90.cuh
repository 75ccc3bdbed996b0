// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What a warpgroup makes of the scores of its 64 rows, tile after tile: the codes that could win.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/device/leaders.cuh>
#include <cuvq/kernel/prepare.cuh>

namespace cuvq::kernel {

/// What an open row is settled from, in 16 bytes: words of 16 bits, or of a codebook of many tiles, of 32. A word is a
/// code, or one of those below.
struct alignas(16) open_words {
    static constexpr int most_short_tiles = 511;
    static constexpr int none = -1;        // behind the last
    static constexpr int everything = -2;  // the whole codebook
    static constexpr int column = -16;     // column + q: all codes that thread q of 4 scored

    int bits[4];

    __device__ static int most(int tiles) { return tiles <= most_short_tiles ? 8 : 4; }
    __device__ void put(int i, int word, int tiles) {
        if (tiles <= most_short_tiles)
            reinterpret_cast<std::uint16_t*>(bits)[i] = static_cast<std::uint16_t>(word);
        else
            bits[i] = word;
    }
    __device__ int word(int i, int tiles) const {
        if (tiles > most_short_tiles) return bits[i];
        const int word = bits[i / 2] >> i % 2 * 16 & 0xFFFF;
        return word < 0x10000 + column ? word : word - 0x10000;
    }
    /// The first `count` words alone.
    __device__ open_words cut(int count, int tiles) const {
        open_words cut;
        const int each = tiles <= most_short_tiles ? 2 : 1;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int left = count - i * each;
            cut.bits[i] = left <= 0 ? none : left < each ? bits[i] | static_cast<int>(0xFFFF0000u) : bits[i];
        }
        return cut;
    }
};

/// What the filter leaves of one warpgroup's 64 rows.
struct row_results {
    static constexpr int rows = 64;
    static constexpr std::int64_t most_codes = 1 << 29;
    static constexpr int wide = 16;                   // of a row's number of words: not all of them are codes
    static constexpr int everything = -1 - wide - 1;  // of one word, which says so

    int code[rows];         // the code, or -1 - n: open, to be settled from n words
    open_words word[rows];  // of an open row
};

/// Clears the bits of a score that its tag takes: its place among the 32 that a thread holds of a row and tile.
inline constexpr int tag_mask = ~(image_tile / 4 - 1);

#if CUVQ_HAS_WGMMA

/// The place of a tagged score among the 32 that a thread holds of a row and tile. Tags descend, so that of equal
/// scores the first is the largest.
__device__ inline int place_of(int tagged_score) { return ~tagged_score & ~tag_mask; }

/// The code whose score thread q of the four that share a row has in such a place.
__device__ inline int scored_code(int tile, int place, int q) {
    return tile * image_tile + (place >> 1) * 8 + 2 * q + (place & 1);
}

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

/// A part of a thread's scores of a tile: those from `First` on, `Count` of them.
template <int First, int Count>
struct score_part {
    static constexpr int first = First, end = First + Count;
};
using all_scores = score_part<0, 64>;

/// The largest of a part of a thread's scores of one of its two rows.
template <class Part>
__device__ int largest(Part, const float (&score)[64], int half) {
    int top = leaders::least;
#pragma unroll
    for (int j = Part::first; j < Part::end; j += 4)
        top = __vimax3_s32(top, __float_as_int(score[j + 2 * half]), __float_as_int(score[j + 2 * half + 1]));
    return top;
}

/// Largest of the four threads of a row.
__device__ inline int row_largest(int v) {
    v = max(v, __shfl_xor_sync(0xFFFFFFFFu, v, 1));
    return max(v, __shfl_xor_sync(0xFFFFFFFFu, v, 2));
}

/// The largest but two of a part of a thread's tagged scores of one of its two rows: the largest below `runner`; where
/// that is negative, maybe the largest of all.
template <class Part>
__device__ int third_largest(Part, const int (&s)[64], int half, int runner) {
    // As unsigned, s - runner is 0 or small for the two largest and wraps to the larger, the closer.
    const unsigned from = 0u - static_cast<unsigned>(runner);
    unsigned near[2] = {0, 0};
#pragma unroll
    for (int j = Part::first; j < Part::end; j += 4) {
#pragma unroll
        for (int i = 0; i < 2; ++i) near[i] = __viaddmax_u32(static_cast<unsigned>(s[j + 2 * half + i]), from, near[i]);
    }
    return static_cast<int>(max(near[0], near[1]) + static_cast<unsigned>(runner));
}

/// Offers a part of the scores of a tile to the leaders of a thread's two rows with their error bounds. Not `exact`:
/// without the runners-up. `Together`: the four threads of a row tell each other their best first, which pays where
/// there are few tiles to learn from.
template <bool Together, class Part>
__device__ void offer_scores(Part part, const float (&score)[64], int tile, int mask, bool exact, float error0,
                             float error1, leaders& lead0, leaders& lead1) {
    constexpr int first = Part::first, end = Part::end;
    int s[64];  // (16 pairs of codes, 2 rows, 2)
#pragma unroll
    for (int i = first; i < end; ++i) s[i] = tagged(score[i], mask, 31 - (i / 4 * 2 + i % 2));
    int top0 = max(s[first], s[first + 1]), top1 = max(s[first + 2], s[first + 3]);
#pragma unroll
    for (int j = first + 4; j < end; j += 4) {
        top0 = __vimax3_s32(top0, s[j], s[j + 1]);
        top1 = __vimax3_s32(top1, s[j + 2], s[j + 3]);
    }
    if (!exact) {
        lead0.lead(top0, tile);
        lead1.lead(top1, tile);
        return;
    }
    // The second largest: as unsigned, s - top is 0 for the largest and wraps to the larger, the closer.
    const unsigned from0 = 0u - static_cast<unsigned>(top0), from1 = 0u - static_cast<unsigned>(top1);
    unsigned near0 = 0, near1 = 0, near2 = 0, near3 = 0;
#pragma unroll
    for (int j = first; j < end; j += 4) {
        near0 = __viaddmax_u32(static_cast<unsigned>(s[j]), from0, near0);
        near1 = __viaddmax_u32(static_cast<unsigned>(s[j + 1]), from0, near1);
        near2 = __viaddmax_u32(static_cast<unsigned>(s[j + 2]), from1, near2);
        near3 = __viaddmax_u32(static_cast<unsigned>(s[j + 3]), from1, near3);
    }
    const int runner0 = static_cast<int>(max(near0, near1) + static_cast<unsigned>(top0));
    const int runner1 = static_cast<int>(max(near2, near3) + static_cast<unsigned>(top1));
    // Seldom is a runner-up so close that it may matter; only then may a third one.
    int best0 = max(top0, lead0.best), best1 = max(top1, lead1.best);
    if (Together) {
        best0 = row_largest(best0);
        best1 = row_largest(best1);
    }
    const bool close0 = runner0 >= least_candidate(best0, error0), close1 = runner1 >= least_candidate(best1, error1);
    if (__any_sync(0xFFFFFFFFu, close0 || close1)) {
        if (close0) lead0.rest = max(lead0.rest, third_largest(part, s, 0, runner0));
        if (close1) lead1.rest = max(lead1.rest, third_largest(part, s, 1, runner1));
    }
    lead0.offer(top0, runner0, tile);
    lead1.offer(top1, runner1, tile);
}

/// Turns what the four threads of two rows saw, row0 and row0 + 8, into codes, or into words for `settle_rows`. All
/// four call it; the rows go side by side, since one alone would mostly wait for shuffles.
__device__ inline void conclude(const leaders& lead0, const leaders& lead1, float error0, float error1, bool exact,
                                int tiles, row_results& results, int row0) {
    const int q = static_cast<int>(threadIdx.x) % 4;
    const auto code_of = [&](int tagged_score, int tile) { return scored_code(tile, place_of(tagged_score), q); };
    const int best0 = row_largest(lead0.best), best1 = row_largest(lead1.best);
    if (!exact) {
        const auto put = [&](const leaders& mine, int best, float error, int row) {
            const int top = best & tag_mask;
            int code = (mine.best & tag_mask) == top ? code_of(mine.best, mine.best_tile) : 0x7FFFFFFF;
            code = min(code, __shfl_xor_sync(0xFFFFFFFFu, code, 1));
            code = min(code, __shfl_xor_sync(0xFFFFFFFFu, code, 2));
            const bool ordered = top > 0 && error == error;  // integers order positive scores only
            if (q == 0) {
                results.code[row] = ordered ? code : row_results::everything;
                if (!ordered) results.word[row].put(0, open_words::everything, tiles);
            }
        };
        put(lead0, best0, error0, row0);
        put(lead1, best1, error1, row0 + 8);
        return;
    }
    constexpr int lost = 1 << 16;  // above all counts of words
    const auto words_of = [&](const leaders& mine, int least) {
        if (mine.rest >= least) return lost + 1;  // something dropped could win
        return (mine.best >= least) + (mine.best_runner >= least) + (mine.next >= least) + (mine.next_runner >= least) +
               (mine.third >= least);
    };
    const int limit0 = least_candidate(best0, error0), least0 = max(limit0, 1);
    const int limit1 = least_candidate(best1, error1), least1 = max(limit1, 1);
    const int words0 = words_of(lead0, least0), words1 = words_of(lead1, least1);
    const int next0 = __shfl_xor_sync(0xFFFFFFFFu, words0, 1), next1 = __shfl_xor_sync(0xFFFFFFFFu, words1, 1);
    const int pair0 = words0 + next0, pair1 = words1 + next1;
    const int far0 = __shfl_xor_sync(0xFFFFFFFFu, pair0, 2), far1 = __shfl_xor_sync(0xFFFFFFFFu, pair1, 2);
    const auto put = [&](const leaders& mine, int limit, int least, int words, int next, int far, int row) {
        const int total = words + next + far;
        if (limit > 0 && total == 1) {
            if (words == 1) results.code[row] = code_of(mine.best, mine.best_tile);
            return;
        }
        const int count = total & (lost - 1);
        const bool fits = limit > 0 && count <= open_words::most(tiles);
        if (q == 0)
            results.code[row] =
                fits ? -1 - (total < lost ? count : row_results::wide + count) : row_results::everything;
        open_words& to = results.word[row];
        if (!fits) {
            if (q == 0) to.put(0, open_words::everything, tiles);
            return;
        }
        int at = (q & 1 ? next & (lost - 1) : 0) + (q & 2 ? far & (lost - 1) : 0);
        if (words > lost) {
            to.put(at, open_words::column + q, tiles);
            return;
        }
        const auto add = [&](int score, int tile) {
            if (score >= least) to.put(at++, code_of(score, tile), tiles);
        };
        add(mine.best, mine.best_tile);
        add(mine.best_runner, mine.best_tile);
        add(mine.next, mine.next_tile);
        add(mine.next_runner, mine.next_tile);
        add(mine.third, mine.third_tile);
    };
    put(lead0, limit0, least0, words0, next0, far0, row0);
    put(lead1, limit1, least1, words1, next1, far1, row0 + 8);
}

#endif  // CUVQ_HAS_WGMMA

}  // namespace cuvq::kernel
