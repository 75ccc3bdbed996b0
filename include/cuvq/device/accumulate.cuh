// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace cuvq::device {

/// Adds a weighted row onto one thread's share of a running sum: sum[i] += weight * row[first + i * stride], for the
/// columns below `columns`. Threads with first = 0 .. stride - 1 together hold stride * V columns.
///
/// @param sum     V registers of the calling thread, kept from row to row; zero them before the first.
/// @param row     [columns] global or shared memory; float, __half or __nv_bfloat16.
/// @param weight  finite factor of the row.
/// @param columns D.
/// @param first   first column of this thread.
/// @param stride  columns between two of its shares: the threads that work together.
/// Deterministic: one float fma per element, in the order of the calls. No synchronisation. O(V).
template <int V, class X>
__device__ void accumulate_row(float (&sum)[V], const X* row, float weight, std::int64_t columns, std::int64_t first,
                               int stride) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const std::int64_t d = first + std::int64_t{i} * stride;
        if (d < columns) sum[i] = __fmaf_rn(weight, static_cast<float>(row[d]), sum[i]);
    }
}

}  // namespace cuvq::device
