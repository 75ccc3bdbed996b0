// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/params.hpp>

#include <type_traits>

#include <gtest/gtest.h>

namespace cuvq::test {
namespace {

static_assert(std::is_trivially_copyable_v<step_stats>);
static_assert(std::is_trivially_copyable_v<ema_params>);
static_assert(std::is_convertible_v<ema_params, train_params>);

TEST(ParamsTest, QuantizeIsExactL2WithoutStatisticsByDefault) {
    const quantize_params p;
    EXPECT_EQ(p.metric, metric::l2);
    EXPECT_EQ(p.accuracy, accuracy::exact);
    EXPECT_EQ(p.stats, nullptr);
}

TEST(ParamsTest, AccumulateOverwritesWithWeightsOfOneByDefault) {
    const accumulate_params p;
    EXPECT_EQ(p.weights.data_handle(), nullptr);
    EXPECT_EQ(p.weights.extent(0), 0);
    EXPECT_FALSE(p.add);
    EXPECT_EQ(p.stats, nullptr);
}

TEST(ParamsTest, StatisticsStartAtZero) {
    const step_stats s;
    EXPECT_EQ(s.commitment_loss, 0);
    EXPECT_EQ(s.perplexity, 0);
    EXPECT_EQ(s.active_codes, 0);
    EXPECT_EQ(s.restarted_codes, 0);
    EXPECT_EQ(s.invalid_rows, 0);
    EXPECT_EQ(s.skipped_codes, 0);
}

void expect_no_optional_input(const ema_params& p) {
    EXPECT_EQ(p.weights.data_handle(), nullptr);
    EXPECT_EQ(p.replacement_indices.data_handle(), nullptr);
    EXPECT_EQ(p.stats, nullptr);
    EXPECT_EQ(p.seed, 0u);
}

TEST(ParamsTest, EmaDefaultsAreActiveOnlyWithoutDeadCodes) {
    const ema_params p;
    EXPECT_EQ(p.rule, ema_rule::active_only);
    EXPECT_EQ(p.decay, 0.99);
    EXPECT_EQ(p.epsilon, 1e-5f);
    EXPECT_FALSE(p.bias_correction);
    EXPECT_EQ(p.dead_codes, dead_code_rule::none);
    EXPECT_EQ(p.initial, initial_statistics::zeros);
    expect_no_optional_input(p);
}

TEST(ParamsTest, RectokensPreset) {
    const ema_params p = ema_params::rectokens();
    EXPECT_EQ(p.rule, ema_rule::active_only);
    EXPECT_EQ(p.decay, 0.99);
    EXPECT_EQ(p.epsilon, 1e-5f);
    EXPECT_FALSE(p.bias_correction);
    EXPECT_EQ(p.dead_codes, dead_code_rule::unused_steps);
    EXPECT_EQ(p.restart_after_steps, 20);
    EXPECT_EQ(p.initial, initial_statistics::zeros);
    expect_no_optional_input(p);
}

TEST(ParamsTest, SonnetPreset) {
    const ema_params p = ema_params::sonnet();
    EXPECT_EQ(p.rule, ema_rule::laplace);
    EXPECT_EQ(p.decay, 0.99);
    EXPECT_EQ(p.epsilon, 1e-5f);
    EXPECT_TRUE(p.bias_correction);
    EXPECT_EQ(p.dead_codes, dead_code_rule::none);
    EXPECT_EQ(p.initial, initial_statistics::zeros);
    expect_no_optional_input(p);
}

TEST(ParamsTest, VectorQuantizePytorchPreset) {
    const ema_params p = ema_params::vector_quantize_pytorch();
    EXPECT_EQ(p.rule, ema_rule::laplace);
    EXPECT_EQ(p.decay, 0.8);
    EXPECT_EQ(p.epsilon, 1e-5f);
    EXPECT_FALSE(p.bias_correction);
    EXPECT_EQ(p.dead_codes, dead_code_rule::min_cluster_size);
    EXPECT_EQ(p.min_cluster_size, 2.0f);
    EXPECT_EQ(p.reset_cluster_size, 2.0f);
    EXPECT_EQ(p.initial, initial_statistics::one_per_code);
    expect_no_optional_input(p);
}

TEST(ParamsTest, EncodecPreset) {
    const ema_params p = ema_params::encodec();
    EXPECT_EQ(p.rule, ema_rule::laplace);
    EXPECT_EQ(p.decay, 0.99);
    EXPECT_EQ(p.epsilon, 1e-5f);
    EXPECT_FALSE(p.bias_correction);
    EXPECT_EQ(p.dead_codes, dead_code_rule::min_cluster_size);
    EXPECT_EQ(p.min_cluster_size, 2.0f);
    EXPECT_EQ(p.reset_cluster_size, 2.0f);
    EXPECT_EQ(p.initial, initial_statistics::one_per_code);
    expect_no_optional_input(p);
}

TEST(ParamsTest, MimiPreset) {
    const ema_params p = ema_params::mimi();
    EXPECT_EQ(p.rule, ema_rule::clamp);
    EXPECT_EQ(p.decay, 0.99);
    EXPECT_EQ(p.epsilon, 1e-5f);
    EXPECT_FALSE(p.bias_correction);
    EXPECT_EQ(p.dead_codes, dead_code_rule::usage_ratio);
    EXPECT_EQ(p.usage_ratio, 0.1f);
    EXPECT_EQ(p.reset_usage_ratio, 1.0f);
    EXPECT_EQ(p.check_every, 5);
    EXPECT_EQ(p.initial, initial_statistics::one_per_code);
    expect_no_optional_input(p);
}

TEST(ParamsTest, TrainParamsTakeOverAnEmaPreset) {
    const train_params p = ema_params::vector_quantize_pytorch();
    EXPECT_EQ(p.rule, ema_rule::laplace);
    EXPECT_EQ(p.decay, 0.8);
    EXPECT_EQ(p.dead_codes, dead_code_rule::min_cluster_size);
    EXPECT_EQ(p.metric, metric::l2);
    EXPECT_EQ(p.accuracy, accuracy::exact);
    EXPECT_EQ(train_params{}.rule, ema_rule::active_only);
}

}  // namespace
}  // namespace cuvq::test
