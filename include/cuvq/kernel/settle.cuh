// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Rows that the filter left open: float64 decides between their candidates, where float does not.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/kernel/shared_rows.cuh>
#include <cuvq/kernel/table_filter_sm90.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// The 64 rows of each turn of a block: `most_turns` groups of 64, of the last block maybe fewer.
struct row_span {
    std::int64_t rows;
    int most_turns, block;

    __device__ std::int64_t first(int turn) const {
        return (std::int64_t{block} * most_turns + turn) * row_results::rows;
    }
    __device__ int turns() const {
        const std::int64_t groups = (rows - 1) / row_results::rows + 1;
        const std::int64_t left = groups - std::int64_t{block} * most_turns;
        return static_cast<int>(left < most_turns ? left : most_turns);
    }
    __device__ bool has(int turn) const { return turn < most_turns && first(turn) < rows; }
};

/// Warps of a block that write codes, each those of every third turn.
inline constexpr int finishing_warps = 3;

/// The rows that one of them sees, numbered in its order.
struct rows_seen {
    row_span span;
    int part;  // the warp's number in its block

    __device__ std::int64_t row(int number) const {
        return span.first(part + finishing_warps * (number / row_results::rows)) + number % row_results::rows;
    }
    __device__ int count() const {
        return (span.turns() - part + finishing_warps - 1) / finishing_warps * row_results::rows;
    }
};

/// The lists of a search of `blocks` blocks: a segment for each of their finishing warps.
struct list_segments {
    std::int64_t rows;
    int most_turns, blocks;

    __device__ int count() const { return blocks * finishing_warps; }
    __device__ rows_seen of(int segment) const {
        return {{rows, most_turns, segment / finishing_warps}, segment % finishing_warps};
    }
};

/// The rows that a search leaves open, listed by each finishing warp, in those places of the lists that are the indices
/// of the rows it sees: from the front rows whose words are all codes, from the back others.
struct open_rows {
    int* rows = nullptr;           // [N rounded up to 64] their numbers among those that the warp sees
    open_words* words = nullptr;   // [N rounded up to 64]
    int2* counts = nullptr;        // [finishing warps] how many from the front, and from the back
    shared_row* shared = nullptr;  // [most_shared_rows], if a codebook has `shared_parts`
};

#if CUVQ_HAS_WGMMA

/// Rows of up to so many columns are measured by a thread each: eight lanes would have too little to share.
inline constexpr std::int64_t alone_columns = 32;

/// Considers the codes that the words of an open row name: those that group `group` of `groups` groups of eight lanes
/// is to take, and of what a word names without a list, part `part` of `parts`. Each lane has its own choice then; none
/// if a word says everything and the row is not finite. Whole warps call it.
template <class X, class C>
__device__ void consider_words(device::exact_choice& choice, const open_words& words, const X* row,
                               const matrix_ref<const C>& codebook, std::int64_t columns, int group, int groups,
                               int part = 0, int parts = 1) {
    constexpr int held = image_tile / 4;  // codes of a tile that a thread holds
    const int code_tiles = static_cast<int>(device::image_ref::tiles(codebook.rows));
    for (int i = group, code; part == 0 && (code = words.listed(i, code_tiles)) >= 0; i += groups) {
        const std::int64_t k = min(std::int64_t{code}, codebook.rows - 1);  // beyond K: another look at the last code
        choice.consider(device::exact_distance(row, codebook.row(k), columns), k);
    }
    __syncwarp();
    for (int i = 0; i < open_words::most(code_tiles); ++i) {
        const int word = words.word(i, code_tiles);
        if (word == open_words::none) break;
        if (!open_words::is_whole(word)) continue;
        const bool everything = word == open_words::everything;
        if (everything && !device::is_row_finite(row, columns)) return;
        const std::int64_t all = everything ? codebook.rows : std::int64_t{code_tiles} * held;
        const device::share_of own(all, part, parts);
        const auto code_at = [&](std::int64_t at) {
            at += own.first;
            if (everything) return at;
            const std::int64_t k =
                scored_code(static_cast<int>(at / held), static_cast<int>(at % held), word - open_words::column);
            return min(k, codebook.rows - 1);
        };
        if (columns <= alone_columns) {
            for (std::int64_t at = group * 8 + threadIdx.x % 8; at < own.count; at += groups * 8) {
                const std::int64_t k = code_at(at);
                choice.consider(device::exact_distance_alone(row, codebook.row(k), columns), k);
            }
        } else {
            device::consider_codes(choice, row, codebook, columns, own.count, group, groups, code_at);
        }
    }
    __syncwarp();
}

/// The SIMT filter's value of each lane's code: the first `here` lanes of a group of eight have one. `least` is
/// lowered to the least of them. `lanes`: the group's, all of which call this.
template <class X, class C>
__device__ float filter_distance(const X* row, const matrix_ref<const C>& codebook, std::int64_t columns,
                                 unsigned lanes, std::int64_t own, int here, float& least) {
    constexpr int batch = 4, width = device::exact_lanes;
    float value = 0;
#pragma unroll 1
    for (int j = 0; j < here; j += batch) {
        const C* codes[batch];
        float near[batch];
#pragma unroll
        for (int t = 0; t < batch; ++t)
            codes[t] = codebook.row(__shfl_sync(lanes, own, j + t < here ? j + t : j, width));
        device::squared_distances(row, reinterpret_cast<const C* const(&)[batch]>(codes), columns, near);
#pragma unroll
        for (int t = 0; t < batch; ++t) {
            least = fminf(least, near[t]);  // which is not NaN
            if (static_cast<int>(threadIdx.x) % width == j + t) value = near[t];
        }
    }
    return value;
}

/// Codes of rows listed from the front, whose candidates `Lanes` lanes measure, by a warp: at first + j apart of them
/// for j = 0, 1, ... below 32 / Lanes, and so on after every `stride` ones, below count_of().
template <int Lanes, class X, class C, class CountOf>
__device__ void settle_listed(const detail::quantize_args<X, C>& a, const search_tally& tally, const open_rows& open,
                              const rows_seen& seen, int first, int apart, int stride, const CountOf& count_of) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int tiles = static_cast<int>(device::image_ref::tiles(a.codebook.rows)), places = seen.count();
    if (places == 0) return;
    // Rows and words are read before it is known whether they are listed, lest loads wait for each other.
    const int own_word = min(lane % Lanes, open_words::most(tiles) - 1);
    int next_own;
    std::conditional_t<Lanes == 1, open_words, int> next_words;  // all of a row's, or the lane's own
    const auto number_from = [&](int from) { return from + lane / Lanes * apart; };
    const auto load = [&](int number) {
        const std::int64_t place = seen.row(min(number, places - 1));
        next_own = open.rows[place];
        if constexpr (Lanes == 1)
            next_words = open.words[place];
        else
            next_words = open.words[place].word(own_word, tiles);
    };
    load(number_from(first));
    const int count = count_of();
    while (first < count) {
        const bool listed = number_from(first) < count;
        const std::int64_t row = listed ? seen.row(next_own) : 0;
        const auto words = [&] {
            if constexpr (Lanes == 1)
                return next_words.cut(listed ? open_words::most(tiles) : 0, tiles);
            else
                return listed && lane % Lanes < open_words::most(tiles) ? next_words : open_words::none;
        }();
        first += stride;
        load(number_from(first));
        const X* x = a.x.row(row);
        device::exact_choice choice;
        const auto consider = [&](std::int64_t k0, std::int64_t k1) {  // two codes at a time
            const C* const codes[2] = {a.codebook.row(k0), a.codebook.row(k1 < 0 ? k0 : k1)};
            double distances[2];
            if constexpr (Lanes == 1) {
                distances[0] = device::exact_distance_alone(x, codes[0], a.x.columns);
                distances[1] = device::exact_distance_alone(x, codes[1], a.x.columns);
            } else {
                device::squared_distances(x, codes, a.x.columns, distances);
            }
            choice.consider(distances[0], k0);
            if (k1 >= 0) choice.consider(distances[1], k1);
        };
        const auto code = [&](int listed_code) { return min(std::int64_t{listed_code}, a.codebook.rows - 1); };
        if constexpr (Lanes == 1) {
            word_reader reader(words, tiles);
#pragma unroll 1
            for (std::int64_t k; (k = code(reader.next())) >= 0;) consider(k, code(reader.next()));
        } else {
            const unsigned lanes = ((1u << Lanes) - 1) << (lane / Lanes * Lanes);
            const shared_reader reader(words, tiles, lanes);
            float least = __int_as_float(0x7F800000);
            int here = Lanes;  // codes that the lanes hold, one each
#pragma unroll 1
            for (int i = 0; here == Lanes; i += Lanes) {
                const std::int64_t own = code(reader.listed(i + lane % Lanes));
                here = __popc(__ballot_sync(lanes, own >= 0));
                const float near = filter_distance(x, a.codebook, a.x.columns, lanes, own, here, least);
                const float limit = device::filter_limit(least, a.x.columns);
                unsigned left = __ballot_sync(lanes, own >= 0 && !(near > limit)) >> lane / Lanes * Lanes;
                const bool alone = (left & (left - 1)) == 0;
                if (alone && here < Lanes && choice.code < 0 && limit == limit) {
                    choice.code = __shfl_sync(lanes, own, __ffs(static_cast<int>(left)) - 1, Lanes);
                    break;
                }
#pragma unroll 1
                while (left != 0) {
                    const std::int64_t k0 = __shfl_sync(lanes, own, __ffs(static_cast<int>(left)) - 1, Lanes);
                    left &= left - 1;
                    const std::int64_t k1 = __shfl_sync(lanes, own, __ffs(static_cast<int>(left)) - 1, Lanes);
                    consider(k0, left != 0 ? k1 : -1);
                    left &= left - 1;
                }
            }
        }
        if (lane % Lanes == 0 && listed) write_code(a, tally, row, choice.code, tally.digits.of(row));
    }
}

/// How the rows listed from the front are dealt out to warps. So many warps begin with each segment's, which are known
/// without a look at others', and take so many of them at most; what is left, where a part of the batch is harder than
/// others, all share.
template <int Lanes>
struct narrow_deal {
    static constexpr int rows = 32 / Lanes;  // of a warp at once
    static constexpr int most_rounds = 32;
    list_segments segments;
    int sharers;

    __device__ narrow_deal(const list_segments& all, int warps) : segments(all), sharers(warps / segments.count()) {}
    __device__ int most() const { return sharers * rows * most_rounds; }
};

/// The first rows of each segment: warp `warp` of as many as the deal is for.
template <int Lanes, class X, class C>
__device__ void settle_first(const detail::quantize_args<X, C>& a, const search_tally& tally, const open_rows& open,
                             const narrow_deal<Lanes>& deal, int warp) {
    const int segment = warp % deal.segments.count(), share = warp / deal.segments.count();
    if (share >= deal.sharers) return;
    // Of a few rows each warp takes some, since those of a warp wait for each other where they take different turns.
    const int apart = Lanes == 1 ? 1 : deal.sharers;
    settle_listed<Lanes>(a, tally, open, deal.segments.of(segment), Lanes == 1 ? share * deal.rows : share, apart,
                         deal.sharers * deal.rows, [&] { return min(open.counts[segment].x, deal.most()); });
}

/// The others, by all warps alike. Not inlined: it would take registers from what is always done.
template <int Lanes, class X, class C>
__device__ __noinline__ void settle_rest(const detail::quantize_args<X, C>& a, const search_tally& tally,
                                         const open_rows& open, narrow_deal<Lanes> deal, segment_starts& shared) {
    const std::int64_t total =
        shared.set(deal.segments.count(), [&](int segment) { return max(open.counts[segment].x - deal.most(), 0); });
    const std::int64_t warps = std::int64_t{gridDim.x} * (settle_threads / 32);
    const std::int64_t warp = std::int64_t{threadIdx.x / 32} * gridDim.x + blockIdx.x;
    const std::int64_t share = ((total - 1) / (warps * deal.rows) + 1) * deal.rows;
    const std::int64_t end = min((warp + 1) * share, total);
    for (std::int64_t at = warp * share; at < end;) {
        const auto [segment, before] = shared.find(at);
        const std::int64_t next = segment + 1 < most_segments ? shared.starts[segment + 1] : total;
        const int count = static_cast<int>(min(end, next) - at), first = deal.most() + before;
        settle_listed<Lanes>(a, tally, open, deal.segments.of(segment), first, 1, deal.rows,
                             [stop = first + count] { return stop; });
        at += count;
    }
}

/// Codes of the rows listed from the back.
template <class X, class C>
__device__ void settle_wide(const detail::quantize_args<X, C>& a, const search_tally& tally, const open_rows& open,
                            const list_segments& segments, segment_starts& starts) {
    struct open_row {
        std::int64_t row, place;
    };
    const std::int64_t total = starts.set(segments.count(), [&](int segment) { return open.counts[segment].y; });
    const auto find = [&](std::int64_t number) {
        const auto [segment, before] = starts.find(number);
        const rows_seen seen = segments.of(segment);
        const std::int64_t place = seen.row(seen.count() - 1 - before);
        return open_row{seen.row(open.rows[place]), place};
    };
    settle_spread(a, tally, total, open.shared, find,
                  [&](device::exact_choice& choice, const open_row& found, int part, int parts) {
                      consider_words(choice, open.words[found.place], a.x.row(found.row), a.codebook, a.x.columns,
                                     static_cast<int>(threadIdx.x) / device::exact_lanes,
                                     settle_threads / device::exact_lanes, part, parts);
                  });
}

#endif  // CUVQ_HAS_WGMMA

/// Codes of the rows that a search of `blocks` blocks of `most_turns` turns left open. As many blocks at least; three
/// quarters of them begin with the rows of few candidates, so that the last are not kept waiting for the others.
template <class X, class C>
__global__ __launch_bounds__(settle_threads,
                             settle_blocks) void settle_rows(const __grid_constant__ detail::quantize_args<X, C> a,
                                                             const __grid_constant__ search_tally tally,
                                                             const __grid_constant__ open_rows open, int blocks,
                                                             int most_turns) {
#if CUVQ_HAS_WGMMA
    arch::let_successor_start();
    arch::wait_for_predecessor();
    constexpr int each = most_segments / settle_threads;
    __shared__ segment_starts starts;
    const list_segments segments{a.x.rows, most_turns, blocks};
    int2 listed[each];  // looked at when they have come
#pragma unroll
    for (int i = 0; i < each; ++i) {
        const int segment = i * settle_threads + static_cast<int>(threadIdx.x);
        listed[i] = segment < segments.count() ? open.counts[segment] : int2{0, 0};
    }
    const int narrow = static_cast<int>(gridDim.x - gridDim.x / 4), block = static_cast<int>(blockIdx.x);
    const auto settle = [&](auto lanes) {
        const narrow_deal<decltype(lanes)::value> deal(segments, settle_threads / 32 * narrow);
        if (block < narrow) settle_first(a, tally, open, deal, static_cast<int>(threadIdx.x) / 32 * narrow + block);
        bool any_left = false;
#pragma unroll
        for (int i = 0; i < each; ++i) any_left = any_left || listed[i].x > deal.most();
        if (__syncthreads_or(any_left)) settle_rest(a, tally, open, deal, starts);
    };
    if (a.x.columns <= alone_columns)
        settle(std::integral_constant<int, 1>());
    else
        settle(std::integral_constant<int, device::exact_lanes>());
    bool any_wide = false;
#pragma unroll
    for (int i = 0; i < each; ++i) any_wide = any_wide || listed[i].y > 0;
    if (__syncthreads_or(any_wide)) settle_wide(a, tally, open, segments, starts);
#endif  // CUVQ_HAS_WGMMA
}

}  // namespace cuvq::kernel
