// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// At compile time: which types are views, of what; which are codebook states.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <cuvq/views.hpp>

namespace cuvq::detail {

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

}  // namespace cuvq::detail
