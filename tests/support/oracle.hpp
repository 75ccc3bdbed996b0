// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The judge: what is right, in float64, by plain loops that share no code with the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include <cuvq/params.hpp>

#include "support/host.hpp"

namespace cuvq::test {

/// Elements in float64, row by row.
template <class T>
std::vector<double> wide(const matrix<T>& m) {
    std::vector<double> w;
    w.reserve(m.data.size());
    for (const T v : m.data) w.push_back(static_cast<double>(static_cast<float>(v)));
    return w;
}

inline bool all_finite(const double* row, std::int64_t columns) {
    return std::all_of(row, row + columns, [](double v) { return std::isfinite(v); });
}

/// Squared distance in float64, in the order of the columns.
inline double distance64(const double* x, const double* c, std::int64_t columns) {
    double sum = 0;
    for (std::int64_t d = 0; d < columns; ++d) sum += (x[d] - c[d]) * (x[d] - c[d]);
    return sum;
}

/// Squared distance in float64, in the order that `device/certificate.cuh` states.
inline double ordered_distance64(const double* x, const double* c, std::int64_t columns) {
    double p[8] = {};
    for (std::int64_t d = 0; d < columns; ++d) p[d / 4 % 8] = std::fma(x[d] - c[d], x[d] - c[d], p[d / 4 % 8]);
    return ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
}

/// The lowest code of least `distance(x, c, columns)`, -1 where there is none; of each row.
template <class X, class C, class Distance>
std::vector<std::int64_t> nearest_codes(const matrix<X>& x, const matrix<C>& codebook, Distance distance) {
    const auto wide_x = wide(x), wide_c = wide(codebook);
    const std::int64_t columns = x.columns;
    std::vector<std::int64_t> codes(static_cast<std::size_t>(x.rows), -1);
    std::vector<char> usable;
    for (std::int64_t k = 0; k < codebook.rows; ++k) usable.push_back(all_finite(&wide_c[k * columns], columns));
    for (std::int64_t i = 0; i < x.rows; ++i) {
        if (!all_finite(&wide_x[i * columns], columns)) continue;
        double best = std::numeric_limits<double>::infinity();
        for (std::int64_t k = 0; k < codebook.rows; ++k) {
            if (!usable[k]) continue;
            const double d = distance(&wide_x[i * columns], &wide_c[k * columns], columns);
            if (d < best) {
                best = d;
                codes[i] = k;
            }
        }
    }
    return codes;
}

/// Whether every code is right: of the least float64 distance and, of all such, the lowest; or within
/// (D + 8) 2^-51 of the least, which no order of summation resolves.
template <class X, class C>
testing::AssertionResult codes_are_nearest(const matrix<X>& x, const matrix<C>& codebook,
                                           const std::vector<std::int64_t>& codes) {
    const auto right = nearest_codes(x, codebook, distance64);
    const auto wide_x = wide(x), wide_c = wide(codebook);
    const std::int64_t columns = x.columns;
    if (codes.size() != right.size()) return testing::AssertionFailure() << codes.size() << " codes";
    const double slack = static_cast<double>(columns + 8) * 0x1p-51;
    for (std::size_t i = 0; i < codes.size(); ++i) {
        if (codes[i] == right[i]) continue;
        const auto wrong = [&] {
            return testing::AssertionFailure() << "row " << i << ": code " << codes[i] << " instead of " << right[i];
        };
        if (codes[i] < 0 || codes[i] >= codebook.rows || right[i] < 0) return wrong();
        const double least = distance64(&wide_x[i * columns], &wide_c[right[i] * columns], columns);
        const double got = distance64(&wide_x[i * columns], &wide_c[codes[i] * columns], columns);
        if (!(got > least && got <= least * (1 + slack))) return wrong() << ", at " << got << " instead of " << least;
    }
    return testing::AssertionSuccess();
}

/// Whether `distances` are those to the rows of `codes`, to 4e-7 log2(D + 1); NaN where there is no code.
template <class X, class C>
testing::AssertionResult distances_are_right(const matrix<X>& x, const matrix<C>& codebook,
                                             const std::vector<std::int64_t>& codes,
                                             const std::vector<float>& distances) {
    const auto wide_x = wide(x), wide_c = wide(codebook);
    const std::int64_t columns = x.columns;
    const double tolerance = 4e-7 * std::log2(static_cast<double>(columns + 1));
    const double least = std::numeric_limits<float>::min(), most = std::numeric_limits<float>::max();
    for (std::size_t i = 0; i < codes.size(); ++i) {
        const double got = distances[i];
        bool right = std::isnan(got);
        double wanted = std::numeric_limits<double>::quiet_NaN();
        if (codes[i] >= 0) {
            wanted = distance64(&wide_x[i * columns], &wide_c[codes[i] * columns], columns);
            right = got >= 0 && (std::abs(got - wanted) <= (wanted < least ? 0x1p-149 : tolerance * wanted) ||
                                 (std::isinf(got) && wanted > most * (1 - tolerance)));
        }
        if (!right)
            return testing::AssertionFailure() << "row " << i << ": distance " << got << " instead of " << wanted;
    }
    return testing::AssertionSuccess();
}

/// Whether `quantized` holds the codebook rows of `codes`, and NaN where there is none.
template <class X, class C>
testing::AssertionResult rows_are_of(const matrix<C>& codebook, const std::vector<std::int64_t>& codes,
                                     const matrix<X>& quantized) {
    for (std::int64_t i = 0; i < quantized.rows; ++i) {
        const std::int64_t code = codes[static_cast<std::size_t>(i)];
        for (std::int64_t d = 0; d < quantized.columns; ++d) {
            const float got = quantized.at(i, d);
            const bool known = code >= 0 && code < codebook.rows;
            const float wanted = known ? static_cast<float>(static_cast<X>(codebook.at(code, d)))
                                       : std::numeric_limits<float>::quiet_NaN();
            // Bit by bit, for the sign of a zero; a NaN is as good as another.
            if (std::isnan(wanted) ? !std::isnan(got) : std::memcmp(&got, &wanted, sizeof(float)) != 0)
                return testing::AssertionFailure()
                       << "(" << i << ", " << d << "): " << got << " instead of " << wanted << ", code " << code;
        }
    }
    return testing::AssertionSuccess();
}

/// Shares of codes: perplexity and active codes of these counts.
inline step_stats usage_of(const std::vector<double>& counts) {
    double total = 0, entropy = 0;
    step_stats s;
    for (const double n : counts) {
        total += n;
        s.active_codes += n > 0;
    }
    for (const double n : counts)
        if (n > 0) entropy -= n / total * std::log2(n / total);
    s.perplexity = total > 0 ? std::exp2(entropy) : 0;
    return s;
}

/// What a search reports that gave these codes.
template <class X, class C>
step_stats search_stats(const matrix<X>& x, const matrix<C>& codebook, const std::vector<std::int64_t>& codes) {
    const auto wide_x = wide(x), wide_c = wide(codebook);
    std::vector<double> counts(static_cast<std::size_t>(codebook.rows));
    double loss = 0;
    std::int64_t valid = 0;
    for (std::size_t i = 0; i < codes.size(); ++i) {
        if (codes[i] < 0) continue;
        ++valid;
        ++counts[static_cast<std::size_t>(codes[i])];
        loss += distance64(&wide_x[i * x.columns], &wide_c[codes[i] * x.columns], x.columns);
    }
    step_stats s = usage_of(counts);
    s.commitment_loss = valid > 0 ? loss / static_cast<double>(valid * x.columns) : 0;
    s.invalid_rows = x.rows - valid;
    return s;
}

/// What a mean of distances may be off by, relatively: as much as each of them, 4e-7 log2(D + 1), D up to 4096.
inline constexpr double loss_tolerance = 4.8e-6;

/// Counts exactly equal, means to float64's rounding (and that of counts kept in float).
inline testing::AssertionResult same_stats(const step_stats& got, const step_stats& wanted, double tolerance = 1e-11) {
    const auto near = [](double a, double b, double by) { return a == b || std::abs(a - b) <= by * std::abs(b); };
    if (near(got.commitment_loss, wanted.commitment_loss, loss_tolerance) &&
        near(got.perplexity, wanted.perplexity, tolerance) && got.active_codes == wanted.active_codes &&
        got.restarted_codes == wanted.restarted_codes && got.invalid_rows == wanted.invalid_rows &&
        got.skipped_codes == wanted.skipped_codes)
        return testing::AssertionSuccess();
    const auto list = [](const step_stats& s) {
        return testing::Message() << "{loss " << s.commitment_loss << ", perplexity " << s.perplexity << ", active "
                                  << s.active_codes << ", restarted " << s.restarted_codes << ", invalid "
                                  << s.invalid_rows << ", skipped " << s.skipped_codes << "}";
    };
    return testing::AssertionFailure() << list(got) << " instead of " << list(wanted);
}

/// Counts and sums of the codes of a batch in float64, and what the judgement of sums needs.
struct batch_sums {
    std::vector<double> counts;      // [K]
    std::vector<double> sums;        // [K x D]
    std::vector<double> magnitude;   // [K x D] sum of |w x|
    std::vector<std::int64_t> rows;  // [K] rows of each code
    std::int64_t invalid = 0;

    template <class X>
    batch_sums(const matrix<X>& x, const std::vector<std::int64_t>& codes, std::int64_t code_count,
               const std::vector<float>& weights = {})
        : counts(static_cast<std::size_t>(code_count)),
          sums(static_cast<std::size_t>(code_count * x.columns)),
          magnitude(sums.size()),
          rows(counts.size()) {
        const auto w = wide(x);
        for (std::int64_t i = 0; i < x.rows; ++i) {
            const std::int64_t k = codes[static_cast<std::size_t>(i)];
            const double weight = weights.empty() ? 1.0 : weights[static_cast<std::size_t>(i)];
            if (k < 0 || k >= code_count || !std::isfinite(weight) || weight < 0 ||
                !all_finite(&w[i * x.columns], x.columns)) {
                ++invalid;
                continue;
            }
            counts[k] += weight;
            ++rows[k];
            for (std::int64_t d = 0; d < x.columns; ++d) {
                sums[k * x.columns + d] += weight * w[i * x.columns + d];
                magnitude[k * x.columns + d] += std::abs(weight * w[i * x.columns + d]);
            }
        }
    }

    /// What the sum of code k may be wrong by at element e = k D + d.
    double tolerance(std::size_t k, std::size_t e) const {
        return 0x1p-22 * std::sqrt(static_cast<double>(rows[k])) * magnitude[e] + 0x1p-149;
    }
};

/// Whether counts and sums are those of the batch: each count rounded once, each sum to 2^-22 sqrt(n) sum |w x|.
inline testing::AssertionResult sums_are_right(const batch_sums& right, const std::vector<float>& counts,
                                               const matrix<float>& sums) {
    for (std::size_t k = 0; k < right.counts.size(); ++k)
        if (!(std::abs(counts[k] - right.counts[k]) <= 1.001 * 0x1p-24 * right.counts[k]))
            return testing::AssertionFailure()
                   << "code " << k << ": count " << counts[k] << " instead of " << right.counts[k];
    const auto columns = static_cast<std::size_t>(sums.columns);
    for (std::size_t e = 0; e < right.sums.size(); ++e)
        if (!(std::abs(sums.data[e] - right.sums[e]) <= right.tolerance(e / columns, e)))
            return testing::AssertionFailure()
                   << "code " << e / columns << ", column " << e % columns << ": sum " << sums.data[e] << " instead of "
                   << right.sums[e] << " to " << right.tolerance(e / columns, e) << ", of " << right.rows[e / columns]
                   << " rows";
    return testing::AssertionSuccess();
}

}  // namespace cuvq::test
