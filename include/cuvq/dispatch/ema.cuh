// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The launches of an `ema_apply`: one, or two where the sum of the cluster sizes is needed first. And those of an
// `ema_update` of a small batch: as many.
#pragma once

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

/// @param parts  of m.parts, those that are there already; 0 if a total that is needed is still to be summed.
template <class T, class R>
void ema_apply(const detail::ema_args<T, R>& a, const ema_params& p, const ema_scratch& m, int parts,
               const kernel::ema_tally& tally, const kernel::image_refresh& refresh, cudaStream_t stream) {
    constexpr unsigned threads = 128;
    const device::ema_step step = ema_step_of(p);
    const auto apply = refresh ? kernel::ema_apply<threads, true, T, R> : kernel::ema_apply<threads, false, T, R>;
    const bool depends = detail::is_for_hopper(apply);
    if (needs_total(p) && parts == 0) {
        parts = kernel::total_parts;
        detail::launch_next(depends, kernel::sum_sizes<threads, T, R>, parts, threads, stream, 0, a, p, step, m.parts);
    }
    const unsigned blocks =
        detail::blocks_for(a.counts.size, threads / 32, kernel::most_ema_blocks) + (refresh ? 1 : 0);
    detail::launch_next(depends, apply, blocks, threads, stream, 0, a, p, step, m.parts, parts, tally, refresh);
}

/// accumulate and ema_apply of a batch of `gather_shapes`.
/// @param refresh  the image to keep fresh, or none.
/// @param counts   [K] gets the counts, or null, where one launch does all.
template <class T, class X>
void ema_update_gathered(const detail::accumulate_args<X>& a, const detail::ema_args<T, X>& update, const ema_params& p,
                         const provenance& from, const ema_scratch& m, const kernel::image_refresh& refresh,
                         float* counts, unsigned long long* invalid_rows, const kernel::ema_tally& tally,
                         cudaStream_t stream) {
    static_assert(gather_shapes::most_blocks <= kernel::most_total_parts && kernel::most_total_parts % 8 == 0,
                  "cuvq: each block of whole clusters leaves a part");
    const gather_plan plan(a, from);
    if (needs_total(p)) {
        const unsigned blocks =
            plan.launch(a.sums.rows, plan.block_bits, 0, kernel::gather_sized<gather_tile<8>, T, X>,
                        kernel::gather_sized<gather_tile<1>, T, X>, stream, a, plan.source, update, p, ema_step_of(p),
                        plan.block_bits, plan.vectors, plan.checks, m.parts, invalid_rows);
        ema_apply(update, p, m, static_cast<int>(blocks), tally, refresh, stream);
        return;
    }
    plan.launch(a.sums.rows, plan.block_bits, refresh ? 1 : 0, kernel::ema_update_gathered<gather_tile<8>, T, X>,
                kernel::ema_update_gathered<gather_tile<1>, T, X>, stream, a, plan.source, update, p, ema_step_of(p),
                plan.block_bits, plan.vectors, plan.checks, counts, invalid_rows, tally, refresh);
}

}  // namespace cuvq::dispatch
