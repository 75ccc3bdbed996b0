// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The portable tensor-core search by itself, whatever `quantize` would choose on this device: every tile, on the
// images that both kernels make of a codebook.
#include <cuvq/dispatch/quantize.cuh>
#include <cuvq/quantize.cuh>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <cuvq/detail/validate.hpp>

#include "support/device.cuh"
#include "support/image.cuh"
#include "support/large.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/searches.cuh"
#include "support/types.hpp"

namespace cuvq::test {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

template <class X>
struct outputs {
    std::vector<std::int64_t> codes;
    matrix<X> quantized;
    std::vector<float> distances;
    double loss;
    std::vector<unsigned long long> histogram;  // of the codes, then rows without one

    bool operator==(const outputs& o) const {
        return codes == o.codes && same_bits(quantized, o.quantized) && same_bits(distances, o.distances) &&
               histogram == o.histogram && std::abs(loss - o.loss) <= 1e-12 * loss;
    }
};

/// Device memory of one search, and what the searches made of it.
template <class X, class C>
struct search_memory {
    device_matrix<X> x;
    device_matrix<C> codebook;
    device_array<std::int64_t> codes;
    device_matrix<X> quantized;
    device_array<float> distances;
    device_array<double> loss{dispatch::most_losses};
    device_array<unsigned long long> histogram;
    row_layout layout;

    search_memory(const matrix<X>& rows, const matrix<C>& codebook_rows, row_layout l)
        : x(rows, l),
          codebook(codebook_rows, l),
          codes(rows.rows),
          quantized(rows.rows, rows.columns, l),
          distances(rows.rows),
          histogram(codebook_rows.rows + 1),
          layout(l) {}

    matrix_ref<const C> codebook_ref() const {
        return {codebook.data(), codebook.rows(), codebook.columns(), codebook.columns() + layout.padding};
    }
    /// What `search(args, tally)`, which returns its number of partial losses, finds.
    template <class Search>
    outputs<X> run(Search search) {
        codes.fill(poison);
        quantized.fill(poison);
        distances.fill(poison);
        histogram.fill(0);
        const auto args = detail::validate_quantize("test", x.view(), codebook.view(), codes.view(), quantized.view(),
                                                    distances.view(), {});
        const kernel::search_tally tally{loss.data(), histogram.data(), histogram.data() + codebook.rows()};
        std::int64_t losses = search(args, tally);
        if (losses == dispatch::no_outputs) losses = dispatch::write_outputs<dynamic_extent>(args, tally, nullptr);
        EXPECT_GT(losses, 0) << "nothing was launched";
        double sum = 0;
        for (const double l : loss.download(0, losses)) sum += l;
        EXPECT_TRUE(quantized.padding_untouched());
        return {codes.download(), quantized.download(), distances.download(), sum, histogram.download()};
    }
    /// The codebook in about so many parts, searched by at most so many blocks at once. Of one part, two blocks or more
    /// rows leave hard ones to all blocks.
    template <class Tile>
    outputs<X> run_mma(const device_image<C>& image, const dispatch::mma_fit& fit, std::int64_t parts = 1,
                       std::int64_t most_blocks = kernel::most_segments) {
        const device_array<double> part_distances(parts * x.rows());
        const device_array<int> part_codes(parts * x.rows());
        device_array<unsigned long long> hard(x.rows());
        device_array<int> hard_counts(kernel::most_segments);
        const device_array<char> shared(kernel::most_shared_rows *
                                        static_cast<std::int64_t>(sizeof(kernel::shared_row)));
        dispatch::mma_scratch scratch;
        scratch.parts = {parts * x.rows(), part_distances.data(), part_codes.data()};
        if (x.rows() > Tile::rows)
            scratch.hard = {hard.data(), hard_counts.data(), reinterpret_cast<kernel::shared_row*>(shared.data())};
        return run([&](const auto& args, const auto& tally) {
            return dispatch::quantize_mma<Tile>(args, tally, image.ref(), scratch, parts, most_blocks, fit, nullptr);
        });
    }
    outputs<X> run_simt() {
        return run([&](const auto& args, const auto& tally) {
            return dispatch::quantize_simt<simt_tile, dynamic_extent>(args, tally, nullptr);
        });
    }
};

/// All ways to the codes, judged. Returns the codes.
template <class X, class C>
std::vector<std::int64_t> expect_exact(const matrix<X>& x, const matrix<C>& codebook, row_layout layout = {}) {
    SCOPED_TRACE(testing::Message() << x.rows << " rows, " << codebook.rows << " codes, D = " << x.columns);
    search_memory<X, C> memory(x, codebook, layout);
    const auto right = memory.run_simt();
    EXPECT_EQ(right.codes, nearest_codes(x, codebook, ordered_distance64)) << "on the CUDA cores";
    EXPECT_TRUE(codes_are_nearest(x, codebook, right.codes)) << "on the CUDA cores";
    for (const bool wide : {false, true}) {
        const device_image<C> image(memory.codebook_ref(), wide);
        int tiles = 0;
        const auto expect_same = [&](auto tile) {
            using Tile = decltype(tile);
            const auto fit = dispatch::fit_mma<Tile, X, C>(x.columns);
            if (fit.blocks == 0) return;
            ++tiles;
            const std::int64_t tiles_of_codes = (codebook.rows - 1) / Tile::codes + 1;
            const std::pair<std::int64_t, std::int64_t> cases[] = {{1, 1024}, {1, 2}, {3, 2}, {tiles_of_codes, 1024}};
            for (const auto& [parts, most_blocks] : cases) {
                if (parts > 1 && codebook.rows <= Tile::codes) continue;
                const auto got = memory.template run_mma<Tile>(image, fit, parts, most_blocks);
                const auto name = testing::Message()
                                  << "tile of " << Tile::rows << " rows, " << Tile::codes << " codes, " << Tile::stages
                                  << " stages" << (Tile::streamed ? ", streamed" : "") << (wide ? ", wide" : "") << ", "
                                  << parts << " parts, at most " << most_blocks << " blocks";
                EXPECT_EQ(got.codes, right.codes) << name;
                EXPECT_TRUE(got == right) << name;
            }
        };
        expect_same(mma_twin{});
        expect_same(mma_tall{});
        expect_same(mma_flat{});
        expect_same(mma_streamed{});
        expect_same(mma_few{});
        expect_same(wgmma_tall{});
        expect_same(wgmma_flat{});
        constexpr bool others = std::is_same_v<X, float>;  // of other sizes; compiling them for all types takes long
        if constexpr (others) {
            expect_same(wgmma_tile<64, 256, 2>{});
            expect_same(mma_tile<64, 128, 3, false, 1>{});
            expect_same(mma_tile<128, 128, 2, true, 1>{});
        }
        EXPECT_GE(tiles, others ? 2 : 1) << "those that stream";
    }
    return right.codes;
}

class QuantizeMmaSmall : public mma_test {};
class QuantizeMmaTest : public mma_test {};

template <class Elements>
class QuantizeMmaTypesSmall : public mma_test {
protected:
    using x = typename Elements::x;
    using codebook = typename Elements::codebook;
};
TYPED_TEST_SUITE(QuantizeMmaTypesSmall, element_pairs, type_names);

/// Multiplies by powers of two drawn per row (`lowest` to `highest`).
matrix<float> scaled_rows(random_source& random, std::int64_t rows, std::int64_t columns, int lowest, int highest) {
    auto m = random.normals<float>(rows, columns);
    for (std::int64_t i = 0; i < rows; ++i) {
        const auto exponent = static_cast<int>(random.integer(lowest, highest));
        for (std::int64_t d = 0; d < columns; ++d) m(i, d) = std::ldexp(m(i, d), exponent);
    }
    return m;
}

// ---- layout ---------------------------------------------------------------------------------------------------------

template <int Steps>
void expect_layout_of_sm90() {
    using compiled = arch::wgmma_layout<Steps>;
    const arch::slab_layout layout{Steps};
    EXPECT_EQ(layout.row_bytes(), compiled::row_bytes);
    for (const int rows : {64, 128})
        for (int row = 0; row < rows; ++row)
            for (int column = 0; column < compiled::columns; column += 8)
                ASSERT_EQ(layout.offset(rows, row, column), compiled::offset(rows, row, column))
                    << Steps << " steps, row " << row << ", column " << column;
}

TEST(QuantizeMmaLayout, IsThatOfTheHopperPath) {
    expect_layout_of_sm90<1>();
    expect_layout_of_sm90<2>();
    expect_layout_of_sm90<3>();
    expect_layout_of_sm90<4>();
    expect_layout_of_sm90<5>();
    expect_layout_of_sm90<9>();
    expect_layout_of_sm90<14>();
    expect_layout_of_sm90<17>();
}

TEST(QuantizeMmaLayout, HasRoomForEveryDimensionAndTheOffset) {
    for (std::int64_t d = 1; d < 2000; ++d) {
        const auto layout = dispatch::image_layout(d);
        ASSERT_GE(layout.columns(), d + 3);
        ASSERT_GE(layout.row_bytes(), 2 * layout.columns());
        if (d > 269) ASSERT_LE(layout.row_bytes(), 2 * (d + 3) + 62);
        ASSERT_LE((d + 2) / 64 + 1, layout.slabs());
    }
}

// ---- types, shapes --------------------------------------------------------------------------------------------------

template <class X, class C>
void expect_exact_aligned_or_not(const std::vector<std::int64_t>& dimensions) {
    random_source random;
    for (const std::int64_t d : dimensions) {
        const auto x = random.normals<X>(130, d);
        const auto codebook = random.normals<C>(150, d);
        EXPECT_EQ(expect_exact(x, codebook), expect_exact(x, codebook, awkward));
    }
}

TYPED_TEST(QuantizeMmaTypesSmall, NormalDataAndUnalignedRows) {
    expect_exact_aligned_or_not<typename TestFixture::x, typename TestFixture::codebook>({1, 17, 64});
}

TYPED_TEST(QuantizeMmaTypesSmall, NormalDataAndUnalignedRowsOfManyDimensions) {
    expect_exact_aligned_or_not<typename TestFixture::x, typename TestFixture::codebook>({200, 330});
}

TYPED_TEST(QuantizeMmaTypesSmall, TiesGoToTheLowestCode) {
    random_source random;
    for (const std::int64_t d : {2, 5}) {
        const auto x = random.integers<typename TestFixture::x>(150, d, -3, 3);
        const auto codebook = random.integers<typename TestFixture::codebook>(300, d, -3, 3);
        EXPECT_EQ(expect_exact(x, codebook), nearest_codes(x, codebook, distance64));
    }
}

TYPED_TEST(QuantizeMmaTypesSmall, NanAndInfInXAndCodebook) {
    random_source random;
    for (const std::int64_t d : {19, 280}) {
        auto x = random.normals<typename TestFixture::x>(100, d);
        auto codebook = random.normals<typename TestFixture::codebook>(140, d);
        const float bad[] = {nan, inf, -inf};
        for (int j = 0; j < 12; ++j) {
            x(8 * j, (7 * j) % d) = bad[j % 3];
            codebook(11 * j, d - 1 - (5 * j) % d) = bad[j % 3];
        }
        const auto codes = expect_exact(x, codebook);
        for (int j = 0; j < 12; ++j) EXPECT_EQ(codes[8 * j], -1);
    }
}

void expect_exact_of_dimensions(const std::vector<std::int64_t>& dimensions) {
    random_source random;
    for (const std::int64_t d : dimensions) expect_exact(random.normals<float>(67, d), random.normals<float>(135, d));
}

TEST_F(QuantizeMmaSmall, SomeDimensionsAroundTheSlabs) { expect_exact_of_dimensions({2, 14, 62, 128, 270, 510}); }

TEST_F(QuantizeMmaTest, DimensionsAroundTheSlabs) {
    expect_exact_of_dimensions({2,   3,   8,   12,  13,  14,  15,  29,  30,  45,  46,  60,  61,  62,  63,  65,
                                77,  78,  93,  94,  110, 125, 126, 127, 128, 129, 141, 142, 189, 253, 254, 255,
                                256, 269, 270, 271, 300, 317, 318, 333, 349, 365, 381, 382, 509, 510, 512, 514});
}

TEST_F(QuantizeMmaTest, ManyDimensions) {
    random_source random;
    for (const std::int64_t d : {640, 701, 702, 1000, 1024, 1405, 1406, 1500, 2050}) {
        expect_exact(random.normals<float>(70, d), random.normals<float>(140, d));
        expect_exact(random.normals<__half>(65, d), random.normals<__half>(129, d), awkward);
    }
}

void expect_exact_of_shapes(const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& codes) {
    random_source random;
    for (const std::int64_t d : {4, 300})
        for (const std::int64_t n : rows)
            for (const std::int64_t k : codes)
                if (d == 4 || (n * k) % 2 == 1) expect_exact(random.normals<float>(n, d), random.normals<float>(k, d));
}

TEST_F(QuantizeMmaSmall, SomeRowsAndCodesAroundTheEdgesOfTiles) { expect_exact_of_shapes({1, 64, 129}, {1, 65, 257}); }

TEST_F(QuantizeMmaTest, RowsAndCodesAroundTheEdgesOfTiles) {
    expect_exact_of_shapes({1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257}, {1, 2, 16, 63, 64, 65, 127, 128, 129, 257});
}

TEST_F(QuantizeMmaTest, MoreColumnsThanItServesAreRefused) {
    EXPECT_TRUE(dispatch::has_image(7, device::most_mma_columns));
    EXPECT_FALSE(dispatch::has_image(7, device::most_mma_columns + 1));
    EXPECT_FALSE(dispatch::has_image(device::most_mma_codes, 7));
}

TEST_F(QuantizeMmaTest, TheMostColumns) {
    random_source random;
    const std::int64_t d = device::most_mma_columns;
    expect_exact(random.normals<float>(5, d), random.normals<float>(6, d));
    // Constant rows: every addition of one sum of squares rounds alike.
    const auto steps = [&](std::int64_t rows) {
        return matrix<float>::generate(rows, d, [&](auto i, auto) { return 1.0f + 0x1p-9f * static_cast<float>(i); });
    };
    expect_exact(steps(5), steps(40));
}

// ---- hard values ----------------------------------------------------------------------------------------------------

void expect_exact_of_copies(const std::vector<std::int64_t>& codes, const std::vector<int>& numbers) {
    random_source random;
    for (const std::int64_t d : {6, 290})
        for (const std::int64_t k : codes)
            for (const int copies : numbers) {
                auto codebook = random.normals<float>(k, d);
                const auto row = random.normals<float>(1, d);
                for (int copy = 0; copy < copies; ++copy) {
                    const std::int64_t at = random.integer(0, k - 1);
                    for (std::int64_t c = 0; c < d; ++c) codebook(at, c) = row.at(0, c);
                    codebook(at, copy % d) *= 1 + 0x1p-23f * static_cast<float>(random.integer(0, copies % 3));
                }
                expect_exact(matrix<float>::generate(
                                 65, d, [&](auto i, auto c) { return row.at(0, c) + 1e-3f * i * random.normal(); }),
                             codebook);
            }
}

TEST_F(QuantizeMmaSmall, SomeCopiesOfRowsAnywhereInTheCodebook) { expect_exact_of_copies({700}, {3, 20}); }

TEST_F(QuantizeMmaTest, CopiesOfRowsAnywhereInTheCodebook) {
    expect_exact_of_copies({100, 700, 1500}, {2, 3, 4, 5, 9, 20, 90});
}

TEST_F(QuantizeMmaSmall, OneRepeatedRow) {
    random_source random;
    const auto row = random.normals<float>(1, 280);
    for (const std::int64_t d : {12, 280}) {
        const auto codebook = matrix<float>::generate(300, d, [&](auto, auto c) { return row.at(0, c); });
        EXPECT_EQ(expect_exact(random.normals<float>(70, d), codebook), std::vector<std::int64_t>(70, 0));
    }
}

TEST_F(QuantizeMmaSmall, NearTiesOfOneUlp) {
    random_source random;
    for (const std::int64_t d : {1, 13, 290})
        for (const float spread : {0.0f, 1e-6f, 1e-3f, 1.0f, 100.0f}) {
            const auto base = random.normals<float>(1, d);
            const auto codebook = matrix<float>::generate(200, d, [&](auto, auto c) {
                const float v = base.at(0, c);
                return random.integer(0, 9) == 0 ? v * (1 + 0x1p-23f * static_cast<float>(random.integer(-2, 2))) : v;
            });
            expect_exact(
                matrix<float>::generate(66, d, [&](auto, auto c) { return base.at(0, c) + spread * random.normal(); }),
                codebook);
        }
}

void expect_exact_of_outliers(const std::vector<std::int64_t>& dimensions) {
    random_source random;
    for (const std::int64_t d : dimensions) {
        auto x = random.normals<float>(80, d), codebook = random.normals<float>(150, d);
        for (float& v : x.data) v += 1000;
        for (float& v : codebook.data) v += 1000;
        expect_exact(x, codebook);
        for (const float far : {100.0f, 1e5f, 1e10f, 1e30f}) {
            x = random.normals<float>(80, d);
            codebook = random.normals<float>(150, d);
            x(5, d - 1) = -far;
            x(69, 1) = far;
            expect_exact(x, codebook);
            codebook(57, d / 2) = far;
            expect_exact(x, codebook);
        }
    }
}

TEST_F(QuantizeMmaSmall, ACommonOffsetAndOutliersOfOneWidth) { expect_exact_of_outliers({32}); }

TEST_F(QuantizeMmaTest, ACommonOffsetAndOutliers) { expect_exact_of_outliers({3, 32, 300}); }

void expect_exact_of_magnitudes(const std::vector<std::int64_t>& dimensions) {
    random_source random;
    for (const std::int64_t d : dimensions) {
        for (const int span : {3, 20, 100})
            expect_exact(scaled_rows(random, 90, d, -span, span), scaled_rows(random, 140, d, -span, span));
        expect_exact(scaled_rows(random, 70, d, -149, -140), scaled_rows(random, 140, d, -149, -140));
        expect_exact(scaled_rows(random, 70, d, -140, -120), scaled_rows(random, 140, d, -140, -120));
        expect_exact(scaled_rows(random, 70, d, 118, 124), scaled_rows(random, 140, d, 118, 124));
        expect_exact(matrix<float>(3, d), scaled_rows(random, 140, d, -149, 120));
        // Codes and rows of one scale, a common offset of another.
        for (const int offset : {-120, 0, 60, 100}) {
            auto x = scaled_rows(random, 70, d, offset - 20, offset - 10);
            auto codebook = scaled_rows(random, 140, d, offset - 20, offset - 10);
            for (float& v : x.data) v += std::ldexp(1.0f, offset);
            for (float& v : codebook.data) v += std::ldexp(1.0f, offset);
            expect_exact(x, codebook);
        }
    }
}

TEST_F(QuantizeMmaSmall, MixedMagnitudesOfOneWidth) { expect_exact_of_magnitudes({33}); }

TEST_F(QuantizeMmaTest, MixedMagnitudesAndSubnormalAndHugeNumbers) { expect_exact_of_magnitudes({1, 4, 33, 290}); }

TEST_F(QuantizeMmaSmall, NearestByApproximationIsNotTheNearest) {
    // Codes whose rounding to fp16, or to two halves, reverses their order: x sits between two codes that differ by
    // less than these tell apart, many times over.
    random_source random;
    for (const std::int64_t d : {1, 3, 4, 16, 128, 400}) {
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

TEST_F(QuantizeMmaSmall, ACodebookWithoutAFiniteRow) {
    random_source random;
    for (const std::int64_t d : {3, 300}) {
        auto codebook = random.normals<float>(140, d);
        for (std::int64_t k = 0; k < 140; ++k) codebook(k, (k * 7) % d) = k % 2 ? nan : -inf;
        EXPECT_EQ(expect_exact(random.normals<float>(67, d), codebook), std::vector<std::int64_t>(67, -1));
    }
}

// ---- rows that many codes are near ----------------------------------------------------------------------------------

TEST_F(QuantizeMmaSmall, HardRowsOfTwoBlocks) {
    random_source random;
    const auto x = random.normals<float>(200, 70);
    const auto codebook = matrix<float>::generate(150, 70, [&](auto, auto c) { return x.at(7, c); });
    search_memory<float, float> memory(x, codebook, {});
    const auto right = memory.run_simt();
    EXPECT_EQ(right.codes, std::vector<std::int64_t>(200, 0));
    const device_image<float> image(memory.codebook_ref());
    // Not with a tile of warpgroups, whose buffers are handed on by counters, which racecheck does not take for order.
    const auto fit = dispatch::fit_mma<mma_flat, float, float>(70);
    ASSERT_GT(fit.blocks, 0);
    EXPECT_TRUE(memory.run_mma<mma_flat>(image, fit, 1, 2) == right);
}

TEST_F(QuantizeMmaTest, HardRowsAmongMany) {
    // All of `quantize`, with a tile that is not the widest: so many rows that hard ones are left to all blocks. They
    // are next to each other, some (their codebook's parts are then shared out) or many, near copies of a code or not
    // finite.
    random_source random;
    for (const auto& shape : std::vector<std::array<std::int64_t, 2>>{{700, 24}, {1500, 66}, {1400, 300}})
        for (const std::int64_t hard : {1, 40, 700}) {
            const std::int64_t k = shape[0], d = shape[1];
            SCOPED_TRACE(testing::Message() << hard << " rows, " << k << " codes, D = " << d);
            const std::int64_t n = 40011;
            auto x = random.normals<float>(n, d), codebook = random.normals<float>(k, d);
            for (std::int64_t code = 3; code < k; code += 2)
                for (std::int64_t c = 0; c < d; ++c) codebook(code, c) = codebook.at(1, c);
            for (std::int64_t i = 0; i < hard; ++i) {
                for (std::int64_t c = 0; c < d; ++c) x(5000 + i, c) = codebook.at(1, c) * (1 + 0x1p-20f * i);
                if (i % 7 == 6) x(5000 + i, i % d) = i % 2 ? nan : inf;
                if (i % 7 == 3 && hard == 40)  // beyond what half precision can tell anything of
                    for (std::int64_t c = 0; c < d; ++c) x(5000 + i, c) *= 0x1p60f;
            }
            search_memory<float, float> memory(x, codebook, {});
            const device_array<char> image(static_cast<std::int64_t>(prepared_codebook_bytes(k, d)));
            const prepared_codebook prepared{image.data(), static_cast<std::size_t>(image.size())};
            prepare(memory.codebook.view(), prepared);
            const auto right = memory.run_simt();
            EXPECT_EQ(right.codes[5000], 1);
            const auto expect_right = [&](auto tile) {
                using Tile = decltype(tile);
                if (!dispatch::serves<Tile, float, float>(k, d)) return;
                SCOPED_TRACE(testing::Message() << "tile of " << Tile::rows << " rows, " << Tile::codes << " codes");
                const device_array<step_stats> stats(1);
                quantize_params params;
                device_array<std::uint16_t> codes(n);
                params.prepared = prepared;
                EXPECT_EQ(launches([&](cudaStream_t stream) {
                              quantize<Tile>(memory.x.view(), memory.codebook.view(), codes.view(), discard, discard,
                                             params, {}, stream);
                          }),
                          2)
                    << "the search, and what settles hard rows";
                params = {};
                params.stats = stats.data();
                std::vector<step_stats> told;
                for (const bool all : {false, true}) {
                    codes.fill(poison);
                    memory.quantized.fill(poison);
                    memory.distances.fill(poison);
                    if (all)
                        quantize<Tile>(memory.x.view(), memory.codebook.view(), codes.view(), memory.quantized.view(),
                                       memory.distances.view(), params);
                    else
                        quantize<Tile>(memory.x.view(), memory.codebook.view(), codes.view(), discard, discard, params);
                    const auto got = codes.download();
                    for (std::int64_t i = 0; i < n; ++i)
                        ASSERT_EQ(got[i], static_cast<std::uint16_t>(right.codes[i])) << "row " << i;
                    if (all) {
                        EXPECT_TRUE(same_bits(memory.quantized.download(), right.quantized));
                        EXPECT_TRUE(same_bits(memory.distances.download(), right.distances));
                    }
                    told.push_back(stats.download()[0]);
                    EXPECT_EQ(std::memcmp(&told[0], &told.back(), sizeof(step_stats)), 0);
                    EXPECT_EQ(told.back().invalid_rows, hard / 7);
                    EXPECT_NEAR(told.back().commitment_loss, right.loss / static_cast<double>((n - hard / 7) * d),
                                1e-6 * told.back().commitment_loss);
                }
            };
            expect_right(mma_twin{});
            expect_right(mma_flat{});
            expect_right(wgmma_tall{});
        }
}

// ---- parts of the codebook ------------------------------------------------------------------------------------------

TEST_F(QuantizeMmaSmall, EqualCodesInSeveralParts) {
    // Every row of x has its nearest code in each part of the codebook: the lowest wins.
    random_source random;
    for (const std::int64_t d : {7, 300}) {
        const auto x = random.normals<float>(66, d);
        auto codebook = random.normals<float>(700, d);
        std::vector<std::int64_t> lowest(66);
        for (std::int64_t i = 0; i < 66; ++i) {
            lowest[i] = 2 * i;
            for (std::int64_t k = 699 - 2 * i; k >= 0; k -= 131) {
                lowest[i] = k;
                for (std::int64_t c = 0; c < d; ++c) codebook(k, c) = x.at(i, c);
            }
        }
        EXPECT_EQ(expect_exact(x, codebook), nearest_codes(x, codebook, distance64));
    }
}

TEST_F(QuantizeMmaSmall, PartsWithoutAFiniteCode) {
    random_source random;
    for (const std::int64_t d : {5, 290})
        for (const std::int64_t bad : {0, 1, 2}) {  // which of three times 128 codes
            auto x = random.normals<float>(70, d);
            auto codebook = random.normals<float>(384 + (d & 1), d);
            for (std::int64_t k = 128 * bad; k < 128 * (bad + 1); ++k) codebook(k, k % d) = k % 3 ? nan : inf;
            x(3, 1) = nan;
            x(64, 0) = -inf;
            const auto codes = expect_exact(x, codebook);
            EXPECT_EQ(codes[3], -1);
            EXPECT_EQ(codes[64], -1);
        }
}

TEST_F(QuantizeMmaSmall, OneRowAndManyParts) {
    random_source random;
    for (const std::int64_t d : {3, 512})
        for (const std::int64_t k : {129, 1000, 2049, 5000})
            expect_exact(random.normals<float>(1, d), random.normals<float>(k, d));
}

TEST_F(QuantizeMmaSmall, EveryPartHasCodesAndAllPartsAreAllOfThem) {
    for (const std::int64_t k : {1, 128, 129, 256, 257, 1000, 1024, 5000, 70000})
        for (std::int64_t parts = 1; parts < 600; ++parts) {
            const auto cut = dispatch::cut<mma_few>(k, parts, {});
            ASSERT_GE(cut.count, 1);
            ASSERT_LE(cut.count, parts);
            ASSERT_LT((cut.count - 1) * cut.tiles * device::image_tile, k) << parts;
            ASSERT_GE(cut.count * cut.tiles * device::image_tile, k) << parts;
        }
}

TEST_F(QuantizeMmaTest, AsManyPartsAsKeepTheDeviceBusy) {
    const auto parts = [](std::int64_t n, std::int64_t k, std::int64_t blocks, std::int64_t most) {
        return dispatch::best_parts<mma_few>(n, k, blocks, most);
    };
    EXPECT_EQ(parts(1, 2048, 132, 16), 16);
    EXPECT_EQ(parts(64, 8192, 132, 64), 64);
    EXPECT_EQ(parts(1, 1 << 20, 132, 8192), 131);  // 63 tiles each; 132 would be no faster
    EXPECT_EQ(parts(1, 128, 132, 1), 1);
    EXPECT_EQ(parts(132 * 64, 1 << 14, 132, 1), 1);
    EXPECT_EQ(parts(132 * 64, 1 << 14, 132, 9), 1);
    EXPECT_EQ(parts(70 * 64, 1 << 14, 132, 0), 1);
    EXPECT_GT(parts(70 * 64, 1 << 14, 132, 3), 1);
}

TEST_F(QuantizeMmaTest, FewRowsInParts) {
    // All of `quantize`: as the shape would have it on a device without a path of its own for this D.
    random_source random;
    for (const auto& [n, k, d] : std::vector<std::array<std::int64_t, 3>>{{1, 2048, 512},
                                                                          {17, 3001, 300},
                                                                          {64, 8192, 768},
                                                                          {300, 2050, 271},
                                                                          {1024, 2048, 512},
                                                                          {4500, 1500, 400}}) {
        SCOPED_TRACE(testing::Message() << n << " rows, " << k << " codes, D = " << d);
        auto x = random.normals<float>(n, d), codebook = random.normals<float>(k, d);
        for (std::int64_t c = 0; c < d; ++c)
            codebook(k - 1, c) = codebook(k / 2, c) = codebook(k / 3, c) = x.at(n - 1, c);
        if (n > 1) x(n / 2, d / 2) = nan;
        search_memory<float, float> memory(x, codebook, {});
        const auto right = memory.run_simt();
        EXPECT_EQ(right.codes.back(), k / 3);
        const device_image<float> image(memory.codebook_ref());
        detail::carver measure;
        dispatch::take_parts(measure, {n, k, d});
        EXPECT_GT(measure.bytes(), 0u);
        const device_array<char> bytes(static_cast<std::int64_t>(measure.bytes()));
        detail::carver carver(bytes.data());
        const dispatch::mma_scratch scratch{dispatch::take_parts(carver, {n, k, d}), {}};
        for (int run = 0; run < 3; ++run)
            EXPECT_TRUE(memory.run([&](const auto& args, const auto& tally) {
                return dispatch::quantize_mma<dynamic_extent>(args, tally, image.ref(), scratch, kernel::most_segments,
                                                              nullptr);
            }) == right);

        device_array<std::int32_t> codes(n);
        const device_array<step_stats> stats(1);
        quantize_params params;
        params.stats = stats.data();
        const device_workspace ws(quantize_workspace_bytes({n, k, d}, params));
        const auto eager = [&](cudaStream_t stream) {
            quantize(memory.x.view(), memory.codebook.view(), codes.view(), memory.quantized.view(),
                     memory.distances.view(), params, ws.lent(), stream);
        };
        codes.fill(poison);
        eager(nullptr);
        const auto found = codes.download();
        const auto told = stats.download();
        EXPECT_EQ(std::vector<std::int64_t>(found.begin(), found.end()), right.codes);
        EXPECT_TRUE(same_bits(memory.quantized.download(), right.quantized));
        EXPECT_TRUE(same_bits(memory.distances.download(), right.distances));
        EXPECT_EQ(told[0].invalid_rows, n > 1 ? 1 : 0);
        EXPECT_NEAR(told[0].commitment_loss, right.loss / static_cast<double>((n - (n > 1)) * d),
                    1e-6 * told[0].commitment_loss);
        codes.fill(poison);
        captured_graph(eager).replay();
        EXPECT_EQ(codes.download(), found);
        const auto again = stats.download();
        EXPECT_EQ(std::memcmp(&again[0], &told[0], sizeof(step_stats)), 0);
    }
}

TEST_F(QuantizeMmaTest, PartsTakeLittleMemory) {
    for (const std::int64_t n : {0, 1, 63, 64, 1000, 8192, 8193, 1 << 20})
        for (const std::int64_t k : {1, 128, 129, 1024, 65536})
            for (const std::int64_t d : {1, 8, 64, 512, 4096}) {
                detail::carver c;
                const auto p = dispatch::take_parts(c, {n, k, d});
                EXPECT_LE(c.bytes(), 12u * static_cast<std::size_t>(p.rows) + 512u);
                EXPECT_LE(p.rows, most_split_rows);
                EXPECT_LE(8 * p.rows, k * d);
                EXPECT_LE(p.rows, n * ((k - 1) / 128 + 1));
            }
}

// ---- many rows ------------------------------------------------------------------------------------------------------

/// Codes of noise, several times over, against those from the CUDA cores.
template <class Tile>
void expect_steady_codes(std::int64_t n, std::int64_t k, std::int64_t d, int runs) {
    SCOPED_TRACE(testing::Message() << n << " rows, " << k << " codes, D = " << d);
    const auto x = pattern_array<float>(n * d, 23, true);
    const device_matrix<float> codebook(
        matrix<float>::generate(k, d, [&](auto i, auto c) { return noise(29, i * d + c); }));
    const device_image<float> image(matrix_ref<const float>{codebook.data(), k, d, d});
    device_array<std::int32_t> codes(n);
    const auto args = detail::validate_quantize("test", matrix_view<const float>(x.data(), n, d), codebook.view(),
                                                codes.view(), discard, discard, {});
    dispatch::quantize_simt<simt_tile, dynamic_extent>(args, {}, nullptr);
    const auto right = codes.download();
    const auto fit = dispatch::fit_mma<Tile, float, float>(d);
    if (fit.blocks == 0) return;
    for (int run = 0; run < runs; ++run) {
        codes.fill(poison);
        ASSERT_GT(dispatch::quantize_mma<Tile>(args, kernel::search_tally{}, image.ref(), {}, 1, kernel::most_segments,
                                               fit, nullptr),
                  0);
        const auto got = codes.download();
        std::int64_t wrong = 0;
        for (std::int64_t i = 0; i < n; ++i) wrong += got[i] != right[i];
        ASSERT_EQ(wrong, 0) << "rows, in run " << run;
    }
}

TEST_F(QuantizeMmaTest, AMillionRowsTenTimes) {
    expect_steady_codes<mma_twin>(1 << 20, 1024, 128, 10);
    expect_steady_codes<mma_tall>(1 << 20, 1024, 128, 10);
}

TEST_F(QuantizeMmaTest, ManyRowsOfManyWidths) {
    for (const std::int64_t d : {8, 77, 256, 520}) {
        expect_steady_codes<mma_twin>(100001, 2050, d, 3);
        expect_steady_codes<mma_tall>(100001, 2050, d, 3);
        expect_steady_codes<mma_flat>(100001, 2050, d, 3);
        expect_steady_codes<mma_streamed>(50001, 1030, d, 3);
    }
}

TEST_F(QuantizeMmaTest, WarpgroupsTenTimes) {
    for (const std::int64_t d : {62, 128, 285, 512}) {
        expect_steady_codes<wgmma_tall>(200001, 2050, d, 10);
        expect_steady_codes<wgmma_flat>(200001, 2050, d, 10);
    }
    expect_steady_codes<wgmma_tall>(1 << 20, 1024, 300, 10);
    expect_steady_codes<wgmma_flat>(100001, 1024, 900, 10);
    expect_steady_codes<wgmma_tile<64, 256, 2>>(50001, 1024, 1100, 10);
}

}  // namespace
}  // namespace cuvq::test
