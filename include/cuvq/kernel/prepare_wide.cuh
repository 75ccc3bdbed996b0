// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The image of a codebook of any number of dimensions, in two launches: the first finds the frame, so that not every
// block has to.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <cub/block/block_reduce.cuh>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/device/image_row.cuh>
#include <cuvq/kernel/image_frame.cuh>
#include <cuvq/kernel/prepare.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// One block. scale[1] gets the shift of n.
template <int Threads, class C>
__global__ __launch_bounds__(Threads) void prepare_centre(matrix_ref<const C> codebook, codebook_image image,
                                                          image_trail trail) {
    __shared__ typename cub::BlockReduce<double, Threads>::TempStorage storage;
    const float2 scales = find_first_frame<Threads>(storage, codebook, [&](int d, float c) {
        image.centre[d] = c;
        if (trail) trail.put_centre(codebook.columns, d, c);
    });
    if (threadIdx.x == 0 && trail) trail.put_scales(scales);
    if (threadIdx.x == 0) {
        image.scale[0] = scales.x;
        image.scale[1] = scales.y;
    }
}

/// As many blocks as the image has parts.
template <int Threads, class C>
__global__ __launch_bounds__(Threads) void prepare_rows(matrix_ref<const C> codebook, codebook_image image,
                                                        arch::slab_layout layout, image_trail trail) {
    write_image_parts<Threads>(codebook, image, layout, {image.centre, image.scale[0], image.scale[1]}, trail);
}

}  // namespace cuvq::kernel
