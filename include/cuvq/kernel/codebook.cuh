// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/philox.hpp>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Fills a state from randomly permuted rows of x; a warp a code.
template <class T, class X>
__global__ void init_codebook(state_ref<T> state, matrix_ref<const X> x, std::uint64_t seed, bool one_per_code) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t thread = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const std::int64_t warps = std::int64_t{gridDim.x} * blockDim.x / 32;
    for (std::int64_t k = thread / 32; k < state.codebook.rows; k += warps) {
        const std::int64_t first = detail::permute(seed, k % x.rows, x.rows);
        std::int64_t from = -1;
        for (std::int64_t t = 0; t <= 64 && t < x.rows && from < 0; ++t) {
            const std::int64_t row = (first + t) % x.rows;
            bool finite = true;
            for (std::int64_t d = lane; d < x.columns; d += 32)
                finite = finite && isfinite(static_cast<float>(x.row(row)[d]));
            if (__all_sync(0xFFFFFFFFu, finite)) from = row;
        }
        for (std::int64_t d = lane; d < x.columns; d += 32) {
            const T v = static_cast<T>(from < 0 ? 0.0f : static_cast<float>(x.row(from)[d]));
            state.codebook.row(k)[d] = v;
            state.embed_sum.row(k)[d] = one_per_code ? static_cast<float>(v) : 0.0f;
        }
        if (lane == 0) {
            state.cluster_size[k] = one_per_code ? 1.0f : 0.0f;
            state.steps_since_active[k] = 0;
        }
    }
    if (thread == 0) *state.step = 0;
}

}  // namespace cuvq::kernel
