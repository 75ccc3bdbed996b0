// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Type lists of typed tests, and the names they are reported by.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include <gtest/gtest.h>

#include <cuvq/views.hpp>

namespace cuvq::test {

/// The element types of x and of the codebook.
template <class X, class C>
struct elements {
    using x = X;
    using codebook = C;
};

#if CUVQ_HAS_HALF
using element_types = testing::Types<float, __half, __nv_bfloat16>;
using element_pairs = testing::Types<elements<float, float>, elements<__half, __half>, elements<__half, float>,
                                     elements<__nv_bfloat16, __nv_bfloat16>, elements<__nv_bfloat16, float>>;
#else
using element_types = testing::Types<float>;
using element_pairs = testing::Types<elements<float, float>>;
#endif
using code_types = testing::Types<std::int32_t, std::int64_t, std::uint8_t, std::uint16_t, std::uint32_t>;

template <class T>
struct type_name {
    static std::string get() {
        if constexpr (std::is_integral_v<T>)
            return (std::is_signed_v<T> ? "int" : "uint") + std::to_string(8 * sizeof(T));
        else
            return other(T{});
    }

private:
    static std::string other(float) { return "float"; }
#if CUVQ_HAS_HALF
    static std::string other(__half) { return "half"; }
    static std::string other(__nv_bfloat16) { return "bfloat16"; }
#endif
};
template <class X, class C>
struct type_name<elements<X, C>> {
    static std::string get() { return type_name<X>::get() + "_" + type_name<C>::get() + "_codebook"; }
};

/// Third argument of TYPED_TEST_SUITE.
struct type_names {
    template <class T>
    static std::string GetName(int) {
        return type_name<T>::get();
    }
};

}  // namespace cuvq::test
