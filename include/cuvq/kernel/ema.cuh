// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/ema.cuh>
#include <cuvq/kernel/gather.cuh>
#include <cuvq/kernel/image_frame.cuh>
#include <cuvq/params.hpp>

namespace cuvq::kernel {

/// While an update runs, the bits of the step counter from here up count the blocks that have come: the last one
/// finds itself so without scratch memory that somebody would have to clear first.
inline constexpr int step_bits = 48;
inline constexpr unsigned long long step_mask = (1ull << step_bits) - 1;
inline constexpr std::int64_t most_ema_blocks = 8192;  // fits above step_bits

/// Parts of the total of the blended cluster sizes, at most.
inline constexpr int most_total_parts = 512;

/// That total, where the update needs it.
struct size_total {
    double* parts = nullptr;  // [most_total_parts]
    int count = 0;            // that are there already; 0: a grid launched together makes them first
};

/// The number of updates before this one, and the step counter on its way to the next: each of `blocks` blocks calls
/// this once, by one thread. The last block to come advances the counter, when all others have what they need of it.
__device__ inline std::int64_t take_step(std::int64_t* step, unsigned blocks) {
    auto* counter = reinterpret_cast<unsigned long long*>(step);
    const unsigned long long before = atomicAdd(counter, 1ull << step_bits), own = before & step_mask;
    if (before >> step_bits == blocks - 1) *reinterpret_cast<volatile unsigned long long*>(counter) = own + 1;
    return static_cast<std::int64_t>(own);
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

/// The sum of the parts. Whole warp.
__device__ inline double total_of(const double* parts, int count) {
    double total = 0;
    for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) total += parts[i];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, step);
    return total;
}

/// A part of the total, by a block: of codes first, first + step, ... of each warp, of which `size_of(k)` is the size.
/// Ends with a barrier.
template <int Threads, class SizeOf>
__device__ void leave_sizes(std::int64_t first, std::int64_t codes, std::int64_t step, double* part,
                            const SizeOf& size_of) {
    __shared__ double of_warp[Threads / 32];
    double sum = 0;
    for (std::int64_t k = first; k < codes; k += step) {
        const float size = size_of(k);
        if (isfinite(size)) sum += size;
    }
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double all = 0;
        for (const double s : of_warp) all += s;
        *part = all;
    }
    __syncthreads();
}

/// The whole update; a warp a code. With an image to refresh, if `Keeps`, one block more.
template <int Threads, bool Keeps, class T, class R>
__global__ __launch_bounds__(Threads) void ema_apply(detail::ema_args<T, R> a, ema_params p, device::ema_step e,
                                                     size_total total, ema_tally tally, image_refresh refresh) {
    __shared__ std::int64_t shared_step;
    arch::wait_for_predecessor();
    arch::let_successor_start();
    if (threadIdx.x == 0) shared_step = take_step(a.state.step, gridDim.x);
    const std::int64_t blocks = gridDim.x - (Keeps ? 1 : 0), step = blocks * (Threads / 32);
    const std::int64_t first = std::int64_t{blockIdx.x} * (Threads / 32) + threadIdx.x / 32;
    if (total.parts && total.count == 0) {
        // As many parts as K says, lest the total depend on the card or on whether there is an image.
        constexpr int warps = Threads / 32;
        total.count = static_cast<int>(min((a.counts.size - 1) / warps + 1, std::int64_t{most_total_parts}));
        for (int part = static_cast<int>(blockIdx.x); part < total.count; part += static_cast<int>(gridDim.x))
            leave_sizes<Threads>(std::int64_t{part} * warps + threadIdx.x / 32, a.counts.size,
                                 std::int64_t{total.count} * warps, total.parts + part,
                                 [&](std::int64_t k) { return device::blended_size(a, p, e, k).size; });
        cooperative_groups::this_grid().sync();
    }
    if (Keeps && blockIdx.x == blocks) {
        __shared__ typename cub::BlockReduce<double, Threads>::TempStorage storage;
        __syncthreads();
        refresh.lead<Threads>(storage, a.counts.size, a.sums.columns, shared_step);
        return;
    }
    if (total.parts) e.total = total_of(total.parts, total.count);
    __syncthreads();
    e.step = shared_step;
    for (std::int64_t k = first; k < a.counts.size; k += step) {
        update_code(a, p, e, k, tally);
        if constexpr (Keeps) refresh.write_row(a.state.codebook, k, e.step);
    }
}

/// An update's arrays, with the count and sum of the block's c-th code, which is k, where `gather_codes` has left them.
template <class Tile, class T, class R>
__device__ detail::ema_args<T, R> gathered_args(detail::ema_args<T, R> update, const gather_storage<Tile>& shared,
                                                std::int64_t c, std::int64_t k) {
    const std::int64_t codes = update.state.codebook.rows, columns = update.state.codebook.columns;
    const int stride = gather_stride(columns);
    update.counts = {shared.count + c - k, codes};
    update.sums = {shared.sum + (c - k) * stride, codes, columns, stride};
    return update;
}

/// `gather` of a small batch, and the parts of the total: as many as blocks.
template <class Tile, class T, class X>
__global__ __launch_bounds__(Tile::threads, Tile::blocks) void gather_sized(
    int block_bits, detail::accumulate_args<X> a, row_source source, detail::ema_args<T, X> update, ema_params p,
    device::ema_step e, bool vectors, bool checks, double* parts, unsigned long long* invalid_rows) {
    extern __shared__ __align__(128) char dynamic_shared[];
    auto& shared = *reinterpret_cast<gather_storage<Tile>*>(dynamic_shared);
    const auto codes = gather_batch(shared, block_bits, a, source, vectors, checks, false, invalid_rows);
    leave_sizes<Tile::threads>(threadIdx.x / 32, codes.own_count, Tile::threads / 32, parts + blockIdx.x,
                               [&](std::int64_t c) {
                                   const std::int64_t k = codes.code(static_cast<unsigned>(c));
                                   return device::blended_size(gathered_args(update, shared, c, k), p, e, k).size;
                               });
}

/// `gather` and `ema_apply` of a small batch, where no total is needed. A block takes 2^block_bits codes, then a warp a
/// code. `counts`: [K] gets the counts, or null. With an image to refresh, one cluster more.
template <class Tile, class T, class X>
__global__ __launch_bounds__(Tile::threads, Tile::blocks) void ema_update_gathered(
    int block_bits, detail::accumulate_args<X> a, row_source source, detail::ema_args<T, X> update, ema_params p,
    device::ema_step e, bool vectors, bool checks, float* counts, unsigned long long* invalid_rows, ema_tally tally,
    image_refresh refresh) {
    extern __shared__ __align__(128) char dynamic_shared[];
    auto& shared = *reinterpret_cast<gather_storage<Tile>*>(dynamic_shared);
    __shared__ std::int64_t shared_step;
    const unsigned blocks = gridDim.x - (refresh ? Tile::cluster : 0);
    if (blockIdx.x > blocks) return;
    if (blockIdx.x < blocks) open_gather(shared);
    arch::wait_for_predecessor();
    arch::let_successor_start();
    const std::int64_t all_codes = update.state.codebook.rows;
    const int columns = static_cast<int>(a.x.columns);
    if (threadIdx.x == Tile::threads - 1) shared_step = take_step(update.state.step, blocks + (refresh ? 1 : 0));
    if (blockIdx.x == blocks) {
        __shared__ typename cub::BlockReduce<double, Tile::threads>::TempStorage storage;
        __syncthreads();
        refresh.lead<Tile::threads>(storage, all_codes, columns, shared_step);
        return;
    }
    const auto codes = gathered_codes::of<Tile>(all_codes, block_bits, refresh ? 1 : 0);
    gather_codes(shared, a, source, codes, vectors, checks, invalid_rows);
    e.step = shared_step;
    for (unsigned c = threadIdx.x / 32; c < codes.own_count; c += Tile::threads / 32) {
        const std::int64_t k = codes.code(c);
        if (counts && threadIdx.x % 32 == 0) counts[k] = shared.count[c];
        update_code(gathered_args(update, shared, c, k), p, e, k, tally);
        if (refresh) refresh.write_row(update.state.codebook, k, e.step);
    }
}

}  // namespace cuvq::kernel
