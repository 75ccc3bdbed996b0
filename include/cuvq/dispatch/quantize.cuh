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
#include <cuvq/dispatch/quantize_mma.cuh>
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

/// How the image of a codebook of D dimensions is laid out: as the sm_90a path's tiles want it, as long as they hold D.
inline arch::slab_layout image_layout(std::int64_t dimensions) {
    arch::slab_layout layout{static_cast<int>((dimensions + 2) / 16 + 1)};
    with_sm90_tile(dimensions, [&](auto tile) { layout.steps = tile.steps; });
    return layout;
}

/// Room for the image of the codebook, wherever a tensor-core search could want one. Per code: for D up to 13, 77,
/// 141, 269, so many bytes: 32, 160, 288, 544; beyond, 2 D + 6 and at most 62 more.
struct search_scratch {
    kernel::codebook_image image{};

    search_scratch(detail::carver& c, const shape& s) {
        if (!has_image(s.codes, s.dimensions)) return;
        image.centre = c.take<float>(s.dimensions);
        image.scale = c.take<float>(2);
        image.bounds = c.take<kernel::code_bounds>(device::image_ref::parts(s.codes));
        image.rows = c.take<char>(device::image_ref::tiles(s.codes) * kernel::image_tile *
                                  image_layout(s.dimensions).row_bytes());
    }
};

/// Writes the image of a codebook.
template <std::size_t D = dynamic_extent, class C>
void prepare(const matrix_ref<const C>& codebook, const kernel::codebook_image& image, cudaStream_t stream) {
    bool narrow = false;
    with_sm90_tile<D>(codebook.columns, [&](auto tile) {
        constexpr unsigned threads = 256;
        narrow = true;
        detail::launch(kernel::prepare<threads, decltype(tile)::steps, C>,
                       static_cast<unsigned>(device::image_ref::parts(codebook.rows)), threads, stream, 0, codebook,
                       image);
    });
    if constexpr (D > sm90_d269::dimensions)
        if (!narrow) prepare_wide(codebook, image, image_layout(codebook.columns), stream);
}

/// Prepares the codebook and searches it on Hopper's tensor cores. False, with nothing launched, where the device or
/// the compiled code has no such path.
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

    prepare<Tile::dimensions>(args.codebook, scratch.image, stream);
    // Few rows: rather more blocks of fewer.
    const std::int64_t groups = (args.x.rows - 1) / kernel::row_results::rows + 1;
    const int consumers = groups <= processors ? 1 : Tile::consumers;
    const std::int64_t blocks = std::min<std::int64_t>(processors, (groups - 1) / consumers + 1);
    losses = blocks * kernel::finishing_warps;
    detail::launch(search, static_cast<unsigned>(blocks), static_cast<unsigned>(shared::threads(consumers)), stream,
                   shared::allocated, args, scratch.image, tally, consumers, kernel::tag_mask);
    return true;
}

/// Prepares the codebook and searches it on the tensor cores of sm_80 and later. Returns how many partial losses that
/// leaves; 0, with nothing launched, where the device or the compiled code has no such path.
template <std::size_t D, class X, class C>
std::int64_t quantize_mma(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                          const search_scratch& scratch, cudaStream_t stream) {
    const kernel::codebook_image& i = scratch.image;
    const device::image_ref image{i.centre, i.scale, i.bounds, i.rows, image_layout(args.x.columns)};
    if (fit_mma<mma_streamed, X, C>(args.x.columns).blocks == 0) return 0;
    prepare<D>(args.codebook, i, stream);
    return quantize_mma(args, tally, image, most_search_blocks, stream);
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
    const std::int64_t simt_steps =
        ((args.codebook.rows - 1) / simt_tile::codes + 1) * ((args.x.columns - 1) / simt_tile::depth + 1);
    const bool tiny = simt_steps <= most_simt_steps && args.x.rows <= most_simt_rows;
    if (!tiny && has_image(args.codebook.rows, args.codebook.columns))
        losses = quantize_mma<D>(args, tally, scratch, stream);
    if (losses > 0) return losses;
    const unsigned blocks = detail::blocks_for(args.x.rows, simt_tile::rows, most_search_blocks);
    detail::launch(kernel::quantize<simt_tile, D, X, C>, blocks, simt_tile::threads, stream, 0, args, tally);
    return blocks;
}

}  // namespace cuvq::dispatch
