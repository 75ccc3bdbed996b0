// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Counter-based random numbers, the same on host and device: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include <cstdint>

#include <cuvq/version.hpp>

namespace cuvq::detail {

struct philox_block {
    std::uint32_t word[4];
};

/// One block of Philox4x32-10.
CUVQ_HOST_DEVICE inline philox_block philox4x32_10(philox_block counter, std::uint32_t key0, std::uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter.word[0];
        const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter.word[2];
        counter = {{static_cast<std::uint32_t>(b >> 32) ^ counter.word[1] ^ key0, static_cast<std::uint32_t>(b),
                    static_cast<std::uint32_t>(a >> 32) ^ counter.word[3] ^ key1, static_cast<std::uint32_t>(a)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

/// 64 random bits for (seed, high, low): the first two words of the block whose counter is (low, high).
CUVQ_HOST_DEVICE inline std::uint64_t philox_bits(std::uint64_t seed, std::uint64_t low, std::uint64_t high) {
    const philox_block counter{{static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(low >> 32),
                                static_cast<std::uint32_t>(high), static_cast<std::uint32_t>(high >> 32)}};
    const philox_block r =
        philox4x32_10(counter, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
    return (std::uint64_t{r.word[1]} << 32) | r.word[0];
}

/// floor(bits * n / 2^64): `bits` scaled to [0, n), for n >= 1.
CUVQ_HOST_DEVICE inline std::int64_t scale_to(std::uint64_t bits, std::int64_t n) {
    const std::uint64_t m = static_cast<std::uint64_t>(n);
    const std::uint64_t b0 = bits & 0xFFFFFFFFu, b1 = bits >> 32, m0 = m & 0xFFFFFFFFu, m1 = m >> 32;
    const std::uint64_t middle = ((b0 * m0) >> 32) + ((b1 * m0) & 0xFFFFFFFFu) + ((b0 * m1) & 0xFFFFFFFFu);
    return static_cast<std::int64_t>(b1 * m1 + ((b1 * m0) >> 32) + ((b0 * m1) >> 32) + (middle >> 32));
}

/// Entry i of a random permutation of [0, n), for 0 <= i < n: an eight-round Feistel network over the next even number
/// of bits, walked until it lands inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
CUVQ_HOST_DEVICE inline std::int64_t permute(std::uint64_t seed, std::int64_t i, std::int64_t n) {
    int half = 1;
    while (half < 32 && (std::int64_t{1} << (2 * half)) < n) ++half;
    const std::uint64_t mask = (std::uint64_t{1} << half) - 1;
    std::uint64_t v = static_cast<std::uint64_t>(i);
    do {
        std::uint64_t left = v >> half, right = v & mask;
        for (std::uint64_t round = 0; round < 8; ++round) {
            const std::uint64_t next = left ^ (philox_bits(seed, right, ~round) & mask);
            left = right;
            right = next;
        }
        v = (left << half) | right;
    } while (v >= static_cast<std::uint64_t>(n));
    return static_cast<std::int64_t>(v);
}

}  // namespace cuvq::detail
