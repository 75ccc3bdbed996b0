// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Which replacement a dead code draws, by the formula that `ema_params` documents; shares no code with the library.
#pragma once

#include <cstdint>

namespace cuvq::test {

/// Philox4x32-10 as the paper words it: ten rounds of S-boxes, the key bumped between them.
inline std::uint64_t first_64_bits(std::uint64_t key, std::uint64_t low, std::uint64_t high) {
    std::uint64_t l[2] = {high >> 32, low >> 32}, r[2] = {high & 0xffffffff, low & 0xffffffff};
    for (std::uint64_t round = 0; round < 10; ++round) {
        const std::uint64_t key0 = (key + round * 0x9E3779B9) & 0xffffffff;
        const std::uint64_t key1 = ((key >> 32) + round * 0xBB67AE85) & 0xffffffff;
        const std::uint64_t a = r[1] * 0xD2511F53, b = r[0] * 0xCD9E8D57;
        const std::uint64_t next_r0 = (a >> 32) ^ l[0] ^ key1, next_r1 = (b >> 32) ^ l[1] ^ key0;
        l[0] = a & 0xffffffff;
        l[1] = b & 0xffffffff;
        r[0] = next_r0;
        r[1] = next_r1;
    }
    return l[1] << 32 | r[1];
}

__extension__ using uint128 = unsigned __int128;

/// The row of `rows` that a code draws in a step, where all are finite.
inline std::int64_t drawn_row(std::uint64_t seed, std::int64_t code, std::int64_t step, std::int64_t rows) {
    const std::uint64_t u = first_64_bits(seed, static_cast<std::uint64_t>(code), static_cast<std::uint64_t>(step));
    return static_cast<std::int64_t>((uint128{u} * static_cast<std::uint64_t>(rows)) >> 64);
}

}  // namespace cuvq::test
