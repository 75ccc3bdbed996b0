// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/validate.hpp>
#include <cuvq/device/image.cuh>
#include <cuvq/device/nearest_mma.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// As `quantize`, on tensor cores: sm_80 and later. Takes the tile's nearest_storage as dynamic shared memory.
template <class Policy, class X, class C>
__global__ __launch_bounds__(CUVQ_HAS_MMA ? Policy::threads : 32,
                             Policy::blocks) void quantize_mma(const __grid_constant__ detail::quantize_args<X, C> a,
                                                               const __grid_constant__ device::image_ref image,
                                                               const __grid_constant__ search_tally tally) {
#if CUVQ_HAS_MMA
    extern __shared__ __align__(128) char dynamic_shared[];
    __shared__ std::int64_t codes[Policy::rows];
    const device::nearest_storage<Policy> storage{dynamic_shared};
    double loss = 0;
    for (std::int64_t first = std::int64_t{blockIdx.x} * Policy::rows; first < a.x.rows;
         first += std::int64_t{gridDim.x} * Policy::rows) {
        const std::int64_t left = a.x.rows - first;
        const matrix_ref<const X> rows{a.x.row(first), left < Policy::rows ? left : Policy::rows, a.x.columns,
                                       a.x.stride};
        device::nearest<Policy>(storage, rows, a.codebook, image, codes);
        write_tile<Policy::threads, Policy::rows>(a, tally, first, rows.rows, codes, loss);
        __syncthreads();  // codes are rewritten for the next tile
    }
    if (tally.loss) write_loss(tally.loss + (std::int64_t{blockIdx.x} * Policy::threads + threadIdx.x) / 32, loss);
#endif
}

}  // namespace cuvq::kernel
