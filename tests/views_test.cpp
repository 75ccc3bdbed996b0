// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/views.hpp>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "support/types.hpp"

namespace cuvq::test {
namespace {

static_assert(std::is_trivially_copyable_v<codebook_state<float>>);
static_assert(std::is_trivially_copyable_v<codebook_state<float, 64>>);
static_assert(std::is_trivially_copyable_v<matrix_ref<float>>);
static_assert(std::is_trivially_copyable_v<vector_ref<float>>);
static_assert(std::is_trivially_copyable_v<codes_ref>);
static_assert(std::is_empty_v<discard_t>);
static_assert(std::is_same_v<codebook_state<float, 8>::value_type, float>);
static_assert(codebook_state<float, 8>::static_dimensions == 8);
static_assert(codebook_state<float>::static_dimensions == dynamic_extent);

TEST(ViewsTest, MatrixViewIsRowMajorWithDynamicColumns) {
    float data[6] = {0, 1, 2, 3, 4, 5};
    const matrix_view<float> m(data, 2, 3);
    EXPECT_EQ(m.static_extent(1), dynamic_extent);
    EXPECT_EQ(m.extent(0), 2);
    EXPECT_EQ(m.extent(1), 3);
    EXPECT_EQ(&m(1, 2), data + 5);
}

TEST(ViewsTest, MatrixViewFixesItsColumnsAtCompileTime) {
    float data[6] = {};
    const matrix_view<float, 3> m(data, 2);
    static_assert(matrix_view<float, 3>::static_extent(1) == 3);
    EXPECT_EQ(m.extent(0), 2);
    EXPECT_EQ(m.extent(1), 3);
    EXPECT_EQ(&m(1, 0), data + 3);
}

TEST(ViewsTest, ExtentsAre64Bit) {
    const std::int64_t many = std::int64_t{1} << 40;
    EXPECT_EQ(matrix_view<float>(nullptr, many, 3).extent(0), many);
    EXPECT_EQ(vector_view<float>(nullptr, many).extent(0), many);
}

TEST(ViewsTest, DefaultViewsAndReferencesAreEmpty) {
    EXPECT_EQ(vector_view<const float>().data_handle(), nullptr);
    EXPECT_EQ(vector_view<const float>().extent(0), 0);
    EXPECT_FALSE(matrix_ref<float>{});
    EXPECT_FALSE(vector_ref<float>{});
    EXPECT_EQ(codebook_state<float>{}.step, nullptr);
}

TEST(ViewsTest, MatrixRefStepsByItsStride) {
    float data[10] = {};
    const matrix_ref<float> m{data, 3, 2, 4};
    EXPECT_TRUE(m);
    EXPECT_EQ(m.row(0), data);
    EXPECT_EQ(m.row(2), data + 8);
}

TEST(ViewsTest, VectorRefIndexesItsElements) {
    float data[3] = {1, 2, 3};
    const vector_ref<float> v{data, 3};
    EXPECT_TRUE(v);
    v[1] = 7;
    EXPECT_EQ(data[1], 7);
}

template <class Int>
constexpr code_type type_of() {
    return std::is_same_v<Int, std::int64_t>    ? code_type::int64
           : std::is_same_v<Int, std::uint8_t>  ? code_type::uint8
           : std::is_same_v<Int, std::uint16_t> ? code_type::uint16
           : std::is_same_v<Int, std::uint32_t> ? code_type::uint32
                                                : code_type::int32;
}

template <class Int>
class CodesRefTest : public testing::Test {};
TYPED_TEST_SUITE(CodesRefTest, code_types, type_names);

TYPED_TEST(CodesRefTest, StoresAndLoadsEveryElementInPlace) {
    using limits = std::numeric_limits<TypeParam>;
    std::vector<TypeParam> data{1, 2, 3, 4};
    const codes_ref codes{data.data(), 4, type_of<TypeParam>()};
    codes.store(1, static_cast<std::int64_t>(limits::max()));
    codes.store(3, 0);
    EXPECT_EQ(data, (std::vector<TypeParam>{1, limits::max(), 3, 0}));
    EXPECT_EQ(codes.load(0), 1);
    EXPECT_EQ(codes.load(1), static_cast<std::int64_t>(limits::max()));
    EXPECT_EQ(codes.load(3), 0);
    const const_codes_ref readable{data.data(), 4, type_of<TypeParam>()};
    EXPECT_EQ(readable.load(2), 3);
}

TYPED_TEST(CodesRefTest, MinusOneIsStoredAsAllBitsSet) {
    std::vector<TypeParam> data{0, 0};
    codes_ref{data.data(), 2, type_of<TypeParam>()}.store(1, -1);
    EXPECT_EQ(data[0], 0);
    EXPECT_EQ(data[1], static_cast<TypeParam>(~std::uint64_t{0}));
}

}  // namespace
}  // namespace cuvq::test
