// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Counts and sums of each code without a one-hot matrix, in an order that nothing but the input decides: rows are
// sorted by code (kernel/sort_rows.cuh), a block sums a run of sorted rows whatever their codes, and the partial sums
// of a code that spans several runs are added in order. So every block reads as many rows as the next, however skewed
// the codes are.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/kernel/narrow_segments.cuh>
#include <cuvq/kernel/row_adder.cuh>
#include <cuvq/kernel/segments.cuh>
#include <cuvq/kernel/sort_rows.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Lists the rows of a slice with their codes, those that hold a NaN or Inf without. A warp a row. For rows that are
/// summed by several blocks, none of which would see the whole of a row.
template <class X>
__global__ void list_finite_rows(matrix_ref<const X> x, row_source source, coded_row* rows) {
    arch::wait_for_predecessor();
    arch::let_successor_start();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t warps = std::int64_t{gridDim.x} * blockDim.x / 32;
    for (std::int64_t i = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32; i < source.count; i += warps) {
        coded_row row[1];
        source.load(i, source.count, row);
        bool finite = true;
        for (std::int64_t d = lane; d < x.columns; d += 32)
            finite = finite && isfinite(static_cast<float>(x.row(source.first_row + i)[d]));
        if (!__all_sync(0xFFFFFFFFu, finite)) row[0].code = coded_row::none;
        if (lane == 0) rows[i] = row[0];
    }
}

/// Rows in sorted order, and the partial sums of runs of them. A run is summed segment by segment, a segment being
/// its rows of one code; one that reaches the run's edge while its code goes on beyond it is partial.
struct sorted_rows {
    const coded_row* rows;       // [*count] by code
    const std::uint32_t* count;  // rows that have a code
    std::int64_t first_row;      // of the slice in x
    std::int64_t slice_rows;     // with a code or not
    std::int64_t run;            // rows per run
    double* partial_sums;        // [runs][2][D]: the segment that holds the run's first row; the last one, if another
    double* partial_counts;      // [runs][2] sums of weights
    std::uint32_t* last_run;     // [K] of a code that spans several: written where it ends
};

/// Sums of the segments of every run: whole codes to `counts` and `sums`, parts of codes to the partial sums. A block
/// takes Tile::columns columns of a run. `vectors`: see `has_vectors`, of the columns of a lane. `Narrow`: there are at
/// most Tile::narrow_columns columns. `lanes` take a row, see Tile::lanes.
template <class Tile, bool Narrow, class X>
__global__ __launch_bounds__(Tile::threads, Tile::blocks) void sum_runs(detail::accumulate_args<X> a, sorted_rows s,
                                                                        int lanes, bool vectors, bool add,
                                                                        unsigned long long* invalid_rows) {
    constexpr int warps = Tile::threads / 32, columns_per_lane = Tile::columns / 32;
    __shared__ segment_storage<Tile> storage;
    arch::wait_for_predecessor();
    arch::let_successor_start();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t columns = a.x.columns, slices = (columns - 1) / Tile::columns + 1;
    const std::int64_t run = blockIdx.x / slices, slice = blockIdx.x % slices * Tile::columns;
    const std::int64_t count = *s.count, begin = run * s.run;
    const std::int64_t end = begin + s.run < count ? begin + s.run : count;
    if (invalid_rows && blockIdx.x == 0 && threadIdx.x == 0)
        atomicAdd(invalid_rows, static_cast<unsigned long long>(s.slice_rows - count));
    if (begin >= end) return;

    const std::int64_t column = slice + threadIdx.x;
    const bool has_column = threadIdx.x < Tile::columns && column < columns;
    const bool starts_before = begin > 0 && s.rows[begin - 1].code == s.rows[begin].code;
    bool opens = true;  // the segment holds the first row of the run
    const auto close = [&](const open_segment& segment, bool goes_on) {
        if ((opens && starts_before) || goes_on) {
            const std::int64_t slot = 2 * run + (opens ? 0 : 1);
            if (has_column) s.partial_sums[slot * columns + column] = segment.sum;
            if (threadIdx.x == 0 && slice == 0) {
                s.partial_counts[slot] = segment.count;
                if (!goes_on) s.last_run[segment.code] = static_cast<std::uint32_t>(run);
            }
        } else {
            if (has_column) put(a.sums.row(segment.code)[column], segment.sum, add);
            if (threadIdx.x == 0 && slice == 0) put(a.counts[segment.code], segment.count, add);
        }
        opens = false;
    };

    unsigned left_out = 0;
    const auto row_at = [&](std::int64_t i) { return s.rows[i]; };
    const auto emit_warp = [&](std::int64_t first, std::uint32_t code, const double(&sum)[columns_per_lane],
                               double weights) {
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c)
            if (first + c < columns) put(a.sums.row(code)[first + c], sum[c], add);
        if (first == 0) put(a.counts[code], weights, add);
    };
    const auto sum_warp = [&](std::int64_t own_begin, std::int64_t own_end) {
        if constexpr (Narrow)
            sum_narrow_rows(storage, a, s.first_row, lanes, vectors, own_begin, own_end, left_out, row_at, emit_warp);
        else
            sum_rows<false>(storage, a, s.first_row, slice, vectors, own_begin, own_end, left_out, row_at, emit_warp);
    };
    const int room = Narrow ? Tile::narrow_rows * (32 / lanes) : Tile::rows_per_warp;
    const int most = static_cast<int>(s.run / warps < room ? s.run / warps : room);
    const open_segment last = sum_segments(storage, begin, end, most, s.rows[begin].code, sum_warp,
                                           [&](const open_segment& segment) { close(segment, false); });
    close(last, end < count && s.rows[end].code == last.code);
    if (invalid_rows && left_out > 0 && slice == 0 && lane == 0)
        atomicAdd(invalid_rows, static_cast<unsigned long long>(left_out));
}

/// The codes of several runs: of Tile::columns columns a warp takes the code that starts in its run and goes on beyond
/// it, if there is one; of one that spans many runs, all warps of the block every so many-th.
template <class Tile>
__global__ __launch_bounds__(Tile::merge_threads) void merge_runs(vector_ref<float> counts, matrix_ref<float> sums,
                                                                  sorted_rows s, bool add) {
    constexpr int warps = Tile::merge_threads / 32, columns_per_lane = Tile::columns / 32, ahead = 4;
    constexpr std::int64_t many = 4 * ahead;
    struct span {
        std::uint32_t code;
        bool whole;         // the run's first row has it
        std::int64_t last;  // run; -1: no such code
    };
    __shared__ double shared_sum[warps][Tile::columns];
    __shared__ double shared_count[warps];
    __shared__ span shared_span[warps];
    arch::wait_for_predecessor();
    arch::let_successor_start();
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const std::int64_t columns = sums.columns, slices = (columns - 1) / Tile::columns + 1;
    const std::int64_t first = blockIdx.x / slices * warps, slice = blockIdx.x % slices * Tile::columns;
    const std::int64_t all = *s.count;
    const auto span_of = [&](std::int64_t own) {  // of the code that starts in this run and goes on
        span found{coded_row::none, false, -1};
        const std::int64_t begin = own * s.run, next = begin + s.run;
        if (next >= all) return found;
        const std::uint32_t before = s.rows[begin > 0 ? begin - 1 : 0].code, start = s.rows[begin].code;
        const std::uint32_t end = s.rows[next - 1].code;
        found.code = s.rows[next].code;
        found.whole = start == found.code;
        if (end == found.code && !(found.whole && begin > 0 && before == found.code))
            found.last = s.last_run[found.code];
        return found;
    };
    // Adds up runs from, from + step, ... of the span that starts in run `own`.
    const auto add_up = [&](const span& of, std::int64_t own, std::int64_t from, int step, double& count,
                            double(&sum)[columns_per_lane]) {
        for (std::int64_t run = from; run <= of.last; run += step * ahead) {
            double value[ahead][columns_per_lane];
#pragma unroll
            for (int i = 0; i < ahead; ++i) {
                const std::int64_t at = run + i * step, slot = 2 * at + (at == own && !of.whole ? 1 : 0);
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c) {
                    const std::int64_t d = slice + lane + 32 * c;
                    value[i][c] = at <= of.last && d < columns ? s.partial_sums[slot * columns + d] : 0.0;
                }
                if (at <= of.last) count += s.partial_counts[slot];
            }
#pragma unroll
            for (int i = 0; i < ahead; ++i)
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c) sum[c] += value[i][c];
        }
    };
    const span mine = span_of(first + warp);
    const bool is_long = mine.last - (first + warp) >= many;
    if (mine.last >= 0 && !is_long) {
        double sum[columns_per_lane] = {}, count = 0;
        add_up(mine, first + warp, first + warp, 1, count, sum);
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c)
            if (slice + lane + 32 * c < columns) put(sums.row(mine.code)[slice + lane + 32 * c], sum[c], add);
        if (lane == 0 && slice == 0) put(counts[mine.code], count, add);
    }
    if (lane == 0) shared_span[warp] = mine;
    if (!__syncthreads_or(is_long)) return;
    for (int w = 0; w < warps; ++w) {
        const std::int64_t own = first + w;
        const span of = shared_span[w];
        if (of.last - own < many) continue;
        double sum[columns_per_lane] = {}, count = 0;
        add_up(of, own, own + warp, warps, count, sum);
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c) shared_sum[warp][lane + 32 * c] = sum[c];
        if (lane == 0) shared_count[warp] = count;
        __syncthreads();
        for (int c = static_cast<int>(threadIdx.x); c < Tile::columns && slice + c < columns;
             c += Tile::merge_threads) {
            double total = 0;
            for (int other = 0; other < warps; ++other) total += shared_sum[other][c];
            put(sums.row(of.code)[slice + c], total, add);
        }
        if (threadIdx.x == 0 && slice == 0) {
            double total = 0;
            for (const double c : shared_count) total += c;
            put(counts[of.code], total, add);
        }
        __syncthreads();
    }
}

}  // namespace cuvq::kernel
