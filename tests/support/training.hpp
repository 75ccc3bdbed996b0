// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// States, batches and parameters for tests of updates.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <cuvq/params.hpp>

#include "support/host.hpp"
#include "support/random.hpp"
#include "support/state.hpp"

namespace cuvq::test {

/// Codes of which some are frequent and some never occur.
inline std::vector<std::int64_t> skewed_codes(random_source& random, std::int64_t n, std::int64_t k) {
    std::vector<std::int64_t> codes;
    for (std::int64_t i = 0; i < n; ++i)
        codes.push_back(random.integer(0, random.integer(0, random.integer(0, k - 1))));
    return codes;
}

/// A state as after some training.
template <class T>
host_state<T> trained_state(random_source& random, std::int64_t k, std::int64_t d) {
    std::vector<float> sizes;
    std::vector<std::int32_t> steps;
    for (std::int64_t j = 0; j < k; ++j) {
        sizes.push_back(j % 7 == 0 ? 0.0f : 5 * std::abs(random.normal()));
        steps.push_back(static_cast<std::int32_t>(random.integer(0, 3)));
    }
    const auto rows = random.normals<T>(k, d);
    const auto sums = matrix<float>::generate(k, d, [&](auto j, auto c) { return sizes[j] * rows.at(j, c); });
    return {rows, sums, sizes, steps, random.integer(0, 100)};
}

/// Every rule with every dead-code rule, with constants at which dead codes occur.
inline std::vector<std::pair<std::string, ema_params>> every_rule() {
    std::vector<std::pair<std::string, ema_params>> all;
    for (const auto rule : {ema_rule::active_only, ema_rule::laplace, ema_rule::clamp})
        for (const auto dead : {dead_code_rule::none, dead_code_rule::unused_steps, dead_code_rule::min_cluster_size,
                                dead_code_rule::usage_ratio})
            for (const bool correct : {false, true}) {
                if (correct && rule != ema_rule::laplace) continue;
                ema_params p;
                p.rule = rule;
                p.decay = 0.9;
                p.dead_codes = dead;
                p.bias_correction = correct;
                p.restart_after_steps = 3;
                p.min_cluster_size = 1.25f;
                p.reset_cluster_size = 1.75f;
                p.usage_ratio = 0.3f;
                p.reset_usage_ratio = 0.9f;
                p.check_every = 2;
                p.seed = 0x123456789abcdefull + all.size();
                all.emplace_back("rule " + std::to_string(static_cast<int>(rule)) + ", dead codes " +
                                     std::to_string(static_cast<int>(dead)) + (correct ? ", corrected" : ""),
                                 p);
            }
    return all;
}

/// Every preset, by name.
inline std::vector<std::pair<std::string, ema_params>> presets() {
    return {{"rectokens", ema_params::rectokens()},
            {"sonnet", ema_params::sonnet()},
            {"vector_quantize_pytorch", ema_params::vector_quantize_pytorch()},
            {"encodec", ema_params::encodec()},
            {"mimi", ema_params::mimi()}};
}

/// A state as a preset starts it.
inline host_state<float> initial_state(const matrix<float>& rows, const ema_params& p) {
    const bool one = p.initial == initial_statistics::one_per_code;
    return {rows, one ? rows : matrix<float>(rows.rows, rows.columns),
            std::vector<float>(static_cast<std::size_t>(rows.rows), one ? 1.0f : 0.0f)};
}

}  // namespace cuvq::test
