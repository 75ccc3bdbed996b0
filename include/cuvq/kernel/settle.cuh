// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Rows that the filter left open: float64 decides between the codes that their words name.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <cub/block/block_scan.cuh>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/certificate.cuh>
#include <cuvq/kernel/filter_sm90.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// An open row put aside for `settle_aside`, since its candidates are too many to list.
struct row_aside {
    static constexpr int most_words = 6;
    std::int64_t row;
    int word[most_words];  // as in row_results; negative behind the last
};

/// Where warps put rows aside, each in a segment of its own.
struct rows_aside {
    row_aside* rows = nullptr;            // [segments][capacity]
    int* used = nullptr;                  // [segments]
    int capacity = 0;                     // 0: none is put aside
    struct shared_row* shared = nullptr;  // [most_shared_rows]; none in use when a search starts
};

/// A row that several blocks settle together, each some of its codes; the last one to be done decides.
struct shared_row {
    static constexpr int most_parts = 16;
    double distance[most_parts];
    std::int64_t code[most_parts];
    unsigned done;
};
inline constexpr int most_shared_rows = 64;
inline constexpr std::int64_t shared_part_codes = 1024;

inline constexpr int settle_threads = 256, most_segments = 1024;

#if CUVQ_HAS_WGMMA

/// Rows of up to so many columns are measured by a thread each: eight lanes would have too little to share.
inline constexpr std::int64_t alone_columns = 32;

/// Considers the codes that the words of an open row name, up to `count` or a negative one: those that group `group` of
/// `groups` groups of eight lanes is to take, and of what a word names without a list, part `part` of `parts`. Each
/// lane has its own choice then. False if a word says everything and the row is not finite, so that it has no code.
/// Whole warps call it.
template <class X, class C>
__device__ bool consider_words(device::exact_choice& choice, const int* words, int count, const X* row,
                               const matrix_ref<const C>& codebook, std::int64_t columns, int group, int groups,
                               int part = 0, int parts = 1) {
    constexpr int held = image_tile / 4;  // codes of a tile that a thread holds
    int turn = 0;
    for (int i = 0; i < count && words[i] >= 0; ++i) {
        const int word = words[i];
        if (word < row_results::column) {
            if (turn++ % groups == group && part == 0)
                choice.consider(device::exact_distance(row, codebook.row(word), columns), word);
            continue;
        }
        const bool everything = word == row_results::everything;
        if (everything && !device::is_row_finite(row, columns)) return false;
        const std::int64_t tiles = (codebook.rows - 1) / image_tile + 1;
        const std::int64_t all = everything ? codebook.rows : tiles * held;
        const std::int64_t each = (all - 1) / parts + 1, first = part * each;
        const std::int64_t mine = min(each, all - first);
        const auto code_at = [&](std::int64_t at) {
            at += first;
            if (everything) return at;
            const int place = static_cast<int>(at % held);
            const std::int64_t k = at / held * image_tile + (place >> 1) * 8 + 2 * (word & 3) + (place & 1);
            return min(k, codebook.rows - 1);  // beyond K: another look at the last code
        };
        if (columns <= alone_columns) {
            for (std::int64_t at = group * 8 + threadIdx.x % 8; at < mine; at += groups * 8) {
                const std::int64_t k = code_at(at);
                choice.consider(device::exact_distance_alone(row, codebook.row(k), columns), k);
            }
        } else {
            device::consider_codes(choice, row, codebook, columns, mine, group, groups, code_at);
        }
    }
    __syncwarp();
    return true;
}

/// The choice of a warp, from those of its lanes.
__device__ inline void merge_warp(device::exact_choice& choice) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) choice.merge(0xFFFFFFFFu, step);
}

/// The exact code of an open row, from its words, by a whole warp.
template <class X, class C>
__device__ std::int64_t settle_open(const int* words, int count, const X* row, const matrix_ref<const C>& codebook,
                                    std::int64_t columns) {
    device::exact_choice choice;
    if (!consider_words(choice, words, count, row, codebook, columns, threadIdx.x % 32 / 8, 4)) return -1;
    merge_warp(choice);
    return choice.code;
}

/// The exact codes of those rows of `rows` whose bits are set in `open`, row r being x.row(first + r) with the
/// `words` of result row start + r, all of them single codes: into `code` of lane r. Whole warp.
template <class X, class C>
__device__ void settle_light(unsigned open, const row_results& result, int start, std::int64_t first,
                             const matrix_ref<const X>& x, const matrix_ref<const C>& codebook, std::int64_t& code) {
    const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 8;
    const int words = -1 - static_cast<int>(code);  // of this lane's row, if open
    if (x.columns <= alone_columns) {               // the candidates of all rows, a lane each
        constexpr unsigned all = 0xFFFFFFFFu;
        const int mine = open >> lane & 1 ? words : 0;
        int end = mine;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int others = __shfl_up_sync(all, end, step);
            if (lane >= step) end += others;
        }
        const int begin = end - mine, total = __shfl_sync(all, end, 31), most = __reduce_max_sync(all, mine);
        device::exact_choice choice;
        for (int base = 0; base < total; base += 32) {
            const int candidate = min(base + lane, total - 1);
            int row = 0;  // the last that begins at this candidate or before
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
                if (__shfl_sync(all, begin, row + step) <= candidate) row += step;
            const int k = result.word[start + row][candidate - __shfl_sync(all, begin, row)];
            const double d = device::exact_distance_alone(x.row(first + row), codebook.row(k), x.columns);
            for (int i = 0; i < most; ++i) {
                const int from = begin + i - base;
                const double other = __shfl_sync(all, d, from & 31);
                const int other_code = __shfl_sync(all, k, from & 31);
                if (i < mine && from >= 0 && from < 32) choice.consider(other, other_code);
            }
        }
        if (mine > 0) code = choice.code;
        return;
    }
    while (open != 0) {  // two rows at once where two groups of eight lanes are enough for each
        const int row0 = __ffs(open) - 1;
        open &= open - 1;
        const int row1 = open != 0 ? __ffs(open) - 1 : row0;
        const int words0 = __shfl_sync(0xFFFFFFFFu, words, row0), words1 = __shfl_sync(0xFFFFFFFFu, words, row1);
        const bool pair = row1 != row0 && words0 <= 2 && words1 <= 2;
        if (pair) open &= open - 1;
        const int row = pair && group >= 2 ? row1 : row0, number = pair && group >= 2 ? words1 : words0;
        device::exact_choice choice;
        for (int i = pair ? group % 2 : group; __any_sync(0xFFFFFFFFu, i < number); i += pair ? 2 : 4) {
            const int k = result.word[start + row][min(i, number - 1)];
            choice.consider(device::exact_distance(x.row(first + row), codebook.row(k), x.columns), k);
        }
        choice.merge(0xFFFFFFFFu, 8);
        if (!pair) choice.merge(0xFFFFFFFFu, 16);
        const std::int64_t code0 = __shfl_sync(0xFFFFFFFFu, choice.code, 0);
        const std::int64_t code1 = __shfl_sync(0xFFFFFFFFu, choice.code, 16);
        if (lane == row0) code = code0;
        if (pair && lane == row1) code = code1;
    }
}

/// Puts an open row aside, if there is room. `used`: of the segment, by its warp. Whole warp.
__device__ inline bool set_aside(const rows_aside& aside, int segment, int& used, std::int64_t row, const int* words,
                                 int count) {
    if (used >= aside.capacity) return false;
    if (threadIdx.x % 32 == 0) {
        row_aside& to = aside.rows[std::int64_t{segment} * aside.capacity + used];
        to.row = row;
#pragma unroll
        for (int i = 0; i < row_aside::most_words; ++i) to.word[i] = i < count ? words[i] : -1;
        if (count > row_aside::most_words) {
            to.word[0] = row_results::everything;
            to.word[1] = -1;
        }
    }
    ++used;
    __syncwarp();
    return true;
}

/// The choice of a whole block, from those of its lanes; in warp 0. All threads call it, after a
/// barrier that lets `distances` and `codes` be written; they may be written again after the next one.
template <int Warps>
__device__ void merge_block(device::exact_choice& choice, double (&distances)[Warps], std::int64_t (&codes)[Warps]) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    merge_warp(choice);
    if (threadIdx.x % 32 == 0) {
        distances[warp] = choice.distance;
        codes[warp] = choice.code;
    }
    __syncthreads();
    if (warp == 0) {
        for (int w = 1; w < Warps; ++w)
            if (codes[w] >= 0) choice.consider(distances[w], codes[w]);
    }
}

#endif  // CUVQ_HAS_WGMMA

/// Codes of the rows that a search put aside: a block each, or several if they are few.
template <class X, class C>
__global__ __launch_bounds__(settle_threads) void settle_aside(const __grid_constant__ detail::quantize_args<X, C> a,
                                                               const __grid_constant__ search_tally tally,
                                                               const __grid_constant__ rows_aside aside, int segments) {
#if CUVQ_HAS_WGMMA
    constexpr int warps = settle_threads / 32, each = most_segments / settle_threads;
    using scan = cub::BlockScan<int, settle_threads>;
    __shared__ typename scan::TempStorage storage;
    __shared__ int starts[most_segments];  // of each segment's rows among all
    __shared__ double distances[warps];
    __shared__ std::int64_t codes[warps];
    __shared__ bool decides;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    arch::wait_for_predecessor();

    int count[each], total;
#pragma unroll
    for (int i = 0; i < each; ++i) {
        const int segment = static_cast<int>(threadIdx.x) * each + i;
        count[i] = segment < segments ? aside.used[segment] : 0;
    }
    scan(storage).ExclusiveSum(count, count, total);
#pragma unroll
    for (int i = 0; i < each; ++i) starts[static_cast<int>(threadIdx.x) * each + i] = count[i];
    __syncthreads();
    const auto find = [&](int number) -> const row_aside& {
        int low = 0, high = most_segments;  // of the segments that start at `number` or before, the last
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (starts[middle] <= number ? low : high) = middle;
        }
        return aside.rows[std::int64_t{low} * aside.capacity + number - starts[low]];
    };

    const std::int64_t wanted = (a.codebook.rows - 1) / shared_part_codes + 1;
    const int parts =
        total > most_shared_rows ? 1 : static_cast<int>(min(wanted, std::int64_t{shared_row::most_parts}));
    for (int i = blockIdx.x; i < total * parts; i += gridDim.x) {
        const row_aside& row = find(i / parts);
        const int part = i % parts;
        device::exact_choice choice;
        consider_words(choice, row.word, row_aside::most_words, a.x.row(row.row), a.codebook, a.x.columns,
                       static_cast<int>(threadIdx.x) / 8, settle_threads / 8, part, parts);
        merge_block(choice, distances, codes);
        if (parts > 1) {
            shared_row& shared = aside.shared[i / parts];
            if (threadIdx.x == 0) {
                shared.distance[part] = choice.distance;
                shared.code[part] = choice.code;
                __threadfence();
                decides = atomicAdd(&shared.done, 1u) == static_cast<unsigned>(parts - 1);
                __threadfence();
            }
            __syncthreads();
            if (!decides) continue;
            choice = {};
            for (int p = 0; p < parts; ++p) {
                const std::int64_t k = *const_cast<const volatile std::int64_t*>(&shared.code[p]);
                if (k >= 0) choice.consider(*const_cast<const volatile double*>(&shared.distance[p]), k);
            }
        }
        if (warp == 0) write_codes(a, tally, row.row, 1, choice.code);
        __syncthreads();
    }
#endif  // CUVQ_HAS_WGMMA
}

}  // namespace cuvq::kernel
