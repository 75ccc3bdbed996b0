// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The exact distance against the documented order on the host, bit by bit; and the promise of the filter: a code that
// is nearest in float64 never has a float score above the limit.
#include <cuvq/device/certificate.cuh>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "support/device.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/types.hpp"

namespace cuvq::test {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

/// distances[i * codes + k]: eight lanes a pair; every lane must get the same.
template <class X, class C>
__global__ void exact_distances(const X* x, const C* codebook, int rows, int codes, int columns, double* distances,
                                int* unequal) {
    const int groups = static_cast<int>(gridDim.x * blockDim.x) / device::exact_lanes;
    const int group = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / device::exact_lanes;
    for (int pair = group; pair < rows * codes; pair += groups) {
        const double distance = device::exact_distance(x + std::int64_t{pair / codes} * columns,
                                                       codebook + std::int64_t{pair % codes} * columns, columns);
        const unsigned mask = 0xFFu << (threadIdx.x % 32 / 8 * 8);
        const long long bits = __double_as_longlong(distance);
        if (__shfl_sync(mask, bits, 0, 8) != bits) atomicAdd(unequal, 1);
        if (threadIdx.x % 8 == 0) distances[pair] = distance;
    }
}

template <class X, class C>
std::vector<double> exact_distances_of(const matrix<X>& x, const matrix<C>& codebook) {
    const device_matrix<X> rows(x);
    const device_matrix<C> centres(codebook);
    const device_array<double> distances(x.rows * codebook.rows);
    const device_array<int> unequal(std::vector<int>{0});
    exact_distances<<<2, 96>>>(rows.data(), centres.data(), static_cast<int>(x.rows), static_cast<int>(codebook.rows),
                               static_cast<int>(x.columns), distances.data(), unequal.data());
    check(cudaGetLastError());
    EXPECT_EQ(unequal.download()[0], 0);
    return distances.download();
}

/// Float scores of every pair, summed by fma in so many interleaved chains, forwards or backwards: orders that a
/// filter may choose.
__global__ void float_scores(const float* x, const float* codebook, int rows, int codes, int columns, int chains,
                             bool backwards, float* scores) {
    for (int pair = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); pair < rows * codes;
         pair += static_cast<int>(gridDim.x * blockDim.x)) {
        const float* row = x + std::int64_t{pair / codes} * columns;
        const float* code = codebook + std::int64_t{pair % codes} * columns;
        float score = 0;
        for (int chain = 0; chain < chains; ++chain) {
            float sum = 0;
            for (int d = chain; d < columns; d += chains) {
                const int at = backwards ? columns - 1 - d : d;
                const float difference = row[at] - code[at];
                sum = fmaf(difference, difference, sum);
            }
            score += sum;
        }
        scores[pair] = score;
    }
}

__global__ void filter_limits(const float* least, int count, std::int64_t columns, float* limits) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) limits[i] = device::filter_limit(least[i], columns);
}

std::vector<float> limits_of(const std::vector<float>& least, std::int64_t columns) {
    const device_array<float> in(least), out(static_cast<std::int64_t>(least.size()));
    filter_limits<<<static_cast<int>(least.size() + 127) / 128, 128>>>(in.data(), static_cast<int>(least.size()),
                                                                       columns, out.data());
    check(cudaGetLastError());
    return out.download();
}

/// That no nearest code lies above the limit, in any of some orders of summation. How many rows the limit decided.
int expect_no_winner_missed(const matrix<float>& x, const matrix<float>& codebook) {
    const auto right = nearest_codes(x, codebook, ordered_distance64);
    const device_matrix<float> rows(x), centres(codebook);
    const device_array<float> device_scores(x.rows * codebook.rows);
    int decided = 0;
    for (const int chains : {1, 2, 16})
        for (const bool backwards : {false, true}) {
            float_scores<<<16, 128>>>(rows.data(), centres.data(), static_cast<int>(x.rows),
                                      static_cast<int>(codebook.rows), static_cast<int>(x.columns), chains, backwards,
                                      device_scores.data());
            check(cudaGetLastError());
            const auto scores = device_scores.download();
            std::vector<float> least;
            for (std::int64_t i = 0; i < x.rows; ++i) {
                float lowest = inf;
                for (std::int64_t k = 0; k < codebook.rows; ++k)
                    lowest = std::fmin(lowest, scores[static_cast<std::size_t>(i * codebook.rows + k)]);
                least.push_back(lowest);
            }
            const auto limits = limits_of(least, x.columns);
            for (std::int64_t i = 0; i < x.rows; ++i) {
                if (std::isnan(limits[i])) continue;
                ++decided;
                EXPECT_GE(right[i], 0) << "a limit for a row without a code";
                if (right[i] < 0) continue;
                const float score = scores[static_cast<std::size_t>(i * codebook.rows + right[i])];
                EXPECT_LE(score, limits[i]) << "row " << i << ", code " << right[i] << ", D = " << x.columns
                                            << ", chains " << chains << (backwards ? ", backwards" : "");
            }
        }
    return decided;
}

class CertificateSmall : public gpu_test {};
class CertificateTest : public gpu_test {};

template <class Elements>
class CertificateTypesSmall : public gpu_test {};
TYPED_TEST_SUITE(CertificateTypesSmall, element_pairs, type_names);

TYPED_TEST(CertificateTypesSmall, ExactDistanceIsSummedInTheDocumentedOrder) {
    random_source random;
    for (const std::int64_t d : {1, 2, 7, 8, 9, 15, 16, 17, 64, 100, 333}) {
        const auto x = random.normals<typename TypeParam::x>(11, d);
        const auto codebook = random.normals<typename TypeParam::codebook>(13, d);
        const auto got = exact_distances_of(x, codebook);
        const auto wide_x = wide(x), wide_c = wide(codebook);
        for (std::int64_t i = 0; i < 11; ++i)
            for (std::int64_t k = 0; k < 13; ++k)
                ASSERT_EQ(got[i * 13 + k], ordered_distance64(&wide_x[i * d], &wide_c[k * d], d))
                    << "row " << i << ", code " << k << ", D = " << d;
    }
}

TEST_F(CertificateSmall, ExactDistanceOfMixedMagnitudes) {
    random_source random;
    const auto wild = [&](std::int64_t rows, std::int64_t d) {
        return matrix<float>::generate(rows, d, [&](auto, auto) {
            return random.normal() * std::pow(10.0f, static_cast<float>(random.integer(-44, 37)));
        });
    };
    for (const std::int64_t d : {3, 21, 200}) {
        auto x = wild(20, d);
        const auto codebook = wild(20, d);
        x(0, 0) = std::numeric_limits<float>::max();
        const auto got = exact_distances_of(x, codebook);
        const auto wide_x = wide(x), wide_c = wide(codebook);
        for (std::int64_t pair = 0; pair < 400; ++pair)
            ASSERT_EQ(got[pair], ordered_distance64(&wide_x[pair / 20 * d], &wide_c[pair % 20 * d], d));
    }
}

TEST_F(CertificateSmall, ExactDistanceOfARowThatIsNotFiniteIsNotFinite) {
    for (const float bad : {nan, inf, -inf})
        for (const std::int64_t at : {0, 7, 8, 18}) {
            matrix<float> x(1, 19, 1), codebook(1, 19, 2);
            x(0, at) = bad;
            EXPECT_FALSE(std::isfinite(exact_distances_of(x, codebook)[0]));
            EXPECT_FALSE(std::isfinite(exact_distances_of(codebook, x)[0]));
            EXPECT_FALSE(std::isfinite(exact_distances_of(x, x)[0]));
        }
}

TEST_F(CertificateSmall, TheLimitIsAboveWhatItIsGivenGrowsWithItAndGivesUpInTime) {
    std::vector<float> least{0, 0x1p-149f, 0x1p-126f};
    for (float v = 0x1p-120f; v < 0x1p126f; v *= 3.7f) least.push_back(v);
    for (const std::int64_t d : {1, 8, 64, 2050, 1000000}) {
        const auto limits = limits_of(least, d);
        for (std::size_t i = 0; i < least.size(); ++i) {
            if (std::isnan(limits[i])) {
                EXPECT_GT(least[i], 0x1p125f);
                continue;
            }
            EXPECT_GT(limits[i], least[i]);
            EXPECT_GE(limits[i], least[i] * (1 + 2 * static_cast<double>(d + 8) * 0x1p-24));
            if (i > 0) EXPECT_GE(limits[i], limits[i - 1]);
        }
        for (const float limit : limits_of({inf, nan, 0x1p127f, std::numeric_limits<float>::max()}, d))
            EXPECT_TRUE(std::isnan(limit));
    }
    for (const std::int64_t d : {std::int64_t{1} << 20, std::int64_t{1} << 40})
        for (const float limit : limits_of(least, d)) EXPECT_TRUE(std::isnan(limit));
}

TEST_F(CertificateSmall, NoWinnerIsMissedAmongOrdinaryRows) {
    random_source random;
    for (const std::int64_t d : {1, 5, 64, 300}) {
        const auto x = random.normals<float>(60, d);
        EXPECT_EQ(expect_no_winner_missed(x, random.normals<float>(80, d)), 6 * 60);
    }
}

TEST_F(CertificateSmall, NoWinnerIsMissedAmongRowsThatDifferByUlps) {
    random_source random;
    for (const std::int64_t d : {1, 3, 16, 129}) {
        const auto base = random.normals<float>(1, d);
        const auto codebook = matrix<float>::generate(120, d, [&](auto, auto c) {
            return base.at(0, c) * (1 + 0x1p-23f * static_cast<float>(random.integer(-1, 1)));
        });
        for (const float spread : {0.0f, 1e-6f, 1e-2f, 1.0f, 1e6f})
            expect_no_winner_missed(
                matrix<float>::generate(40, d, [&](auto, auto c) { return base.at(0, c) + spread * random.normal(); }),
                codebook);
    }
}

TEST_F(CertificateSmall, NoWinnerIsMissedAmongSubnormalAndHugeAndMixedRows) {
    random_source random;
    const auto scaled = [&](std::int64_t rows, std::int64_t d, int lowest, int highest) {
        return matrix<float>::generate(rows, d, [&](auto, auto) {
            return std::ldexp(random.normal(), static_cast<int>(random.integer(lowest, highest)));
        });
    };
    for (const std::int64_t d : {1, 4, 30}) {
        expect_no_winner_missed(scaled(50, d, -149, -130), scaled(60, d, -149, -130));
        expect_no_winner_missed(scaled(50, d, -80, -60), scaled(60, d, -80, -60));  // squares around 2^-126
        expect_no_winner_missed(scaled(50, d, -140, 120), scaled(60, d, -140, 120));
        expect_no_winner_missed(scaled(50, d, 60, 66), scaled(60, d, 60, 66));  // squares around 2^127
    }
    auto codebook = scaled(60, 4, 0, 0);
    codebook(5, 1) = nan;
    codebook(6, 2) = inf;
    auto x = scaled(50, 4, 0, 0);
    x(7, 3) = -inf;
    EXPECT_EQ(expect_no_winner_missed(x, codebook), 6 * 49);
}

TEST_F(CertificateTest, NoWinnerIsMissedWhereAllRoundingsPointTheSameWay) {
    // Constant differences: each addition of one sum rounds like the last. Codes at almost equal distances by other
    // constants round otherwise, so scores drift apart as far as they can.
    random_source random;
    for (const std::int64_t d : {64, 1000, 2050, 30000}) {
        const auto codebook = matrix<float>::generate(200, d, [&, value = 0.0f](auto, auto c) mutable {
            if (c == 0) value = (1 + 0x1p-23f * static_cast<float>(random.integer(-40, 40)));
            return random.integer(0, 1) ? value : -value;
        });
        EXPECT_EQ(expect_no_winner_missed(matrix<float>(1, d), codebook), 6);
        // One large element first, then many that are almost half a unit in its last place.
        const auto lost = matrix<float>::generate(100, d, [&, value = 0.0f](auto, auto c) mutable {
            if (c == 0) value = 0x1p-12f * (1 + 0x1p-8f * static_cast<float>(random.integer(-8, 8)));
            return c == 0 ? 1.0f : value;
        });
        EXPECT_EQ(expect_no_winner_missed(matrix<float>(1, d), lost), 6);
    }
}

}  // namespace
}  // namespace cuvq::test
