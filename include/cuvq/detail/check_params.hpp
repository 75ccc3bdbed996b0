// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What can be wrong with parameters, shapes, workspaces and prepared codebooks.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

#include <cuvq/detail/references.hpp>
#include <cuvq/error.hpp>
#include <cuvq/params.hpp>
#include <cuvq/views.hpp>
#include <cuvq/workspace.hpp>

namespace cuvq::detail {

inline void check_search(const char* function, metric m, accuracy a) {
    if (m != metric::l2) bad_argument(function, "params.metric", "no enumerator of metric", "metric::l2");
    if (a != accuracy::exact && a != accuracy::fast)
        bad_argument(function, "params.accuracy", "no enumerator of accuracy", "accuracy::exact or accuracy::fast");
}

inline void check_stats(const char* function, const step_stats* stats) {
    if (reinterpret_cast<std::uintptr_t>(stats) % alignof(step_stats) != 0)
        bad_argument(function, "params.stats", "a misaligned pointer",
                     text(std::int64_t{alignof(step_stats)}) + "-byte alignment");
}

inline vector_ref<const float> check_weights(const char* function, const vector_view<const float>& weights,
                                             std::int64_t rows) {
    if (weights.data_handle() == nullptr && weights.extent(0) == 0) return {};
    const auto w = to_vector(function, "params.weights", weights);
    check_extent(function, "params.weights", "elements", w.size, rows, "one for each row of x");
    return w;
}

inline void check_positive(const char* function, const char* argument, float v) {
    if (!(v > 0.0f) || !std::isfinite(v)) bad_argument(function, argument, text(double{v}), "a finite number above 0");
}

inline vector_ref<const std::int64_t> check_ema_params(const char* function, const ema_params& p,
                                                       std::int64_t code_count, bool has_replacements) {
    if (p.rule != ema_rule::active_only && p.rule != ema_rule::laplace && p.rule != ema_rule::clamp)
        bad_argument(function, "params.rule", "no enumerator of ema_rule", "one of its enumerators");
    if (!(p.decay >= 0.0 && p.decay <= 1.0)) bad_argument(function, "params.decay", text(p.decay), "0 to 1");
    check_positive(function, "params.epsilon", p.epsilon);
    if (p.bias_correction && p.rule != ema_rule::laplace)
        bad_argument(function, "params.bias_correction", "true with another rule", "ema_rule::laplace with it");
    // As the kernels see it: a decay that float rounds to 1 leaves 1 - g^t at 0 just the same.
    if (p.bias_correction && static_cast<float>(p.decay) == 1.0f)
        bad_argument(function, "params.bias_correction", "true with decay = 1", "decay below 1 with it");
    switch (p.dead_codes) {
        case dead_code_rule::none: break;
        case dead_code_rule::unused_steps:
            if (p.restart_after_steps < 1)
                bad_argument(function, "params.restart_after_steps", text(std::int64_t{p.restart_after_steps}),
                             "at least 1");
            break;
        case dead_code_rule::min_cluster_size:
            check_positive(function, "params.min_cluster_size", p.min_cluster_size);
            check_positive(function, "params.reset_cluster_size", p.reset_cluster_size);
            break;
        case dead_code_rule::usage_ratio:
            check_positive(function, "params.usage_ratio", p.usage_ratio);
            check_positive(function, "params.reset_usage_ratio", p.reset_usage_ratio);
            if (p.check_every < 1)
                bad_argument(function, "params.check_every", text(std::int64_t{p.check_every}), "at least 1");
            break;
        default:
            bad_argument(function, "params.dead_codes", "no enumerator of dead_code_rule", "one of its enumerators");
    }
    if (p.dead_codes != dead_code_rule::none && !has_replacements)
        bad_argument(function, "replacements", "discard", "a matrix to draw from, or dead_code_rule::none");
    check_stats(function, p.stats);
    if (p.replacement_indices.data_handle() == nullptr && p.replacement_indices.extent(0) == 0) return {};
    const auto indices = to_vector(function, "params.replacement_indices", p.replacement_indices);
    check_extent(function, "params.replacement_indices", "elements", indices.size, code_count, "one for each code");
    return indices;
}

inline void check_shape(const char* function, const shape& s) {
    if (s.vectors < 0) bad_argument(function, "shape.vectors", text(s.vectors), "at least 0");
    if (s.codes < 1) bad_argument(function, "shape.codes", text(s.codes), "at least 1");
    if (s.dimensions < 1) bad_argument(function, "shape.dimensions", text(s.dimensions), "at least 1");
    constexpr std::int64_t most = std::int64_t{1} << 52;  // elements: no sum of bytes overflows
    if (s.vectors > most / s.dimensions)
        bad_argument(function, "shape", text(s.vectors) + " x " + text(s.dimensions) + " elements of x",
                     "at most 2^52");
    if (s.codes > most / s.dimensions)
        bad_argument(function, "shape", text(s.codes) + " x " + text(s.dimensions) + " elements of the codebook",
                     "at most 2^52");
}

inline void check_initial(const char* function, initial_statistics initial) {
    if (initial != initial_statistics::zeros && initial != initial_statistics::one_per_code)
        bad_argument(function, "initial", "no enumerator of initial_statistics", "one of its enumerators");
}

/// A workspace as lent: `bytes` of it are needed. Not called for an empty one.
inline void check_workspace(const char* function, const workspace& w, std::size_t bytes) {
    if (w.data == nullptr) bad_argument(function, "workspace", "a null pointer", "a device pointer, or workspace{}");
    if (reinterpret_cast<std::uintptr_t>(w.data) % workspace::alignment != 0)
        bad_argument(function, "workspace", "a misaligned pointer", "256-byte alignment");
    if (w.bytes < bytes)
        bad_argument(function, "workspace", std::to_string(w.bytes) + " bytes", "at least " + std::to_string(bytes));
}

inline void check_prepared(const char* function, const char* argument, const prepared_codebook& p, std::size_t bytes) {
    if (p.data == nullptr && p.bytes == 0) return;
    if (p.data == nullptr) bad_argument(function, argument, "a null pointer", "a device pointer, or none at all");
    if (reinterpret_cast<std::uintptr_t>(p.data) % workspace::alignment != 0)
        bad_argument(function, argument, "a misaligned pointer", "256-byte alignment");
    if (p.bytes < bytes)
        bad_argument(function, argument, std::to_string(p.bytes) + " bytes", "at least " + std::to_string(bytes));
}

}  // namespace cuvq::detail
