// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// One view, or one state, to plain references, and what can be wrong with it by itself, its memory not read.
#pragma once

#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <type_traits>

#include <cuvq/detail/view_types.hpp>
#include <cuvq/error.hpp>
#include <cuvq/views.hpp>

namespace cuvq::detail {

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

}  // namespace cuvq::detail
