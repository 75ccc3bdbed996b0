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
                  cudaStream_t stream, const kernel::image_trail& trail = {}) {
    constexpr unsigned centre_threads = 1024, row_threads = 256;
    detail::launch(kernel::prepare_centre<centre_threads, C>, 1, centre_threads, stream, 0, codebook, image, trail);
    detail::launch(kernel::prepare_rows<row_threads, C>, static_cast<unsigned>(device::image_ref::parts(codebook.rows)),
                   row_threads, stream, 0, codebook, image, layout, trail);
}

/// What a device offers one tile of the portable search.
struct mma_fit {
    int blocks = 0;  // at once on the whole device; 0: none fits, or it has no such tensor cores, or the code has not
    int shared_bytes = 0;  // of one
};

template <class Tile, class X, class C>
mma_fit fit_mma(std::int64_t dimensions) {
    const auto search = kernel::quantize_mma<Tile, X, C>;
    int device = 0, major = 0, processors = 0, most_bytes = 0, each = 0;
    CUVQ_CHECK_CUDA(cudaGetDevice(&device));
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major < 8) return {};
    // Compiled for an older target, the kernel is empty and made for a warp only.
    cudaFuncAttributes attributes;
    CUVQ_CHECK_CUDA(cudaFuncGetAttributes(&attributes, search));
    if (attributes.maxThreadsPerBlock < Tile::threads) return {};
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    const std::int64_t bytes = device::nearest_storage<Tile>::bytes(dimensions);
    if (bytes + static_cast<std::int64_t>(attributes.sharedSizeBytes) > most_bytes) return {};
    CUVQ_CHECK_CUDA(cudaFuncSetAttribute(search, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    CUVQ_CHECK_CUDA(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, search, Tile::threads, static_cast<std::size_t>(bytes)));
    return {each * processors, static_cast<int>(bytes)};
}

/// Searches with one tile. Returns how many partial losses it leaves in `tally`; 0, with nothing launched, where the
/// tile does not fit. `image`: of args.codebook; `fit`: the tile's, for these types and dimensions.
template <class Tile, class X, class C>
std::int64_t quantize_mma(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                          const device::image_ref& image, std::int64_t most_blocks, const mma_fit& fit,
                          cudaStream_t stream) {
    if (fit.blocks == 0) return 0;
    const unsigned blocks =
        detail::blocks_for(args.x.rows, Tile::rows, std::min<std::int64_t>(most_blocks, fit.blocks));
    detail::launch(kernel::quantize_mma<Tile, X, C>, blocks, Tile::threads, stream,
                   static_cast<std::size_t>(fit.shared_bytes), args, image, tally);
    return std::int64_t{blocks} * (Tile::threads / 32);
}

/// As above, with the tile that suits the device, N and D.
template <class X, class C>
std::int64_t quantize_mma(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                          const device::image_ref& image, std::int64_t most_blocks, cudaStream_t stream) {
    const auto search = [&](auto tile, const mma_fit& fit) {
        return quantize_mma<decltype(tile)>(args, tally, image, most_blocks, fit, stream);
    };
    const mma_fit flat = fit_mma<mma_flat, X, C>(args.x.columns);
    if (args.x.rows <= std::int64_t{flat.blocks} * mma_flat::rows) return search(mma_flat{}, flat);
    const mma_fit twin = fit_mma<mma_twin, X, C>(args.x.columns), tall = fit_mma<mma_tall, X, C>(args.x.columns);
    if (twin.blocks > 0 && twin.blocks >= 2 * tall.blocks) return search(mma_twin{}, twin);
    if (tall.blocks > 0) return search(mma_tall{}, tall);
    if (flat.blocks > 0) return search(mma_flat{}, flat);
    return search(mma_streamed{}, fit_mma<mma_streamed, X, C>(args.x.columns));
}

}  // namespace cuvq::dispatch
