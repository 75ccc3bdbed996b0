// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The views that callers pass, and the plain references that cuvq makes of them once, at the door.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <cuda/std/mdspan>

#include <cuvq/version.hpp>
#include <cuvq/workspace.hpp>

#if defined(__has_include)
#if __has_include(<cuda_fp16.h>) && __has_include(<cuda_bf16.h>)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
/// 1 where `__half` and `__nv_bfloat16` are element types of cuvq, else 0.
#define CUVQ_HAS_HALF 1
#endif
#endif
#ifndef CUVQ_HAS_HALF
#define CUVQ_HAS_HALF 0
#endif

namespace cuvq {

/// An extent that is known at run time only.
inline constexpr std::size_t dynamic_extent = static_cast<std::size_t>(-1);

/// A row-major matrix [rows x D]; a D given here is fixed at compile time. Any other `cuda::std::mdspan` of rank 2
/// with `layout_right`, or with `layout_stride` and unit last stride, serves as well.
template <class T, std::size_t D = dynamic_extent>
using matrix_view = cuda::std::mdspan<T, cuda::std::extents<std::int64_t, dynamic_extent, D>>;

/// A contiguous vector. Any other `cuda::std::mdspan` of rank 1 and unit stride serves as well.
template <class T>
using vector_view = cuda::std::mdspan<T, cuda::std::extents<std::int64_t, dynamic_extent>>;

/// The type of `discard`.
struct discard_t {};

/// Passed in place of an optional view: that output is not computed (or that input is absent) and costs nothing.
inline constexpr discard_t discard{};

/// The trained state of one codebook of K codes in D dimensions: a trivially copyable bundle of contiguous views
/// (of device memory for the functions of `cuvq`, of host memory for those of `cuvq::reference`).
/// @tparam T element of the codebook: float, __half or __nv_bfloat16.
/// @tparam D dimensions, or `dynamic_extent`.
template <class T, std::size_t D = dynamic_extent>
struct codebook_state {
    using value_type = T;
    static constexpr std::size_t static_dimensions = D;

    matrix_view<T, D> codebook;                    ///< [K x D] the rows that vectors are quantized to
    matrix_view<float, D> embed_sum;               ///< [K x D] moving average of the sums of each code's vectors
    vector_view<float> cluster_size;               ///< [K] moving average of the number of each code's vectors
    vector_view<std::int32_t> steps_since_active;  ///< [K] updates since a vector last had this code
    /// [1] updates made so far, below 2^48; each adds one, and uses the bits above while it runs.
    std::int64_t* step = nullptr;
    /// What `prepare` made of `codebook`, or empty. `train_step` searches with it, and all updates keep it fresh.
    prepared_codebook prepared{};
};

/// A matrix as kernels and loops see it: element (i, d) lies at data[i * stride + d].
template <class T>
struct matrix_ref {
    T* data = nullptr;
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    std::int64_t stride = 0;

    CUVQ_HOST_DEVICE T* row(std::int64_t i) const { return data + i * stride; }
    CUVQ_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

/// A contiguous vector as kernels and loops see it.
template <class T>
struct vector_ref {
    T* data = nullptr;
    std::int64_t size = 0;

    CUVQ_HOST_DEVICE T& operator[](std::int64_t i) const { return data[i]; }
    CUVQ_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

/// The integer types a vector of codes may have.
enum class code_type : std::uint8_t { int32, int64, uint8, uint16, uint32 };

/// A vector of codes whose integer type is a run-time value, so that no kernel is instantiated per code type.
template <class Void>
struct basic_codes_ref {
    Void* data = nullptr;
    std::int64_t size = 0;
    code_type type = code_type::int32;

    template <class Int>
    CUVQ_HOST_DEVICE auto* as() const {
        return static_cast<std::conditional_t<std::is_const_v<Void>, const Int, Int>*>(data);
    }

    /// Of a code.
    CUVQ_HOST_DEVICE int bytes() const {
        return type == code_type::int64 ? 8 : type == code_type::uint8 ? 1 : type == code_type::uint16 ? 2 : 4;
    }

    /// Codes from the i-th on.
    basic_codes_ref from(std::int64_t i) const {
        using byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
        return {static_cast<byte*>(data) + i * bytes(), size - i, type};
    }

    /// Code i. What marks an invalid row (-1, all bits set in unsigned types) is outside [0, K) here too, except
    /// where K is 2^bits and that value is a code.
    CUVQ_HOST_DEVICE std::int64_t load(std::int64_t i) const {
        switch (type) {
            case code_type::int64: return as<std::int64_t>()[i];
            case code_type::uint8: return as<std::uint8_t>()[i];
            case code_type::uint16: return as<std::uint16_t>()[i];
            case code_type::uint32: return as<std::uint32_t>()[i];
            default: return as<std::int32_t>()[i];
        }
    }

    /// Whether a code is what marks a row without one in an unsigned type.
    CUVQ_HOST_DEVICE bool is_mark(std::int64_t code) const {
        return (type == code_type::uint8 && code == 0xFF) || (type == code_type::uint16 && code == 0xFFFF) ||
               (type == code_type::uint32 && code == 0xFFFFFFFF);
    }

    /// Writes code i; -1 becomes all bits set.
    CUVQ_HOST_DEVICE void store(std::int64_t i, std::int64_t code) const {
        switch (type) {
            case code_type::int64: as<std::int64_t>()[i] = code; break;
            case code_type::uint8: as<std::uint8_t>()[i] = static_cast<std::uint8_t>(code); break;
            case code_type::uint16: as<std::uint16_t>()[i] = static_cast<std::uint16_t>(code); break;
            case code_type::uint32: as<std::uint32_t>()[i] = static_cast<std::uint32_t>(code); break;
            default: as<std::int32_t>()[i] = static_cast<std::int32_t>(code); break;
        }
    }
};

using codes_ref = basic_codes_ref<void>;
using const_codes_ref = basic_codes_ref<const void>;

/// A codebook_state as kernels and loops see it.
template <class T>
struct state_ref {
    matrix_ref<T> codebook;
    matrix_ref<float> embed_sum;
    vector_ref<float> cluster_size;
    vector_ref<std::int32_t> steps_since_active;
    std::int64_t* step = nullptr;
};

}  // namespace cuvq
