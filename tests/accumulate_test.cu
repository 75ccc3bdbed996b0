// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/accumulate.cuh>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "support/device.cuh"
#include "support/large.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/types.hpp"

namespace cuvq::test {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

using codes_t = std::vector<std::int64_t>;

template <class Int>
std::vector<Int> as(const codes_t& codes) {
    return std::vector<Int>(codes.begin(), codes.end());
}

/// What a call leaves.
struct totals {
    std::vector<float> counts;
    matrix<float> sums;
    step_stats stats;
};

bool same(const totals& a, const totals& b) {
    return same_bits(a.counts, b.counts) && same_bits(a.sums, b.sums) &&
           std::memcmp(&a.stats, &b.stats, sizeof(step_stats)) == 0;
}

/// The memory of one accumulation.
template <class X, class Int = std::int32_t>
struct accumulate_memory {
    device_matrix<X> x;
    device_array<Int> codes;
    device_array<float> weights;
    device_array<float> counts;
    device_matrix<float> sums;
    device_array<step_stats> stats{1};
    accumulate_params params;
    shape size;

    accumulate_memory(const matrix<X>& rows, const codes_t& code_of, std::int64_t k,
                      const std::vector<float>& weight_of = {}, row_layout layout = {})
        : x(rows, layout),
          codes(as<Int>(code_of), layout.offset),
          weights(weight_of, layout.offset),
          counts(k, layout.offset),
          sums(k, rows.columns, layout),
          size{rows.rows, k, rows.columns} {
        params.stats = stats.data();
        if (!weight_of.empty()) params.weights = vector_view<const float>(weights.data(), weights.size());
    }

    void run(const workspace& ws = {}, cudaStream_t stream = nullptr) {
        accumulate(x.view(), codes.view(), counts.view(), sums.view(), params, ws, stream);
    }
    void poison_outputs() {
        counts.fill(poison);
        sums.fill(poison);
        stats.fill(poison);
    }
    totals outcome() const { return {counts.download(), sums.download(), stats.download()[0]}; }
};

template <class Int = std::int32_t, class X>
totals accumulated(const matrix<X>& x, const codes_t& codes, std::int64_t k, const std::vector<float>& weights = {},
                   row_layout layout = {}) {
    accumulate_memory<X, Int> memory(x, codes, k, weights, layout);
    const device_workspace ws(accumulate_workspace_bytes(memory.size, memory.params));
    memory.run(ws.lent());
    EXPECT_TRUE(ws.guard_untouched());
    EXPECT_TRUE(memory.sums.padding_untouched());
    return memory.outcome();
}

void expect_right(const batch_sums& right, const totals& got) {
    EXPECT_TRUE(sums_are_right(right, got.counts, got.sums));
    step_stats wanted = usage_of({got.counts.begin(), got.counts.end()});
    wanted.invalid_rows = right.invalid;
    EXPECT_TRUE(same_stats(got.stats, wanted));
}

/// An accumulation, judged. Codes that the integer type cannot tell from others are the caller's to avoid.
template <class Int = std::int32_t, class X>
totals expect_sums(const matrix<X>& x, const codes_t& codes, std::int64_t k, const std::vector<float>& weights = {},
                   row_layout layout = {}) {
    const auto got = accumulated<Int>(x, codes, k, weights, layout);
    expect_right(batch_sums(x, codes, k, weights), got);
    return got;
}

codes_t random_codes(random_source& random, std::int64_t n, std::int64_t lowest, std::int64_t highest) {
    codes_t codes;
    for (std::int64_t i = 0; i < n; ++i) codes.push_back(random.integer(lowest, highest));
    return codes;
}

std::vector<float> random_weights(random_source& random, std::int64_t n) {
    std::vector<float> weights;
    for (std::int64_t i = 0; i < n; ++i) weights.push_back(random.integer(0, 9) ? std::abs(random.normal()) : 0.0f);
    return weights;
}

class AccumulateSmall : public gpu_test {};
class AccumulateTest : public gpu_test {};
class LargeTest : public gpu_test {};

/// An accumulation by blocks that work alone, as on a card without clusters, judged.
void expect_sums_alone(const matrix<float>& x, const codes_t& codes, std::int64_t k,
                       const std::vector<float>& weights) {
    SCOPED_TRACE(testing::Message() << x.rows << " rows, " << k << " codes, D = " << x.columns);
    using alone = dispatch::gather_plan::alone;
    ASSERT_TRUE(gather_shapes::include(x.rows, k, x.columns));
    accumulate_memory<float> memory(x, codes, k, weights);
    device_array<unsigned long long> invalid(1);
    invalid.fill(0);
    const auto args = detail::validate_accumulate("test", memory.x.view(), memory.codes.view(), memory.counts.view(),
                                                  memory.sums.view(), memory.params);
    const dispatch::gather_plan plan(args, {});
    plan.launch_tile<alone>(args.sums, 0, kernel::gather<alone, float>, nullptr, args, plan.source, plan.vectors,
                            plan.checks, false, invalid.data());
    const batch_sums right(x, codes, k, weights);
    EXPECT_TRUE(sums_are_right(right, memory.counts.download(), memory.sums.download()));
    EXPECT_EQ(invalid.download()[0], static_cast<unsigned long long>(right.invalid));
}

TEST_F(AccumulateSmall, WithoutClusters) {
    random_source random;
    for (const auto& [n, k, d] : std::vector<std::array<std::int64_t, 3>>{
             {1, 1, 1}, {300, 30, 7}, {700, 1000, 33}, {300, 129, 130}, {65, 600, 300}, {40, 5, 1024}}) {
        auto x = random.normals<float>(n, d);
        x(n / 2, d / 2) = nan;
        expect_sums_alone(x, random_codes(random, n, -1, k), k, random_weights(random, n));
        expect_sums_alone(x, codes_t(static_cast<std::size_t>(n), k - 1), k, {});
    }
}

TEST_F(AccumulateTest, ManyRowsWithoutClusters) {
    random_source random;
    for (const auto& [k, d] :
         std::vector<std::array<std::int64_t, 2>>{{4096, 64}, {4096, 256}, {30, 12}, {1024, 1024}}) {
        const auto x = random.normals<float>(8192, d);
        expect_sums_alone(x, random_codes(random, 8192, 0, k - 1), k, {});
        expect_sums_alone(x, codes_t(8192, 3), k, random_weights(random, 8192));
    }
}

/// Small batches in which one code has about as many rows as a warp takes alone, or so many that all blocks of a
/// cluster share them, in runs; among them rows that are not finite, and some whose sum passes float's range on the
/// way.
TEST_F(AccumulateSmall, CodesOfFewRowsAndOfMany) {
    random_source random;
    constexpr std::int64_t k = 37, alone = dispatch::gather_plan::in_clusters::most_own_rows;
    for (const std::int64_t d : {3, 64, 67, 200})
        for (const std::int64_t rows : {alone, alone + 1, 25 * alone, 64 * alone}) {
            SCOPED_TRACE(testing::Message() << rows << " rows, D = " << d);
            auto codes = codes_t(static_cast<std::size_t>(rows), 7);
            for (const auto code : random_codes(random, 100, 8, k - 1)) codes.push_back(code);
            const auto n = static_cast<std::int64_t>(codes.size());
            auto x = random.normals<float>(n, d);
            expect_sums(x, codes, k);
            EXPECT_TRUE(same(accumulated(x, codes, k, {}, awkward), accumulated(x, codes, k)));
            x(0, d - 1) = x(rows / 2, 0) = x(rows - 1, d / 2) = x(n - 1, 0) = nan;
            for (std::int64_t i = 1; i < 9; ++i) x(i, 1) = i < 5 ? 3e38f : -3e38f;
            expect_sums(x, codes, k);
            EXPECT_TRUE(same(accumulated(x, codes, k, {}, awkward), accumulated(x, codes, k)));
            for (std::int64_t i = 1; i < 9; ++i) x(i, 1) = 1;
            for (std::int64_t i = n - 1; i > 0; --i) std::swap(codes[i], codes[random.integer(0, i)]);
            expect_sums(x, codes, k);
        }
}

/// Blocks of several codes, of some of which a warp sums the rows and of others the cluster, in slices of the columns;
/// a code of each kind has no finite row, another few.
TEST_F(AccumulateSmall, CodesOfFewRowsAndOfManyInBlocksOfSeveral) {
    random_source random;
    constexpr std::int64_t most = dispatch::gather_plan::in_clusters::most_own_rows;
    for (const auto& [k, d] :
         std::vector<std::array<std::int64_t, 2>>{{1100, 200}, {1100, 64}, {1024, 128}, {300, 259}}) {
        SCOPED_TRACE(testing::Message() << "K = " << k << ", D = " << d);
        auto codes = random_codes(random, 1500, 40, k - 1);
        for (std::int64_t code = 30; code < 40; ++code) codes.resize(codes.size() + most - 35 + code, code);
        for (const std::int64_t code : {3, 11}) codes.resize(codes.size() + most - code, code);
        for (const std::int64_t code : {16, 17, 271}) codes.resize(codes.size() + 9 * most, code);
        for (std::size_t i = codes.size() - 1; i > 0; --i)
            std::swap(codes[i], codes[random.integer(0, static_cast<std::int64_t>(i))]);
        const auto n = static_cast<std::int64_t>(codes.size());
        auto x = random.normals<float>(n, d);
        expect_sums(x, codes, k);
        const auto weights = random_weights(random, n);
        expect_sums(x, codes, k, weights);
        for (std::int64_t i = 0; i < n; ++i)
            if (codes[i] == 3 || codes[i] == 16 || ((codes[i] == 11 || codes[i] == 17) && i % 7 != 0))
                x(i, random.integer(0, d - 1)) = i % 2 == 0 ? nan : inf;
        EXPECT_TRUE(same(expect_sums(x, codes, k, {}, awkward), accumulated(x, codes, k)));
        EXPECT_TRUE(same(expect_sums(x, codes, k, weights, awkward), accumulated(x, codes, k, weights)));
    }
}

// ---- element and code types -----------------------------------------------------------------------------------------

template <class T>
class AccumulateTypesSmall : public gpu_test {};
TYPED_TEST_SUITE(AccumulateTypesSmall, element_types, type_names);

TYPED_TEST(AccumulateTypesSmall, WithBadCodesNanRowsAndBadWeights) {
    random_source random;
    for (const std::int64_t d : {1, 7, 33, 130}) {
        auto x = random.normals<TypeParam>(300, d);
        const auto codes = random_codes(random, 300, -2, 38);
        auto weights = random_weights(random, 300);
        const float bad[] = {nan, inf, -inf};
        for (int j = 0; j < 15; ++j) {
            x(20 * j, (3 * j) % d) = bad[j % 3];
            weights[7 * j + 1] = j % 4 == 3 ? -1.0f : bad[j % 3];
        }
        expect_sums(x, codes, 37);
        expect_sums(x, codes, 37, weights);
        EXPECT_TRUE(same(expect_sums(x, codes, 37, weights, awkward), accumulated(x, codes, 37, weights)));
    }
}

TYPED_TEST(AccumulateTypesSmall, ManyRowsWithBadCodesNanRowsAndBadWeights) {
    random_source random;
    constexpr std::int64_t n = gather_shapes::most_rows + 300;
    for (const std::int64_t d : {3, 64, 130, 300}) {
        auto x = random.normals<TypeParam>(n, d);
        const auto codes = random_codes(random, n, -2, 402);
        auto weights = random_weights(random, n);
        const float bad[] = {nan, inf, -inf};
        for (int j = 0; j < 99; ++j) {
            x(80 * j, (3 * j) % d) = bad[j % 3];
            weights[71 * j + 1] = j % 4 == 3 ? -1.0f : bad[j % 3];
        }
        expect_sums(x, codes, 401);
        EXPECT_TRUE(same(expect_sums(x, codes, 401, weights, awkward), accumulated(x, codes, 401, weights)));
    }
}

/// Rows, half of whose codes begin and end with rows that are not finite, or have no others.
template <class X>
void expect_sums_without_bad_ends(random_source& random, std::int64_t n, std::int64_t d, std::int64_t k) {
    SCOPED_TRACE(testing::Message() << n << " rows, D = " << d << ", " << k << " codes");
    auto x = random.normals<X>(n, d);
    const auto codes = random_codes(random, n, -1, k);
    const auto weights = random_weights(random, n);
    std::vector<std::int64_t> first(static_cast<std::size_t>(k), -1), last(first);
    for (std::int64_t i = 0; i < n; ++i) {
        if (codes[i] < 0 || codes[i] >= k) continue;
        if (first[codes[i]] < 0) first[codes[i]] = i;
        last[codes[i]] = i;
        if (codes[i] % 8 == 6) x(i, random.integer(0, d - 1)) = i % 2 == 0 ? nan : -inf;
    }
    for (std::int64_t code = 0; code < k; ++code)
        if (first[code] >= 0 && code % 2 == 0)
            x(first[code], random.integer(0, d - 1)) = x(last[code], random.integer(0, d - 1)) = code % 4 ? nan : inf;
    EXPECT_TRUE(same(expect_sums(x, codes, k), accumulated(x, codes, k)));
    EXPECT_TRUE(same(expect_sums(x, codes, k, weights, awkward), accumulated(x, codes, k, weights)));
}

TYPED_TEST(AccumulateTypesSmall, NarrowRowsWithNanRowsAtTheEndsOfCodes) {
    random_source random;
    constexpr std::int64_t n = gather_shapes::most_rows + 8;
    for (const std::int64_t d : {1, 8, 64})
        for (const std::int64_t k : {1, 60, 9000}) expect_sums_without_bad_ends<TypeParam>(random, n, d, k);
    // More rows for a warp than one group of its lanes takes.
    constexpr std::int64_t many = 5 * sum_tile::least_rows * sum_tile::wanted_blocks;
    expect_sums_without_bad_ends<TypeParam>(random, many, 3, 700);
}

template <class Int>
class AccumulateCodesSmall : public gpu_test {};
TYPED_TEST_SUITE(AccumulateCodesSmall, code_types, type_names);

TYPED_TEST(AccumulateCodesSmall, CodesOutsideTheCodebookAreLeftOut) {
    using limits = std::numeric_limits<TypeParam>;
    random_source random;
    const auto x = random.normals<float>(120, 5);
    auto codes = random_codes(random, 120, 0, 99);
    const std::int64_t top =
        sizeof(TypeParam) == 8 ? limits::max() : static_cast<std::int64_t>(limits::max());  // as int64
    for (const std::int64_t i : {0, 50, 119}) codes[i] = 100;
    for (const std::int64_t i : {1, 51, 118}) codes[i] = top;
    for (const std::int64_t i : {2, 52, 117}) codes[i] = static_cast<std::int64_t>(limits::lowest());
    if (std::is_signed_v<TypeParam>) codes[3] = -1;
    const auto got = expect_sums<TypeParam>(x, codes, 100);
    EXPECT_EQ(got.stats.invalid_rows, std::is_signed_v<TypeParam> ? 10 : 6);
    EXPECT_TRUE(same(expect_sums<TypeParam>(x, codes, 100, {}, awkward), got));
}

// ---- shapes ---------------------------------------------------------------------------------------------------------

/// Codes with so many rows each, in random order; integer data, so that every sum is exact.
void expect_exact_sums(random_source& random, const std::vector<std::int64_t>& rows_of_codes, std::int64_t columns) {
    codes_t codes;
    for (std::size_t k = 0; k < rows_of_codes.size(); ++k)
        codes.insert(codes.end(), static_cast<std::size_t>(rows_of_codes[k]), static_cast<std::int64_t>(k));
    for (std::size_t i = codes.size(); i > 1; --i)
        std::swap(codes[i - 1], codes[random.integer(0, static_cast<std::int64_t>(i) - 1)]);
    const auto n = static_cast<std::int64_t>(codes.size()), k = static_cast<std::int64_t>(rows_of_codes.size());
    const auto x = random.integers<float>(n, columns, -9, 9);
    const batch_sums right(x, codes, k);
    const auto got = expect_sums(x, codes, k);
    for (std::size_t e = 0; e < right.sums.size(); ++e) ASSERT_EQ(got.sums.data[e], right.sums[e]) << "element " << e;
}

TEST_F(AccumulateTest, CodesThatEndAtAndAroundTheEndsOfRuns) {
    random_source random;
    // A code with many rows first, so that the batch is none of the small ones, and many without, so that the workspace
    // has room for the shortest runs.
    constexpr std::int64_t run = sum_tile::least_rows, many = 132 * run, empty_codes = 400;
    ASSERT_FALSE(gather_shapes::include(many, 10, 3));
    ASSERT_EQ(sum_tile::rows(many + 12 * run, empty_codes, 150), run);
    for (const std::int64_t d : {3, 40, 150}) {
        const std::vector<std::vector<std::int64_t>> cases{
            {run},
            {run - 1},
            {run + 1},
            {run, run},
            {run, 1},
            {1, run},
            {run - 1, 1, run},
            {run - 1, 2, run - 1},
            {run + 1, run - 1},
            {0, run, 0, run, 0},
            {1, run - 1, run, 1},
            {2 * run},
            {2 * run + 1},
            {1, 2 * run - 1},
            {1, 2 * run - 2, 1},
            {1, 2 * run, 1},
            {5, 3 * run + 7, 0, 2, run - 14, 4 * run, 1},
            {7 * run + 3},
            {0, 0, 11 * run, 0},
        };
        for (auto rows : cases) {
            rows.insert(rows.begin(), many);
            rows.resize(rows.size() + empty_codes);
            expect_exact_sums(random, rows, d);
        }
    }
}

TEST_F(AccumulateTest, NarrowRowsByAllGroupsOfAWarp) {
    random_source random;
    for (const std::int64_t d : {1, 3, 4, 5, 8, 13, 16, 31, 32, 33, 48, 64}) {
        SCOPED_TRACE(testing::Message() << "D = " << d);
        // Every group has a batch of rows, or two, but the last of a warp.
        const std::int64_t groups = 32 / sum_tile::lanes(d);
        const std::int64_t run = sum_tile::least_rows * (d % 2 == 0 ? groups : 2 * groups - 1);
        const std::int64_t n = run * sum_tile::wanted_blocks + 99;
        ASSERT_EQ(sum_tile::rows(n, n, d), run);
        const auto rest_to = [&](std::vector<std::int64_t> rows) {
            rows.push_back(n - std::accumulate(rows.begin(), rows.end(), std::int64_t{0}));
            return rows;
        };
        expect_exact_sums(random, std::vector<std::int64_t>(40, n / 40), d);
        expect_exact_sums(random, {0, n, 0}, d);
        std::vector<std::int64_t> zipf, few, ends;
        for (std::int64_t k = 0; k < 300; ++k) zipf.push_back(n / ((k + 1) * (k + 2)));
        expect_exact_sums(random, rest_to(zipf), d);
        for (std::int64_t k = 0; k < 30000; ++k) few.push_back(random.integer(0, 2));
        expect_exact_sums(random, rest_to(few), d);
        // Over groups, warps and runs, and to their ends and not quite.
        for (const std::int64_t whole : {std::int64_t{8}, std::int64_t{16}, run / 8, run, 3 * run, run / 8 - 8})
            for (const std::int64_t more : {0, 1, -1, 0, 5, -5}) ends.push_back(whole + more);
        expect_exact_sums(random, rest_to(ends), d);
    }
}

TEST_F(AccumulateTest, NarrowRowsWithNanRowsAtTheEndsOfCodes) {
    random_source random;
    for (const std::int64_t d : {1, 4, 7, 16, 30, 64})
        for (const std::int64_t k : {3, 1000, 60000}) {
            const std::int64_t n = 16 / sum_tile::lanes(d) * sum_tile::least_rows * sum_tile::wanted_blocks + 20000;
            expect_sums_without_bad_ends<float>(random, n, d, k);
        }
    expect_sums_without_bad_ends<__half>(random, 200000, 10, 900);
    expect_sums_without_bad_ends<__nv_bfloat16>(random, 200000, 12, 900);
}

TEST_F(AccumulateTest, RowsLeftOutAroundTheEndsOfRuns) {
    random_source random;
    constexpr std::int64_t d = 3, many = gather_shapes::most_rows + 1;
    for (const std::int64_t valid : {0, 1, 63, 64, 65, 127, 128, 129})
        for (const std::int64_t invalid : {0, 1, 63, 64, 65}) {
            auto codes = random_codes(random, valid, 0, 1);
            codes.insert(codes.end(), static_cast<std::size_t>(invalid), -1);
            std::reverse(codes.begin(), codes.end());
            expect_sums(random.normals<float>(valid + invalid, d), codes, 2);
            codes.resize(codes.size() + many, 2);
            expect_sums(random.normals<float>(valid + invalid + many, d), codes, 300);
        }
}

TEST_F(AccumulateSmall, AHeavyRowThatIsNotFiniteLeavesNothingOfItsWeight) {
    for (const std::int64_t n : {3, 9000})  // the rest belongs to another code
        for (const std::int64_t d : {1, 5, 200})
            for (const auto& [heavy, light] : {std::pair{1e30f, 1.0f}, std::pair{0x1p54f, 0.5f}}) {
                const auto x = matrix<float>::generate(n, d, [](auto i, auto) { return i < 2 ? nan : 1.0f; });
                codes_t codes(static_cast<std::size_t>(n), 1);
                codes[0] = codes[1] = codes[2] = 0;
                std::vector<float> weights(static_cast<std::size_t>(n), light);
                weights[0] = heavy;
                weights[1] = 1;
                const auto got = expect_sums(x, codes, 2, weights);
                EXPECT_EQ(got.counts[0], light) << n << " rows, D = " << d;
            }
}

TEST_F(AccumulateSmall, DimensionsOneToAHundredAndThirty) {
    random_source random;
    for (std::int64_t d = 1; d <= 130; ++d)
        expect_sums(random.normals<float>(190, d), random_codes(random, 190, 0, 10), 11);
}

TEST_F(AccumulateSmall, AnOverflowOnTheWayIsNone) {
    // Any eight in a row overflow float, and so do the first and the second half; all together they are finite.
    for (const std::int64_t half : {3 * sum_tile::least_rows, 90 * sum_tile::least_rows}) {
        matrix<float> x(2 * half, 1);
        for (std::int64_t i = 0; i < 2 * half; ++i) x.data[i] = i < half ? 3e38f : -3e38f;
        x.data[0] = 1e38f;
        accumulate_memory<float> memory(x, std::vector<std::int64_t>(static_cast<std::size_t>(2 * half), 1), 3);
        memory.run();
        const auto got = memory.outcome();
        EXPECT_EQ(got.counts[1], static_cast<float>(2 * half));
        EXPECT_FLOAT_EQ(got.sums.data[1], -2e38f);
    }
}

TEST_F(AccumulateSmall, WithoutRowsCountsAndSumsAreZeroOrStay) {
    accumulate_memory<float> memory(matrix<float>(0, 140), {}, 9);
    memory.run();
    auto got = memory.outcome();
    EXPECT_EQ(got.counts, std::vector<float>(9));
    EXPECT_EQ(got.sums.data, std::vector<float>(9 * 140));
    EXPECT_TRUE(same_stats(got.stats, {}));
    memory.poison_outputs();
    memory.params.add = true;
    memory.run();
    EXPECT_TRUE(memory.counts.untouched());
    EXPECT_TRUE(memory.sums.untouched());
}

TEST_F(AccumulateSmall, OneRowOneCodeAndMoreCodesThanRows) {
    random_source random;
    expect_sums(random.normals<float>(1, 6), {0}, 1);
    expect_sums(random.normals<float>(1, 6), {3}, 5);
    expect_sums(random.normals<float>(1, 6), {-1}, 5);
    expect_sums(random.normals<float>(10, 6), random_codes(random, 10, 0, 699), 700);
    expect_sums(random.normals<float>(500, 6), codes_t(500, 0), 1);
}

TEST_F(AccumulateTest, ManyColumns) {
    random_source random;
    for (const std::int64_t d : {768, 2050}) {
        expect_sums(random.normals<float>(5000, d), random_codes(random, 5000, 0, 2), 3);
        expect_sums(random.normals<__half>(300, d), random_codes(random, 300, -1, 20), 20, random_weights(random, 300),
                    awkward);
    }
}

TEST_F(AccumulateTest, EveryRowOnOneCode) {
    random_source random;
    for (const std::int64_t d : {1, 24, 130})
        expect_sums(random.normals<float>(100000, d), codes_t(100000, 3), 1000, random_weights(random, 100000));
}

TEST_F(AccumulateTest, SomeTilesOfRowsForEachBlockThatSorts) {
    random_source random;
    constexpr std::int64_t n = 1500000;  // two tiles, the second not full
    for (const std::int64_t k : {600, 1023, 1500, 1 << 16})
        expect_sums(random.normals<float>(n, 1), random_codes(random, n, -3, k), k);
    expect_sums(random.normals<float>(n, 1), codes_t(n, 598), 600);
}

TEST_F(AccumulateTest, NumbersOfCodesAroundTheBinsOfASortingPass) {
    random_source random;
    for (const std::int64_t k : {1023, 1024, 1025, 2047, 2048, 2049, 65535, 65536, 65537, (1 << 22) + 1})
        for (const std::int64_t n : {700, 9000}) {
            auto codes = random_codes(random, n, 0, k - 1);
            codes[5] = codes[n - 7] = k - 1;
            codes[6] = codes[n - 8] = 0;
            codes[7] = k;
            expect_sums(random.normals<float>(n, 2), codes, k);
        }
}

TEST_F(AccumulateTest, CodesThatDifferInOneDigitOnly) {
    random_source random;
    constexpr std::int64_t k = 1 << 16, n = 5000;
    for (const std::int64_t step : {1, 256}) {
        codes_t codes;
        for (std::int64_t i = 0; i < n; ++i) codes.push_back(7 + step * random.integer(0, 200));
        expect_sums(random.normals<float>(n, 3), codes, k);
    }
}

TEST_F(AccumulateTest, RowsOfNanAmongThoseOfALargeBatch) {
    random_source random;
    for (const std::int64_t d : {64, 128, 192}) {
        auto x = random.normals<float>(40000, d);
        for (int j = 0; j < 900; ++j) x(random.integer(0, 39999), random.integer(0, d - 1)) = j % 2 ? nan : -inf;
        for (int i = 20000; i < 20100; ++i) x(i, d - 1) = inf;  // whole batches of rows that are summed together
        expect_sums(x, random_codes(random, 40000, 0, 19), 20);
        codes_t in_order;
        for (std::int64_t i = 0; i < 40000; ++i) in_order.push_back(i / 100);
        expect_sums(x, in_order, 400, random_weights(random, 40000));
    }
}

TEST_F(AccumulateTest, CodesOfAZipfDistribution) {
    random_source random;
    codes_t codes;
    for (int i = 0; i < 60000; ++i)  // P(code >= k) falls as 1 / (k + 1)
        codes.push_back(std::min<std::int64_t>(999, 1000000 / random.integer(1, 1000000) - 1));
    expect_sums(random.normals<float>(60000, 20), codes, 1000);
}

// ---- accuracy -------------------------------------------------------------------------------------------------------

TEST_F(AccumulateTest, EqualRowsWhoseRoundingErrorsAllPointTheSameWay) {
    // Adding one value again and again rounds the same way each time; each column repeats another value.
    random_source random;
    for (const std::int64_t d : {30, 128, 768, 2050}) {
        const auto values = matrix<float>::generate(1, d, [&](auto, auto) { return 1.0f + std::abs(random.normal()); });
        for (const std::int64_t n : {64, 512, 8192, 20000}) {
            const auto x = matrix<float>::generate(n, d, [&](auto, auto column) { return values.at(0, column); });
            expect_sums(x, codes_t(static_cast<std::size_t>(n), 0), 1);
        }
    }
}

TEST_F(AccumulateTest, CountsBeyondTheIntegersOfFloatAreRoundedOnce) {
    constexpr std::int64_t n = (1 << 24) + 3;
    const device_array<__half> x(std::vector<__half>{__half(0.5f)});
    device_array<std::uint8_t> codes(n + 7);
    codes.fill(0);
    check(cudaMemset(codes.data() + 1000, 1, 7));
    device_array<float> counts(2);
    device_matrix<float> sums(2, 1);
    accumulate(strided<const __half>(x.data(), n + 7, 1, 0), codes.view(), counts.view(), sums.view());
    EXPECT_EQ(counts.download(), (std::vector<float>{16777220.0f, 7.0f}));
    EXPECT_EQ(sums.download().data, (std::vector<float>{8388609.5f, 3.5f}));
}

TEST_F(AccumulateSmall, SumsThatOverflowAreInf) {
    const auto got = accumulated(matrix<float>{{3e38f, 1}, {3e38f, 2}, {-3e38f, 3}}, {0, 0, 1}, 2);
    EXPECT_EQ(got.sums.data, (std::vector<float>{inf, 3, -3e38f, 3}));
    EXPECT_EQ(got.counts, (std::vector<float>{2, 1}));
}

TEST_F(AccumulateSmall, SubnormalAndHugeValues) {
    random_source random;
    auto x = random.normals<float>(200, 6);
    for (std::int64_t i = 0; i < 200; ++i)
        for (std::int64_t d = 0; d < 6; ++d) x(i, d) *= d < 3 ? 0x1p-140f : 1e36f;
    expect_sums(x, random_codes(random, 200, 0, 3), 4);
}

// ---- add ------------------------------------------------------------------------------------------------------------

TEST_F(AccumulateSmall, MicroBatchesAddUpToTheWholeBatch) {
    random_source random;
    const auto x = random.integers<float>(400, 9, -9, 9);
    const auto codes = random_codes(random, 400, -1, 14);  // code 15 gets nothing
    const auto whole = expect_sums(x, codes, 16);
    accumulate_memory<float> memory(x, codes, 16);
    std::int64_t invalid = 0;
    for (std::int64_t first = 0; first < 400; first += 100) {
        memory.params.add = first > 0;
        accumulate(strided(memory.x.data() + first * 9, 100, 9, 9),
                   vector_view<std::int32_t>(memory.codes.data() + first, 100), memory.counts.view(),
                   memory.sums.view(), memory.params);
        invalid += memory.stats.download()[0].invalid_rows;
    }
    const auto got = memory.outcome();
    EXPECT_TRUE(same_bits(got.counts, whole.counts));
    EXPECT_EQ(got.sums.data, whole.sums.data);  // up to the sign of zeros
    EXPECT_EQ(invalid, whole.stats.invalid_rows);
    EXPECT_EQ(got.stats.perplexity, whole.stats.perplexity);
    EXPECT_EQ(got.stats.active_codes, whole.stats.active_codes);
}

TEST_F(AccumulateSmall, AddKeepsWhatWasThere) {
    random_source random;
    const auto x = random.normals<float>(300, 5);
    const auto codes = random_codes(random, 300, 0, 3);
    const auto old_counts = std::vector<float>{0.5f, 100, 0, 7, 3};
    const auto old_sums = random.normals<float>(5, 5);
    accumulate_memory<float> memory(x, codes, 5);
    memory.counts.upload(old_counts);
    memory.sums.upload(old_sums);
    memory.params.add = true;
    memory.run();
    batch_sums right(x, codes, 5);
    for (std::size_t k = 0; k < 5; ++k) right.counts[k] += old_counts[k];
    for (std::size_t e = 0; e < 25; ++e) {
        right.sums[e] += old_sums.data[e];
        right.magnitude[e] += std::abs(old_sums.data[e]);
    }
    const auto got = memory.outcome();
    expect_right(right, got);
    EXPECT_EQ(got.counts[4], 3);
    EXPECT_EQ(got.sums.row(4), old_sums.row(4));
}

// ---- workspace and refusals -----------------------------------------------------------------------------------------

TEST_F(AccumulateSmall, AWorkspaceLentOrAllocatedGivesTheSame) {
    random_source random;
    accumulate_memory<float> memory(random.normals<float>(300, 6), random_codes(random, 300, -1, 20), 20);
    memory.run();
    const auto allocated = memory.outcome();
    memory.poison_outputs();
    const device_workspace ws(accumulate_workspace_bytes(memory.size, memory.params));
    memory.run(ws.lent());
    EXPECT_TRUE(same(memory.outcome(), allocated));
    EXPECT_TRUE(ws.guard_untouched());
    memory.poison_outputs();
    memory.params.stats = nullptr;
    memory.run(ws.lent());
    EXPECT_TRUE(same_bits(memory.outcome().counts, allocated.counts));
    EXPECT_TRUE(same_bits(memory.outcome().sums, allocated.sums));
    EXPECT_TRUE(memory.stats.untouched());
}

TEST_F(AccumulateSmall, ARefusedCallNamesTheFunctionAndWritesNothing) {
    random_source random;
    accumulate_memory<float> memory(random.normals<float>(20, 6), random_codes(random, 20, 0, 9), 10);
    const std::size_t bytes = accumulate_workspace_bytes(memory.size, memory.params);
    const device_workspace block(bytes + 256);
    char* data = static_cast<char*>(block.lent().data);
    for (const workspace& ws :
         {workspace{data, bytes - 1}, workspace{data, 0}, workspace{data + 8, bytes}, workspace{nullptr, bytes}}) {
        const auto text = refusal([&] { memory.run(ws); });
        EXPECT_EQ(text.rfind("cuvq::accumulate: workspace: ", 0), 0u) << text;
    }
    memory.params.weights = vector_view<const float>(memory.x.data(), 19);
    const auto text = refusal([&] { memory.run(); });
    EXPECT_EQ(text.rfind("cuvq::accumulate: params.weights: ", 0), 0u) << text;
    EXPECT_TRUE(memory.counts.untouched());
    EXPECT_TRUE(memory.sums.untouched());
    EXPECT_TRUE(memory.stats.untouched());
}

// ---- determinism ----------------------------------------------------------------------------------------------------

/// Twenty accumulations of a batch.
void expect_equal_runs(const matrix<float>& x, const codes_t& codes, std::int64_t k,
                       const std::vector<float>& weights) {
    SCOPED_TRACE(testing::Message() << x.rows << " rows, " << k << " codes, " << x.columns << " columns");
    accumulate_memory<float> memory(x, codes, k, weights);
    const device_workspace ws(accumulate_workspace_bytes(memory.size, memory.params));
    memory.run(ws.lent());
    const auto first = memory.outcome();
    for (int run = 1; run < 20; ++run) {
        memory.poison_outputs();
        memory.run(ws.lent());
        ASSERT_TRUE(same(memory.outcome(), first)) << "run " << run;
    }
}

TEST_F(AccumulateTest, TwentyRunsAreBitwiseEqual) {
    random_source random;
    for (const std::int64_t n : {3000, 30000, 300000}) {
        const auto x = random.normals<float>(n, 40);
        const auto weights = random_weights(random, n);
        codes_t zipf;
        for (std::int64_t i = 0; i < n; ++i)
            zipf.push_back(std::min<std::int64_t>(128, 1000000 / random.integer(1, 1000000) - 1));
        for (const auto& codes : {random_codes(random, n, -3, 130), zipf, codes_t(static_cast<std::size_t>(n), 5)})
            expect_equal_runs(x, codes, 128, weights);
    }
}

TEST_F(AccumulateTest, TwentyRunsOfEveryKindOfShapeAreBitwiseEqual) {
    random_source random;
    const struct {
        std::int64_t n, k, d;
    } cases[] = {
        {8192, 1000, 40},   // few rows: gathered, by blocks of several codes
        {3000, 300, 200},   // in two slices of columns
        {2000, 20, 1024},   // in eight
        {30000, 300, 3},    // many rows: sorted; several to a warp
        {9000, 300, 128},   // wide ones
        {9000, 300, 300},   // in three slices: rows are checked first
        {9000, 2048, 16},   // one digit of many bins
        {9000, 3000, 16},   // two digits
        {9000, 2100, 130},  // and two slices
        {9000, 1, 20},      // a single code
    };
    for (const auto& [n, k, d] : cases) {
        auto x = random.normals<float>(n, d);
        x(n / 3, d - 1) = nan;
        const auto codes = random_codes(random, n, -1, k);
        expect_equal_runs(x, codes, k, {});
        expect_equal_runs(x, codes, k, random_weights(random, n));
    }
}

TEST_F(AccumulateTest, SmallBatchesOfManyCodesAndOfFewAtTheEdgesOfTheOneLaunch) {
    random_source random;
    for (const std::int64_t d : {5, 128, 129, 1024, 1025})
        for (const std::int64_t k : {1, 7, 129, 513})
            expect_sums(random.normals<float>(600, d), random_codes(random, 600, -1, k), k);
    for (const std::int64_t n : {1024, 1025, 8191, 8192, 8193})
        expect_sums(random.normals<float>(n, 6), random_codes(random, n, -1, 300), 300, random_weights(random, n));
    for (const std::int64_t k : {4096, 4097}) {
        EXPECT_EQ(gather_shapes::include(5000, k, 12), k == 4096);
        expect_sums(random.normals<float>(5000, 12), random_codes(random, 5000, -1, k), k);
    }
}

TEST_F(AccumulateTest, BadRowsOfWideSmallBatches) {
    // Rows that no block sees as a whole: single ones, all of a code, and all that one block has of a code of many.
    random_source random;
    for (const std::int64_t d : {130, 300})
        for (const std::int64_t k : {3, 64, 300})
            for (const std::int64_t most : {20, 1500, 2900}) {
                SCOPED_TRACE(testing::Message() << d << " columns, " << k << " codes, " << most << " of one");
                constexpr std::int64_t n = 3000;
                auto x = random.normals<float>(n, d);
                auto codes = random_codes(random, n, -1, k);
                for (std::int64_t i = 50; i < 50 + most; ++i) codes[i] = 2;
                for (std::int64_t i = 0; i < n; ++i) {
                    const bool bad =
                        codes[i] == 1 || (i >= 50 + most / 4 && i < 50 + most * 3 / 4) || random.integer(0, 30) == 0;
                    if (bad) x(i, random.integer(0, d - 1)) = i % 2 == 0 ? nan : inf;
                }
                expect_sums(x, codes, k);
                expect_sums(x, codes, k, random_weights(random, n), awkward);
            }
}

TEST_F(AccumulateTest, WorkspaceIsWithinItsBound) {
    for (const std::int64_t n : {0, 1, 8192, 8193, 40000, 1 << 20, 1 << 24})
        for (const std::int64_t k : {1, 16, 1000, 1024, 1025, 2048, 16384, 65536})
            for (const std::int64_t d : {1, 8, 64, 128, 129, 256, 1024, 5000}) {
                const auto bytes = static_cast<double>(accumulate_workspace_bytes({n, k, d}));
                EXPECT_LE(bytes, 24.0 * n + 4 * 4.0 * k * d + 65536) << n << " x " << d << ", " << k << " codes";
            }
}

TEST_F(AccumulateTest, TwoStreamsAtOnce) {
    random_source random;
    accumulate_memory<float> a(random.normals<float>(20000, 32), random_codes(random, 20000, 0, 99), 100);
    accumulate_memory<__half> b(random.normals<__half>(30000, 16), random_codes(random, 30000, 0, 9), 300);
    a.run();
    b.run();
    const auto alone_a = a.outcome(), alone_b = b.outcome();
    const device_workspace ws_a(accumulate_workspace_bytes(a.size, a.params));
    const test_stream stream_a, stream_b;
    for (int round = 0; round < 5; ++round) {
        a.poison_outputs();
        b.poison_outputs();
        for (int run = 0; run < 4; ++run) {
            a.run(ws_a.lent(), stream_a);
            b.run({}, stream_b);
        }
        ASSERT_TRUE(same(a.outcome(), alone_a));
        ASSERT_TRUE(same(b.outcome(), alone_b));
    }
}

TEST_F(AccumulateSmall, CapturedInAGraph) {
    random_source random;
    accumulate_memory<float> memory(random.normals<float>(500, 9), random_codes(random, 500, 0, 7), 9);
    const device_workspace ws(accumulate_workspace_bytes(memory.size, memory.params));
    for (const workspace& lent : {workspace{}, ws.lent()}) {
        captured_graph graph([&](cudaStream_t stream) { memory.run(lent, stream); });
        for (int replay = 0; replay < 3; ++replay) {
            const auto x = random.normals<float>(500, 9);
            const auto codes = random_codes(random, 500, -1, 9);
            memory.x.upload(x);
            memory.codes.upload(as<std::int32_t>(codes));
            memory.poison_outputs();
            graph.replay();
            const auto replayed = memory.outcome();
            expect_right(batch_sums(x, codes, 9), replayed);
            memory.poison_outputs();
            memory.run(lent);
            EXPECT_TRUE(same(memory.outcome(), replayed));
        }
    }
}

// ---- beyond 2^31 ----------------------------------------------------------------------------------------------------

TEST_F(LargeTest, MoreThan2To31ElementsOfX) {
    constexpr std::int64_t columns = 64, edge = (std::int64_t{1} << 31) / columns, n = edge + 1000;
    const shape size{n, 5, columns};
    if (!has_free_memory(n * (columns * sizeof(__half) + 1) + accumulate_workspace_bytes(size) + (1 << 30)))
        GTEST_SKIP() << "too little device memory for " << n << " x " << columns << " halves";
    const auto x = pattern_array<__half>(n * columns, 11);
    // Windows of rows with a code; the rest have none.
    device_array<std::uint8_t> codes(n);
    codes.fill(0xFF);
    batch_sums right(matrix<float>(0, columns), {}, 5);
    right.invalid = n;
    for (const std::int64_t first : {std::int64_t{0}, edge / 2 - 100, edge - 300, n - 300}) {
        std::vector<std::uint8_t> part;
        for (std::int64_t i = 0; i < 300; ++i) part.push_back(static_cast<std::uint8_t>(i % 5));
        check(cudaMemcpy(codes.data() + first, part.data(), part.size(), cudaMemcpyHostToDevice));
        const batch_sums of_part(pattern_rows<__half>(first, 300, columns, 11), codes_t(part.begin(), part.end()), 5);
        right.invalid -= 300;
        for (std::size_t k = 0; k < 5; ++k) {
            right.counts[k] += of_part.counts[k];
            right.rows[k] += of_part.rows[k];
        }
        for (std::size_t e = 0; e < right.sums.size(); ++e) {
            right.sums[e] += of_part.sums[e];
            right.magnitude[e] += of_part.magnitude[e];
        }
    }
    device_array<float> counts(5);
    device_matrix<float> sums(5, columns);
    device_array<step_stats> stats(1);
    accumulate_params params;
    params.stats = stats.data();
    accumulate(matrix_view<const __half>(x.data(), n, columns), codes.view(), counts.view(), sums.view(), params);
    expect_right(right, {counts.download(), sums.download(), stats.download()[0]});
}

/// Two rows more than 2^32 elements apart, or just as many as 32 bits hold.
TEST_F(LargeTest, RowsMoreThan2To32ElementsApart) {
    constexpr std::int64_t columns = 64, edge = std::int64_t{1} << 32;
    if (!has_free_memory((edge + 4 + columns) * sizeof(__half) + (std::size_t{1} << 30)))
        GTEST_SKIP() << "too little device memory for rows " << edge << " halves apart";
    random_source random;
    const auto rows = random.normals<__half>(2, columns);
    const auto right = accumulated(rows, {1, 1}, 3);
    device_array<__half> x(edge + 4 + columns);
    check(cudaMemcpy(x.data(), rows.data.data(), columns * sizeof(__half), cudaMemcpyHostToDevice));
    const device_array<std::int64_t> codes(codes_t{1, 1});
    for (const std::int64_t stride : {edge - 4, edge, edge + 4}) {
        check(cudaMemcpy(x.data() + stride, &rows.data[columns], columns * sizeof(__half), cudaMemcpyHostToDevice));
        device_array<float> counts(3);
        device_matrix<float> sums(3, columns);
        accumulate(strided<const __half>(x.data(), 2, columns, stride), codes.view(), counts.view(), sums.view());
        EXPECT_EQ(counts.download(), right.counts);
        EXPECT_TRUE(same_bits(sums.download(), right.sums)) << stride;
    }
}

TEST_F(LargeTest, MoreRowsThanAreSortedAtATime) {
    constexpr std::int64_t slice = dispatch::most_slice_rows, n = slice + 5000;
    if (!has_free_memory(n + accumulate_workspace_bytes({n, 4, 1}) + (std::size_t{1} << 30)))
        GTEST_SKIP() << "too little device memory for " << n << " rows";
    const device_array<__half> x(std::vector<__half>{__half(0.5f)});
    device_array<std::uint8_t> codes(n);
    codes.fill(0);
    check(cudaMemset(codes.data() + slice - 100, 1, 300));  // over the end of the first slice
    check(cudaMemset(codes.data() + n - 40, 2, 30));
    check(cudaMemset(codes.data() + n - 10, 0xFF, 10));
    device_array<float> counts(4);
    device_matrix<float> sums(4, 1);
    device_array<step_stats> stats(1);
    accumulate_params params;
    params.stats = stats.data();
    accumulate(strided<const __half>(x.data(), n, 1, 0), codes.view(), counts.view(), sums.view(), params);
    const auto got_counts = counts.download();
    const auto got_sums = sums.download().data;
    const auto rest = static_cast<float>(n - 340);
    EXPECT_NEAR(got_counts[0], rest, rest * 0x1p-23f);
    EXPECT_NEAR(got_sums[0], 0.5f * rest, rest * 0x1p-23f);
    EXPECT_EQ((std::vector<float>(got_counts.begin() + 1, got_counts.end())), (std::vector<float>{300, 30, 0}));
    EXPECT_EQ((std::vector<float>(got_sums.begin() + 1, got_sums.end())), (std::vector<float>{150, 15, 0}));
    EXPECT_EQ(stats.download()[0].invalid_rows, 10);
}

TEST_F(LargeTest, MoreThan2To31ElementsOfTheSums) {
    constexpr std::int64_t k = 70000, columns = 32768;
    if (!has_free_memory(static_cast<std::size_t>(k * columns) * sizeof(float) + (std::size_t{1} << 30)))
        GTEST_SKIP() << "too little device memory for " << k << " x " << columns << " floats";
    const codes_t codes{0, 65535, 65536, 65537, k - 1, 65536, k, -1};
    const auto x = pattern_rows<float>(0, 8, columns, 13);
    accumulate_memory<float> memory(x, codes, 1);
    device_array<float> counts(k), sums(k * columns);
    accumulate(memory.x.view(), memory.codes.view(), counts.view(), matrix_view<float>(sums.data(), k, columns));
    std::vector<float> right_counts(k);
    for (const std::int64_t code : codes)
        if (code >= 0 && code < k) ++right_counts[code];
    EXPECT_EQ(counts.download(), right_counts);
    for (const std::int64_t code : {0, 1, 32767, 65535, 65536, 65537, 65538, 69998, 69999}) {
        std::vector<float> row(columns);
        for (std::size_t i = 0; i < codes.size(); ++i)
            for (std::int64_t d = 0; d < columns && codes[i] == code; ++d)
                row[d] += x.at(static_cast<std::int64_t>(i), d);
        EXPECT_EQ(sums.download(code * columns, columns), row) << "code " << code;
    }
}

}  // namespace
}  // namespace cuvq::test
