// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What the tensor-core search derives from a codebook: its rows in fp16, moved by a centre and scaled by a power of
// two, in the layout that the search copies tile by tile; and how far that is from the truth.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <cub/block/block_reduce.cuh>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/device/image_row.cuh>
#include <cuvq/kernel/image_frame.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Parts of a codebook's image that a block writes at most.
inline constexpr int most_block_parts = 16;

/// Every gridDim.x-th part of a codebook's image from part blockIdx.x on: its rows, a warp each, and their bounds.
/// Whole block.
template <int Threads, class C>
__device__ void write_image_parts(const matrix_ref<const C>& codebook, const codebook_image& image,
                                  const arch::slab_layout& layout, const device::image_frame& frame,
                                  const image_trail& trail) {
    constexpr int warps = Threads / 32, parts_per_tile = image_tile / image_part;
    __shared__ int shared_bounds[most_block_parts][4];
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t parts = device::image_ref::parts(codebook.rows);
    const auto part_of = [](int i) { return blockIdx.x + std::int64_t{i} * gridDim.x; };
    if (threadIdx.x < 4 * most_block_parts) shared_bounds[threadIdx.x / 4][threadIdx.x % 4] = 0;
    __syncthreads();
    for (int i = warp; part_of(i / image_part) < parts; i += warps) {
        const std::int64_t part = part_of(i / image_part), k = part * image_part + i % image_part;
        char* tile = image.rows + part / parts_per_tile * image_tile * layout.row_bytes();
        const int r = static_cast<int>(k % image_tile);
        const int bits = device::write_image_row<C>(tile, layout, r, k < codebook.rows ? codebook.row(k) : nullptr,
                                                    static_cast<int>(codebook.columns), frame);
        if (bits != 0) atomicMax(&shared_bounds[i / image_part][lane], bits);
        if (trail && k < codebook.rows) trail.leave_sample(codebook, static_cast<unsigned>(k), 0, 1);
    }
    __syncthreads();
    if (threadIdx.x < most_block_parts && part_of(threadIdx.x) < parts) {
        const auto& bounds = shared_bounds[threadIdx.x];
        image.bounds[part_of(threadIdx.x)] = {__int_as_float(bounds[0]), __int_as_float(bounds[1]),
                                              __int_as_float(bounds[2]), __int_as_float(bounds[3])};
    }
}

/// Each block first finds the same frame, so that no block waits for another. Up to 16 Steps - 3 columns.
template <int Threads, int Steps, class C>
__global__ __launch_bounds__(Threads, 2) void prepare(matrix_ref<const C> codebook, codebook_image image,
                                                      image_trail trail) {
    arch::wait_for_predecessor();
    arch::let_successor_start();
    __shared__ typename cub::BlockReduce<double, Threads>::TempStorage storage;
    alignas(16) __shared__ float centre[16 * Steps];
    __shared__ float2 shared_scales;
    const bool leads = blockIdx.x == 0;
    const float2 scales = find_first_frame<Threads>(storage, codebook, [&](int d, float c) {
        centre[d] = c;
        if (leads) image.centre[d] = c;
        if (leads && trail) trail.put_centre(codebook.columns, d, c);
    });
    if (threadIdx.x == 0) {
        shared_scales = scales;
        if (leads) *image.scale = scales.x;
        if (leads && trail) trail.put_scales(scales);
    }
    __syncthreads();
    write_image_parts<Threads>(codebook, image, arch::slab_layout{Steps}, {centre, shared_scales.x, shared_scales.y},
                               trail);
}

}  // namespace cuvq::kernel
