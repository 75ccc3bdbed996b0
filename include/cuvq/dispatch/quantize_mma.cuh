// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The portable tensor-core search: what it launches, with which tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/validate.hpp>
#include <cuvq/device/image.cuh>
#include <cuvq/device/nearest_mma.cuh>
#include <cuvq/dispatch/tuning.cuh>
#include <cuvq/kernel/prepare_wide.cuh>
#include <cuvq/kernel/quantize_mma.cuh>

namespace cuvq::dispatch {

/// Whether codebooks of this size have an image at all.
constexpr bool has_image(std::int64_t codes, std::int64_t dimensions) {
    return dimensions <= device::most_mma_columns && codes < device::most_mma_codes;
}

/// Writes the image of a codebook of any number of dimensions.
template <class C>
void prepare_wide(const matrix_ref<const C>& codebook, const kernel::codebook_image& image, arch::slab_layout layout,
                  cudaStream_t stream) {
    constexpr unsigned centre_threads = 1024, row_threads = 256;
    detail::launch(kernel::prepare_centre<centre_threads, C>, 1, centre_threads, stream, 0, codebook, image);
    detail::launch(kernel::prepare_rows<row_threads, C>,
                   static_cast<unsigned>(device::image_ref::parts(codebook.rows)), row_threads, stream, 0, codebook,
                   image, layout);
}

/// What a device offers one tile of the portable search.
struct mma_fit {
    int blocks = 0;         // at once on the whole device; 0: none, it has no such tensor cores, or the code has not
    int shared_bytes = 0;   // of one
    bool resident = false;  // the rows' fp16 stays in shared memory
};

template <class Tile, class X, class C>
mma_fit fit_mma(std::int64_t dimensions) {
    using storage = device::nearest_storage<Tile>;
    const auto search = kernel::quantize_mma<Tile, X, C>;
    mma_fit fit;
    int device = 0, major = 0, processors = 0, most_bytes = 0, each = 0;
    CUVQ_CHECK_CUDA(cudaGetDevice(&device));
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major < 8) return fit;
    // Compiled for an older target, the kernel is empty and made for a warp only.
    cudaFuncAttributes attributes;
    CUVQ_CHECK_CUDA(cudaFuncGetAttributes(&attributes, search));
    if (attributes.maxThreadsPerBlock < Tile::threads) return fit;
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    most_bytes -= static_cast<int>(attributes.sharedSizeBytes);
    fit.resident = storage::whole_bytes(dimensions) <= most_bytes;
    fit.shared_bytes = fit.resident ? static_cast<int>(storage::whole_bytes(dimensions)) : storage::least_bytes();
    if (fit.shared_bytes > most_bytes) return fit;
    CUVQ_CHECK_CUDA(cudaFuncSetAttribute(search, cudaFuncAttributeMaxDynamicSharedMemorySize, fit.shared_bytes));
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    CUVQ_CHECK_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, search, Tile::threads,
                                                                  static_cast<std::size_t>(fit.shared_bytes)));
    fit.blocks = each * processors;
    return fit;
}

/// Searches with one tile. Returns how many partial losses it leaves in `tally`; 0, with nothing launched, where the
/// device or the compiled code has no such path. `image`: of args.codebook.
template <class Tile, class X, class C>
std::int64_t quantize_mma(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                          const device::image_ref& image, std::int64_t most_blocks, cudaStream_t stream,
                          const mma_fit& fit) {
    if (fit.blocks == 0) return 0;
    const unsigned blocks =
        detail::blocks_for(args.x.rows, Tile::rows, std::min<std::int64_t>(most_blocks, fit.blocks));
    detail::launch(kernel::quantize_mma<Tile, X, C>, blocks, Tile::threads, stream,
                   static_cast<std::size_t>(fit.shared_bytes), args, image, tally, fit.shared_bytes);
    return blocks;
}

/// As above, with the tile that suits the device, N and D: the taller, unless its rows do not stay in shared memory
/// while those of the flatter do, or it leaves multiprocessors idle that the flatter would use.
template <class X, class C>
std::int64_t quantize_mma(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                          const device::image_ref& image, std::int64_t most_blocks, cudaStream_t stream) {
    const mma_fit tall = fit_mma<mma_tall, X, C>(args.x.columns), flat = fit_mma<mma_flat, X, C>(args.x.columns);
    const bool few = args.x.rows <= std::int64_t{flat.blocks} * mma_flat::rows;
    if (tall.blocks == 0 || (flat.blocks > 0 && (few || (flat.resident && !tall.resident))))
        return quantize_mma<mma_flat>(args, tally, image, most_blocks, stream, flat);
    return quantize_mma<mma_tall>(args, tally, image, most_blocks, stream, tall);
}

}  // namespace cuvq::dispatch
