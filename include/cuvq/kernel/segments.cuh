// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Sums of rows that a list holds sorted by code, segment by segment, a segment being the rows of one code. A warp sums
// a part of the list, a block puts together what its warps have of a segment; the order of all additions depends on the
// list, D and whether there are weights.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/accumulate.cuh>
#include <cuvq/kernel/row_adder.cuh>
#include <cuvq/kernel/sort_rows.cuh>

namespace cuvq::kernel {

/// Adds `value` onto what the caller had, or replaces it.
__device__ inline void put(float& to, double value, bool add) {
    to = static_cast<float>(add ? value + static_cast<double>(to) : value);
}

/// Rows of one code in a row, as a block has them: a column a thread.
struct open_segment {
    std::uint32_t code;
    double sum = 0;    // of the thread's column of the slice, if it has one
    double count = 0;  // of weights; every thread has it
};

/// Shared memory of `sum_segments` and `merge_segments`: of each warp's rows, the segment that holds the first, and the
/// last, if another.
template <class Tile>
struct segment_storage {
    double sum[Tile::threads / 32][2][Tile::columns];
    double count[Tile::threads / 32][2];
    std::uint32_t code[Tile::threads / 32][2];  // none: no such segment

    /// By a warp that has no rows.
    __device__ void leave_none() {
        if (threadIdx.x % 32 < 2) code[threadIdx.x / 32][threadIdx.x % 32] = coded_row::none;
    }
};

/// A warp sums rows begin .. end - 1 of a list, sorted by code: columns slice .. slice + Tile::columns - 1 of each,
/// segment by segment, in an order that depends on the list, begin, end, D, `LongRuns` and whether there are weights.
/// Leaves the first segment and, if there is another, the last in `shared`. Whole warp, converged. `begin` < `end`.
/// `LongRuns`: many rows of a code are taken more at a time, for latency's sake.
///
/// @param left_out  of this warp: rows that are not finite, which are not added, get counted.
/// @param row_at    (i) -> coded_row, of the list.
/// @param emit_warp (column, code, sum[columns of this lane], count): called where a segment ends that is neither the
///                  first nor the last, by all lanes that have a share of it, each with its first column.
template <bool LongRuns, class Tile, class X, class RowAt, class EmitWarp>
__device__ void sum_rows(segment_storage<Tile>& shared, const detail::accumulate_args<X>& a, std::int64_t first_row,
                         std::int64_t slice, bool vectors, std::int64_t begin, std::int64_t end, unsigned& left_out,
                         const RowAt& row_at, const EmitWarp& emit_warp) {
    constexpr int columns_per_lane = Tile::columns / 32, batch = most_float_rows;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const std::int64_t columns = a.x.columns, first = slice + lane * columns_per_lane;  // column of this lane
    const row_adder<Tile, X> adder{a, first_row, slice, vectors};
    segment_sum<columns_per_lane> segment;
    bool is_first = true;
    const auto load = [&](std::int64_t i) { return i < end ? row_at(i) : coded_row{coded_row::none, 0}; };
    coded_row next = load(begin + lane);
    std::uint32_t code = __shfl_sync(0xFFFFFFFFu, next.code, 0);
    // What ends within the rows of a warp, but did not start with them, is a whole segment.
    const auto flush = [&](bool is_last) {
        if (is_first || is_last) {
            const int slot = is_first ? 0 : 1;
#pragma unroll
            for (int c = 0; c < columns_per_lane; ++c)
                shared.sum[warp][slot][lane * columns_per_lane + c] = segment.sum[c];
            if (lane == 0) {
                shared.count[warp][slot] = segment.count;
                shared.code[warp][slot] = code;
                if (is_first) shared.code[warp][1] = coded_row::none;
            }
        } else {
            emit_warp(first, code, segment.sum, segment.count);
        }
        is_first = false;
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c) segment.sum[c] = 0;
        segment.count = 0;
    };
    for (std::int64_t at = begin; at < end; at += 32) {
        const coded_row mine = next;
        const bool valid = at + lane < end;
        float own_weight = 1;
        if (a.weights && valid) own_weight = a.weights[first_row + mine.row];
        next = load(at + 32 + lane);
        std::uint32_t before = __shfl_up_sync(0xFFFFFFFFu, mine.code, 1);
        if (lane == 0) before = code;
        const unsigned starts = __ballot_sync(0xFFFFFFFFu, valid && mine.code != before);
        const int here = end - at < 32 ? static_cast<int>(end - at) : 32;
        if (LongRuns && starts == 0 && here == 32 && !a.weights) {
            adder.add_long_run(segment, mine.row, left_out);
            continue;
        }
        for (int j0 = 0; j0 < here; j0 += batch) {
            // Beyond `here`, row 0 is read, and not used.
            const X* row[batch];
            float value[batch][columns_per_lane];
#pragma unroll
            for (int j = 0; j < batch; ++j) row[j] = a.x.row(first_row + __shfl_sync(0xFFFFFFFFu, mine.row, j0 + j));
            read_rows(value, row, first, columns, vectors);
            const int in_batch = here - j0 < batch ? here - j0 : batch;
            unsigned marks = starts >> j0 & ((1u << in_batch) - 1);
#pragma unroll 1
            for (int from = 0; from < in_batch;) {  // one part of the batch for each segment in it
                if (marks >> from & 1) {
                    flush(false);
                    code = __shfl_sync(0xFFFFFFFFu, mine.code, j0 + from);
                    marks &= marks - 1;
                }
                const int to = marks ? __ffs(static_cast<int>(marks)) - 1 : in_batch;
                double weights = a.weights ? 0 : to - from;
#pragma unroll
                for (int j = 0; j < batch; ++j) {
                    const float weight = a.weights ? __shfl_sync(0xFFFFFFFFu, own_weight, j0 + j) : 1.0f;
                    if (j < from || j >= to) continue;
                    device::accumulate_row(segment.part, value[j], weight, columns_per_lane, 0, 1);
                    if (a.weights) weights += weight;
                }
                if (segment.is_sound()) {
                    segment.fold();
                    segment.count += weights;
                } else {
                    adder.add_one_by_one(segment, mine.row, own_weight, j0 + from, j0 + to, left_out);
                }
                from = to;
            }
        }
    }
    flush(true);
}

/// A block sums rows begin .. end - 1 of a list, sorted by code, segment by segment, in an order that depends on begin,
/// end and `most` alone.
///
/// @param most     rows of a warp at a time.
/// @param code     of the first row.
/// @param sum_warp (begin, end): called by one warp, sums these rows as `sum_rows` does.
/// @param emit     (open_segment): called by the block where a segment ends that is not the last, and that is some
///                 warp's first or last.
/// Returns the last segment. Ends with a barrier. `begin` < `end`.
template <class Tile, class SumWarp, class Emit>
__device__ open_segment sum_segments(segment_storage<Tile>& shared, std::int64_t begin, std::int64_t end, int most,
                                     std::uint32_t code, const SumWarp& sum_warp, const Emit& emit) {
    constexpr int warps = Tile::threads / 32;
    static_assert(Tile::threads >= Tile::columns, "a thread of the block merges a column");
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    open_segment open{code};
    for (std::int64_t round = begin; round < end; round += warps * most) {
        const std::int64_t own_begin = round + warp * most;
        const std::int64_t own_end = own_begin + most < end ? own_begin + most : end;
        if (own_begin < own_end)
            sum_warp(own_begin, own_end);
        else
            shared.leave_none();
        __syncthreads();
        // The segments of all warps in order, each read while the one before it is added.
        static_assert(2 * warps <= 32, "a lane for each segment");
        const std::uint32_t code_of_lane =
            lane < 2 * warps ? shared.code[lane / 2][lane % 2] : std::uint32_t{coded_row::none};
        unsigned left = __ballot_sync(0xFFFFFFFFu, code_of_lane != coded_row::none);
        const int own_column = static_cast<int>(threadIdx.x) % Tile::columns;
        int i = __ffs(static_cast<int>(left)) - 1;
        double sum = shared.sum[i / 2][i % 2][own_column], weights = shared.count[i / 2][i % 2];
#pragma unroll 1
        while (left) {
            left &= left - 1;
            const int after = left ? __ffs(static_cast<int>(left)) - 1 : i;
            const double next_sum = shared.sum[after / 2][after % 2][own_column];
            const double next_weights = shared.count[after / 2][after % 2];
            const std::uint32_t next_code = __shfl_sync(0xFFFFFFFFu, code_of_lane, i);
            if (next_code != open.code) {
                emit(open);
                open = {next_code};
            }
            open.sum += sum;
            open.count += weights;
            i = after;
            sum = next_sum;
            weights = next_weights;
        }
        __syncthreads();
    }
    return open;
}

/// Adds up what the warps of a block left of each code in `shared`, in order. Teams of threads take the codes in turn,
/// a thread of a team one of `width` columns.
/// @param emit  (open_segment, column): called by all threads of a team, also by those beyond the last column.
template <class Tile, class Emit>
__device__ void merge_segments(const segment_storage<Tile>& shared, int width, const Emit& emit) {
    constexpr unsigned all = 0xFFFFFFFFu;
    constexpr int slots = Tile::threads / 16;  // two of each warp
    static_assert(slots <= 32, "a lane for each");
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::uint32_t code = lane < slots ? shared.code[lane / 2][lane % 2] : std::uint32_t{coded_row::none};
    const unsigned used = __ballot_sync(all, code != coded_row::none), before = used & ((1u << lane) - 1);
    const std::uint32_t code_before = __shfl_sync(all, code, before != 0 ? 31 - __clz(static_cast<int>(before)) : lane);
    unsigned heads = __ballot_sync(all, code != coded_row::none && (before == 0 || code != code_before));
    const int team_threads = width <= 32 ? 32 : width <= 64 ? 64 : Tile::columns;
    const int teams = Tile::threads / team_threads, team = static_cast<int>(threadIdx.x) / team_threads;
    const int column = static_cast<int>(threadIdx.x) % team_threads;
#pragma unroll 1
    for (int number = 0; heads != 0; ++number) {
        const int first = __ffs(static_cast<int>(heads)) - 1;
        heads &= heads - 1;
        if (number % teams != team) continue;
        unsigned own = used & ~((1u << first) - 1);
        if (heads != 0) own &= (heads & -heads) - 1;
        open_segment segment{__shfl_sync(all, code, first)};
#pragma unroll 1
        for (; own != 0; own &= own - 1) {
            const int i = __ffs(static_cast<int>(own)) - 1;
            segment.sum += shared.sum[i / 2][i % 2][column];
            segment.count += shared.count[i / 2][i % 2];
        }
        emit(segment, column);
    }
}

}  // namespace cuvq::kernel
