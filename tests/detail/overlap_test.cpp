// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What overlaps and what does not.
#include <cuvq/detail/overlap.hpp>

#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "support/host.hpp"

namespace cuvq::test {
namespace {

bool overlap(const matrix_ref<float>& a, const matrix_ref<float>& b) {
    const bool forward = detail::overlap({"a", a}, {"b", b});
    EXPECT_EQ(forward, detail::overlap({"b", b}, {"a", a}));
    return forward;
}

TEST(OverlapTest, ColumnBlocksOfOneMatrixLieApart) {
    float wide[8 * 10];
    EXPECT_FALSE(overlap({wide, 8, 4, 10}, {wide + 4, 8, 6, 10}));
    EXPECT_FALSE(overlap({wide, 8, 4, 10}, {wide + 14, 3, 6, 10}));
    EXPECT_TRUE(overlap({wide, 8, 5, 10}, {wide + 4, 8, 6, 10}));
    EXPECT_TRUE(overlap({wide, 8, 4, 10}, {wide + 4, 7, 7, 10}));
}

TEST(OverlapTest, OneRowInAGapBetweenRowsLiesApart) {
    float wide[8 * 10];
    EXPECT_FALSE(overlap({wide, 8, 4, 10}, {wide + 24, 1, 6, 6}));
    EXPECT_TRUE(overlap({wide, 8, 4, 10}, {wide + 24, 1, 7, 7}));
    EXPECT_TRUE(overlap({wide, 8, 4, 10}, {wide + 23, 1, 1, 1}));
}

TEST(OverlapTest, NeighboursLieApart) {
    float data[20];
    EXPECT_FALSE(overlap({data, 2, 5, 5}, {data + 10, 2, 5, 5}));
    EXPECT_TRUE(overlap({data, 2, 5, 5}, {data + 9, 2, 5, 5}));
    EXPECT_TRUE(overlap({data, 1, 20, 20}, {data + 19, 1, 1, 1}));
}

TEST(OverlapTest, MatricesOfOtherStridesAreTakenToOverlapInsideEachOthersRange) {
    float data[40];
    EXPECT_TRUE(overlap({data, 4, 1, 10}, {data + 1, 3, 1, 7}));
}

TEST(OverlapTest, EmptyAndAbsentMemoryOverlapsNothing) {
    float data[20];
    EXPECT_FALSE(overlap({data, 0, 5, 5}, {data, 4, 5, 5}));
    EXPECT_FALSE(overlap({}, {data, 4, 5, 5}));
    EXPECT_FALSE(overlap({}, {}));
}

TEST(OverlapTest, AgreesWithMarkedElementsOfEverySmallPair) {
    // Pairs of one stride over one buffer.
    constexpr int size = 24;
    float data[size];
    for (const int stride : {3, 4})
        for (int a = 0; a < 12; ++a)
            for (int b = 0; b < 12; ++b)
                for (int ar = 1; ar <= 3; ++ar)
                    for (int br = 1; br <= 3; ++br)
                        for (int ac = 1; ac <= stride; ++ac)
                            for (int bc = 1; bc <= stride; ++bc) {
                                bool marked[size] = {}, shared = false;
                                for (int i = 0; i < ar; ++i)
                                    for (int j = 0; j < ac; ++j) marked[a + i * stride + j] = true;
                                for (int i = 0; i < br; ++i)
                                    for (int j = 0; j < bc; ++j) shared = shared || marked[b + i * stride + j];
                                ASSERT_EQ(overlap({data + a, ar, ac, stride}, {data + b, br, bc, stride}), shared);
                            }
}

TEST(OverlapTest, VectorsAndCodesAreAsLongAsTheirElements) {
    std::uint64_t data[4] = {};
    const auto codes = [&](code_type type) { return detail::memory("codes", codes_ref{data, 4, type}); };
    EXPECT_EQ(codes(code_type::uint8).row_bytes, 4);
    EXPECT_EQ(codes(code_type::uint16).row_bytes, 8);
    EXPECT_EQ(codes(code_type::int32).row_bytes, 16);
    EXPECT_EQ(codes(code_type::uint32).row_bytes, 16);
    EXPECT_EQ(codes(code_type::int64).row_bytes, 32);
    const detail::memory behind("counts", vector_ref<float>{reinterpret_cast<float*>(data + 2), 4});
    EXPECT_EQ(behind.row_bytes, 16);
    EXPECT_FALSE(detail::overlap(codes(code_type::int32), behind));
    EXPECT_TRUE(detail::overlap(codes(code_type::int64), behind));
}

TEST(OverlapTest, TheTextNamesBothWithTheWrittenOneFirst) {
    float data[12] = {};
    const detail::memory a("a", matrix_ref<float>{data, 2, 3, 3}), b("b", matrix_ref<float>{data + 5, 2, 3, 3}),
        c("c", matrix_ref<float>{data + 6, 2, 3, 3});
    EXPECT_EQ(refusal([&] { detail::check_disjoint("f", {a}, {c}); }), "(no error)");
    EXPECT_EQ(refusal([&] { detail::check_disjoint("f", {}, {a, b}); }), "(no error)");
    EXPECT_EQ(refusal([&] {
                  detail::check_disjoint("f", {a}, {c, b});
              }),
              "cuvq::f: a: got memory that overlaps b; wants memory of its own, since it is written");
    EXPECT_EQ(refusal([&] {
                  detail::check_disjoint("f", {b, c}, {});
              }),
              "cuvq::f: b: got memory that overlaps c; wants memory of its own, since it is written");
}

}  // namespace
}  // namespace cuvq::test
