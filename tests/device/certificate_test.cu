// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The exact distance against the documented order on the host, bit by bit; the promise of the filter: a code that is
// nearest in float64 never has a float score above the limit; and what the tensor cores lose of a score, against what
// the certificate charges for it.
#include <cuvq/device/certificate.cuh>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <vector>

#include <cuda_fp16.h>
#include <gtest/gtest.h>
#include <cuda/ptx>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/arch/wgmma_sm90.cuh>

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

// ---- scores on tensor cores -----------------------------------------------------------------------------------------

constexpr int tile_rows = 64, tile_codes = 128, tile_threads = 128;

/// Whether this compilation for the device has {mma, wgmma}.
__global__ void compiled_paths(int* has) {
    has[0] = CUVQ_HAS_MMA;
    has[1] = CUVQ_HAS_WGMMA;
}

/// What `score_error` charges for the sums of rows of length |X^| = lengths[i] with codes of norm |C^| and offset |n|
/// that are the only ones of their codebook and, like the rows, are fp16 as they stand; t = `factor`.
__global__ void charges(const float* lengths, const float* norms, const float* offsets, float factor, int steps,
                        float* errors) {
    const int i = static_cast<int>(blockIdx.x), k = static_cast<int>(threadIdx.x);
    errors[i * tile_codes + k] = device::score_error(lengths[i], 0, factor, {norms[k], 0, offsets[k], 0}, steps);
}

/// Bytes, a multiple of 16, for a whole block.
__device__ void copy_bytes(char* to, const char* from, int bytes) {
    for (int i = 16 * static_cast<int>(threadIdx.x); i < bytes; i += 16 * tile_threads)
        *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
}

/// A thread's number `i` = 4 j + 2 h + b of a tile's scores, which both instructions spread alike.
__device__ void put_score(float* scores, int i, float score) {
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread / 32 * 16 + i / 2 % 2 * 8 + thread % 32 / 4, code = i / 4 * 8 + thread % 4 * 2 + i % 2;
    scores[row * tile_codes + code] = score;
}

template <int Steps>
__global__ __launch_bounds__(tile_threads) void mma_tile_scores(const char* rows, const char* codes, float* scores) {
#if CUVQ_HAS_MMA
    constexpr arch::slab_layout layout{Steps};
    alignas(128) __shared__ char row_slab[128 * tile_rows], code_slab[128 * tile_codes];
    arch::mma_scores<1, tile_codes / 8> score = {};
    for (int slab = 0; slab < layout.slabs(); ++slab) {
        const int width = layout.width(slab);
        copy_bytes(row_slab, rows + layout.slab_offset(tile_rows, slab), 2 * width * tile_rows);
        copy_bytes(code_slab, codes + layout.slab_offset(tile_codes, slab), 2 * width * tile_codes);
        __syncthreads();
        const std::uint32_t c = arch::shared_window(code_slab);
        const std::uint32_t x = arch::shared_window(row_slab) + static_cast<int>(threadIdx.x) / 32 * 16 * 2 * width;
        arch::mma_slab(score, x, c, width);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < tile_codes / 2; ++i) put_score(scores, i, score[0][i / 4][i % 4]);
#endif
}

template <int Steps>
__global__ __launch_bounds__(tile_threads) void wgmma_tile_scores(const char* rows, const char* codes, float* scores) {
#if CUVQ_HAS_WGMMA
    using layout = arch::wgmma_layout<Steps>;
    extern __shared__ char storage[];
    char* const x = storage + (-arch::shared_address(storage) & 1023);
    char* const c = x + layout::bytes(tile_rows);
    copy_bytes(x, rows, layout::bytes(tile_rows));
    copy_bytes(c, codes, layout::bytes(tile_codes));
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    __syncthreads();
    float score[tile_codes / 2];
    arch::wgmma_fence();
    arch::wgmma_scores<Steps>(score, arch::uniform(arch::operand(x)), arch::uniform(arch::operand(c)));
    arch::wgmma_commit();
    arch::wgmma_wait();
    arch::wgmma_done(score);
#pragma unroll
    for (int i = 0; i < tile_codes / 2; ++i) put_score(scores, i, score[i]);
#endif
}

/// A matrix as an operand of the tensor cores.
std::vector<char> operand_of(const matrix<__half>& m) {
    const arch::slab_layout layout{static_cast<int>(m.columns / 16)};
    const int rows = static_cast<int>(m.rows), columns = static_cast<int>(m.columns);
    std::vector<char> operand(static_cast<std::size_t>(rows * layout.row_bytes()));
    for (int i = 0; i < rows; ++i)
        for (int d = 0; d < columns; d += 8)
            std::memcpy(&operand[static_cast<std::size_t>(layout.offset(rows, i, d))], &m.data[i * m.columns + d], 16);
    return operand;
}

/// Of tiles of `Steps` steps: the scores that the library's tile functions give, against the sums they stand for.
template <int Steps>
class tile_sums {
public:
    static constexpr int columns = 16 * Steps;

    tile_sums() {
        const device_array<int> has(2);
        compiled_paths<<<1, 1>>>(has.data());
        check(cudaGetLastError());
        const auto compiled = has.download();
        if (compiled[0]) paths_.push_back({"mma", mma_tile_scores<Steps>, 0});
        if (!compiled[1]) return;
        const int bytes = arch::wgmma_layout<Steps>::bytes(tile_rows + tile_codes) + 1024;
        check(cudaFuncSetAttribute(wgmma_tile_scores<Steps>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        paths_.push_back({"wgmma", wgmma_tile_scores<Steps>, bytes});
    }
    bool none() const { return paths_.empty(); }

    /// No score of 64 rows with 128 codes is further from the exact sum than `score_error` says. If `factor`, that is
    /// what the last three columns of the rows hold, and those of the codes hold n, which are bounded apart from the
    /// rest. Where `is_lossy(row, code)`, float cannot hold the sum.
    template <class IsLossy>
    void expect_within_charge(const matrix<__half>& rows, const matrix<__half>& codes, float factor, IsLossy is_lossy) {
        const bool offset = factor > 0;
        const auto x = wide(rows), c = wide(codes);
        const device_array<float> errors(tile_rows * tile_codes);
        const device_array<float> lengths(norms_of(x, offset)), norms(norms_of(c, offset)), ns(offsets_of(c, offset));
        charges<<<tile_rows, tile_codes>>>(lengths.data(), norms.data(), ns.data(), offset ? factor : 1, Steps,
                                           errors.data());
        check(cudaGetLastError());
        const auto charged = errors.download();
        std::vector<double> exact;  // as products of halves are; summing up, double is 2^29 times finer than float
        for (int i = 0; i < tile_rows; ++i)
            for (int k = 0; k < tile_codes; ++k) exact.push_back(sum_of_products(&x[i * columns], &c[k * columns]));
        const device_array<char> row_operand(operand_of(rows)), code_operand(operand_of(codes));
        for (auto& path : paths_) {
            const device_array<float> scores(tile_rows * tile_codes);
            path.kernel<<<1, tile_threads, path.shared>>>(row_operand.data(), code_operand.data(), scores.data());
            check(cudaGetLastError());
            const auto got = scores.download();
            for (std::size_t p = 0; p < got.size(); ++p) {
                const double lost = std::abs(got[p] - exact[p]);
                const auto row = static_cast<int>(p) / tile_codes, code = static_cast<int>(p) % tile_codes;
                ASSERT_LE(lost, charged[p])
                    << path.name << ", " << Steps << " steps, row " << row << ", code " << code << ": " << got[p];
                if (is_lossy(row, code)) ASSERT_GT(lost, 0) << "these operands test nothing: row " << row;
                if (lost > 0) path.largest = std::max(path.largest, lost / charged[p]);
            }
        }
    }
    /// Tells what share of the bound was used up at most.
    void report() const {
        for (const auto& path : paths_)
            std::cout << path.name << ", " << Steps << " steps: lost up to " << path.largest << " of what is charged\n";
    }

private:
    struct path {
        const char* name;
        void (*kernel)(const char*, const char*, float*);
        int shared;
        double largest = 0;
    };

    static double sum_of_products(const double* a, const double* b) {
        double sum = 0;
        for (int d = 0; d < columns; ++d) sum += a[d] * b[d];
        return sum;
    }
    static std::vector<float> norms_of(const std::vector<double>& m, bool offset) {
        std::vector<float> norms;
        for (std::size_t i = 0; i < m.size(); i += columns) {
            double square = 0;
            for (int d = 0; d < columns - (offset ? 3 : 0); ++d) square += m[i + d] * m[i + d];
            norms.push_back(static_cast<float>(std::sqrt(square)));
        }
        return norms;
    }
    static std::vector<float> offsets_of(const std::vector<double>& m, bool offset) {
        std::vector<float> offsets;
        for (std::size_t end = columns; end <= m.size(); end += columns)
            offsets.push_back(offset ? static_cast<float>(std::abs(m[end - 3] + m[end - 2] + m[end - 1])) : 0.0f);
        return offsets;
    }

    std::vector<path> paths_;
};

/// The largest half below 2^exponent.
float half_below(int exponent) { return std::ldexp(1 - 0x1p-11f, exponent); }

/// Each sum has one large product, `large_x` times `large_c`, at every place of every step, beside small ones. Where
/// these lie just below a power of two near the last bit that is kept, each loses all that a term can lose.
template <int Steps>
void expect_sums_with_one_large_product(tile_sums<Steps>& sums, float large_x, float small_x, float large_c,
                                        float small_c) {
    constexpr int columns = sums.columns;
    for (const float sign : {1.0f, -1.0f})
        for (int first = 0; first < columns; first += tile_rows) {
            const auto is_large = [&](auto pair, auto d) { return d == (first + pair) % columns; };
            const auto x = matrix<__half>::generate(tile_rows, columns,
                                                    [&](auto i, auto d) { return is_large(i, d) ? large_x : small_x; });
            const auto c = matrix<__half>::generate(tile_codes, columns, [&](auto k, auto d) {
                return is_large(k / 2, d) ? (k % 2 ? -large_c : large_c) : sign * small_c;
            });
            sums.expect_within_charge(x, c, 0, [](int i, int k) { return i == k / 2; });
            if (testing::Test::HasFatalFailure()) return;
        }
}

/// Mixed magnitudes, more or less, without and with offsets of all sizes in three halves, times t.
template <int Steps>
void expect_random_sums(tile_sums<Steps>& sums, random_source& random) {
    constexpr int columns = sums.columns;
    for (const int span : {0, 4, 12})
        for (const float factor : {0.0f, 1.0f, 0x1p-10f, 0x1p-20f})
            for (int round = 0; round < 4; ++round) {
                const auto mixed = [&](std::int64_t rows) {
                    return matrix<__half>::generate(rows, columns, [&, row = 0](auto, auto d) mutable {
                        if (d == 0) row = static_cast<int>(random.integer(-span, 0));
                        return std::ldexp(random.normal(), row + static_cast<int>(random.integer(-span, 2)));
                    });
                };
                auto rows = mixed(tile_rows), codes = mixed(tile_codes);
                for (std::int64_t i = 0; factor > 0 && i < rows.rows; ++i)
                    for (int p = 3; p > 0; --p) rows(i, columns - p) = __float2half_rn(factor);
                for (std::int64_t k = 0; factor > 0 && k < codes.rows; ++k) {
                    double n = std::ldexp(random.normal(), static_cast<int>(random.integer(-12, 12)));
                    for (int p = 3; p > 0; --p) {
                        codes(k, columns - p) = __float2half_rn(static_cast<float>(n));
                        n -= static_cast<double>(codes.at(k, columns - p));
                    }
                }
                sums.expect_within_charge(rows, codes, factor, [](int, int) { return false; });
                if (testing::Test::HasFatalFailure()) return;
            }
}

template <int Steps>
void expect_sums_within_charge(random_source& random) {
    tile_sums<Steps> sums;
    if (sums.none()) GTEST_SKIP() << "no tensor cores of sm_80 or later";
    for (int bit = 20; bit <= 26 && !testing::Test::HasFatalFailure(); ++bit) {
        expect_sums_with_one_large_product(sums, 1, half_below(-(bit / 2)), 1, half_below(bit / 2 - bit));
        if (bit > 24) continue;
        // Rows, or codes, that are subnormal in fp16: their products are smaller than exponents alone tell.
        expect_sums_with_one_large_product(sums, 0x1p-18f, 0x1p-24f, 0x1p5f, half_below(11 - bit));
        expect_sums_with_one_large_product(sums, 0x1p5f, half_below(11 - bit), 0x1p-18f, 0x1p-24f);
    }
    expect_random_sums(sums, random);
    sums.report();
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

TEST_F(CertificateSmall, TensorCoresLoseNoMoreThanIsCharged) {
    random_source random;
    // As many steps as the tiles on Hopper have; the portable search has others between them.
    expect_sums_within_charge<1>(random);
    expect_sums_within_charge<5>(random);
    expect_sums_within_charge<9>(random);
    expect_sums_within_charge<17>(random);
}

}  // namespace
}  // namespace cuvq::test
