// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/launch.cuh>
#include <cuvq/kernel/stats.cuh>
#include <cuvq/params.hpp>

namespace cuvq::dispatch {

/// Sets tallies to zero, before the kernels that add to them.
inline void clear_tallies(unsigned long long* tallies, std::int64_t count, cudaStream_t stream) {
    constexpr unsigned threads = 256;
    const auto clear = kernel::clear_tallies<threads>;
    detail::launch_next(detail::is_for_hopper(clear), clear, static_cast<unsigned>((count - 1) / threads + 1), threads,
                        stream, 0, tallies, count);
}

/// Puts a step_stats together, behind the kernels that left its parts.
inline void write_stats(const kernel::stats_parts& parts, step_stats* stats, cudaStream_t stream) {
    constexpr unsigned threads = kernel::stats_threads;
    const auto write = kernel::write_stats<threads>;
    detail::launch_next(detail::is_for_hopper(write), write, 1, threads, stream, 0, parts, stats);
}

}  // namespace cuvq::dispatch
