// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/validate.hpp>
#include <cuvq/dispatch/accumulate.cuh>
#include <cuvq/dispatch/stats.cuh>
#include <cuvq/kernel/stats.cuh>
#include <cuvq/params.hpp>
#include <cuvq/views.hpp>
#include <cuvq/workspace.hpp>

namespace cuvq {

/// Bytes of workspace that `accumulate` takes for this shape and these params: at most 24 per row and four copies of
/// the codebook, and 64 KB.
/// @throws std::invalid_argument if N < 0, K < 1 or D < 1. Pure: asks no device.
inline std::size_t accumulate_workspace_bytes(const shape& s, const accumulate_params& = {}) {
    detail::check_shape("accumulate_workspace_bytes", s);
    detail::carver c;
    dispatch::accumulate_scratch(c, s, false);
    c.take<unsigned long long>(1);  // invalid rows
    return c.bytes();
}

/// Counts and weighted sums of the vectors of each code, without a one-hot matrix.
///
/// For data-parallel training let both lie in one buffer of K (D + 1) floats, so that one all-reduce (a sum of floats)
/// serves:
///
///     matrix_view<float> sums(buffer, K, D);
///     vector_view<float> counts(buffer + K * D, K);
///
/// then `ema_apply` on every rank. To gather the gradients of several micro-batches into one update, call it for each
/// with `params.add` set from the second on, then `ema_apply` once.
///
/// @param x      [N x D] device memory; float, __half or __nv_bfloat16; N >= 0. Rows may be strided.
/// @param codes  [N] device memory; int32, int64, uint8, uint16 or uint32 with room for K - 1. Rows whose code is
///               outside [0, K), whose weight is negative or not finite, or which hold a NaN or Inf are left out and
///               counted in `step_stats::invalid_rows`.
/// @param counts [K] out, float, device memory: n_k = sum of weights (without weights counted in integers and rounded
///               once, or once for every 2^30 rows). Added onto when `params.add`.
/// @param sums   [K x D] out, float, device memory: s_k = sum of weight * x, with an error of at most
///               2^-22 sqrt(n) sum |w x| per element. Added onto when `params.add`. K at most 2^32 - 2.
/// @param params weights, add, where to write `step_stats` (device memory).
/// @param ws     `accumulate_workspace_bytes` of device memory, or empty: allocated on the stream.
/// @param stream everything runs here, asynchronously; may be captured in a graph.
/// @throws std::invalid_argument naming the argument, before any launch; cuvq::cuda_error if a CUDA call fails.
/// Deterministic: bitwise equal from run to run. O(N D + K D) time.
/// Source: van den Oord et al. 2017, appendix A.1, eq. 6 and 7.
template <class XView, class CodesView, class CountsView, class SumsView>
void accumulate(const XView& x, const CodesView& codes, const CountsView& counts, const SumsView& sums,
                const accumulate_params& params = {}, const workspace& ws = {}, cudaStream_t stream = nullptr) {
    const char* function = "accumulate";
    const auto args = detail::validate_accumulate(function, x, codes, counts, sums, params);
    dispatch::check_codes(function, "sums", args.sums.rows);
    const shape s{args.x.rows, args.sums.rows, args.x.columns};
    const detail::scratch memory(function, ws, accumulate_workspace_bytes(s, params), stream);
    detail::carver c(memory.data());
    const dispatch::accumulate_scratch m(c, s, false);
    unsigned long long* invalid_rows = params.stats ? c.take<unsigned long long>(1) : nullptr;
    if (params.stats) dispatch::clear_tallies(invalid_rows, 1, stream);
    dispatch::accumulate(args, params.add, {}, m, invalid_rows, stream);
    if (params.stats) {
        kernel::stats_parts parts;
        parts.counts = args.counts.data;
        parts.codes = s.codes;
        parts.invalid_rows = invalid_rows;
        dispatch::write_stats(parts, params.stats, stream);
    }
}

}  // namespace cuvq
