// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What is made of one view, and what is said of one that will not do.
#include <cuvq/detail/references.hpp>

#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "support/host.hpp"

namespace cuvq::test {
namespace {

constexpr std::int64_t n = 4, d = 3;
float data[64];

template <class V>
std::string refused_matrix(const V& view, bool written = false) {
    return refusal([&] { detail::to_matrix("f", "x", view, written); });
}

using strided_vector =
    cuda::std::mdspan<float, cuda::std::extents<std::int64_t, dynamic_extent>, cuda::std::layout_stride>;
strided_vector every(std::int64_t stride, std::int64_t size) {
    return strided_vector(data, strided_vector::mapping_type(strided_vector::extents_type(size),
                                                             cuda::std::array<std::int64_t, 1>{stride}));
}

TEST(References, OfMatrices) {
    const auto whole = detail::to_matrix("f", "x", matrix_view<float>(data, n, d));
    EXPECT_EQ(whole.data, data);
    EXPECT_EQ(whole.rows, n);
    EXPECT_EQ(whole.columns, d);
    EXPECT_EQ(whole.stride, d);
    EXPECT_EQ(detail::to_matrix("f", "x", strided(data, n, d, 7)).stride, 7);
    EXPECT_EQ(detail::to_matrix("f", "x", matrix_view<float, 5>(data, n)).columns, 5);
    const auto constant = detail::read_only(whole);
    EXPECT_TRUE((std::is_same_v<decltype(constant), const matrix_ref<const float>>));
    EXPECT_EQ(constant.stride, d);
}

TEST(References, OfOneRowTheStrideDoesNotMatter) {
    EXPECT_EQ(detail::to_matrix("f", "x", strided(data, 1, d, 99)).stride, d);
    EXPECT_EQ(refused_matrix(strided(data, 1, d, -3), true), "(no error)");
}

TEST(References, OfOneColumnTheLastStrideDoesNotMatter) {
    EXPECT_EQ(refused_matrix(strided(data, n, 1, 4, 9)), "(no error)");
    EXPECT_EQ(refusal([] { detail::to_vector("f", "v", every(9, 1)); }), "(no error)");
}

TEST(References, OfVectorsAndCodes) {
    const auto v = detail::to_vector("f", "v", every(1, 5));
    EXPECT_EQ(v.data, data);
    EXPECT_EQ(v.size, 5);
    std::vector<std::uint16_t> narrow{7, 8, 9};
    const auto codes = detail::read_only(detail::to_codes("f", "codes", view(narrow), 100));
    EXPECT_EQ(codes.size, 3);
    EXPECT_EQ(codes.type, code_type::uint16);
    EXPECT_EQ(codes.data, narrow.data());
}

TEST(References, InputRowsMayOverlapAndOutputRowsMayNot) {
    EXPECT_EQ(refused_matrix(strided(data, n, d, 2)), "(no error)");
    EXPECT_EQ(refused_matrix(strided(data, n, d, 0)), "(no error)");
    EXPECT_EQ(refused_matrix(strided(data, n, d, 2), true),
              "cuvq::f: x: got row stride 2 for 3 columns; wants rows that do not overlap, since it is written");
}

TEST(References, StridesThatAreNotThoseOfRowsOrVectors) {
    EXPECT_EQ(refused_matrix(strided(data, n, d, 1, 4)),
              "cuvq::f: x: got last stride 4; wants 1 (the elements of a row lie side by side)");
    EXPECT_EQ(refusal([] { detail::to_vector("f", "v", every(2, n)); }),
              "cuvq::f: v: got stride 2; wants 1 (a contiguous vector)");
}

TEST(References, NullAndMisalignedPointers) {
    EXPECT_EQ(refused_matrix(matrix_view<float>(nullptr, n, d)),
              "cuvq::f: x: got a null pointer; wants 4 x 3 elements");
    float* const off = reinterpret_cast<float*>(reinterpret_cast<std::uintptr_t>(data) + 2);
    EXPECT_EQ(refused_matrix(matrix_view<float>(off, n, d)),
              "cuvq::f: x: got a misaligned pointer; wants 4-byte alignment");
    EXPECT_EQ(refused_matrix(matrix_view<float>(nullptr, 0, d)), "(no error)");
    EXPECT_EQ(refused_matrix(matrix_view<float>(off, n, 0)), "(no error)");
}

TEST(References, ExtentsOutsideTheRangeOfInt64) {
    EXPECT_EQ(refused_matrix(matrix_view<float>(data, -4, d)),
              "cuvq::f: x: got an extent or stride of -4; wants none below 0");
    EXPECT_EQ(refused_matrix(strided(data, n, d, -3)), "cuvq::f: x: got an extent or stride of -3; wants none below 0");
    using unsigned_matrix = cuda::std::mdspan<float, cuda::std::dextents<std::uint64_t, 2>>;
    EXPECT_EQ(refused_matrix(unsigned_matrix(data, std::uint64_t{1} << 63, 3)),
              "cuvq::f: x: got an extent or stride of 9223372036854775808; wants none above 2^63 - 1");
}

TEST(References, MatricesPastTheAddressSpace) {
    const std::int64_t many = std::int64_t{1} << 60;
    EXPECT_EQ(refused_matrix(matrix_view<float>(data, many, d)),
              "cuvq::f: x: got 1152921504606846976 x 3 elements, row stride 3; wants fewer than 2^63 bytes");
    EXPECT_EQ(refused_matrix(strided(data, n, d, many)),
              "cuvq::f: x: got 4 x 3 elements, row stride 1152921504606846976; wants fewer than 2^63 bytes");
}

/// K codes that have no memory: the check of the code type comes before any reading.
template <class Code>
std::string codes_for_many(std::int64_t codes) {
    std::vector<Code> to(1);
    return refusal([&] { detail::to_codes("f", "codes", view(to), codes); });
}

TEST(References, CodesTooNarrowForK) {
    EXPECT_EQ(codes_for_many<std::uint8_t>(256), "(no error)");
    EXPECT_EQ(codes_for_many<std::uint8_t>(257),
              "cuvq::f: codes: got uint8 elements for K = 257; wants a type that holds K - 1");
    const std::int64_t two31 = std::int64_t{1} << 31, two32 = std::int64_t{1} << 32;
    EXPECT_EQ(codes_for_many<std::int32_t>(two31), "(no error)");
    EXPECT_EQ(codes_for_many<std::int32_t>(two31 + 1),
              "cuvq::f: codes: got int32 elements for K = 2147483649; wants a type that holds K - 1");
    EXPECT_EQ(codes_for_many<std::uint32_t>(two32), "(no error)");
    EXPECT_EQ(codes_for_many<std::uint32_t>(two32 + 1),
              "cuvq::f: codes: got uint32 elements for K = 4294967297; wants a type that holds K - 1");
    EXPECT_EQ(codes_for_many<std::int64_t>(std::numeric_limits<std::int64_t>::max()), "(no error)");
}

}  // namespace
}  // namespace cuvq::test
