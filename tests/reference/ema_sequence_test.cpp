// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Every preset, and rules combined as no preset has them, over 50 train steps that tests/scripts/make_ema_sequences.py
// computed in float64 from the published formulas.
#include <cuvq/reference/ema.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <ostream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "support/ema_sequence.hpp"
#include "support/host.hpp"
#include "support/state.hpp"

namespace cuvq::test {
namespace {

struct named_params {
    std::string name;  // of the file: ema_NAME.txt
    ema_params params;
    bool weighted = false;

    friend std::ostream& operator<<(std::ostream& out, const named_params& p) { return out << p.name; }
};

named_params active_only_min_cluster_size() {
    ema_params p;
    p.decay = 0.75;
    p.dead_codes = dead_code_rule::min_cluster_size;
    p.min_cluster_size = 1.0f;
    p.reset_cluster_size = 1.5f;
    return {"active_only_min_cluster_size", p, true};
}
named_params laplace_usage_ratio() {
    ema_params p;
    p.rule = ema_rule::laplace;
    p.decay = 0.5;
    p.epsilon = 0.125f;
    p.dead_codes = dead_code_rule::usage_ratio;
    p.usage_ratio = 0.25f;
    p.reset_usage_ratio = 0.75f;
    p.check_every = 3;
    return {"laplace_usage_ratio", p, true};
}
named_params clamp_unused_steps() {
    ema_params p;
    p.rule = ema_rule::clamp;
    p.decay = 0.75;
    p.epsilon = 0.5f;
    p.dead_codes = dead_code_rule::unused_steps;
    p.restart_after_steps = 4;
    return {"clamp_unused_steps", p, true};
}

class EmaSequence : public testing::TestWithParam<named_params> {
protected:
    const ema_sequence sequence{GetParam().name};

    /// What train_step makes of a state and the inputs of a step.
    step_stats train(host_state<>& state, const sequence_step& step, std::vector<std::int32_t>& codes) const {
        step_stats stats;
        train_params params = GetParam().params;
        params.replacement_indices = view(step.replacement_indices);
        if (GetParam().weighted) params.weights = view(step.weights);
        params.stats = &stats;
        codes.assign(step.codes.size(), -7);
        reference::train_step(state.view(), step.x.view(), view(codes), discard, params);
        return stats;
    }

    /// What a blend of `a` with `s` may be off by; a restarted code has the value `result` instead.
    double blend_error(double a, double s, double result) const {
        const double keep = GetParam().params.decay;
        return 4 * std::ldexp(1, -24) * std::max(std::abs(keep * a) + std::abs((1 - keep) * s), std::abs(result));
    }

    /// After one step from `before`: sums are off by at most 2^-22 sqrt(N) sum |w x|, blends by blend_error more, and
    /// codebook rows by what their sum and size are off, divided by the denominator.
    void expect_one_step(const host_state<>& got, const exact_state& before, const sequence_step& step) const {
        const double take = 1 - GetParam().params.decay, root = std::sqrt(static_cast<double>(step.x.rows));
        for (std::int64_t k = 0; k < got.codebook.rows; ++k) {
            SCOPED_TRACE("code " + std::to_string(k));
            std::vector<double> weights;
            for (std::int64_t i = 0; i < step.x.rows; ++i)
                weights.push_back(step.codes[i] != k ? 0 : GetParam().weighted ? step.weights[i] : 1);
            const double count = std::accumulate(weights.begin(), weights.end(), 0.0);
            const double size = step.after.cluster_size[k];
            const double size_error = blend_error(before.cluster_size[k], count, size);
            EXPECT_NEAR(got.cluster_size[k], size, size_error);
            for (std::int64_t d = 0; d < got.codebook.columns; ++d) {
                double sum = 0, magnitude = 0;
                for (std::int64_t i = 0; i < step.x.rows; ++i) {
                    sum += weights[i] * step.x.at(i, d);
                    magnitude += std::abs(weights[i] * step.x.at(i, d));
                }
                const auto e = static_cast<std::size_t>(k * got.codebook.columns + d);
                const double embed = step.after.embed_sum[e], row = step.after.codebook[e];
                const double embed_error =
                    take * std::ldexp(root, -22) * magnitude + blend_error(before.embed_sum[e], sum, embed);
                EXPECT_NEAR(got.embed_sum.at(k, d), embed, embed_error) << "column " << d;
                // embed / row is the denominator; where both are not known, the row is as it was, or a copy.
                const double row_error = embed == 0 || row == 0
                                             ? std::ldexp(std::abs(row), -24)
                                             : std::abs(row / embed) * embed_error + std::abs(row) * size_error / size;
                EXPECT_NEAR(got.codebook.at(k, d), row, row_error) << "column " << d;
            }
        }
        EXPECT_EQ(got.steps_since_active, step.after.steps_since_active);
    }
};

TEST_P(EmaSequence, EachStepFromTheSameState) {
    exact_state before = sequence.start;
    for (std::size_t t = 0; t < sequence.steps.size(); ++t) {
        const sequence_step& step = sequence.steps[t];
        SCOPED_TRACE("step " + std::to_string(t + 1));
        host_state<> state = before.rounded(sequence.dimensions, static_cast<std::int64_t>(t));
        std::vector<std::int32_t> codes;
        const step_stats stats = train(state, step, codes);
        EXPECT_EQ(codes, step.codes);
        expect_one_step(state, before, step);
        EXPECT_EQ(state.step, static_cast<std::int64_t>(t + 1));
        EXPECT_NEAR(stats.commitment_loss, step.commitment_loss, 1e-6 * step.commitment_loss);
        EXPECT_NEAR(stats.perplexity, step.perplexity, 1e-6 * step.perplexity);
        EXPECT_EQ(stats.active_codes, step.active_codes);
        EXPECT_EQ(stats.restarted_codes, step.restarted_codes);
        EXPECT_EQ(stats.invalid_rows, 0);
        EXPECT_EQ(stats.skipped_codes, 0);
        if (HasFailure()) return;
        before = step.after;
    }
}

TEST_P(EmaSequence, FiftyStepsOnTheirOwn) {
    host_state<> state = sequence.start.rounded(sequence.dimensions, 0);
    const auto expect_near = [](const std::vector<float>& got, const std::vector<double>& expected) {
        ASSERT_EQ(got.size(), expected.size());
        for (std::size_t e = 0; e < got.size(); ++e)
            EXPECT_NEAR(got[e], expected[e], 1e-5 * (1 + std::abs(expected[e]))) << "element " << e;
    };
    for (std::size_t t = 0; t < sequence.steps.size(); ++t) {
        const sequence_step& step = sequence.steps[t];
        SCOPED_TRACE("step " + std::to_string(t + 1));
        std::vector<std::int32_t> codes;
        const step_stats stats = train(state, step, codes);
        EXPECT_EQ(codes, step.codes);
        expect_near(state.codebook.data, step.after.codebook);
        expect_near(state.embed_sum.data, step.after.embed_sum);
        expect_near(state.cluster_size, step.after.cluster_size);
        EXPECT_EQ(state.steps_since_active, step.after.steps_since_active);
        EXPECT_EQ(stats.restarted_codes, step.restarted_codes);
        if (HasFailure()) return;
    }
    EXPECT_EQ(state.step, 50);
}

TEST_P(EmaSequence, HasFiftyStepsAndRestartsWhereTheRuleHasDeadCodes) {
    EXPECT_EQ(sequence.steps.size(), 50u);
    std::int64_t restarts = 0;
    for (const sequence_step& step : sequence.steps) restarts += step.restarted_codes;
    EXPECT_EQ(restarts > 0, GetParam().params.dead_codes != dead_code_rule::none);
}

INSTANTIATE_TEST_SUITE_P(Presets, EmaSequence,
                         testing::Values(named_params{"rectokens", ema_params::rectokens()},
                                         named_params{"sonnet", ema_params::sonnet()},
                                         named_params{"vector_quantize_pytorch", ema_params::vector_quantize_pytorch()},
                                         named_params{"encodec", ema_params::encodec()},
                                         named_params{"mimi", ema_params::mimi()}),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(Combinations, EmaSequence,
                         testing::Values(active_only_min_cluster_size(), laplace_usage_ratio(), clamp_unused_steps()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace cuvq::test
