// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <cub/block/block_reduce.cuh>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/params.hpp>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Where one call left the parts of its step_stats, in device memory; a null part is 0 in the result.
struct stats_parts {
    const double* loss = nullptr;  // [loss_count] sums of squared distances
    std::int64_t loss_count = 0;
    std::int64_t rows = 0, columns = 0;                // of the search
    const unsigned long long* rows_without = nullptr;  // [1] rows without a code
    const unsigned long long* histogram = nullptr;     // [codes], or
    const float* counts = nullptr;                     // [codes]
    std::int64_t codes = 0;
    const unsigned long long* invalid_rows = nullptr;     // [1]
    const unsigned long long* restarted_codes = nullptr;  // [1]
    const unsigned long long* skipped_codes = nullptr;    // [1]
};

/// Threads of the one block of `write_stats`.
inline constexpr unsigned stats_threads = 1024;

/// One block of `Threads` threads puts a step_stats together; sums in an order fixed by Threads.
template <unsigned Threads>
__global__ __launch_bounds__(Threads) void write_stats(stats_parts parts, step_stats* stats) {
    using reduce = cub::BlockReduce<double, static_cast<int>(Threads)>;
    __shared__ typename reduce::TempStorage storage;
    __shared__ double shared_total;
    arch::wait_for_predecessor();
    const auto share = [&](std::int64_t k) {
        if (parts.histogram) return static_cast<double>(parts.histogram[k]);
        const float n = parts.counts[k];
        return isfinite(n) && n > 0 ? static_cast<double>(n) : 0.0;
    };
    const bool has_codes = parts.histogram != nullptr || parts.counts != nullptr;

    double loss = 0, count = 0, active = 0, entropy = 0;
    for (std::int64_t i = threadIdx.x; i < parts.loss_count; i += Threads) loss += parts.loss[i];
    if (has_codes) {
        for (std::int64_t k = threadIdx.x; k < parts.codes; k += Threads) {
            count += share(k);
            active += share(k) > 0;
        }
    }
    loss = reduce(storage).Sum(loss);
    __syncthreads();
    count = reduce(storage).Sum(count);
    __syncthreads();
    active = reduce(storage).Sum(active);
    if (threadIdx.x == 0) shared_total = count;
    __syncthreads();
    const double total = shared_total;
    if (has_codes && total > 0) {
        for (std::int64_t k = threadIdx.x; k < parts.codes; k += Threads) {
            const double p = share(k) / total;
            if (p > 0) entropy -= p * log(p);
        }
    }
    entropy = reduce(storage).Sum(entropy);
    if (threadIdx.x == 0) {
        const auto value = [](const unsigned long long* p) { return p ? static_cast<std::int64_t>(*p) : 0; };
        step_stats s;
        const std::int64_t with = parts.rows - value(parts.rows_without);
        if (parts.loss && with > 0) s.commitment_loss = loss / (static_cast<double>(with) * parts.columns);
        if (total > 0) s.perplexity = exp(entropy);
        s.active_codes = static_cast<std::int64_t>(active);
        s.restarted_codes = value(parts.restarted_codes);
        s.invalid_rows = value(parts.invalid_rows);
        s.skipped_codes = value(parts.skipped_codes);
        *stats = s;
    }
}

}  // namespace cuvq::kernel
