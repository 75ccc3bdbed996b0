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

/// Codes, quantized rows and distances of all rows of x; each block takes every gridDim.x-th tile of rows.
template <class Policy, std::size_t D, class X, class C>
__global__ __launch_bounds__(Policy::threads) void quantize(detail::quantize_args<X, C> a, search_tally tally) {
    constexpr int groups = Policy::threads / device::exact_lanes;
    __shared__ device::nearest_storage<Policy> storage;
    __shared__ std::int64_t codes[Policy::rows];
    __shared__ double group_loss[groups];
    const int group = static_cast<int>(threadIdx.x) / device::exact_lanes;
    const int lane = static_cast<int>(threadIdx.x) % device::exact_lanes;
    const std::int64_t columns = D == dynamic_extent ? a.x.columns : static_cast<std::int64_t>(D);
    const bool wants_distance = a.distances || tally.loss != nullptr;

    double loss = 0;
    for (std::int64_t first = std::int64_t{blockIdx.x} * Policy::rows; first < a.x.rows;
         first += std::int64_t{gridDim.x} * Policy::rows) {
        const std::int64_t left = a.x.rows - first;
        const matrix_ref<const X> rows{a.x.row(first), left < Policy::rows ? left : Policy::rows, columns, a.x.stride};
        device::nearest<Policy, D>(storage, rows, a.codebook, codes);

        for (int r = group; r < rows.rows; r += groups) {
            const std::int64_t i = first + r, code = codes[r];
            double distance = __longlong_as_double(0x7FF8000000000000);
            if (wants_distance && code >= 0)
                distance = device::exact_distance(rows.row(r), a.codebook.row(code), columns);
            if (lane == 0) {
                a.codes.store(i, code);
                if (a.distances) a.distances[i] = static_cast<float>(distance);
                if (tally.loss && code >= 0) loss += distance;
                if (tally.histogram && code >= 0) atomicAdd(tally.histogram + code, 1ull);
                if (tally.rows_without && code < 0) atomicAdd(tally.rows_without, 1ull);
            }
            if (a.quantized) {
                X* to = a.quantized.row(i);
                for (std::int64_t d = lane; d < columns; d += device::exact_lanes)
                    to[d] = static_cast<X>(code < 0 ? __int_as_float(0x7FC00000)
                                                    : static_cast<float>(a.codebook.row(code)[d]));
            }
        }
        __syncthreads();  // codes are rewritten for the next tile
    }
    if (tally.loss) {
        if (lane == 0) group_loss[group] = loss;
        __syncthreads();
        if (threadIdx.x == 0) {
            double sum = 0;
            for (int g = 0; g < groups; ++g) sum += group_loss[g];
            tally.loss[blockIdx.x] = sum;
        }
    }
}

}  // namespace cuvq::kernel
