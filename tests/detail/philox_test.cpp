// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/detail/philox.hpp>

#include <cstdint>
#include <limits>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "support/random.hpp"

namespace cuvq::test {
namespace {

using detail::permute;
using detail::philox4x32_10;
using detail::philox_bits;
using detail::philox_block;
using detail::scale_to;

// Known answers: `kat_vectors` of the Random123 distribution, lines "philox4x32 10".
void expect_block(philox_block counter, std::uint32_t key0, std::uint32_t key1, philox_block answer) {
    const philox_block got = philox4x32_10(counter, key0, key1);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(got.word[i], answer.word[i]) << "word " << i;
}

TEST(PhiloxTest, KnownAnswerOfZeros) {
    expect_block({{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
}

TEST(PhiloxTest, KnownAnswerOfOnes) {
    expect_block({{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}}, 0xffffffff, 0xffffffff,
                 {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
}

TEST(PhiloxTest, KnownAnswerOfTheDigitsOfPi) {
    expect_block({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0,
                 {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST(PhiloxTest, BitsAreTheFirstTwoWordsOfCounterLowHigh) {
    EXPECT_EQ(philox_bits(0, 0, 0), 0xe169c58d6627e8d5u);
    EXPECT_EQ(philox_bits(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e), 0x94fdccebd16cfe09u);
}

__extension__ using uint128 = unsigned __int128;

std::int64_t scaled(std::uint64_t bits, std::int64_t n) {
    return static_cast<std::int64_t>((uint128{bits} * static_cast<std::uint64_t>(n)) >> 64);
}

TEST(PhiloxTest, ScaleToIsTheUpperHalfOfTheProduct) {
    const std::uint64_t bits[] = {0, 1, 0xffffffff, 0x100000000, 0x8000000000000000, 0xfffffffffffffffe, ~0ull};
    const std::int64_t sizes[] = {1, 2, 3, 7, 0xffffffff, 0x100000000, 0x100000001, 0x7fffffffffffffff};
    for (const std::uint64_t b : bits)
        for (const std::int64_t n : sizes) EXPECT_EQ(scale_to(b, n), scaled(b, n)) << b << " to " << n;
    random_source random;
    for (int trial = 0; trial < 100000; ++trial) {
        const std::uint64_t b = random.bits();
        const std::int64_t n = static_cast<std::int64_t>(random.bits() >> (1 + random.bits() % 63)) | 1;
        ASSERT_EQ(scale_to(b, n), scaled(b, n)) << b << " to " << n;
    }
}

TEST(PhiloxTest, PermuteTakesEveryValueOnce) {
    for (const std::int64_t n : {1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 63, 64, 65, 1000, 4096, 4097})
        for (const std::uint64_t seed : {0ull, 1ull, 0xdeadbeefcafef00dull}) {
            std::vector<int> seen(static_cast<std::size_t>(n));
            for (std::int64_t i = 0; i < n; ++i) {
                const std::int64_t v = permute(seed, i, n);
                ASSERT_GE(v, 0);
                ASSERT_LT(v, n);
                ++seen[static_cast<std::size_t>(v)];
            }
            EXPECT_EQ(seen, std::vector<int>(static_cast<std::size_t>(n), 1)) << "n = " << n << ", seed " << seed;
        }
}

TEST(PhiloxTest, PermuteStaysInsideHugeRangesWithoutCollisions) {
    for (const std::int64_t n : {std::int64_t{1} << 31, (std::int64_t{1} << 32) + 1, (std::int64_t{1} << 62) + 1,
                                 std::numeric_limits<std::int64_t>::max()}) {
        std::set<std::int64_t> seen;
        for (std::int64_t i = 0; i < 1000; ++i) {
            const std::int64_t v = permute(5, n - 1 - i, n);
            ASSERT_GE(v, 0);
            ASSERT_LT(v, n);
            seen.insert(v);
        }
        EXPECT_EQ(seen.size(), 1000u) << "n = " << n;
    }
}

TEST(PhiloxTest, PermuteSendsEachEntryToEachPlace) {
    constexpr int n = 5, trials = 20000;
    int hits[n][n] = {};
    for (int seed = 0; seed < trials; ++seed)
        for (int i = 0; i < n; ++i) ++hits[i][permute(static_cast<std::uint64_t>(seed), i, n)];
    // Four Feistel rounds are not quite uniform over so few entries.
    for (const auto& entry : hits)
        for (const int count : entry) EXPECT_NEAR(count, trials / n, 0.4 * trials / n);
}

}  // namespace
}  // namespace cuvq::test
