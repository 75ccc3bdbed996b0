// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include <cuda_runtime.h>
#include <thrust/copy.h>
#include <thrust/device_vector.h>
#include <thrust/fill.h>

#include <cuvq/detail/check_params.hpp>
#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/overlap.hpp>
#include <cuvq/detail/references.hpp>
#include <cuvq/detail/view_types.hpp>
#include <cuvq/kernel/codebook.cuh>
#include <cuvq/params.hpp>
#include <cuvq/prepare.cuh>
#include <cuvq/views.hpp>

namespace cuvq {

/// A codebook state that owns its device memory, on the device that is current when it is made.
/// @tparam T element of the codebook: float, __half or __nv_bfloat16.
///
/// The host copies (`rows()` and its like) wait for the device: they are for looking and saving, not for the train
/// loop. Construction and copies throw `thrust::system_error` or `std::bad_alloc` where CUDA fails.
template <class T>
class codebook {
public:
    /// K codes in D dimensions, everything zero.
    /// @throws std::invalid_argument if codes or dimensions is below 1.
    codebook(std::int64_t codes, std::int64_t dimensions) : codes_(codes), dimensions_(dimensions) {
        detail::check_not_empty("codebook", "codebook", codes, dimensions);
        rows_.resize(static_cast<std::size_t>(codes * dimensions), static_cast<T>(0.0f));
        embed_sum_.resize(static_cast<std::size_t>(codes * dimensions), 0.0f);
        cluster_size_.resize(static_cast<std::size_t>(codes), 0.0f);
        steps_since_active_.resize(static_cast<std::size_t>(codes), 0);
        step_.resize(1, 0);
    }

    /// Starts afresh from rows of a batch: code k gets row k of a random permutation of x (from k = N on, the same
    /// rows again), or the next row within 64 that is finite, or zeros if there is none; the statistics as `initial`
    /// says; counters zero.
    /// @param x      [N x D] device memory, N >= 1; any element type if T is float, else T.
    /// @param seed   of the permutation; the same rows are chosen on every card and on the CPU.
    /// @param stream runs here, asynchronously, in one launch; after `prepare`, also what that does.
    /// @throws std::invalid_argument if x has no row, other columns, or overlaps this codebook; cuvq::cuda_error.
    template <class XView>
    void init_from_rows(const XView& x, std::uint64_t seed, initial_statistics initial = initial_statistics::zeros,
                        cudaStream_t stream = nullptr) {
        static_assert(detail::is_matrix<XView>, "cuvq: `x` must be a cuvq::matrix_view");
        using X = detail::value_of<XView>;
        static_assert(std::is_same_v<T, float> || std::is_same_v<T, X>,
                      "cuvq: the codebook must hold float or the element type of `x`");
        const char* function = "codebook::init_from_rows";
        const auto m = detail::read_only(detail::to_matrix(function, "x", x));
        if (m.rows < 1) detail::bad_argument(function, "x", "0 rows", "at least 1");
        detail::check_extent(function, "x", "columns", m.columns, dimensions_, "the columns of the codebook");
        detail::check_initial(function, initial);
        const auto target = detail::to_state(function, state());
        detail::check_state_disjoint(function, target, {}, {{"x", m}});
        detail::launch(kernel::init_codebook<T, X>, detail::blocks_for(codes_, 8, 1 << 20), 256, stream, 0, target, m,
                       seed, initial == initial_statistics::one_per_code);
        if (!image_.empty()) prepare(stream);
    }

    /// Makes of the rows what searches need of them: `state()` carries it from here on, so that `train_step` is spared
    /// that launch, and updates keep it fresh; for `quantize` it is `prepared()`. States taken before, and graphs
    /// captured with them, do not know of it, and must not move the rows any more. To be called again after writes of
    /// your own to the rows.
    /// @param stream runs here, asynchronously, in one launch, two for D > 269. The first time also allocates
    ///               `prepared_codebook_bytes` of device memory, and waits for that, which a graph cannot capture.
    ///               Where these are 0, does nothing.
    /// @throws cuvq::cuda_error, thrust::system_error or std::bad_alloc where CUDA fails. Deterministic. O(K D).
    void prepare(cudaStream_t stream = nullptr) {
        const std::size_t bytes = prepared_codebook_bytes(codes_, dimensions_);
        if (bytes == 0) return;
        thrust::device_vector<char> first(image_.empty() ? bytes : 0);
        auto& image = image_.empty() ? first : image_;
        cuvq::prepare(state().codebook, {thrust::raw_pointer_cast(image.data()), bytes}, stream);
        if (image_.empty()) image_.swap(first);
    }

    /// What `prepare` made, or nothing; valid as the views of `state()` are.
    prepared_codebook prepared() {
        if (image_.empty()) return {};
        return {thrust::raw_pointer_cast(image_.data()), image_.size()};
    }

    /// Views of the arrays, valid while this object lives and is not assigned to or moved.
    codebook_state<T> state() {
        return {matrix_view<T>(thrust::raw_pointer_cast(rows_.data()), codes_, dimensions_),
                matrix_view<float>(thrust::raw_pointer_cast(embed_sum_.data()), codes_, dimensions_),
                vector_view<float>(thrust::raw_pointer_cast(cluster_size_.data()), codes_),
                vector_view<std::int32_t>(thrust::raw_pointer_cast(steps_since_active_.data()), codes_),
                thrust::raw_pointer_cast(step_.data()),
                prepared()};
    }

    std::int64_t codes() const { return codes_; }            ///< K
    std::int64_t dimensions() const { return dimensions_; }  ///< D

    // Host copies.
    std::vector<T> rows() const { return to_host(rows_); }                      ///< [K x D] the codebook
    std::vector<float> embed_sum() const { return to_host(embed_sum_); }        ///< [K x D]
    std::vector<float> cluster_size() const { return to_host(cluster_size_); }  ///< [K]
    std::vector<std::int32_t> steps_since_active() const { return to_host(steps_since_active_); }  ///< [K]
    std::int64_t step() const { return to_host(step_)[0]; }                                        ///< updates made

private:
    template <class V>
    static std::vector<V> to_host(const thrust::device_vector<V>& v) {
        CUVQ_CHECK_CUDA(cudaDeviceSynchronize());  // streams that do not wait for the default one, too
        std::vector<V> host(v.size());
        thrust::copy(v.begin(), v.end(), host.begin());
        return host;
    }

    std::int64_t codes_, dimensions_;
    thrust::device_vector<T> rows_;
    thrust::device_vector<float> embed_sum_, cluster_size_;
    thrust::device_vector<std::int32_t> steps_since_active_;
    thrust::device_vector<std::int64_t> step_;
    thrust::device_vector<char> image_;
};

}  // namespace cuvq
