// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// `accumulate`, `ema_apply`, `ema_update` and `train_step` against hand-computed steps, closed forms and properties.
// Whole sequences are in ema_sequence_test.cpp.
#include <cuvq/reference/ema.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "support/drawn_row.hpp"
#include "support/host.hpp"
#include "support/random.hpp"
#include "support/rectokens_cases.hpp"
#include "support/state.hpp"
#include "support/types.hpp"

namespace cuvq::test {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float largest = std::numeric_limits<float>::max();
constexpr ema_rule rules[] = {ema_rule::active_only, ema_rule::laplace, ema_rule::clamp};

using codes_t = std::vector<std::int32_t>;
using floats = std::vector<float>;

std::string text_of(ema_rule rule) {
    return rule == ema_rule::active_only ? "active_only" : rule == ema_rule::laplace ? "laplace" : "clamp";
}

/// counts and sums of a batch.
struct statistics {
    floats counts;
    matrix<float> sums;
    step_stats stats;

    statistics(std::int64_t k, std::int64_t d, float value = 0)
        : counts(static_cast<std::size_t>(k), value), sums(k, d, value) {}
};

template <class X, class Code>
void accumulate(const matrix<X>& x, const std::vector<Code>& codes, statistics& to, accumulate_params params = {}) {
    params.stats = &to.stats;
    reference::accumulate(x.view(), view(codes), view(to.counts), to.sums.view(), params);
}

template <class T>
step_stats apply(host_state<T>& state, const floats& counts, const matrix<float>& sums, ema_params params = {}) {
    step_stats stats;
    params.stats = &stats;
    reference::ema_apply(state.view(), view(counts), sums.view(), discard, params);
    return stats;
}

template <class T, class R>
step_stats apply(host_state<T>& state, const floats& counts, const matrix<float>& sums, const matrix<R>& replacements,
                 ema_params params) {
    step_stats stats;
    params.stats = &stats;
    reference::ema_apply(state.view(), view(counts), sums.view(), replacements.view(), params);
    return stats;
}

template <class T, class X, class Code>
step_stats update(host_state<T>& state, const matrix<X>& x, const std::vector<Code>& codes, ema_params params = {}) {
    step_stats stats;
    params.stats = &stats;
    reference::ema_update(state.view(), x.view(), view(codes), params);
    return stats;
}

ema_params with(ema_rule rule, double decay, float epsilon = 1e-5f) {
    ema_params p;
    p.rule = rule;
    p.decay = decay;
    p.epsilon = epsilon;
    return p;
}

// ---- accumulate
// ------------------------------------------------------------------------------------------------------

template <class X>
class AccumulateElements : public testing::Test {};
TYPED_TEST_SUITE(AccumulateElements, element_types, type_names);

TYPED_TEST(AccumulateElements, HandComputedCase) {
    const matrix<TypeParam> x{{1, 2}, {3, 4}, {5, 6}, {-7, 0.5f}};
    statistics got(3, 2, nan);
    accumulate(x, codes_t{2, 0, 2, 0}, got);
    EXPECT_EQ(got.counts, (floats{2, 0, 2}));
    EXPECT_TRUE(same_bits(got.sums, matrix<float>{{-4, 4.5f}, {0, 0}, {6, 8}}));
    EXPECT_EQ(got.stats.invalid_rows, 0);
    EXPECT_EQ(got.stats.active_codes, 2);
    EXPECT_NEAR(got.stats.perplexity, 2, 1e-12);
}

TYPED_TEST(AccumulateElements, WeightsMultiplyRowsAndCounts) {
    const matrix<TypeParam> x{{1, 2}, {3, 4}, {5, 6}, {-7, 0.5f}};
    const floats weights{0.5f, 2, 0.25f, 0};
    accumulate_params params;
    params.weights = view(weights);
    statistics got(3, 2);
    accumulate(x, codes_t{2, 0, 2, 1}, got, params);
    EXPECT_EQ(got.counts, (floats{2, 0, 0.75f}));
    EXPECT_TRUE(same_bits(got.sums, matrix<float>{{6, 8}, {0, 0}, {1.75f, 2.5f}}));
    EXPECT_EQ(got.stats.invalid_rows, 0);
    EXPECT_EQ(got.stats.active_codes, 2);
}

TYPED_TEST(AccumulateElements, RowsWithNanOrInfinityAreLeftOutWhateverTheirCode) {
    const matrix<TypeParam> x{{1, 2}, {nan, 4}, {5, infinity}, {-infinity, 1}, {3, 3}};
    statistics got(2, 2);
    accumulate(x, codes_t{0, 0, 0, 1, 0}, got);
    EXPECT_EQ(got.counts, (floats{2, 0}));
    EXPECT_TRUE(same_bits(got.sums, matrix<float>{{4, 5}, {0, 0}}));
    EXPECT_EQ(got.stats.invalid_rows, 3);
    EXPECT_EQ(got.stats.active_codes, 1);
}

TYPED_TEST(AccumulateElements, StridedRowsGiveWhatContiguousRowsGive) {
    random_source random;
    const auto x = random.normals<TypeParam>(50, 5);
    codes_t codes(50);
    for (auto& c : codes) c = static_cast<std::int32_t>(random.integer(0, 6));
    statistics expected(7, 5);
    accumulate(x, codes, expected);
    padded_matrix<TypeParam> wide(x, 8);
    padded_matrix<float> sums(matrix<float>(7, 5), 6);
    floats counts(7);
    reference::accumulate(wide.view(), view(codes), view(counts), sums.view());
    EXPECT_EQ(counts, expected.counts);
    EXPECT_TRUE(same_bits(sums.contiguous(), expected.sums));
    EXPECT_TRUE(sums.padding_untouched());
}

template <class Code>
class AccumulateCodes : public testing::Test {};
TYPED_TEST_SUITE(AccumulateCodes, code_types, type_names);

TYPED_TEST(AccumulateCodes, OutsideTheCodebookAreSkippedAndCounted) {
    using limits = std::numeric_limits<TypeParam>;
    const matrix<float> x{{1}, {2}, {4}, {8}, {16}, {32}};
    statistics got(3, 1);
    accumulate(x,
               std::vector<TypeParam>{0, 3, 2, static_cast<TypeParam>(~std::uint64_t{0}), limits::max(), limits::min()},
               got);
    // The lowest code is 0 in unsigned types and negative in the others.
    const bool is_code = limits::min() == 0;
    EXPECT_EQ(got.counts, (floats{is_code ? 2.0f : 1.0f, 0, 1}));
    EXPECT_TRUE(same_bits(got.sums, matrix<float>{{is_code ? 33.0f : 1.0f}, {0}, {4}}));
    EXPECT_EQ(got.stats.invalid_rows, is_code ? 3 : 4);
}

TEST(AccumulateTest, AllOf256CodesInBytesAreCounted) {
    std::vector<std::uint8_t> codes(256);
    std::iota(codes.begin(), codes.end(), std::uint8_t{0});
    const auto x = matrix<float>::generate(256, 1, [](auto i, auto) { return i; });
    statistics got(256, 1);
    accumulate(x, codes, got);
    EXPECT_EQ(got.counts, floats(256, 1));
    EXPECT_TRUE(same_bits(got.sums, x));
    EXPECT_EQ(got.stats.invalid_rows, 0);
    EXPECT_NEAR(got.stats.perplexity, 256, 1e-9);
}

TEST(AccumulateTest, BadWeightsMakeTheirRowsInvalid) {
    const matrix<float> x{{1}, {2}, {4}, {8}, {16}, {32}, {64}};
    const floats weights{1, -1, nan, infinity, -infinity, 0, -0.0f};
    accumulate_params params;
    params.weights = view(weights);
    statistics got(1, 1);
    accumulate(x, codes_t(7, 0), got, params);
    EXPECT_EQ(got.counts, floats{1});
    EXPECT_EQ(got.sums.data, floats{1});
    EXPECT_EQ(got.stats.invalid_rows, 4);
}

TEST(AccumulateTest, ACodeWhoseRowsWeighNothingIsNotActive) {
    const floats weights{0, 0};
    accumulate_params params;
    params.weights = view(weights);
    statistics got(2, 1);
    accumulate(matrix<float>{{1}, {2}}, codes_t{0, 1}, got, params);
    EXPECT_EQ(got.counts, (floats{0, 0}));
    EXPECT_EQ(got.stats.active_codes, 0);
    EXPECT_EQ(got.stats.perplexity, 0);
    EXPECT_EQ(got.stats.invalid_rows, 0);
}

TEST(AccumulateTest, ARowThatIsBadTwiceIsCountedOnce) {
    const floats weights{-1, 1};
    accumulate_params params;
    params.weights = view(weights);
    statistics got(1, 1);
    accumulate(matrix<float>{{nan}, {1}}, codes_t{9, 0}, got, params);
    EXPECT_EQ(got.stats.invalid_rows, 1);
}

TEST(AccumulateTest, MicroBatchesAddUpToOneBatch) {
    random_source random;
    const auto x = random.integers<float>(90, 5, -50, 50);
    codes_t codes(90);
    for (auto& c : codes) c = static_cast<std::int32_t>(random.integer(0, 7));
    statistics whole(8, 5), parts(8, 5, nan);
    accumulate(x, codes, whole);
    accumulate_params params;
    for (const auto& [from, to] : {std::pair{0, 41}, {41, 42}, {42, 42}, {42, 90}}) {
        const auto part =
            matrix<float>::generate(to - from, 5, [&, first = from](auto i, auto d) { return x.at(first + i, d); });
        accumulate(part, codes_t(codes.begin() + from, codes.begin() + to), parts, params);
        params.add = true;
    }
    EXPECT_EQ(parts.counts, whole.counts);
    EXPECT_TRUE(same_bits(parts.sums, whole.sums));
    EXPECT_EQ(parts.stats.active_codes, whole.stats.active_codes);
    EXPECT_EQ(parts.stats.perplexity, whole.stats.perplexity);
}

TEST(AccumulateTest, AddKeepsWhatIsThereAndReportsInvalidRowsOfThisCallOnly) {
    statistics got(3, 1, 2);
    accumulate_params params;
    params.add = true;
    accumulate(matrix<float>{{5}, {nan}}, codes_t{1, 1}, got, params);
    EXPECT_EQ(got.counts, (floats{2, 3, 2}));
    EXPECT_EQ(got.sums.data, (floats{2, 7, 2}));
    EXPECT_EQ(got.stats.active_codes, 3);
    EXPECT_EQ(got.stats.invalid_rows, 1);
    accumulate(matrix<float>{{5}}, codes_t{0}, got, params);
    EXPECT_EQ(got.stats.invalid_rows, 0);
}

TEST(AccumulateTest, NoRowsZeroTheStatisticsOrAddNothing) {
    statistics got(2, 2, nan);
    accumulate(matrix<float>(0, 2), codes_t{}, got);
    EXPECT_EQ(got.counts, (floats{0, 0}));
    EXPECT_TRUE(same_bits(got.sums, matrix<float>(2, 2)));
    got = statistics(2, 2, 3);
    accumulate_params params;
    params.add = true;
    accumulate(matrix<float>(0, 2), codes_t{}, got, params);
    EXPECT_EQ(got.counts, (floats{3, 3}));
    EXPECT_TRUE(same_bits(got.sums, matrix<float>(2, 2, 3)));
}

TEST(AccumulateTest, CountsAreRoundedToFloatOnce) {
    // 2^24 + 3 rows: a float that counts up by ones stops at 2^24; the nearest float is 2^24 + 4.
    const std::int64_t n = (std::int64_t{1} << 24) + 3;
    const std::vector<std::uint8_t> codes(static_cast<std::size_t>(n));
    const float one = 1;
    statistics got(1, 1);
    reference::accumulate(strided(&one, n, 1, 0), view(codes), view(got.counts), got.sums.view());
    EXPECT_EQ(got.counts[0], 16777220);
    EXPECT_EQ(got.sums.data[0], 16777220);
}

TEST(AccumulateTest, SumsThatPassTheRangeOfFloatAreInfinite) {
    statistics got(2, 1);
    accumulate(matrix<float>{{largest}, {largest}, {1}}, codes_t{0, 0, 1}, got);
    EXPECT_EQ(got.counts, (floats{2, 1}));
    EXPECT_EQ(got.sums.data, (floats{infinity, 1}));
}

TEST(AccumulateTest, SlidingWindowRowsMayOverlap) {
    const floats signal{1, 2, 4, 8, 16};
    statistics got(2, 3);
    reference::accumulate(strided(signal.data(), 3, 3, 1), view(codes_t{0, 1, 0}), view(got.counts), got.sums.view());
    EXPECT_TRUE(same_bits(got.sums, matrix<float>{{1 + 4, 2 + 8, 4 + 16}, {2, 4, 8}}));
}

TEST(AccumulateTest, RandomSumsAreWithinTheDocumentedBound) {
    random_source random;
    const std::int64_t n = 3000, k = 5, d = 7;
    const auto x = random.normals<float>(n, d);
    codes_t codes(n);
    floats weights(n);
    for (std::int64_t i = 0; i < n; ++i) {
        codes[i] = static_cast<std::int32_t>(random.integer(0, k - 1));
        weights[i] = std::abs(random.normal());
    }
    accumulate_params params;
    params.weights = view(weights);
    statistics got(k, d);
    accumulate(x, codes, got, params);
    for (std::int64_t j = 0; j < k; ++j)
        for (std::int64_t c = 0; c < d; ++c) {
            long double sum = 0, magnitude = 0;
            for (std::int64_t i = n - 1; i >= 0; --i)
                if (codes[i] == j) {
                    sum += static_cast<long double>(weights[i]) * x.at(i, c);
                    magnitude += std::abs(static_cast<long double>(weights[i]) * x.at(i, c));
                }
            EXPECT_NEAR(got.sums.at(j, c), sum, std::ldexp(std::sqrt(n), -22) * magnitude);
        }
}

// ---- one step of each rule, by hand
// ----------------------------------------------------------------------------------

/// Two codes that are hit and one that is not.
host_state<> three_codes() {
    return {matrix<float>{{9, 9}, {1, 3}, {7, 7}}, matrix<float>{{8, 4}, {2, 6}, {16, -8}}, {4, 2, 8}, {5, 6, 7}, 41};
}
const floats three_counts{8, 0, 4};
const matrix<float> three_sums{{16, 24}, {0, 0}, {-8, 4}};

TEST(EmaApplyTest, ActiveOnlyMovesOnlyCodesWithRows) {
    host_state<> state = three_codes();
    const step_stats stats = apply(state, three_counts, three_sums, with(ema_rule::active_only, 0.75));
    EXPECT_EQ(state.cluster_size, (floats{5, 2, 7}));
    EXPECT_TRUE(same_bits(state.embed_sum, matrix<float>{{10, 9}, {2, 6}, {10, -5}}));
    EXPECT_EQ(state.codebook.row(0), (floats{2, 9.0f / 5}));
    EXPECT_EQ(state.codebook.row(1), (floats{1, 3}));
    EXPECT_EQ(state.codebook.row(2), (floats{10.0f / 7, -5.0f / 7}));
    EXPECT_EQ(state.steps_since_active, (codes_t{0, 7, 0}));
    EXPECT_EQ(state.step, 42);
    EXPECT_EQ(stats.active_codes, 2);
    EXPECT_NEAR(stats.perplexity, 3 / std::pow(2, 2.0 / 3), 1e-12);  // shares 2/3 and 1/3
    EXPECT_EQ(stats.restarted_codes, 0);
    EXPECT_EQ(stats.skipped_codes, 0);
    EXPECT_EQ(stats.invalid_rows, 0);
    EXPECT_EQ(stats.commitment_loss, 0);
}

TEST(EmaApplyTest, ClampDecaysEveryCode) {
    host_state<> state = three_codes();
    apply(state, three_counts, three_sums, with(ema_rule::clamp, 0.75));
    EXPECT_EQ(state.cluster_size, (floats{5, 1.5f, 7}));
    EXPECT_TRUE(same_bits(state.embed_sum, matrix<float>{{10, 9}, {1.5f, 4.5f}, {10, -5}}));
    EXPECT_EQ(state.codebook.row(0), (floats{2, 9.0f / 5}));
    EXPECT_EQ(state.codebook.row(1), (floats{1, 3}));
    EXPECT_EQ(state.codebook.row(2), (floats{10.0f / 7, -5.0f / 7}));
    EXPECT_EQ(state.steps_since_active, (codes_t{0, 7, 0}));
    EXPECT_EQ(state.step, 42);
}

TEST(EmaApplyTest, LaplaceDecaysEveryCodeAndSmoothsTheSizes) {
    host_state<> state = three_codes();
    apply(state, three_counts, three_sums, with(ema_rule::laplace, 0.75, 0.5f));
    EXPECT_EQ(state.cluster_size, (floats{5, 1.5f, 7}));
    EXPECT_TRUE(same_bits(state.embed_sum, matrix<float>{{10, 9}, {1.5f, 4.5f}, {10, -5}}));
    // total 13.5, K e = 1.5: sizes are multiplied by (1 + e / size) 13.5 / 15.
    EXPECT_FLOAT_EQ(state.codebook.at(0, 0), 10 / (5.5 * 0.9));
    EXPECT_FLOAT_EQ(state.codebook.at(0, 1), 9 / (5.5 * 0.9));
    EXPECT_FLOAT_EQ(state.codebook.at(1, 0), 1.5 / (2 * 0.9));
    EXPECT_FLOAT_EQ(state.codebook.at(1, 1), 4.5 / (2 * 0.9));
    EXPECT_FLOAT_EQ(state.codebook.at(2, 0), 10 / (7.5 * 0.9));
    EXPECT_FLOAT_EQ(state.codebook.at(2, 1), -5 / (7.5 * 0.9));
    EXPECT_EQ(state.steps_since_active, (codes_t{0, 7, 0}));
}

TEST(EmaApplyTest, BiasCorrectionDividesByOneMinusDecayToTheUpdatesButTheStateIsKeptUndivided) {
    host_state<> state = three_codes();
    state.step = 1;  // t = 2, so 1 - g^t = 7/16
    ema_params params = with(ema_rule::laplace, 0.75, 0.5f);
    params.bias_correction = true;
    apply(state, three_counts, three_sums, params);
    EXPECT_EQ(state.cluster_size, (floats{5, 1.5f, 7}));
    EXPECT_TRUE(same_bits(state.embed_sum, matrix<float>{{10, 9}, {1.5f, 4.5f}, {10, -5}}));
    const double c = 16.0 / 7, total = 13.5 * c, factor = total / (total + 1.5);
    EXPECT_FLOAT_EQ(state.codebook.at(0, 0), 10 * c / ((5 * c + 0.5) * factor));
    EXPECT_FLOAT_EQ(state.codebook.at(1, 1), 4.5 * c / ((1.5 * c + 0.5) * factor));
    EXPECT_FLOAT_EQ(state.codebook.at(2, 1), -5 * c / ((7 * c + 0.5) * factor));
}

TEST(EmaApplyTest, BiasCorrectionMakesTheFirstStepFromZeroTheBatchItself) {
    for (const double decay : {0.0, 0.5, 0.99}) {
        host_state<> state(matrix<float>{{1}, {2}});
        ema_params params = with(ema_rule::laplace, decay, 1e-9f);
        params.bias_correction = true;
        apply(state, {4, 1}, {{10}, {3}}, params);
        EXPECT_FLOAT_EQ(state.codebook.at(0, 0), 2.5f);
        EXPECT_FLOAT_EQ(state.codebook.at(1, 0), 3);
    }
}

TEST(EmaApplyTest, EpsilonIsTheLeastSizeThatIsDividedBy) {
    for (const ema_rule rule : {ema_rule::active_only, ema_rule::clamp}) {
        host_state<> state(matrix<float>{{9}, {9}});
        apply(state, {0.25f, 4}, {{1}, {8}}, with(rule, 0, 0.5f));
        EXPECT_EQ(state.codebook.data, (floats{2, 2})) << text_of(rule);
        EXPECT_EQ(state.cluster_size, (floats{0.25f, 4})) << text_of(rule);
    }
}

TEST(EmaApplyTest, DecayZeroReplacesTheStatistics) {
    for (const ema_rule rule : rules) {
        host_state<> state = three_codes();
        apply(state, three_counts, three_sums, with(rule, 0, 1e-9f));
        const float unused = rule == ema_rule::active_only ? 2 : 0;
        EXPECT_EQ(state.cluster_size, (floats{8, unused, 4})) << text_of(rule);
        EXPECT_EQ(state.embed_sum.row(0), (floats{16, 24}));
        EXPECT_EQ(state.embed_sum.row(1), (floats{unused, 3 * unused}));
        EXPECT_EQ(state.embed_sum.row(2), (floats{-8, 4}));
        EXPECT_FLOAT_EQ(state.codebook.at(0, 0), 2);
        EXPECT_FLOAT_EQ(state.codebook.at(0, 1), 3);
        EXPECT_EQ(state.codebook.row(1), (floats{1, 3})) << "nothing known of it: it keeps its row";
        EXPECT_FLOAT_EQ(state.codebook.at(2, 0), -2);
        EXPECT_EQ(state.steps_since_active, (codes_t{0, 7, 0}));
    }
}

TEST(EmaApplyTest, DecayOneLeavesTheStatisticsAndRefreshesTheCodebookFromThem) {
    for (const ema_rule rule : rules) {
        host_state<> state = three_codes();
        const host_state<> before = state;
        apply(state, three_counts, three_sums, with(rule, 1, 1e-9f));
        EXPECT_EQ(state.cluster_size, before.cluster_size) << text_of(rule);
        EXPECT_TRUE(same_bits(state.embed_sum, before.embed_sum));
        EXPECT_FLOAT_EQ(state.codebook.at(0, 0), 2);
        EXPECT_FLOAT_EQ(state.codebook.at(0, 1), 1);
        EXPECT_FLOAT_EQ(state.codebook.at(1, 0), 1);
        EXPECT_FLOAT_EQ(state.codebook.at(1, 1), 3);
        EXPECT_FLOAT_EQ(state.codebook.at(2, 0), 2);
        EXPECT_FLOAT_EQ(state.codebook.at(2, 1), -1);
    }
}

TEST(EmaApplyTest, AZeroStateKeepsItsRows) {
    for (const ema_rule rule : rules)
        for (const double decay : {0.0, 0.9, 1.0}) {
            host_state<> state(matrix<float>{{1, 2}, {3, 4}});
            const host_state<> before = state;
            const step_stats stats = apply(state, {0, 0}, matrix<float>(2, 2), with(rule, decay));
            EXPECT_TRUE(same_bits(state.codebook, before.codebook)) << text_of(rule);
            EXPECT_TRUE(same_bits(state.embed_sum, before.embed_sum)) << text_of(rule);
            EXPECT_EQ(state.cluster_size, (floats{0, 0}));
            EXPECT_EQ(state.steps_since_active, (codes_t{1, 1}));
            EXPECT_EQ(stats.skipped_codes, 0);
        }
}

TEST(EmaApplyTest, AZeroStateKeepsItsRowsWithBiasCorrection) {
    host_state<> state(matrix<float>{{1, 2}, {3, 4}});
    const step_stats stats = apply(state, {0, 0}, matrix<float>(2, 2), ema_params::sonnet());
    EXPECT_TRUE(same_bits(state.codebook, matrix<float>{{1, 2}, {3, 4}}));
    EXPECT_EQ(stats.skipped_codes, 0);
}

TEST(EmaApplyTest, ACodeWithoutStatisticsKeepsItsRowBesideOthers) {
    for (const ema_rule rule : rules) {
        host_state<> state(matrix<float>{{1, 2}, {3, 4}});
        apply(state, {2, 0}, {{10, 20}, {0, 0}}, with(rule, 0.5, 1e-9f));
        EXPECT_FLOAT_EQ(state.codebook.at(0, 0), 5) << text_of(rule);
        EXPECT_EQ(state.codebook.row(1), (floats{3, 4})) << text_of(rule);
    }
}

TEST(EmaApplyTest, ASumOfZeroOverARealSizeIsARowOfZeros) {
    for (const ema_rule rule : rules) {
        host_state<> state(matrix<float>{{1, 2}});
        apply(state, {2}, {{0, 0}}, with(rule, 0.5));
        EXPECT_EQ(state.codebook.row(0), (floats{0, 0})) << text_of(rule);
    }
}

TEST(EmaApplyTest, ASumWithoutASizeIsDividedByEpsilon) {
    host_state<> state({{9, 9}}, {{3, -2}}, {0});
    apply(state, {0}, {{0, 0}}, with(ema_rule::clamp, 0.5, 0.25f));
    EXPECT_EQ(state.codebook.row(0), (floats{6, -4}));
}

TEST(EmaApplyTest, StepsSinceActiveStopAtTheLargestInt32) {
    host_state<> state(matrix<float>{{1}});
    state.steps_since_active[0] = std::numeric_limits<std::int32_t>::max();
    apply(state, {0}, {{0}});
    EXPECT_EQ(state.steps_since_active[0], std::numeric_limits<std::int32_t>::max());
    apply(state, {1}, {{1}});
    EXPECT_EQ(state.steps_since_active[0], 0);
}

TEST(EmaApplyTest, EveryCallAdvancesTheStepByOne) {
    host_state<> state = three_codes();
    state.step = (std::int64_t{1} << 40) - 1;
    apply(state, three_counts, three_sums);
    EXPECT_EQ(state.step, std::int64_t{1} << 40);
    apply(state, {0, 0, 0}, matrix<float>(3, 2));
    EXPECT_EQ(state.step, (std::int64_t{1} << 40) + 1);
    apply(state, {nan, nan, nan}, matrix<float>(3, 2));
    EXPECT_EQ(state.step, (std::int64_t{1} << 40) + 2);
}

TEST(EmaApplyTest, StridedStatesAndStatisticsAreTaken) {
    host_state<> expected = three_codes(), state = expected;
    apply(expected, three_counts, three_sums);
    padded_matrix<float> sums(three_sums, 5);
    reference::ema_apply(state.view(), view(three_counts), sums.view(), discard);
    EXPECT_TRUE(same_bits(state, expected));
}

TEST(EmaApplyTest, AStateOfStaticColumnsGivesWhatADynamicOneGives) {
    host_state<> expected = three_codes(), state = expected;
    apply(expected, three_counts, three_sums);
    const codebook_state<float, 2> fixed{matrix_view<float, 2>(state.codebook.data.data(), 3),
                                         matrix_view<float, 2>(state.embed_sum.data.data(), 3),
                                         view(state.cluster_size), view(state.steps_since_active), &state.step};
    reference::ema_apply(fixed, view(three_counts), three_sums.view(), discard);
    EXPECT_TRUE(same_bits(state, expected));
    EXPECT_EQ(state.step, expected.step);
}

template <class T>
class EmaApplyElements : public testing::Test {};
TYPED_TEST_SUITE(EmaApplyElements, element_types, type_names);

TYPED_TEST(EmaApplyElements, TheCodebookIsRoundedFromTheStatisticsAndTheyAreNot) {
    host_state<TypeParam> state(matrix<TypeParam>{{9}, {9}});
    apply(state, {3, 1}, {{1}, {1.0009f}}, with(ema_rule::active_only, 0));
    EXPECT_EQ(state.embed_sum.data, (floats{1, 1.0009f}));
    EXPECT_EQ(state.codebook.at(0, 0), static_cast<float>(static_cast<TypeParam>(1.0f / 3)));
    EXPECT_EQ(state.codebook.at(1, 0), static_cast<float>(static_cast<TypeParam>(1.0009f)));
}

TYPED_TEST(EmaApplyElements, ARestartedRowIsTheReplacementInTheTypeOfTheCodebook) {
    host_state<TypeParam> state(matrix<TypeParam>{{9, 9}});
    ema_params params = ema_params::vector_quantize_pytorch();
    const step_stats stats = apply(state, {0}, matrix<float>(1, 2), matrix<float>{{0.1f, -3}}, params);
    EXPECT_EQ(stats.restarted_codes, 1);
    EXPECT_EQ(state.codebook.at(0, 0), static_cast<float>(static_cast<TypeParam>(0.1f)));
    EXPECT_EQ(state.codebook.at(0, 1), -3);
    EXPECT_EQ(state.cluster_size[0], 2);
    EXPECT_EQ(state.embed_sum.row(0), (floats{2 * 0.1f, -6}));
}

// ---- codes that cannot be updated
// --------------------------------------------------------------------------------------

/// Code 1 of three gets this; codes 0 and 2 get what is sound.
struct bad_statistics {
    const char* what;
    float count, sum0, sum1;
};
const bad_statistics bad[] = {{"count NaN", nan, 1, 1},
                              {"count infinite", infinity, 1, 1},
                              {"count -infinite", -infinity, 1, 1},
                              {"count negative", -1, 1, 1},
                              {"sum NaN", 2, 1, nan},
                              {"sum infinite", 2, infinity, 1},
                              {"sum -infinite", 2, 1, -infinity},
                              {"sum NaN without rows", 0, nan, 0}};

TEST(EmaSkipTest, CodesWithBadStatisticsAreLeftUnchangedAndCounted) {
    for (const ema_rule rule : rules)
        for (const bad_statistics& b : bad) {
            SCOPED_TRACE(text_of(rule) + ", " + b.what);
            host_state<> state = three_codes(), sound = three_codes();
            const host_state<> before = state;
            const ema_params params = with(rule, 0.75);
            const step_stats stats = apply(state, {8, b.count, 4}, {{16, 24}, {b.sum0, b.sum1}, {-8, 4}}, params);
            EXPECT_TRUE(same_bits(state.code(1), before.code(1)));
            EXPECT_EQ(stats.skipped_codes, 1);
            EXPECT_EQ(state.step, 42);
            // The sizes and sums of the others do not know of it.
            apply(sound, three_counts, three_sums, params);
            for (const std::int64_t k : {0, 2}) {
                EXPECT_EQ(state.cluster_size[k], sound.cluster_size[k]);
                EXPECT_EQ(state.embed_sum.row(k), sound.embed_sum.row(k));
                EXPECT_EQ(state.steps_since_active[k], 0);
            }
            if (rule != ema_rule::laplace) {
                EXPECT_EQ(state.codebook.row(0), sound.codebook.row(0));
                EXPECT_EQ(state.codebook.row(2), sound.codebook.row(2));
            }
        }
}

TEST(EmaSkipTest, TheSizeOfASkippedCodeStaysInTheLaplaceTotal) {
    host_state<> state = three_codes();
    apply(state, {8, nan, 4}, three_sums, with(ema_rule::laplace, 0.75, 0.5f));
    // 5 + 2 + 7 = 14
    EXPECT_FLOAT_EQ(state.codebook.at(0, 0), 10 / (5.5 / 15.5 * 14));
}

TEST(EmaSkipTest, ANewRowPastTheRangeOfTheCodebookIsNotWritten) {
    host_state<> state = three_codes();
    const host_state<> before = state;
    const step_stats stats = apply(state, {8, 0.25f, 4}, {{16, 24}, {largest, 1}, {-8, 4}}, with(ema_rule::clamp, 0));
    EXPECT_TRUE(same_bits(state.code(1), before.code(1)));
    EXPECT_EQ(stats.skipped_codes, 1);
    EXPECT_EQ(state.codebook.row(0), (floats{2, 3}));
}

#if CUVQ_HAS_HALF
TEST(EmaSkipTest, ANewRowPastTheRangeOfHalfIsNotWritten) {
    host_state<__half> state(matrix<__half>{{1}, {2}});
    const host_state<__half> before = state;
    const step_stats stats = apply(state, {1, 1}, {{70000}, {60000}}, with(ema_rule::active_only, 0));
    EXPECT_TRUE(same_bits(state.code(0), before.code(0)));
    EXPECT_EQ(state.codebook.at(1, 0), 60000);
    EXPECT_EQ(stats.skipped_codes, 1);
}
#endif

TEST(EmaSkipTest, AStateThatIsNotFiniteIsLeftAlone) {
    for (const ema_rule rule : rules) {
        SCOPED_TRACE(text_of(rule));
        host_state<> state = three_codes();
        state.cluster_size[0] = nan;
        state.embed_sum(2, 1) = infinity;
        const host_state<> before = state;
        const step_stats stats = apply(state, three_counts, three_sums, with(rule, 0.75));
        EXPECT_TRUE(same_bits(state.code(0), before.code(0)));
        EXPECT_TRUE(same_bits(state.code(2), before.code(2)));
        EXPECT_EQ(stats.skipped_codes, 2);
        EXPECT_TRUE(std::isfinite(state.codebook.at(1, 0)));
    }
}

TEST(EmaSkipTest, SkippedCodesAreNotRestarted) {
    for (const auto rule : {dead_code_rule::unused_steps, dead_code_rule::min_cluster_size}) {
        host_state<> state = three_codes();
        const host_state<> before = state;
        ema_params params;
        params.dead_codes = rule;
        params.restart_after_steps = 1;
        params.min_cluster_size = 100;
        const floats counts{nan, nan, nan};
        const step_stats stats = apply(state, counts, three_sums, matrix<float>{{5, 5}}, params);
        EXPECT_TRUE(same_bits(state, before));
        EXPECT_EQ(stats.skipped_codes, 3);
        EXPECT_EQ(stats.restarted_codes, 0);
    }
}

TEST(EmaSkipTest, SumsThatOverflowedInABatchAreSkipped) {
    host_state<> state = three_codes();
    const host_state<> before = state;
    const step_stats stats =
        update(state, matrix<float>{{largest, 0}, {largest, 0}, {1, 2}}, codes_t{1, 1, 0}, with(ema_rule::clamp, 0));
    EXPECT_TRUE(same_bits(state.code(1), before.code(1)));
    EXPECT_EQ(state.codebook.row(0), (floats{1, 2}));
    EXPECT_EQ(stats.skipped_codes, 1);
    EXPECT_EQ(stats.active_codes, 2);
    EXPECT_EQ(stats.invalid_rows, 0);
}

// ---- dead codes
// --------------------------------------------------------------------------------------------------------

const matrix<float> spare_rows{{100, 101}, {200, 201}, {300, 301}, {400, 401}, {500, 501}};

TEST(DeadCodeTest, UnusedStepsRestartsWhenTheCountIsReached) {
    host_state<> state = three_codes();
    state.steps_since_active = {2, 0, 1};
    ema_params params;
    params.dead_codes = dead_code_rule::unused_steps;
    params.restart_after_steps = 3;
    const std::vector<std::int64_t> indices{0, 1, 2};
    params.replacement_indices = view(indices);
    const host_state<> before = state;
    const step_stats stats = apply(state, {0, 0, 0}, matrix<float>(3, 2), spare_rows, params);
    EXPECT_EQ(stats.restarted_codes, 1);
    EXPECT_EQ(state.codebook.row(0), (floats{100, 101}));
    EXPECT_EQ(state.embed_sum.row(0), (floats{0, 0}));
    EXPECT_EQ(state.cluster_size[0], 0);
    EXPECT_EQ(state.steps_since_active, (codes_t{0, 1, 2}));
    for (const std::int64_t k : {1, 2}) {
        EXPECT_EQ(state.codebook.row(k), before.codebook.row(k));
        EXPECT_EQ(state.cluster_size[k], before.cluster_size[k]);
    }
}

TEST(DeadCodeTest, UnusedStepsNeverRestartsACodeThatHasRows) {
    host_state<> state = three_codes();
    state.steps_since_active = {100, 100, 100};
    ema_params params = ema_params::rectokens();
    params.restart_after_steps = 1;
    const step_stats stats = apply(state, three_counts, three_sums, spare_rows, params);
    EXPECT_EQ(stats.restarted_codes, 1);
    EXPECT_EQ(state.steps_since_active, (codes_t{0, 0, 0}));
    EXPECT_NE(state.cluster_size[0], 0);
    EXPECT_EQ(state.cluster_size[1], 0);
    EXPECT_NE(state.cluster_size[2], 0);
}

TEST(DeadCodeTest, ARestartedCodeOfUnusedStepsBecomesTheMeanOfItsNextRows) {
    host_state<> state = three_codes();
    ema_params params = ema_params::rectokens();
    params.restart_after_steps = 8;
    apply(state, {0, 0, 0}, matrix<float>(3, 2), spare_rows, params);
    ASSERT_EQ(state.steps_since_active, (codes_t{6, 7, 0}));
    apply(state, {1, 1, 4}, {{1, 1}, {1, 1}, {6, -10}}, spare_rows, params);
    EXPECT_FLOAT_EQ(state.codebook.at(2, 0), 1.5f);
    EXPECT_FLOAT_EQ(state.codebook.at(2, 1), -2.5f);
    EXPECT_FLOAT_EQ(state.cluster_size[2], 0.04f);
}

TEST(DeadCodeTest, MinClusterSizeRestartsWhatIsSmallerAfterTheBlend) {
    // Sizes after a blend with decay 0.75 are 5, 1.5 and 7.
    for (const auto& [threshold, restarted] : {std::pair{1.5f, 0}, {1.75f, 1}, {5.0f, 1}, {5.25f, 2}, {8.0f, 3}}) {
        host_state<> state = three_codes();
        ema_params params = with(ema_rule::clamp, 0.75);
        params.dead_codes = dead_code_rule::min_cluster_size;
        params.min_cluster_size = threshold;
        params.reset_cluster_size = 3;
        const step_stats stats = apply(state, three_counts, three_sums, matrix<float>{{2, -1}}, params);
        EXPECT_EQ(stats.restarted_codes, restarted) << "threshold " << threshold;
        if (restarted == 0) continue;
        EXPECT_EQ(state.codebook.row(1), (floats{2, -1}));
        EXPECT_EQ(state.embed_sum.row(1), (floats{6, -3}));
        EXPECT_EQ(state.cluster_size, (floats{restarted > 1 ? 3.0f : 5.0f, 3, restarted > 2 ? 3.0f : 7.0f}));
        EXPECT_EQ(state.steps_since_active, (codes_t{0, 0, 0}));
    }
}

TEST(DeadCodeTest, MinClusterSizeUnderActiveOnlyRestartsSmallCodesThatHaveRows) {
    host_state<> state = three_codes();
    ema_params params = with(ema_rule::active_only, 0.75);
    params.dead_codes = dead_code_rule::min_cluster_size;
    params.min_cluster_size = 6;
    const step_stats stats = apply(state, three_counts, three_sums, matrix<float>{{2, -1}}, params);
    EXPECT_EQ(stats.restarted_codes, 2);
    EXPECT_EQ(state.cluster_size, (floats{2, 2, 7}));
    EXPECT_EQ(state.codebook.row(0), (floats{2, -1}));
    EXPECT_EQ(state.codebook.row(1), (floats{2, -1}));
}

TEST(DeadCodeTest, UsageRatioComparesWithTheMeanSizeAfterTheBlend) {
    // Sizes after a blend with decay 0.75 are 5, 1.5 and 7: total 13.5, mean 4.5.
    for (const auto& [ratio, restarted] : {std::pair{0.25f, 0}, {0.375f, 1}, {1.0f, 1}, {1.25f, 2}}) {
        host_state<> state = three_codes();
        ema_params params = with(ema_rule::clamp, 0.75);
        params.dead_codes = dead_code_rule::usage_ratio;
        params.usage_ratio = ratio;
        params.reset_usage_ratio = 0.5f;
        params.check_every = 1;
        const step_stats stats = apply(state, three_counts, three_sums, matrix<float>{{2, -4}}, params);
        EXPECT_EQ(stats.restarted_codes, restarted) << "ratio " << ratio;
        if (restarted == 0) continue;
        // Every restarted code gets half the mean from before any restart.
        EXPECT_EQ(state.cluster_size, (floats{restarted > 1 ? 2.25f : 5.0f, 2.25f, 7}));
        EXPECT_EQ(state.codebook.row(1), (floats{2, -4}));
        EXPECT_EQ(state.embed_sum.row(1), (floats{4.5f, -9}));
    }
}

TEST(DeadCodeTest, UsageRatioAtTheThresholdItselfIsAlive) {
    host_state<> state({{1}, {1}}, {{1}, {3}}, {1, 3});
    ema_params params = with(ema_rule::clamp, 1);
    params.dead_codes = dead_code_rule::usage_ratio;
    params.usage_ratio = 0.5f;  // of the mean 2: 1
    params.check_every = 1;
    EXPECT_EQ(apply(state, {0, 0}, matrix<float>(2, 1), matrix<float>{{9}}, params).restarted_codes, 0);
    params.usage_ratio = 0.5625f;
    EXPECT_EQ(apply(state, {0, 0}, matrix<float>(2, 1), matrix<float>{{9}}, params).restarted_codes, 1);
}

TEST(DeadCodeTest, UsageRatioLooksOnlyWhenTheUpdatesAreAMultipleOfCheckEvery) {
    for (std::int64_t step = 0; step < 12; ++step) {
        host_state<> state = three_codes();
        state.step = step;
        ema_params params = with(ema_rule::clamp, 0.75);
        params.dead_codes = dead_code_rule::usage_ratio;
        params.usage_ratio = 0.75f;
        params.check_every = 4;
        const step_stats stats = apply(state, three_counts, three_sums, spare_rows, params);
        EXPECT_EQ(stats.restarted_codes, (step + 1) % 4 == 0 ? 1 : 0) << "after " << step << " updates";
    }
}

TEST(DeadCodeTest, UsageRatioOfAnEmptyStateRestartsNothing) {
    host_state<> state(matrix<float>{{1}, {2}});
    ema_params params = ema_params::mimi();
    params.check_every = 1;
    EXPECT_EQ(apply(state, {0, 0}, matrix<float>(2, 1), matrix<float>{{9}}, params).restarted_codes, 0);
    EXPECT_EQ(state.codebook.data, (floats{1, 2}));
}

TEST(DeadCodeTest, TheOtherRulesLookInEveryUpdate) {
    for (const auto rule : {dead_code_rule::unused_steps, dead_code_rule::min_cluster_size})
        for (std::int64_t step = 0; step < 6; ++step) {
            host_state<> state = three_codes();
            state.step = step;
            ema_params params;
            params.dead_codes = rule;
            params.restart_after_steps = 7;
            params.min_cluster_size = 2.5f;
            params.check_every = 5;
            EXPECT_EQ(apply(state, three_counts, three_sums, spare_rows, params).restarted_codes, 1);
        }
}

/// A state of K codes that an update without rows restarts, all of them.
struct RestartTest : testing::Test {
    static ema_params params() {
        ema_params p;
        p.dead_codes = dead_code_rule::unused_steps;
        p.restart_after_steps = 1;
        return p;
    }
    /// The codebook's first column after an update without rows.
    template <class R>
    floats restart(std::int64_t k, const matrix<R>& replacements, const ema_params& p, std::int64_t step = 0) {
        host_state<> state(matrix<float>(k, replacements.columns, -1));
        state.step = step;
        stats =
            apply(state, floats(static_cast<std::size_t>(k)), matrix<float>(k, replacements.columns), replacements, p);
        floats first;
        for (std::int64_t j = 0; j < k; ++j) first.push_back(state.codebook.at(j, 0));
        return first;
    }
    floats restart_from(const std::vector<std::int64_t>& indices, const matrix<float>& replacements) {
        ema_params p = params();
        p.replacement_indices = view(indices);
        return restart(static_cast<std::int64_t>(indices.size()), replacements, p);
    }
    /// M rows that hold their own number, but NaN in rows for which bad(row).
    template <class Bad>
    static matrix<float> numbered(std::int64_t m, Bad is_bad) {
        return matrix<float>::generate(m, 2, [&](auto i, auto d) { return d == 1 && is_bad(i) ? nan : i; });
    }

    step_stats stats;
};

TEST_F(RestartTest, GivenIndicesNameTheRows) {
    EXPECT_EQ(restart_from({3, 0, 3, 4}, spare_rows), (floats{400, 100, 400, 500}));
    EXPECT_EQ(stats.restarted_codes, 4);
}

TEST_F(RestartTest, GivenIndicesOutsideTheReplacementsRestartNothing) {
    const std::int64_t lowest = std::numeric_limits<std::int64_t>::min(),
                       highest = std::numeric_limits<std::int64_t>::max();
    EXPECT_EQ(restart_from({-1, 5, 2, lowest, highest}, spare_rows), (floats{-1, -1, 300, -1, -1}));
    EXPECT_EQ(stats.restarted_codes, 1);
    EXPECT_EQ(stats.skipped_codes, 0);
}

TEST_F(RestartTest, ACodeThatIsNotRestartedStaysDeadUntilItIs) {
    host_state<> state(matrix<float>{{1, 1}});
    ema_params p = params();
    p.restart_after_steps = 2;
    std::vector<std::int64_t> indices{-1};
    p.replacement_indices = view(indices);
    for (std::int32_t steps = 1; steps <= 4; ++steps) {
        EXPECT_EQ(apply(state, {0}, matrix<float>(1, 2), spare_rows, p).restarted_codes, 0);
        EXPECT_EQ(state.steps_since_active[0], steps);
    }
    indices[0] = 1;
    EXPECT_EQ(apply(state, {0}, matrix<float>(1, 2), spare_rows, p).restarted_codes, 1);
    EXPECT_EQ(state.codebook.row(0), (floats{200, 201}));
    EXPECT_EQ(state.steps_since_active[0], 0);
}

TEST_F(RestartTest, ARowThatIsNotFiniteMovesOnToTheNextCyclically) {
    EXPECT_EQ(restart_from({0, 1, 2, 3, 4}, numbered(5, [](auto i) { return i >= 3 || i == 0; })),
              (floats{1, 1, 2, 1, 1}));
    EXPECT_EQ(stats.restarted_codes, 5);
    matrix<float> infinite = spare_rows;
    infinite(2, 0) = -infinity;
    EXPECT_EQ(restart_from({2}, infinite), floats{400});
}

TEST_F(RestartTest, ItMovesOnAtMost64Steps) {
    EXPECT_EQ(restart_from({10}, numbered(200, [](auto i) { return i >= 10 && i < 74; })), floats{74});
    EXPECT_EQ(restart_from({10}, numbered(200, [](auto i) { return i >= 10 && i < 75; })), floats{-1});
    EXPECT_EQ(stats.restarted_codes, 0);
    EXPECT_EQ(restart_from({190}, numbered(200, [](auto i) { return i >= 190 || i < 54; })), floats{54});
}

TEST_F(RestartTest, WithoutAnyFiniteRowNothingRestarts) {
    EXPECT_EQ(restart_from({0, 2}, numbered(3, [](auto) { return true; })), (floats{-1, -1}));
    EXPECT_EQ(stats.restarted_codes, 0);
    EXPECT_EQ(restart(2, numbered(3, [](auto) { return true; }), params()), (floats{-1, -1}));
}

TEST_F(RestartTest, WithoutAnyRowNothingRestarts) {
    EXPECT_EQ(restart(2, matrix<float>(0, 2), params()), (floats{-1, -1}));
    EXPECT_EQ(restart_from({0, 0}, matrix<float>(0, 2)), (floats{-1, -1}));
    EXPECT_EQ(stats.restarted_codes, 0);
}

TEST_F(RestartTest, ARowThatTheStateCannotHoldMovesOn) {
    ema_params p = ema_params::vector_quantize_pytorch();  // embed_sum = 2 r
    const std::vector<std::int64_t> indices{0};
    p.replacement_indices = view(indices);
    EXPECT_EQ(restart(1, matrix<float>{{largest}, {7}}, p), floats{7});
#if CUVQ_HAS_HALF
    host_state<__half> state(matrix<__half>{{1}});
    p = params();
    p.replacement_indices = view(indices);
    apply(state, {0}, {{0}}, matrix<float>{{70000}, {60000}}, p);
    EXPECT_EQ(state.codebook.at(0, 0), 60000);
#endif
}

TEST_F(RestartTest, TheIndependentPhiloxOfThisTestKnowsTheAnswer) {
    EXPECT_EQ(first_64_bits(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e), 0x94fdccebd16cfe09u);
}

TEST_F(RestartTest, DrawsFollowTheDocumentedFormula) {
    for (const std::int64_t m : {1, 7, 1000})
        for (const std::uint64_t seed : {0ull, 42ull, 0xfedcba9876543210ull})
            for (const std::int64_t step :
                 {std::int64_t{0}, std::int64_t{1}, std::int64_t{12345}, (std::int64_t{1} << 33) + 5}) {
                const auto rows = numbered(m, [](auto) { return false; });
                ema_params p = params();
                p.seed = seed;
                const floats got = restart(20, rows, p, step);
                for (std::int64_t k = 0; k < 20; ++k)
                    EXPECT_EQ(got[static_cast<std::size_t>(k)], static_cast<float>(drawn_row(seed, k, step, m)))
                        << "code " << k << ", step " << step << ", seed " << seed << ", M " << m;
                EXPECT_EQ(stats.restarted_codes, 20);
            }
}

TEST_F(RestartTest, DrawsChangeFromStepToStepAndRepeatForTheSameStep) {
    const auto rows = numbered(1000, [](auto) { return false; });
    const floats first = restart(50, rows, params(), 3);
    EXPECT_EQ(restart(50, rows, params(), 3), first);
    EXPECT_NE(restart(50, rows, params(), 4), first);
}

TEST_F(RestartTest, ADrawOnARowThatIsNotFiniteMovesOnToo) {
    const auto odd_only = numbered(1000, [](auto i) { return i % 2 == 0; });
    const floats got = restart(50, odd_only, params(), 9);
    for (std::int64_t k = 0; k < 50; ++k) {
        const std::int64_t drawn = drawn_row(0, k, 9, 1000);
        EXPECT_EQ(got[static_cast<std::size_t>(k)], static_cast<float>(drawn % 2 ? drawn : drawn + 1));
    }
}

// ---- ema_update
// ---------------------------------------------------------------------------------------------------------

TEST(EmaUpdateTest, IsAccumulateThenApplyWithXAsReplacements) {
    random_source random;
    for (const ema_params& preset :
         {ema_params::rectokens(), ema_params::sonnet(), ema_params::vector_quantize_pytorch(), ema_params::mimi()}) {
        const std::int64_t n = 37, k = 9, d = 5;
        auto x = random.normals<float>(n, d);
        x(4, 2) = nan;
        codes_t codes(n);
        for (auto& c : codes) c = static_cast<std::int32_t>(random.integer(-1, k - 3));
        floats weights(n);
        for (auto& w : weights) w = 0.25f * random.integer(0, 8);
        host_state<> fused(random.normals<float>(k, d), random.normals<float>(k, d), floats(k, 0.5f), codes_t(k, 19),
                           4);
        host_state<> split = fused;

        ema_params params = preset;
        params.weights = view(weights);
        const step_stats stats = update(fused, x, codes, params);
        statistics batch(k, d);
        accumulate_params a;
        a.weights = view(weights);
        accumulate(x, codes, batch, a);
        const step_stats applied = apply(split, batch.counts, batch.sums, x, preset);

        EXPECT_TRUE(same_bits(fused, split));
        EXPECT_EQ(fused.step, split.step);
        EXPECT_EQ(stats.invalid_rows, batch.stats.invalid_rows);
        EXPECT_GT(stats.invalid_rows, 0);
        EXPECT_EQ(stats.restarted_codes, applied.restarted_codes);
        EXPECT_EQ(stats.perplexity, batch.stats.perplexity);
        EXPECT_EQ(stats.active_codes, batch.stats.active_codes);
    }
}

TEST(EmaUpdateTest, NoRowsAreAnEmptyBatch) {
    for (const ema_rule rule : rules) {
        host_state<> state = three_codes(), expected = three_codes();
        ema_params params = with(rule, 0.75);
        params.dead_codes = dead_code_rule::unused_steps;
        params.restart_after_steps = 1;
        const step_stats stats = update(state, matrix<float>(0, 2), codes_t{}, params);
        apply(expected, {0, 0, 0}, matrix<float>(3, 2), with(rule, 0.75));
        EXPECT_TRUE(same_bits(state, expected)) << "no row to restart from: " << text_of(rule);
        EXPECT_EQ(state.steps_since_active, (codes_t{6, 7, 8}));
        EXPECT_EQ(state.step, 42);
        EXPECT_EQ(stats.perplexity, 0);
        EXPECT_EQ(stats.active_codes, 0);
        EXPECT_EQ(stats.restarted_codes, 0);
    }
}

TEST(EmaUpdateTest, ABatchOfInvalidRowsIsAnEmptyBatch) {
    host_state<> state = three_codes(), expected = three_codes();
    const step_stats stats =
        update(state, matrix<float>{{nan, 1}, {2, 3}, {4, infinity}}, codes_t{0, -1, 2}, with(ema_rule::clamp, 0.75));
    apply(expected, {0, 0, 0}, matrix<float>(3, 2), with(ema_rule::clamp, 0.75));
    EXPECT_TRUE(same_bits(state, expected));
    EXPECT_EQ(stats.invalid_rows, 3);
}

TEST(EmaUpdateTest, WeightsOfTwoCountRowsTwice) {
    host_state<> weighted = three_codes(), doubled = three_codes();
    const floats weights{2, 1};
    ema_params params = with(ema_rule::laplace, 0.75);
    params.weights = view(weights);
    update(weighted, matrix<float>{{1, 2}, {3, 4}}, codes_t{0, 2}, params);
    params.weights = {};
    update(doubled, matrix<float>{{1, 2}, {1, 2}, {3, 4}}, codes_t{0, 0, 2}, params);
    EXPECT_TRUE(same_bits(weighted, doubled));
}

TEST(EmaUpdateTest, WeightsOfZeroLeaveACodeWithoutRows) {
    host_state<> state = three_codes();
    const host_state<> before = state;
    const floats weights{0, 1};
    ema_params params = with(ema_rule::active_only, 0.75);
    params.weights = view(weights);
    const step_stats stats = update(state, matrix<float>{{1, 2}, {3, 4}}, codes_t{0, 2}, params);
    EXPECT_EQ(state.cluster_size[0], before.cluster_size[0]);
    EXPECT_EQ(state.codebook.row(0), before.codebook.row(0));
    EXPECT_EQ(state.steps_since_active, (codes_t{6, 7, 0}));
    EXPECT_EQ(stats.active_codes, 1);
    EXPECT_EQ(stats.invalid_rows, 0);
}

template <class Elements>
class EmaUpdateElements : public testing::Test {
public:
    using x = typename Elements::x;
    using codebook = typename Elements::codebook;
};
TYPED_TEST_SUITE(EmaUpdateElements, element_pairs, type_names);

TYPED_TEST(EmaUpdateElements, FromZeroEveryActiveCodeBecomesTheMeanOfItsRows) {
    for (const ema_rule rule : rules) {
        host_state<typename TestFixture::codebook> state(
            matrix<typename TestFixture::codebook>{{9, 9}, {8, 8}, {7, 7}});
        const matrix<typename TestFixture::x> x{{1, 2}, {3, 4}, {-6, 0.5f}};
        update(state, x, codes_t{0, 0, 2}, with(rule, 0.5, 1e-9f));
        EXPECT_EQ(state.cluster_size, (floats{1, 0, 0.5f}));
        EXPECT_TRUE(same_bits(state.embed_sum, matrix<float>{{2, 3}, {0, 0}, {-3, 0.25f}}));
        EXPECT_EQ(state.codebook.row(0), (floats{2, 3})) << text_of(rule);
        EXPECT_EQ(state.codebook.row(1), (floats{8, 8})) << text_of(rule);
        EXPECT_EQ(state.codebook.row(2), (floats{-6, 0.5f})) << text_of(rule);
    }
}

TYPED_TEST(EmaUpdateElements, DeadCodesRestartFromRowsOfTheBatch) {
    host_state<typename TestFixture::codebook> state(matrix<typename TestFixture::codebook>{{9, 9}, {8, 8}});
    ema_params params = ema_params::vector_quantize_pytorch();
    const std::vector<std::int64_t> indices{1, 2};
    params.replacement_indices = view(indices);
    const matrix<typename TestFixture::x> x{{1, 2}, {3, 4}, {-6, 0.5f}};
    padded_matrix<typename TestFixture::x> wide(x, 5);
    reference::ema_update(state.view(), wide.view(), view(codes_t{0, 0, 0}), params);
    EXPECT_EQ(state.codebook.row(0), (floats{3, 4}));
    EXPECT_EQ(state.codebook.row(1), (floats{-6, 0.5f}));
    EXPECT_EQ(state.cluster_size, (floats{2, 2}));
    EXPECT_TRUE(same_bits(state.embed_sum, matrix<float>{{6, 8}, {-12, 1}}));
}

// ---- the cases of RecTokens' own tests
// ------------------------------------------------------------------------------------

struct reference_update {
    using fixture = testing::Test;
    static step_stats update(host_state<>& state, const matrix<float>& x, const std::vector<std::int64_t>& codes,
                             const ema_params& params) {
        return test::update(state, x, codes, params);
    }
};
INSTANTIATE_TYPED_TEST_SUITE_P(Reference, RecTokensCases, reference_update);

// ---- train_step
// -----------------------------------------------------------------------------------------------------------

TEST(TrainStepTest, HandComputedStep) {
    host_state<> state(matrix<float>{{0, 0}, {10, 10}, {99, 99}});
    const matrix<float> x{{1, 1}, {9, 11}, {-1, 3}, {nan, 0}};
    codes_t codes(4);
    matrix<float> quantized(4, 2);
    step_stats stats;
    train_params params = with(ema_rule::active_only, 0.5);
    params.stats = &stats;
    reference::train_step(state.view(), x.view(), view(codes), quantized.view(), params);
    EXPECT_EQ(codes, (codes_t{0, 1, 0, -1}));
    EXPECT_EQ(quantized.row(0), (floats{0, 0}));
    EXPECT_EQ(quantized.row(1), (floats{10, 10}));
    EXPECT_EQ(quantized.row(2), (floats{0, 0}));
    EXPECT_TRUE(std::isnan(quantized.at(3, 0)) && std::isnan(quantized.at(3, 1)));
    EXPECT_EQ(state.cluster_size, (floats{1, 0.5f, 0}));
    EXPECT_TRUE(same_bits(state.embed_sum, matrix<float>{{0, 2}, {4.5f, 5.5f}, {0, 0}}));
    EXPECT_TRUE(same_bits(state.codebook, matrix<float>{{0, 2}, {9, 11}, {99, 99}}));
    EXPECT_EQ(state.steps_since_active, (codes_t{0, 0, 1}));
    EXPECT_EQ(state.step, 1);
    EXPECT_DOUBLE_EQ(stats.commitment_loss, (2.0 + 2 + 10) / (3 * 2));
    EXPECT_NEAR(stats.perplexity, 3 / std::pow(2, 2.0 / 3), 1e-12);
    EXPECT_EQ(stats.active_codes, 2);
    EXPECT_EQ(stats.invalid_rows, 1);
    EXPECT_EQ(stats.restarted_codes, 0);
    EXPECT_EQ(stats.skipped_codes, 0);
}

template <class Elements>
class TrainStepElements : public EmaUpdateElements<Elements> {};
TYPED_TEST_SUITE(TrainStepElements, element_pairs, type_names);

TYPED_TEST(TrainStepElements, IsQuantizeWithTheCodebookBeforeTheStepThenUpdate) {
    random_source random;
    for (ema_params params : {ema_params::rectokens(), ema_params::sonnet(), ema_params::vector_quantize_pytorch(),
                              ema_params::encodec(), ema_params::mimi()}) {
        params.restart_after_steps = 2;
        params.check_every = 2;
        host_state<typename TestFixture::codebook> fused(random.normals<typename TestFixture::codebook>(13, 5));
        auto split = fused;
        for (int t = 0; t < 6; ++t) {
            const auto x = random.normals<typename TestFixture::x>(29, 5);
            codes_t fused_codes(29), split_codes(29);
            matrix<typename TestFixture::x> fused_rows(29, 5), split_rows(29, 5);
            step_stats fused_stats, search_stats;
            train_params train = params;
            train.stats = &fused_stats;
            reference::train_step(fused.view(), x.view(), view(fused_codes), fused_rows.view(), train);
            quantize_params search;
            search.stats = &search_stats;
            reference::quantize(x.view(), split.view().codebook, view(split_codes), split_rows.view(), discard, search);
            const step_stats split_stats = update(split, x, split_codes, params);
            ASSERT_EQ(fused_codes, split_codes);
            ASSERT_TRUE(same_bits(fused_rows, split_rows));
            ASSERT_TRUE(same_bits(fused, split));
            ASSERT_EQ(fused.step, t + 1);
            ASSERT_EQ(fused_stats.commitment_loss, search_stats.commitment_loss);
            ASSERT_EQ(fused_stats.perplexity, split_stats.perplexity);
            ASSERT_EQ(fused_stats.restarted_codes, split_stats.restarted_codes);
        }
    }
}

TEST(TrainStepTest, NoRowsAreAnEmptyBatch) {
    host_state<> state = three_codes(), expected = three_codes();
    matrix<float> quantized(1, 2, 42);
    step_stats stats{42, 42, 42, 42, 42, 42};
    train_params params = with(ema_rule::laplace, 0.75);
    params.stats = &stats;
    reference::train_step(state.view(), matrix_view<float>(nullptr, 0, 2), vector_view<std::int32_t>(nullptr, 0),
                          matrix_view<float>(quantized.data.data(), 0, 2), params);
    apply(expected, {0, 0, 0}, matrix<float>(3, 2), with(ema_rule::laplace, 0.75));
    EXPECT_TRUE(same_bits(state, expected));
    EXPECT_EQ(state.step, 42);
    EXPECT_TRUE(same_bits(quantized, matrix<float>(1, 2, 42)));
    EXPECT_EQ(stats.commitment_loss, 0);
    EXPECT_EQ(stats.perplexity, 0);
    EXPECT_EQ(stats.restarted_codes, 0);
}

TEST(TrainStepTest, WeightsCountInTheUpdateButNotInTheLoss) {
    host_state<> state(matrix<float>{{0}, {10}});
    const floats weights{3, 1, -1};
    codes_t codes(3);
    step_stats stats;
    train_params params = with(ema_rule::active_only, 0);
    params.weights = view(weights);
    params.stats = &stats;
    reference::train_step(state.view(), matrix<float>{{1}, {-3}, {12}}.view(), view(codes), discard, params);
    EXPECT_EQ(codes, (codes_t{0, 0, 1}));
    EXPECT_EQ(state.cluster_size, (floats{4, 0}));
    EXPECT_EQ(state.codebook.data, (floats{0, 10}));
    EXPECT_DOUBLE_EQ(stats.commitment_loss, (1.0 + 9 + 4) / 3);
    EXPECT_EQ(stats.invalid_rows, 1);
    EXPECT_EQ(stats.active_codes, 1);
}

TEST(TrainStepTest, With256CodesInBytesInvalidRowsDoNotCountForCode255) {
    auto rows = matrix<float>::generate(256, 1, [](auto k, auto) { return k; });
    host_state<> state(rows);
    const host_state<> before = state;
    std::vector<std::uint8_t> codes(3);
    step_stats stats;
    train_params params = with(ema_rule::active_only, 0.5);
    params.stats = &stats;
    reference::train_step(state.view(), matrix<float>{{nan}, {7}, {infinity}}.view(), view(codes), discard, params);
    EXPECT_EQ(codes, (std::vector<std::uint8_t>{255, 7, 255}));
    EXPECT_EQ(state.cluster_size[255], before.cluster_size[255]);
    EXPECT_EQ(state.codebook.at(255, 0), 255);
    EXPECT_EQ(stats.invalid_rows, 2);
    EXPECT_EQ(stats.active_codes, 1);
}

TEST(TrainStepTest, With256CodesInBytesAndNoFiniteCodebookRowEveryRowIsInvalid) {
    host_state<> state(matrix<float>(256, 1, nan));
    const host_state<> before = state;
    std::vector<std::uint8_t> codes(2);
    step_stats stats;
    train_params params = with(ema_rule::active_only, 0.5);
    params.stats = &stats;
    reference::train_step(state.view(), matrix<float>{{1}, {7}}.view(), view(codes), discard, params);
    EXPECT_EQ(codes, (std::vector<std::uint8_t>{255, 255}));
    EXPECT_EQ(stats.invalid_rows, 2);
    EXPECT_EQ(stats.active_codes, 0);
    EXPECT_TRUE(same_bits(state.code(255).codebook, before.code(255).codebook));
    EXPECT_EQ(state.cluster_size[255], 0);
    EXPECT_EQ(state.steps_since_active[255], 1);
}

TEST(TrainStepTest, RepeatedRunsGiveTheSameBits) {
    random_source random;
    const auto start = random.normals<float>(20, 4), x = random.normals<float>(200, 4);
    const auto run = [&] {
        host_state<> state(start);
        codes_t codes(200);
        for (int t = 0; t < 10; ++t)
            reference::train_step(state.view(), x.view(), view(codes), discard, ema_params::vector_quantize_pytorch());
        return state;
    };
    const host_state<> first = run();
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(same_bits(run(), first));
}

TEST(TrainStepTest, AConstantBatchIsLearnt) {
    // Four points, four codes near them: every rule moves each code to its point.
    const matrix<float> x{{0, 0}, {0, 8}, {8, 0}, {8, 8}};
    for (const ema_rule rule : rules) {
        host_state<> state(matrix<float>{{1, 1}, {1, 7}, {7, 1}, {7, 7}});
        codes_t codes(4);
        step_stats stats;
        train_params params = with(rule, 0.5, 1e-7f);
        params.stats = &stats;
        for (int t = 0; t < 30; ++t) reference::train_step(state.view(), x.view(), view(codes), discard, params);
        EXPECT_EQ(codes, (codes_t{0, 1, 2, 3}));
        for (std::int64_t i = 0; i < 4; ++i)
            for (std::int64_t d = 0; d < 2; ++d) EXPECT_NEAR(state.codebook.at(i, d), x.at(i, d), 1e-5);
        EXPECT_NEAR(stats.commitment_loss, 0, 1e-9);
        EXPECT_NEAR(stats.perplexity, 4, 1e-9);
    }
}

// ---- several ranks --------------------------------------------------------------------------------------------------

TEST(ReferenceEma, RanksThatShareABatchHoldTheStateOfASingleOne) {
    constexpr std::int64_t n = 240, k = 12, d = 3;
    random_source random;
    const auto x = random.integers<float>(n, d, -9, 9);  // sums are exact in any order
    codes_t codes;
    for (std::int64_t i = 0; i < n; ++i) codes.push_back(static_cast<std::int32_t>(random.integer(0, k - 3)));
    auto params = ema_params::vector_quantize_pytorch();  // the last two codes are dead
    params.min_cluster_size = 1;
    const auto before = host_state<float>(random.normals<float>(k, d));
    auto single = before;
    reference::ema_update(single.view(), x.view(), view(codes), params);
    for (const std::int64_t ranks : {2, 3, 8}) {
        statistics reduced(k, d);
        for (std::int64_t r = 0; r < ranks; ++r) {
            const auto begin = n * r / ranks, rows = n * (r + 1) / ranks - begin;
            const auto share = matrix<float>::generate(rows, d, [&](auto i, auto c) { return x.at(begin + i, c); });
            statistics own(k, d);
            accumulate(share, codes_t(codes.begin() + begin, codes.begin() + begin + rows), own);
            for (std::size_t j = 0; j < own.counts.size(); ++j) reduced.counts[j] += own.counts[j];
            for (std::size_t e = 0; e < own.sums.data.size(); ++e) reduced.sums.data[e] += own.sums.data[e];
        }
        for (std::int64_t r = 0; r < ranks; ++r) {
            auto state = before;
            EXPECT_EQ(apply(state, reduced.counts, reduced.sums, x, params).restarted_codes, 2);
            EXPECT_TRUE(same_bits(state, single)) << "rank " << r << " of " << ranks;
        }
    }
}

}  // namespace
}  // namespace cuvq::test
