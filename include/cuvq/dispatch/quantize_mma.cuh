// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The portable tensor-core search: what it launches, with which tile.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include <cuvq/detail/arguments.hpp>
#include <cuvq/detail/launch.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/device/nearest_mma.cuh>
#include <cuvq/dispatch/tuning.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/kernel/prepare_wide.cuh>
#include <cuvq/kernel/quantize_mma.cuh>
#include <cuvq/workspace.hpp>

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
    int device = 0, major = 0, most_bytes = 0;
    CUVQ_CHECK_CUDA(cudaGetDevice(&device));
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major < 8 || dimensions < device::mma_shape<Tile>::least_columns) return {};
    // Compiled for an older target, the kernel is empty and made for a warp only.
    cudaFuncAttributes attributes;
    CUVQ_CHECK_CUDA(cudaFuncGetAttributes(&attributes, search));
    if (attributes.maxThreadsPerBlock < Tile::threads) return {};
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    // The base is aligned by hand beyond 128 bytes.
    const std::int64_t bytes =
        device::nearest_storage<Tile>::bytes(dimensions) + device::mma_shape<Tile>::alignment - 128;
    if (bytes + static_cast<std::int64_t>(attributes.sharedSizeBytes) > most_bytes) return {};
    // All that it may have: what is allowed holds for all threads of the host, and must not depend on the call.
    detail::allow_shared_bytes(search, most_bytes - static_cast<int>(attributes.sharedSizeBytes));
    return {detail::blocks_at_once(search, Tile::threads, static_cast<std::size_t>(bytes)), static_cast<int>(bytes)};
}

/// Scratch memory for a codebook cut into parts.
struct parts_scratch {
    std::int64_t rows = 0;  // times parts, at most
    double* distances = nullptr;
    int* codes = nullptr;
};

/// Scratch memory of a portable search.
struct mma_scratch {
    parts_scratch parts{};
    kernel::hard_rows hard{};
};

/// Instead of a number of partial losses: none, and no other outputs but codes.
inline constexpr std::int64_t no_outputs = -1;

/// For as many parts as may pay: at most 12 bytes for each row and tile of the codebook, 192 KB, and 1.5 bytes per
/// element of the codebook.
inline parts_scratch take_parts(detail::carver& c, const shape& s) {
    parts_scratch p;
    if (!has_image(s.codes, s.dimensions)) return p;
    const std::int64_t most = std::min<std::int64_t>(most_split_rows, s.codes * s.dimensions / 8);
    if (s.vectors > most / 2 || s.codes <= device::image_tile) return p;
    p.rows = std::min(most, s.vectors * device::image_ref::tiles(s.codes));
    p.distances = c.take<double>(p.rows);
    p.codes = c.take<int>(p.rows);
    return p;
}

/// Into how many parts to cut the codebook for a tile's blocks to be done soonest, in at most four waves: the fewest of
/// those that are. A block's time is one for each of its tiles of codes and half of one beside; choosing among parts
/// takes another half.
template <class Tile>
std::int64_t best_parts(std::int64_t rows, std::int64_t codes, std::int64_t blocks, std::int64_t most_parts) {
    const std::int64_t groups = (rows - 1) / Tile::rows + 1, tiles = (codes - 1) / Tile::codes + 1;
    std::int64_t best = 1, least = 0;
    for (std::int64_t parts = 1; parts <= std::min({tiles, most_parts, 4 * blocks / groups}); ++parts) {
        const std::int64_t each = (tiles - 1) / parts + 1, waves = (groups * parts - 1) / blocks + 1;
        const std::int64_t time = waves * (2 * each + 1) + (parts > 1);
        if (parts > 1 && time >= least) continue;
        best = parts;
        least = time;
    }
    return best;
}

/// The codebook in about so many parts of whole tiles of codes, none empty.
template <class Tile>
kernel::codebook_parts cut(std::int64_t codes, std::int64_t parts, const parts_scratch& scratch) {
    const std::int64_t tiles = (codes - 1) / Tile::codes + 1, each = (tiles - 1) / parts + 1;
    return {(tiles - 1) / each + 1, each * (Tile::codes / device::image_tile), scratch.distances, scratch.codes};
}

/// Searches with one tile, the codebook in so many parts. Returns how many partial losses it leaves in `tally`, or
/// `no_outputs` where it has written codes only. `image`: of args.codebook; `fit`: the tile's, for these types and
/// dimensions, where it fits; `scratch`: for rows times parts.
template <class Tile, class X, class C>
std::int64_t quantize_mma(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                          const device::image_ref& image, const mma_scratch& scratch, std::int64_t wanted_parts,
                          std::int64_t most_blocks, const mma_fit& fit, cudaStream_t stream) {
    const kernel::codebook_parts parts = cut<Tile>(args.codebook.rows, wanted_parts, scratch.parts);
    const std::int64_t groups = (args.x.rows - 1) / Tile::rows + 1;
    const auto search = [&](const auto& wanted, const kernel::search_tally& own, const kernel::hard_rows& hard) {
        const unsigned blocks =
            detail::blocks_for(groups * parts.count, 1, std::min<std::int64_t>(most_blocks, fit.blocks));
        detail::launch(kernel::quantize_mma<Tile, X, C>, blocks, Tile::threads, stream,
                       static_cast<std::size_t>(fit.shared_bytes), wanted, image, own, parts, hard);
        return blocks;
    };
    // Fewer rows settle their own: their codebook is cut into parts, so that a hard row is the work of many blocks
    // already, or it is small.
    if (parts.count == 1 && scratch.hard.rows && 2 * groups > std::min<std::int64_t>(most_blocks, fit.blocks)) {
        detail::quantize_args<X, C> codes_only = args;
        kernel::search_tally own = tally;
        codes_only.quantized = {};
        codes_only.distances = {};
        own.loss = nullptr;
        const unsigned blocks = search(codes_only, own, scratch.hard);
        const auto settle = kernel::settle_hard_rows<X, C>;
        const auto settling = static_cast<unsigned>(detail::blocks_at_once(settle, kernel::settle_threads, 0));
        detail::launch_next(detail::is_for_hopper(settle), settle, settling, kernel::settle_threads, stream, 0,
                            codes_only, own, scratch.hard, device::mma_shape<Tile>::layout(), static_cast<int>(blocks),
                            Tile::rows);
        return no_outputs;
    }
    const unsigned blocks = search(args, tally, {});
    if (parts.count == 1) return std::int64_t{blocks} * (Tile::threads / 32);
    constexpr int warps = kernel::outputs_threads / 32;
    const auto choose = kernel::choose_part<X, C>;
    const unsigned choosing = detail::blocks_for(args.x.rows, warps * kernel::choose_rows, most_blocks);
    detail::launch_next(detail::is_for_hopper(choose), choose, choosing, kernel::outputs_threads, stream, 0, args,
                        tally, parts);
    return std::int64_t{choosing} * warps;
}

/// Whether rows of a static D are so narrow that mma_flat fits every device of sm_80 and later: a block has at least
/// 99 KB there, and the kernel declares less than 3.
template <std::size_t D>
inline constexpr bool flat_fits =
    (D != dynamic_extent) && device::nearest_storage<mma_flat>::bytes(static_cast<std::int64_t>(D)) <= 96 << 10;

/// A tile that fits wherever the portable search runs at all.
template <std::size_t D>
using mma_anywhere = std::conditional_t<flat_fits<D>, mma_flat, mma_streamed>;

/// As above, with the tile that suits the device, N and D, and as many parts as pay. Of a static D it instantiates no
/// tile that only wider rows want.
template <std::size_t D, class X, class C>
std::int64_t quantize_mma(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                          const device::image_ref& image, const mma_scratch& scratch, std::int64_t most_blocks,
                          cudaStream_t stream) {
    const std::int64_t rows = args.x.rows, codes = args.codebook.rows, columns = args.x.columns;
    const auto search = [&](auto tile, const mma_fit& fit) {
        using Tile = decltype(tile);
        const std::int64_t parts = best_parts<Tile>(rows, codes, fit.blocks, scratch.parts.rows / rows);
        return quantize_mma<Tile>(args, tally, image, scratch, parts, most_blocks, fit, stream);
    };
    const mma_fit flat = fit_mma<mma_flat, X, C>(columns);
    const std::int64_t groups = (rows - 1) / mma_flat::rows + 1, tiles = (codes - 1) / mma_flat::codes + 1;
    if (2 * groups * tiles <= flat.blocks && scratch.parts.rows > rows) {
        const mma_fit few = fit_mma<mma_few, X, C>(columns);
        if (few.blocks > 0) return search(mma_few{}, few);
    }
    if constexpr (D > sm90_d269::dimensions) {  // on Hopper, by its own instructions
        const mma_fit low = fit_mma<wgmma_flat, X, C>(columns);
        if (low.blocks > 0) {
            const mma_fit high = fit_mma<wgmma_tall, X, C>(columns);
            if (groups > low.blocks && high.blocks > 0) return search(wgmma_tall{}, high);
            return search(wgmma_flat{}, low);
        }
    }
    if (groups <= flat.blocks) return search(mma_flat{}, flat);
    const mma_fit twin = fit_mma<mma_twin, X, C>(columns), tall = fit_mma<mma_tall, X, C>(columns);
    if (twin.blocks > 0 && twin.blocks >= 2 * tall.blocks) return search(mma_twin{}, twin);
    if (tall.blocks > 0) return search(mma_tall{}, tall);
    if (flat.blocks > 0) return search(mma_flat{}, flat);
    return search(mma_anywhere<D>{}, fit_mma<mma_anywhere<D>, X, C>(columns));
}

}  // namespace cuvq::dispatch
