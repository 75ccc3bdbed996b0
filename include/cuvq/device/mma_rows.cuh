// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The rows of a block of the search on tensor cores: made into its operand, and measured for the certificate.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/mma_shape.cuh>

namespace cuvq::device {

#if CUVQ_HAS_MMA

/// Rows on their way into shared memory, eight lanes each.
template <class Policy, class X, class C>
struct mma_rows : mma_block<Policy, X, C> {
    using block = mma_block<Policy, X, C>;
    using block::columns, block::slabs, block::whole, block::memory, block::rows, block::image;
    using block::group, block::group_lane, block::words, block::errors;
    using typename block::shape;

    static constexpr int each = Policy::rows / shape::groups;  // rows that a group of eight lanes converts
    const operand_columns place;

    __device__ explicit mma_rows(const block& b) : block(b), place(columns, image.layout) {}

    /// A group's lane's part of one slab: 8 columns of each of its rows.
    using row_share = float[each][8];

    /// The elements of x for these columns, zeros beyond the last. Beyond the last row, that one again: nobody looks at
    /// what comes of it.
    __device__ void load(int slab, row_share& v) const {
        const int first = 64 * slab + 8 * group_lane;
        const auto row = [&](int i) {
            const std::int64_t r = group + i * shape::groups;
            return rows.row(r < rows.rows ? r : rows.rows - 1);
        };
        if (slab < whole) {  // one branch for all loads, so that they overlap
#pragma unroll
            for (int i = 0; i < each; ++i) {
                const float4 low = load4(row(i) + first), high = load4(row(i) + first + 4);
                v[i][0] = low.x, v[i][1] = low.y, v[i][2] = low.z, v[i][3] = low.w;
                v[i][4] = high.x, v[i][5] = high.y, v[i][6] = high.z, v[i][7] = high.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < each; ++i)
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    v[i][e] = place.holds(first + e) ? static_cast<float>(row(i)[place.element(first + e)]) : 0.0f;
        }
    }
    /// Makes scale (x - centre) of them, with one rounding: the scale is a power of two, and these multiply-adds keep
    /// subnormal numbers whatever the compiler's flags.
    __device__ void centre(int slab, float scale, row_share& v) const {
        const int first = 64 * slab + 8 * group_lane;
        float c[8];
        if (!place.twofold && first + 8 <= columns) {
            const float4 low = load4(image.centre + first), high = load4(image.centre + first + 4);
            c[0] = low.x, c[1] = low.y, c[2] = low.z, c[3] = low.w;
            c[4] = high.x, c[5] = high.y, c[6] = high.z, c[7] = high.w;
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e) c[e] = place.holds(first + e) ? image.centre[place.element(first + e)] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < each; ++i)
#pragma unroll
            for (int e = 0; e < 8; ++e) v[i][e] = __fmaf_ieee_rn(__fmaf_ieee_rn(-1.0f, c[e], v[i][e]), scale, 0.0f);
    }
    /// Writes centred columns to buffer `to` in fp16, times the rows' factors, and the factors themselves in the three
    /// columns behind the data. Adds the squares of what rounding leaves to `residual`, or does that alone.
    template <bool MeasureOnly>
    __device__ void store(int slab, const float (&factor)[each], const row_share& v, int to,
                          float (&residual)[each]) const {
        const int first = 64 * slab + 8 * group_lane, width = image.layout.width(slab);
        const bool inside = 8 * group_lane < width;
        static_assert(shape::groups % 8 == 0, "so that a lane's rows are swizzled alike");
        char* to_first = memory + shape::rows + to * shape::row_slab_bytes +
                         arch::slab_layout::chunk_offset(width, group, inside ? group_lane : 0);
#pragma unroll
        for (int i = 0; i < each; ++i) {
            alignas(16) __half2 out[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float2 u{factor[i] * v[i][2 * e], factor[i] * v[i][2 * e + 1]};
                out[e] = __floats2half2_rn(u.x, u.y);
                const float2 back = __half22float2(out[e]);
                float2 beside{u.x - back.x, u.y - back.y};
                if (place.twofold) {
                    const __half2 low = __floats2half2_rn(beside.x, beside.y);
                    const float2 taken = __half22float2(low);
                    const int j = first + 2 * e;
                    beside.x = j < columns ? beside.x - taken.x : 0.0f;
                    beside.y = j + 1 < columns ? beside.y - taken.y : 0.0f;
                    out[e] = __halves2half2(__low2half(place.low_of_row(j) ? low : out[e]),
                                            __high2half(place.low_of_row(j + 1) ? low : out[e]));
                }
                residual[i] = fmaf(beside.x, beside.x, fmaf(beside.y, beside.y, residual[i]));
            }
            if (MeasureOnly) continue;
            if (first + 8 > place.width) {
                __half* half = reinterpret_cast<__half*>(out);
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const int beyond = first + e - place.width;
                    if (beyond >= 0) half[e] = __float2half_rn(beyond < 3 ? factor[i] : 0.0f);
                }
            }
            if (inside)
                *reinterpret_cast<uint4*>(to_first + i * shape::groups * 2 * width) = *reinterpret_cast<uint4*>(out);
        }
    }

    /// Measures all rows: errors and factors; writes the operand too, if it is to stay.
    __device__ void convert_rows(float (&factor)[each]) const {
        const auto* b = reinterpret_cast<const float*>(words());
        const score_bounds bounds{b[0], b[1], b[2], b[3]};
        const float scale = *image.scale;
        const auto sum_over_group = [](float v) {
#pragma unroll
            for (int step = 1; step < exact_lanes; step *= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, step);
            return v;
        };
        float square[each] = {}, residual[each] = {};
        bool fits = true;
#pragma unroll
        for (int i = 0; i < each; ++i) factor[i] = 1.0f;
        const auto convert = [&](int slab, row_share& v) {
            centre(slab, scale, v);
#pragma unroll
            for (int i = 0; i < each; ++i)
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    if (!place.twofold || 8 * group_lane + e < columns) square[i] = fmaf(v[i][e], v[i][e], square[i]);
            store<Policy::streamed>(slab, factor, v, slab, residual);
        };
        row_share even, odd;  // one is on its way while the other is converted
        load(0, even);
        for (int slab = 0; slab < slabs; slab += 2) {
            if (slab + 1 < slabs) load(slab + 1, odd);
            convert(slab, even);
            if (slab + 2 < slabs) load(slab + 2, even);
            if (slab + 1 < slabs) convert(slab + 1, odd);
        }
#pragma unroll
        for (int i = 0; i < each; ++i) {
            square[i] = sum_over_group(square[i]);
            factor[i] = row_factor(square[i]);
            fits = fits && factor[i] == 1.0f;
        }
        if (!__all_sync(0xFFFFFFFFu, fits)) {  // rarely: once more, with the right factors
#pragma unroll
            for (int i = 0; i < each; ++i) residual[i] = 0;
            for (int slab = 0; slab < slabs; ++slab) {
                row_share v;
                load(slab, v);
                centre(slab, scale, v);
                store<Policy::streamed>(slab, factor, v, slab, residual);
            }
        }
#pragma unroll
        for (int i = 0; i < each; ++i) {
            // 1.0005 and 1e-16 cover the rounding and the underflow of the sums of squares; 2^-23 that of x - centre,
            // 2^-21 the products of low halves.
            const float length = 1.0005f * factor[i] * sqrtf(square[i]) + 1e-16f;
            const float rest = 1.0005f * sqrtf(sum_over_group(residual[i])) + 1e-16f + 0x1.4p-21f * length;
            const int steps = 4 * (slabs - 1) + image.layout.width(slabs - 1) / 16;
            const float error = score_error(length, rest, factor[i], bounds, steps);
            if (group_lane == 0)
                errors()[group + i * shape::groups] = factor[i] > 0 ? error : __int_as_float(0x7FC00000);
        }
    }
};

#endif  // CUVQ_HAS_MMA

}  // namespace cuvq::device
