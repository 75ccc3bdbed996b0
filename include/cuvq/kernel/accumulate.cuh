// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Counts and sums of each code without a one-hot matrix, in an order that nothing but the input decides: rows are
// sorted by code (stable, so by row within a code), runs of `run` sorted rows are summed by a warp each, and the
// partial sums of a code that spans several runs are added in order.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/validate.hpp>
#include <cuvq/device/accumulate.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Row i sorts under its code, or under K if it is left out. `trusted`: x was checked when the codes were made.
/// `distances`: those that came with the codes, NaN for a row without one; or null. A warp a row.
template <class X>
__global__ void sort_keys(matrix_ref<const X> x, const_codes_ref codes, vector_ref<const float> weights,
                          vector_ref<const float> distances, std::int64_t code_count, bool trusted,
                          std::int64_t first_row, std::int64_t row_count, std::uint32_t* keys, std::uint32_t* rows) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t warps = std::int64_t{gridDim.x} * blockDim.x / 32;
    for (std::int64_t i = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32; i < row_count; i += warps) {
        const std::int64_t row = first_row + i, code = codes.load(row);
        bool valid = code >= 0 && code < code_count;
        if (weights) valid = valid && weights[row] >= 0 && isfinite(weights[row]);
        if (distances) valid = valid && !isnan(distances[row]);
        if (valid && !trusted) {
            bool finite = true;
            for (std::int64_t d = lane; d < x.columns; d += 32)
                finite = finite && isfinite(static_cast<float>(x.row(row)[d]));
            valid = __all_sync(0xFFFFFFFFu, finite);
        }
        if (lane == 0) {
            keys[i] = static_cast<std::uint32_t>(valid ? code : code_count);
            rows[i] = static_cast<std::uint32_t>(i);
        }
    }
}

/// Rows in sorted order, and the partial sums of runs of them. A run is summed segment by segment, a segment being
/// its rows of one code; one that reaches the run's edge while its code goes on beyond it is partial.
struct sorted_rows {
    const std::uint32_t* keys;  // [count] ascending
    const std::uint32_t* rows;  // [count] row of the slice
    std::int64_t count;         // rows of the slice
    std::int64_t first_row;     // of the slice in x
    std::int64_t run;           // rows per run
    double* partial_sums;       // [runs][2][D]: the segment that holds the run's first row; the last one, if another
    double* partial_counts;     // [runs][2] sums of weights
};

/// Rows added up in float before they go onto a sum in double: with 2^-24 for each addition, 8 rows are the most that
/// keep every sum of n rows within 2^-22 sqrt(n) even if all roundings point the same way (equal rows do that).
inline constexpr int most_float_rows = 8;

/// Adds `value` onto what the caller had, or replaces it.
__device__ inline void put(float& to, double value, bool add) {
    to = static_cast<float>(add ? value + static_cast<double>(to) : value);
}

/// Sums of the segments of every run: whole codes to `counts` and `sums`, parts of codes to the partial sums.
/// A warp takes Tile::columns columns of a run.
template <class Tile, class X>
__global__ __launch_bounds__(Tile::threads) void sum_runs(detail::accumulate_args<X> a, sorted_rows s, bool add) {
    constexpr int V = Tile::columns / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t columns = a.x.columns, code_count = a.sums.rows;
    const std::int64_t slices = (columns - 1) / Tile::columns + 1;
    const std::int64_t work = ((s.count - 1) / s.run + 1) * slices,
                       warps = std::int64_t{gridDim.x} * Tile::threads / 32;
    for (std::int64_t w = (std::int64_t{blockIdx.x} * Tile::threads + threadIdx.x) / 32; w < work; w += warps) {
        const std::int64_t run = w / slices, first = (w % slices) * Tile::columns + lane;
        const std::int64_t begin = run * s.run, end = begin + s.run < s.count ? begin + s.run : s.count;
        for (std::int64_t at = begin; at < end;) {
            const std::uint32_t key = s.keys[at];
            if (key >= code_count) break;  // only left-out rows from here on
            const bool starts_before = at == begin && begin > 0 && s.keys[begin - 1] == key, opens = at == begin;
            double sum[V] = {}, count = 0;
            while (at < end && s.keys[at] == key) {
                const std::int64_t start = at;
                float part[V] = {};
                const std::int64_t stop = at + most_float_rows < end ? at + most_float_rows : end;
#pragma unroll 4
                for (; at < stop && s.keys[at] == key; ++at) {
                    const std::int64_t row = s.first_row + s.rows[at];
                    const float weight = a.weights ? a.weights[row] : 1.0f;
                    count += weight;
                    device::accumulate_row(part, a.x.row(row), weight, columns, first, 32);
                }
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    if (isfinite(part[i])) {
                        sum[i] += part[i];
                    } else if (first + 32 * i < columns) {  // float overflowed on the way; double does not
                        for (std::int64_t again = start; again < at; ++again) {
                            const std::int64_t row = s.first_row + s.rows[again];
                            sum[i] += static_cast<double>(a.weights ? a.weights[row] : 1.0f) *
                                      static_cast<double>(static_cast<float>(a.x.row(row)[first + 32 * i]));
                        }
                    }
                }
            }
            const bool goes_on = at == end && end < s.count && s.keys[end] == key;
            const bool partial = starts_before || goes_on;
            const std::int64_t slot = 2 * run + (opens ? 0 : 1);
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const std::int64_t d = first + 32 * i;
                if (d >= columns) continue;
                if (partial)
                    s.partial_sums[slot * columns + d] = sum[i];
                else
                    put(a.sums.row(key)[d], sum[i], add);
            }
            if (lane == 0 && w % slices == 0) {
                if (partial)
                    s.partial_counts[slot] = count;
                else
                    put(a.counts[key], count, add);
            }
        }
    }
}

/// First position in [0, count) whose key is at least `key`.
__device__ inline std::int64_t lower_bound(const std::uint32_t* keys, std::int64_t count, std::int64_t key) {
    std::int64_t low = 0, high = count;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (std::int64_t{keys[middle]} < key)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/// The codes that `sum_runs` could not finish: those of several runs, and those without rows. A block takes
/// Tile::columns columns of a code; its warps take every Tile::threads / 32-th run. Adds the rows that were left out
/// to `invalid_rows` if there is one.
template <class Tile, class X>
__global__ __launch_bounds__(Tile::threads) void merge_runs(detail::accumulate_args<X> a, sorted_rows s, bool add,
                                                            unsigned long long* invalid_rows) {
    constexpr int V = Tile::columns / 32, warps = Tile::threads / 32;
    __shared__ double shared_sum[warps][Tile::columns];
    __shared__ double shared_count[warps];
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const std::int64_t columns = a.x.columns, slices = (columns - 1) / Tile::columns + 1;
    if (invalid_rows && blockIdx.x == 0 && threadIdx.x == 0)
        *invalid_rows += static_cast<unsigned long long>(s.count - lower_bound(s.keys, s.count, a.sums.rows));
    for (std::int64_t w = blockIdx.x; w < a.sums.rows * slices; w += gridDim.x) {
        const std::int64_t key = w / slices, first = (w % slices) * Tile::columns + lane;
        const std::int64_t begin = lower_bound(s.keys, s.count, key), end = lower_bound(s.keys, s.count, key + 1);
        const bool empty = begin == end;
        if (empty && add) continue;
        const std::int64_t first_run = begin / s.run, last_run = empty ? first_run - 1 : (end - 1) / s.run;
        if (!empty && first_run == last_run) continue;

        double sum[V] = {}, count = 0;
        for (std::int64_t run = first_run + warp; run <= last_run; run += warps) {
            const std::int64_t slot = 2 * run + (run == first_run && begin % s.run != 0 ? 1 : 0);
#pragma unroll
            for (int i = 0; i < V; ++i)
                if (first + 32 * i < columns) sum[i] += s.partial_sums[slot * columns + first + 32 * i];
            count += s.partial_counts[slot];
        }
#pragma unroll
        for (int i = 0; i < V; ++i) shared_sum[warp][lane + 32 * i] = sum[i];
        if (lane == 0) shared_count[warp] = count;
        __syncthreads();
        if (warp == 0) {
            for (int other = 1; other < warps; ++other) {
#pragma unroll
                for (int i = 0; i < V; ++i) sum[i] += shared_sum[other][lane + 32 * i];
                count += shared_count[other];
            }
#pragma unroll
            for (int i = 0; i < V; ++i)
                if (first + 32 * i < columns) put(a.sums.row(key)[first + 32 * i], sum[i], add);
            if (lane == 0 && w % slices == 0) put(a.counts[key], count, add);
        }
        __syncthreads();
    }
}

}  // namespace cuvq::kernel
