// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Which kernel answers a `quantize`, and what scratch memory it takes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/validate.hpp>
#include <cuvq/dispatch/tuning.cuh>
#include <cuvq/kernel/prepare.cuh>
#include <cuvq/kernel/quantize.cuh>
#include <cuvq/kernel/quantize_sm90.cuh>

namespace cuvq::dispatch {

/// Most blocks of a SIMT search, and most partial losses of any, so that the workspace needs no word from the device.
inline constexpr std::int64_t most_search_blocks = 4096;

/// Static D of two views: the one that either fixes.
template <class XView, class CodebookView>
constexpr std::size_t static_dimensions() {
    constexpr std::size_t x = detail::static_columns<XView>(), c = detail::static_columns<CodebookView>();
    static_assert(x == dynamic_extent || c == dynamic_extent || x == c,
                  "cuvq: `x` and `codebook` fix different numbers of columns");
    return x != dynamic_extent ? x : c;
}

/// Calls use(tile) with the smallest tensor-core tile that holds D dimensions, or not at all; of a static D it
/// instantiates that one alone.
template <std::size_t D = dynamic_extent, class Use>
void with_sm90_tile(std::int64_t dimensions, Use use) {
    if constexpr (D != dynamic_extent) {
        if constexpr (D <= sm90_d13::dimensions)
            use(sm90_d13{});
        else if constexpr (D <= sm90_d77::dimensions)
            use(sm90_d77{});
        else if constexpr (D <= sm90_d141::dimensions)
            use(sm90_d141{});
        else if constexpr (D <= sm90_d269::dimensions)
            use(sm90_d269{});
    } else {
        if (dimensions <= sm90_d13::dimensions)
            use(sm90_d13{});
        else if (dimensions <= sm90_d77::dimensions)
            use(sm90_d77{});
        else if (dimensions <= sm90_d141::dimensions)
            use(sm90_d141{});
        else if (dimensions <= sm90_d269::dimensions)
            use(sm90_d269{});
    }
}

/// Room for the image of the codebook, wherever a tensor-core search could want one: for D up to 13, 77, 141, 269, so
/// many bytes per code: 32, 160, 288, 544.
struct search_scratch {
    kernel::codebook_image image{};

    search_scratch(detail::carver& c, const shape& s) {
        with_sm90_tile(s.dimensions, [&](auto tile) {
            using layout = arch::wgmma_layout<decltype(tile)::steps>;
            const std::int64_t tiles = (s.codes - 1) / kernel::image_tile + 1;
            image.centre = c.take<float>(s.dimensions);
            image.scale = c.take<float>(1);
            image.bounds = c.take<kernel::code_bounds>(tiles * (kernel::image_tile / kernel::image_part));
            image.rows = c.take<char>(tiles * layout::bytes(kernel::image_tile));
        });
    }
};

/// Prepares the codebook and searches it on the tensor cores. False, with nothing launched, where the device or the
/// compiled code has no such path.
template <class Tile, class X, class C>
bool quantize_sm90(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                   const search_scratch& scratch, std::int64_t& losses, cudaStream_t stream) {
    using shared = kernel::sm90_shared<Tile>;
    const auto search = kernel::quantize_sm90<Tile, X, C>;
    int device = 0, major = 0, processors = 0;
    CUVQ_CHECK_CUDA(cudaGetDevice(&device));
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major != 9) return false;
    // Compiled for another target than sm_90a, the kernel is empty and made for a warp only.
    cudaFuncAttributes attributes;
    CUVQ_CHECK_CUDA(cudaFuncGetAttributes(&attributes, search));
    if (attributes.maxThreadsPerBlock < shared::threads()) return false;
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    CUVQ_CHECK_CUDA(cudaFuncSetAttribute(search, cudaFuncAttributeMaxDynamicSharedMemorySize, shared::allocated));

    constexpr unsigned prepare_threads = 256;
    const std::int64_t tiles = (args.codebook.rows - 1) / kernel::image_tile + 1;
    detail::launch(kernel::prepare<prepare_threads, Tile::steps, C>,
                   static_cast<unsigned>(tiles * (kernel::image_tile / kernel::image_part)), prepare_threads, stream, 0,
                   args.codebook, scratch.image);
    // Few rows: rather more blocks of fewer.
    const std::int64_t groups = (args.x.rows - 1) / kernel::row_results::rows + 1;
    const int consumers = groups <= processors ? 1 : Tile::consumers;
    const std::int64_t blocks = std::min<std::int64_t>(processors, (groups - 1) / consumers + 1);
    losses = blocks * kernel::finishing_warps;
    detail::launch(search, static_cast<unsigned>(blocks), static_cast<unsigned>(shared::threads(consumers)), stream,
                   shared::allocated, args, scratch.image, tally, consumers, kernel::tag_mask);
    return true;
}

/// Launches the search; returns how many partial losses it leaves in `tally`.
template <std::size_t D, class X, class C>
std::int64_t quantize(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                      const search_scratch& scratch, cudaStream_t stream) {
    if (args.x.rows == 0) return 0;
    std::int64_t losses = 0;
    bool launched = false;
    if (args.codebook.rows < kernel::row_results::most_codes)
        with_sm90_tile<D>(args.x.columns, [&](auto tile) {
            launched = quantize_sm90<decltype(tile)>(args, tally, scratch, losses, stream);
        });
    if (launched) return losses;
    const unsigned blocks = detail::blocks_for(args.x.rows, simt_tile::rows, most_search_blocks);
    detail::launch(kernel::quantize<simt_tile, D, X, C>, blocks, simt_tile::threads, stream, 0, args, tally);
    return blocks;
}

}  // namespace cuvq::dispatch
