// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The door of the library: every public function, on the GPU and on the CPU, turns its views into plain references
// here, and everything that can be wrong with an argument without reading device memory is found here.
#pragma once

#include <type_traits>

#include <cuvq/detail/arguments.hpp>
#include <cuvq/detail/check_params.hpp>
#include <cuvq/detail/overlap.hpp>
#include <cuvq/detail/references.hpp>
#include <cuvq/detail/view_types.hpp>
#include <cuvq/params.hpp>
#include <cuvq/views.hpp>

namespace cuvq::detail {

#define CUVQ_ASSERT_MATRIX(View, name) \
    static_assert(is_matrix<View>, "cuvq: `" name "` must be a cuvq::matrix_view (a row-major mdspan of rank 2)")
#define CUVQ_ASSERT_VECTOR(View, name) \
    static_assert(is_vector<View>, "cuvq: `" name "` must be a cuvq::vector_view (an mdspan of rank 1)")
#define CUVQ_ASSERT_MATRIX_OR_DISCARD(View, name)                                                           \
    static_assert(is_matrix<View> || is_discard<View>,                                                      \
                  "cuvq: `" name                                                                            \
                  "` must be a cuvq::matrix_view (a row-major mdspan of rank 2) or cuvq::discard; params, " \
                  "workspace and stream come after it")
#define CUVQ_ASSERT_VECTOR_OR_DISCARD(View, name)                                          \
    static_assert(is_vector<View> || is_discard<View>,                                     \
                  "cuvq: `" name                                                           \
                  "` must be a cuvq::vector_view (an mdspan of rank 1) or cuvq::discard; " \
                  "params, workspace and stream come after it")
#define CUVQ_ASSERT_ELEMENT(View, name) \
    static_assert(is_element<value_of<View>>, "cuvq: `" name "` must hold float, __half or __nv_bfloat16")
#define CUVQ_ASSERT_CODES(View, name)                   \
    static_assert(code_type_index<value_of<View>> >= 0, \
                  "cuvq: `" name "` must hold std::int32_t, int64_t, uint8_t, uint16_t or uint32_t")
#define CUVQ_ASSERT_WRITABLE(View, name) \
    static_assert(is_writable<View>, "cuvq: `" name "` is written, so it must not be a view of const")
#define CUVQ_ASSERT_FLOAT(View, name) \
    static_assert(std::is_same_v<value_of<View>, float>, "cuvq: `" name "` must hold float")

template <class XView, class CodebookView, class CodesView, class QuantizedView, class DistancesView>
auto validate_quantize(const char* function, const XView& x, const CodebookView& codebook, const CodesView& codes,
                       const QuantizedView& quantized, const DistancesView& distances, const quantize_params& params,
                       const char* codebook_name = "codebook") {
    CUVQ_ASSERT_MATRIX(XView, "x");
    CUVQ_ASSERT_ELEMENT(XView, "x");
    CUVQ_ASSERT_MATRIX(CodebookView, "codebook");
    static_assert(
        std::is_same_v<value_of<CodebookView>, float> || std::is_same_v<value_of<CodebookView>, value_of<XView>>,
        "cuvq: `codebook` must hold float or the element type of `x`");
    CUVQ_ASSERT_VECTOR(CodesView, "codes");
    CUVQ_ASSERT_CODES(CodesView, "codes");
    CUVQ_ASSERT_WRITABLE(CodesView, "codes");
    CUVQ_ASSERT_MATRIX_OR_DISCARD(QuantizedView, "quantized");
    CUVQ_ASSERT_VECTOR_OR_DISCARD(DistancesView, "distances");
    using X = value_of<XView>;
    using C = value_of<CodebookView>;

    quantize_args<X, C> a;
    a.codebook = read_only(to_matrix(function, codebook_name, codebook));
    check_not_empty(function, codebook_name, a.codebook.rows, a.codebook.columns);
    a.x = read_only(to_matrix(function, "x", x));
    check_extent(function, "x", "columns", a.x.columns, a.codebook.columns, "the columns of the codebook");
    a.codes = to_codes(function, "codes", codes, a.codebook.rows);
    check_extent(function, "codes", "elements", a.codes.size, a.x.rows, "one for each row of x");
    if constexpr (!is_discard<QuantizedView>) {
        static_assert(std::is_same_v<value_of<QuantizedView>, X>,
                      "cuvq: `quantized` must hold the element type of `x`");
        CUVQ_ASSERT_WRITABLE(QuantizedView, "quantized");
        a.quantized = to_matrix(function, "quantized", quantized, true);
        check_extent(function, "quantized", "rows", a.quantized.rows, a.x.rows, "the rows of x");
        check_extent(function, "quantized", "columns", a.quantized.columns, a.x.columns, "the columns of x");
    }
    if constexpr (!is_discard<DistancesView>) {
        CUVQ_ASSERT_FLOAT(DistancesView, "distances");
        CUVQ_ASSERT_WRITABLE(DistancesView, "distances");
        a.distances = to_vector(function, "distances", distances);
        check_extent(function, "distances", "elements", a.distances.size, a.x.rows, "one for each row of x");
    }
    check_search(function, params.metric, params.accuracy);
    check_stats(function, params.stats);
    check_disjoint(function,
                   {{"codes", a.codes},
                    {"quantized", a.quantized},
                    {"distances", a.distances},
                    {"params.stats", params.stats, sizeof(step_stats)}},
                   {{"x", a.x}, {codebook_name, a.codebook}});
    return a;
}

template <class XView, class CodesView, class CountsView, class SumsView>
auto validate_accumulate(const char* function, const XView& x, const CodesView& codes, const CountsView& counts,
                         const SumsView& sums, const accumulate_params& params) {
    CUVQ_ASSERT_MATRIX(XView, "x");
    CUVQ_ASSERT_ELEMENT(XView, "x");
    CUVQ_ASSERT_VECTOR(CodesView, "codes");
    CUVQ_ASSERT_CODES(CodesView, "codes");
    CUVQ_ASSERT_VECTOR(CountsView, "counts");
    CUVQ_ASSERT_FLOAT(CountsView, "counts");
    CUVQ_ASSERT_WRITABLE(CountsView, "counts");
    CUVQ_ASSERT_MATRIX(SumsView, "sums");
    CUVQ_ASSERT_FLOAT(SumsView, "sums");
    CUVQ_ASSERT_WRITABLE(SumsView, "sums");

    accumulate_args<value_of<XView>> a;
    a.sums = to_matrix(function, "sums", sums, true);
    check_not_empty(function, "sums", a.sums.rows, a.sums.columns);
    a.counts = to_vector(function, "counts", counts);
    check_extent(function, "counts", "elements", a.counts.size, a.sums.rows, "the rows of sums");
    a.x = read_only(to_matrix(function, "x", x));
    check_extent(function, "x", "columns", a.x.columns, a.sums.columns, "the columns of sums");
    a.codes = read_only(to_codes(function, "codes", codes, a.sums.rows));
    check_extent(function, "codes", "elements", a.codes.size, a.x.rows, "one for each row of x");
    a.weights = check_weights(function, params.weights, a.x.rows);
    check_stats(function, params.stats);
    check_disjoint(function,
                   {{"counts", a.counts}, {"sums", a.sums}, {"params.stats", params.stats, sizeof(step_stats)}},
                   {{"x", a.x}, {"codes", a.codes}, {"params.weights", a.weights}});
    return a;
}

template <class State, class CountsView, class SumsView, class ReplacementsView>
auto validate_ema_apply(const char* function, const State& state, const CountsView& counts, const SumsView& sums,
                        const ReplacementsView& replacements, const ema_params& params) {
    CUVQ_ASSERT_VECTOR(CountsView, "counts");
    CUVQ_ASSERT_FLOAT(CountsView, "counts");
    CUVQ_ASSERT_MATRIX(SumsView, "sums");
    CUVQ_ASSERT_FLOAT(SumsView, "sums");
    CUVQ_ASSERT_MATRIX_OR_DISCARD(ReplacementsView, "replacements");
    constexpr bool replaces = !is_discard<ReplacementsView>;
    using R = std::conditional_t<replaces, value_of<ReplacementsView>, float>;
    static_assert(is_element<R>, "cuvq: `replacements` must hold float, __half or __nv_bfloat16");

    const auto s = to_state(function, state);
    ema_args<typename State::value_type, R> a;
    a.state = s;
    a.counts = read_only(to_vector(function, "counts", counts));
    check_extent(function, "counts", "elements", a.counts.size, s.codebook.rows, "the rows of state.codebook");
    a.sums = read_only(to_matrix(function, "sums", sums));
    check_extent(function, "sums", "rows", a.sums.rows, s.codebook.rows, "the rows of state.codebook");
    check_extent(function, "sums", "columns", a.sums.columns, s.codebook.columns, "the columns of state.codebook");
    if constexpr (replaces) {
        a.replacements = read_only(to_matrix(function, "replacements", replacements));
        check_extent(function, "replacements", "columns", a.replacements.columns, s.codebook.columns,
                     "the columns of state.codebook");
    }
    a.replacement_indices = check_ema_params(function, params, s.codebook.rows, replaces);
    check_state_disjoint(function, s, {{"params.stats", params.stats, sizeof(step_stats)}},
                         {{"counts", a.counts},
                          {"sums", a.sums},
                          {"replacements", a.replacements},
                          {"params.replacement_indices", a.replacement_indices}});
    return a;
}

template <class State, class XView, class CodesView>
auto validate_ema_update(const char* function, const State& state, const XView& x, const CodesView& codes,
                         const ema_params& params) {
    CUVQ_ASSERT_MATRIX(XView, "x");
    CUVQ_ASSERT_ELEMENT(XView, "x");
    CUVQ_ASSERT_VECTOR(CodesView, "codes");
    CUVQ_ASSERT_CODES(CodesView, "codes");
    const auto s = to_state(function, state);
    using T = typename State::value_type;
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, value_of<XView>>,
                  "cuvq: the state's codebook must hold float or the element type of `x`");

    update_args<T, value_of<XView>> a;
    a.state = s;
    a.x = read_only(to_matrix(function, "x", x));
    check_extent(function, "x", "columns", a.x.columns, s.codebook.columns, "the columns of state.codebook");
    a.codes = read_only(to_codes(function, "codes", codes, s.codebook.rows));
    check_extent(function, "codes", "elements", a.codes.size, a.x.rows, "one for each row of x");
    a.weights = check_weights(function, params.weights, a.x.rows);
    a.replacement_indices = check_ema_params(function, params, s.codebook.rows, true);
    check_state_disjoint(function, s, {{"params.stats", params.stats, sizeof(step_stats)}},
                         {{"x", a.x},
                          {"codes", a.codes},
                          {"params.weights", a.weights},
                          {"params.replacement_indices", a.replacement_indices}});
    return a;
}

template <class State, class XView, class CodesView, class QuantizedView>
auto validate_train_step(const char* function, const State& state, const XView& x, const CodesView& codes,
                         const QuantizedView& quantized, const train_params& params) {
    static_assert(state_traits<State>::is_state, "cuvq: `state` must be a cuvq::codebook_state");
    train_args<typename State::value_type, value_of<XView>> a;
    a.update = validate_ema_update(function, state, x, codes, params);
    quantize_params search;
    search.metric = params.metric;
    search.accuracy = params.accuracy;
    a.quantize = validate_quantize(function, x, state.codebook, codes, quantized, discard, search, "state.codebook");
    check_state_disjoint(
        function, a.update.state,
        {{"codes", a.quantize.codes},
         {"quantized", a.quantize.quantized},
         {"params.stats", params.stats, sizeof(step_stats)}},
        {{"params.weights", a.update.weights}, {"params.replacement_indices", a.update.replacement_indices}});
    return a;
}

template <class CodebookView, class CodesView, class QuantizedView>
auto validate_lookup(const char* function, const CodebookView& codebook, const CodesView& codes,
                     const QuantizedView& quantized) {
    CUVQ_ASSERT_MATRIX(CodebookView, "codebook");
    CUVQ_ASSERT_ELEMENT(CodebookView, "codebook");
    CUVQ_ASSERT_VECTOR(CodesView, "codes");
    CUVQ_ASSERT_CODES(CodesView, "codes");
    CUVQ_ASSERT_MATRIX(QuantizedView, "quantized");
    CUVQ_ASSERT_ELEMENT(QuantizedView, "quantized");
    CUVQ_ASSERT_WRITABLE(QuantizedView, "quantized");
    using T = value_of<QuantizedView>;
    using C = value_of<CodebookView>;
    static_assert(std::is_same_v<C, float> || std::is_same_v<C, T>,
                  "cuvq: `codebook` must hold float or the element type of `quantized`");

    lookup_args<T, C> a;
    a.codebook = read_only(to_matrix(function, "codebook", codebook));
    check_not_empty(function, "codebook", a.codebook.rows, a.codebook.columns);
    a.codes = read_only(to_codes(function, "codes", codes, a.codebook.rows));
    a.quantized = to_matrix(function, "quantized", quantized, true);
    check_extent(function, "quantized", "rows", a.quantized.rows, a.codes.size, "one for each code");
    check_extent(function, "quantized", "columns", a.quantized.columns, a.codebook.columns,
                 "the columns of the codebook");
    check_disjoint(function, {{"quantized", a.quantized}}, {{"codebook", a.codebook}, {"codes", a.codes}});
    return a;
}

#undef CUVQ_ASSERT_MATRIX
#undef CUVQ_ASSERT_VECTOR
#undef CUVQ_ASSERT_MATRIX_OR_DISCARD
#undef CUVQ_ASSERT_VECTOR_OR_DISCARD
#undef CUVQ_ASSERT_ELEMENT
#undef CUVQ_ASSERT_CODES
#undef CUVQ_ASSERT_WRITABLE
#undef CUVQ_ASSERT_FLOAT

}  // namespace cuvq::detail
