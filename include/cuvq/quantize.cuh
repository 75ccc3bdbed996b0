// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include <cuda_runtime.h>

#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/validate.hpp>
#include <cuvq/dispatch/quantize.cuh>
#include <cuvq/dispatch/stats.cuh>
#include <cuvq/kernel/stats.cuh>
#include <cuvq/params.hpp>
#include <cuvq/prepare.cuh>
#include <cuvq/views.hpp>
#include <cuvq/workspace.hpp>

namespace cuvq {

namespace detail {

/// Scratch of a search: the dispatcher's, and where to tally if it reports statistics.
struct quantize_scratch {
    dispatch::search_scratch search;
    kernel::search_tally tally;

    quantize_scratch(carver& c, const shape& s, const quantize_params& p) : search(c, s, p.prepared) {
        if (!p.stats) return;
        tally.loss = c.take<double>(dispatch::most_losses);
        tally.histogram = c.take<unsigned long long>(s.codes + 1);  // the last one is rows_without
        tally.rows_without = tally.histogram ? tally.histogram + s.codes : nullptr;
    }
};

}  // namespace detail

/// Bytes of workspace that `quantize` takes for this shape and these params: `prepared_codebook_bytes` unless
/// `params.prepared` is there; for more than 64 rows, 20 bytes per row and at most 8 KB (for D > 269, 8 bytes per row
/// and 4 KB), and for K D > 65536, 66 KB; for up to 8192 rows, 12 bytes per row and 128 codes but at most 192 KB and
/// 1.5 bytes per element of the codebook; with `params.stats`, 8 bytes per code and 256 KB.
/// @throws std::invalid_argument if N < 0, K < 1 or D < 1. Pure: asks no device.
inline std::size_t quantize_workspace_bytes(const shape& s, const quantize_params& params = {}) {
    detail::check_shape("quantize_workspace_bytes", s);
    detail::carver c;
    detail::quantize_scratch(c, s, params);
    return c.bytes();
}

/// The nearest codebook row of every vector.
///
/// @tparam Tile     usually left out: the kernel and its sizes are chosen by device, types, N, K and D. Or a tile of
///                  `dispatch/tuning.cuh`, or of your own sizes: that one alone is compiled and launched. Exact codes
///                  do not depend on it; those of `accuracy::fast` are exact with all but an sm90_tile.
/// @param x         [N x D] device memory; float, __half or __nv_bfloat16; N >= 0. Rows may be strided.
/// @param codebook  [K x D] device memory; float or the type of x; K, D >= 1. A row with a NaN or Inf is never chosen.
/// @param codes     [N] out, device memory; int32, int64, uint8, uint16 or uint32 with room for K - 1. The lowest k
///                  that minimises sum_d (x_id - c_kd)^2 in float64, summed in the order that
///                  `device/certificate.cuh` states; -1 (all bits set) where x_i has a NaN or Inf, or no codebook row
///                  is finite.
/// @param quantized [N x D] out, of the type of x, or `discard`: the chosen rows; NaN where there is none.
/// @param distances [N] out, float, or `discard`: squared distances to the chosen rows, relative error at most
///                  4e-7 log2(D + 1) in float's normal range; NaN where there is none.
/// @param params    metric, accuracy, what `prepare` made of the codebook, where to write `step_stats`.
/// @param ws        `quantize_workspace_bytes` of device memory, or empty: allocated on the stream.
/// @param stream    everything runs here, asynchronously; may be captured in a graph.
/// @throws std::invalid_argument naming the argument, before any launch: shapes that do not match, null or misaligned
///         pointers, outputs that overlap other arguments, K = 0 or D = 0, codes too narrow for K, workspace too
///         small, a Tile that this device, build, K or D has no use for. cuvq::cuda_error if a CUDA call fails.
/// Deterministic: equal inputs give bitwise equal outputs, however rows are aligned, but for the last bits of
/// `commitment_loss`; exact codes also on every card. O(N K D) time, no N x K memory. With N = 0 no output is touched.
/// Source: van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017, eq. 1 and 2.
template <class Tile = automatic_tile, class XView, class CodebookView, class CodesView,
          class QuantizedView = discard_t, class DistancesView = discard_t>
void quantize(const XView& x, const CodebookView& codebook, const CodesView& codes,
              const QuantizedView& quantized = discard, const DistancesView& distances = discard,
              const quantize_params& params = {}, const workspace& ws = {}, cudaStream_t stream = nullptr) {
    const char* function = "quantize";
    const auto args = detail::validate_quantize(function, x, codebook, codes, quantized, distances, params);
    const shape s{args.x.rows, args.codebook.rows, args.x.columns};
    detail::check_prepared(function, "params.prepared", params.prepared,
                           prepared_codebook_bytes(s.codes, s.dimensions));
    if constexpr (!std::is_same_v<Tile, automatic_tile>)
        if (!dispatch::serves<Tile, detail::value_of<XView>, detail::value_of<CodebookView>>(s.codes, s.dimensions))
            detail::bad_argument(function, "Tile",
                                 "one that does not serve K = " + std::to_string(s.codes) +
                                     ", D = " + std::to_string(s.dimensions) + " on this device, as compiled",
                                 "automatic_tile, or a tile that does");
    const detail::scratch memory(function, ws, quantize_workspace_bytes(s, params), stream);
    detail::carver c(memory.data());
    const detail::quantize_scratch m(c, s, params);
    if (params.stats) dispatch::clear_tallies(m.tally.histogram, s.codes + 1, stream);
    const std::int64_t losses = dispatch::quantize<Tile, dispatch::static_dimensions<XView, CodebookView>()>(
        args, m.tally, m.search, params.accuracy == accuracy::exact, stream);
    if (params.stats) {
        kernel::stats_parts parts;
        parts.loss = m.tally.loss;
        parts.loss_count = losses;
        parts.rows = s.vectors;
        parts.columns = s.dimensions;
        parts.rows_without = m.tally.rows_without;
        parts.histogram = m.tally.histogram;
        parts.codes = s.codes;
        parts.invalid_rows = m.tally.rows_without;
        dispatch::write_stats(parts, params.stats, stream);
    }
}

}  // namespace cuvq
