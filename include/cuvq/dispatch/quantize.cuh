// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Which kernel answers a `quantize`, and what scratch memory it takes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include <cuvq/detail/arguments.hpp>
#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/view_types.hpp>
#include <cuvq/device/image.cuh>
#include <cuvq/dispatch/quantize_mma.cuh>
#include <cuvq/dispatch/tuning.cuh>
#include <cuvq/kernel/few_cluster_sm90.cuh>
#include <cuvq/kernel/prepare.cuh>
#include <cuvq/kernel/quantize.cuh>
#include <cuvq/kernel/quantize_sm90.cuh>
#include <cuvq/kernel/quantize_sm90_few.cuh>
#include <cuvq/kernel/row_chunks.cuh>
#include <cuvq/kernel/settle.cuh>
#include <cuvq/kernel/write_outputs.cuh>

namespace cuvq::dispatch {

/// Most blocks of a SIMT search.
inline constexpr std::int64_t most_search_blocks = 4096;

/// Most partial losses of any search, so that the workspace needs no word from the device.
inline constexpr std::int64_t most_losses = most_search_blocks * (simt_tile::threads / 32);

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

// Most shared memory of a block on Hopper: a tile that takes more would leave its D to slower searches.
static_assert(kernel::sm90_shared<sm90_d13>::allocated <= 227 * 1024 &&
              kernel::sm90_shared<sm90_d77>::allocated <= 227 * 1024 &&
              kernel::sm90_shared<sm90_d141>::allocated <= 227 * 1024 &&
              kernel::sm90_shared<sm90_d269>::allocated <= 227 * 1024 &&
              kernel::few_shared<sm90_d13>::allocated <= 227 * 1024 &&
              kernel::few_shared<sm90_d77>::allocated <= 227 * 1024 &&
              kernel::few_shared<sm90_d141>::allocated <= 227 * 1024 &&
              kernel::few_shared<sm90_d269>::allocated <= 227 * 1024);

/// Most blocks of a tensor-core search.
inline constexpr std::int64_t most_blocks = kernel::most_segments / kernel::finishing_warps;

/// How the image of a codebook of D dimensions is laid out: as the sm_90a path's tiles want it, as long as they hold D.
inline arch::slab_layout image_layout(std::int64_t dimensions) {
    arch::slab_layout layout{static_cast<int>((dimensions + 2) / 16 + 1)};
    with_sm90_tile(dimensions, [&](auto tile) { layout.steps = tile.steps; });
    return layout;
}

/// Room for the image of a codebook, wherever a tensor-core search could want one. Per code, of whole tiles: for D up
/// to 13, 77, 141, 269, so many bytes: 33, 161, 289, 545; beyond, 2 D + 7 and at most 62 more.
inline kernel::codebook_image take_image(detail::carver& c, std::int64_t codes, std::int64_t dimensions) {
    kernel::codebook_image image{};
    if (!has_image(codes, dimensions)) return image;
    image.centre = c.take<float>(dimensions);
    image.scale = c.take<float>(2);
    image.bounds = c.take<kernel::code_bounds>(device::image_ref::parts(codes));
    image.rows =
        c.take<char>(device::image_ref::tiles(codes) * kernel::image_tile * image_layout(dimensions).row_bytes());
    return image;
}

/// The memory of a prepared codebook: its image first, then what the updates need to keep that fresh.
inline kernel::image_refresh take_prepared(detail::carver& c, std::int64_t codes, std::int64_t dimensions) {
    kernel::image_refresh p;
    p.image = take_image(c, codes, dimensions);
    if (!has_image(codes, dimensions)) return p;
    p.layout = image_layout(dimensions);
    p.trail.centres = c.take<float>(2 * kernel::image_trail::stride(dimensions));
    p.trail.scales = c.take<float>(4);
    p.trail.samples = c.take<float>(2 * kernel::image_trail::sample_count(codes) * dimensions);
    return p;
}

/// Where a search may count the digits of its codes for the sort that comes next, and whether it does.
struct digit_scratch {
    static constexpr std::int64_t long_chunk = 64;  // for a block of the sort: turns, of 64 rows each
    kernel::digit_counts counts{};                  // histogram: null until it does
    std::uint32_t* room = nullptr;
    std::int64_t most_chunks = 0;  // that the room holds

    /// Has a search of so many blocks count, of so many turns of 64 rows each, if the room serves: each block counts
    /// for itself, in one chunk, or if that were long for a block of the sort, in two.
    kernel::digit_counts begin(std::int64_t blocks, std::int64_t turns) {
        static_assert(kernel::row_chunks::group_rows == kernel::row_results::rows);
        const bool halves = turns > long_chunk;
        if ((halves ? 2 * blocks : blocks) > most_chunks) return {};
        counts.histogram = room;
        counts.chunks.pair = static_cast<std::uint32_t>(halves ? turns : 2 * turns);
        counts.chunks.chunk = static_cast<std::uint32_t>(halves ? (turns + 1) / 2 : turns);
        return counts;
    }
};

/// Whether Hopper's own search of many rows may serve this shape.
inline bool may_take_sm90(const shape& s) {
    return s.dimensions <= sm90_d269::dimensions && has_image(s.codes, s.dimensions);
}

/// Scratch memory of a search. `prepared`: the image is there already.
struct search_scratch {
    kernel::codebook_image image{};
    kernel::open_rows open{};  // of Hopper's own search
    mma_scratch portable{};
    digit_scratch* digits = nullptr;  // of a sort that comes next, or null
    bool prepared = false;

    search_scratch(detail::carver& c, const shape& s, const prepared_codebook& from) {
        if (from.data)
            use(from, s.codes, s.dimensions);
        else
            image = take_image(c, s.codes, s.dimensions);
        portable.parts = take_parts(c, s);
        const std::int64_t groups = (s.vectors + kernel::row_results::rows - 1) / kernel::row_results::rows;
        if ((groups < 2 && s.codes <= most_few_codes) || !has_image(s.codes, s.dimensions)) return;
        const std::int64_t rows = groups * kernel::row_results::rows;
        const auto lists = [&](std::int64_t of_group) {
            return std::min<std::int64_t>(groups * of_group, kernel::most_segments);
        };
        detail::carver other(c);  // one of the two searches
        portable.hard.rows = other.take<unsigned long long>(s.vectors);
        portable.hard.counts = other.take<int>(lists(1));
        if (may_take_sm90(s)) {
            open.rows = c.take<int>(rows);
            open.words = c.take<kernel::open_words>(rows);
            open.counts = c.take<int2>(lists(kernel::finishing_warps));
        }
        c.share(other);
        if (kernel::shared_parts(s.codes, s.dimensions) > 1)
            open.shared = portable.hard.shared = c.take<kernel::shared_row>(kernel::most_shared_rows);
    }

    void use(const prepared_codebook& from, std::int64_t codes, std::int64_t dimensions) {
        detail::carver c(from.data);
        image = take_image(c, codes, dimensions);
        prepared = true;
    }
};

/// Writes the image of a codebook, if codebooks of its size have one.
template <std::size_t D = dynamic_extent, class C>
void prepare(const matrix_ref<const C>& codebook, const kernel::codebook_image& image, cudaStream_t stream,
             const kernel::image_trail& trail = {}) {
    if (!has_image(codebook.rows, codebook.columns)) return;
    bool narrow = false;
    with_sm90_tile<D>(codebook.columns, [&](auto tile) {
        constexpr unsigned threads = 512;
        narrow = true;
        const auto write = kernel::prepare<threads, decltype(tile)::steps, C>;
        const std::int64_t parts = device::image_ref::parts(codebook.rows);
        const std::int64_t blocks =
            std::max((parts - 1) / kernel::most_block_parts + 1, std::min<std::int64_t>(parts, prepare_blocks));
        detail::launch_next(detail::is_for_hopper(write), write, static_cast<unsigned>(blocks), threads, stream, 0,
                            codebook, image, trail);
    });
    if constexpr (D > sm90_d269::dimensions)
        if (!narrow) prepare_wide(codebook, image, image_layout(codebook.columns), stream, trail);
}

/// Whether a kernel was compiled for this device's own tensor cores: elsewhere it is empty and made for a warp only.
template <class... Parameters>
bool is_compiled(void (*kernel)(Parameters...), int threads) {
    cudaFuncAttributes attributes;
    CUVQ_CHECK_CUDA(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.maxThreadsPerBlock >= threads;
}

/// Whether a block of a kernel has so much dynamic shared memory on a device, beside what it declares.
template <class... Parameters>
bool fits_shared(void (*kernel)(Parameters...), int bytes, int device) {
    int most = 0;
    cudaFuncAttributes attributes;
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    CUVQ_CHECK_CUDA(cudaFuncGetAttributes(&attributes, kernel));
    return bytes + static_cast<std::int64_t>(attributes.sharedSizeBytes) <= most;
}

/// Few rows: one launch, in clusters of as many blocks as there are processors for.
template <class Tile, class X, class C>
std::int64_t quantize_sm90_few(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                               const search_scratch& scratch, bool exact, std::int64_t groups, int processors,
                               cudaStream_t stream) {
    const auto search = kernel::quantize_sm90_few<Tile, X, C>;
    const std::int64_t tiles = device::image_ref::tiles(args.codebook.rows);
    std::int64_t cluster = 1;
    while (2 * cluster <= kernel::few_blocks && cluster < tiles &&
           groups * 2 * cluster <= few_room(2 * cluster, processors))
        cluster *= 2;
    detail::allow_shared_bytes(search, kernel::few_shared<Tile>::allocated);
    if (cluster > 8 && detail::clusters_at_once(search, kernel::few_threads, kernel::few_shared<Tile>::allocated,
                                                static_cast<unsigned>(cluster)) < groups)
        cluster = 8;
    const std::int64_t blocks = groups * cluster;
    detail::launch_dependent(search, static_cast<unsigned>(blocks), kernel::few_threads, stream,
                             kernel::few_shared<Tile>::allocated, static_cast<unsigned>(cluster), args, scratch.image,
                             tally, static_cast<unsigned>(cluster), exact, kernel::tag_mask);
    return blocks * kernel::few_warps;
}

/// Many rows: the pipeline, and the rows that it left open. Writes codes only.
template <class Tile, class X, class C>
void quantize_sm90_many(const detail::quantize_args<X, C>& args, const kernel::search_tally& wanted,
                        const search_scratch& scratch, bool exact, std::int64_t groups, int processors,
                        cudaStream_t stream) {
    using shared = kernel::sm90_shared<Tile>;
    const auto search = kernel::quantize_sm90<Tile, X, C>;
    const std::int64_t turns = (groups - 1) / std::min<std::int64_t>(processors, most_blocks) + 1;
    const std::int64_t blocks = (groups - 1) / turns + 1;
    kernel::search_tally tally = wanted;
    if (scratch.digits) tally.digits = scratch.digits->begin(blocks, turns);
    detail::allow_shared_bytes(search, shared::allocated);
    detail::launch_dependent(search, static_cast<unsigned>(blocks), static_cast<unsigned>(shared::threads), stream,
                             shared::allocated, 1, args, scratch.image, tally, scratch.open, static_cast<int>(turns),
                             exact, exact ? kernel::group_tag_mask : kernel::tag_mask);
    detail::launch_dependent(kernel::settle_rows<X, C>, static_cast<unsigned>(processors * kernel::settle_blocks),
                             kernel::settle_threads, stream, 0, 1, args, tally, scratch.open, static_cast<int>(blocks),
                             static_cast<int>(turns));
}

/// What is asked of `count` rows from `first` on.
template <class X, class C>
detail::quantize_args<X, C> slice_of(detail::quantize_args<X, C> a, std::int64_t first, std::int64_t count) {
    a.x.data = a.x.row(first);
    a.x.rows = count;
    a.codes = a.codes.from(first);
    if (a.quantized) a.quantized.data = a.quantized.row(first);
    if (a.distances) a.distances.data += first;
    return a;
}

/// Whether a search on Hopper's own tensor cores with this tile serves this device and build, and K and D: its operands
/// must be those of the image.
template <class Tile, class X, class C>
bool serves_sm90(std::int64_t codes, std::int64_t dimensions) {
    int device = 0, major = 0;
    CUVQ_CHECK_CUDA(cudaGetDevice(&device));
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    return major == 9 && codes < kernel::row_results::most_codes && dimensions <= sm90_d269::dimensions &&
           Tile::steps == image_layout(dimensions).steps &&
           is_compiled(kernel::quantize_sm90_few<Tile, X, C>, kernel::few_threads) &&
           fits_shared(kernel::quantize_sm90_few<Tile, X, C>, kernel::few_shared<Tile>::allocated, device) &&
           fits_shared(kernel::quantize_sm90<Tile, X, C>, kernel::sm90_shared<Tile>::allocated, device);
}

/// Prepares the codebook and searches it on Hopper's tensor cores. Returns how many partial losses that leaves, or
/// `no_outputs`; 0, with nothing launched, where `serves_sm90` says so.
template <class Tile, class X, class C>
std::int64_t quantize_sm90(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                           const search_scratch& scratch, bool exact, cudaStream_t stream) {
    if (!serves_sm90<Tile, X, C>(args.codebook.rows, args.x.columns)) return 0;
    const int processors = detail::processor_count();
    if (!scratch.prepared) prepare<Tile::dimensions>(args.codebook, scratch.image, stream);
    const std::int64_t groups = (args.x.rows - 1) / kernel::row_results::rows + 1, wave = few_waves * processors;
    std::int64_t losses = 0;
    const auto few = [&](std::int64_t first, std::int64_t some) {
        const std::int64_t rows = std::min(some * kernel::row_results::rows, args.x.rows - first);
        kernel::search_tally own = tally;
        if (own.loss) own.loss += losses;
        losses += quantize_sm90_few<Tile>(slice_of(args, first, rows), own, scratch, exact, some, processors, stream);
    };
    static_assert(most_few_codes == std::int64_t{kernel::few_leads::most_tiles} * kernel::image_tile);
    const bool few_can = args.codebook.rows <= most_few_codes;
    if (few_can && groups <= wave) {
        few(0, groups);
    } else if (few_can && takes_few_twice(groups, device::image_ref::tiles(args.codebook.rows), processors)) {
        few(0, wave);
        few(wave * kernel::row_results::rows, groups - wave);
    } else {
        quantize_sm90_many<Tile>(args, tally, scratch, exact, groups, processors, stream);
        losses = no_outputs;
    }
    return losses;
}

/// The image of a codebook, as block-level searches take it.
inline device::image_ref image_ref_of(const kernel::codebook_image& image, std::int64_t dimensions) {
    return {image.centre, image.scale, image.bounds, image.rows, image_layout(dimensions)};
}

/// Prepares the codebook and searches it on the tensor cores of sm_80 and later. Returns how many partial losses that
/// leaves, or `no_outputs`; 0, with nothing launched, where the device or the compiled code has no such path.
template <std::size_t D, class X, class C>
std::int64_t quantize_mma(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                          const search_scratch& scratch, cudaStream_t stream) {
    if (fit_mma<mma_anywhere<D>, X, C>(args.x.columns).blocks == 0) return 0;
    if (!scratch.prepared) prepare<D>(args.codebook, scratch.image, stream);
    return quantize_mma<D>(args, tally, image_ref_of(scratch.image, args.x.columns), scratch.portable,
                           kernel::most_segments, stream);
}

/// Searches on the CUDA cores; how many partial losses that leaves.
template <class Tile, std::size_t D, class X, class C>
std::int64_t quantize_simt(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                           cudaStream_t stream) {
    static_assert(Tile::threads <= simt_tile::threads, "cuvq: a SIMT tile has at most as many threads as simt_tile");
    const unsigned blocks = detail::blocks_for(args.x.rows, Tile::rows, most_search_blocks);
    detail::launch(kernel::quantize<Tile, D, X, C>, blocks, Tile::threads, stream, 0, args, tally);
    return std::int64_t{blocks} * (Tile::threads / 32);
}

/// Whether a search with this very tile serves this device and build, and K and D.
template <class Tile, class X, class C>
bool serves(std::int64_t codes, std::int64_t dimensions) {
    if constexpr (is_sm90_tile<Tile>)
        return serves_sm90<Tile, X, C>(codes, dimensions);
    else if constexpr (is_mma_tile<Tile>)
        return has_image(codes, dimensions) && fit_mma<Tile, X, C>(dimensions).blocks > 0;
    else
        return true;
}

/// As `search` below, with one tile that `serves`, and nothing else instantiated.
template <class Tile, std::size_t D, class X, class C>
std::int64_t search_with(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                         const search_scratch& scratch, bool exact, cudaStream_t stream) {
    if constexpr (is_sm90_tile<Tile>) {
        return quantize_sm90<Tile>(args, tally, scratch, exact, stream);
    } else if constexpr (is_mma_tile<Tile>) {
        if (!scratch.prepared) prepare<D>(args.codebook, scratch.image, stream);
        const mma_fit fit = fit_mma<Tile, X, C>(args.x.columns);
        const std::int64_t parts =
            best_parts<Tile>(args.x.rows, args.codebook.rows, fit.blocks, scratch.portable.parts.rows / args.x.rows);
        return quantize_mma<Tile>(args, tally, image_ref_of(scratch.image, args.x.columns), scratch.portable, parts,
                                  kernel::most_segments, fit, stream);
    } else {
        return quantize_simt<Tile, D>(args, tally, stream);
    }
}

/// Launches the search; returns how many partial losses it leaves in `tally`, or `no_outputs`. Not `exact`: a path that
/// has a faster way may take it.
template <class Tile, std::size_t D, class X, class C>
std::int64_t search(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                    const search_scratch& scratch, bool exact, cudaStream_t stream) {
    if constexpr (!std::is_same_v<Tile, automatic_tile>) {
        return search_with<Tile, D>(args, tally, scratch, exact, stream);
    } else {
        // Scores of a single code are all 0, which tell nothing: every row would have to be settled.
        if (args.codebook.rows == 1) return quantize_simt<simt_tile, D>(args, tally, stream);
        std::int64_t losses = 0;
        if (!exact || !wants_all_blocks(args.x.rows, args.codebook.rows, args.x.columns))
            with_sm90_tile<D>(args.x.columns, [&](auto tile) {
                losses = quantize_sm90<decltype(tile)>(args, tally, scratch, exact, stream);
            });
        if (losses != 0) return losses;
        const std::int64_t simt_steps =
            ((args.codebook.rows - 1) / simt_tile::codes + 1) * ((args.x.columns - 1) / simt_tile::depth + 1);
        const bool tiny = simt_steps <= most_simt_steps && args.x.rows <= most_simt_rows;
        if (!tiny && has_image(args.codebook.rows, args.codebook.columns))
            losses = quantize_mma<D>(args, tally, scratch, stream);
        return losses != 0 ? losses : quantize_simt<simt_tile, D>(args, tally, stream);
    }
}

/// Calls use(Bits) with log2 of the lanes that take a row in `write_outputs`, four columns each: of a static D, that
/// one alone is instantiated.
template <std::size_t D, int Bits = 1, class Use>
std::int64_t with_row_lanes(std::int64_t columns, const Use& use) {
    constexpr std::integral_constant<int, Bits> bits;
    if constexpr (Bits == 5 || D <= 4 << Bits) {
        return use(bits);
    } else {
        if constexpr (D == dynamic_extent)
            if (columns <= 4 << Bits) return use(bits);
        return with_row_lanes<D, Bits + 1>(columns, use);
    }
}

/// Quantized rows and distances of at least 32 rows whose codes are there. Returns how many partial losses that leaves.
template <std::size_t D, class X, class C>
std::int64_t write_outputs(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                           cudaStream_t stream) {
    // Two waves of blocks, each with some rows for every warp.
    const unsigned blocks = detail::blocks_for(args.x.rows, kernel::outputs_threads / 4,
                                               2 * kernel::outputs_blocks * detail::processor_count());
    const auto launch = [&](auto bits, int at_once) {
        const auto write = kernel::write_outputs<decltype(bits)::value, X, C>;
        detail::launch_next(detail::is_for_hopper(write), write, blocks, kernel::outputs_threads, stream, 0, args,
                            tally, output_rows(args.x.rows, at_once));
        return std::int64_t{blocks} * (kernel::outputs_threads / 32);
    };
    if constexpr (D == dynamic_extent || D % 4 == 0)
        if (kernel::has_vector_rows(args))
            return with_row_lanes<D>(
                args.x.columns, [&](auto bits) { return launch(bits, kernel::rows_at_once<decltype(bits)::value>); });
    return launch(std::integral_constant<int, -1>(), args.x.columns <= 16 ? 32 : 8);
}

/// Launches the search, and where that writes codes only, what writes the other outputs that are asked for. Returns how
/// many partial losses that leaves in `tally`. `exact`: as `search`.
template <class Tile, std::size_t D, class X, class C>
std::int64_t quantize(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally,
                      const search_scratch& scratch, bool exact, cudaStream_t stream) {
    if (args.x.rows == 0) return 0;
    const std::int64_t losses = search<Tile, D>(args, tally, scratch, exact, stream);
    if (losses != no_outputs) return losses;
    return kernel::wants_rows(args, tally) ? write_outputs<D>(args, tally, stream) : 0;
}

}  // namespace cuvq::dispatch
