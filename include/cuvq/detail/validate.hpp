// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The door of the library: every public function, on the GPU and on the CPU, turns its views into plain references
// here, and everything that can be wrong with an argument without reading device memory is found here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <string>
#include <type_traits>

#include <cuvq/error.hpp>
#include <cuvq/params.hpp>
#include <cuvq/views.hpp>
#include <cuvq/workspace.hpp>

namespace cuvq::detail {

// ---- compile time: is it a view, and of the right type? --------------------------------------------------------

template <class V>
struct view_traits {
    static constexpr int rank = -1;
    static constexpr bool plain = false;
    using element = void;
};
template <class T, class Extents, class Layout, class Accessor>
struct view_traits<cuda::std::mdspan<T, Extents, Layout, Accessor>> {
    static constexpr int rank = static_cast<int>(Extents::rank());
    static constexpr bool plain =
        (std::is_same_v<Layout, cuda::std::layout_right> ||
         std::is_same_v<Layout, cuda::std::layout_stride>)&&std::is_same_v<Accessor, cuda::std::default_accessor<T>>;
    using element = T;
};

template <class V>
inline constexpr bool is_matrix = view_traits<V>::rank == 2 && view_traits<V>::plain;
template <class V>
inline constexpr bool is_vector = view_traits<V>::rank == 1 && view_traits<V>::plain;
template <class V>
inline constexpr bool is_discard = std::is_same_v<V, discard_t>;
template <class V>
using value_of = std::remove_const_t<typename view_traits<V>::element>;
template <class V>
inline constexpr bool is_writable = !std::is_const_v<typename view_traits<V>::element>;

template <class T>
inline constexpr bool is_element = std::is_same_v<T, float>
#if CUVQ_HAS_HALF
                                   || std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>
#endif
    ;

template <class T>
inline constexpr int code_type_index = std::is_same_v<T, std::int32_t>    ? 0
                                       : std::is_same_v<T, std::int64_t>  ? 1
                                       : std::is_same_v<T, std::uint8_t>  ? 2
                                       : std::is_same_v<T, std::uint16_t> ? 3
                                       : std::is_same_v<T, std::uint32_t> ? 4
                                                                          : -1;

template <class S>
struct state_traits {
    static constexpr bool is_state = false;
    using value = void;
};
template <class T, std::size_t D>
struct state_traits<codebook_state<T, D>> {
    static constexpr bool is_state = true;
    using value = T;
};

/// Columns that the type of a matrix view fixes, or dynamic_extent.
template <class V>
constexpr std::size_t static_columns() {
    if constexpr (is_matrix<V>)
        return V::static_extent(1);
    else
        return dynamic_extent;
}

// ---- texts ------------------------------------------------------------------------------------------------------

inline std::string text(std::int64_t n) { return std::to_string(n); }
inline std::string text(double v) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%.9g", v);
    return buffer;
}
inline const char* name_of(code_type t) {
    switch (t) {
        case code_type::int64: return "int64";
        case code_type::uint8: return "uint8";
        case code_type::uint16: return "uint16";
        case code_type::uint32: return "uint32";
        default: return "int32";
    }
}

// ---- one view to one reference ----------------------------------------------------------------------------------

template <class Int>
std::int64_t narrow(const char* function, const char* argument, Int extent) {
    if constexpr (std::is_signed_v<Int>) {
        if (extent < 0) bad_argument(function, argument, "an extent or stride of " + text(extent), "none below 0");
    }
    if (static_cast<std::uint64_t>(extent) > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
        bad_argument(function, argument, "an extent or stride of " + std::to_string(extent), "none above 2^63 - 1");
    return static_cast<std::int64_t>(extent);
}

/// Null, alignment and address range of `elements` elements of T.
template <class T>
void check_memory(const char* function, const char* argument, const T* data, std::int64_t rows, std::int64_t stride,
                  std::int64_t columns) {
    if (rows == 0 || columns == 0) return;
    constexpr std::int64_t limit = std::numeric_limits<std::int64_t>::max() / static_cast<std::int64_t>(sizeof(T));
    if (columns > limit || (rows > 1 && stride > (limit - columns) / (rows - 1)))
        bad_argument(function, argument, text(rows) + " x " + text(columns) + " elements, row stride " + text(stride),
                     "fewer than 2^63 bytes");
    if (data == nullptr)
        bad_argument(function, argument, "a null pointer", text(rows) + " x " + text(columns) + " elements");
    if (reinterpret_cast<std::uintptr_t>(data) % alignof(T) != 0)
        bad_argument(function, argument, "a misaligned pointer", text(std::int64_t{alignof(T)}) + "-byte alignment");
}

/// `written`: rows may not overlap. (An input may: a sliding window, one row many times.)
template <class V>
auto to_matrix(const char* function, const char* argument, const V& view, bool written = false) {
    using T = typename view_traits<V>::element;
    matrix_ref<T> m;
    m.data = view.data_handle();
    m.rows = narrow(function, argument, view.extent(0));
    m.columns = narrow(function, argument, view.extent(1));
    if (m.columns > 1 && view.stride(1) != 1)
        bad_argument(function, argument, "last stride " + std::to_string(view.stride(1)),
                     "1 (the elements of a row lie side by side)");
    m.stride = m.rows > 1 ? narrow(function, argument, view.stride(0)) : m.columns;
    check_memory(function, argument, m.data, m.rows, m.stride, m.columns);
    if (written && m.stride < m.columns)
        bad_argument(function, argument, "row stride " + text(m.stride) + " for " + text(m.columns) + " columns",
                     "rows that do not overlap, since it is written");
    return m;
}

template <class V>
auto to_vector(const char* function, const char* argument, const V& view) {
    using T = typename view_traits<V>::element;
    vector_ref<T> v;
    v.data = view.data_handle();
    v.size = narrow(function, argument, view.extent(0));
    if (v.size > 1 && view.stride(0) != 1)
        bad_argument(function, argument, "stride " + std::to_string(view.stride(0)), "1 (a contiguous vector)");
    check_memory(function, argument, v.data, std::int64_t{1}, v.size, v.size);
    return v;
}

template <class V>
auto to_codes(const char* function, const char* argument, const V& view, std::int64_t code_count) {
    using T = typename view_traits<V>::element;
    using Void = std::conditional_t<std::is_const_v<T>, const void, void>;
    const auto v = to_vector(function, argument, view);
    basic_codes_ref<Void> codes{v.data, v.size, static_cast<code_type>(code_type_index<value_of<V>>)};
    if (static_cast<std::uint64_t>(code_count - 1) > static_cast<std::uint64_t>(std::numeric_limits<T>::max()))
        bad_argument(function, argument, std::string(name_of(codes.type)) + " elements for K = " + text(code_count),
                     "a type that holds K - 1");
    return codes;
}

template <class T>
matrix_ref<const T> read_only(const matrix_ref<T>& m) {
    return {m.data, m.rows, m.columns, m.stride};
}
template <class T>
vector_ref<const T> read_only(const vector_ref<T>& v) {
    return {v.data, v.size};
}
template <class Void>
const_codes_ref read_only(const basic_codes_ref<Void>& c) {
    return {c.data, c.size, c.type};
}

inline void check_extent(const char* function, const char* argument, const char* what, std::int64_t got,
                         std::int64_t wants, const char* as) {
    if (got != wants) bad_argument(function, argument, text(got) + " " + what, text(wants) + ", " + as);
}

inline void check_not_empty(const char* function, const char* argument, std::int64_t rows, std::int64_t columns) {
    if (rows < 1) bad_argument(function, argument, "K = " + text(rows) + " rows", "at least 1");
    if (columns < 1) bad_argument(function, argument, "D = " + text(columns) + " columns", "at least 1");
    if (rows > std::numeric_limits<std::int64_t>::max() / 8 / columns)
        bad_argument(function, argument, text(rows) + " x " + text(columns) + " elements", "fewer than 2^63 bytes");
}

// ---- what is written may not overlap what is read or written elsewhere ------------------------------------------

struct memory {
    const char* name;
    std::uintptr_t begin = 0;
    std::int64_t rows = 0, row_bytes = 0, stride_bytes = 0;

    memory(const char* n, const void* p, std::int64_t bytes)
        : name(n),
          begin(reinterpret_cast<std::uintptr_t>(p)),
          rows(p && bytes ? 1 : 0),
          row_bytes(bytes),
          stride_bytes(bytes) {}
    template <class T>
    memory(const char* n, const matrix_ref<T>& m)
        : name(n),
          begin(reinterpret_cast<std::uintptr_t>(m.data)),
          rows(m.data && m.columns ? m.rows : 0),
          row_bytes(m.columns * static_cast<std::int64_t>(sizeof(T))),
          stride_bytes(m.stride * static_cast<std::int64_t>(sizeof(T))) {}
    template <class T>
    memory(const char* n, const vector_ref<T>& v) : memory(n, v.data, v.size * static_cast<std::int64_t>(sizeof(T))) {}
    template <class Void>
    memory(const char* n, const basic_codes_ref<Void>& c) : memory(n, c.data, c.size * code_bytes(c.type)) {}

    static std::int64_t code_bytes(code_type t) {
        return t == code_type::int64 ? 8 : t == code_type::uint8 ? 1 : t == code_type::uint16 ? 2 : 4;
    }
    std::uintptr_t end() const { return begin + static_cast<std::uintptr_t>((rows - 1) * stride_bytes + row_bytes); }
};

inline bool overlap(const memory& a, const memory& b) {
    if (a.rows == 0 || b.rows == 0 || a.end() <= b.begin || b.end() <= a.begin) return false;
    // Column blocks of one wider matrix interleave without touching.
    const std::int64_t stride = a.rows > 1 ? a.stride_bytes : b.stride_bytes;
    const bool same_rows = (a.rows == 1 || a.stride_bytes == stride) && (b.rows == 1 || b.stride_bytes == stride);
    if (!same_rows || stride == 0) return true;
    const std::int64_t distance = static_cast<std::int64_t>(b.begin - a.begin);
    const std::int64_t offset = ((distance % stride) + stride) % stride;
    return offset < a.row_bytes || offset + b.row_bytes > stride;
}

inline void check_disjoint(const char* function, std::initializer_list<memory> written,
                           std::initializer_list<memory> read) {
    for (auto w = written.begin(); w != written.end(); ++w) {
        for (auto other = w + 1; other != written.end(); ++other)
            if (overlap(*w, *other))
                bad_argument(function, w->name, std::string("memory that overlaps ") + other->name,
                             "memory of its own, since it is written");
        for (const memory& r : read)
            if (overlap(*w, r))
                bad_argument(function, w->name, std::string("memory that overlaps ") + r.name,
                             "memory of its own, since it is written");
    }
}

// ---- parameters -------------------------------------------------------------------------------------------------

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

// ---- whole argument lists ---------------------------------------------------------------------------------------

template <class State>
auto to_state(const char* function, const State& s) {
    static_assert(state_traits<State>::is_state, "cuvq: `state` must be a cuvq::codebook_state");
    using T = typename state_traits<State>::value;
    static_assert(is_element<T> && !std::is_const_v<T>,
                  "cuvq: a codebook_state holds float, __half or __nv_bfloat16, not const");
    state_ref<T> r;
    r.codebook = to_matrix(function, "state.codebook", s.codebook, true);
    check_not_empty(function, "state.codebook", r.codebook.rows, r.codebook.columns);
    r.embed_sum = to_matrix(function, "state.embed_sum", s.embed_sum, true);
    r.cluster_size = to_vector(function, "state.cluster_size", s.cluster_size);
    r.steps_since_active = to_vector(function, "state.steps_since_active", s.steps_since_active);
    const std::int64_t k = r.codebook.rows;
    check_extent(function, "state.embed_sum", "rows", r.embed_sum.rows, k, "the rows of state.codebook");
    check_extent(function, "state.embed_sum", "columns", r.embed_sum.columns, r.codebook.columns,
                 "the columns of state.codebook");
    check_extent(function, "state.cluster_size", "elements", r.cluster_size.size, k, "the rows of state.codebook");
    check_extent(function, "state.steps_since_active", "elements", r.steps_since_active.size, k,
                 "the rows of state.codebook");
    if (s.step == nullptr) bad_argument(function, "state.step", "a null pointer", "the counter of updates");
    if (reinterpret_cast<std::uintptr_t>(s.step) % alignof(std::int64_t) != 0)
        bad_argument(function, "state.step", "a misaligned pointer", "8-byte alignment");
    r.step = s.step;
    return r;
}

/// The five arrays of a state, then `also`, must lie apart from each other and from `read`.
template <class T>
void check_state_disjoint(const char* function, const state_ref<T>& s, std::initializer_list<memory> also,
                          std::initializer_list<memory> read) {
    const std::initializer_list<memory> state{{"state.codebook", s.codebook},
                                              {"state.embed_sum", s.embed_sum},
                                              {"state.cluster_size", s.cluster_size},
                                              {"state.steps_since_active", s.steps_since_active},
                                              {"state.step", s.step, sizeof(std::int64_t)}};
    check_disjoint(function, state, also);
    check_disjoint(function, state, read);
    check_disjoint(function, also, read);
}

template <class X, class C>
struct quantize_args {
    matrix_ref<const X> x;         // N x D
    matrix_ref<const C> codebook;  // K x D
    codes_ref codes;               // N
    matrix_ref<X> quantized;       // N x D, null: not asked for
    vector_ref<float> distances;   // N, null: not asked for
};

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

template <class X>
struct accumulate_args {
    matrix_ref<const X> x;            // N x D
    const_codes_ref codes;            // N
    vector_ref<const float> weights;  // N, null: all 1
    vector_ref<float> counts;         // K
    matrix_ref<float> sums;           // K x D
};

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

template <class T, class R>
struct ema_args {
    state_ref<T> state;                                  // K codes, D dimensions
    vector_ref<const float> counts;                      // K
    matrix_ref<const float> sums;                        // K x D
    matrix_ref<const R> replacements;                    // M x D, null: none
    vector_ref<const std::int64_t> replacement_indices;  // K, null: drawn
};

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

template <class T, class X>
struct update_args {
    state_ref<T> state;                                  // K codes, D dimensions
    matrix_ref<const X> x;                               // N x D
    const_codes_ref codes;                               // N
    vector_ref<const float> weights;                     // N, null: all 1
    vector_ref<const std::int64_t> replacement_indices;  // K, null: drawn
};

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

template <class T, class X>
struct train_args {
    quantize_args<X, T> quantize;
    update_args<T, X> update;
};

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

template <class T, class C>
struct lookup_args {
    matrix_ref<const C> codebook;  // K x D
    const_codes_ref codes;         // N
    matrix_ref<T> quantized;       // N x D
};

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
