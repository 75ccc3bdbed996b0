// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/validate.hpp>
#include <cuvq/device/ema.cuh>
#include <cuvq/kernel/gather.cuh>
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

/// The last block to come here advances the step counter. Every block comes once, after its last read of it.
__device__ inline void finish_step(std::int64_t* counter_of_steps, std::int64_t step) {
    __syncthreads();
    if (threadIdx.x == 0) {
        auto* counter = reinterpret_cast<unsigned long long*>(counter_of_steps);
        const unsigned long long before = atomicAdd(counter, 1ull << step_bits);
        if (before >> step_bits == gridDim.x - 1)
            *reinterpret_cast<volatile unsigned long long*>(counter) = static_cast<unsigned long long>(step) + 1;
    }
}

/// Counters of codes that an update adds to, or null.
struct ema_tally {
    unsigned long long* restarted = nullptr;
    unsigned long long* skipped = nullptr;
};

/// All that happens to code k. Whole warp, converged.
template <class T, class R>
__device__ void update_code(const detail::ema_args<T, R>& a, const ema_params& p, const device::ema_step& e,
                            std::int64_t k, const ema_tally& tally) {
    const device::ema_size s = device::blended_size(a, p, e, k);
    const bool left = device::ema_blend(a, p, e, s, k);
    const bool renewed = !left && device::dead_code_refresh(a, p, e, s, k);
    if (threadIdx.x % 32 == 0) {
        if (left && tally.skipped) atomicAdd(tally.skipped, 1ull);
        if (renewed && tally.restarted) atomicAdd(tally.restarted, 1ull);
    }
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

/// The whole update; a warp a code. `parts`: from `sum_sizes`, or null where no total is needed.
template <int Threads, class T, class R>
__global__ __launch_bounds__(Threads) void ema_apply(detail::ema_args<T, R> a, ema_params p, device::ema_step e,
                                                     const double* parts, ema_tally tally) {
    e.step = read_step(a.state.step);
    if (parts)
        for (int i = 0; i < total_parts; ++i) e.total += parts[i];
    for (std::int64_t k = std::int64_t{blockIdx.x} * (Threads / 32) + threadIdx.x / 32; k < a.counts.size;
         k += std::int64_t{gridDim.x} * (Threads / 32))
        update_code(a, p, e, k, tally);
    finish_step(a.state.step, e.step);
}

/// `gather` and `ema_apply` of a small batch, where no total is needed. A block takes `per_block` codes, then a warp a
/// code. `counts`: [K] gets the counts, or null.
template <class Tile, class T, class X>
__global__ __launch_bounds__(Tile::threads, Tile::blocks) void ema_update_gathered(
    detail::accumulate_args<X> a, row_source source, detail::ema_args<T, X> update, ema_params p, device::ema_step e,
    unsigned per_block, bool vectors, bool checks, float* counts, unsigned long long* invalid_rows, ema_tally tally) {
    __shared__ gather_storage<Tile> shared;
    e.step = read_step(update.state.step);
    const std::int64_t first = std::int64_t{blockIdx.x} * per_block, codes = update.state.codebook.rows;
    const auto own = static_cast<unsigned>(codes - first < per_block ? codes - first : per_block);
    gather_codes(shared, a, source, first, own, vectors, checks, invalid_rows);

    // The sums again, as float, where the update looks for them.
    const int columns = static_cast<int>(a.x.columns);
    auto* sums = reinterpret_cast<float*>(shared.segments.sum);
    static_assert(sizeof(shared.segments.sum) >= (Tile::most_sums + Tile::most_codes) * sizeof(float), "");
    float* sizes = sums + Tile::most_sums;
    for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(own) * columns; i += Tile::threads)
        sums[i] = static_cast<float>(shared.sum[i]);
    if (threadIdx.x < own) {
        sizes[threadIdx.x] = static_cast<float>(shared.count[threadIdx.x]);
        if (counts) counts[first + threadIdx.x] = sizes[threadIdx.x];
    }
    __syncthreads();
    update.counts = {sizes - first, codes};
    update.sums = {sums - first * columns, codes, columns, columns};
    for (unsigned c = threadIdx.x / 32; c < own; c += Tile::threads / 32)
        update_code(update, p, e, first + c, tally);
    finish_step(update.state.step, e.step);
}

}  // namespace cuvq::kernel
