// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The launch of an `ema_apply`, and those of an `ema_update` of a small batch: one, or two where the total of the
// cluster sizes is needed first.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/arguments.hpp>
#include <cuvq/detail/launch.cuh>
#include <cuvq/dispatch/accumulate.cuh>
#include <cuvq/dispatch/tuning.cuh>
#include <cuvq/kernel/ema.cuh>
#include <cuvq/params.hpp>

namespace cuvq::dispatch {

inline bool needs_total(const ema_params& p) {
    return p.rule == ema_rule::laplace || p.dead_codes == dead_code_rule::usage_ratio;
}

struct ema_scratch {
    double* parts = nullptr;  // [most_total_parts], null where no total is needed

    ema_scratch(detail::carver& c, const ema_params& p) {
        if (needs_total(p)) parts = c.take<double>(kernel::most_total_parts);
    }
};

inline device::ema_step ema_step_of(const ema_params& p) {
    device::ema_step step;
    step.keep = static_cast<float>(p.decay);
    step.take = static_cast<float>(1.0 - p.decay);
    return step;
}

/// @param parts  of the total in m.parts, those that are there already.
template <class T, class R>
void ema_apply(const detail::ema_args<T, R>& a, const ema_params& p, const ema_scratch& m, int parts,
               const kernel::ema_tally& tally, const kernel::image_refresh& refresh, cudaStream_t stream) {
    constexpr unsigned threads = 128;
    const auto apply = refresh ? kernel::ema_apply<threads, true, T, R> : kernel::ema_apply<threads, false, T, R>;
    const unsigned lead = refresh ? 1 : 0;
    const auto blocks = [&](std::int64_t most) { return detail::blocks_for(a.counts.size, threads / 32, most) + lead; };
    const kernel::size_total total{m.parts, parts};
    if (total.parts && parts == 0) {
        const std::int64_t most =
            std::min<std::int64_t>(detail::blocks_at_once(apply, threads, 0), kernel::most_ema_blocks);
        detail::launch_together(apply, blocks(most - lead), threads, stream, 0, a, p, ema_step_of(p), total, tally,
                                refresh);
    } else {
        detail::launch_next(detail::is_for_hopper(apply), apply, blocks(kernel::most_ema_blocks), threads, stream, 0, a,
                            p, ema_step_of(p), total, tally, refresh);
    }
}

/// accumulate and ema_apply of a batch of `gather_shapes`.
/// @param refresh  the image to keep fresh, or none.
/// @param counts   [K] gets the counts, or null, where one launch does all.
template <class T, class X>
void ema_update_gathered(const detail::accumulate_args<X>& a, const detail::ema_args<T, X>& update, const ema_params& p,
                         const provenance& from, const ema_scratch& m, const kernel::image_refresh& refresh,
                         float* counts, unsigned long long* invalid_rows, const kernel::ema_tally& tally,
                         cudaStream_t stream) {
    using in_clusters = gather_plan::in_clusters;
    using alone = gather_plan::alone;
    static_assert(gather_shapes::most_blocks * in_clusters::most_codes <= kernel::most_total_parts * alone::most_codes,
                  "cuvq: each block leaves a part");
    const gather_plan plan(a, from);
    if (needs_total(p)) {
        const unsigned blocks =
            plan.launch(a.sums, 0, kernel::gather_sized<in_clusters, T, X>, kernel::gather_sized<alone, T, X>, stream,
                        a, plan.source, update, p, ema_step_of(p), plan.vectors, plan.checks, m.parts, invalid_rows);
        ema_apply(update, p, m, static_cast<int>(blocks), tally, refresh, stream);
        return;
    }
    plan.launch(a.sums, refresh ? 1 : 0, kernel::ema_update_gathered<in_clusters, T, X>,
                kernel::ema_update_gathered<alone, T, X>, stream, a, plan.source, update, p, ema_step_of(p),
                plan.vectors, plan.checks, counts, invalid_rows, tally, refresh);
}

}  // namespace cuvq::dispatch
