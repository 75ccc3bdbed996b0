// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/reference/codebook.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include <cuvq/reference/ema.hpp>

#include "support/host.hpp"
#include "support/random.hpp"
#include "support/types.hpp"

namespace cuvq::test {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
using floats = std::vector<float>;

/// N rows that hold their own number in every column.
template <class T = float>
matrix<T> numbered(std::int64_t n, std::int64_t d = 3) {
    return matrix<T>::generate(n, d, [](auto i, auto) { return i; });
}

/// The number of the row that each code got.
template <class T>
std::vector<std::int64_t> rows_of(const reference::codebook<T>& codebook) {
    std::vector<std::int64_t> rows;
    for (std::int64_t k = 0; k < codebook.codes(); ++k) {
        const auto first = codebook.rows().begin() + k * codebook.dimensions();
        const auto number = static_cast<float>(*first);
        EXPECT_TRUE(
            std::all_of(first, first + codebook.dimensions(), [&](T v) { return static_cast<float>(v) == number; }));
        rows.push_back(static_cast<std::int64_t>(number));
    }
    return rows;
}

TEST(CodebookTest, StartsAsZeros) {
    const reference::codebook<float> codebook(4, 3);
    EXPECT_EQ(codebook.codes(), 4);
    EXPECT_EQ(codebook.dimensions(), 3);
    EXPECT_EQ(codebook.rows(), floats(12, 0));
    EXPECT_EQ(codebook.embed_sum(), floats(12, 0));
    EXPECT_EQ(codebook.cluster_size(), floats(4, 0));
    EXPECT_EQ(codebook.steps_since_active(), std::vector<std::int32_t>(4, 0));
    EXPECT_EQ(codebook.step(), 0);
}

TEST(CodebookTest, StateViewsItsArrays) {
    reference::codebook<float> codebook(4, 3);
    const auto state = codebook.state();
    EXPECT_EQ(state.codebook.data_handle(), codebook.rows().data());
    EXPECT_EQ(state.embed_sum.data_handle(), codebook.embed_sum().data());
    EXPECT_EQ(state.cluster_size.data_handle(), codebook.cluster_size().data());
    EXPECT_EQ(state.steps_since_active.data_handle(), codebook.steps_since_active().data());
    EXPECT_EQ(state.codebook.extent(0), 4);
    EXPECT_EQ(state.codebook.extent(1), 3);
    EXPECT_EQ(state.embed_sum.extent(0), 4);
    EXPECT_EQ(state.embed_sum.extent(1), 3);
    EXPECT_EQ(state.cluster_size.extent(0), 4);
    EXPECT_EQ(state.steps_since_active.extent(0), 4);
    *state.step = 5;
    EXPECT_EQ(codebook.step(), 5);
}

TEST(CodebookTest, CopiesAreIndependent) {
    reference::codebook<float> a(1, 1);
    reference::codebook<float> b = a;
    b.state().codebook(0, 0) = 7;
    EXPECT_EQ(a.rows()[0], 0);
    EXPECT_EQ(b.rows()[0], 7);
}

TEST(CodebookTest, TrainStepsMoveIt) {
    reference::codebook<float> codebook(2, 1);
    const matrix<float> x{{1}, {5}};
    codebook.init_from_rows(x.view(), 3);
    std::vector<std::int32_t> codes(2);
    const matrix<float> batch{{1.5f}, {5.5f}};
    reference::train_step(codebook.state(), batch.view(), view(codes));
    EXPECT_EQ(std::set<float>(codebook.rows().begin(), codebook.rows().end()), (std::set<float>{1.5f, 5.5f}));
    EXPECT_EQ(codebook.step(), 1);
}

template <class Elements>
class CodebookInit : public testing::Test {
public:
    using x = typename Elements::x;
    using codebook = typename Elements::codebook;
};
TYPED_TEST_SUITE(CodebookInit, element_pairs, type_names);

TYPED_TEST(CodebookInit, TakesDistinctRowsOfX) {
    reference::codebook<typename TestFixture::codebook> codebook(20, 3);
    codebook.init_from_rows(numbered<typename TestFixture::x>(64).view(), 1);
    const auto rows = rows_of(codebook);
    const std::set<std::int64_t> distinct(rows.begin(), rows.end());
    EXPECT_EQ(distinct.size(), 20u);
    EXPECT_GE(*distinct.begin(), 0);
    EXPECT_LT(*distinct.rbegin(), 64);
    EXPECT_EQ(codebook.embed_sum(), floats(60, 0));
    EXPECT_EQ(codebook.cluster_size(), floats(20, 0));
}

TYPED_TEST(CodebookInit, OnePerCodeStartsTheStatisticsFromTheRows) {
    reference::codebook<typename TestFixture::codebook> codebook(5, 3);
    random_source random;
    codebook.init_from_rows(random.normals<typename TestFixture::x>(9, 3).view(), 1, initial_statistics::one_per_code);
    EXPECT_EQ(codebook.cluster_size(), floats(5, 1));
    for (std::size_t e = 0; e < 15; ++e)
        EXPECT_EQ(codebook.embed_sum()[e], static_cast<float>(codebook.rows()[e])) << "element " << e;
}

TYPED_TEST(CodebookInit, TakesStridedRows) {
    const auto x = numbered<typename TestFixture::x>(30);
    padded_matrix<typename TestFixture::x> wide(x, 4);
    reference::codebook<typename TestFixture::codebook> a(6, 3), b(6, 3);
    a.init_from_rows(x.view(), 8);
    b.init_from_rows(wide.view(), 8);
    EXPECT_EQ(rows_of(a), rows_of(b));
}

TEST(CodebookInitTest, AsManyCodesAsRowsTakeEveryRow) {
    for (const std::int64_t n : {1, 2, 5, 33}) {
        reference::codebook<float> codebook(n, 3);
        codebook.init_from_rows(numbered(n).view(), 9);
        const auto rows = rows_of(codebook);
        EXPECT_EQ(std::set<std::int64_t>(rows.begin(), rows.end()).size(), static_cast<std::size_t>(n));
    }
}

TEST(CodebookInitTest, MoreCodesThanRowsTakeTheSameRowsAgain) {
    reference::codebook<float> codebook(13, 3);
    codebook.init_from_rows(numbered(5).view(), 9);
    const auto rows = rows_of(codebook);
    for (std::size_t k = 5; k < 13; ++k) EXPECT_EQ(rows[k], rows[k - 5]);
    EXPECT_EQ(std::set<std::int64_t>(rows.begin(), rows.end()).size(), 5u);
}

TEST(CodebookInitTest, TheSeedDecidesTheRows) {
    reference::codebook<float> codebook(20, 3);
    const auto x = numbered(1000);
    const auto rows = [&](std::uint64_t seed) {
        codebook.init_from_rows(x.view(), seed);
        return rows_of(codebook);
    };
    const auto first = rows(1);
    EXPECT_EQ(rows(1), first);
    EXPECT_NE(rows(2), first);
    EXPECT_NE(rows(1 | std::uint64_t{1} << 32), first);
}

TEST(CodebookInitTest, RowsComeFromAllOverX) {
    reference::codebook<float> codebook(200, 1);
    codebook.init_from_rows(numbered(10000, 1).view(), 4);
    int quarters[4] = {};
    for (const std::int64_t row : rows_of(codebook)) ++quarters[row / 2500];
    for (const int count : quarters) EXPECT_NEAR(count, 50, 30);
}

TEST(CodebookInitTest, ARowThatIsNotFiniteMovesOnToTheNextCyclically) {
    auto x = numbered(5);
    for (const std::int64_t bad : {0, 1, 3, 4}) x(bad, 2) = bad % 2 ? nan : std::numeric_limits<float>::infinity();
    reference::codebook<float> codebook(5, 3);
    codebook.init_from_rows(x.view(), 2);
    EXPECT_EQ(rows_of(codebook), std::vector<std::int64_t>(5, 2));
}

TEST(CodebookInitTest, ItMovesOnAtMost64StepsThenTakesZeros) {
    // Every row is drawn once, so code by code the way to the only finite row, 999, is of each length once.
    const auto x = matrix<float>::generate(1000, 1, [](auto i, auto) { return i == 999 ? 999 : nan; });
    reference::codebook<float> codebook(1000, 1);
    codebook.init_from_rows(x.view(), 2);
    EXPECT_EQ(std::count(codebook.rows().begin(), codebook.rows().end(), 999.0f), 65);
    EXPECT_EQ(std::count(codebook.rows().begin(), codebook.rows().end(), 0.0f), 935);
}

TEST(CodebookInitTest, WithoutAnyFiniteRowTheCodebookIsZeros) {
    reference::codebook<float> codebook(3, 2);
    codebook.init_from_rows(matrix<float>(4, 2, nan).view(), 2, initial_statistics::one_per_code);
    EXPECT_EQ(codebook.rows(), floats(6, 0));
    EXPECT_EQ(codebook.embed_sum(), floats(6, 0));
    EXPECT_EQ(codebook.cluster_size(), floats(3, 1));
}

TEST(CodebookInitTest, RowsOfItsOwnAreRefusedAndSoIsNoEnumerator) {
    reference::codebook<float> codebook(3, 2);
    EXPECT_EQ(refusal([&] { codebook.init_from_rows(codebook.state().codebook, 1); }),
              "cuvq::reference::codebook::init_from_rows: state.codebook: got memory that overlaps x; wants memory of "
              "its own, since it is written");
    EXPECT_EQ(refusal([&] { codebook.init_from_rows(numbered(3, 2).view(), 1, static_cast<initial_statistics>(7)); }),
              "cuvq::reference::codebook::init_from_rows: initial: got no enumerator of initial_statistics; wants one "
              "of its enumerators");
}

TEST(CodebookInitTest, StartsAfresh) {
    reference::codebook<float> codebook(3, 2);
    const auto state = codebook.state();
    *state.step = 12;
    for (std::int64_t k = 0; k < 3; ++k) {
        state.cluster_size(k) = nan;
        state.steps_since_active(k) = 7;
        state.embed_sum(k, 0) = state.embed_sum(k, 1) = nan;
    }
    codebook.init_from_rows(numbered(3, 2).view(), 1);
    EXPECT_EQ(codebook.step(), 0);
    EXPECT_EQ(codebook.steps_since_active(), std::vector<std::int32_t>(3, 0));
    EXPECT_EQ(codebook.cluster_size(), floats(3, 0));
    EXPECT_EQ(codebook.embed_sum(), floats(6, 0));
}

}  // namespace
}  // namespace cuvq::test
