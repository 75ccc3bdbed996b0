// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include <cuda_runtime.h>

#include <cuvq/detail/check_params.hpp>
#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/references.hpp>
#include <cuvq/detail/view_types.hpp>
#include <cuvq/dispatch/quantize.cuh>
#include <cuvq/views.hpp>
#include <cuvq/workspace.hpp>

namespace cuvq {

/// Bytes of device memory that a `prepared_codebook` of K codes in D dimensions takes: with K rounded up to whole tiles
/// of 128 codes, 33, 161, 289 or 545 bytes per code for D up to 13, 77, 141 or 269; beyond, 2 D + 7 and at most 62
/// more. For the updates to keep it fresh, at most 268 D + 2048 in all.
/// @throws std::invalid_argument if K < 1 or D < 1. Pure: asks no device.
inline std::size_t prepared_codebook_bytes(std::int64_t codes, std::int64_t dimensions) {
    detail::check_shape("prepared_codebook_bytes", shape{0, codes, dimensions});
    detail::carver c;
    dispatch::take_prepared(c, codes, dimensions);
    return c.bytes();
}

/// Makes of a codebook what the searches need of it, for `quantize_params::prepared`: where one codebook serves many
/// calls, each is spared a launch.
///
/// @param codebook [K x D] device memory; float, __half or __nv_bfloat16; K, D >= 1. Rows may be strided.
/// @param prepared out; `prepared_codebook_bytes` of device memory. Good for a codebook of these values, K and D in
///                 the same element type, with any x.
/// @param stream   runs here, asynchronously, in one launch, two for D > 269; may be captured in a graph.
/// @throws std::invalid_argument naming the argument, before any launch: no, misaligned or too little memory for
///         `prepared`, K = 0 or D = 0. cuvq::cuda_error if a CUDA call fails.
/// Deterministic. O(K D).
template <class CodebookView>
void prepare(const CodebookView& codebook, const prepared_codebook& prepared, cudaStream_t stream = nullptr) {
    const char* function = "prepare";
    static_assert(detail::is_matrix<CodebookView>, "cuvq: `codebook` must be a cuvq::matrix_view");
    const auto rows = detail::read_only(detail::to_matrix(function, "codebook", codebook));
    detail::check_not_empty(function, "codebook", rows.rows, rows.columns);
    const std::size_t bytes = prepared_codebook_bytes(rows.rows, rows.columns);
    if (prepared.data == nullptr)
        detail::bad_argument(function, "prepared", "a null pointer", std::to_string(bytes) + " bytes of device memory");
    detail::check_prepared(function, "prepared", prepared, bytes);
    detail::carver c(prepared.data);
    const kernel::image_refresh p = dispatch::take_prepared(c, rows.rows, rows.columns);
    dispatch::prepare(rows, p.image, stream, p.trail);
}

/// What `prepare` made of a codebook of K codes in D dimensions, as kernels of your own pass it to
/// `device::nearest<mma_tile<...>>`. Host code, launches nothing; valid while the memory of `prepared` is.
/// @throws std::invalid_argument as `prepare`.
inline device::image_ref image_of(const prepared_codebook& prepared, std::int64_t codes, std::int64_t dimensions) {
    const char* function = "image_of";
    const std::size_t bytes = prepared_codebook_bytes(codes, dimensions);
    if (prepared.data == nullptr)
        detail::bad_argument(function, "prepared", "a null pointer", std::to_string(bytes) + " bytes of device memory");
    detail::check_prepared(function, "prepared", prepared, bytes);
    detail::carver c(prepared.data);
    return dispatch::image_ref_of(dispatch::take_image(c, codes, dimensions), dimensions);
}

namespace detail {

template <class State>
void check_state_prepared(const char* function, const State& state, std::int64_t codes, std::int64_t dimensions) {
    check_prepared(function, "state.prepared", state.prepared, prepared_codebook_bytes(codes, dimensions));
}

/// What an update of a state keeps fresh: nothing, if the state carries no prepared codebook.
inline kernel::image_refresh refresh_of(const prepared_codebook& prepared, std::int64_t codes,
                                        std::int64_t dimensions) {
    if (prepared.data == nullptr) return {};
    carver c(prepared.data);
    return dispatch::take_prepared(c, codes, dimensions);
}

}  // namespace detail

}  // namespace cuvq
