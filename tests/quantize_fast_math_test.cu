// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Compiled with --use_fast_math: codes are exact all the same, of numbers too that such code flushes to zero.
#include <cuvq/quantize.cuh>

#include <cstdint>

#include <gtest/gtest.h>

#include "support/device.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"

namespace cuvq::test {
namespace {

class QuantizeFastMathSmall : public gpu_test {};

/// Few rows, many, and so few codes that the CUDA cores answer; D is static, to compile one tile.
template <std::size_t D>
void expect_exact_codes(float unit, std::int64_t most) {
    constexpr auto d = static_cast<std::int64_t>(D);
    random_source random;
    const auto at = [&](auto, auto) { return unit * static_cast<float>(random.integer(-most, most)); };
    for (const std::int64_t n : {70, 9000}) {
        for (const std::int64_t k : {5, 300}) {
            SCOPED_TRACE(testing::Message() << n << " rows, " << k << " codes, D = " << d << ", unit " << unit
                                            << ", up to " << most << " of them");
            const auto x = matrix<float>::generate(n, d, at), codebook = matrix<float>::generate(k, d, at);
            const device_matrix<float> rows(x), centres(codebook);
            device_array<std::int32_t> codes(n);
            quantize(rows.fixed<D>(), centres.fixed<D>(), codes.view());
            const auto got = codes.download();
            EXPECT_TRUE(codes_are_nearest(x, codebook, {got.begin(), got.end()}));
        }
    }
}

TEST_F(QuantizeFastMathSmall, SubnormalNumbers) {
    for (const std::int64_t most : {1, 100, 1 << 23, 1 << 24}) {
        expect_exact_codes<3>(0x1p-149f, most);
        expect_exact_codes<7>(0x1p-149f, most);
    }
    expect_exact_codes<300>(0x1p-149f, 1 << 22);
}

TEST_F(QuantizeFastMathSmall, NumbersOfAllMagnitudes) {
    for (const float unit : {0x1p-130f, 0x1p-60f, 1.0f, 0x1p100f}) {
        expect_exact_codes<3>(unit, 1 << 20);
        expect_exact_codes<7>(unit, 1 << 20);
    }
    expect_exact_codes<300>(1.0f, 1 << 20);
}

}  // namespace
}  // namespace cuvq::test
