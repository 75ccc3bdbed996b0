// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The CPU path of `accumulate`, `ema_apply`, `ema_update` and `train_step`: plain double-precision loops over host
// memory, compiled by any C++17 compiler. State is stored in float after each step, as on the GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <cuvq/detail/philox.hpp>
#include <cuvq/detail/validate.hpp>
#include <cuvq/params.hpp>
#include <cuvq/reference/quantize.hpp>
#include <cuvq/views.hpp>

namespace cuvq::reference {

namespace detail {

/// counts and sums in double, then rounded once; returns the rows that were left out.
template <class X>
std::int64_t accumulate(const cuvq::detail::accumulate_args<X>& a, bool add) {
    const std::int64_t k = a.sums.rows, columns = a.sums.columns;
    std::vector<double> counts(static_cast<std::size_t>(k), 0.0);
    std::vector<double> sums(static_cast<std::size_t>(k * columns), 0.0);
    std::int64_t invalid = 0;
    for (std::int64_t i = 0; i < a.x.rows; ++i) {
        const std::int64_t code = a.codes.load(i);
        const double weight = a.weights ? a.weights[i] : 1.0;
        if (code < 0 || code >= k || !(weight >= 0) || !std::isfinite(weight) || !is_finite_row(a.x, i)) {
            ++invalid;
            continue;
        }
        counts[code] += weight;
        for (std::int64_t d = 0; d < columns; ++d) sums[code * columns + d] += weight * to_float(a.x.row(i)[d]);
    }
    for (std::int64_t j = 0; j < k; ++j) {
        a.counts[j] = static_cast<float>(counts[j] + (add ? a.counts[j] : 0.0f));
        for (std::int64_t d = 0; d < columns; ++d)
            a.sums.row(j)[d] = static_cast<float>(sums[j * columns + d] + (add ? a.sums.row(j)[d] : 0.0f));
    }
    return invalid;
}

inline void usage(const vector_ref<const float>& counts, step_stats& stats) {
    std::vector<double> finite(static_cast<std::size_t>(counts.size));
    for (std::int64_t j = 0; j < counts.size; ++j)
        finite[j] = std::isfinite(counts[j]) && counts[j] > 0 ? counts[j] : 0.0;
    usage(finite, stats);
}

/// The row of `replacements` that code j restarts from: the one named or drawn, else the next within 64 that is
/// finite and stays so in the state (as T, and times `reset`); -1 if there is none.
template <class T, class R>
std::int64_t replacement_row(const cuvq::detail::ema_args<T, R>& a, const ema_params& p, std::int64_t j,
                             std::int64_t step, float reset) {
    const std::int64_t m = a.replacements.rows;
    if (m == 0) return -1;
    const std::int64_t first =
        a.replacement_indices ? a.replacement_indices[j]
                              : cuvq::detail::scale_to(cuvq::detail::philox_bits(p.seed, static_cast<std::uint64_t>(j),
                                                                                 static_cast<std::uint64_t>(step)),
                                                       m);
    if (first < 0 || first >= m) return -1;
    for (std::int64_t t = 0; t <= 64 && t < m; ++t) {
        const std::int64_t row = (first + t) % m;
        bool fits = true;
        for (std::int64_t d = 0; d < a.replacements.columns; ++d) {
            const float v = to_float(a.replacements.row(row)[d]);
            fits = fits && std::isfinite(v) && std::isfinite(to_float(static_cast<T>(v))) && std::isfinite(reset * v);
        }
        if (fits) return row;
    }
    return -1;
}

/// One update of the state from counts and sums; fills restarted_codes and skipped_codes.
template <class T, class R>
void ema_apply(const cuvq::detail::ema_args<T, R>& a, const ema_params& p, step_stats& stats) {
    const std::int64_t k = a.state.codebook.rows, columns = a.state.codebook.columns;
    const std::int64_t step = *a.state.step, updates = step + 1;
    const double keep = static_cast<float>(p.decay), take = static_cast<float>(1.0 - p.decay);

    // The blend, and which codes it may touch at all.
    std::vector<char> sound(static_cast<std::size_t>(k)), active(static_cast<std::size_t>(k));
    std::vector<float> size(static_cast<std::size_t>(k)), sum(static_cast<std::size_t>(k * columns));
    double total = 0;
    for (std::int64_t j = 0; j < k; ++j) {
        const float n = a.counts[j];
        sound[j] = std::isfinite(n) && n >= 0 && is_finite_row(a.sums, j);
        active[j] = sound[j] && n > 0;
        const bool blend = sound[j] && (active[j] || p.rule != ema_rule::active_only);
        const auto moved = [&](float old, float now) {
            return blend ? static_cast<float>(keep * old + take * now) : old;
        };
        size[j] = moved(a.state.cluster_size[j], n);
        for (std::int64_t d = 0; d < columns; ++d)
            sum[j * columns + d] = moved(a.state.embed_sum.row(j)[d], a.sums.row(j)[d]);
        if (std::isfinite(size[j])) total += size[j];
    }

    const double correction = p.bias_correction ? 1.0 - std::pow(p.decay, static_cast<double>(updates)) : 1.0;
    const double mean_size = total / static_cast<double>(k);
    const bool look = p.dead_codes != dead_code_rule::usage_ratio || updates % p.check_every == 0;
    std::vector<float> row(static_cast<std::size_t>(columns));
    for (std::int64_t j = 0; j < k; ++j) {
        // Refresh. A state of nothing but zeros knows no row, so the codebook keeps the one it has.
        const bool blend = active[j] || p.rule != ema_rule::active_only;
        double divisor = std::max<double>(size[j], p.epsilon);
        if (p.rule == ema_rule::laplace) {
            const double smoothed_total = total / correction;
            divisor = (size[j] / correction + p.epsilon) / (smoothed_total + static_cast<double>(k) * p.epsilon) *
                      smoothed_total;
        }
        bool zero = size[j] == 0, finite = std::isfinite(size[j]);
        for (std::int64_t d = 0; d < columns; ++d) {
            const float s = sum[j * columns + d];
            zero = zero && s == 0;
            row[d] = static_cast<float>(s / correction / divisor);
            finite = finite && std::isfinite(s) && std::isfinite(to_float(static_cast<T>(row[d])));
        }
        const bool refresh = blend && !zero;
        if (!sound[j] || (refresh && !finite)) {
            ++stats.skipped_codes;
            continue;
        }
        a.state.cluster_size[j] = size[j];
        for (std::int64_t d = 0; d < columns; ++d) {
            a.state.embed_sum.row(j)[d] = sum[j * columns + d];
            if (refresh) a.state.codebook.row(j)[d] = static_cast<T>(row[d]);
        }
        std::int32_t& steps = a.state.steps_since_active[j];
        steps = active[j] ? 0 : steps < std::numeric_limits<std::int32_t>::max() ? steps + 1 : steps;

        // Dead codes.
        bool dead = false;
        float reset = 0;
        switch (p.dead_codes) {
            case dead_code_rule::none: break;
            case dead_code_rule::unused_steps: dead = steps >= p.restart_after_steps; break;
            case dead_code_rule::min_cluster_size:
                dead = size[j] < p.min_cluster_size;
                reset = p.reset_cluster_size;
                break;
            case dead_code_rule::usage_ratio:
                dead = look && size[j] < p.usage_ratio * mean_size;
                reset = static_cast<float>(p.reset_usage_ratio * mean_size);
                break;
        }
        if (!dead) continue;
        const std::int64_t from = replacement_row(a, p, j, step, reset);
        if (from < 0) continue;
        ++stats.restarted_codes;
        steps = 0;
        a.state.cluster_size[j] = reset;
        for (std::int64_t d = 0; d < columns; ++d) {
            const float v = to_float(a.replacements.row(from)[d]);
            a.state.codebook.row(j)[d] = static_cast<T>(v);
            a.state.embed_sum.row(j)[d] = reset * v;
        }
    }
    *a.state.step = updates;
}

template <class T, class X>
step_stats ema_update(const cuvq::detail::update_args<T, X>& u, const ema_params& p) {
    const std::int64_t k = u.state.codebook.rows, columns = u.state.codebook.columns;
    std::vector<float> counts(static_cast<std::size_t>(k)), sums(static_cast<std::size_t>(k * columns));
    const vector_ref<float> counts_ref{counts.data(), k};
    const matrix_ref<float> sums_ref{sums.data(), k, columns, columns};
    step_stats stats;
    stats.invalid_rows = accumulate<X>({u.x, u.codes, u.weights, counts_ref, sums_ref}, false);
    usage(vector_ref<const float>{counts.data(), k}, stats);
    ema_apply<T, X>({u.state, {counts.data(), k}, {sums.data(), k, columns, columns}, u.x, u.replacement_indices}, p,
                    stats);
    return stats;
}

}  // namespace detail

/// Counts and weighted sums of the vectors of each code. CPU path of `cuvq::accumulate`.
///
/// @param x      [N x D] host memory; float, __half or __nv_bfloat16.
/// @param codes  [N] host memory; int32, int64, uint8, uint16 or uint32. Rows whose code is outside [0, K), whose
///               weight is negative or not finite, or which hold a NaN or Inf are left out and counted.
/// @param counts [K] out, float: n_k = sum of weights. Added onto when `params.add`.
/// @param sums   [K x D] out, float: s_k = sum of weight * x. Added onto when `params.add`.
/// @param params weights, add, where to write `step_stats` (host memory).
/// @throws std::invalid_argument naming the argument.
/// Deterministic: double sums in row order, rounded once. O(N D + K D) time, O(K D) scratch memory.
/// Source: van den Oord et al. 2017, appendix A.1, eq. 6 and 7.
template <class XView, class CodesView, class CountsView, class SumsView>
void accumulate(const XView& x, const CodesView& codes, const CountsView& counts, const SumsView& sums,
                const accumulate_params& params = {}) {
    const auto args = cuvq::detail::validate_accumulate("reference::accumulate", x, codes, counts, sums, params);
    step_stats stats;
    stats.invalid_rows = detail::accumulate(args, params.add);
    detail::usage(cuvq::detail::read_only(args.counts), stats);
    if (params.stats) *params.stats = stats;
}

/// Moves the state by one batch's counts and sums: blend, codebook refresh, counter of unused steps, dead codes.
/// CPU path of `cuvq::ema_apply`.
///
/// @param state        in/out: K codes in D dimensions, host memory.
/// @param counts       [K] float, host memory.
/// @param sums         [K x D] float, host memory. A code whose counts or sums are not finite (or negative counts), or
///                     whose new row would not be finite, is left wholly unchanged and counted in `skipped_codes`.
/// @param replacements [M x D] rows that dead codes restart from, or `discard` with `dead_code_rule::none`.
/// @param params       rule, decay, dead codes; see `ema_params` for each formula and its source.
/// @throws std::invalid_argument naming the argument.
/// Deterministic. O(K D).
template <class State, class CountsView, class SumsView, class ReplacementsView>
void ema_apply(const State& state, const CountsView& counts, const SumsView& sums, const ReplacementsView& replacements,
               const ema_params& params = {}) {
    const auto args =
        cuvq::detail::validate_ema_apply("reference::ema_apply", state, counts, sums, replacements, params);
    step_stats stats;
    detail::usage(args.counts, stats);
    detail::ema_apply(args, params, stats);
    if (params.stats) *params.stats = stats;
}

/// `accumulate` of one batch, then `ema_apply` with x as the replacements. CPU path of `cuvq::ema_update`.
///
/// @param state in/out: K codes in D dimensions, host memory; its codebook holds float or the type of x.
/// @param x     [N x D] host memory.
/// @param codes [N] host memory: the code of each row of x, as `quantize` gives it.
/// @param params rule, decay, dead codes, weights; see `ema_params` for each formula and its source.
/// @throws std::invalid_argument naming the argument.
/// Deterministic. O(N D + K D) time, O(K D) scratch memory.
template <class State, class XView, class CodesView>
void ema_update(const State& state, const XView& x, const CodesView& codes, const ema_params& params = {}) {
    const auto args = cuvq::detail::validate_ema_update("reference::ema_update", state, x, codes, params);
    const step_stats stats = detail::ema_update(args, params);
    if (params.stats) *params.stats = stats;
}

/// One whole train step: `quantize` with the codebook as it stands, then `ema_update`. CPU path of
/// `cuvq::train_step`.
///
/// @param state     in/out: K codes in D dimensions, host memory; its codebook holds float or the type of x.
/// @param x         [N x D] host memory.
/// @param codes     [N] out, host memory.
/// @param quantized [N x D] out, of the type of x, or `discard`: the rows of the codebook before the step.
/// @param params    as in `ema_update`; converts from `ema_params`.
/// @throws std::invalid_argument naming the argument.
/// Deterministic. O(N K D) time. Source: van den Oord et al. 2017, appendix A.1; Razavi et al. 2019.
template <class State, class XView, class CodesView, class QuantizedView = discard_t>
void train_step(const State& state, const XView& x, const CodesView& codes, const QuantizedView& quantized = discard,
                const train_params& params = {}) {
    const auto args = cuvq::detail::validate_train_step("reference::train_step", state, x, codes, quantized, params);
    // The update takes codes wide enough for -1: in the caller's type that may be a code, where K = 2^bits.
    std::vector<std::int64_t> chosen(static_cast<std::size_t>(args.quantize.x.rows));
    auto quantize_args = args.quantize;
    quantize_args.codes = {chosen.data(), args.quantize.codes.size, code_type::int64};
    const step_stats search = detail::quantize(quantize_args);
    for (std::int64_t i = 0; i < args.quantize.codes.size; ++i) args.quantize.codes.store(i, chosen[i]);
    auto update_args = args.update;
    update_args.codes = cuvq::detail::read_only(quantize_args.codes);
    step_stats stats = detail::ema_update(update_args, params);
    stats.commitment_loss = search.commitment_loss;
    if (params.stats) *params.stats = stats;
}

}  // namespace cuvq::reference
