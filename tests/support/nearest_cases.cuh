// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What every block-level search must find: a suite for the tests of each. A `Search` has
//   fixture             of tests that need its hardware,
//   columns             numbers of dimensions to try, ascending,
//   expect_equal_codes  of (x, codebook): the exact codes, by every way it has.
#pragma once

#include <cstdint>
#include <iterator>
#include <limits>

#include <gtest/gtest.h>

#include "support/random.hpp"

namespace cuvq::test {

template <class Search>
class NearestCasesSmall : public Search::fixture {
protected:
    /// So many dimensions, or as few as the search takes.
    static constexpr std::int64_t at_least(std::int64_t d) { return d < Search::columns[0] ? Search::columns[0] : d; }
};
TYPED_TEST_SUITE_P(NearestCasesSmall);

TYPED_TEST_P(NearestCasesSmall, NormalDataInShapesThatFillNoTile) {
    random_source random;
    for (const std::int64_t d : TypeParam::columns)
        for (const std::int64_t n : {1, 9, 70, 200})
            TypeParam::expect_equal_codes(random.normals<float>(n, d), random.normals<float>(d == 17 ? 300 : 133, d));
    const std::int64_t d = this->at_least(8);
    TypeParam::expect_equal_codes(random.normals<float>(300, d), random.normals<float>(1, d));
}

TYPED_TEST_P(NearestCasesSmall, TiesNanAndRowsThatTheFilterCannotTellApart) {
    random_source random;
    const std::int64_t few = this->at_least(5);
    auto x = random.integers<float>(90, few, -2, 2);
    auto codebook = random.integers<float>(200, few, -2, 2);
    for (std::int64_t k = 50; k < 90; ++k)
        for (std::int64_t d = 0; d < few; ++d) codebook(k, d) = codebook.at(3, d);
    x(4, 4) = std::numeric_limits<float>::quiet_NaN();
    codebook(0, 1) = std::numeric_limits<float>::infinity();
    TypeParam::expect_equal_codes(x, codebook);

    for (const std::int64_t columns : TypeParam::columns) {
        const auto base = random.normals<float>(1, columns);
        const auto near = [&](std::int64_t rows) {
            return matrix<float>::generate(
                rows, columns, [&](auto, auto d) { return base.at(0, d) * (1 + 0x1p-22f * random.integer(-2, 2)); });
        };
        TypeParam::expect_equal_codes(near(66), near(150));
        TypeParam::expect_equal_codes(random.normals<float>(66, columns), near(150));
    }
}

TYPED_TEST_P(NearestCasesSmall, ACodebookWithoutAFiniteRow) {
    random_source random;
    const std::int64_t d = this->at_least(3);
    const matrix<float> codebook(20, d, std::numeric_limits<float>::quiet_NaN());
    TypeParam::expect_equal_codes(random.normals<float>(140, d), codebook);
}

TYPED_TEST_P(NearestCasesSmall, OtherTypesThanFloat) {
    random_source random;
    for (const std::int64_t d : {this->at_least(20), TypeParam::columns[std::size(TypeParam::columns) - 1]}) {
        TypeParam::expect_equal_codes(random.normals<__half>(80, d), random.normals<float>(160, d));
        TypeParam::expect_equal_codes(random.normals<__nv_bfloat16>(80, d), random.normals<__nv_bfloat16>(160, d));
    }
}

REGISTER_TYPED_TEST_SUITE_P(NearestCasesSmall, NormalDataInShapesThatFillNoTile,
                            TiesNanAndRowsThatTheFilterCannotTellApart, ACodebookWithoutAFiniteRow,
                            OtherTypesThanFloat);

}  // namespace cuvq::test
