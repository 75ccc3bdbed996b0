// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/image.cuh>

namespace cuvq::device {

/// What all rows of one image are measured with. Any values will do, as long as they are the same for all.
struct image_frame {
    const float* centre = nullptr;  ///< [D] aligned to 16 bytes
    float scale = 1;                ///< a power of two
    float shift = 0;                ///< g of n = g - |C|^2 / 2, see `certificate.cuh`
};

/// n of a code, |C|^2 = `norm`, in three halves.
struct image_offset {
    double value, rest;  // rest: what the halves leave of it
    __half parts[3];

    __device__ image_offset(float shift, double norm, bool finite)
        : value(finite ? static_cast<double>(shift) - 0.5 * norm : -60000.0), rest(value) {
#pragma unroll
        for (int p = 0; p < 3; ++p) {
            parts[p] = __float2half_rn(static_cast<float>(rest));
            rest -= static_cast<double>(__half2float(parts[p]));
        }
        if (!finite) parts[1] = parts[2] = __float2half_rn(0.0f);
    }
};

/// What `write_image_row` gives, from |C^|^2, |C - C^|^2 and n of a finite code.
__device__ inline int image_row_bits(double length, double residual, const image_offset& n) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane >= 4) return 0;
    constexpr double up = 1.0001;
    const double root = sqrt(lane == 0 ? length : residual);
    const double bound = lane < 2 ? root : fabs(lane == 2 ? n.value : n.rest);
    return __float_as_int(static_cast<float>(bound * up)) & 0x7FFFFFFF;
}

/// Adds up each of three values over the lanes of a warp.
__device__ inline void sum_over_warp(double& a, double& b, double& c) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        a += __shfl_xor_sync(0xFFFFFFFFu, a, step);
        b += __shfl_xor_sync(0xFFFFFFFFu, b, step);
        c += __shfl_xor_sync(0xFFFFFFFFu, c, step);
    }
}

/// As `write_image_row`, for rows of two halves: a lane for each column.
template <class C>
__device__ int write_twofold_image_row(char* tile, const arch::slab_layout& layout, int r, const C* row,
                                       const operand_columns& place, const image_frame& frame) {
    const int lane = static_cast<int>(threadIdx.x) % 32, d = place.element(lane);
    const bool holds = place.holds(lane) && row != nullptr;
    const float c = holds ? static_cast<float>(row[d]) : 0.0f;
    const double v = holds ? frame.scale * (widened(c) - widened(frame.centre[d])) : 0.0;
    const __half high = __double2half(v);
    const double beside = v - static_cast<double>(__half2float(high));
    const __half low = __double2half(beside);
    const double kept = static_cast<double>(__half2float(high)) + static_cast<double>(__half2float(low));
    const bool counts = lane < place.data;
    double norm = counts ? v * v : 0, length = counts ? kept * kept : 0,
           residual = counts ? (v - kept) * (v - kept) : 0;
    sum_over_warp(norm, length, residual);
    const bool finite = __all_sync(0xFFFFFFFFu, isfinite(c)) && row != nullptr;
    const image_offset n(frame.shift, norm, finite);
    __half half = __float2half_rn(0.0f);
    if (finite && holds) half = place.low_of_code(lane) ? low : high;
#pragma unroll
    for (int p = 0; p < 3; ++p)
        if (lane == place.width + p) half = n.parts[p];
    if (lane < layout.columns())
        reinterpret_cast<__half*>(tile + layout.offset(image_tile, r, lane & ~7))[lane & 7] = half;
    // 1.002 times the norm, for the sums that `certificate.cuh` speaks of.
    return finite ? image_row_bits(1.004 * length, residual, n) : 0;
}

/// Writes row `r` of a tile of an image (see `image_ref`): that of the code `row`, or, if that is null, of no code.
/// Called by a whole warp, converged. Lane i < 4 gets entry i of the row's `score_bounds`, as the bits of a float,
/// which order as integers do since none is negative, and a NaN above Inf; the others get 0, and all do for a code
/// that is not finite. Everything is measured in double.
template <class C>
__device__ int write_image_row(char* tile, const arch::slab_layout& layout, int r, const C* row, int columns,
                               const image_frame& frame) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const operand_columns place(columns, layout);
    if (place.twofold) return write_twofold_image_row(tile, layout, r, row, place, frame);
    const int whole = columns / 4, quads = layout.row_bytes() / 8;  // of four columns; nothing but data; all
    const bool vectors = is_aligned4(row);
    const double scale = frame.scale;
    double norm = 0, residual = 0, length = 0;
    bool finite = row != nullptr;
    const auto store = [&](int quad, const __half(&half)[4]) {
        *reinterpret_cast<uint2*>(tile + layout.offset(image_tile, r, quad / 2 * 8) + quad % 2 * 8) =
            *reinterpret_cast<const uint2*>(half);
    };
    alignas(8) __half last[4] = {};  // in the lane of quad `whole`: the rest of the data
#pragma unroll 1
    for (int quad = lane; 4 * quad < columns && row; quad += 32) {
        alignas(8) __half half[4];
        const float4 c4 = vectors && quad < whole ? load4(row + 4 * quad) : load4(row, 4 * quad, columns);
        const float4 m4 = quad < whole ? load4(frame.centre + 4 * quad) : load4(frame.centre, 4 * quad, columns);
        const float c[4] = {c4.x, c4.y, c4.z, c4.w}, m[4] = {m4.x, m4.y, m4.z, m4.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            finite = finite && isfinite(c[e]);
            const double v = scale * (widened(c[e]) - widened(m[e]));
            half[e] = __float2half_rn(static_cast<float>(v));
            const double rounded = static_cast<double>(__half2float(half[e]));
            norm += v * v;
            length += rounded * rounded;
            residual += (v - rounded) * (v - rounded);
        }
        if (quad < whole) {
            store(quad, half);
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) last[e] = half[e];
        }
    }
    sum_over_warp(norm, length, residual);
    finite = __all_sync(0xFFFFFFFFu, finite);
    const image_offset n(frame.shift, norm, finite);
    // What follows the data; of a code that is not finite, everything.
#pragma unroll 1
    for (int quad = lane; quad < quads; quad += 32) {
        if (finite && quad < whole) continue;
        alignas(8) __half half[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int d = 4 * quad + e;
            half[e] = quad == whole && d < columns && finite ? last[e] : __float2half_rn(0.0f);
#pragma unroll
            for (int p = 0; p < 3; ++p)
                if (d == place.width + p) half[e] = n.parts[p];
        }
        store(quad, half);
    }
    return finite ? image_row_bits(length, residual, n) : 0;
}

}  // namespace cuvq::device
