// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Which kernel answers a `quantize`.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/validate.hpp>
#include <cuvq/dispatch/tuning.cuh>
#include <cuvq/kernel/quantize.cuh>

namespace cuvq::dispatch {

/// Most blocks of a search; each leaves one partial loss, so this bounds the workspace without asking the device.
inline constexpr std::int64_t most_search_blocks = 4096;

template <class Tile = simt_tile>
unsigned search_blocks(std::int64_t rows) {
    return detail::blocks_for(rows, Tile::rows, most_search_blocks);
}

/// Static D of two views: the one that either fixes.
template <class XView, class CodebookView>
constexpr std::size_t static_dimensions() {
    constexpr std::size_t x = detail::static_columns<XView>(), c = detail::static_columns<CodebookView>();
    static_assert(x == dynamic_extent || c == dynamic_extent || x == c,
                  "cuvq: `x` and `codebook` fix different numbers of columns");
    return x != dynamic_extent ? x : c;
}

template <std::size_t D, class X, class C>
void quantize(const detail::quantize_args<X, C>& args, const kernel::search_tally& tally, cudaStream_t stream) {
    if (args.x.rows == 0) return;
    detail::launch(kernel::quantize<simt_tile, D, X, C>, search_blocks(args.x.rows), simt_tile::threads, stream, args,
                   tally);
}

}  // namespace cuvq::dispatch
