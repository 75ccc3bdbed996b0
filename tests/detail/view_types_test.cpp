// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/detail/view_types.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <gtest/gtest.h>

#include <cuvq/params.hpp>

namespace cuvq::test {
namespace {

template <class Layout>
using matrix_of = cuda::std::mdspan<float, cuda::std::extents<std::size_t, dynamic_extent, 3>, Layout>;

TEST(ViewTypes, MatricesAndVectors) {
    EXPECT_TRUE(detail::is_matrix<matrix_view<float>> && !detail::is_vector<matrix_view<float>>);
    EXPECT_TRUE(detail::is_vector<vector_view<float>> && !detail::is_matrix<vector_view<float>>);
    EXPECT_TRUE(detail::is_matrix<matrix_of<cuda::std::layout_right>>);
    EXPECT_TRUE(detail::is_matrix<matrix_of<cuda::std::layout_stride>>);
    EXPECT_FALSE(detail::is_matrix<matrix_of<cuda::std::layout_left>>);
    EXPECT_TRUE(detail::is_writable<vector_view<float>>);
    EXPECT_FALSE(detail::is_writable<vector_view<const float>>);
}

TEST(ViewTypes, WhatIsNoView) {
    EXPECT_TRUE(detail::is_discard<discard_t> && !detail::is_matrix<discard_t>);
    EXPECT_FALSE(detail::is_matrix<quantize_params> || detail::is_discard<quantize_params>);
    EXPECT_FALSE(detail::is_vector<float*> || detail::is_matrix<float*>);
}

TEST(ViewTypes, Elements) {
    EXPECT_TRUE(detail::is_element<float>);
    EXPECT_FALSE(detail::is_element<double> || detail::is_element<int>);
#if CUVQ_HAS_HALF
    EXPECT_TRUE(detail::is_element<__half> && detail::is_element<__nv_bfloat16>);
#endif
    EXPECT_EQ(detail::code_type_index<std::int8_t>, -1);
    EXPECT_EQ(detail::code_type_index<std::uint64_t>, -1);
}

TEST(ViewTypes, TheIndexOfACodeTypeIsItsEnumerator) {
    EXPECT_EQ(detail::code_type_index<std::int32_t>, static_cast<int>(code_type::int32));
    EXPECT_EQ(detail::code_type_index<std::int64_t>, static_cast<int>(code_type::int64));
    EXPECT_EQ(detail::code_type_index<std::uint8_t>, static_cast<int>(code_type::uint8));
    EXPECT_EQ(detail::code_type_index<std::uint16_t>, static_cast<int>(code_type::uint16));
    EXPECT_EQ(detail::code_type_index<std::uint32_t>, static_cast<int>(code_type::uint32));
}

TEST(ViewTypes, ColumnsThatATypeFixes) {
    EXPECT_EQ((detail::static_columns<matrix_view<float, 7>>()), 7u);
    EXPECT_EQ(detail::static_columns<matrix_view<float>>(), dynamic_extent);
    EXPECT_EQ(detail::static_columns<discard_t>(), dynamic_extent);
}

TEST(ViewTypes, States) {
    EXPECT_TRUE(detail::state_traits<codebook_state<float>>::is_state);
    EXPECT_TRUE((std::is_same_v<detail::state_traits<codebook_state<float, 4>>::value, float>));
    EXPECT_FALSE(detail::state_traits<matrix_view<float>>::is_state);
}

}  // namespace
}  // namespace cuvq::test
