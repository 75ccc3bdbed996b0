// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/nearest.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Codes, quantized rows and distances of all rows of x; each block takes every gridDim.x-th tile of rows, and leaves a
/// partial loss per warp.
template <class Policy, std::size_t D, class X, class C>
__global__ __launch_bounds__(Policy::threads) void quantize(detail::quantize_args<X, C> a, search_tally tally) {
    __shared__ device::nearest_storage<Policy> storage;
    __shared__ std::int64_t codes[Policy::rows];
    const std::int64_t columns = D == dynamic_extent ? a.x.columns : static_cast<std::int64_t>(D);

    double loss = 0;
    for (std::int64_t first = std::int64_t{blockIdx.x} * Policy::rows; first < a.x.rows;
         first += std::int64_t{gridDim.x} * Policy::rows) {
        const std::int64_t left = a.x.rows - first;
        const matrix_ref<const X> rows{a.x.row(first), left < Policy::rows ? left : Policy::rows, columns, a.x.stride};
        device::nearest<Policy, D>(storage, rows, a.codebook, codes);
        write_tile<Policy::threads, Policy::rows>(a, tally, first, 1, rows.rows, codes, loss);
        __syncthreads();  // codes are rewritten for the next tile
    }
    if (tally.loss) write_loss(tally.loss + (std::int64_t{blockIdx.x} * Policy::threads + threadIdx.x) / 32, loss);
}

}  // namespace cuvq::kernel
