// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/ema.cuh>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <cuvq/accumulate.cuh>

#include "support/device.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/rectokens_cases.hpp"
#include "support/training.hpp"
#include "support/types.hpp"
#include "support/update_judge.hpp"

namespace cuvq::test {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

using codes_t = std::vector<std::int64_t>;

/// The memory of an ema_apply.
template <class T, class R>
struct apply_memory {
    device_state<T> state;
    device_array<float> counts;
    device_matrix<float> sums;
    device_matrix<R> replacements;
    device_array<step_stats> stats{1};
    ema_params params;

    apply_memory(const host_state<T>& s, const std::vector<float>& n, const matrix<float>& sum, const matrix<R>& rows,
                 const ema_params& p, row_layout layout = {})
        : state(s), counts(n, layout.offset), sums(sum, layout), replacements(rows, layout), params(p) {
        params.stats = stats.data();
    }
    void run(const workspace& ws = {}, cudaStream_t stream = nullptr) {
        ema_apply(state.view(), counts.view(), sums.view(), replacements.view(), params, ws, stream);
    }
    std::size_t workspace_bytes() const {
        return ema_apply_workspace_bytes({0, counts.size(), sums.columns()}, params);
    }
};

/// An ema_apply, judged; the state after it.
template <class T, class R>
host_state<T> expect_applied(const host_state<T>& before, const std::vector<float>& counts, const matrix<float>& sums,
                             const matrix<R>& replacements, const ema_params& params, row_layout layout = {}) {
    apply_memory<T, R> memory(before, counts, sums, replacements, params, layout);
    const device_workspace ws(memory.workspace_bytes());
    memory.run(ws.lent());
    EXPECT_TRUE(ws.guard_untouched());
    const auto after = memory.state.download();
    const update_judge<T> judge(before, counts, sums, replacements, params);
    EXPECT_TRUE(judge(after));
    EXPECT_TRUE(same_stats(memory.stats.download()[0], judge.stats()));
    return after;
}

/// The memory of an ema_update.
template <class T, class X, class Int = std::int32_t>
struct update_memory {
    device_state<T> state;
    device_matrix<X> x;
    device_array<Int> codes;
    device_array<float> weights;
    device_array<step_stats> stats{1};
    ema_params params;
    shape size;

    update_memory(const host_state<T>& s, const matrix<X>& rows, const codes_t& code_of, const ema_params& p,
                  const std::vector<float>& weight_of = {}, row_layout layout = {})
        : state(s),
          x(rows, layout),
          codes(std::vector<Int>(code_of.begin(), code_of.end()), layout.offset),
          weights(weight_of, layout.offset),
          params(p),
          size{rows.rows, s.codebook.rows, rows.columns} {
        params.stats = stats.data();
        if (!weight_of.empty()) params.weights = vector_view<const float>(weights.data(), weights.size());
    }
    void run(const workspace& ws = {}, cudaStream_t stream = nullptr) {
        ema_update(state.view(), x.view(), codes.view(), params, ws, stream);
    }
    std::size_t workspace_bytes() const { return ema_update_workspace_bytes(size, params); }
};

/// An ema_update, judged; the state after it.
template <class Int = std::int32_t, class T, class X>
host_state<T> expect_updated(const host_state<T>& before, const matrix<X>& x, const codes_t& codes,
                             const ema_params& params, const std::vector<float>& weights = {}, row_layout layout = {}) {
    update_memory<T, X, Int> memory(before, x, codes, params, weights, layout);
    const device_workspace ws(memory.workspace_bytes());
    memory.run(ws.lent());
    EXPECT_TRUE(ws.guard_untouched());
    const auto after = memory.state.download();
    ema_params host = params;
    if (!weights.empty()) host.weights = view(weights);
    EXPECT_TRUE(update_of_batch_is_right(before, x, codes, host, after, memory.stats.download()[0]));
    return after;
}

class EmaSmall : public gpu_test {};
class EmaTest : public gpu_test {};

// ---- every rule, every type -----------------------------------------------------------------------------------------

template <class Elements>
class EmaTypesSmall : public gpu_test {
protected:
    using x = typename Elements::x;
    using codebook = typename Elements::codebook;
};
TYPED_TEST_SUITE(EmaTypesSmall, element_pairs, type_names);

TYPED_TEST(EmaTypesSmall, ApplyFollowsEveryRuleStepByStep) {
    random_source random;
    std::int64_t restarted = 0;
    for (const auto& [name, params] : every_rule()) {
        SCOPED_TRACE(name);
        auto state = trained_state<typename TestFixture::codebook>(random, 43, 9);
        auto replacements = random.normals<typename TestFixture::x>(30, 9);
        replacements(4, 4) = nan;
        for (int step = 0; step < 4; ++step) {
            const auto codes = skewed_codes(random, 120, 43);
            const auto x = random.normals<float>(120, 9);
            const batch_sums batch(x, codes, 43);
            matrix<float> sums(43, 9);
            for (std::size_t e = 0; e < sums.data.size(); ++e) sums.data[e] = static_cast<float>(batch.sums[e]);
            const auto before = state;
            state = expect_applied(before, {batch.counts.begin(), batch.counts.end()}, sums, replacements, params,
                                   step % 2 ? awkward : row_layout{});
            for (std::size_t k = 0; k < 43; ++k)
                restarted += params.dead_codes == dead_code_rule::unused_steps && before.steps_since_active[k] >= 2 &&
                             state.steps_since_active[k] == 0;
        }
    }
    EXPECT_GT(restarted, 10);
}

TYPED_TEST(EmaTypesSmall, UpdateFollowsEveryRuleStepByStep) {
    random_source random;
    for (const auto& [name, params] : every_rule()) {
        SCOPED_TRACE(name);
        auto state = trained_state<typename TestFixture::codebook>(random, 37, 10);
        for (int step = 0; step < 3; ++step) {
            auto x = random.normals<typename TestFixture::x>(110, 10);
            auto codes = skewed_codes(random, 110, 37);
            x(17, 3) = nan;
            codes[20] = -1;
            codes[21] = 37;
            std::vector<float> weights;
            for (int i = 0; i < 110 && step == 1; ++i) weights.push_back(std::abs(random.normal()));
            if (step == 1) weights[5] = -1;
            state = expect_updated(state, x, codes, params, weights, step == 2 ? awkward : row_layout{});
        }
    }
}

TEST_F(EmaSmall, PresetsStepByStep) {
    random_source random;
    for (const auto& [name, params] : presets()) {
        SCOPED_TRACE(name);
        auto state = initial_state(random.normals<float>(40, 6), params);
        for (int step = 0; step < 25; ++step)
            state = expect_updated(state, random.normals<float>(90, 6), skewed_codes(random, 90, 40), params);
        EXPECT_EQ(state.step, 25);
    }
}

TEST_F(EmaSmall, EveryCodeType) {
    random_source random;
    const auto x = random.normals<float>(80, 5);
    const auto codes = skewed_codes(random, 80, 20);
    const auto before = trained_state<float>(random, 20, 5);
    const auto params = ema_params::vector_quantize_pytorch();
    const auto after = expect_updated<std::int32_t>(before, x, codes, params);
    EXPECT_TRUE(same_state(expect_updated<std::int64_t>(before, x, codes, params), after));
    EXPECT_TRUE(same_state(expect_updated<std::uint8_t>(before, x, codes, params, {}, awkward), after));
    EXPECT_TRUE(same_state(expect_updated<std::uint16_t>(before, x, codes, params, {}, awkward), after));
    EXPECT_TRUE(same_state(expect_updated<std::uint32_t>(before, x, codes, params), after));
}

TEST_F(EmaSmall, UpdateIsAccumulateThenApply) {
    random_source random;
    auto every_step = ema_params::mimi();
    every_step.check_every = 1;
    for (const auto& params : {ema_params::rectokens(), every_step})  // in one launch, and in several
        for (const std::int64_t d : {12, 200}) {
            const auto x = random.normals<float>(500, d);
            const auto codes = skewed_codes(random, 500, 30);
            const auto before = trained_state<float>(random, 30, d);
            update_memory<float, float> fused(before, x, codes, params);
            fused.run();
            update_memory<float, float> parts(before, x, codes, params);
            device_array<float> counts(30);
            device_matrix<float> sums(30, d);
            accumulate(parts.x.view(), parts.codes.view(), counts.view(), sums.view());
            ema_apply(parts.state.view(), counts.view(), sums.view(), parts.x.view(), params);
            EXPECT_TRUE(same_state(fused.state.download(), parts.state.download())) << "D = " << d;
        }
}

TEST_F(EmaTest, LaunchesAreAsManyAsTheHeadersSay) {
    random_source random;
    for (const std::int64_t n : {8192, 8193}) {  // the one launch, and sorting
        SCOPED_TRACE(testing::Message() << n << " rows");
        const std::int64_t k = 30, d = 12;
        const auto before = trained_state<float>(random, k, d);
        update_memory<float, float> memory(before, random.normals<float>(n, d), skewed_codes(random, n, k), {});
        device_array<float> counts(k);
        device_matrix<float> sums(k, d);
        const int adding = launches([&](cudaStream_t stream) {
            accumulate(memory.x.view(), memory.codes.view(), counts.view(), sums.view(), {}, {}, stream);
        });
        for (const auto& rule : every_rule()) {
            SCOPED_TRACE(rule.first);
            const ema_params& params = rule.second;
            const bool needs_total =
                params.rule == ema_rule::laplace || params.dead_codes == dead_code_rule::usage_ratio;
            EXPECT_EQ(launches([&](cudaStream_t stream) {
                          ema_apply(memory.state.view(), counts.view(), sums.view(), memory.x.view(), params, {},
                                    stream);
                      }),
                      1);
            EXPECT_EQ(launches([&](cudaStream_t stream) {
                          ema_update(memory.state.view(), memory.x.view(), memory.codes.view(), params, {}, stream);
                      }),
                      n <= 8192 && !needs_total ? 1 : adding + 1);
        }
        EXPECT_EQ(adding == 1, n <= 8192);
    }
}

TEST_F(EmaTest, StatisticsTakeTwoLaunchesMore) {
    random_source random;
    for (const std::int64_t n : {8192, 8193}) {
        const auto before = trained_state<float>(random, 30, 12);
        const matrix<float> x(n, 12);
        for (const auto& rule : every_rule()) {
            SCOPED_TRACE(testing::Message() << n << " rows, " << rule.first);
            update_memory<float, float> update(before, x, codes_t(static_cast<std::size_t>(n)), rule.second);
            apply_memory<float, float> apply(before, std::vector<float>(30), matrix<float>(30, 12), x, rule.second);
            const auto with_and_without = [](auto& memory) {
                const auto run = [&](cudaStream_t stream) { memory.run({}, stream); };
                const int with = launches(run);
                memory.params.stats = nullptr;
                return with - launches(run);
            };
            EXPECT_EQ(with_and_without(update), 2);
            EXPECT_EQ(with_and_without(apply), 2);
        }
    }
}

TEST_F(EmaTest, OneLaunchUpToTheEdgesOfTheGatheredShapes) {
    // What `ema_update` documents, and of wider rows what follows from it: fewer codes.
    const struct {
        std::int64_t n, k, d;
        bool inside;
    } cases[] = {{8192, 4096, 256, true},  {8193, 4096, 256, false}, {8192, 4097, 256, false},
                 {8192, 4096, 257, false}, {8192, 4096, 1, true},    {1, 4097, 1, false},
                 {0, 4096, 1, true},       {8192, 2048, 512, true},  {8192, 2049, 512, false},
                 {8192, 2048, 513, false}, {8192, 1024, 1024, true}, {8192, 1025, 1024, false},
                 {8192, 30, 1024, true},   {8193, 30, 1024, false},  {8192, 30, 1025, false}};
    for (const auto& [n, k, d, inside] : cases) {
        SCOPED_TRACE(testing::Message() << n << " rows, " << k << " codes, " << d << " columns");
        EXPECT_EQ(gather_shapes::include(n, k, d), inside);
        for (const auto rule : {ema_rule::active_only, ema_rule::clamp, ema_rule::laplace}) {
            ema_params params;
            params.rule = rule;
            update_memory<float, float> memory(host_state<float>(matrix<float>(k, d)), matrix<float>(n, d),
                                               codes_t(static_cast<std::size_t>(n)), params);
            memory.params.stats = nullptr;
            const device_array<float> counts(k);
            const device_matrix<float> sums(k, d);
            const int adding = launches([&](cudaStream_t stream) {
                accumulate(memory.x.view(), memory.codes.view(), counts.view(), sums.view(), {}, {}, stream);
            });
            EXPECT_EQ(adding == 1, inside);
            EXPECT_EQ(launches([&](cudaStream_t stream) { memory.run({}, stream); }),
                      inside && rule != ema_rule::laplace ? 1 : adding + 1);
        }
    }
}

// ---- shapes ---------------------------------------------------------------------------------------------------------

TEST_F(EmaSmall, OddDimensions) {
    random_source random;
    auto params = every_rule()[6].second;  // laplace, unused_steps
    params.restart_after_steps = 1;
    for (const std::int64_t d : {1, 2, 3, 7, 31, 32, 33, 65, 127, 130})
        expect_updated(trained_state<float>(random, 11, d), random.normals<float>(70, d), skewed_codes(random, 70, 11),
                       params);
}

TEST_F(EmaSmall, OneSampleOneCodeAndACodebookLargerThanTheBatch) {
    random_source random;
    for (const auto& [name, params] : presets()) {
        SCOPED_TRACE(name);
        expect_updated(trained_state<float>(random, 1, 5), random.normals<float>(1, 5), {0}, params);
        expect_updated(trained_state<float>(random, 9, 5), random.normals<float>(1, 5), {4}, params);
        expect_updated(trained_state<float>(random, 300, 5), random.normals<float>(37, 5),
                       skewed_codes(random, 37, 300), params);
    }
}

TEST_F(EmaSmall, AnEmptyBatchIsABatchOfNoRows) {
    random_source random;
    for (const auto& [name, params] : every_rule()) {
        SCOPED_TRACE(name);
        expect_updated(trained_state<float>(random, 19, 4), matrix<float>(0, 4), {}, params);
    }
}

TEST_F(EmaTest, ManyColumns) {
    random_source random;
    for (const std::int64_t d : {768, 2050})
        expect_updated(trained_state<__half>(random, 20, d), random.normals<__half>(200, d),
                       skewed_codes(random, 200, 20), ema_params::encodec());
}

TEST_F(EmaTest, MoreCodesThanWarps) {
    random_source random;
    for (const std::int64_t k : {std::int64_t{1000}, 4 * kernel::most_ema_blocks + 77}) {
        auto params = ema_params::mimi();
        params.check_every = 1;
        auto state = trained_state<float>(random, k, 3);
        for (int step = 0; step < 2; ++step)
            state = expect_updated(state, random.normals<float>(5000, 3), skewed_codes(random, 5000, k), params);
    }
}

// ---- the cases of RecTokens' own tests ------------------------------------------------------------------------------

struct device_update {
    using fixture = gpu_test;
    static step_stats update(host_state<>& state, const matrix<float>& x, const codes_t& codes,
                             const ema_params& params) {
        update_memory<float, float> memory(state, x, codes, params);
        const device_workspace ws(memory.workspace_bytes());
        memory.run(ws.lent());
        EXPECT_TRUE(ws.guard_untouched());
        state = memory.state.download();
        return memory.stats.download()[0];
    }
};
INSTANTIATE_TYPED_TEST_SUITE_P(Small, RecTokensCases, device_update);

// ---- edges of the rules ---------------------------------------------------------------------------------------------

TEST_F(EmaSmall, DecayZeroReplacesTheStatisticsAndDecayOneKeepsThem) {
    random_source random;
    for (const double decay : {0.0, 1.0})
        for (auto [name, params] : every_rule()) {
            if (params.bias_correction && decay == 1) continue;
            SCOPED_TRACE(name + ", decay " + std::to_string(decay));
            params.decay = decay;
            params.dead_codes = dead_code_rule::none;
            const auto before = trained_state<float>(random, 23, 6);
            const auto after =
                expect_updated(before, random.integers<float>(90, 6, -5, 5), skewed_codes(random, 90, 23), params);
            if (decay == 1) {
                EXPECT_EQ(after.cluster_size, before.cluster_size);
                EXPECT_EQ(after.embed_sum.data, before.embed_sum.data);
            }
        }
}

TEST_F(EmaSmall, AStateOfZerosKeepsItsRow) {
    random_source random;
    const auto rows = random.normals<float>(12, 5);
    for (const auto& [name, params] : every_rule()) {
        if (params.dead_codes != dead_code_rule::none) continue;
        SCOPED_TRACE(name);
        auto state = host_state<float>(rows);
        for (int step = 0; step < 3; ++step)
            state = expect_updated(state, random.normals<float>(6, 5), {0, 1, 2, 0, 1, 2}, params);
        for (std::int64_t k = 3; k < 12; ++k) EXPECT_EQ(state.codebook.row(k), rows.row(k));
    }
}

TEST_F(EmaSmall, CodesWhoseCountsOrSumsAreNotFiniteAreLeftAloneAndCounted) {
    random_source random;
    for (const auto& [name, params] : every_rule()) {
        SCOPED_TRACE(name);
        const auto before = trained_state<float>(random, 20, 40);
        auto counts = std::vector<float>(20, 3);
        auto sums = random.normals<float>(20, 40);
        counts[1] = nan;
        counts[2] = inf;
        counts[3] = -1;
        sums(4, 39) = nan;
        sums(5, 0) = -inf;
        sums(6, 33) = 3e38f;  // finite, but its row is not: divided by less than 1
        auto state = before;
        state.cluster_size[6] = 0.25f;
        counts[6] = 0.25f;
        const auto replacements = random.normals<float>(9, 40);
        apply_memory<float, float> memory(state, counts, sums, replacements, params);
        memory.params.decay = 0;
        memory.run();
        const auto after = memory.state.download();
        for (std::int64_t k = 1; k <= 6; ++k) EXPECT_TRUE(same_bits(after.code(k), state.code(k))) << "code " << k;
        auto host = params;
        host.decay = 0;
        const update_judge<float> judge(state, counts, sums, replacements, host);
        EXPECT_TRUE(judge(after));
        EXPECT_TRUE(same_stats(memory.stats.download()[0], judge.stats()));
        EXPECT_EQ(judge.stats().skipped_codes, 6);
    }
}

TEST_F(EmaSmall, ARowThatTheCodebookTypeCannotHoldIsNotWritten) {
    random_source random;
    const auto before = trained_state<__half>(random, 4, 3);
    matrix<float> sums = random.normals<float>(4, 3);
    sums(2, 1) = 70000;
    ema_params params;
    params.decay = 0;
    const auto after = expect_applied(before, std::vector<float>(4, 1.0f), sums, matrix<__half>(0, 3), params);
    EXPECT_TRUE(same_bits(after.code(2), before.code(2)));
    EXPECT_FALSE(same_bits(after.code(1), before.code(1)));
}

TEST_F(EmaSmall, TheCounterOfUnusedStepsStopsAtItsLargestValue) {
    random_source random;
    auto before = trained_state<float>(random, 3, 2);
    before.steps_since_active = {std::numeric_limits<std::int32_t>::max(), 5, 7};
    const auto after = expect_updated(before, random.normals<float>(2, 2), {1, 1}, ema_params{});
    EXPECT_EQ(after.steps_since_active, (std::vector<std::int32_t>{std::numeric_limits<std::int32_t>::max(), 0, 8}));
}

TEST_F(EmaSmall, ReplacementsOfTheCallersChoice) {
    random_source random;
    const auto before = trained_state<float>(random, 8, 4);
    auto x = random.normals<float>(70, 4);
    for (std::int64_t i = 10; i < 20; ++i) x(i, i % 4) = i % 2 ? nan : inf;
    const std::vector<std::int64_t> rows{0, 69, 10, 15, -1, 70, std::numeric_limits<std::int64_t>::max(), 3};
    auto params = ema_params::vector_quantize_pytorch();
    params.min_cluster_size = 1e6f;  // all are dead
    update_memory<float, float> memory(before, x, codes_t(70, 7), params);
    const device_array<std::int64_t> indices(rows);
    memory.params.replacement_indices = vector_view<const std::int64_t>(indices.data(), indices.size());
    memory.run();
    const auto after = memory.state.download();
    params.replacement_indices = view(rows);
    EXPECT_TRUE(update_of_batch_is_right(before, x, codes_t(70, 7), params, after, memory.stats.download()[0]));
    const std::int64_t from[] = {0, 69, 20, 20, -1, -1, -1, 3};
    for (std::int64_t k = 0; k < 8; ++k)
        if (from[k] >= 0) EXPECT_EQ(after.codebook.row(k), x.row(from[k])) << "code " << k;
    EXPECT_EQ(memory.stats.download()[0].restarted_codes, 5);
}

TEST_F(EmaSmall, ADrawOnABadRowMovesOnSixtyFourStepsAtMost) {
    random_source random;
    const auto before = trained_state<float>(random, 6, 3);
    // Rows 100 .. 164 are bad: from 100 the next good one is 65 steps away, from 101 it is 64.
    auto x = random.normals<float>(200, 3);
    for (std::int64_t i = 100; i < 165; ++i) x(i, i % 3) = nan;
    // And at the end: from there it goes on at the start.
    for (std::int64_t i = 190; i < 200; ++i) x(i, 2) = inf;
    const std::vector<std::int64_t> rows{100, 101, 164, 99, 195, 165};
    auto params = ema_params::vector_quantize_pytorch();
    params.min_cluster_size = 1e6f;
    update_memory<float, float> memory(before, x, codes_t(200, -1), params);
    const device_array<std::int64_t> indices(rows);
    memory.params.replacement_indices = vector_view<const std::int64_t>(indices.data(), indices.size());
    memory.run();
    const auto after = memory.state.download();
    params.replacement_indices = view(rows);
    EXPECT_TRUE(update_of_batch_is_right(before, x, codes_t(200, -1), params, after, memory.stats.download()[0]));
    const std::int64_t from[] = {-1, 165, 165, 99, 0, 165};
    for (std::int64_t k = 1; k < 6; ++k) EXPECT_EQ(after.codebook.row(k), x.row(from[k])) << "code " << k;
    EXPECT_EQ(memory.stats.download()[0].restarted_codes, 5);
}

TEST_F(EmaSmall, WithoutAFiniteReplacementNothingRestarts) {
    random_source random;
    auto params = ema_params::vector_quantize_pytorch();
    params.min_cluster_size = 1e6f;
    const auto before = trained_state<float>(random, 6, 3);
    const std::vector<float> counts(6, 1.0f);
    const auto sums = random.normals<float>(6, 3);
    for (const std::int64_t rows : {0, 1, 200})
        expect_applied(before, counts, sums, matrix<float>(rows, 3, nan), params);
    // Finite, but not in the type of the codebook.
    expect_applied(trained_state<__half>(random, 6, 3), counts, sums, matrix<__half>(5, 3, inf), params);
}

TEST_F(EmaSmall, WithoutReplacementsWhereNoneAreNeeded) {
    random_source random;
    const auto before = trained_state<float>(random, 6, 3);
    const auto counts = std::vector<float>(6, 2.0f);
    const auto sums = random.normals<float>(6, 3);
    apply_memory<float, float> memory(before, counts, sums, matrix<float>(0, 3), {});
    ema_apply(memory.state.view(), memory.counts.view(), memory.sums.view(), discard, memory.params);
    EXPECT_TRUE(update_judge<float>(before, counts, sums, matrix<float>(0, 3), {})(memory.state.download()));
}

TEST_F(EmaSmall, DrawsDependOnSeedAndStep) {
    random_source random;
    auto params = ema_params::vector_quantize_pytorch();
    params.min_cluster_size = 1e6f;
    const auto x = random.normals<float>(1000, 2);
    const auto drawn = [&](std::uint64_t seed, std::int64_t step) {
        auto before = host_state<float>(matrix<float>(50, 2));
        before.step = step;
        params.seed = seed;
        return expect_updated(before, x, codes_t(1000, 0), params).codebook.data;
    };
    EXPECT_EQ(drawn(1, 1), drawn(1, 1));
    EXPECT_NE(drawn(1, 1), drawn(2, 1));
    EXPECT_NE(drawn(1, 1), drawn(1, 2));
    EXPECT_NE(drawn(1, 1), drawn(std::uint64_t{1} << 63, 1));
    EXPECT_NE(drawn(1, 1), drawn(1, std::int64_t{1} << 40));
}

// ---- several ranks, several micro-batches ---------------------------------------------------------------------------

/// Counts and sums of a batch in one buffer, as one all-reduce takes them: sums [K x D], then counts [K].
struct statistics_buffer {
    std::int64_t codes, columns;
    device_array<float> memory;

    statistics_buffer(std::int64_t k, std::int64_t d) : codes(k), columns(d), memory(k * (d + 1)) {}

    matrix_view<float> sums() const { return matrix_view<float>(memory.data(), codes, columns); }
    vector_view<float> counts() const { return vector_view<float>(memory.data() + codes * columns, codes); }
};

/// A batch in device memory, and the statistics of rows of it.
struct split_batch {
    device_matrix<float> x;
    device_array<std::int32_t> codes;
    std::int64_t invalid = 0;  // of all that was accumulated

    split_batch(const matrix<float>& rows, const codes_t& code_of)
        : x(rows), codes(std::vector<std::int32_t>(code_of.begin(), code_of.end())) {}

    void accumulate_rows(std::int64_t begin, std::int64_t end, const statistics_buffer& to, bool add) {
        device_array<step_stats> stats(1);
        accumulate_params params;
        params.add = add;
        params.stats = stats.data();
        accumulate(strided(x.data() + begin * x.columns(), end - begin, x.columns(), x.columns()),
                   vector_view<std::int32_t>(codes.data() + begin, end - begin), to.counts(), to.sums(), params);
        invalid += stats.download()[0].invalid_rows;
    }
};

/// Rows of a batch with some bad ones among them, and their codes.
std::pair<matrix<float>, codes_t> batch_with_bad_rows(random_source& random, std::int64_t n, std::int64_t k,
                                                      std::int64_t d) {
    auto x = random.normals<float>(n, d);
    auto codes = skewed_codes(random, n, k);
    x(n / 3, d - 1) = nan;
    codes[static_cast<std::size_t>(n / 2)] = -1;
    return {x, codes};
}

/// Ranks with a share of a batch each, against a single one with all of it.
void expect_ranks_to_agree(std::int64_t n, std::int64_t ranks) {
    constexpr std::int64_t k = 60, d = 9;
    random_source random;
    std::int64_t restarted = 0;
    for (const auto& [name, params] : every_rule()) {
        SCOPED_TRACE(testing::Message() << name << ", " << ranks << " ranks");
        const auto before = trained_state<float>(random, k, d);
        const auto [x, codes] = batch_with_bad_rows(random, n, k, d);
        update_memory<float, float> single(before, x, codes, params);
        single.run();
        const auto alone = single.state.download();
        const auto alone_stats = single.stats.download()[0];
        EXPECT_TRUE(update_of_batch_is_right(before, x, codes, params, alone, alone_stats));
        restarted += alone_stats.restarted_codes;

        split_batch batch(x, codes);
        std::vector<float> reduced(k * (d + 1));
        for (std::int64_t r = 0; r < ranks; ++r) {  // of unequal shares
            const statistics_buffer own(k, d);
            batch.accumulate_rows(n * r * r / (ranks * ranks), n * (r + 1) * (r + 1) / (ranks * ranks), own, false);
            const auto part = own.memory.download();
            for (std::size_t e = 0; e < part.size(); ++e) reduced[e] += part[e];
        }
        matrix<float> sums(k, d);
        sums.data.assign(reduced.begin(), reduced.begin() + k * d);
        const std::vector<float> counts(reduced.begin() + k * d, reduced.end());
        EXPECT_TRUE(sums_are_right(batch_sums(x, codes, k), counts, sums));
        host_state<float> first = alone;
        for (std::int64_t r = 0; r < ranks; ++r) {
            SCOPED_TRACE(testing::Message() << "rank " << r);
            // The same values, in memory, on a stream and in a workspace of the rank's own.
            apply_memory<float, float> own(before, counts, sums, x, params, r % 2 ? awkward : row_layout{});
            const device_workspace ws(own.workspace_bytes());
            const test_stream stream;
            own.run(r % 3 ? ws.lent() : workspace{}, stream);
            const auto after = own.state.download();
            auto stats = own.stats.download()[0];
            EXPECT_EQ(stats.restarted_codes, alone_stats.restarted_codes);
            if (r == 0) {
                // Judged as the single rank was: within the bound of each sum, and with its draws bit by bit. Counts
                // are integers, so that nothing else sets the two apart.
                first = after;
                stats.invalid_rows = batch.invalid;
                EXPECT_TRUE(update_of_batch_is_right(before, x, codes, params, after, stats));
                EXPECT_TRUE(same_bits(after.cluster_size, alone.cluster_size));
                EXPECT_TRUE(same_bits(after.steps_since_active, alone.steps_since_active));
            }
            EXPECT_TRUE(same_state(after, first));
        }
    }
    EXPECT_GT(restarted, 0);
}

TEST_F(EmaSmall, RanksThatShareABatchHoldTheStateOfASingleOne) {
    for (const std::int64_t ranks : {2, 3, 8}) expect_ranks_to_agree(700, ranks);
}

TEST_F(EmaTest, RanksThatShareALargeBatchHoldTheStateOfASingleOne) {
    for (const std::int64_t ranks : {2, 3, 8}) expect_ranks_to_agree(45000, ranks);
}

TEST_F(EmaTest, MicroBatchesAddUpToOneUpdate) {
    constexpr std::int64_t k = 60, d = 9;
    random_source random;
    for (const std::int64_t n : {700, 45000})
        for (const auto& [name, params] : every_rule()) {
            SCOPED_TRACE(name);
            const auto before = trained_state<float>(random, k, d);
            const auto [x, codes] = batch_with_bad_rows(random, n, k, d);
            split_batch batch(x, codes);
            const statistics_buffer sums(k, d);
            for (std::int64_t i = 0; i < 4; ++i) batch.accumulate_rows(n * i / 4, n * (i + 1) / 4, sums, i > 0);
            const device_state<float> state(before);
            device_array<step_stats> stats(1);
            auto reported = params;
            reported.stats = stats.data();
            ema_apply(state.view(), sums.counts(), sums.sums(), batch.x.view(), reported);
            auto got = stats.download()[0];
            got.invalid_rows = batch.invalid;
            EXPECT_TRUE(update_of_batch_is_right(before, x, codes, params, state.download(), got));
        }
}

// ---- outputs, workspace, refusals -----------------------------------------------------------------------------------

TEST_F(EmaSmall, WorkspaceAndStatisticsChangeNothing) {
    random_source random;
    for (const auto& [name, params] : every_rule()) {
        SCOPED_TRACE(name);
        const auto before = trained_state<float>(random, 33, 7);
        update_memory<float, float> memory(before, random.normals<float>(150, 7), skewed_codes(random, 150, 33),
                                           params);
        memory.run();
        const auto after = memory.state.download();
        const auto stats = memory.stats.download()[0];
        memory.state.upload(before);
        memory.stats.fill(poison);
        const device_workspace ws(memory.workspace_bytes());
        memory.run(ws.lent());
        EXPECT_TRUE(same_state(memory.state.download(), after));
        EXPECT_EQ(std::memcmp(memory.stats.download().data(), &stats, sizeof stats), 0);
        EXPECT_TRUE(ws.guard_untouched());
        memory.state.upload(before);
        memory.stats.fill(poison);
        memory.params.stats = nullptr;
        memory.run();
        EXPECT_TRUE(same_state(memory.state.download(), after));
        EXPECT_TRUE(memory.stats.untouched());
    }
}

TEST(EmaWorkspaceTest, IsWithinItsBound) {
    step_stats stats;  // not followed
    for (const bool reports : {false, true})
        for (const auto rule : {ema_rule::active_only, ema_rule::laplace})
            for (const std::int64_t n : {0, 1, 8192, 8193, 40000, 1 << 20, 1 << 24})
                for (const std::int64_t k : {1, 16, 1000, 1024, 1025, 2048, 16384, 65536})
                    for (const std::int64_t d : {1, 8, 64, 128, 129, 256, 1024, 5000}) {
                        ema_params params;
                        params.rule = rule;
                        if (reports) params.stats = &stats;
                        const auto bytes = static_cast<double>(ema_update_workspace_bytes({n, k, d}, params));
                        // Partial sums of a single wide code and what grows with nothing: 64 KB, as for `accumulate`.
                        EXPECT_LE(bytes, 24.0 * n + 4 * 4.0 * k * d + 65536)
                            << n << " x " << d << ", " << k << " codes";
                    }
}

TEST_F(EmaSmall, ARefusedCallNamesTheFunctionAndWritesNothing) {
    random_source random;
    const auto before = trained_state<float>(random, 10, 6);
    const auto params = ema_params::mimi();
    update_memory<float, float> update(before, random.normals<float>(20, 6), skewed_codes(random, 20, 10), params);
    apply_memory<float, float> apply(before, std::vector<float>(10, 1.0f), random.normals<float>(10, 6),
                                     random.normals<float>(20, 6), params);
    const auto refused = [&](auto& memory, const std::string& function) {
        const std::size_t bytes = memory.workspace_bytes();
        const device_workspace block(bytes + 256);
        char* data = static_cast<char*>(block.lent().data);
        for (const workspace& ws :
             {workspace{data, bytes - 1}, workspace{data, 0}, workspace{data + 16, bytes}, workspace{nullptr, bytes}}) {
            const auto text = refusal([&] { memory.run(ws); });
            EXPECT_EQ(text.rfind(function + ": workspace: ", 0), 0u) << text;
        }
        memory.params.check_every = 0;
        const auto text = refusal([&] { memory.run(); });
        EXPECT_EQ(text.rfind(function + ": params.check_every: ", 0), 0u) << text;
        EXPECT_TRUE(same_state(memory.state.download(), before));
        EXPECT_TRUE(memory.stats.untouched());
    };
    refused(update, "cuvq::ema_update");
    refused(apply, "cuvq::ema_apply");
    const auto text = refusal(
        [&] { ema_apply(apply.state.view(), apply.counts.view(), apply.sums.view(), discard, ema_params::mimi()); });
    EXPECT_EQ(text.rfind("cuvq::ema_apply: replacements: ", 0), 0u) << text;
    EXPECT_TRUE(same_state(apply.state.download(), before));
}

// ---- determinism ----------------------------------------------------------------------------------------------------

TEST_F(EmaTest, TwentyRunsAreBitwiseEqual) {
    random_source random;
    auto total = ema_params::mimi();
    total.rule = ema_rule::laplace;
    total.check_every = 1;
    auto single = ema_params::vector_quantize_pytorch();
    single.rule = ema_rule::active_only;
    single.min_cluster_size = 2;
    const struct {
        std::int64_t n, k, d;
        bool weighted;
    } cases[] = {
        {4000, 500, 24, false},    // few rows: gathered, by blocks of several codes
        {3000, 100, 20, true},     // of one code
        {3000, 300, 200, true},    // in two slices of columns
        {2000, 20, 1024, false},   // in eight
        {20000, 500, 24, false},   // many rows: sorted
        {200000, 500, 24, false},  // summed in longer runs
        {9000, 300, 128, true},    // wide rows
        {9000, 300, 130, true},    // in two slices of columns: rows are checked first
        {9000, 300, 300, false},   // in three
        {9000, 2048, 16, false},   // one digit of many bins
        {9000, 3000, 16, true},    // two digits
        {9000, 2100, 130, false},  // and two slices
    };
    for (const auto& [n, k, d, weighted] : cases) {
        SCOPED_TRACE(testing::Message() << n << " rows, " << k << " codes, " << d << " columns");
        const auto before = trained_state<float>(random, k, d);
        auto x = random.normals<float>(n, d);
        x(n / 3, d - 1) = nan;
        std::vector<float> weights;
        for (std::int64_t i = 0; i < n && weighted; ++i) weights.push_back(std::abs(random.normal()));
        for (const auto& params : {total, single})
            for (const bool one_code : {false, true}) {
                const auto codes = one_code ? codes_t(static_cast<std::size_t>(n), 17) : skewed_codes(random, n, k);
                update_memory<float, float> memory(before, x, codes, params, weights);
                const device_workspace ws(memory.workspace_bytes());
                memory.run();
                const auto after = memory.state.download();
                const auto stats = memory.stats.download()[0];
                if (k >= 100) EXPECT_GT(stats.restarted_codes, 0);  // fewer codes may all be in use
                EXPECT_GT(stats.invalid_rows, 0);
                for (int run = 1; run < 20; ++run) {
                    memory.state.upload(before);
                    memory.stats.fill(poison);
                    memory.run(run % 2 ? ws.lent() : workspace{});
                    ASSERT_TRUE(same_state(memory.state.download(), after)) << "run " << run;
                    ASSERT_EQ(std::memcmp(memory.stats.download().data(), &stats, sizeof stats), 0) << "run " << run;
                }
            }
    }
}

TEST_F(EmaTest, UpdateOfALargeBatchFollowsEveryRule) {
    random_source random;
    for (const auto& [name, params] : every_rule()) {
        SCOPED_TRACE(name);
        const auto [x, codes] = batch_with_bad_rows(random, 9000, 90, 130);
        expect_updated(trained_state<float>(random, 90, 130), x, codes, params);
    }
}

TEST_F(EmaTest, TwoStreamsAtOnce) {
    random_source random;
    const auto sequence = [](auto& memory, cudaStream_t stream, const workspace& ws) {
        for (int step = 0; step < 6; ++step) memory.run(ws, stream);
    };
    const auto expect_independent = [&](const host_state<float>& before_a, auto& a, const host_state<float>& before_b,
                                        auto& b) {
        a.state.upload(before_a);
        b.state.upload(before_b);
        sequence(a, nullptr, {});
        sequence(b, nullptr, {});
        const auto after_a = a.state.download(), after_b = b.state.download();
        const device_workspace ws(b.workspace_bytes());
        const test_stream stream_a, stream_b;
        for (int round = 0; round < 4; ++round) {
            a.state.upload(before_a);
            b.state.upload(before_b);
            sequence(a, stream_a, {});
            sequence(b, stream_b, ws.lent());
            ASSERT_TRUE(same_state(a.state.download(), after_a));
            ASSERT_TRUE(same_state(b.state.download(), after_b));
        }
    };
    const auto before_a = trained_state<float>(random, 300, 16), before_b = trained_state<float>(random, 200, 20),
               before_c = trained_state<float>(random, 5000, 12);
    update_memory<float, float> a(before_a, random.normals<float>(8000, 16), skewed_codes(random, 8000, 300),
                                  ema_params::rectokens());
    update_memory<float, float> b(before_b, random.normals<float>(9000, 20), skewed_codes(random, 9000, 200),
                                  ema_params::encodec());
    // Blocks of two updates that wait for each other.
    update_memory<float, float> c(before_c, random.normals<float>(9000, 12), skewed_codes(random, 9000, 5000),
                                  ema_params::sonnet());
    expect_independent(before_a, a, before_b, b);
    expect_independent(before_c, c, before_b, b);
}

TEST_F(EmaSmall, ReplaysOfACapturedUpdateAreSteps) {
    random_source random;
    for (const auto& [name, params] : presets()) {
        SCOPED_TRACE(name);
        const auto before = initial_state(random.normals<float>(40, 5), params);
        update_memory<float, float> memory(before, random.normals<float>(60, 5), skewed_codes(random, 60, 40), params);
        captured_graph graph([&](cudaStream_t stream) { memory.run({}, stream); });
        for (int step = 0; step < 5; ++step) graph.replay();
        const auto replayed = memory.state.download();
        memory.state.upload(before);
        for (int step = 0; step < 5; ++step) memory.run();
        EXPECT_TRUE(same_state(memory.state.download(), replayed));
        EXPECT_EQ(replayed.step, 5);
    }
}

}  // namespace
}  // namespace cuvq::test
