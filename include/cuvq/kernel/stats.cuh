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

/// Sets tallies to zero, before the kernels that add to them. (A memset would not overlap with those.)
template <unsigned Threads>
__global__ __launch_bounds__(Threads) void clear_tallies(unsigned long long* tallies, std::int64_t count) {
    arch::wait_for_predecessor();
    arch::let_successor_start();
    const std::int64_t i = std::int64_t{blockIdx.x} * Threads + threadIdx.x;
    if (i < count) tallies[i] = 0;
}

/// Sums that a step_stats is made of.
struct stats_sums {
    double loss = 0;                        // squared distances
    double count = 0, active = 0, log = 0;  // of the codes' shares n: n, those above 0, n ln n
};

/// Threads of the one block of `write_stats`.
inline constexpr unsigned stats_threads = 1024;

/// One block of `Threads` threads puts a step_stats together; sums in an order fixed by Threads.
template <unsigned Threads>
__global__ __launch_bounds__(Threads) void write_stats(stats_parts parts, step_stats* stats) {
    using reduce = cub::BlockReduce<stats_sums, static_cast<int>(Threads)>;
    __shared__ typename reduce::TempStorage storage;
    arch::wait_for_predecessor();
    const auto share = [&](std::int64_t k) {
        if (parts.histogram) return static_cast<double>(parts.histogram[k]);
        const float n = parts.counts[k];
        return isfinite(n) && n > 0 ? static_cast<double>(n) : 0.0;
    };
    stats_sums own;
    for (std::int64_t i = threadIdx.x; i < parts.loss_count; i += Threads) own.loss += parts.loss[i];
    if (parts.histogram || parts.counts) {
        for (std::int64_t k = threadIdx.x; k < parts.codes; k += Threads) {
            const double n = share(k);
            if (!(n > 0)) continue;
            own.count += n;
            own.active += 1;
            own.log += n * log(n);
        }
    }
    const auto add = [](const stats_sums& a, const stats_sums& b) {
        return stats_sums{a.loss + b.loss, a.count + b.count, a.active + b.active, a.log + b.log};
    };
    const stats_sums sums = reduce(storage).Reduce(own, add);
    if (threadIdx.x == 0) {
        const auto value = [](const unsigned long long* p) { return p ? static_cast<std::int64_t>(*p) : 0; };
        step_stats s;
        const std::int64_t with = parts.rows - value(parts.rows_without);
        if (parts.loss && with > 0) s.commitment_loss = sums.loss / (static_cast<double>(with) * parts.columns);
        // Of -sum p ln p, p = n / count; rounding must not carry it beyond what can be.
        if (sums.count > 0) s.perplexity = fmin(fmax(exp(log(sums.count) - sums.log / sums.count), 1.0), sums.active);
        s.active_codes = static_cast<std::int64_t>(sums.active);
        s.restarted_codes = value(parts.restarted_codes);
        s.invalid_rows = value(parts.invalid_rows);
        s.skipped_codes = value(parts.skipped_codes);
        *stats = s;
    }
}

}  // namespace cuvq::kernel
