// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/validate.hpp>
#include <cuvq/device/ema.cuh>
#include <cuvq/params.hpp>

namespace cuvq::kernel {

/// While `ema_apply` runs, the bits of the step counter from here up count the blocks that are done: the last one
/// finds itself so without scratch memory that somebody would have to clear first.
inline constexpr int step_bits = 48;
inline constexpr unsigned long long step_mask = (1ull << step_bits) - 1;
inline constexpr std::int64_t most_ema_blocks = 8192;  // fits above step_bits

/// Blocks of `sum_sizes`, each leaving one partial total.
inline constexpr int total_parts = 128;

__device__ inline std::int64_t read_step(const std::int64_t* step) {
    const auto raw = *reinterpret_cast<const volatile unsigned long long*>(step);
    return static_cast<std::int64_t>(raw & step_mask);
}

/// Partial sums of the blended cluster sizes, total_parts of them; a warp a code.
template <int Threads, class T, class R>
__global__ __launch_bounds__(Threads) void sum_sizes(detail::ema_args<T, R> a, ema_params p, device::ema_step e,
                                                     double* parts) {
    __shared__ double warp_sum[Threads / 32];
    const int warp = static_cast<int>(threadIdx.x) / 32;
    double sum = 0;
    for (std::int64_t k = std::int64_t{blockIdx.x} * (Threads / 32) + warp; k < a.counts.size;
         k += std::int64_t{gridDim.x} * (Threads / 32)) {
        const float size = device::blended_size(a, p, e, k).size;
        if (isfinite(size)) sum += size;
    }
    if (threadIdx.x % 32 == 0) warp_sum[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0;
        for (const double s : warp_sum) total += s;
        parts[blockIdx.x] = total;
    }
}

/// The whole update; a warp a code. `parts`: from `sum_sizes`, or null where no total is needed. The last block to
/// finish advances the step counter. `restarted`, `skipped`: counters of codes, or null.
template <int Threads, class T, class R>
__global__ __launch_bounds__(Threads) void ema_apply(detail::ema_args<T, R> a, ema_params p, device::ema_step e,
                                                     const double* parts, unsigned long long* restarted,
                                                     unsigned long long* skipped) {
    e.step = read_step(a.state.step);
    if (parts)
        for (int i = 0; i < total_parts; ++i) e.total += parts[i];
    for (std::int64_t k = std::int64_t{blockIdx.x} * (Threads / 32) + threadIdx.x / 32; k < a.counts.size;
         k += std::int64_t{gridDim.x} * (Threads / 32)) {
        const device::ema_size s = device::blended_size(a, p, e, k);
        const bool left = device::ema_blend(a, p, e, s, k);
        const bool renewed = !left && device::dead_code_refresh(a, p, e, s, k);
        if (threadIdx.x % 32 == 0) {
            if (left && skipped) atomicAdd(skipped, 1ull);
            if (renewed && restarted) atomicAdd(restarted, 1ull);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        auto* counter = reinterpret_cast<unsigned long long*>(a.state.step);
        const unsigned long long before = atomicAdd(counter, 1ull << step_bits);
        if (before >> step_bits == gridDim.x - 1)
            *reinterpret_cast<volatile unsigned long long*>(counter) = static_cast<unsigned long long>(e.step) + 1;
    }
}

}  // namespace cuvq::kernel
