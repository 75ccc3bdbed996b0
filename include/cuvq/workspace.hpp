// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuvq {

/// Sizes of a problem, for the `..._workspace_bytes` functions.
struct shape {
    std::int64_t vectors = 0;     ///< N, at least 0
    std::int64_t codes = 0;       ///< K, at least 1
    std::int64_t dimensions = 0;  ///< D, at least 1
};

/// Scratch device memory that a caller lends to one call: 256-byte aligned, of at least the bytes that the matching
/// `..._workspace_bytes` function names, arbitrary on entry and on return, never shared by calls that may run at the
/// same time, overlapping no other argument. The default, empty, makes the call allocate (and free) what it needs on
/// its stream with `cudaMallocAsync`.
struct workspace {
    void* data = nullptr;   ///< device pointer
    std::size_t bytes = 0;  ///< size of the block in bytes

    static constexpr std::size_t alignment = 256;
};

/// Device memory that holds what the searches derive from a codebook, so that `quantize` need not do so in each call:
/// 256-byte aligned, of at least `prepared_codebook_bytes`, overlapping no other argument. `prepare` fills it, and must
/// again after every change of the codebook that is not made by the EMA functions with this in their state. The
/// default, empty, stands for none. `cuvq::reference` has no use for it and ignores it.
struct prepared_codebook {
    void* data = nullptr;   ///< device pointer
    std::size_t bytes = 0;  ///< size of the block in bytes
};

}  // namespace cuvq
