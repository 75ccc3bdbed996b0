// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <cuvq/detail/check_params.hpp>
#include <cuvq/detail/overlap.hpp>
#include <cuvq/detail/philox.hpp>
#include <cuvq/detail/references.hpp>
#include <cuvq/detail/view_types.hpp>
#include <cuvq/params.hpp>
#include <cuvq/reference/quantize.hpp>
#include <cuvq/views.hpp>

namespace cuvq::reference {

/// A codebook state in host memory, for the functions of `cuvq::reference`. CPU path of `cuvq::codebook`.
/// @tparam T element of the codebook: float, __half or __nv_bfloat16.
template <class T>
class codebook {
public:
    /// K codes in D dimensions, everything zero.
    /// @throws std::invalid_argument if codes or dimensions is below 1.
    codebook(std::int64_t codes, std::int64_t dimensions) : codes_(codes), dimensions_(dimensions) {
        cuvq::detail::check_not_empty("reference::codebook", "codebook", codes, dimensions);
        rows_.resize(static_cast<std::size_t>(codes * dimensions));
        embed_sum_.resize(static_cast<std::size_t>(codes * dimensions));
        cluster_size_.resize(static_cast<std::size_t>(codes));
        steps_since_active_.resize(static_cast<std::size_t>(codes));
    }

    /// Starts afresh from rows of a batch: code k gets row k of a random permutation of x (from k = N on, the same
    /// rows again), or the next row within 64 that is finite, or zeros if there is none; the statistics as `initial`
    /// says; counters zero.
    /// @param x [N x D] host memory, N >= 1; any element type if T is float, else T.
    /// @throws std::invalid_argument if x has no row, other columns, or overlaps this codebook.
    template <class XView>
    void init_from_rows(const XView& x, std::uint64_t seed, initial_statistics initial = initial_statistics::zeros) {
        static_assert(cuvq::detail::is_matrix<XView>, "cuvq: `x` must be a cuvq::matrix_view");
        using X = cuvq::detail::value_of<XView>;
        static_assert(std::is_same_v<T, float> || std::is_same_v<T, X>,
                      "cuvq: the codebook must hold float or the element type of `x`");
        const char* function = "reference::codebook::init_from_rows";
        const auto m = cuvq::detail::read_only(cuvq::detail::to_matrix(function, "x", x));
        if (m.rows < 1) cuvq::detail::bad_argument(function, "x", "0 rows", "at least 1");
        cuvq::detail::check_extent(function, "x", "columns", m.columns, dimensions_, "the columns of the codebook");
        cuvq::detail::check_initial(function, initial);
        cuvq::detail::check_state_disjoint(function, cuvq::detail::to_state(function, state()), {}, {{"x", m}});
        const bool one = initial == initial_statistics::one_per_code;
        for (std::int64_t k = 0; k < codes_; ++k) {
            const std::int64_t first = cuvq::detail::permute(seed, k % m.rows, m.rows);
            std::int64_t from = -1;
            for (std::int64_t t = 0; t <= 64 && t < m.rows && from < 0; ++t)
                if (detail::is_finite_row(m, (first + t) % m.rows)) from = (first + t) % m.rows;
            for (std::int64_t d = 0; d < dimensions_; ++d) {
                const T v = static_cast<T>(from < 0 ? 0.0f : detail::to_float(m.row(from)[d]));
                rows_[k * dimensions_ + d] = v;
                embed_sum_[k * dimensions_ + d] = one ? detail::to_float(v) : 0.0f;
            }
        }
        std::fill(cluster_size_.begin(), cluster_size_.end(), one ? 1.0f : 0.0f);
        std::fill(steps_since_active_.begin(), steps_since_active_.end(), 0);
        step_ = 0;
    }

    /// Views of the arrays, valid while this object lives and is not assigned to or moved.
    codebook_state<T> state() {
        return {matrix_view<T>(rows_.data(), codes_, dimensions_),
                matrix_view<float>(embed_sum_.data(), codes_, dimensions_),
                vector_view<float>(cluster_size_.data(), codes_),
                vector_view<std::int32_t>(steps_since_active_.data(), codes_), &step_};
    }

    std::int64_t codes() const { return codes_; }            ///< K
    std::int64_t dimensions() const { return dimensions_; }  ///< D

    const std::vector<T>& rows() const { return rows_; }                      ///< [K x D] the codebook
    const std::vector<float>& embed_sum() const { return embed_sum_; }        ///< [K x D]
    const std::vector<float>& cluster_size() const { return cluster_size_; }  ///< [K]
    const std::vector<std::int32_t>& steps_since_active() const { return steps_since_active_; }  ///< [K]
    std::int64_t step() const { return step_; }                                                  ///< updates made

private:
    std::int64_t codes_, dimensions_;
    std::vector<T> rows_;
    std::vector<float> embed_sum_, cluster_size_;
    std::vector<std::int32_t> steps_since_active_;
    std::int64_t step_ = 0;
};

}  // namespace cuvq::reference
