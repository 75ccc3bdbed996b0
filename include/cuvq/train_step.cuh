// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include <cuda_runtime.h>

#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/validate.hpp>
#include <cuvq/dispatch/quantize.cuh>
#include <cuvq/dispatch/stats.cuh>
#include <cuvq/ema.cuh>
#include <cuvq/kernel/stats.cuh>
#include <cuvq/params.hpp>
#include <cuvq/views.hpp>
#include <cuvq/workspace.hpp>

namespace cuvq {

namespace detail {

/// What a step keeps from its search to its end; then the scratch of the search, and in its place that of the update,
/// each of whose kernels waits for the end of the search before it writes anything.
struct train_scratch {
    update_tally counters;
    kernel::search_tally tally;  // loss and rows_without, with stats
    float* distances = nullptr;  // [N], where -1 may be a code
    carver place;
    dispatch::search_scratch search;
    update_scratch update;
    dispatch::digit_scratch digits;  // where `distances` are, if there are any: of each step, one or the other

    /// Whether -1, all bits set, is a code in some unsigned type: then a NaN distance tells a row without one.
    static bool is_ambiguous(std::int64_t codes) {
        return codes == std::int64_t{1} << 8 || codes == std::int64_t{1} << 16 || codes == std::int64_t{1} << 32;
    }

    /// Room for the digits that the search may count for the sort of the update: as much as 24 bytes for each row and
    /// four copies of the codebook leave.
    static dispatch::digit_scratch take_digits(carver& c, const shape& s, float* distances) {
        dispatch::digit_scratch d;
        static_assert(dispatch::digit_scratch::long_chunk * kernel::row_chunks::group_rows ==
                      dispatch::sort_plan::few_bins::most_tile);
        if (s.codes == 1 || !dispatch::may_take_sm90(s) || s.vectors > dispatch::most_slice_rows ||
            gather_shapes::include(s.vectors, s.codes, s.dimensions))
            return d;
        const dispatch::sort_plan plan(s.vectors, s.codes);
        const std::int64_t left = 24 * s.vectors + 16 * s.codes * s.dimensions - static_cast<std::int64_t>(c.bytes());
        const bool among_distances = is_ambiguous(s.codes);
        const std::int64_t words = among_distances ? s.vectors : left / 4;
        d.counts.bins = plan.bins;
        d.counts.mask = plan.pass(0).mask;
        d.most_chunks = std::clamp<std::int64_t>(words / plan.bins, 0, 2 * dispatch::most_blocks);
        d.room = among_distances ? reinterpret_cast<std::uint32_t*>(distances)
                                 : c.take<std::uint32_t>(d.most_chunks * plan.bins);
        return d;
    }

    train_scratch(carver& c, const shape& s, const train_params& p)
        : counters(c, p.stats != nullptr),
          tally{p.stats ? c.take<double>(dispatch::most_losses) : nullptr, nullptr, counters.rows_without()},
          distances(is_ambiguous(s.codes) ? c.take<float>(s.vectors) : nullptr),
          place(c),
          search(place, s, {}),
          update(c, counters, s, p, true) {
        c.share(place);
        digits = take_digits(c, s, distances);
    }
};

}  // namespace detail

/// Bytes of workspace that `train_step` takes for this shape and these params: as many as `quantize` (without `stats`
/// or a prepared codebook) or `ema_update`, whichever takes more, to within 1 KB, where of the latter's a list of rows
/// that are finite does not count (8 bytes per row, of D > 128 and K up to 2048); plus 4 bytes per row where K is 256
/// or 65536; plus 257 KB with `params.stats`. Where that leaves room below 24 bytes per row and four copies of the
/// codebook, some of it, in which the search counts for the update.
/// @throws std::invalid_argument if N < 0, K < 1 or D < 1. Pure: asks no device.
inline std::size_t train_step_workspace_bytes(const shape& s, const train_params& params = {}) {
    detail::check_shape("train_step_workspace_bytes", s);
    detail::carver c;
    detail::train_scratch(c, s, params);
    return c.bytes();
}

/// One whole train step: `quantize` with the codebook as it stands, then `ema_update`.
///
/// @param state     in/out: K codes in D dimensions, device memory; its codebook holds float or the type of x. K at
///                  most 2^32 - 2. A prepared codebook that it carries is used, and kept fresh for the next step.
/// @param x         [N x D] device memory; float, __half or __nv_bfloat16; N >= 0. Rows may be strided.
/// @param codes     [N] out, device memory; as `quantize` gives them.
/// @param quantized [N x D] out, of the type of x, or `discard`: rows of the codebook before the step.
/// @param params    rule, decay, dead codes, weights, stats; converts from `ema_params`. A row with a bad weight gets a
///                  code and counts in `commitment_loss`, but moves nothing and counts in `invalid_rows`.
/// @param ws        `train_step_workspace_bytes` of device memory, or empty: allocated on the stream.
/// @param stream    everything runs here, asynchronously; may be captured in a graph: a replay is one more step, with
///                  its own draws, since they are keyed by the step counter in device memory.
/// @throws std::invalid_argument naming the argument, before any launch; cuvq::cuda_error if a CUDA call fails.
/// Deterministic: bitwise equal from run to run, eager or captured. O(N K D) time.
/// Source: van den Oord et al. 2017, appendix A.1; Razavi et al. 2019.
template <class State, class XView, class CodesView, class QuantizedView = discard_t>
void train_step(const State& state, const XView& x, const CodesView& codes, const QuantizedView& quantized = discard,
                const train_params& params = {}, const workspace& ws = {}, cudaStream_t stream = nullptr) {
    const char* function = "train_step";
    auto args = detail::validate_train_step(function, state, x, codes, quantized, params);
    const shape s{args.update.x.rows, args.update.state.codebook.rows, args.update.x.columns};
    dispatch::check_codes(function, "state.codebook", s.codes);
    detail::check_state_prepared(function, state, s.codes, s.dimensions);
    const detail::scratch memory(function, ws, train_step_workspace_bytes(s, params), stream);
    detail::carver c(memory.data());
    detail::train_scratch m(c, s, params);
    if (state.prepared.data) m.search.use(state.prepared, s.codes, s.dimensions);
    m.counters.clear(stream);
    constexpr auto last_code = static_cast<std::uint64_t>(std::numeric_limits<detail::value_of<CodesView>>::max());
    if (static_cast<std::uint64_t>(s.codes - 1) == last_code)
        args.quantize.distances = {m.distances, s.vectors};
    else if (!args.update.weights)  // rows whose weight is bad are not sorted
        m.search.digits = &m.digits;
    const std::int64_t losses =
        dispatch::quantize<automatic_tile, dispatch::static_dimensions<XView, decltype(state.codebook)>()>(
            args.quantize, m.tally, m.search, params.accuracy == accuracy::exact, stream);
    const dispatch::provenance from{
        true, {args.quantize.distances.data, args.quantize.distances.size}, m.digits.counts};
    detail::update(args.update, params, from, detail::refresh_of(state.prepared, s.codes, s.dimensions), m.update,
                   stream);
    if (params.stats) {
        kernel::stats_parts parts = m.counters.parts(m.update.counts, s.codes);
        parts.loss = m.tally.loss;
        parts.loss_count = losses;
        parts.rows = s.vectors;
        parts.columns = s.dimensions;
        parts.rows_without = m.tally.rows_without;
        dispatch::write_stats(parts, params.stats, stream);
    }
}

}  // namespace cuvq
