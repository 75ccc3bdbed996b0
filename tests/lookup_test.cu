// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/lookup.cuh>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "support/device.cuh"
#include "support/large.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/types.hpp"

namespace cuvq::test {
namespace {

using codes_t = std::vector<std::int64_t>;

template <class X, class Int = std::int32_t, class C>
matrix<X> looked_up(const matrix<C>& codebook, const codes_t& codes, row_layout layout = {},
                    cudaStream_t stream = nullptr) {
    const device_matrix<C> rows(codebook, layout);
    const device_array<Int> stored(std::vector<Int>(codes.begin(), codes.end()), layout.offset);
    const device_matrix<X> quantized(static_cast<std::int64_t>(codes.size()), codebook.columns, layout);
    lookup(rows.view(), stored.view(), quantized.view(), stream);
    const auto result = quantized.download();
    EXPECT_TRUE(quantized.padding_untouched());
    return result;
}

codes_t random_codes(random_source& random, std::int64_t n, std::int64_t k) {
    codes_t codes;
    for (std::int64_t i = 0; i < n; ++i) codes.push_back(random.integer(0, k - 1));
    return codes;
}

class LookupSmall : public gpu_test {};
class LargeTest : public gpu_test {};

template <class Elements>
class LookupTypesSmall : public gpu_test {
protected:
    using x = typename Elements::x;
    using codebook = typename Elements::codebook;
};
TYPED_TEST_SUITE(LookupTypesSmall, element_pairs, type_names);

TYPED_TEST(LookupTypesSmall, RowsOfCodes) {
    using X = typename TestFixture::x;
    random_source random;
    for (const std::int64_t d : {1, 3, 32, 33, 129}) {
        auto codebook = random.normals<typename TestFixture::codebook>(50, d);
        codebook(7, d / 2) = std::numeric_limits<float>::infinity();  // a row like any other here
        codebook(8, 0) = -0.0f;
        auto codes = random_codes(random, 200, 50);
        codes[0] = 7;
        codes[1] = 8;
        codes[2] = -1;
        codes[3] = 50;
        for (const row_layout layout : {row_layout{}, awkward})
            EXPECT_TRUE(rows_are_of(codebook, codes, looked_up<X>(codebook, codes, layout)));
    }
}

template <class Int>
class LookupCodesSmall : public gpu_test {};
TYPED_TEST_SUITE(LookupCodesSmall, code_types, type_names);

TYPED_TEST(LookupCodesSmall, CodesOutsideTheCodebookGiveNan) {
    using limits = std::numeric_limits<TypeParam>;
    random_source random;
    const auto codebook = random.normals<float>(100, 6);
    auto codes = random_codes(random, 90, 100);
    codes[3] = 100;
    codes[4] = static_cast<std::int64_t>(limits::max());
    codes[5] = static_cast<std::int64_t>(limits::lowest());  // 0 is a code
    if (std::is_signed_v<TypeParam>) codes[89] = -1;
    for (const row_layout layout : {row_layout{}, awkward})
        EXPECT_TRUE(rows_are_of(codebook, codes, looked_up<float, TypeParam>(codebook, codes, layout)));
}

TEST_F(LookupSmall, EveryByteIsACodeWhereThereAre256) {
    random_source random;
    const auto codebook = random.normals<float>(256, 3);
    codes_t codes;
    for (std::int64_t i = 0; i < 256; ++i) codes.push_back(255 - i);
    EXPECT_TRUE(rows_are_of(codebook, codes, looked_up<float, std::uint8_t>(codebook, codes)));
}

TEST_F(LookupSmall, WithoutCodesNothingIsWritten) {
    const device_matrix<float> codebook(matrix<float>(3, 4, 1)), quantized(5, 4);
    const device_array<std::int32_t> codes(5);
    lookup(codebook.view(), vector_view<std::int32_t>(codes.data(), 0), strided(quantized.data(), 0, 4, 4));
    EXPECT_TRUE(quantized.untouched());
}

TEST_F(LookupSmall, ManyColumns) {
    random_source random;
    for (const std::int64_t d : {768, 2050}) {
        const auto codebook = random.normals<float>(5, d);
        const auto codes = random_codes(random, 20, 5);
        EXPECT_TRUE(rows_are_of(codebook, codes, looked_up<float>(codebook, codes)));
    }
}

TEST_F(LookupSmall, OnAStreamAndCapturedInAGraph) {
    random_source random;
    const auto codebook = random.normals<float>(40, 9);
    const auto codes = random_codes(random, 70, 40);
    const test_stream stream;
    EXPECT_TRUE(rows_are_of(codebook, codes, looked_up<float>(codebook, codes, {}, stream)));

    const device_matrix<float> rows(codebook);
    device_matrix<float> quantized(70, 9);
    device_array<std::int32_t> stored(std::vector<std::int32_t>(codes.begin(), codes.end()));
    captured_graph graph([&](cudaStream_t s) { lookup(rows.view(), stored.view(), quantized.view(), s); });
    EXPECT_TRUE(quantized.untouched());
    graph.replay();
    EXPECT_TRUE(rows_are_of(codebook, codes, quantized.download()));
}

TEST_F(LookupSmall, ARefusedCallNamesTheFunctionAndWritesNothing) {
    const device_matrix<float> codebook(matrix<float>(300, 4, 1)), quantized(5, 4);
    const device_array<std::uint8_t> codes(5);
    const auto text = refusal([&] { lookup(codebook.view(), codes.view(), quantized.view()); });
    EXPECT_EQ(text.rfind("cuvq::lookup: codes: ", 0), 0u) << text;
    EXPECT_TRUE(quantized.untouched());
}

TEST_F(LargeTest, MoreThan2To31ElementsOnBothSides) {
    constexpr std::int64_t columns = 512, k = (std::int64_t{1} << 31) / columns + 300, n = k;
    if (!has_free_memory(2 * static_cast<std::size_t>(n * columns) * sizeof(__half) + (std::size_t{1} << 30)))
        GTEST_SKIP() << "too little device memory for two matrices of " << n << " x " << columns << " halves";
    const auto codebook = pattern_array<__half>(k * columns, 19);
    const device_array<__half> quantized(n * columns);
    std::vector<std::int32_t> codes;
    for (std::int64_t i = 0; i < n; ++i) codes.push_back(static_cast<std::int32_t>((i + k / 2) % k));
    const device_array<std::int32_t> stored(codes);
    lookup(matrix_view<const __half>(codebook.data(), k, columns), stored.view(),
           matrix_view<__half>(quantized.data(), n, columns));
    for (const std::int64_t first :
         {std::int64_t{0}, k - k / 2 - 50, (std::int64_t{1} << 31) / columns - 50, n - 100}) {
        matrix<__half> got(100, columns);
        got.data = quantized.download(first * columns, 100 * columns);
        for (std::int64_t i = 0; i < 100; ++i)
            ASSERT_EQ(got.row(i), pattern_rows<__half>(codes[first + i], 1, columns, 19).row(0)) << "row " << first + i;
    }
}

}  // namespace
}  // namespace cuvq::test
