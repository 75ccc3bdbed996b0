// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The bytes and operations that the benchmark divides by times.
#include "bench/work.hpp"

#include <vector>

#include <gtest/gtest.h>

namespace cuvq::bench {
namespace {

constexpr cuvq::shape shape{4, 50, 3};

TEST(BenchWork, SearchAndSums) {
    EXPECT_EQ(quantize_work(shape, 2, false).flops, 2 * 4 * 50 * 3);
    EXPECT_EQ(quantize_work(shape, 2, false).bytes, 4 * 3 * 2 + 50 * 3 * 4 + 4 * 4);
    EXPECT_EQ(quantize_work(shape, 2, true).bytes, 2 * 4 * 3 * 2 + 50 * 3 * 4 + 4 * (4 + 4));
    EXPECT_EQ(accumulate_work(shape, 4).bytes, 4 * 3 * 4 + 4 * 4 + 50 * 4 + 50 * 3 * 4);
    EXPECT_EQ(accumulate_work(shape, 4).flops, 0);
}

TEST(BenchWork, AnUpdateTouchesCodesWithVectorsAndCodesThatRestart) {
    const auto params = ema_params::rectokens();
    ASSERT_EQ(params.restart_after_steps, 20);
    std::vector<double> counts(50);
    EXPECT_EQ(touched(counts, params).active, 0);
    EXPECT_EQ(touched(counts, params).restarted, 2);  // codes 19 and 39, idle for 19 steps before this one
    counts[1] = 3;
    counts[39] = 1;
    const touched_codes t = touched(counts, params);
    EXPECT_EQ(t.active, 2);
    EXPECT_EQ(t.restarted, 1);

    const double batch = 4 * 3 * 4 + 4 * 4, row = 3 * 4;
    const double active = 2 * (2 * row + row + 2 * 4 + 4);  // sum and size read and written, the rest written
    const double idle = 48 * 2 * 4, restarted = row + row + 4;
    EXPECT_EQ(ema_update_work(shape, 4, t).bytes, batch + active + idle + restarted);
    EXPECT_EQ(train_step_work(shape, 4, t).bytes, batch + active + idle + restarted + 50 * row);
    EXPECT_EQ(train_step_work(shape, 4, t).flops, 2 * 4 * 50 * 3);
}

TEST(BenchWork, FewVectorsDoNotPayForManyCodes) {
    const cuvq::shape wide{8, 65536, 256};
    std::vector<double> counts(65536);
    for (int k = 0; k < 8; ++k) counts[k] = 1;
    auto params = ema_params::rectokens();
    params.restart_after_steps = 1 << 20;  // none restarts
    const double bytes = ema_update_work(wide, 4, touched(counts, params)).bytes;
    EXPECT_LT(bytes, 4 * vector_bytes(wide, 4) + 65536 * 8 + 1000);
}

}  // namespace
}  // namespace cuvq::bench
