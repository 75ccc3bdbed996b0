// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/validate.hpp>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/nearest.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// What a search tallies for step_stats on the way; all null when nobody asked.
struct search_tally {
    double* loss = nullptr;                      // [blocks] sums of squared distances
    unsigned long long* histogram = nullptr;     // [K] rows of each code
    unsigned long long* rows_without = nullptr;  // [1] rows without a code
};

/// The outputs of one block of `Threads` threads, tile by tile: eight lanes a row.
template <int Threads>
struct output_writer {
    static constexpr int groups = Threads / device::exact_lanes;
    double loss = 0;

    /// Rows `first` on of the call, given as `rows`; their codes in shared or global memory.
    template <class X, class C>
    __device__ void write(const detail::quantize_args<X, C>& a, const search_tally& tally, std::int64_t first,
                          const matrix_ref<const X>& rows, const std::int64_t* codes) {
        const int group = static_cast<int>(threadIdx.x) / device::exact_lanes;
        const int lane = static_cast<int>(threadIdx.x) % device::exact_lanes;
        const bool wants_distance = a.distances || tally.loss != nullptr;
        for (int r = group; r < rows.rows; r += groups) {
            const std::int64_t i = first + r, code = codes[r];
            double distance = __longlong_as_double(0x7FF8000000000000);
            if (wants_distance && code >= 0)
                distance = device::exact_distance(rows.row(r), a.codebook.row(code), rows.columns);
            if (lane == 0) {
                a.codes.store(i, code);
                if (a.distances) a.distances[i] = static_cast<float>(distance);
                if (tally.loss && code >= 0) loss += distance;
                if (tally.histogram && code >= 0) atomicAdd(tally.histogram + code, 1ull);
                if (tally.rows_without && code < 0) atomicAdd(tally.rows_without, 1ull);
            }
            if (a.quantized) {
                X* to = a.quantized.row(i);
                for (std::int64_t d = lane; d < rows.columns; d += device::exact_lanes)
                    to[d] = static_cast<X>(code < 0 ? __int_as_float(0x7FC00000)
                                                    : static_cast<float>(a.codebook.row(code)[d]));
            }
        }
    }
    /// The block's partial loss, if it is asked for, by way of shared memory.
    __device__ void finish(const search_tally& tally, double (&group_loss)[groups]) const {
        if (!tally.loss) return;
        if (threadIdx.x % device::exact_lanes == 0) group_loss[threadIdx.x / device::exact_lanes] = loss;
        __syncthreads();
        if (threadIdx.x == 0) {
            double sum = 0;
            for (int g = 0; g < groups; ++g) sum += group_loss[g];
            tally.loss[blockIdx.x] = sum;
        }
    }
};

/// Codes, quantized rows and distances of all rows of x; each block takes every gridDim.x-th tile of rows.
template <class Policy, std::size_t D, class X, class C>
__global__ __launch_bounds__(Policy::threads) void quantize(detail::quantize_args<X, C> a, search_tally tally) {
    __shared__ device::nearest_storage<Policy> storage;
    __shared__ std::int64_t codes[Policy::rows];
    output_writer<Policy::threads> outputs;
    __shared__ double group_loss[outputs.groups];
    const std::int64_t columns = D == dynamic_extent ? a.x.columns : static_cast<std::int64_t>(D);
    for (std::int64_t first = std::int64_t{blockIdx.x} * Policy::rows; first < a.x.rows;
         first += std::int64_t{gridDim.x} * Policy::rows) {
        const std::int64_t left = a.x.rows - first;
        const matrix_ref<const X> rows{a.x.row(first), left < Policy::rows ? left : Policy::rows, columns, a.x.stride};
        device::nearest<Policy, D>(storage, rows, a.codebook, codes);
        outputs.write(a, tally, first, rows, codes);
        __syncthreads();  // codes are rewritten for the next tile
    }
    outputs.finish(tally, group_loss);
}

}  // namespace cuvq::kernel
