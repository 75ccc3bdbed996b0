// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// `quantize` and `lookup` against closed forms, integer arithmetic and properties.
#include <cuvq/reference/quantize.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <gtest/gtest.h>

#include "support/host.hpp"
#include "support/random.hpp"
#include "support/types.hpp"

namespace cuvq::test {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float largest = std::numeric_limits<float>::max();

using codes_t = std::vector<std::int32_t>;

/// Everything that quantize gives.
template <class X>
struct outcome {
    codes_t codes;
    matrix<X> quantized;
    std::vector<float> distances;
    step_stats stats;

    outcome(std::int64_t n, std::int64_t d)
        : codes(static_cast<std::size_t>(n)), quantized(n, d), distances(static_cast<std::size_t>(n)) {}
};

template <class X, class C>
outcome<X> quantize(const matrix<X>& x, const matrix<C>& codebook) {
    outcome<X> out(x.rows, x.columns);
    quantize_params params;
    params.stats = &out.stats;
    reference::quantize(x.view(), codebook.view(), view(out.codes), out.quantized.view(), view(out.distances), params);
    return out;
}

template <class X>
bool same(const outcome<X>& a, const outcome<X>& b) {
    return a.codes == b.codes && same_bits(a.quantized, b.quantized) && same_bits(a.distances, b.distances);
}

codes_t zero_to(std::int64_t n) {
    codes_t codes(static_cast<std::size_t>(n));
    std::iota(codes.begin(), codes.end(), 0);
    return codes;
}

bool all_nan(const std::vector<float>& values) {
    return std::all_of(values.begin(), values.end(), [](float v) { return std::isnan(v); });
}

// ---- nearest codes, all element types -------------------------------------------------------------------------------

template <class Elements>
class QuantizeElements : public testing::Test {
public:
    using x = typename Elements::x;
    using codebook = typename Elements::codebook;
};
TYPED_TEST_SUITE(QuantizeElements, element_pairs, type_names);

TYPED_TEST(QuantizeElements, HandComputedCase) {
    const matrix<typename TestFixture::codebook> codebook{{0, 0}, {4, 0}, {0, 4}};
    const matrix<typename TestFixture::x> x{{1, 1}, {3, 0.5f}, {-1, 5}, {0, 0}};
    const auto got = quantize(x, codebook);
    EXPECT_EQ(got.codes, (codes_t{0, 1, 2, 0}));
    EXPECT_EQ(got.distances, (std::vector<float>{2, 1.25f, 2, 0}));
    EXPECT_TRUE(same_bits(got.quantized, matrix<typename TestFixture::x>{{0, 0}, {4, 0}, {0, 4}, {0, 0}}));
}

TYPED_TEST(QuantizeElements, OnAnIntegerGridTheCodeIsTheRoundedPointAndHalvesGoDown) {
    // Row k of the codebook is k written in base 5, so the lowest of several nearest rows rounds every coordinate
    // down.
    constexpr std::int64_t side = 5;
    for (const std::int64_t d : {1, 2, 3}) {
        const auto k = static_cast<std::int64_t>(std::pow(side, d));
        const auto digit = [&](std::int64_t code, std::int64_t j) {
            for (std::int64_t t = d - 1; t > j; --t) code /= side;
            return code % side;
        };
        const auto codebook = matrix<typename TestFixture::codebook>::generate(k, d, digit);
        random_source random;
        const auto x = matrix<typename TestFixture::x>::generate(
            500, d, [&](auto, auto) { return 0.25f * random.integer(-6, 4 * side + 2); });
        const auto got = quantize(x, codebook);
        for (std::int64_t i = 0; i < x.rows; ++i) {
            std::int64_t code = 0;
            double distance = 0;
            for (std::int64_t j = 0; j < d; ++j) {
                const double nearest = std::clamp(std::ceil(x.at(i, j) - 0.5), 0.0, side - 1.0);
                code = code * side + static_cast<std::int64_t>(nearest);
                distance += (x.at(i, j) - nearest) * (x.at(i, j) - nearest);
            }
            ASSERT_EQ(got.codes[i], code) << "row " << i << ", D = " << d;
            ASSERT_EQ(got.distances[i], distance);
        }
    }
}

TYPED_TEST(QuantizeElements, SmallIntegersAgreeWithIntegerArithmetic) {
    random_source random;
    for (const std::int64_t d : {1, 3, 7, 33, 129})
        for (const std::int64_t k : {1, 2, 37}) {
            const auto x = random.integers<typename TestFixture::x>(61, d, -4, 4);
            const auto codebook = random.integers<typename TestFixture::codebook>(k, d, -4, 4);
            const auto got = quantize(x, codebook);
            for (std::int64_t i = 0; i < x.rows; ++i) {
                std::int64_t best = std::numeric_limits<std::int64_t>::max(), code = -1;
                for (std::int64_t j = 0; j < k; ++j) {
                    std::int64_t sum = 0;
                    for (std::int64_t c = 0; c < d; ++c) {
                        const auto difference = static_cast<std::int64_t>(x.at(i, c) - codebook.at(j, c));
                        sum += difference * difference;
                    }
                    if (sum < best) best = sum, code = j;
                }
                ASSERT_EQ(got.codes[i], code) << "row " << i << ", K = " << k << ", D = " << d;
                ASSERT_EQ(got.distances[i], static_cast<float>(best));
                ASSERT_EQ(got.quantized.row(i), codebook.row(code));
            }
        }
}

TYPED_TEST(QuantizeElements, DuplicateRowsGiveTheLowestIndex) {
    const matrix<typename TestFixture::codebook> codebook{{5, 5}, {1, 2}, {3, 4}, {1, 2}, {3, 4}, {5, 5}};
    const matrix<typename TestFixture::x> x{{1, 2}, {3, 3.5f}, {6, 6}};
    EXPECT_EQ(quantize(x, codebook).codes, (codes_t{1, 2, 0}));
}

TYPED_TEST(QuantizeElements, RowsAtEqualDistanceGiveTheLowestIndex) {
    const matrix<typename TestFixture::codebook> codebook{{9, 9}, {0, 1}, {1, 0}, {0, -1}, {-1, 0}};
    const matrix<typename TestFixture::x> x{{0, 0}, {0.5f, 0.5f}, {0.5f, -0.5f}, {-0.5f, -0.5f}, {-1, 1}};
    EXPECT_EQ(quantize(x, codebook).codes, (codes_t{1, 1, 2, 3, 1}));
}

TYPED_TEST(QuantizeElements, NanOrInfinityInARowOfXMakesThatRowInvalid) {
    const matrix<typename TestFixture::codebook> codebook{{0, 0, 0}, {1, 1, 1}};
    const matrix<typename TestFixture::x> x{{1, 1, 1},         {nan, 0, 0},   {0, 0, nan}, {0, infinity, 0},
                                            {0, 0, -infinity}, {nan, 0, nan}, {0, 0, 0}};
    const auto got = quantize(x, codebook);
    EXPECT_EQ(got.codes, (codes_t{1, -1, -1, -1, -1, -1, 0}));
    for (const std::int64_t i : {1, 2, 3, 4, 5}) {
        EXPECT_TRUE(std::isnan(got.distances[i])) << "row " << i;
        EXPECT_TRUE(all_nan(got.quantized.row(i))) << "row " << i;
    }
    EXPECT_EQ(got.distances[0], 0);
    EXPECT_EQ(got.distances[6], 0);
    EXPECT_EQ(got.quantized.row(0), (std::vector<float>{1, 1, 1}));
    EXPECT_EQ(got.stats.invalid_rows, 5);
    EXPECT_EQ(got.stats.active_codes, 2);
    EXPECT_EQ(got.stats.commitment_loss, 0);
}

TYPED_TEST(QuantizeElements, CodebookRowsWithNanOrInfinityAreNeverChosen) {
    const matrix<typename TestFixture::codebook> codebook{{nan, 0}, {0, infinity}, {9, 9}, {-infinity, nan}, {8, 8}};
    const matrix<typename TestFixture::x> x{{0, 0}, {0, 20}, {-30, 0}};
    const auto got = quantize(x, codebook);
    EXPECT_EQ(got.codes, (codes_t{4, 2, 4}));
    EXPECT_EQ(got.stats.invalid_rows, 0);
}

TYPED_TEST(QuantizeElements, WithoutAnyFiniteCodebookRowEveryRowIsInvalid) {
    const matrix<typename TestFixture::codebook> codebook{{nan, 0}, {0, infinity}};
    const matrix<typename TestFixture::x> x{{0, 0}, {1, 2}, {nan, 0}};
    const auto got = quantize(x, codebook);
    EXPECT_EQ(got.codes, (codes_t{-1, -1, -1}));
    EXPECT_TRUE(all_nan(got.distances));
    for (const std::int64_t i : {0, 1, 2}) EXPECT_TRUE(all_nan(got.quantized.row(i)));
    EXPECT_EQ(got.stats.invalid_rows, 3);
    EXPECT_EQ(got.stats.active_codes, 0);
    EXPECT_EQ(got.stats.perplexity, 0);
    EXPECT_EQ(got.stats.commitment_loss, 0);
}

TYPED_TEST(QuantizeElements, StridedRowsGiveWhatContiguousRowsGive) {
    random_source random;
    const auto x = random.normals<typename TestFixture::x>(50, 5);
    const auto codebook = random.normals<typename TestFixture::codebook>(19, 5);
    const auto expected = quantize(x, codebook);
    padded_matrix<typename TestFixture::x> wide_x(x, 9), wide_quantized(matrix<typename TestFixture::x>(50, 5), 6);
    padded_matrix<typename TestFixture::codebook> wide_codebook(codebook, 7);
    outcome<typename TestFixture::x> got(50, 5);
    reference::quantize(wide_x.view(), wide_codebook.view(), view(got.codes), wide_quantized.view(),
                        view(got.distances));
    got.quantized = wide_quantized.contiguous();
    EXPECT_TRUE(same(got, expected));
    EXPECT_TRUE(wide_x.padding_untouched());
    EXPECT_TRUE(wide_codebook.padding_untouched());
    EXPECT_TRUE(wide_quantized.padding_untouched());
}

TYPED_TEST(QuantizeElements, EachOutputIsTheSameWithAndWithoutTheOthers) {
    random_source random;
    const auto x = random.normals<typename TestFixture::x>(40, 3);
    const auto codebook = random.normals<typename TestFixture::codebook>(11, 3);
    const auto expected = quantize(x, codebook);
    outcome<typename TestFixture::x> got(40, 3);
    reference::quantize(x.view(), codebook.view(), view(got.codes));
    EXPECT_EQ(got.codes, expected.codes);
    got.codes.assign(40, 99);
    reference::quantize(x.view(), codebook.view(), view(got.codes), got.quantized.view());
    EXPECT_EQ(got.codes, expected.codes);
    EXPECT_TRUE(same_bits(got.quantized, expected.quantized));
    got.codes.assign(40, 99);
    reference::quantize(x.view(), codebook.view(), view(got.codes), discard, view(got.distances));
    EXPECT_TRUE(same(got, expected));
}

TYPED_TEST(QuantizeElements, LookupOfTheCodesGivesTheQuantizedRows) {
    random_source random;
    auto x = random.normals<typename TestFixture::x>(40, 5);
    x(7, 3) = static_cast<typename TestFixture::x>(nan);
    const auto codebook = random.normals<typename TestFixture::codebook>(11, 5);
    const auto expected = quantize(x, codebook);
    matrix<typename TestFixture::x> got(40, 5);
    reference::lookup(codebook.view(), view(expected.codes), got.view());
    EXPECT_TRUE(same_bits(got, expected.quantized));
}

TYPED_TEST(QuantizeElements, LookupOfCodesOutsideTheCodebookGivesNanRows) {
    const matrix<typename TestFixture::codebook> codebook{{1, 2}, {3, 4}, {5, 6}};
    const std::vector<std::int64_t> codes{
        2, -1, 3, 0, std::numeric_limits<std::int64_t>::max(), std::numeric_limits<std::int64_t>::min(), 1};
    matrix<typename TestFixture::x> got(7, 2);
    reference::lookup(codebook.view(), view(codes), got.view());
    EXPECT_EQ(got.row(0), (std::vector<float>{5, 6}));
    EXPECT_EQ(got.row(3), (std::vector<float>{1, 2}));
    EXPECT_EQ(got.row(6), (std::vector<float>{3, 4}));
    for (const std::int64_t i : {1, 2, 4, 5}) EXPECT_TRUE(all_nan(got.row(i))) << "row " << i;
}

TYPED_TEST(QuantizeElements, LookupIntoStridedRowsLeavesTheGapsAlone) {
    const matrix<typename TestFixture::codebook> codebook{{1, 2, 3}, {4, 5, 6}};
    padded_matrix<typename TestFixture::codebook> wide_codebook(codebook, 4);
    padded_matrix<typename TestFixture::x> got(matrix<typename TestFixture::x>(3, 3), 5);
    reference::lookup(wide_codebook.view(), view(codes_t{1, 7, 0}), got.view());
    EXPECT_EQ(got.contiguous().row(0), (std::vector<float>{4, 5, 6}));
    EXPECT_TRUE(all_nan(got.contiguous().row(1)));
    EXPECT_EQ(got.contiguous().row(2), (std::vector<float>{1, 2, 3}));
    EXPECT_TRUE(got.padding_untouched());
}

// ---- code types -----------------------------------------------------------------------------------------------------

template <class Code>
class QuantizeCodes : public testing::Test {
protected:
    static constexpr Code invalid = static_cast<Code>(~std::uint64_t{0});
};
TYPED_TEST_SUITE(QuantizeCodes, code_types, type_names);

TYPED_TEST(QuantizeCodes, HoldTheCodeOrAllBitsSet) {
    const matrix<float> codebook{{0}, {10}, {20}};
    const matrix<float> x{{19}, {nan}, {1}, {11}};
    std::vector<TypeParam> codes(4);
    reference::quantize(x.view(), codebook.view(), view(codes));
    EXPECT_EQ(codes, (std::vector<TypeParam>{2, this->invalid, 0, 1}));
}

TYPED_TEST(QuantizeCodes, AllOf256CodesAreTold) {
    const auto codebook = matrix<float>::generate(256, 1, [](auto k, auto) { return k; });
    std::vector<TypeParam> codes(256), expected(256);
    std::iota(expected.begin(), expected.end(), TypeParam{0});
    reference::quantize(codebook.view(), codebook.view(), view(codes));
    EXPECT_EQ(codes, expected);
}

TYPED_TEST(QuantizeCodes, LookupTakesThem) {
    const matrix<float> codebook{{0}, {10}, {20}};
    const std::vector<TypeParam> codes{2, this->invalid, 0, 3};
    matrix<float> got(4, 1);
    reference::lookup(codebook.view(), view(codes), got.view());
    EXPECT_EQ(got.at(0, 0), 20);
    EXPECT_TRUE(std::isnan(got.at(1, 0)));
    EXPECT_EQ(got.at(2, 0), 0);
    EXPECT_TRUE(std::isnan(got.at(3, 0)));
}

TEST(QuantizeTest, With256CodesInBytesOnlyTheDistanceTellsAnInvalidRow) {
    const auto codebook = matrix<float>::generate(256, 1, [](auto k, auto) { return k; });
    const matrix<float> x{{255}, {nan}, {254}};
    std::vector<std::uint8_t> codes(3);
    std::vector<float> distances(3);
    matrix<float> quantized(3, 1);
    step_stats stats;
    quantize_params params;
    params.stats = &stats;
    reference::quantize(x.view(), codebook.view(), view(codes), quantized.view(), view(distances), params);
    EXPECT_EQ(codes, (std::vector<std::uint8_t>{255, 255, 254}));
    EXPECT_EQ(distances[0], 0);
    EXPECT_TRUE(std::isnan(distances[1]));
    EXPECT_TRUE(std::isnan(quantized.at(1, 0)));
    EXPECT_EQ(stats.invalid_rows, 1);
    EXPECT_EQ(stats.active_codes, 2);
    matrix<float> decoded(3, 1);
    reference::lookup(codebook.view(), view(codes), decoded.view());
    EXPECT_EQ(decoded.at(0, 0), 255);
}

TEST(QuantizeTest, SixteenBitCodesReach65535) {
    const auto codebook = matrix<float>::generate(65536, 1, [](auto k, auto) { return k; });
    const matrix<float> x{{65535}, {32768}, {1e9f}, {0}};
    std::vector<std::uint16_t> codes(4);
    reference::quantize(x.view(), codebook.view(), view(codes));
    EXPECT_EQ(codes, (std::vector<std::uint16_t>{65535, 32768, 65535, 0}));
}

// ---- near ties, offsets, scales
// --------------------------------------------------------------------------------------

TEST(QuantizeTest, OneUlpNearerWins) {
    const float above = std::nextafter(1.0f, 2.0f), below = std::nextafter(1.0f, 0.0f);
    EXPECT_EQ(quantize(matrix<float>{{0}}, matrix<float>{{above}, {1}}).codes[0], 1);
    EXPECT_EQ(quantize(matrix<float>{{0}}, matrix<float>{{1}, {above}}).codes[0], 0);
    EXPECT_EQ(quantize(matrix<float>{{0}}, matrix<float>{{1}, {below}}).codes[0], 1);
    EXPECT_EQ(quantize(matrix<float>{{0}}, matrix<float>{{-above}, {1}}).codes[0], 1);
}

TEST(QuantizeTest, OneUlpNearerInOneOfManyDimensionsWins) {
    random_source random;
    for (const float offset : {0.0f, 1000.0f})
        for (int trial = 0; trial < 300; ++trial) {
            const auto x = matrix<float>::generate(1, 64, [&](auto, auto) { return offset + random.normal(); });
            auto far = matrix<float>::generate(1, 64, [&](auto, auto) { return offset + random.normal(); });
            const std::int64_t d = random.integer(0, 63);
            far(0, d) = x.at(0, d) + std::copysign(0.5f, x.at(0, d));
            const float near = std::nextafter(far.at(0, d), x.at(0, d));
            const auto pair = [&](std::int64_t nearer) {
                return matrix<float>::generate(
                    2, 64, [&](auto k, auto j) { return k == nearer && j == d ? near : far.at(0, j); });
            };
            ASSERT_EQ(quantize(x, pair(1)).codes[0], 1) << "offset " << offset;
            ASSERT_EQ(quantize(x, pair(0)).codes[0], 0) << "offset " << offset;
        }
}

TEST(QuantizeTest, GapsThatFloatCannotResolveAreDecidedInDouble) {
    const matrix<float> x{{0, 0}};
    EXPECT_EQ(quantize(x, matrix<float>{{1, std::ldexp(1.0f, -14)}, {1, 0}}).codes[0], 1);
    EXPECT_EQ(quantize(x, matrix<float>{{1, std::ldexp(1.0f, -26)}, {1, 0}}).codes[0], 1);
}

TEST(QuantizeTest, GapsThatDoubleCannotResolveAreTies) {
    const matrix<float> x{{0, 0}};
    EXPECT_EQ(quantize(x, matrix<float>{{1, std::ldexp(1.0f, -27)}, {1, 0}}).codes[0], 0);
}

TEST(QuantizeTest, ACommonOffsetOf1000ChangesNothing) {
    random_source random;
    const auto eighths = [&](std::int64_t n, std::int64_t d) {
        return matrix<float>::generate(n, d, [&](auto, auto) { return 0.125f * random.integer(-16, 16); });
    };
    const auto x = eighths(300, 17), codebook = eighths(40, 17);
    const auto shifted = [](const matrix<float>& m, float by) {
        return matrix<float>::generate(m.rows, m.columns, [&](auto i, auto d) { return m.at(i, d) + by; });
    };
    const auto expected = quantize(x, codebook);
    for (const float offset : {1000.0f, -1000.0f, 1048576.0f}) {
        const auto got = quantize(shifted(x, offset), shifted(codebook, offset));
        EXPECT_EQ(got.codes, expected.codes) << "offset " << offset;
        EXPECT_EQ(got.distances, expected.distances) << "offset " << offset;
    }
}

TEST(QuantizeTest, PowersOfTwoScaleTheDistancesAndLeaveTheCodes) {
    random_source random;
    const auto x = random.normals<float>(60, 9), codebook = random.normals<float>(23, 9);
    const auto scaled = [](const matrix<float>& m, int exponent) {
        return matrix<float>::generate(m.rows, m.columns,
                                       [&](auto i, auto d) { return std::ldexp(m.at(i, d), exponent); });
    };
    const auto expected = quantize(x, codebook);
    for (const int exponent : {-95, -50, -1, 1, 50, 60, 95}) {
        const auto got = quantize(scaled(x, exponent), scaled(codebook, exponent));
        EXPECT_EQ(got.codes, expected.codes) << "scale 2^" << exponent;
        if (std::abs(exponent) > 50) continue;
        for (std::size_t i = 0; i < got.distances.size(); ++i)
            EXPECT_EQ(got.distances[i], std::ldexp(expected.distances[i], 2 * exponent));
    }
}

TEST(QuantizeTest, ScalesFrom1eMinus30To1e30MixInOneBatch) {
    // Each scale has eight codes at integer points, none at the origin; a row lies 1/64 from one of them in each
    // coordinate, so its distance is 3 * 2^(2 e - 12): 0, subnormal, normal or infinite as a float.
    const int exponents[] = {-100, -67, -33, 0, 33, 58, 100};
    const auto point = [](std::int64_t k, std::int64_t d) -> float {
        const std::int64_t j = k % 8;
        return static_cast<float>(d == 0 ? j + 1 : d == 1 ? -(j % 3) : 1);
    };
    const auto codebook =
        matrix<float>::generate(56, 3, [&](auto k, auto d) { return std::ldexp(point(k, d), exponents[k / 8]); });
    const auto x = matrix<float>::generate(
        56, 3, [&](auto k, auto d) { return std::ldexp(point(k, d) + 0.015625f, exponents[k / 8]); });
    const auto got = quantize(x, codebook);
    EXPECT_EQ(got.codes, zero_to(56));
    for (std::int64_t i = 0; i < 56; ++i)
        EXPECT_EQ(got.distances[i], static_cast<float>(std::ldexp(3.0, 2 * exponents[i / 8] - 12))) << "row " << i;
    EXPECT_EQ(got.distances[0], 0);
    EXPECT_GT(got.distances[8], 0);
    EXPECT_LT(got.distances[8], std::numeric_limits<float>::min());
    EXPECT_EQ(got.distances[55], infinity);
    EXPECT_EQ(got.stats.invalid_rows, 0);
}

TEST(QuantizeTest, DecimalScalesFrom1eMinus30To1e30KeepTheirCodes) {
    const auto codebook = matrix<float>::generate(
        61, 2, [](auto k, auto d) { return static_cast<float>((d ? -1 : 1) * std::pow(10.0, k - 30)); });
    auto x = codebook;
    for (std::int64_t i = 0; i < 61; ++i) x(i, 0) *= 1.01f;
    EXPECT_EQ(quantize(x, codebook).codes, zero_to(61));
}

TEST(QuantizeTest, TheWholeRangeOfFloatWorks) {
    const float tiny = std::numeric_limits<float>::denorm_min();
    const matrix<float> codebook{{largest}, {-largest}, {0}, {tiny}, {1e-38f}, {3e38f}, {-1e-38f}};
    const matrix<float> x{{largest}, {-largest}, {0}, {tiny}, {1e-38f}, {3e38f}, {-1e-38f}, {-3e38f}, {2 * tiny}};
    const auto got = quantize(x, codebook);
    EXPECT_EQ(got.codes, (codes_t{0, 1, 2, 3, 4, 5, 6, 1, 3}));
    EXPECT_EQ(got.distances[7], infinity);
    EXPECT_EQ(got.distances[8], 0);
    EXPECT_EQ(got.stats.invalid_rows, 0);
}

TEST(QuantizeTest, DistancesPastFloatStillOrderTheCodes) {
    const matrix<float> codebook{{-largest, -largest}, {-largest, 0}, {-largest, -1e38f}};
    const auto got = quantize(matrix<float>{{largest, largest}}, codebook);
    EXPECT_EQ(got.codes[0], 1);
    EXPECT_EQ(got.distances[0], infinity);
    const double m = largest;
    EXPECT_DOUBLE_EQ(got.stats.commitment_loss, (4 * m * m + m * m) / 2);
}

#if CUVQ_HAS_HALF
TEST(QuantizeTest, TheWholeRangeOfHalfWorks) {
    const float tiny = std::ldexp(1.0f, -24);
    const matrix<__half> codebook{{65504}, {-65504}, {0}, {tiny}, {1}};
    const matrix<__half> x{{65504}, {-60000}, {0}, {tiny}, {0.75f}, {infinity}};
    EXPECT_EQ(quantize(x, codebook).codes, (codes_t{0, 1, 2, 3, 4, -1}));
}

TEST(QuantizeTest, AFloatCodebookIsNotRoundedToTheTypeOfXBeforeTheSearch) {
    // Rounded to half, both rows are 1.
    const matrix<float> codebook{{1 + std::ldexp(1.0f, -12)}, {1 - std::ldexp(1.0f, -13)}};
    const auto got = quantize(matrix<__half>{{1}}, codebook);
    EXPECT_EQ(got.codes[0], 1);
    EXPECT_EQ(got.distances[0], std::ldexp(1.0f, -26));
    EXPECT_EQ(got.quantized.at(0, 0), 1);
}

TEST(QuantizeTest, QuantizedRowsAreRoundedToTheTypeOfX) {
    const matrix<float> codebook{{1.001f}, {1e6f}};
    const auto half = quantize(matrix<__half>{{1}, {65504}}, codebook);
    EXPECT_EQ(half.codes, (codes_t{0, 0}));
    EXPECT_EQ(half.quantized.at(0, 0), 1.0009765625f);
    const auto narrow = quantize(matrix<__nv_bfloat16>{{1}, {1e6f}}, codebook);
    EXPECT_EQ(narrow.codes, (codes_t{0, 1}));
    EXPECT_EQ(narrow.quantized.at(0, 0), 1);
    EXPECT_EQ(narrow.quantized.at(1, 0), 999424);
    const auto past = quantize(matrix<__half>{{65504}}, matrix<float>{{1e6f}});
    EXPECT_EQ(past.codes[0], 0);
    EXPECT_EQ(past.quantized.at(0, 0), infinity);
}
#endif

// ---- random rows against extended precision
// --------------------------------------------------------------------------

TEST(QuantizeTest, RandomRowsAgreeWithExtendedPrecisionAndDistancesAreThoseOfTheChosenRow) {
    random_source random;
    for (const std::int64_t d : {1, 5, 64, 768}) {
        const auto x = random.normals<float>(50, d), codebook = random.normals<float>(70, d);
        const auto got = quantize(x, codebook);
        const auto wide_distance = [&](std::int64_t i, std::int64_t k) {
            long double sum = 0;
            for (std::int64_t j = d - 1; j >= 0; --j) {
                const long double difference = static_cast<long double>(x.at(i, j)) - codebook.at(k, j);
                sum += difference * difference;
            }
            return sum;
        };
        for (std::int64_t i = 0; i < x.rows; ++i) {
            long double best = wide_distance(i, 0);
            for (std::int64_t k = 1; k < codebook.rows; ++k) best = std::min(best, wide_distance(i, k));
            const long double chosen = wide_distance(i, got.codes[i]);
            ASSERT_LE(chosen, best * (1 + static_cast<long double>(d + 8) * std::ldexp(1.0L, -51))) << "row " << i;
            ASSERT_GE(got.distances[i], 0);
            ASSERT_NEAR(got.distances[i], chosen, 4e-7 * std::log2(d + 1.0) * chosen) << "row " << i;
            ASSERT_EQ(got.quantized.row(i), codebook.row(got.codes[i]));
        }
    }
}

TEST(QuantizeTest, TheOrderOfTheCodebookOnlyRenamesTheCodes) {
    random_source random;
    const auto x = random.normals<float>(80, 6), codebook = random.normals<float>(31, 6);
    const auto reversed = matrix<float>::generate(31, 6, [&](auto k, auto d) { return codebook.at(30 - k, d); });
    const auto a = quantize(x, codebook), b = quantize(x, reversed);
    for (std::size_t i = 0; i < a.codes.size(); ++i) EXPECT_EQ(a.codes[i], 30 - b.codes[i]);
    EXPECT_TRUE(same_bits(a.distances, b.distances));
}

TEST(QuantizeTest, ARowsCodeDoesNotDependOnItsPlaceInTheBatch) {
    random_source random;
    const auto x = random.normals<float>(37, 6), codebook = random.normals<float>(13, 6);
    const auto all = quantize(x, codebook);
    for (std::int64_t i = 0; i < x.rows; ++i) {
        const auto row = matrix<float>::generate(1, 6, [&](auto, auto d) { return x.at(i, d); });
        const auto one = quantize(row, codebook);
        EXPECT_EQ(one.codes[0], all.codes[i]);
        EXPECT_EQ(one.distances[0], all.distances[i]);
    }
}

TEST(QuantizeTest, RepeatedCallsGiveTheSameBits) {
    random_source random;
    const auto x = random.normals<float>(500, 6), codebook = random.normals<float>(50, 6);
    const auto first = quantize(x, codebook);
    for (int run = 0; run < 5; ++run) {
        const auto again = quantize(x, codebook);
        EXPECT_TRUE(same(again, first));
        EXPECT_EQ(again.stats.commitment_loss, first.stats.commitment_loss);
        EXPECT_EQ(again.stats.perplexity, first.stats.perplexity);
    }
}

// ---- shapes and views
// -------------------------------------------------------------------------------------------------

TEST(QuantizeTest, NoRowsLeaveTheOutputsUntouched) {
    const matrix<float> codebook{{1, 2}, {3, 4}};
    matrix<float> x(2, 2), quantized(2, 2, 42);
    codes_t codes(2, 42);
    std::vector<float> distances(2, 42);
    step_stats stats{42, 42, 42, 42, 42, 42};
    quantize_params params;
    params.stats = &stats;
    reference::quantize(matrix_view<float>(x.data.data(), 0, 2), codebook.view(),
                        vector_view<std::int32_t>(codes.data(), 0), matrix_view<float>(quantized.data.data(), 0, 2),
                        vector_view<float>(distances.data(), 0), params);
    EXPECT_EQ(codes, codes_t(2, 42));
    EXPECT_EQ(distances, std::vector<float>(2, 42));
    EXPECT_TRUE(same_bits(quantized, matrix<float>(2, 2, 42)));
    EXPECT_EQ(stats.commitment_loss, 0);
    EXPECT_EQ(stats.perplexity, 0);
    EXPECT_EQ(stats.active_codes, 0);
    EXPECT_EQ(stats.invalid_rows, 0);
    EXPECT_EQ(stats.restarted_codes, 0);
    EXPECT_EQ(stats.skipped_codes, 0);
}

TEST(QuantizeTest, NoRowsNeedNoMemory) {
    const matrix<float> codebook{{1, 2}};
    EXPECT_NO_THROW(reference::quantize(matrix_view<float>(nullptr, 0, 2), codebook.view(),
                                        vector_view<std::int32_t>(nullptr, 0), matrix_view<float>(nullptr, 0, 2),
                                        vector_view<float>(nullptr, 0)));
    EXPECT_NO_THROW(
        reference::lookup(codebook.view(), vector_view<std::int32_t>(nullptr, 0), matrix_view<float>(nullptr, 0, 2)));
}

TEST(QuantizeTest, OneRowOneCodeOneDimension) {
    const auto got = quantize(matrix<float>{{5}}, matrix<float>{{3}});
    EXPECT_EQ(got.codes, codes_t{0});
    EXPECT_EQ(got.distances, std::vector<float>{4});
    EXPECT_EQ(got.quantized.row(0), std::vector<float>{3});
    EXPECT_EQ(got.stats.commitment_loss, 4);
    EXPECT_EQ(got.stats.perplexity, 1);
}

TEST(QuantizeTest, OneCodeTakesEveryFiniteRow) {
    const matrix<float> x{{1, 2, 3}, {largest, 0, 0}, {nan, 0, 0}};
    EXPECT_EQ(quantize(x, matrix<float>{{-1e30f, 7, 0}}).codes, (codes_t{0, 0, -1}));
}

TEST(QuantizeTest, RowsOfASlidingWindowMayOverlap) {
    std::vector<float> signal(20);
    for (std::size_t t = 0; t < signal.size(); ++t) signal[t] = static_cast<float>(t * t);
    const auto windows = strided<const float>(signal.data(), 17, 4, 1);
    const auto codebook = matrix<float>::generate(17, 4, [&](auto k, auto d) { return signal[16 - k + d]; });
    outcome<float> got(17, 4);
    reference::quantize(windows, codebook.view(), view(got.codes), got.quantized.view(), view(got.distances));
    for (std::int64_t i = 0; i < 17; ++i) EXPECT_EQ(got.codes[i], 16 - i);
    EXPECT_EQ(got.distances, std::vector<float>(17, 0));
    // A codebook of windows, too, and whether or not the view is one of const.
    reference::quantize(codebook.view(), strided<float>(signal.data(), 17, 4, 1), view(got.codes));
    for (std::int64_t i = 0; i < 17; ++i) EXPECT_EQ(got.codes[i], 16 - i);
}

TEST(QuantizeTest, OneRowMayBeRepeatedByAStrideOfZero) {
    const matrix<float> row{{3, 4}}, codebook{{0, 0}, {3, 4}};
    codes_t codes(5);
    reference::quantize(strided(row.data.data(), 5, 2, 0), codebook.view(), view(codes));
    EXPECT_EQ(codes, codes_t(5, 1));
}

TEST(QuantizeTest, StaticColumnsAndOtherIndexTypesGiveWhatDynamicOnesGive) {
    random_source random;
    auto x = random.normals<float>(30, 3), codebook = random.normals<float>(9, 3);
    const auto expected = quantize(x, codebook);
    outcome<float> fixed(30, 3);
    reference::quantize(matrix_view<const float, 3>(x.data.data(), 30),
                        matrix_view<const float, 3>(codebook.data.data(), 9), view(fixed.codes),
                        matrix_view<float, 3>(fixed.quantized.data.data(), 30), view(fixed.distances));
    EXPECT_TRUE(same(fixed, expected));
    outcome<float> deduced(30, 3);
    reference::quantize(cuda::std::mdspan(x.data.data(), 30, 3), cuda::std::mdspan(codebook.data.data(), 9u, 3u),
                        cuda::std::mdspan(deduced.codes.data(), 30),
                        cuda::std::mdspan(deduced.quantized.data.data(), std::size_t{30}, std::size_t{3}),
                        cuda::std::mdspan(deduced.distances.data(), 30));
    EXPECT_TRUE(same(deduced, expected));
}

#if defined(__linux__)
TEST(QuantizeTest, RowsMayLieMoreThanFourGibibytesApart) {
    const std::int64_t stride = (std::int64_t{1} << 31) + 1;
    const std::size_t bytes = static_cast<std::size_t>(2 * stride + 2) * sizeof(float);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) GTEST_SKIP() << "no address space for three rows 8 GiB apart";
    const auto x = strided(static_cast<float*>(memory), 3, 2, stride);
    for (std::int64_t i = 0; i < 3; ++i) x(i, 0) = x(i, 1) = static_cast<float>(i + 1);
    const matrix<float> codebook{{3, 3}, {2, 2}, {1, 1}};
    codes_t codes(3);
    reference::quantize(x, codebook.view(), view(codes));
    EXPECT_EQ(codes, (codes_t{2, 1, 0}));
    munmap(memory, bytes);
}
#endif

// ---- statistics
// -------------------------------------------------------------------------------------------------------

TEST(QuantizeStats, CommitmentLossIsTheMeanOverValidRowsAndColumns) {
    const matrix<float> x{{1, 0}, {nan, 5}, {0, 3}, {-2, 2}};
    const auto stats = quantize(x, matrix<float>{{0, 0}}).stats;
    EXPECT_DOUBLE_EQ(stats.commitment_loss, (1.0 + 9 + 8) / (3 * 2));
    EXPECT_EQ(stats.invalid_rows, 1);
}

TEST(QuantizeStats, PerplexityOfEvenUseIsTheNumberOfUsedCodes) {
    const auto codebook = matrix<float>::generate(10, 1, [](auto k, auto) { return k; });
    const auto x = matrix<float>::generate(28, 1, [](auto i, auto) { return i % 7; });
    const auto stats = quantize(x, codebook).stats;
    EXPECT_NEAR(stats.perplexity, 7, 1e-12);
    EXPECT_EQ(stats.active_codes, 7);
}

TEST(QuantizeStats, PerplexityOfUnevenUse) {
    const matrix<float> x{{0}, {0}, {0}, {10}, {nan}};
    const auto stats = quantize(x, matrix<float>{{0}, {5}, {10}}).stats;
    // Shares 3/4 and 1/4: exp(-sum p ln p) = 4 / 3^(3/4).
    EXPECT_NEAR(stats.perplexity, 4 / std::pow(3, 0.75), 1e-12);
    EXPECT_EQ(stats.active_codes, 2);
    EXPECT_EQ(stats.invalid_rows, 1);
}

TEST(QuantizeStats, AreOverwritten) {
    step_stats stats{42, 42, 42, 42, 42, 42};
    quantize_params params;
    params.stats = &stats;
    const matrix<float> x{{1}};
    codes_t codes(1);
    reference::quantize(x.view(), x.view(), view(codes), discard, discard, params);
    EXPECT_EQ(stats.commitment_loss, 0);
    EXPECT_EQ(stats.perplexity, 1);
    EXPECT_EQ(stats.active_codes, 1);
    EXPECT_EQ(stats.restarted_codes, 0);
    EXPECT_EQ(stats.invalid_rows, 0);
    EXPECT_EQ(stats.skipped_codes, 0);
}

// ---- lookup
// ------------------------------------------------------------------------------------------------------------

TEST(LookupTest, NoCodesLeaveTheOutputUntouched) {
    const matrix<float> codebook{{1, 2}};
    matrix<float> quantized(2, 2, 42);
    reference::lookup(codebook.view(), vector_view<std::int32_t>(nullptr, 0),
                      matrix_view<float>(quantized.data.data(), 0, 2));
    EXPECT_TRUE(same_bits(quantized, matrix<float>(2, 2, 42)));
}

TEST(LookupTest, RowsAreGivenAsTheyAreEvenWhenNotFinite) {
    const matrix<float> codebook{{infinity, -1}, {nan, 2}};
    matrix<float> got(2, 2);
    reference::lookup(codebook.view(), view(codes_t{0, 1}), got.view());
    EXPECT_EQ(got.row(0), (std::vector<float>{infinity, -1}));
    EXPECT_TRUE(std::isnan(got.at(1, 0)));
    EXPECT_EQ(got.at(1, 1), 2);
}

}  // namespace
}  // namespace cuvq::test
