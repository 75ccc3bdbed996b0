// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// A kernel such as a user would write: it updates some of the codes, by a warp each, and no others.
#include <cuvq/device/ema.cuh>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <cuvq/ema.cuh>

#include "support/device.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/training.hpp"
#include "support/types.hpp"

namespace cuvq::test {
namespace {

/// Every other code, from code 1 on. outcomes[k]: 1 left alone, 2 restarted, 3 neither.
template <class T, class R>
__global__ void update_odd_codes(detail::ema_args<T, R> a, ema_params p, device::ema_step e, int* outcomes) {
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
    for (std::int64_t k = 2 * warp + 1; k < a.counts.size; k += 2 * warps) {
        const device::ema_size s = device::blended_size(a, p, e, k);
        const bool skipped = device::ema_blend(a, p, e, s, k);
        const bool restarted = !skipped && device::dead_code_refresh(a, p, e, s, k);
        if (threadIdx.x % 32 == 0) outcomes[k] = skipped ? 1 : restarted ? 2 : 3;
    }
}

template <class T, class R>
void expect_odd_codes_as_ema_apply_does(random_source& random, const ema_params& params) {
    constexpr std::int64_t k = 45, d = 37;
    const auto before = trained_state<T>(random, k, d);
    std::vector<float> counts;
    for (std::int64_t j = 0; j < k; ++j) counts.push_back(static_cast<float>(random.integer(0, 2)));
    counts[9] = -1;
    const auto sums = random.normals<float>(k, d);
    auto rows = random.normals<R>(20, d);
    rows(3, 36) = std::numeric_limits<float>::quiet_NaN();
    const device_array<float> device_counts(counts);
    const device_matrix<float> device_sums(sums);
    const device_matrix<R> replacements(rows);

    const device_state<T> whole(before), odd(before);
    device_array<step_stats> stats(1);
    ema_params reported = params;
    reported.stats = stats.data();
    ema_apply(whole.view(), device_counts.view(), device_sums.view(), replacements.view(), reported);
    const auto wanted = whole.download();

    const auto args = detail::validate_ema_apply("update_odd_codes", odd.view(), device_counts.view(),
                                                 device_sums.view(), replacements.view(), params);
    device::ema_step step;
    step.keep = static_cast<float>(params.decay);
    step.take = static_cast<float>(1.0 - params.decay);
    step.step = before.step;
    for (std::int64_t j = 0; j < k; ++j) {
        const bool blends = counts[j] > 0 || (counts[j] == 0 && params.rule != ema_rule::active_only);
        const float old = before.cluster_size[j];
        step.total += blends ? std::fma(step.keep, old, step.take * counts[j]) : old;
    }
    const device_array<int> outcomes(std::vector<int>(k, 0));
    update_odd_codes<<<1, 96>>>(args, params, step, outcomes.data());
    check(cudaGetLastError());
    const auto got = odd.download();
    const auto outcome = outcomes.download();
    EXPECT_EQ(got.step, before.step);
    EXPECT_EQ(outcome[9], 1);
    const bool sums_sizes = params.rule == ema_rule::laplace || params.dead_codes == dead_code_rule::usage_ratio;
    for (std::int64_t j = 0; j < k; ++j) {
        if (j % 2 == 0) {
            EXPECT_TRUE(same_bits(got.code(j), before.code(j))) << "code " << j;
            EXPECT_EQ(outcome[j], 0);
            continue;
        }
        // The order of the total's sum is the caller's, so what it enters may differ in the last place.
        const auto mine = got.code(j), theirs = wanted.code(j);
        EXPECT_EQ(mine.steps_since_active, theirs.steps_since_active) << "code " << j;
        if (!sums_sizes) EXPECT_TRUE(same_bits(mine, theirs)) << "code " << j;
        EXPECT_FLOAT_EQ(mine.cluster_size[0], theirs.cluster_size[0]) << "code " << j;
        for (std::int64_t c = 0; c < d; ++c) {
            EXPECT_FLOAT_EQ(mine.embed_sum.at(0, c), theirs.embed_sum.at(0, c)) << "code " << j;
            const float row = theirs.codebook.at(0, c);
            const float slack =
                std::is_same_v<T, float> ? 0x1p-22f * std::abs(row) : 0x1p-9f * std::abs(row) + 0x1p-24f;
            EXPECT_NEAR(mine.codebook.at(0, c), row, slack) << "code " << j;
        }
    }
}

class DeviceEmaSmall : public gpu_test {};

TEST_F(DeviceEmaSmall, EveryRuleOnSomeOfTheCodes) {
    random_source random;
    for (const auto& [name, params] : every_rule()) {
        SCOPED_TRACE(name);
        expect_odd_codes_as_ema_apply_does<float, float>(random, params);
        expect_odd_codes_as_ema_apply_does<__half, __half>(random, params);
    }
}

}  // namespace
}  // namespace cuvq::test
