// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/arguments.hpp>

namespace cuvq::kernel {

/// Row i of `quantized` becomes codebook row codes[i], or NaN; a warp a row.
template <class T, class C>
__global__ void lookup(detail::lookup_args<T, C> a) {
    const std::int64_t warps = std::int64_t{gridDim.x} * blockDim.x / 32;
    for (std::int64_t i = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32; i < a.quantized.rows;
         i += warps) {
        const std::int64_t code = a.codes.load(i);
        const bool known = code >= 0 && code < a.codebook.rows;
        for (std::int64_t d = threadIdx.x % 32; d < a.quantized.columns; d += 32)
            a.quantized.row(i)[d] =
                static_cast<T>(known ? static_cast<float>(a.codebook.row(code)[d]) : __int_as_float(0x7FC00000));
    }
}

}  // namespace cuvq::kernel
