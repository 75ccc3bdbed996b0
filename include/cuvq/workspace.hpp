// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace cuvq {

/// Scratch device memory that a caller lends to one call: 256-byte aligned, of at least the bytes that the matching
/// `..._workspace_bytes` function names, arbitrary on entry and on return, never shared by calls that may run at the
/// same time. The default, empty, makes the call allocate (and free) what it needs on its stream with
/// `cudaMallocAsync`.
struct workspace {
    void* data = nullptr;   ///< device pointer
    std::size_t bytes = 0;  ///< size of the block in bytes

    static constexpr std::size_t alignment = 256;
};

}  // namespace cuvq
