// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The cases of RecTokens' own tests, for any implementation of `ema_update`. One has a `fixture`, the test class to
// derive from, and
//
//     static step_stats update(host_state<>& state, const matrix<float>& x, const std::vector<std::int64_t>& codes,
//                              const ema_params& params);
//
// INSTANTIATE_TYPED_TEST_SUITE_P(PREFIX, RecTokensCases, IMPLEMENTATION) runs them. g++ alone serves.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include <cuvq/params.hpp>

#include "support/drawn_row.hpp"
#include "support/host.hpp"
#include "support/random.hpp"
#include "support/state.hpp"
#include "support/update_judge.hpp"

namespace cuvq::test {

template <class Implementation>
class RecTokensCases : public Implementation::fixture {
protected:
    using codes_t = std::vector<std::int64_t>;

    /// An update, judged from the state that it started from.
    static step_stats update(host_state<>& state, const matrix<float>& x, const codes_t& codes,
                             const ema_params& params) {
        const auto before = state;
        const step_stats stats = Implementation::update(state, x, codes, params);
        EXPECT_TRUE(update_of_batch_is_right(before, x, codes, params, state, stats));
        return stats;
    }

    /// Zero statistics, and every batch the same: after t steps an active code has n (1 - g^t) and the mean of its
    /// rows, any other is as it was. Each step adds the error of its sums, 2^-22 sqrt(n) sum |x|, and that of its
    /// blend, 2^-22 of either moment.
    static void expect_closed_form(const host_state<>& state, const matrix<float>& start, const matrix<float>& x,
                                   const codes_t& codes, double decay, int steps) {
        const double keep = static_cast<float>(decay), take = static_cast<float>(1 - decay), ulps = 0x1p-22;
        double share = 0;  // 1 - g^t, of what g and 1 - g are in float
        for (int t = 0; t < steps; ++t) share = keep * share + take;
        for (std::int64_t k = 0; k < start.rows; ++k) {
            const auto n = static_cast<double>(std::count(codes.begin(), codes.end(), k));
            ASSERT_NEAR(state.cluster_size[k], n * share, ulps * steps * n * share) << "code " << k;
            ASSERT_EQ(state.steps_since_active[k], n > 0 ? 0 : steps) << "code " << k;
            for (std::int64_t d = 0; d < start.columns; ++d) {
                double sum = 0, magnitude = 0;
                for (std::int64_t i = 0; i < x.rows; ++i)
                    if (codes[i] == k) {
                        sum += x.at(i, d);
                        magnitude += std::abs(x.at(i, d));
                    }
                ASSERT_NEAR(state.embed_sum.at(k, d), sum * share, ulps * (std::sqrt(n) + steps) * magnitude * share)
                    << "code " << k;
                if (n > 0)
                    ASSERT_NEAR(state.codebook.at(k, d), sum / n, ulps * (std::sqrt(n) + 2 * steps + 1) * magnitude / n)
                        << "code " << k;
                else
                    ASSERT_EQ(state.codebook.at(k, d), start.at(k, d)) << "code " << k;
            }
        }
        EXPECT_EQ(state.step, steps);
    }

    /// A random batch whose row i has code i mod `used`.
    static void run(std::int64_t n, std::int64_t k, std::int64_t d, std::int64_t used, double decay = 0.99) {
        random_source random;
        const auto start = random.normals<float>(k, d), x = random.normals<float>(n, d);
        codes_t codes;
        for (std::int64_t i = 0; i < n; ++i) codes.push_back(i % used);
        host_state<> state(start);
        ema_params params = ema_params::rectokens();
        params.decay = decay;
        for (int t = 1; t <= 4; ++t) {
            const step_stats stats = update(state, x, codes, params);
            EXPECT_EQ(stats.active_codes, std::min(n, used));
            EXPECT_EQ(stats.restarted_codes, 0);
        }
        expect_closed_form(state, start, x, codes, decay, 4);
    }
};
TYPED_TEST_SUITE_P(RecTokensCases);

TYPED_TEST_P(RecTokensCases, AllCodesActive) { TestFixture::run(64, 16, 8, 16); }
TYPED_TEST_P(RecTokensCases, PartlyInactive) { TestFixture::run(64, 16, 8, 5); }
TYPED_TEST_P(RecTokensCases, SingleSample) { TestFixture::run(1, 16, 8, 16); }
TYPED_TEST_P(RecTokensCases, BatchThatIsNoPowerOfTwo) { TestFixture::run(77, 16, 8, 16); }
TYPED_TEST_P(RecTokensCases, CodebookLargerThanTheBatch) { TestFixture::run(5, 64, 8, 64); }
TYPED_TEST_P(RecTokensCases, LargeDimension) {
    TestFixture::run(40, 12, 768, 12);
    TestFixture::run(40, 12, 1025, 7);
}
TYPED_TEST_P(RecTokensCases, DecayZero) { TestFixture::run(64, 16, 8, 11, 0.0); }

TYPED_TEST_P(RecTokensCases, DecayOneNeverLearns) {
    random_source random;
    const auto start = random.normals<float>(6, 3);
    host_state<> state(start);
    ema_params params;
    params.decay = 1;
    for (int t = 0; t < 3; ++t)
        TestFixture::update(state, random.normals<float>(12, 3), {0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5}, params);
    EXPECT_TRUE(same_bits(state.codebook, start));
    EXPECT_EQ(state.cluster_size, std::vector<float>(6, 0));
    EXPECT_TRUE(same_bits(state.embed_sum, matrix<float>(6, 3)));
}

TYPED_TEST_P(RecTokensCases, DeadCodesRestartAfterTwentyStepsFromTheBatch) {
    random_source random;
    host_state<> state(random.normals<float>(4, 3));
    const auto start = state.codebook;
    const ema_params params = ema_params::rectokens();
    for (int t = 1; t <= 20; ++t) {
        const auto x = random.normals<float>(6, 3);
        const step_stats stats = TestFixture::update(state, x, {0, 2, 0, 2, 0, 2}, params);
        ASSERT_EQ(stats.restarted_codes, t == 20 ? 2 : 0) << "step " << t;
        for (const std::int64_t k : {1, 3}) {
            ASSERT_EQ(state.steps_since_active[k], t == 20 ? 0 : t);
            ASSERT_EQ(state.cluster_size[k], 0);
            ASSERT_EQ(state.codebook.row(k), t < 20 ? start.row(k) : x.row(drawn_row(0, k, 19, 6)));
        }
    }
}

TYPED_TEST_P(RecTokensCases, TheCounterIsResetWhenACodeIsUsed) {
    using steps_t = std::vector<std::int32_t>;
    host_state<> state(matrix<float>{{0}, {10}});
    const ema_params params = ema_params::rectokens();
    const matrix<float> x{{1}};
    for (int t = 1; t <= 19; ++t) TestFixture::update(state, x, {0}, params);
    EXPECT_EQ(state.steps_since_active, (steps_t{0, 19}));
    EXPECT_EQ(TestFixture::update(state, x, {1}, params).restarted_codes, 0);
    EXPECT_EQ(state.steps_since_active, (steps_t{1, 0}));
    EXPECT_EQ(TestFixture::update(state, x, {0}, params).restarted_codes, 0);
    EXPECT_EQ(state.steps_since_active, (steps_t{0, 1}));
}

REGISTER_TYPED_TEST_SUITE_P(RecTokensCases, AllCodesActive, PartlyInactive, SingleSample, BatchThatIsNoPowerOfTwo,
                            CodebookLargerThanTheBatch, LargeDimension, DecayZero, DecayOneNeverLearns,
                            DeadCodesRestartAfterTwentyStepsFromTheBatch, TheCounterIsResetWhenACodeIsUsed);

}  // namespace cuvq::test
