// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/quantize.cuh>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "support/device.cuh"
#include "support/families.cuh"
#include "support/large.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/searches.cuh"
#include "support/types.hpp"

namespace cuvq::test {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

/// Everything that a search gives; codes[i] = -1 where there is none.
template <class X>
struct found {
    std::vector<std::int64_t> codes;
    matrix<X> quantized;
    std::vector<float> distances;
    step_stats stats;
};

template <class X>
bool same(const found<X>& a, const found<X>& b) {
    return a.codes == b.codes && same_bits(a.quantized, b.quantized) && same_bits(a.distances, b.distances) &&
           std::memcmp(&a.stats, &b.stats, sizeof(step_stats)) == 0;
}

/// Codes of any type; all bits set is -1, unless that is a code.
template <class Int>
std::vector<std::int64_t> signed_codes(const std::vector<Int>& codes, std::int64_t code_count) {
    std::vector<std::int64_t> result;
    for (const Int code : codes) {
        const bool mark = code == static_cast<Int>(-1) && static_cast<std::uint64_t>(code) >= std::uint64_t(code_count);
        result.push_back(mark ? -1 : static_cast<std::int64_t>(code));
    }
    return result;
}

/// The search on the CUDA cores, whatever the device: what `quantize` does where there is no faster one.
template <class XView, class CodebookView, class CodesView, class QuantizedView, class DistancesView>
void quantize_simt(const XView& x, const CodebookView& codebook, const CodesView& codes, const QuantizedView& quantized,
                   const DistancesView& distances) {
    const auto args = detail::validate_quantize("quantize_simt", x, codebook, codes, quantized, distances, {});
    if (args.x.rows > 0) dispatch::quantize_simt<simt_tile, dynamic_extent>(args, {}, nullptr);
}

/// The search of many rows on Hopper, whatever their number: codes only. False where there is no such search.
template <class XView, class CodebookView, class CodesView>
bool quantize_many(const XView& x, const CodebookView& codebook, const CodesView& codes) {
    const auto args = detail::validate_quantize("quantize_many", x, codebook, codes, discard, discard, {});
    int device = 0, major = 0;
    CUVQ_CHECK_CUDA(cudaGetDevice(&device));
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (args.x.rows == 0 || major != 9) return false;
    const shape room{std::max<std::int64_t>(args.x.rows, 65), args.codebook.rows, args.x.columns};
    detail::carver measure;
    dispatch::search_scratch(measure, room, {});
    const device_workspace ws(measure.bytes());
    detail::carver c(ws.lent().data);
    dispatch::search_scratch scratch(c, room, {});
    bool launched = false;
    dispatch::with_sm90_tile(args.x.columns, [&](auto tile) {
        dispatch::prepare<decltype(tile)::dimensions>(args.codebook, scratch.image, nullptr);
        dispatch::quantize_sm90_many<decltype(tile)>(args, {}, scratch, true, (args.x.rows - 1) / 64 + 1, processors(),
                                                     nullptr);
        launched = true;
    });
    CUVQ_CHECK_CUDA(cudaDeviceSynchronize());
    EXPECT_TRUE(ws.guard_untouched());
    return launched;
}

/// The memory of a search that asks for everything.
template <class X, class C, class Int = std::int32_t>
struct search_memory {
    device_matrix<X> x;
    device_matrix<C> codebook;
    device_array<Int> codes;
    device_matrix<X> quantized;
    device_array<float> distances;
    device_array<step_stats> stats{1};
    quantize_params params;
    shape size;

    search_memory(const matrix<X>& x_rows, const matrix<C>& codebook_rows, row_layout layout = {})
        : x(x_rows, layout),
          codebook(codebook_rows, layout),
          codes(x_rows.rows, layout.offset),
          quantized(x_rows.rows, x_rows.columns, layout),
          distances(x_rows.rows, layout.offset),
          size{x_rows.rows, codebook_rows.rows, x_rows.columns} {
        params.stats = stats.data();
    }

    void run(const workspace& ws = {}, cudaStream_t stream = nullptr) {
        quantize(x.view(), codebook.view(), codes.view(), quantized.view(), distances.view(), params, ws, stream);
    }
    void run_simt() { quantize_simt(x.view(), codebook.view(), codes.view(), quantized.view(), distances.view()); }
    void poison_outputs() {
        codes.fill(poison);
        quantized.fill(poison);
        distances.fill(poison);
        stats.fill(poison);
    }
    bool outputs_untouched() const {
        return codes.untouched() && quantized.untouched() && distances.untouched() && stats.untouched();
    }
    found<X> outcome() const {
        return {signed_codes(codes.download(), size.codes), quantized.download(), distances.download(),
                stats.download()[0]};
    }
};

template <class Int = std::int32_t, class X, class C>
found<X> search(const matrix<X>& x, const matrix<C>& codebook, row_layout layout = {}) {
    search_memory<X, C, Int> memory(x, codebook, layout);
    const device_workspace ws(quantize_workspace_bytes(memory.size, memory.params));
    memory.run(ws.lent());
    EXPECT_TRUE(ws.guard_untouched());
    EXPECT_TRUE(memory.quantized.padding_untouched());
    return memory.outcome();
}

template <class X, class C>
void expect_right(const matrix<X>& x, const matrix<C>& codebook, const found<X>& got) {
    EXPECT_TRUE(codes_are_nearest(x, codebook, got.codes));
    if (x.rows * codebook.rows * x.columns <= 20000000)
        EXPECT_EQ(got.codes, nearest_codes(x, codebook, ordered_distance64)) << "in the order of certificate.cuh";
    EXPECT_TRUE(distances_are_right(x, codebook, got.codes, got.distances));
    EXPECT_TRUE(rows_are_of(codebook, got.codes, got.quantized));
    EXPECT_TRUE(same_stats(got.stats, search_stats(x, codebook, got.codes)));
}

/// A search, judged; and the one on the CUDA cores, which must give the same.
template <class X, class C>
found<X> expect_exact(const matrix<X>& x, const matrix<C>& codebook, row_layout layout = {}) {
    const auto got = search(x, codebook, layout);
    expect_right(x, codebook, got);
    search_memory<X, C> memory(x, codebook, layout);
    memory.run_simt();
    const auto plain = memory.outcome();
    EXPECT_EQ(plain.codes, got.codes) << "on the CUDA cores";
    EXPECT_TRUE(same_bits(plain.quantized, got.quantized)) << "on the CUDA cores";
    EXPECT_TRUE(same_bits(plain.distances, got.distances)) << "on the CUDA cores";
    memory.poison_outputs();
    if (quantize_many(memory.x.view(), memory.codebook.view(), memory.codes.view()))
        EXPECT_EQ(memory.outcome().codes, got.codes) << "as if there were many rows";
    return got;
}

class QuantizeSmall : public gpu_test {};
class QuantizeTest : public gpu_test {};
class LargeTest : public gpu_test {};

// ---- element types --------------------------------------------------------------------------------------------------

template <class Elements>
class QuantizeTypesSmall : public gpu_test {
protected:
    using x = typename Elements::x;
    using codebook = typename Elements::codebook;
};
TYPED_TEST_SUITE(QuantizeTypesSmall, element_pairs, type_names);

TYPED_TEST(QuantizeTypesSmall, NormalData) {
    random_source random;
    for (const std::int64_t d : {1, 17, 64})
        expect_exact(random.normals<typename TestFixture::x>(130, d),
                     random.normals<typename TestFixture::codebook>(70, d));
}

TYPED_TEST(QuantizeTypesSmall, TiesOnAnIntegerGridGoToTheLowestCode) {
    random_source random;
    const auto x = random.integers<typename TestFixture::x>(150, 2, -3, 3);
    const auto codebook = random.integers<typename TestFixture::codebook>(90, 2, -3, 3);
    const auto got = expect_exact(x, codebook);
    EXPECT_EQ(got.codes, nearest_codes(x, codebook, distance64));
}

TYPED_TEST(QuantizeTypesSmall, UnalignedStridedRows) {
    random_source random;
    for (const std::int64_t d : {5, 16, 67}) {
        const auto x = random.normals<typename TestFixture::x>(70, d);
        const auto codebook = random.normals<typename TestFixture::codebook>(66, d);
        EXPECT_TRUE(same(expect_exact(x, codebook, awkward), search(x, codebook)));
    }
}

TYPED_TEST(QuantizeTypesSmall, NanAndInfInXAndCodebook) {
    random_source random;
    auto x = random.normals<typename TestFixture::x>(100, 19);
    auto codebook = random.normals<typename TestFixture::codebook>(80, 19);
    const float bad[] = {nan, inf, -inf};
    for (int j = 0; j < 12; ++j) {
        x(8 * j, (7 * j) % 19) = bad[j % 3];
        codebook(6 * j, (5 * j) % 19) = bad[j % 3];
    }
    const auto got = expect_exact(x, codebook);
    EXPECT_EQ(got.stats.invalid_rows, 12);
    for (int j = 0; j < 12; ++j) EXPECT_EQ(got.codes[8 * j], -1);
}

TYPED_TEST(QuantizeTypesSmall, LargestAndSmallestValuesOfTheType) {
    const auto extremes = [](auto zero) {
        using T = decltype(zero);
        // Halve down from 1 and double up from 1 as long as the type goes.
        std::vector<T> values{zero};
        float low = 1, high = 1;
        while (static_cast<float>(static_cast<T>(low / 2)) == low / 2 && low / 2 > 0) low /= 2;
        while (std::isfinite(static_cast<float>(static_cast<T>(high * 2)))) high *= 2;
        for (const float v : {low, 3 * low, high, 1.5f * high, 1.0f}) {
            values.push_back(static_cast<T>(v));
            values.push_back(static_cast<T>(-v));
        }
        return values;
    };
    random_source random;
    const auto pick = [&](const auto& values) { return static_cast<float>(values[random.integer(0, 10)]); };
    const auto of_x = extremes(typename TestFixture::x{});
    const auto of_codebook = extremes(typename TestFixture::codebook{});
    for (const std::int64_t d : {1, 2, 9})
        expect_exact(
            matrix<typename TestFixture::x>::generate(80, d, [&](auto, auto) { return pick(of_x); }),
            matrix<typename TestFixture::codebook>::generate(65, d, [&](auto, auto) { return pick(of_codebook); }));
}

// ---- code types -----------------------------------------------------------------------------------------------------

template <class Int>
class QuantizeCodesSmall : public gpu_test {};
TYPED_TEST_SUITE(QuantizeCodesSmall, code_types, type_names);

TYPED_TEST(QuantizeCodesSmall, EveryCodeTypeHoldsTheSameCodes) {
    random_source random;
    const auto codebook = random.normals<float>(200, 8);
    for (const std::int64_t n : {90, 64 * processors() + 90}) {
        auto x = random.normals<float>(n, 8);
        x(40, 3) = nan;
        x(n - 1, 0) = inf;
        for (const row_layout layout : {row_layout{}, awkward}) {
            const auto got = search<TypeParam>(x, codebook, layout);
            expect_right(x, codebook, got);
            EXPECT_EQ(got.codes[40], -1);
            EXPECT_EQ(got.codes[n - 1], -1);
        }
    }
}

template <class Int>
void expect_invalid_rows_told_by_distance(std::int64_t n, std::int64_t d) {
    constexpr std::int64_t k = std::int64_t{1} << (8 * sizeof(Int));
    random_source random;
    std::vector<std::int64_t> values(n);
    for (auto& value : values) value = random.integer(0, k - 1);
    values[3] = k - 1;
    auto x = matrix<float>::generate(n, d, [&](auto i, auto) { return values[i]; });
    x(11, 0) = nan;
    const auto got = search<Int>(x, matrix<float>::generate(k, d, [](auto i, auto) { return i; }));
    for (std::int64_t i = 0; i < x.rows; ++i) {
        if (i == 11) continue;
        ASSERT_EQ(got.codes[i], values[i]);
        ASSERT_EQ(got.distances[i], 0.0f);
    }
    EXPECT_EQ(got.codes[11], k - 1);
    EXPECT_TRUE(std::isnan(got.distances[11]));
    EXPECT_TRUE(std::isnan(got.quantized.at(11, 0)));
    EXPECT_EQ(got.stats.invalid_rows, 1);
}

TEST_F(QuantizeSmall, WhereEveryValueIsACodeTheDistanceTellsInvalidRows) {
    expect_invalid_rows_told_by_distance<std::uint8_t>(20, 1);
    expect_invalid_rows_told_by_distance<std::uint16_t>(20, 1);
    const std::int64_t n = 64 * processors() + 1;
    for (const std::int64_t d : {7, 8}) {
        expect_invalid_rows_told_by_distance<std::uint8_t>(n, d);
        const auto none = search<std::uint8_t>(random_source().normals<float>(n, d),
                                               matrix<float>::generate(256, d, [](auto, auto) { return nan; }));
        for (const float distance : none.distances) ASSERT_TRUE(std::isnan(distance));
        EXPECT_EQ(none.stats.invalid_rows, n);
    }
}

// ---- shapes ---------------------------------------------------------------------------------------------------------

TEST_F(QuantizeSmall, DimensionsOneToAHundredAndThirtyAndAroundTheOperandSizes) {
    random_source random;
    std::vector<std::int64_t> dimensions{140, 141, 142, 204, 255, 256, 269, 270};
    for (std::int64_t d = 1; d <= 130; ++d) dimensions.push_back(d);
    for (const std::int64_t d : dimensions) expect_exact(random.normals<float>(67, d), random.normals<float>(135, d));
}

TEST_F(QuantizeSmall, AStaticNumberOfColumnsChangesNothing) {
    random_source random;
    const auto x = random.normals<float>(70, 24), codebook = random.normals<float>(50, 24);
    const auto dynamic = expect_exact(x, codebook);
    search_memory<float, float> memory(x, codebook);
    const auto expect_same = [&](const auto& x_view, const auto& codebook_view) {
        memory.poison_outputs();
        quantize(x_view, codebook_view, memory.codes.view(), memory.quantized.view(), memory.distances.view(),
                 memory.params);
        EXPECT_TRUE(same(memory.outcome(), dynamic));
    };
    expect_same(memory.x.fixed<24>(), memory.codebook.fixed<24>());
    expect_same(memory.x.view(), memory.codebook.fixed<24>());
    expect_same(memory.x.fixed<24>(), memory.codebook.view());
}

TEST_F(QuantizeSmall, RowsAndCodesAroundTheEdgesOfTiles) {
    random_source random;
    for (const std::int64_t n : {1, 15, 16, 17, 63, 64, 65, 127, 129})
        for (const std::int64_t k : {1, 2, 16, 17, 64, 65, 127, 128, 129, 257})
            expect_exact(random.normals<float>(n, 4), random.normals<float>(k, 4));
}

TEST_F(QuantizeSmall, WithoutRowsNoOutputIsTouched) {
    random_source random;
    const auto codebook = random.normals<float>(5, 3);
    const auto got = search(matrix<float>(0, 3), codebook);
    EXPECT_TRUE(same_stats(got.stats, {}));
    // Views of no rows into memory that is there.
    search_memory<float, float> memory(random.normals<float>(4, 3), codebook);
    quantize(strided(memory.x.data(), 0, 3, 3), memory.codebook.view(),
             vector_view<std::int32_t>(memory.codes.data(), 0), strided(memory.quantized.data(), 0, 3, 3),
             vector_view<float>(memory.distances.data(), 0));
    EXPECT_TRUE(memory.outputs_untouched());
}

TEST_F(QuantizeSmall, RowsThatShareMemory) {
    random_source random;
    const auto values = random.normals<float>(1, 80), codebook = random.normals<float>(30, 16);
    const device_matrix<float> memory(values), centres(codebook);
    for (const std::int64_t stride : {0, 1, 5}) {
        const std::int64_t n = stride == 0 ? 70 : 64 / stride + 1;
        const auto x = matrix<float>::generate(n, 16, [&](auto i, auto d) { return values.at(0, i * stride + d); });
        device_array<std::int32_t> codes(n);
        quantize(strided<const float>(memory.data(), n, 16, stride), centres.view(), codes.view());
        EXPECT_TRUE(codes_are_nearest(x, codebook, signed_codes(codes.download(), 30)));
    }
}

TEST_F(QuantizeTest, AThousandCodes) {
    random_source random;
    for (const std::int64_t d : {8, 64, 129})
        expect_exact(random.normals<float>(777, d), random.normals<float>(1000, d));
}

TEST_F(QuantizeTest, FewRowsOfACodebookThatAllBlocksShare) {
    random_source random;
    for (const auto& [n, k, d] : std::vector<std::array<std::int64_t, 3>>{
             {1, 50000, 200}, {64, 49152, 142}, {64, 49151, 142}, {65, 49152, 142}}) {
        auto x = random.normals<float>(n, d), codebook = random.normals<float>(k, d);
        for (const std::int64_t code : {k / 3, k / 2, k - 1})  // in several blocks' parts
            for (std::int64_t c = 0; c < d; ++c) codebook(code, c) = x.at(n - 1, c);
        expect_exact(x, codebook);
        if (!dispatch::serves_sm90<sm90_d269, float, float>(k, d)) continue;
        search_memory<float, float> memory(x, codebook);
        const device_array<char> image(static_cast<std::int64_t>(prepared_codebook_bytes(k, d)));
        memory.params.prepared = {image.data(), static_cast<std::size_t>(image.size())};
        prepare(memory.codebook.view(), memory.params.prepared);
        for (const accuracy how : {accuracy::exact, accuracy::fast}) {
            memory.params.accuracy = how;
            memory.params.stats = nullptr;
            const bool shares = how == accuracy::exact && n <= 64 && k >= 49152;
            EXPECT_EQ(launches([&](cudaStream_t stream) {
                          quantize(memory.x.view(), memory.codebook.view(), memory.codes.view(), discard, discard,
                                   memory.params, {}, stream);
                      }),
                      shares ? 2 : 1);
        }
    }
}

/// The more bits a code has, the fewer candidates an open row can list: from 256 tiles on.
TEST_F(QuantizeTest, EqualCodesOfMoreBits) {
    random_source random;
    for (const std::int64_t k : {32640, 32641, 65535, 65536, 65537, 1 << 21, (1 << 21) + 1}) {
        constexpr std::int64_t d = 8;
        auto codebook = random.normals<float>(k, d);
        auto x = random.normals<float>(70, d);
        for (std::int64_t i = 0; i < x.rows; ++i)
            for (std::int64_t copy = 0; copy < i % 9; ++copy)  // one of them is the last code
                for (std::int64_t c = 0; c < d; ++c)
                    codebook(k - 1 - (i - 1 + 71 * copy) * 83, c) = x.at(i, c) + (c == 0 ? 1e-3f : 0.0f);
        expect_exact(x, codebook);
    }
}

TEST_F(QuantizeTest, ManyColumns) {
    random_source random;
    for (const std::int64_t d : {768, 2050}) {
        expect_exact(random.normals<float>(70, d), random.normals<float>(90, d));
        expect_exact(random.normals<__half>(33, d), random.normals<__half>(20, d), awkward);
    }
}

TEST_F(QuantizeTest, MoreColumnsThanTheFilterServes) {
    random_source random;
    constexpr std::int64_t d = (1 << 20) + 5;
    const auto codebook = random.normals<float>(5, d);
    auto x = random.normals<float>(3, d);
    x(1, d - 1) = nan;
    const auto got = search(x, codebook);
    EXPECT_TRUE(codes_are_nearest(x, codebook, got.codes));
    EXPECT_TRUE(distances_are_right(x, codebook, got.codes, got.distances));
}

TEST_F(QuantizeTest, MoreTilesThanBlocks) {
    random_source random;
    const std::int64_t n = dispatch::most_search_blocks * simt_tile::rows + 12345;
    expect_exact(random.normals<float>(n, 2), random.normals<float>(9, 2));
}

// ---- hard values ----------------------------------------------------------------------------------------------------

TEST_F(QuantizeSmall, OneRepeatedRow) {
    random_source random;
    const auto row = random.normals<float>(1, 12);
    const auto codebook = matrix<float>::generate(300, 12, [&](auto, auto d) { return row.at(0, d); });
    const auto got = expect_exact(random.normals<float>(70, 12), codebook);
    EXPECT_EQ(got.codes, std::vector<std::int64_t>(70, 0));
}

/// All scores are 0, and so is the bound on their error: a tag must not pass for a score.
TEST_F(QuantizeSmall, NothingButZeros) {
    for (const std::int64_t d : {3, 12, 70, 140, 200, 300})
        for (const std::int64_t k : {1, 300, 5000}) {
            const matrix<float> zeros(k, d, 0.0f);
            const auto got = expect_exact(matrix<float>(70, d, 0.0f), zeros);
            EXPECT_EQ(got.codes, std::vector<std::int64_t>(70, 0));
            // One code differs from the others and from the row by less than scores can say.
            auto codebook = matrix<float>(k, d, 1.0f);
            codebook(k / 6, d - 1) = 0.5f;
            auto x = matrix<float>(70, d, 1.0f);
            for (std::int64_t i = 0; i < x.rows; i += 2) x(i, d - 1) = 0.5f;
            expect_exact(x, codebook);
            auto tiny = zeros;
            tiny(k / 6, 0) = 1e-30f;
            auto near = matrix<float>(70, d, 0.0f);
            for (std::int64_t i = 0; i < near.rows; i += 2) near(i, 0) = 1e-30f;
            expect_exact(near, tiny);
        }
}

TEST_F(QuantizeSmall, ManyCopiesOfFewRows) {
    random_source random;
    const auto rows = random.normals<float>(7, 5);
    const auto codebook = matrix<float>::generate(260, 5, [&](auto k, auto d) { return rows.at(6 - k % 7, d); });
    const auto got = expect_exact(random.normals<float>(100, 5), codebook);
    for (const std::int64_t code : got.codes) EXPECT_LT(code, 7);
}

TEST_F(QuantizeSmall, SomeCopiesOfARowAnywhereInTheCodebook) {
    random_source random;
    // x lies near a row that has copies, and near-copies, in few or many tiles of codes.
    for (const std::int64_t k : {100, 700, 1500})
        for (const int copies : {2, 3, 4, 5, 8, 9, 20, 32, 33, 90}) {
            auto codebook = random.normals<float>(k, 6);
            const auto row = random.normals<float>(1, 6);
            for (int copy = 0; copy < copies; ++copy) {
                const std::int64_t at = random.integer(0, k - 1);
                for (std::int64_t d = 0; d < 6; ++d) codebook(at, d) = row.at(0, d);
                codebook(at, copy % 6) *= 1 + 0x1p-23f * static_cast<float>(random.integer(0, copies % 3));
            }
            expect_exact(matrix<float>::generate(
                             65, 6, [&](auto i, auto d) { return row.at(0, d) + 1e-3f * i * random.normal(); }),
                         codebook);
        }
}

/// Hopper's search of many rows keeps apart the codes that one thread scores by tile and group of eight places, and
/// those of a group by their place in it: rows whose near codes meet in some of these, in few and many tiles.
TEST_F(QuantizeSmall, NearCodesAmongThoseOfOneThread) {
    random_source random;
    for (const auto& [k, d] :
         {std::pair<std::int64_t, std::int64_t>{128, 6}, {1000, 3}, {1000, 40}, {4096, 6}, {4224, 6}, {33000, 5}}) {
        const std::int64_t tiles = (k - 1) / 128 + 1;
        for (const int copies : {2, 3, 4, 5, 6, 9, 12})
            for (const int pattern : {0, 1, 2, 3}) {
                auto codebook = random.normals<float>(k, d);
                const auto row = random.normals<float>(1, d);
                const std::int64_t q = random.integer(0, 3), tile0 = random.integer(0, tiles - 1);
                const std::int64_t group0 = random.integer(0, 3), column0 = random.integer(0, 7);
                for (int copy = 0; copy < copies; ++copy) {
                    // One group; one column; three of each; anything.
                    const std::int64_t tile = pattern == 0 ? tile0 : random.integer(0, tiles - 1);
                    const std::int64_t group = pattern == 0   ? group0
                                               : pattern == 2 ? random.integer(0, 2)
                                                              : random.integer(0, 3);
                    const std::int64_t column = pattern == 1   ? column0
                                                : pattern == 2 ? random.integer(0, 2)
                                                               : random.integer(0, 7);
                    const std::int64_t place = group * 8 + column;
                    const std::int64_t at =
                        std::min(k - 1, (pattern == 2 ? tile0 : tile) * 128 + place / 2 * 8 + 2 * q + place % 2);
                    for (std::int64_t c = 0; c < d; ++c) codebook(at, c) = row.at(0, c);
                    codebook(at, copy % d) *= 1 + 0x1p-23f * static_cast<float>(random.integer(0, copies % 3));
                }
                expect_exact(
                    matrix<float>::generate(
                        70, d, [&](auto i, auto c) { return row.at(0, c) + 1e-3f * (i % 35) * random.normal(); }),
                    codebook);
            }
    }
}

TEST_F(QuantizeSmall, SomeRowsNearMoreCodesThanAreListed) {
    random_source random;
    // So few that several blocks share each, in a codebook large enough for that.
    for (const auto& [k, d] : {std::pair<std::int64_t, std::int64_t>{1200, 64}, {20000, 5}, {3000, 30}}) {
        auto codebook = random.normals<float>(k, d);
        for (std::int64_t copy = 0; copy < 100; ++copy)
            for (std::int64_t c = 0; c < d; ++c)
                codebook(copy * 11 + 3, c) = codebook.at(3, c) * (1 + 0x1p-22f * random.integer(0, 2));
        auto x = random.normals<float>(150, d);
        for (std::int64_t i = 0; i < 30; ++i)
            for (std::int64_t c = 0; c < d; ++c) x(5 * i, c) = codebook.at(3, c) + 1e-4f * random.normal();
        x(7, 0) = nan;
        x(149, d - 1) = -inf;
        expect_exact(x, codebook);
    }
}

TEST_F(QuantizeSmall, RowsNearSeveralEqualCodes) {
    random_source random;
    for (const std::int64_t copies : {3, 4, 5, 6, 8, 9})
        for (const std::int64_t every : {1, 3})
            for (const std::int64_t d : {5, 40}) {
                const auto rows = random.normals<float>(50, d);
                const auto codebook =
                    matrix<float>::generate(50 * copies, d, [&](auto k, auto c) { return rows.at(k * 7 % 50, c); });
                expect_exact(matrix<float>::generate(500, d,
                                                     [&](auto i, auto c) {
                                                         const float near =
                                                             rows.at(i % 50, c) + 1e-3f * random.normal();
                                                         return i % every == 0 ? near : 3 * random.normal();
                                                     }),
                             codebook);
            }
}

/// As when a batch of a few frames has replaced all of a codebook.
TEST_F(QuantizeTest, FewRowsWithManyCopiesEach) {
    random_source random;
    for (const auto& [n, k, d] : {std::array<std::int64_t, 3>{64, 2048, 256}, {1, 2048, 256}, {200, 4000, 100}}) {
        const auto rows = random.normals<float>(n, d);
        for (const std::int64_t distinct : {n, n / 2 + 1}) {
            const auto codebook = matrix<float>::generate(k, d, [&](auto code, auto c) {
                return rows.at(code * 7 % distinct, c) * (1 + 0x1p-23f * static_cast<float>(code % 2));
            });
            expect_exact(rows, codebook);
        }
    }
}

/// Rows with more candidates than one block lists, among rows with few, with one, with none, and such that no score
/// decides: a cluster of blocks settles them together. `copies_of`: distinct rows in most of the codebook.
void expect_exact_together(random_source& random, std::int64_t n, std::int64_t k, std::int64_t d,
                           std::int64_t copies_of) {
    SCOPED_TRACE(testing::Message() << "N = " << n << ", K = " << k << ", D = " << d << ", copies of " << copies_of);
    const auto rows = random.normals<float>(copies_of, d);
    auto codebook = matrix<float>::generate(k, d, [&](auto code, auto c) {
        return code % 5 == 4 ? random.normal()
                             : rows.at(code * 7 % copies_of, c) * (1 + 0x1p-23f * static_cast<float>(code % 3));
    });
    codebook(k / 2, d - 1) = nan;
    codebook(k - 1, 0) = inf;
    auto x = matrix<float>::generate(n, d, [&](auto i, auto c) {
        if (i % 7 == 3) return codebook.at((4 + 5 * i) % (k - 1), c);  // one candidate
        if (i % 7 == 4) return 1e30f * random.normal();                // beyond half precision
        return rows.at(i % copies_of, c) + 1e-3f * random.normal();
    });
    if (n > 5) x(5, d / 2) = nan;
    if (n > 20) x(20, 0) = -inf;
    expect_exact(x, codebook);
}

TEST_F(QuantizeSmall, RowsThatAClusterSettlesTogether) {
    random_source random;
    for (const std::int64_t n : {1, 6, 17, 65})
        for (const std::int64_t d : {5, 70}) expect_exact_together(random, n, 600, d, 2);
}

TEST_F(QuantizeTest, RowsThatAClusterSettlesTogether) {
    random_source random;
    for (const std::int64_t n : {1, 2, 16, 63, 64, 200})
        for (const std::int64_t d : {8, 64, 128, 256}) {
            expect_exact_together(random, n, 2048, d, 1);
            expect_exact_together(random, n, 1000, d, 7);
        }
    // Several tiles for each warpgroup of sixteen blocks, and not for each as many; then clusters of fewer.
    for (const auto& [k, d] : {std::pair<std::int64_t, std::int64_t>{20000, 13}, {13000, 70}, {9000, 128}, {7000, 256}})
        expect_exact_together(random, 3, k, d, 3);
    for (const std::int64_t n : {1500, 3000, 8000}) expect_exact_together(random, n, 1000, 40, 11);
}

/// More open rows in one stretch of the batch than those who begin with them take.
TEST_F(QuantizeTest, AHardStretchOfManyRows) {
    random_source random;
    struct {
        std::int64_t n, d, hard;
    } cases[] = {{300000, 40, 9000}, {1 << 22, 5, 70000}};
    for (const auto& [n, d, hard] : cases) {
        SCOPED_TRACE(testing::Message() << n << " rows, D = " << d);
        // Every code of the first sixteen has a near copy, and rows of the stretch lie between them.
        auto codebook = random.normals<float>(160, d);
        for (std::int64_t j = 0; j < 16; ++j)
            for (std::int64_t c = 0; c < d; ++c)
                codebook(16 + j, c) = codebook.at(j, c) * (1 + 0x1p-16f * random.normal());
        auto x = random.normals<float>(n, d);
        for (std::int64_t i = n / 3; i < n / 3 + hard; ++i)
            for (std::int64_t c = 0; c < d; ++c) x(i, c) = codebook.at(i % 16, c) + 1e-3f * random.normal();
        const auto got = search(x, codebook);
        EXPECT_TRUE(codes_are_nearest(x, codebook, got.codes));
    }
}

TEST_F(QuantizeSmall, OutliersAmongCodesAndRows) {
    random_source random;
    for (const float far : {100.0f, 1e5f, 1e10f, 1e30f})
        for (const std::int64_t at : {0, 57, 149}) {
            auto codebook = random.normals<float>(150, 11);
            auto x = random.normals<float>(70, 11);
            codebook(at, 3) = far;
            expect_exact(x, codebook);
            x(5, 5) = -far;
            x(69, 3) = far;
            expect_exact(x, codebook);
        }
    // All codes, or all rows, far from the rest.
    auto x = random.normals<float>(70, 9), codebook = random.normals<float>(140, 9);
    for (float& v : x.data) v += 3e4f;
    expect_exact(x, codebook);
    expect_exact(codebook, x);
}

/// v moved by so many units in the last place.
float nudged(float v, std::int64_t ulps) {
    for (; ulps > 0; --ulps) v = std::nextafter(v, inf);
    for (; ulps < 0; ++ulps) v = std::nextafter(v, -inf);
    return v;
}

TEST_F(QuantizeSmall, NearestByApproximationIsNotTheNearest) {
    random_source random;
    // Rounding to fp16, or to two halves, reverses the order of codes that x lies between, many times over.
    for (const std::int64_t d : {1, 3, 4, 16, 128, 256}) {
        const auto base = random.normals<float>(40, d);
        const float least = d <= 4 ? 0x1p-23f : 0x1p-13f;
        const auto codebook = matrix<float>::generate(240, d, [&](auto k, auto c) {
            return base.at(k / 6, c) * (1 + least * static_cast<float>(random.integer(-8, 8)));
        });
        expect_exact(matrix<float>::generate(130, d,
                                             [&](auto i, auto c) {
                                                 const std::int64_t k = 6 * (i % 40);
                                                 return 0.5f * (codebook.at(k, c) + codebook.at(k + 1, c));
                                             }),
                     codebook);
    }
}

/// A search of rows for each of which the tensor cores' sums put a wrong code first: `fast` shows that they do.
void expect_exact_where_sums_mislead(const matrix<float>& x, const matrix<float>& codebook) {
    const auto got = expect_exact(x, codebook);
    search_memory<float, float> memory(x, codebook);
    if (!quantize_many(memory.x.view(), memory.codebook.view(), memory.codes.view())) return;
    memory.params.accuracy = accuracy::fast;  // on Hopper, by sums alone
    memory.run();
    const auto fast = memory.outcome();
    for (std::size_t i = 0; i < got.codes.size(); ++i)
        EXPECT_NE(fast.codes[i], got.codes[i]) << "this tests nothing: row " << i;
}

TEST_F(QuantizeSmall, SumsThatLoseWhatTheirOrderSays) {
    // Each row lies between two codes. Their scores begin with the same large product, which another one takes away
    // again at the end. One code has small products besides, just below 2^-23 of the large one: each loses up to a last
    // bit of the sum. The other code has one middling product instead, which makes almost as much of a difference. So
    // sums come out in the wrong order, by more than tags and roundings account for: what the bound charges for sums is
    // all that keeps the right code. Codes have their negatives beside them, so that the centre is 0, and everything
    // fits fp16 as it stands.
    constexpr float small_x = 0x1p-11f * (1 - 0x1p-11f), small_c = 0.5f * small_x, middling_x = 0x1p-6f;
    const auto share = [](double x, double c) { return std::abs(x * c - 0.5 * c * c); };  // of a score, in one column
    const auto with_negatives = [](const matrix<float>& m) {
        return matrix<float>::generate(2 * m.rows, m.columns,
                                       [&](auto i, auto c) { return i % 2 ? -m.at(i / 2, c) : m.at(i / 2, c); });
    };
    for (const std::int64_t d : {141, 269, 600}) {
        matrix<float> rows(8, d), codes(16, d);
        for (std::int64_t i = 0; i < 8; ++i) {
            const bool rises = i % 2 == 0, turned = i / 2 % 2 == 1;
            const float sign = rises ? 1 : -1;  // of the small products: the code that has them is nearer if they rise
            const float large = turned ? -1 - 0x1p-6f : 1 + 0x1p-5f, against = turned ? 1 + 0x1p-5f : -1 - 0x1p-6f;
            float middling_c = 0;
            while (share(middling_x, sign * (middling_c + 0x1p-18f)) < (d - 3) * share(small_x, sign * small_c))
                middling_c += 0x1p-18f;
            const auto put = [&](matrix<float>& m, std::int64_t row, float small, float first, float middling,
                                 float last) {
                for (std::int64_t c = 0; c < d; ++c) m(row, c) = small;
                m(row, i) = first;
                m(row, 16 + i) = middling;
                m(row, d - 1 - i) = last;
            };
            put(rows, i, small_x, 1, middling_x, 1);
            put(codes, 2 * i, sign * small_c, large, 0, against);
            put(codes, 2 * i + 1, 0, large, sign * middling_c, against);
        }
        const auto x = with_negatives(rows), codebook = with_negatives(codes);
        expect_exact_where_sums_mislead(x, codebook);
    }
}

TEST_F(QuantizeSmall, RowsThatAreSubnormalInHalfPrecision) {
    // Like the last, where rows are as small as half precision goes, and exact there: what a sum may lose is then more
    // than a share of its terms, since tensor cores take subnormal numbers for 2^-14 when they align products. Of the
    // two codes near a row, one has seven products below what is kept, the other one that is kept and smaller than
    // those together. The last four columns, where rows are 0, make all codes equally long, to the last bit.
    constexpr std::int64_t d = 13;
    constexpr float small = 0x1p-14f, rests[2][4] = {{44, 7, 0, 0}, {32, 16, 16, 16}};
    matrix<float> x(16, d), codebook(32, d);
    for (std::int64_t i = 0; i < 16; ++i) {
        const float sign = i % 2 ? -1 : 1;  // each beside its negative, so that the centre is 0
        const auto at = [&](std::int64_t j) { return (i / 2 + j) % d; };
        for (std::int64_t j = 0; j <= 8; ++j) x(i, at(j)) = sign * (j == 0 ? 2 : 1) * 0x1p-24f;
        for (std::int64_t k = 0; k < 2; ++k) {
            const std::int64_t code = i / 2 * 4 + 2 * k + i % 2;
            codebook(code, at(0)) = sign * 8;
            if (k == 0)
                for (std::int64_t j = 1; j <= 7; ++j) codebook(code, at(j)) = sign * 3 * small;
            else
                codebook(code, at(8)) = sign * 16 * small;
            for (std::int64_t j = 0; j < 4; ++j) codebook(code, at(9 + j)) = sign * rests[k][j] * small;
        }
    }
    expect_exact_where_sums_mislead(x, codebook);
}

TEST_F(QuantizeSmall, NearTiesOfOneUlp) {
    random_source random;
    // Codes on both sides of x, at distances that differ in the last place of one coordinate.
    for (const float at : {0.0f, 0.75f, -3.0f})
        for (const float radius : {1.0f, 0.3f, 1e-3f}) {
            const auto codebook = matrix<float>::generate(150, 1, [&](auto, auto) {
                return at + (random.integer(0, 1) ? 1.0f : -1.0f) * nudged(radius, random.integer(0, 5));
            });
            expect_exact(matrix<float>(3, 1, at), codebook);
        }
    // Rows that differ from one another by an ulp or two here and there; x close by, and far.
    for (const std::int64_t columns : {3, 4, 13})
        for (const float spread : {0.0f, 1e-6f, 1e-3f, 1.0f, 100.0f}) {
            const auto base = random.normals<float>(1, columns);
            const auto codebook = matrix<float>::generate(200, columns, [&](auto, auto d) {
                return nudged(base.at(0, d), random.integer(0, 9) == 0 ? random.integer(-2, 2) : 0);
            });
            expect_exact(matrix<float>::generate(
                             66, columns, [&](auto, auto d) { return base.at(0, d) + spread * random.normal(); }),
                         codebook);
        }
}

TEST_F(QuantizeSmall, ACommonOffsetOfAThousand) {
    random_source random;
    const auto shifted = [&](std::int64_t rows, std::int64_t columns) {
        return matrix<float>::generate(rows, columns, [&](auto, auto) { return 1000 + random.normal(); });
    };
    for (const std::int64_t d : {3, 32}) expect_exact(shifted(120, d), shifted(100, d));
    // Multiples of 2^-13 bear the offset without rounding, so it must change no code.
    const auto steps = [&](std::int64_t rows) {
        return matrix<float>::generate(rows, 20, [&](auto, auto) { return 0x1p-13f * random.integer(-20000, 20000); });
    };
    auto x = steps(130), codebook = steps(99);
    const auto before = expect_exact(x, codebook);
    for (float& v : x.data) v += 1000;
    for (float& v : codebook.data) v += 1000;
    const auto after = expect_exact(x, codebook);
    EXPECT_EQ(after.codes, before.codes);
    EXPECT_TRUE(same_bits(after.distances, before.distances));
}

TEST_F(QuantizeSmall, ScalesFrom1e30thTo1e30MixedPerRow) {
    random_source random;
    const auto scaled = [&](std::int64_t rows, std::int64_t columns) {
        auto m = random.normals<float>(rows, columns);
        for (std::int64_t i = 0; i < rows; ++i) {
            const float scale = std::pow(10.0f, static_cast<float>(random.integer(-30, 30)));
            for (std::int64_t d = 0; d < columns; ++d) m(i, d) *= scale;
        }
        return m;
    };
    for (const std::int64_t d : {1, 4, 33}) expect_exact(scaled(150, d), scaled(128, d));
    // And per element.
    const auto wild = [&](std::int64_t rows) {
        return matrix<float>::generate(rows, 6, [&](auto, auto) {
            return random.normal() * std::pow(10.0f, static_cast<float>(random.integer(-30, 30)));
        });
    };
    expect_exact(wild(90), wild(70));
}

TEST_F(QuantizeSmall, SubnormalNumbers) {
    random_source random;
    const auto tiny = [&](std::int64_t rows, std::int64_t columns, std::int64_t most) {
        return matrix<float>::generate(
            rows, columns, [&](auto, auto) { return 0x1p-149f * static_cast<float>(random.integer(-most, most)); });
    };
    for (const std::int64_t most : {1, 100, 1 << 23, 1 << 24}) expect_exact(tiny(80, 3, most), tiny(70, 3, most));
    // Distances that float cannot hold, but float64 tells apart.
    expect_exact(matrix<float>(1, 1), matrix<float>{{3e-30f}, {2e-30f}, {-1e-30f}, {1e-30f}, {0x1p-149f}});
}

TEST_F(QuantizeSmall, MagnitudesUpToTheLargestFloat) {
    constexpr float largest = std::numeric_limits<float>::max();
    random_source random;
    const float values[] = {largest, -largest, 3e38f, -3e38f, 1e38f, -1e38f, 2e19f, 1e19f, 1.0f, 0.0f};
    const auto huge = [&](std::int64_t rows, std::int64_t columns) {
        return matrix<float>::generate(rows, columns, [&](auto, auto) { return values[random.integer(0, 9)]; });
    };
    for (const std::int64_t d : {1, 2, 17}) expect_exact(huge(100, d), huge(66, d));
    const auto got = expect_exact(matrix<float>{{largest}}, matrix<float>{{-largest}});
    EXPECT_EQ(got.codes[0], 0);
    EXPECT_EQ(got.distances[0], inf);
    // One row whose distances overflow float beside rows whose do not.
    expect_exact(matrix<float>{{1e25f, 1}, {0, 1}, {-1e25f, 0}, {5, 5}},
                 matrix<float>{{0, 0}, {1e19f, 0}, {-1e20f, 3}, {5, 4}, {1e25f, 1}});
}

TEST_F(QuantizeSmall, ACodebookWithoutAFiniteRowMakesEveryRowInvalid) {
    random_source random;
    auto codebook = random.normals<float>(70, 3);
    for (std::int64_t k = 0; k < 70; ++k) codebook(k, k % 3) = k % 2 ? nan : -inf;
    const auto got = expect_exact(random.normals<float>(67, 3), codebook);
    EXPECT_EQ(got.codes, std::vector<std::int64_t>(67, -1));
    EXPECT_EQ(got.stats.invalid_rows, 67);
    EXPECT_EQ(got.stats.active_codes, 0);
    EXPECT_EQ(got.stats.perplexity, 0);
    EXPECT_EQ(got.stats.commitment_loss, 0);
}

// ---- outputs and workspace ------------------------------------------------------------------------------------------

/// Outputs that are not asked for stay as they are, and change nothing of the others.
template <class X, class C>
void expect_optional_outputs(const matrix<X>& x, const matrix<C>& codebook) {
    search_memory<X, C> memory(x, codebook);
    memory.run();
    const auto whole = memory.outcome();
    const auto run = [&](const auto& quantized, const auto& distances, bool reports) {
        memory.poison_outputs();
        quantize_params params;
        params.stats = reports ? memory.stats.data() : nullptr;
        quantize(memory.x.view(), memory.codebook.view(), memory.codes.view(), quantized, distances, params);
        EXPECT_EQ(signed_codes(memory.codes.download(), codebook.rows), whole.codes);
        const bool wants_rows = !std::is_same_v<std::decay_t<decltype(quantized)>, discard_t>;
        const bool wants_distances = !std::is_same_v<std::decay_t<decltype(distances)>, discard_t>;
        if (wants_rows)
            EXPECT_TRUE(same_bits(memory.quantized.download(), whole.quantized));
        else
            EXPECT_TRUE(memory.quantized.untouched());
        if (wants_distances)
            EXPECT_TRUE(same_bits(memory.distances.download(), whole.distances));
        else
            EXPECT_TRUE(memory.distances.untouched());
        if (reports)
            EXPECT_EQ(std::memcmp(memory.stats.download().data(), &whole.stats, sizeof(step_stats)), 0);
        else
            EXPECT_TRUE(memory.stats.untouched());
    };
    for (const bool reports : {false, true}) {
        run(discard, discard, reports);
        run(memory.quantized.view(), discard, reports);
        run(discard, memory.distances.view(), reports);
        run(memory.quantized.view(), memory.distances.view(), reports);
    }
}

TEST_F(QuantizeSmall, EachOptionalOutputGivenAndDiscarded) {
    random_source random;
    auto x = random.normals<float>(75, 10);
    x(5, 5) = nan;
    expect_optional_outputs(x, random.normals<float>(40, 10));
}

TEST_F(QuantizeSmall, AWorkspaceLentOrAllocatedGivesTheSame) {
    random_source random;
    search_memory<float, float> memory(random.normals<float>(130, 6), random.normals<float>(33, 6));
    memory.run();
    const auto allocated = memory.outcome();
    memory.poison_outputs();
    const device_workspace ws(quantize_workspace_bytes(memory.size, memory.params));
    memory.run(ws.lent());
    EXPECT_TRUE(same(memory.outcome(), allocated));
    EXPECT_TRUE(ws.guard_untouched());
    EXPECT_GT(quantize_workspace_bytes(memory.size, memory.params), quantize_workspace_bytes(memory.size));
    EXPECT_EQ(quantize_workspace_bytes({130, 33, 70000}), 0u);  // no image of so wide a codebook
}

TEST_F(QuantizeSmall, ARefusedCallNamesTheFunctionAndWritesNothing) {
    random_source random;
    search_memory<float, float> memory(random.normals<float>(20, 6), random.normals<float>(10, 6));
    const std::size_t bytes = quantize_workspace_bytes(memory.size, memory.params);
    const device_workspace block(bytes + 256);
    char* data = static_cast<char*>(block.lent().data);
    const auto refused = [&](const workspace& ws) {
        const auto text = refusal([&] { memory.run(ws); });
        EXPECT_EQ(text.rfind("cuvq::quantize: workspace: ", 0), 0u) << text;
    };
    refused({data, bytes - 1});
    refused({data, 0});
    refused({data + 128, bytes});
    refused({nullptr, bytes});
    const device_array<std::uint8_t> narrow(20);
    const device_matrix<float> wide_codebook(random.normals<float>(257, 6));
    EXPECT_EQ(refusal([&] {
                  quantize(memory.x.view(), wide_codebook.view(), narrow.view());
              }).rfind("cuvq::quantize: codes: ", 0),
              0u);
    EXPECT_EQ(refusal([&] {
                  quantize(memory.x.view(), memory.codebook.view(), memory.codes.view(),
                           strided(memory.quantized.data(), 19, 6, 6), memory.distances.view());
              }).rfind("cuvq::quantize: quantized: ", 0),
              0u);
    EXPECT_TRUE(memory.outputs_untouched());
    EXPECT_TRUE(narrow.untouched());
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

struct small_simt_tile : simt_tile {
    static constexpr int rows = 32;
};

/// With this tile where it serves; a refusal that writes nothing where it does not. Whether it serves.
template <class Tile, std::size_t D>
bool same_with_tile(std::int64_t n, std::int64_t k) {
    random_source random;
    search_memory<float, float> memory(random.normals<float>(n, D), random.normals<float>(k, D));
    const auto x = memory.x.fixed<D>(), codebook = memory.codebook.fixed<D>();
    memory.run_simt();
    const auto right = memory.outcome().codes;
    memory.poison_outputs();
    if (dispatch::serves<Tile, float, float>(k, D)) {
        quantize<Tile>(x, codebook, memory.codes.view(), memory.quantized.view(), memory.distances.view());
        EXPECT_EQ(memory.outcome().codes, right);
        return true;
    }
    const auto text = refusal([&] { quantize<Tile>(x, codebook, memory.codes.view()); });
    EXPECT_EQ(text.rfind("cuvq::quantize: Tile: ", 0), 0u) << text;
    EXPECT_TRUE(memory.outputs_untouched());
    return false;
}

TEST_F(QuantizeSmall, ATileOfTheCallersOwnChangesNothing) {
    EXPECT_TRUE((same_with_tile<small_simt_tile, 40>(500, 300)));
    int device = 0, major = 0;
    CUVQ_CHECK_CUDA(cudaGetDevice(&device));
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    EXPECT_EQ((same_with_tile<mma_tile<64, 128, 3, false, 1>, 40>(500, 300)), major >= 8);
    const bool few = same_with_tile<sm90_tile<5, 3, 6, 4, 2, 4>, 40>(500, 300);
    EXPECT_EQ((same_with_tile<sm90_tile<5, 3, 6, 4, 2, 4>, 40>(9000, 300)), few);
    EXPECT_EQ((same_with_tile<sm90_tile<17, 3, 3, 3, 1, 2>, 200>(500, 300)), few);   // one warpgroup scores few rows
    EXPECT_EQ((same_with_tile<sm90_tile<17, 2, 2, 2, 2, 2>, 200>(9000, 300)), few);  // two consumers
    EXPECT_EQ((same_with_tile<sm90_tile<1, 3, 5, 4, 4, 4>, 8>(30000, 100)), few);    // an odd number of row buffers
    EXPECT_FALSE((same_with_tile<sm90_tile<18, 2, 2, 2, 2, 2>, 280>(9000, 100))) << "wider than its kernels serve";
    EXPECT_FALSE((same_with_tile<sm90_tile<1, 3, 6, 4, 4, 4>, 40>(500, 300))) << "its operands hold 13 dimensions";
}

// ---- prepared codebooks ---------------------------------------------------------------------------------------------

TEST_F(QuantizeSmall, APreparedCodebookServesManyBatches) {
    random_source random;
    for (const std::int64_t d : {3, 64, 100, 256, 300}) {
        const auto codebook = random.normals<float>(700, d);
        const device_matrix<float> rows(codebook);
        const device_workspace prepared(prepared_codebook_bytes(700, d));
        prepare(rows.view(), {prepared.lent().data, prepared.lent().bytes});
        for (const std::int64_t n : {1, 200, 9000, 40000}) {
            SCOPED_TRACE(testing::Message() << n << " rows, D = " << d);
            search_memory<float, float> memory(random.normals<float>(n, d), codebook);
            memory.run();
            const auto without = memory.outcome();
            memory.poison_outputs();
            memory.params.prepared = {prepared.lent().data, prepared.lent().bytes};
            const device_workspace ws(quantize_workspace_bytes(memory.size, memory.params));
            memory.run(ws.lent());
            EXPECT_TRUE(same(memory.outcome(), without));
            EXPECT_TRUE(ws.guard_untouched());
        }
        EXPECT_TRUE(prepared.guard_untouched());
    }
}

TEST_F(QuantizeSmall, AnUnfitPreparedCodebookIsRefused) {
    random_source random;
    search_memory<float, float> memory(random.normals<float>(10, 8), random.normals<float>(20, 8));
    const std::size_t bytes = prepared_codebook_bytes(20, 8);
    const device_workspace space(bytes + 256);
    char* data = static_cast<char*>(space.lent().data);
    const auto wants = [&](const prepared_codebook& p, const std::string& got, const std::string& wanted) {
        memory.params.prepared = p;
        memory.poison_outputs();
        EXPECT_EQ(refusal([&] { memory.run(); }), "cuvq::quantize: params.prepared: got " + got + "; wants " + wanted);
        const std::string room = std::to_string(bytes) + " bytes of device memory";
        EXPECT_EQ(refusal([&] { prepare(memory.codebook.view(), p); }),
                  "cuvq::prepare: prepared: got " + got + "; wants " + (p.data ? wanted : room));
        EXPECT_TRUE(memory.outputs_untouched());
    };
    wants({nullptr, bytes}, "a null pointer", "a device pointer, or none at all");
    wants({data + 128, bytes}, "a misaligned pointer", "256-byte alignment");
    wants({data, bytes - 1}, std::to_string(bytes - 1) + " bytes", "at least " + std::to_string(bytes));
}

// ---- accuracy::fast -------------------------------------------------------------------------------------------------

bool is_finite_row(const matrix<float>& m, std::int64_t i) {
    const auto row = m.row(i);
    return std::all_of(row.begin(), row.end(), [](float v) { return std::isfinite(v); });
}

/// The documented bound of `accuracy::fast`, the same codes twice, and -1 where `exact` has it.
template <class X>
void expect_fast(const matrix<X>& x, const matrix<float>& codebook) {
    SCOPED_TRACE(testing::Message() << x.rows << " rows, " << codebook.rows << " codes, D = " << x.columns);
    search_memory<X, float> memory(x, codebook);
    memory.run();
    const auto exact = memory.outcome();
    memory.params.accuracy = accuracy::fast;
    memory.poison_outputs();
    memory.run();
    const auto fast = memory.outcome();
    memory.poison_outputs();
    memory.run();
    EXPECT_TRUE(same(memory.outcome(), fast));

    std::vector<double> mean(static_cast<std::size_t>(x.columns));
    for (std::int64_t k = 0; k < codebook.rows; ++k)
        if (is_finite_row(codebook, k))
            for (std::int64_t d = 0; d < x.columns; ++d) mean[d] += double(codebook.at(k, d)) / double(codebook.rows);
    const auto norm = [&](const auto& m, std::int64_t i) {
        double sum = 0;
        for (std::int64_t d = 0; d < x.columns; ++d) sum += std::pow(double(m.at(i, d)) - mean[d], 2);
        return std::sqrt(sum);
    };
    double largest = 0;
    for (std::int64_t k = 0; k < codebook.rows; ++k)
        if (is_finite_row(codebook, k)) largest = std::max(largest, norm(codebook, k));
    for (std::int64_t i = 0; i < x.rows; ++i) {
        const std::int64_t k = fast.codes[i], best = exact.codes[i];
        ASSERT_EQ(k < 0, best < 0) << "row " << i;
        if (k < 0) continue;
        double excess = 0;
        for (std::int64_t d = 0; d < x.columns; ++d)
            excess += std::pow(double(x.at(i, d)) - double(codebook.at(k, d)), 2) -
                      std::pow(double(x.at(i, d)) - double(codebook.at(best, d)), 2);
        ASSERT_LE(excess, std::pow(norm(x, i) + largest, 2) / 256) << "row " << i;
    }
}

TEST_F(QuantizeSmall, FastCodesAreWithinTheirBound) {
    random_source random;
    for (const std::int64_t d : {1, 8, 64, 100, 256, 300}) {
        expect_fast(random.normals<float>(300, d), random.normals<float>(1000, d));
        expect_fast(random.normals<float>(20000, d), random.normals<float>(300, d));
        expect_fast(random.normals<__half>(300, d), random.normals<float>(500, d));
    }
    auto x = random.normals<float>(100, 32), codebook = random.normals<float>(90, 32);
    x(7, 31) = nan;
    x(50, 0) = -inf;
    codebook(3, 3) = nan;
    for (std::int64_t d = 0; d < 32; ++d) x(20, d) *= 1e30f;
    expect_fast(x, codebook);
}

TEST_F(QuantizeSmall, FastTakesTheLowestOfEqualCodes) {
    random_source random;
    for (const std::int64_t n : {50, 20000})
        for (const std::int64_t k : {700, 1900}) {  // twice
            const auto half = random.normals<float>(k, 40);
            const auto codebook =
                matrix<float>::generate(2 * k, 40, [&](auto c, auto d) { return half.at(c * 37 % k, d); });
            search_memory<float, float> memory(random.normals<float>(n, 40), codebook);
            memory.params.accuracy = accuracy::fast;
            memory.run();
            for (const auto code : memory.outcome().codes) ASSERT_LT(code, k);
        }
    // Every code of the first tiles is there in each quarter of another one.
    const auto rows = random.normals<float>(32, 24);
    const auto codebook = matrix<float>::generate(3200, 24, [&](auto c, auto d) { return rows.at(c % 32, d); });
    search_memory<float, float> memory(random.normals<float>(9000, 24), codebook);
    memory.params.accuracy = accuracy::fast;
    memory.run();
    for (const auto code : memory.outcome().codes) ASSERT_LT(code, 32);
}

// ---- determinism ----------------------------------------------------------------------------------------------------

TEST_F(QuantizeTest, TwentyRunsAreBitwiseEqual) {
    struct {
        std::int64_t n, k, d;
    } const shapes[] = {{20000, 1000, 24}, {200000, 40, 100}, {33000, 5000, 8},  // many rows
                        {9000, 8200, 40},                                        // in two launches
                        {1, 2048, 256},    {60, 3000, 9},     {5000, 700, 128},  // few rows
                        {700, 300, 300},   {40, 5000, 1100}};                    // wider than Hopper's own image
    random_source random;
    for (const auto& [n, k, d] : shapes) {
        SCOPED_TRACE(testing::Message() << n << " rows, " << k << " codes, D = " << d);
        search_memory<float, float> memory(random.normals<float>(n, d), random.normals<float>(k, d));
        memory.run();
        const auto first = memory.outcome();
        if (n * k * d < 1000000000)
            EXPECT_TRUE(codes_are_nearest(memory.x.download(), memory.codebook.download(), first.codes));
        for (int run = 1; run < 20; ++run) {
            memory.poison_outputs();
            memory.run();
            ASSERT_TRUE(same(memory.outcome(), first)) << "run " << run;
        }
    }
}

/// Codes of noise, many times over, against those from the CUDA cores, every one; some rows against float64.
void expect_steady_codes(std::int64_t n, std::int64_t k, std::int64_t d, int runs, bool repeats_codes) {
    SCOPED_TRACE(testing::Message() << n << " rows, " << k << " codes, D = " << d);
    const auto x = pattern_array<float>(n * d, 23, true);
    const matrix_view<const float> rows(x.data(), n, d);
    const auto codebook = matrix<float>::generate(
        k, d, [&](auto i, auto c) { return noise(29, (repeats_codes ? i % (k / 2) : i) * d + c); });
    const device_matrix<float> centres(codebook);
    device_array<std::int32_t> codes(n);
    quantize_simt(rows, centres.view(), codes.view(), discard, discard);
    const auto right = codes.download();
    const auto some = matrix<float>::generate(200, d, [&](auto i, auto c) { return noise(23, (n - 200 + i) * d + c); });
    EXPECT_TRUE(codes_are_nearest(some, codebook, {right.end() - 200, right.end()}));
    device_array<char> scratch(static_cast<std::int64_t>(quantize_workspace_bytes({n, k, d})));
    for (int run = 0; run < runs; ++run) {
        codes.fill(poison);
        scratch.fill(0x3F);  // garbage that could pass for codes
        quantize(rows, centres.view(), codes.view(), discard, discard, {},
                 {scratch.data(), static_cast<std::size_t>(scratch.size())});
        const auto got = codes.download();
        std::int64_t wrong = 0;
        for (std::int64_t i = 0; i < n; ++i) wrong += got[i] != right[i];
        ASSERT_EQ(wrong, 0) << "rows, in run " << run;
    }
}

TEST_F(QuantizeTest, AMillionRowsTwentyTimes) { expect_steady_codes(1 << 20, 1024, 128, 20, false); }

TEST_F(QuantizeTest, AMillionRowsWhereEveryCodeIsThereTwice) { expect_steady_codes(1 << 20, 512, 64, 5, true); }

TEST_F(QuantizeTest, ManyRowsOfOpenCodesOfMoreBits) { expect_steady_codes(20001, 65536, 40, 2, true); }

TEST_F(QuantizeTest, ManyRowsAndCodesOfEveryOperandSize) {
    for (const std::int64_t d : {3, 8, 13, 48, 77, 100, 256, 269}) {
        expect_steady_codes(150001, 1000, d, 2, false);
        expect_steady_codes(150001, 3100, d, 2, false);  // so many tiles that not all are looked at closely
    }
}

/// On Hopper a block scores 64 rows with each of three warpgroups, so that of 4 or 7 times 64 some are left for one;
/// of a large codebook these are shared by all, each of which sees some tiles of codes.
TEST_F(QuantizeTest, WarpgroupsThatShareTheirLastRows) {
    random_source random;
    const std::int64_t k = 4300;
    for (const std::int64_t turns : {4, 7}) {
        const std::int64_t n = 64 * turns * processors() - 700;  // the last blocks have fewer rows
        for (const std::int64_t d : {3, 8, 13}) {
            expect_steady_codes(n, k, d, 3, false);
            expect_steady_codes(n, 2 * k, d, 2, true);
        }
        // Near codes in the tiles of one warpgroup, or of several, and more than any of them keeps.
        auto x = random.normals<float>(n, 6), codebook = random.normals<float>(k, 6);
        const auto rows = random.normals<float>(9, 6);
        for (std::int64_t r = 0; r < 9; ++r)
            for (std::int64_t copy = 0; copy <= r; ++copy)
                for (std::int64_t c = 0; c < 6; ++c)
                    codebook(128 * (r + copy * (r % 2 ? 1 : 3)) + 9 * r + 5, c) =
                        rows.at(r, c) * (1 + 0x1p-23f * static_cast<float>(random.integer(0, 2)));
        for (std::int64_t i = 0; i < n; i += 5)
            for (std::int64_t c = 0; c < 6; ++c) x(i, c) = rows.at(i % 9, c) + 1e-3f * random.normal();
        x(n / 2, 3) = nan;
        x(n - 1, 0) = inf;
        EXPECT_TRUE(codes_are_nearest(x, codebook, search(x, codebook).codes));
        expect_fast(x, codebook);

        const auto half = random.normals<float>(k / 2, 8);
        search_memory<float, float> memory(
            random.normals<float>(n, 8),
            matrix<float>::generate(k, 8, [&](auto c, auto d) { return half.at(c * 37 % (k / 2), d); }));
        memory.params.accuracy = accuracy::fast;
        memory.run();
        for (const auto code : memory.outcome().codes) ASSERT_LT(code, k / 2) << "not the first of two equal codes";
    }
}

/// Of many rows, a kernel of its own writes quantized rows and distances, four columns at a time where it can, with as
/// many lanes to a row as it has columns for; rows without a code and distances beyond float's reach are apart, and the
/// last rows are written twice.
template <class Elements>
class QuantizeOutputsSmall : public gpu_test {};
TYPED_TEST_SUITE(QuantizeOutputsSmall, element_pairs, type_names);

TYPED_TEST(QuantizeOutputsSmall, ManyRowsOfAllKindsAndWidths) {
    using X = typename TypeParam::x;
    using C = typename TypeParam::codebook;
    random_source random;
    const std::int64_t n = 64 * processors() + 41, k = 33;
    for (const std::int64_t d : {3, 4, 8, 12, 16, 20, 32, 36, 64, 68, 128, 132, 260}) {
        SCOPED_TRACE(testing::Message() << "D = " << d);
        auto x = random.normals<X>(n, d);
        auto codebook = random.normals<C>(k, d);
        for (std::int64_t c = 0; c < d; ++c) codebook(7, c) = C(0.0f);
        for (const std::int64_t back : {n, n / 2, n / 2 + 1, std::int64_t{41}, std::int64_t{20}, std::int64_t{12},
                                        std::int64_t{5}, std::int64_t{1}})
            x(n - back, back % d) = X(back % 3 ? nan : -inf);
        const auto scale_row = [&](std::int64_t i, float by) {
            for (std::int64_t c = 0; c < d; ++c) x(i, c) = static_cast<X>(by * static_cast<float>(x.at(i, c)));
        };
        for (std::int64_t i = 2; i < n - 50; i += 97) {
            for (std::int64_t c = 0; c < d; ++c) x(i, c) = static_cast<X>(static_cast<float>(codebook.at(i % k, c)));
            scale_row(i + 1, 1e-20f);  // squares that float has no room for
            scale_row(i + 2, 1e-23f);
        }
        search_memory<X, C> plain(x, codebook);
        plain.run();
        const auto right = plain.outcome();
        expect_right(x, codebook, right);
        expect_optional_outputs(x, codebook);
        // Distances are the same bits however rows lie, and whatever kernel writes them.
        plain.poison_outputs();
        plain.run_simt();
        EXPECT_TRUE(same_bits(plain.outcome().distances, right.distances)) << "on the CUDA cores";
        const row_layout layouts[][3] = {
            {awkward, awkward, awkward}, {{4, 4}, {8, 4}, {12, 8}}, {{}, {}, awkward}, {awkward, {}, {}}};
        for (const auto& [of_x, of_codebook, of_quantized] : layouts) {
            const device_matrix<X> own_x(x, of_x);
            const device_matrix<C> own_codebook(codebook, of_codebook);
            device_matrix<X> quantized(n, d, of_quantized);
            device_array<float> distances(n);
            quantized.fill(poison);
            quantize(own_x.view(), own_codebook.view(), plain.codes.view(), quantized.view(), distances.view());
            EXPECT_TRUE(same_bits(quantized.download(), right.quantized));
            EXPECT_TRUE(quantized.padding_untouched());
            EXPECT_TRUE(same_bits(distances.download(), right.distances));
        }
        if constexpr (sizeof(X) == 4) {
            for (std::int64_t i = 1; i < n; i += 53) scale_row(i, i % 2 ? 1e25f : 1e12f);
            for (const std::int64_t back : {4, 11, 21}) scale_row(n - back, 1e25f);
            expect_right(x, codebook, search(x, codebook));
        }
    }
}

TEST_F(QuantizeTest, OutputsOfSoManyRowsThatAWarpTakesMore) {
    random_source random;
    const std::int64_t n = (1 << 17) + 77;
    for (const std::int64_t d : {7, 8, 24, 64, 96}) {
        auto x = random.normals<float>(n, d);
        x(n - 1, 2) = x(n - 20, 0) = nan;
        const auto codebook = random.normals<float>(20, d);
        expect_right(x, codebook, search(x, codebook));
    }
}

/// Somewhat more rows than a card takes at once go in two launches, if there are many codes.
TEST_F(QuantizeTest, SomewhatMoreRowsThanACardTakesAtOnce) {
    random_source random;
    for (const std::int64_t more : {1, 700, 64 * processors() / 3, 64 * processors() / 3 + 1}) {
        const std::int64_t n = 64 * processors() + more, k = 8100;
        for (const std::int64_t d : {3, 48, 128, 256}) {
            expect_steady_codes(n, k, d, 2, false);
            expect_steady_codes(n, k, d, 2, true);
        }
        auto x = random.normals<float>(n, 8);
        x(n - 1, 7) = x(64 * processors(), 0) = x(64 * processors() - 1, 1) = nan;
        const auto codebook = random.normals<float>(k, 8);
        for (const row_layout layout : {row_layout{}, awkward}) {
            expect_right(x, codebook, search<std::uint16_t>(x, codebook, layout));
            expect_right(x, codebook, search<std::int64_t>(x, codebook, layout));
        }
    }
}

TEST_F(QuantizeTest, AHundredMillionRowsOfAllFamiliesAgainstFloat64) {
    constexpr std::int64_t n = 1 << 20, shapes[][2] = {{512, 3}, {3100, 8}, {512, 64}, {257, 128}};
    device_array<std::int32_t> codes(n);
    for (const family f : families) {
        for (const auto& [k, d] : shapes) {
            for (std::uint64_t seed = 100; seed < 500; seed += 100) {
                const family_batch batch(f, seed, n, k, d);
                codes.fill(poison);
                quantize(batch.x(), batch.codebook(), codes.view());
                ASSERT_EQ(batch.wrong(codes), 0u)
                    << "family " << static_cast<int>(f) << ", K = " << k << ", D = " << d << ", seed " << seed;
            }
        }
    }
}

TEST_F(QuantizeTest, ACodeDoesNotDependOnItsPlaceInTheBatch) {
    random_source random;
    const auto x = random.integers<float>(300, 6, -2, 2), codebook = random.integers<float>(150, 6, -2, 2);
    search_memory<float, float> memory(x, codebook);
    memory.run();
    const auto whole = memory.outcome();
    for (const std::int64_t first : {1, 7, 64, 100, 299}) {
        const std::int64_t n = std::min<std::int64_t>(x.rows - first, 90);
        device_array<std::int32_t> codes(n);
        quantize(strided(memory.x.data() + first * 6, n, 6, 6), memory.codebook.view(), codes.view());
        const auto begin = whole.codes.begin() + first;
        EXPECT_EQ(signed_codes(codes.download(), 150), std::vector<std::int64_t>(begin, begin + n));
    }
}

TEST_F(QuantizeTest, TwoStreamsAtOnce) {
    random_source random;
    search_memory<float, float> a(random.normals<float>(4000, 32), random.normals<float>(500, 32));
    search_memory<__half, float> b(random.normals<__half>(5000, 16), random.normals<float>(700, 16));
    a.run();
    b.run();
    const auto alone_a = a.outcome();
    const auto alone_b = b.outcome();
    const device_workspace ws_a(quantize_workspace_bytes(a.size, a.params));
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

TEST_F(QuantizeSmall, CapturedInAGraph) {
    random_source random;
    search_memory<float, float> memory(random.normals<float>(90, 9), random.normals<float>(60, 9));
    const device_workspace ws(quantize_workspace_bytes(memory.size, memory.params));
    for (const workspace& lent : {workspace{}, ws.lent()}) {
        captured_graph graph([&](cudaStream_t stream) { memory.run(lent, stream); });
        for (int replay = 0; replay < 3; ++replay) {
            const auto x = random.normals<float>(90, 9);
            memory.x.upload(x);
            memory.poison_outputs();
            graph.replay();
            const auto replayed = memory.outcome();
            expect_right(x, memory.codebook.download(), replayed);
            memory.poison_outputs();
            memory.run(lent);
            EXPECT_TRUE(same(memory.outcome(), replayed));
        }
    }
}

// ---- beyond 2^31 ----------------------------------------------------------------------------------------------------

/// Rows [first, first + count) of a search over a pattern, judged.
template <class X, class C>
void expect_window(std::int64_t first, std::int64_t count, const matrix<C>& codebook, std::uint64_t seed,
                   const device_array<std::int32_t>& codes, const device_array<X>& quantized,
                   const device_array<float>& distances) {
    const std::int64_t columns = codebook.columns;
    const auto x = pattern_rows<X>(first, count, columns, seed);
    const auto got = signed_codes(codes.download(first, count), codebook.rows);
    EXPECT_TRUE(codes_are_nearest(x, codebook, got)) << "from row " << first;
    EXPECT_TRUE(distances_are_right(x, codebook, got, distances.download(first, count))) << "from row " << first;
    matrix<X> rows(count, columns);
    rows.data = quantized.download(first * columns, count * columns);
    EXPECT_TRUE(rows_are_of(codebook, got, rows)) << "from row " << first;
}

template <class X>
void expect_large(std::int64_t n, std::int64_t k, std::int64_t columns) {
    const std::size_t elements = static_cast<std::size_t>(n * columns);
    if (!has_free_memory(2 * elements * sizeof(X) + static_cast<std::size_t>(n) * 8 + (std::size_t{1} << 30)))
        GTEST_SKIP() << "too little device memory for " << n << " x " << columns << " elements twice";
    random_source random;
    const auto x = pattern_array<X>(n * columns, 5);
    const auto codebook = random.normals<X>(k, columns);
    const device_matrix<X> centres(codebook);
    device_array<std::int32_t> codes(n);
    device_array<X> quantized(n * columns);
    device_array<float> distances(n);
    const matrix_view<const X> rows(x.data(), n, columns);
    const matrix_view<X> chosen(quantized.data(), n, columns);
    const std::int64_t edge = (std::int64_t{1} << 31) / columns;  // where element numbers pass 2^31
    const std::int64_t pair = (std::int64_t{1} << 31) / k;        // where row x code passes 2^31
    const auto expect_windows = [&] {
        for (const std::int64_t first :
             {std::int64_t{0}, edge - 64, edge / 2, pair - 64, n - 128, random.integer(0, n - 128)})
            if (first >= 0 && first + 128 <= n) expect_window<X>(first, 128, codebook, 5, codes, quantized, distances);
    };
    quantize(rows, centres.view(), codes.view(), chosen, distances.view());
    expect_windows();
    quantized.fill(poison);
    distances.fill(poison);
    codes.fill(poison);
    quantize_simt(rows, centres.view(), codes.view(), chosen, distances.view());
    expect_windows();
}

TEST_F(LargeTest, MoreThan2To31ElementsOfX) { expect_large<__half>((std::int64_t{1} << 31) / 64 + 1000, 5, 64); }

TEST_F(LargeTest, MoreThan2To31PairsOfRowAndCode) {
    expect_large<float>((std::int64_t{1} << 31) / 1100 + 5000, 1100, 4);
}

/// A codebook of so many rows, and rows of x that lie near to some of them.
template <class Tile = automatic_tile>
void expect_planted_codes(std::int64_t k, std::int64_t columns) {
    constexpr std::int64_t n = 24;
    const auto elements = static_cast<std::size_t>(k * columns);
    if (!has_free_memory(elements * sizeof(float) + quantize_workspace_bytes({n, k, columns}) + (std::size_t{1} << 30)))
        GTEST_SKIP() << "too little device memory for " << k << " x " << columns << " floats";
    const auto codebook = pattern_array<float>(k * columns, 3);
    random_source random;
    const std::int64_t edge = std::min((std::int64_t{1} << 31) / columns, k - 2);  // where element numbers pass 2^31
    std::vector<std::int64_t> planted{0, edge - 1, edge, edge + 1, k - 1};
    while (planted.size() < n) planted.push_back(random.integer(0, k - 1));
    const auto x = matrix<float>::generate(n, columns, [&](auto i, auto d) {
        return pattern(3, planted[i] * columns + d) + 0.125f * pattern(7, i * columns + d);
    });
    search_memory<float, float> memory(x, matrix<float>(1, columns));
    quantize<Tile>(memory.x.view(), matrix_view<const float>(codebook.data(), k, columns), memory.codes.view(),
                   memory.quantized.view(), memory.distances.view());
    EXPECT_EQ(signed_codes(memory.codes.download(), k), planted);
    const auto chosen =
        matrix<float>::generate(n, columns, [&](auto i, auto d) { return pattern(3, planted[i] * columns + d); });
    std::vector<std::int64_t> own(n);
    for (std::int64_t i = 0; i < n; ++i) own[i] = i;
    EXPECT_TRUE(distances_are_right(x, chosen, own, memory.distances.download()));
    EXPECT_TRUE(same_bits(memory.quantized.download(), chosen));
}

TEST_F(LargeTest, MoreThan2To31ElementsOfACodebookOfLongRows) { expect_planted_codes(70000, 32768); }

TEST_F(LargeTest, MoreThan2To31ElementsOfACodebookOfManyRows) {
    expect_planted_codes((std::int64_t{1} << 31) / 256 + 1000, 256);
}

TEST_F(LargeTest, AsManyCodesAsTheLeadsOfFewRowsCanName) {
    const std::int64_t most = std::int64_t{kernel::few_leads::most_tiles} * kernel::image_tile;
    for (const std::int64_t k : {most, most + 1}) expect_planted_codes(k, 40);
    if (dispatch::serves_sm90<sm90_d77, float, float>(most + 1, 40)) expect_planted_codes<sm90_d77>(most + 1, 40);
}

}  // namespace
}  // namespace cuvq::test
