// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The launches of an `ema_apply`: one, or two where the sum of the cluster sizes is needed first.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/validate.hpp>
#include <cuvq/kernel/ema.cuh>
#include <cuvq/params.hpp>

namespace cuvq::dispatch {

inline bool needs_total(const ema_params& p) {
    return p.rule == ema_rule::laplace || p.dead_codes == dead_code_rule::usage_ratio;
}

struct ema_scratch {
    double* parts = nullptr;  // [total_parts], null where no total is needed

    ema_scratch(detail::carver& c, const ema_params& p) {
        if (needs_total(p)) parts = c.take<double>(kernel::total_parts);
    }
};

/// Counters that the update adds to, or null.
struct ema_tally {
    unsigned long long* restarted = nullptr;
    unsigned long long* skipped = nullptr;
};

template <class T, class R>
void ema_apply(const detail::ema_args<T, R>& a, const ema_params& p, const ema_scratch& m, const ema_tally& tally,
               cudaStream_t stream) {
    constexpr unsigned threads = 128;
    device::ema_step step;
    step.keep = static_cast<float>(p.decay);
    step.take = static_cast<float>(1.0 - p.decay);
    if (needs_total(p))
        detail::launch(kernel::sum_sizes<threads, T, R>, kernel::total_parts, threads, stream, 0, a, p, step, m.parts);
    detail::launch(kernel::ema_apply<threads, T, R>,
                   detail::blocks_for(a.counts.size, threads / 32, kernel::most_ema_blocks), threads, stream, 0, a, p,
                   step, needs_total(p) ? m.parts : nullptr, tally.restarted, tally.skipped);
}

}  // namespace cuvq::dispatch
