// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The arguments of each public function, checked: what kernels and the loops of cuvq::reference are handed.
#pragma once

#include <cstdint>

#include <cuvq/views.hpp>

namespace cuvq::detail {

template <class X, class C>
struct quantize_args {
    matrix_ref<const X> x;         // N x D
    matrix_ref<const C> codebook;  // K x D
    codes_ref codes;               // N
    matrix_ref<X> quantized;       // N x D, null: not asked for
    vector_ref<float> distances;   // N, null: not asked for
};

template <class X>
struct accumulate_args {
    matrix_ref<const X> x;            // N x D
    const_codes_ref codes;            // N
    vector_ref<const float> weights;  // N, null: all 1
    vector_ref<float> counts;         // K
    matrix_ref<float> sums;           // K x D
};

template <class T, class R>
struct ema_args {
    state_ref<T> state;                                  // K codes, D dimensions
    vector_ref<const float> counts;                      // K
    matrix_ref<const float> sums;                        // K x D
    matrix_ref<const R> replacements;                    // M x D, null: none
    vector_ref<const std::int64_t> replacement_indices;  // K, null: drawn
};

template <class T, class X>
struct update_args {
    state_ref<T> state;                                  // K codes, D dimensions
    matrix_ref<const X> x;                               // N x D
    const_codes_ref codes;                               // N
    vector_ref<const float> weights;                     // N, null: all 1
    vector_ref<const std::int64_t> replacement_indices;  // K, null: drawn
};

template <class T, class X>
struct train_args {
    quantize_args<X, T> quantize;
    update_args<T, X> update;
};

template <class T, class C>
struct lookup_args {
    matrix_ref<const C> codebook;  // K x D
    const_codes_ref codes;         // N
    matrix_ref<T> quantized;       // N x D
};

}  // namespace cuvq::detail
