// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What one EMA update by RecTokens' rules must make of the state that the benchmark starts from, an element at a time,
// in float64, on host and device. The rules are those that params.hpp documents.
#pragma once

#include <cstdint>

#include <cuvq/detail/philox.hpp>
#include <cuvq/params.hpp>

namespace cuvq::bench {

/// Steps without a row that code k is taken to have behind it: spread, so that every update restarts a like share of
/// the idle codes, as in a long run. Cluster sizes start at 1, sums at the codebook.
CUVQ_HOST_DEVICE inline std::int32_t idle_steps_at_start(std::int64_t k, const ema_params& p) {
    return static_cast<std::int32_t>(k % p.restart_after_steps);
}

struct updated_element {
    double sum, codebook, size;
    std::int32_t idle_steps;
};

/// Element (k, d) after the first update.
/// @param start       the codebook's and the sum's before
/// @param count, sum  of the batch's rows of code k
/// @param x           [rows x dimensions] the batch
template <class X>
CUVQ_HOST_DEVICE updated_element update_once(const ema_params& p, std::int64_t k, std::int64_t d, double start,
                                             double count, double sum, const X* x, std::int64_t rows,
                                             std::int64_t dimensions) {
    if (count > 0) {
        const double size = p.decay + (1.0 - p.decay) * count, new_sum = p.decay * start + (1.0 - p.decay) * sum;
        return {new_sum, new_sum / (size > p.epsilon ? size : p.epsilon), size, 0};
    }
    const std::int32_t idle_steps = idle_steps_at_start(k, p) + 1;
    if (idle_steps < p.restart_after_steps) return {start, start, 1, idle_steps};
    const std::uint64_t draw = cuvq::detail::philox_bits(p.seed, static_cast<std::uint64_t>(k), 0);
    const X drawn = x[cuvq::detail::scale_to(draw, rows) * dimensions + d];
    return {0, static_cast<double>(static_cast<float>(drawn)), 0, 0};
}

}  // namespace cuvq::bench
