// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The block-level search on tensor cores. The block converts its rows to fp16 once (or slab by slab, again for every
// tile of codes, where shared memory does not hold them), streams the codebook's image through a ring of buffers, keeps
// per thread and row the best of its codes, and settles in float64 what the bound of device/certificate.cuh leaves
// open. In this order: mma_shape.cuh, mma_rows.cuh, mma_scoring.cuh or wgmma_scoring.cuh, mma_settling.cuh.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/device/mma_scoring.cuh>
#include <cuvq/device/mma_settling.cuh>
#include <cuvq/device/mma_shape.cuh>
#include <cuvq/device/wgmma_scoring.cuh>
#include <cuvq/views.hpp>

namespace cuvq::device {

#if CUVQ_HAS_MMA

/// All of `nearest` below but the rows that it lists as hard, whose codes are still to be found; `rows` has one at
/// least. The arguments must outlive what it returns. Ends with a barrier.
template <class Policy, class X, class C>
__device__ mma_settling<Policy, X, C> nearest_but_hard(const nearest_storage<Policy>& storage,
                                                       const matrix_ref<const X>& rows,
                                                       const matrix_ref<const C>& codebook, const image_ref& image,
                                                       std::int64_t* codes) {
    using shape = mma_shape<Policy>;
    const mma_block<Policy, X, C> block(storage, rows, codebook, image);
    int* words = block.words();
    __syncthreads();
    if (threadIdx.x < 8) words[threadIdx.x] = threadIdx.x == shape::tag_mask ? ~(2 * shape::pairs - 1) : 0;
    __syncthreads();
    score_bounds most;
    for (std::int64_t i = threadIdx.x; i < image_ref::parts(codebook.rows); i += Policy::threads) {
        const score_bounds b = image.bounds[i];
        // Floats that are not negative order as integers do, Inf and NaN above all others.
        const auto raise = [](float& to, float v) { to = __int_as_float(max(__float_as_int(to), __float_as_int(v))); };
        raise(most.norm, b.norm);
        raise(most.residual, b.residual);
        raise(most.offset, b.offset);
        raise(most.offset_rest, b.offset_rest);
    }
    const float values[4] = {most.norm, most.residual, most.offset, most.offset_rest};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned largest = __reduce_max_sync(0xFFFFFFFFu, __float_as_uint(values[i]));
        if (threadIdx.x % 32 == 0) atomicMax(words + i, static_cast<int>(largest));
    }
    __syncthreads();
    if constexpr (!Policy::warpgroups) mma_scoring<Policy, X, C>(block).search();
#if CUVQ_HAS_WGMMA
    if constexpr (Policy::warpgroups) wgmma_scoring<Policy, X, C>(block).search();
#endif
    mma_settling<Policy, X, C> settling(block);
    settling.settle_rows(codes);
    return settling;
}

#endif  // CUVQ_HAS_MMA

/// As `nearest` in device/nearest.cuh, on the tensor cores: exact too, and many times as fast. From sm_80 on; compiled
/// for older architectures it does nothing.
///
/// @tparam Policy  an `mma_tile`, or for D >= 62 and code for sm_90a alone a `wgmma_tile`, from `dispatch/tuning.cuh`
///                 or with your own sizes. The block has Policy::threads threads in x.
/// @param storage  shared memory of the caller, usually dynamic: it must not be in use; free again after a barrier.
/// @param rows     [n x D] vectors, n <= Policy::rows, in shared or global memory, written before the last barrier;
///                 float, __half or __nv_bfloat16; D <= most_mma_columns.
/// @param codebook [K x D] global memory; any of those types; K < most_mma_codes.
/// @param image    of that codebook, as it is now: any centre and scale will do.
/// @param codes    [n] out, in shared or global memory: lowest nearest code, -1 where the vector has a NaN or Inf or
///                 no codebook row is finite. Readable by all threads of the block on return.
/// Deterministic: the codes do not depend on Policy, n, the block or the image. O(n K D) per block, plus O(K D) in
/// float64 for each row that the filter cannot settle.
template <class Policy, class X, class C>
__device__ void nearest(const nearest_storage<Policy>& storage, const matrix_ref<const X>& rows,
                        const matrix_ref<const C>& codebook, const image_ref& image, std::int64_t* codes) {
#if CUVQ_HAS_MMA
    if constexpr (has_tensor_cores<Policy>)
        if (rows.rows > 0) nearest_but_hard<Policy>(storage, rows, codebook, image, codes).settle_hard_rows(codes);
#endif
}

}  // namespace cuvq::device
