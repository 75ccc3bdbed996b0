// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/validate.hpp>
#include <cuvq/dispatch/accumulate.cuh>
#include <cuvq/dispatch/ema.cuh>
#include <cuvq/dispatch/stats.cuh>
#include <cuvq/kernel/stats.cuh>
#include <cuvq/params.hpp>
#include <cuvq/prepare.cuh>
#include <cuvq/views.hpp>
#include <cuvq/workspace.hpp>

namespace cuvq {

namespace detail {

/// Counters of an update that reports statistics: [invalid rows, restarted codes, skipped codes, rows without a code].
/// The last is a search's: all are cleared at once, before the other launches, so that nothing comes between these.
struct update_tally {
    static constexpr std::int64_t size = 4;
    unsigned long long* counters = nullptr;

    update_tally(carver& c, bool reports) {
        if (reports) counters = c.take<unsigned long long>(size);
    }
    void clear(cudaStream_t stream) const {
        if (counters) dispatch::clear_tallies(counters, size, stream);
    }
    unsigned long long* invalid_rows() const { return counters; }
    unsigned long long* rows_without() const { return counters ? counters + 3 : nullptr; }
    kernel::ema_tally ema() const {
        return counters ? kernel::ema_tally{counters + 1, counters + 2} : kernel::ema_tally{};
    }
    kernel::stats_parts parts(const float* counts, std::int64_t codes) const {
        kernel::stats_parts p;
        p.counts = counts;
        p.codes = codes;
        p.invalid_rows = counters;
        p.restarted_codes = counters + 1;
        p.skipped_codes = counters + 2;
        return p;
    }
};

/// Scratch of accumulate and ema_apply in one call.
struct update_scratch {
    update_tally tally;
    dispatch::accumulate_scratch accumulate;
    dispatch::ema_scratch ema;
    float* counts;  // [K]
    float* sums;    // [K x D], straight behind the counts

    /// `trusted`: see `dispatch::provenance`.
    update_scratch(carver& c, const update_tally& t, const shape& s, const ema_params& p, bool trusted)
        : tally(t),
          accumulate(c, s, trusted),
          ema(c, p),
          counts(c.take<float>(s.codes * (s.dimensions + 1))),
          sums(counts ? counts + s.codes : nullptr) {}
};

/// accumulate and ema_apply of a checked call. The tally is clear.
template <class T, class X>
void update(const update_args<T, X>& a, const ema_params& p, const dispatch::provenance& from,
            const kernel::image_refresh& refresh, const update_scratch& m, cudaStream_t stream) {
    const std::int64_t codes = a.state.codebook.rows, columns = a.state.codebook.columns;
    const accumulate_args<X> batch{a.x, a.codes, a.weights, {m.counts, codes}, {m.sums, codes, columns, columns}};
    const ema_args<T, X> apply{a.state, read_only(batch.counts), read_only(batch.sums), a.x, a.replacement_indices};
    if (gather_shapes::include(a.x.rows, codes, columns)) {
        dispatch::ema_update_gathered(batch, apply, p, from, m.ema, refresh, p.stats ? m.counts : nullptr,
                                      m.tally.invalid_rows(), m.tally.ema(), stream);
        return;
    }
    dispatch::accumulate(batch, false, from, m.accumulate, m.tally.invalid_rows(), stream);
    dispatch::ema_apply(apply, p, m.ema, 0, m.tally.ema(), refresh, stream);
}

}  // namespace detail

/// Bytes of workspace that `ema_apply` takes for this shape (whose `vectors` it does not read) and these params.
/// @throws std::invalid_argument if N < 0, K < 1 or D < 1. Pure: asks no device.
inline std::size_t ema_apply_workspace_bytes(const shape& s, const ema_params& params = {}) {
    detail::check_shape("ema_apply_workspace_bytes", s);
    detail::carver c;
    dispatch::ema_scratch(c, params);
    detail::update_tally(c, params.stats != nullptr);
    return c.bytes();
}

/// Moves the state by one batch's counts and sums: blend, codebook refresh, counter of unused steps, dead codes.
///
/// For data-parallel training add up (all-reduce) the counts and sums of all ranks before it, in one buffer as
/// `accumulate` says, and give every rank the same state, `replacements` and seed: each then makes the same draws and
/// holds a bitwise equal codebook. Their state is that of a single rank with the whole batch, to the error that
/// `accumulate` states for its sums.
///
/// @param state        in/out: K codes in D dimensions, device memory. If it carries a prepared codebook, that is
///                     kept fresh in the same launches.
/// @param counts       [K] float, device memory, as `accumulate` leaves them.
/// @param sums         [K x D] float, device memory. A code whose counts or sums are not finite (or negative counts),
///                     or whose new row would not be finite, is left wholly unchanged and counted in `skipped_codes`.
/// @param replacements [M x D] device memory, any element type: the rows that dead codes restart from; or `discard`,
///                     with `dead_code_rule::none`.
/// @param params       rule, decay, dead codes; see `ema_params` for each formula and its source.
/// @param ws           `ema_apply_workspace_bytes` of device memory, or empty: allocated on the stream.
/// @param stream       everything runs here, asynchronously; may be captured in a graph. One launch, three with
///                     `params.stats`. Where the rule or the dead-code rule wants the total of the cluster sizes, its
///                     blocks wait for each other (a cooperative launch).
/// @throws std::invalid_argument naming the argument, before any launch; cuvq::cuda_error if a CUDA call fails.
/// Deterministic: bitwise equal from run to run; replacement draws also on every card and on the CPU. O(K D).
template <class State, class CountsView, class SumsView, class ReplacementsView>
void ema_apply(const State& state, const CountsView& counts, const SumsView& sums, const ReplacementsView& replacements,
               const ema_params& params = {}, const workspace& ws = {}, cudaStream_t stream = nullptr) {
    const char* function = "ema_apply";
    const auto args = detail::validate_ema_apply(function, state, counts, sums, replacements, params);
    const shape s{0, args.counts.size, args.sums.columns};
    detail::check_state_prepared(function, state, s.codes, s.dimensions);
    const detail::scratch memory(function, ws, ema_apply_workspace_bytes(s, params), stream);
    detail::carver c(memory.data());
    const dispatch::ema_scratch m(c, params);
    const detail::update_tally tally(c, params.stats != nullptr);
    tally.clear(stream);
    dispatch::ema_apply(args, params, m, 0, tally.ema(), detail::refresh_of(state.prepared, s.codes, s.dimensions),
                        stream);
    if (params.stats) {
        kernel::stats_parts parts = tally.parts(args.counts.data, s.codes);
        parts.invalid_rows = nullptr;
        dispatch::write_stats(parts, params.stats, stream);
    }
}

/// Bytes of workspace that `ema_update` takes for this shape and these params: those of `accumulate`, one copy of the
/// codebook, and 4 KB where the rule or the dead-code rule wants the total of the cluster sizes.
/// @throws std::invalid_argument if N < 0, K < 1 or D < 1. Pure: asks no device.
inline std::size_t ema_update_workspace_bytes(const shape& s, const ema_params& params = {}) {
    detail::check_shape("ema_update_workspace_bytes", s);
    detail::carver c;
    detail::update_scratch(c, {c, params.stats != nullptr}, s, params, false);
    return c.bytes();
}

/// `accumulate` of one batch, then `ema_apply` with x as the replacements.
///
/// @param state  in/out: K codes in D dimensions, device memory; its codebook holds float or the type of x. K at most
///               2^32 - 2. A prepared codebook that it carries is kept fresh in the same launches.
/// @param x      [N x D] device memory; float, __half or __nv_bfloat16; N >= 0. Rows may be strided.
/// @param codes  [N] device memory: the code of each row of x, as `quantize` gives it; rows are left out as in
///               `accumulate`.
/// @param params rule, decay, dead codes, weights; see `ema_params`.
/// @param ws     `ema_update_workspace_bytes` of device memory, or empty: allocated on the stream.
/// @param stream everything runs here, asynchronously; may be captured in a graph: a replay is one more step. One
///               launch for a batch of `gather_shapes` (N <= 8192, D <= 1024, and K <= 4096 for D <= 256) under
///               `active_only` and `clamp` without `usage_ratio`, two under other rules; of other batches those of
///               `accumulate` and `ema_apply`. Two more with `params.stats`.
/// @throws std::invalid_argument naming the argument, before any launch; cuvq::cuda_error if a CUDA call fails.
/// Deterministic: bitwise equal from run to run. O(N D + K D) time.
/// Source: RecTokens `ema_update`; van den Oord et al. 2017, appendix A.1.
template <class State, class XView, class CodesView>
void ema_update(const State& state, const XView& x, const CodesView& codes, const ema_params& params = {},
                const workspace& ws = {}, cudaStream_t stream = nullptr) {
    const char* function = "ema_update";
    const auto args = detail::validate_ema_update(function, state, x, codes, params);
    const shape s{args.x.rows, args.state.codebook.rows, args.x.columns};
    dispatch::check_codes(function, "state.codebook", s.codes);
    detail::check_state_prepared(function, state, s.codes, s.dimensions);
    const detail::scratch memory(function, ws, ema_update_workspace_bytes(s, params), stream);
    detail::carver c(memory.data());
    const detail::update_scratch m(c, {c, params.stats != nullptr}, s, params, false);
    m.tally.clear(stream);
    detail::update(args, params, {}, detail::refresh_of(state.prepared, s.codes, s.dimensions), m, stream);
    if (params.stats) dispatch::write_stats(m.tally.parts(m.counts, s.codes), params.stats, stream);
}

}  // namespace cuvq
