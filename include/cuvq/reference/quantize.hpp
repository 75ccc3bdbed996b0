// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The CPU path of `quantize` and `lookup`: plain double-precision loops over host memory, compiled by any C++17
// compiler. It is what cuvq runs where there is no GPU, and what its GPU tests are judged against.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <cuvq/detail/validate.hpp>
#include <cuvq/params.hpp>
#include <cuvq/views.hpp>

namespace cuvq::reference {

namespace detail {

template <class T>
float to_float(T v) {
    return static_cast<float>(v);
}

template <class T>
bool is_finite_row(const matrix_ref<T>& m, std::int64_t i) {
    for (std::int64_t d = 0; d < m.columns; ++d)
        if (!std::isfinite(to_float(m.row(i)[d]))) return false;
    return true;
}

/// exp(-sum p ln p) over the shares p of `counts`, and how many of them are above 0.
inline void usage(const std::vector<double>& counts, step_stats& stats) {
    double total = 0;
    stats.active_codes = 0;
    for (const double n : counts) {
        total += n;
        stats.active_codes += n > 0;
    }
    double entropy = 0;
    for (const double n : counts)
        if (n > 0) entropy -= n / total * std::log(n / total);
    stats.perplexity = total > 0 ? std::exp(entropy) : 0;
}

template <class X, class C>
step_stats quantize(const cuvq::detail::quantize_args<X, C>& a) {
    const std::int64_t n = a.x.rows, k = a.codebook.rows, columns = a.x.columns;
    std::vector<char> usable(static_cast<std::size_t>(k));
    for (std::int64_t j = 0; j < k; ++j) usable[j] = is_finite_row(a.codebook, j);

    std::vector<std::int64_t> chosen(static_cast<std::size_t>(n), -1);
    std::vector<double> distance(static_cast<std::size_t>(n), 0.0);
#if defined(_OPENMP)
#pragma omp parallel for schedule(static)
#endif
    for (std::int64_t i = 0; i < n; ++i) {
        if (is_finite_row(a.x, i)) {
            double best = std::numeric_limits<double>::infinity();
            for (std::int64_t j = 0; j < k; ++j) {
                if (!usable[j]) continue;
                double sum = 0;
                for (std::int64_t d = 0; d < columns; ++d) {
                    const double difference = double{to_float(a.x.row(i)[d])} - double{to_float(a.codebook.row(j)[d])};
                    sum += difference * difference;
                }
                if (sum < best) {
                    best = sum;
                    chosen[i] = j;
                }
            }
            distance[i] = best;
        }
        const std::int64_t code = chosen[i];
        a.codes.store(i, code);
        if (a.distances)
            a.distances[i] = code < 0 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(distance[i]);
        if (a.quantized)
            for (std::int64_t d = 0; d < columns; ++d)
                a.quantized.row(i)[d] = code < 0 ? static_cast<X>(std::numeric_limits<float>::quiet_NaN())
                                                 : static_cast<X>(to_float(a.codebook.row(code)[d]));
    }

    step_stats stats;
    std::vector<double> counts(static_cast<std::size_t>(k), 0.0);
    double loss = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        if (chosen[i] < 0) {
            ++stats.invalid_rows;
        } else {
            counts[chosen[i]] += 1;
            loss += distance[i];
        }
    }
    const std::int64_t valid = n - stats.invalid_rows;
    if (valid > 0) stats.commitment_loss = loss / (static_cast<double>(valid) * static_cast<double>(columns));
    usage(counts, stats);
    return stats;
}

}  // namespace detail

/// The nearest codebook row of every vector. CPU path of `cuvq::quantize`; see there for what it means.
///
/// @param x         [N x D] host memory; float, __half or __nv_bfloat16; N >= 0.
/// @param codebook  [K x D] host memory; float or the type of x; K, D >= 1. A row with a NaN or Inf is never chosen.
/// @param codes     [N] out, host memory; int32, int64, uint8, uint16 or uint32 with room for K - 1. The lowest k that
///                  minimises sum_d (x_id - c_kd)^2 in float64; -1 (all bits set) where x_i has a NaN or Inf.
/// @param quantized [N x D] out, of the type of x, or `discard`: the chosen rows; NaN where there is none.
/// @param distances [N] out, float, or `discard`: the squared distances; NaN where there is none.
/// @param params    `quantize_params`; `stats` is a host pointer here.
/// @throws std::invalid_argument naming the argument: shapes that do not match, null or misaligned pointers,
///         outputs that overlap other arguments, K = 0 or D = 0, codes too narrow for K.
/// Deterministic. O(N K D) time, O(N + K) scratch memory; OpenMP over rows where the compiler has it on.
/// Source: van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017, eq. 1 and 2.
template <class XView, class CodebookView, class CodesView, class QuantizedView = discard_t,
          class DistancesView = discard_t>
void quantize(const XView& x, const CodebookView& codebook, const CodesView& codes,
              const QuantizedView& quantized = discard, const DistancesView& distances = discard,
              const quantize_params& params = {}) {
    const auto args =
        cuvq::detail::validate_quantize("reference::quantize", x, codebook, codes, quantized, distances, params);
    const step_stats stats = detail::quantize(args);
    if (params.stats) *params.stats = stats;
}

/// The codebook rows of codes (decoding). CPU path of `cuvq::lookup`.
///
/// @param codebook  [K x D] host memory; float or the type of quantized; K, D >= 1.
/// @param codes     [N] host memory; int32, int64, uint8, uint16 or uint32.
/// @param quantized [N x D] out, host memory: row i is codebook row codes[i], or NaN where that is outside [0, K).
/// @throws std::invalid_argument as `quantize` does.
/// Deterministic. O(N D).
template <class CodebookView, class CodesView, class QuantizedView>
void lookup(const CodebookView& codebook, const CodesView& codes, const QuantizedView& quantized) {
    const auto a = cuvq::detail::validate_lookup("reference::lookup", codebook, codes, quantized);
    using T = cuvq::detail::value_of<QuantizedView>;
#if defined(_OPENMP)
#pragma omp parallel for schedule(static)
#endif
    for (std::int64_t i = 0; i < a.quantized.rows; ++i) {
        const std::int64_t code = a.codes.load(i);
        const bool known = code >= 0 && code < a.codebook.rows;
        for (std::int64_t d = 0; d < a.quantized.columns; ++d)
            a.quantized.row(i)[d] = known ? static_cast<T>(detail::to_float(a.codebook.row(code)[d]))
                                          : static_cast<T>(std::numeric_limits<float>::quiet_NaN());
    }
}

}  // namespace cuvq::reference
