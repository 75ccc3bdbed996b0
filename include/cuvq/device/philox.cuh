// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuvq/detail/philox.hpp>

namespace cuvq::device {

/// The row of [0, rows) that code `code` draws in the update after `step` updates: uniform, the same on every card
/// and on the CPU. One thread; no state. `rows` >= 1.
/// Source: Philox4x32-10, Salmon et al., SC 2011, key `seed`, counter (code, step); scaled by floor(u rows / 2^64).
__device__ inline std::int64_t philox_row(std::uint64_t seed, std::int64_t step, std::int64_t code, std::int64_t rows) {
    // Keeps the round keys from being computed ahead of the branch that draws, which few codes take.
    asm volatile("" : "+l"(seed));
    return detail::scale_to(
        detail::philox_bits(seed, static_cast<std::uint64_t>(code), static_cast<std::uint64_t>(step)), rows);
}

}  // namespace cuvq::device
