// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/validate.hpp>
#include <cuvq/kernel/lookup.cuh>
#include <cuvq/views.hpp>

namespace cuvq {

/// The codebook rows of codes (decoding).
///
/// @param codebook  [K x D] device memory; float or the type of quantized; K, D >= 1.
/// @param codes     [N] device memory; int32, int64, uint8, uint16 or uint32 with room for K - 1; N >= 0.
/// @param quantized [N x D] out, device memory: row i is codebook row codes[i], rounded to the element type; NaN where
///                  that is outside [0, K).
/// @param stream    runs here, asynchronously, in one launch; may be captured in a graph.
/// @throws std::invalid_argument naming the argument, before any launch; cuvq::cuda_error if a CUDA call fails.
/// Deterministic. O(N D).
template <class CodebookView, class CodesView, class QuantizedView>
void lookup(const CodebookView& codebook, const CodesView& codes, const QuantizedView& quantized,
            cudaStream_t stream = nullptr) {
    const auto args = detail::validate_lookup("lookup", codebook, codes, quantized);
    if (args.quantized.rows == 0) return;
    constexpr unsigned threads = 256;
    detail::launch(kernel::lookup<detail::value_of<QuantizedView>, detail::value_of<CodebookView>>,
                   detail::blocks_for(args.quantized.rows, threads / 32, 1 << 20), threads, stream, 0, args);
}

}  // namespace cuvq
