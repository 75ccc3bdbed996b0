// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Rows of x on their way into shared memory as operands of the tensor cores.
#pragma once

#include <cstdint>
#include <cstring>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/kernel/filter_sm90.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// How a row of x came out in fp16: |X|, |X - X^| and t, as `device::score_error` takes them.
struct row_measure {
    float length, rest, factor;

    /// From sums of squares: of t s (x - centre), and of what fp16 does to it.
    __device__ static row_measure of(float square, float residual, float factor) {
        // 1.0005 and 1e-17 cover the rounding and the underflow of the sums and of their roots; 2^-23 the rounding of x
        // - centre, 2^-21 the products of low halves.
        const float length = 1.0005f * device::approximate_root(square) + 1e-17f;
        const float rest = 1.0005f * device::approximate_root(residual) + 1e-17f + 0x1.4p-21f * length;
        return {length, rest, factor};
    }
    /// The row's error bound; NaN if it did not fit.
    __device__ float error(const device::score_bounds& bounds, int steps) const {
        return device::score_error(length, rest, factor, bounds, steps);
    }
};

#if CUVQ_HAS_WGMMA

/// How a warp takes rows of x apart: `lanes` lanes share a row, and each holds columns 4 lanes s + 4 q to 4 lanes s +
/// 4 q + 3 of it, q its number among them.
template <int Steps>
struct row_split {
    static constexpr int lanes = Steps > 9 ? 8 : 4;
    static constexpr int rows = 32 / lanes;                    // at once
    static constexpr int parts = (4 * Steps - 1) / lanes + 1;  // of four columns in a lane

    __device__ static int lane() { return static_cast<int>(threadIdx.x) % lanes; }
    __device__ static int column(int s) { return 4 * (lanes * s + lane()); }

    /// Sum over the lanes of a row, in all of them.
    __device__ static float row_sum(float sum) {
#pragma unroll
        for (int step = 1; step < lanes; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        return sum;
    }
};

/// A row's columns that a lane holds of part `part`, zeros behind the data. `vectors`: loads of four serve.
template <int Steps, class X>
__device__ float4 load_part(const X* row, int columns, bool vectors, int part) {
    const int column = row_split<Steps>::column(part);
    if (!vectors) return device::load4(row, column, columns);
    return column < columns ? device::load4(row + column) : float4{0, 0, 0, 0};
}
template <class X>
__device__ bool loads_vectors(const matrix_ref<const X>& x) {
    return x.columns % 4 == 0 && has_aligned_rows(x);
}

/// A row on its way into its operand, in one lane of its lanes: t s (x - centre) in fp16, t the row's power of two.
template <int Steps>
struct row_image {
    using split = row_split<Steps>;
    using layout = arch::wgmma_layout<Steps>;
    char* operand;
    int row;
    float square = 0, residual = 0;  // sums of squares: of t s (x - centre), and of what fp16 does to it

    /// s (x - centre) of four columns, given the centre times s. These multiply-adds keep subnormal numbers whatever
    /// the compiler's flags.
    __device__ static float4 centred(const float4& x, float scale, const float4& centre) {
        return {__fmaf_ieee_rn(x.x, scale, -centre.x), __fmaf_ieee_rn(x.y, scale, -centre.y),
                __fmaf_ieee_rn(x.z, scale, -centre.z), __fmaf_ieee_rn(x.w, scale, -centre.w)};
    }
    /// Four columns of t s (x - centre), nothing but data.
    __device__ void put(const float4& v, int part) {
        const __half2 half[2] = {__floats2half2_rn(v.x, v.y), __floats2half2_rn(v.z, v.w)};
        write(half, part);
        measure(v, half);
    }
    /// Four columns, which are 0 behind the data; there t itself goes into the first three.
    __device__ void put_last(const float4& v, float factor, int columns, int part) {
        __half2 half[2] = {__floats2half2_rn(v.x, v.y), __floats2half2_rn(v.z, v.w)};
        measure(v, half);
        const int column = split::column(part);
        if (column >= layout::columns) return;
        const __half t = __float2half_rn(factor);
        __half* out = reinterpret_cast<__half*>(half);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (column + i >= columns && column + i < columns + 3) out[i] = t;
        write(half, part);
    }
    /// Behind nothing but data: t, and zeros.
    __device__ void put_factor(float factor, int columns, int part) {
        const int beyond = split::column(part) - columns;
        if (split::column(part) >= layout::columns) return;
        const __half2 zero = __float2half2_rn(0.0f), t = __float2half2_rn(factor);
        const __half2 half[2] = {beyond == 0 ? t : zero,
                                 beyond == 0 ? __halves2half2(__low2half(t), __low2half(zero)) : zero};
        write(half, part);
    }
    __device__ void measure(const float4& v, const __half2 (&half)[2]) {
        const float2 low = __half22float2(half[0]), high = __half22float2(half[1]);
        const float4 e{v.x - low.x, v.y - low.y, v.z - high.x, v.w - high.y};
        square = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, square))));
        residual = fmaf(e.x, e.x, fmaf(e.y, e.y, fmaf(e.z, e.z, fmaf(e.w, e.w, residual))));
    }
    __device__ void write(const __half2 (&half)[2], int part) {
        const int q = split::lane();
        char* to = operand + (layout::offset(scored_rows, row, 4 * split::lanes * part) ^ (q >> 1 << 4)) + (q & 1) * 8;
        *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(half);
    }
    /// Adds up what the lanes have seen, once all parts are there. Whether all rows of the warp fit fp16 so.
    __device__ bool fits() {
        square = split::row_sum(square);
        residual = split::row_sum(residual);
        return __all_sync(0xFFFFFFFFu, square < 0x1p26f);  // false for NaN
    }

    /// The whole row, `Batch` parts at a time; the t that it took. A row that is not `inside` is zeros.
    /// `vectors`: loads of four serve. `centre(column)`: four columns of the centre times the scale, zeros behind the
    /// last. `again`: it has been put already, and did not fit.
    template <int Batch, class X, class Centre>
    __device__ float put_all(const X* x, bool inside, int columns, bool vectors, Centre centre, float scale,
                             bool again) {
        for (float factor = 1.0f;; again = true) {
            if (again) factor = device::fitting_factor(square);
            square = residual = 0;
#pragma unroll 1
            for (int first = 0; first < split::parts; first += Batch) {
                float4 v[Batch];
#pragma unroll
                for (int i = 0; i < Batch; ++i) v[i] = load_part<Steps>(x, inside ? columns : 0, vectors, first + i);
                const auto centre_of = [&](int part) {  // beyond the operand, anything
                    return centre(min(split::column(part), layout::columns - 4));
                };
                float4 c = centre_of(first);
#pragma unroll
                for (int i = 0; i < Batch; ++i) {
                    const float4 u = centred(v[i], scale, c);
                    if (i + 1 < Batch) c = centre_of(first + i + 1);  // before the stores, which it may not pass
                    if (split::column(first + i) < layout::columns)
                        put_last({factor * u.x, factor * u.y, factor * u.z, factor * u.w}, factor, columns, first + i);
                }
            }
            if (fits() || again) return factor;
        }
    }

    /// What the row's error bound is made of.
    __device__ row_measure measured(float factor) const { return row_measure::of(square, residual, factor); }
};

/// A row on its way into an operand of a single step, by one thread.
struct short_row {
    static constexpr int most = 13;
    using layout = arch::wgmma_layout<1>;
    float v[most];

    /// Elements of x, zeros behind them. `vectors`: loads of four serve.
    template <class X>
    __device__ void load(const X* x, int columns, bool vectors) {
        if (vectors) {
#pragma unroll
            for (int d = 0; d + 4 <= most; d += 4) {
                const float4 u = d < columns ? device::load4(x + d) : float4{0, 0, 0, 0};
                v[d] = u.x, v[d + 1] = u.y, v[d + 2] = u.z, v[d + 3] = u.w;
            }
            v[most - 1] = 0;
        } else {
#pragma unroll
            for (int d = 0; d < most; ++d) v[d] = d < columns ? static_cast<float>(x[d]) : 0.0f;
        }
    }
    /// Writes t s (x - centre), and t. `centre(d)`: that element of the centre times the scale s, 0 behind the last.
    /// Whole warp, converged.
    template <class Centre>
    __device__ row_measure put(char* operand, int row, const device::operand_columns& place, float scale,
                               const Centre& centre) const {
        float u[most];
#pragma unroll
        for (int d = 0; d < most; ++d) u[d] = d < place.data ? __fmaf_ieee_rn(v[d], scale, -centre(d)) : 0.0f;
        float square = 0, residual = 0, factor = 1;
        for (bool again = false;; again = true) {
            __half half[16];
            square = residual = 0;
#pragma unroll
            for (int d = 0; d < most; ++d) {
                half[d] = __float2half_rn(u[d]);
                float beside = u[d] - __half2float(half[d]);
                if (place.twofold && d < place.most_twofold) {
                    const __half low = __float2half_rn(beside);
                    beside -= __half2float(low);
                    half[place.most_twofold + d] = low;
                    half[2 * place.most_twofold + d] = half[d];
                }
                square = fmaf(u[d], u[d], square);
                residual = fmaf(beside, beside, residual);
                if (place.twofold && d == place.most_twofold - 1) break;
            }
            const __half t = __float2half_rn(factor);
#pragma unroll
            for (int p = 0; p < 3; ++p) half[most + p] = t;
            if (place.twofold) {
                half[most - 1] = t;
                half[most + 2] = __float2half_rn(0.0f);
            }
#pragma unroll
            for (int chunk = 0; chunk < 2; ++chunk) {
                uint4 eight;
                memcpy(&eight, half + 8 * chunk, sizeof eight);
                *reinterpret_cast<uint4*>(operand + layout::offset(scored_rows, row, 8 * chunk)) = eight;
            }
            if (again || __all_sync(0xFFFFFFFFu, square < 0x1p26f)) break;  // false for NaN
            factor = device::fitting_factor(square);
#pragma unroll
            for (int d = 0; d < most; ++d) u[d] *= factor;
        }
        return row_measure::of(square, residual, factor);
    }
};

/// The centre of an image times its scale, zeros behind it, for a whole block.
__device__ inline void load_centre(const codebook_image& image, int columns, int padded, float* centre) {
    const float scale = *image.scale;
    // From the last thread on: `load_bounds` begins with the first, and their loads should not wait for each other.
    for (int d = static_cast<int>(blockDim.x - 1 - threadIdx.x); d < padded; d += blockDim.x)
        centre[d] = d < columns ? __fmaf_ieee_rn(scale, image.centre[d], 0.0f) : 0.0f;
}

/// The largest bounds of all codes, as integers, in `bounds`, which held zeros, for a whole block. To be read after a
/// barrier. `thread`: which share to take.
__device__ inline void load_bounds(const codebook_image& image, int tiles, int* bounds, int thread) {
    const int parts = tiles * (image_tile / image_part), warp_first = thread & ~31;
    if (warp_first >= parts) return;
    int most[4] = {};  // bounds are not negative, or NaN or Inf: as integers they compare as they should
#pragma unroll 1
    for (int i = thread; i < parts; i += blockDim.x) {
        const code_bounds b = image.bounds[i];
        most[0] = max(most[0], __float_as_int(b.norm));
        most[1] = max(most[1], __float_as_int(b.residual));
        most[2] = max(most[2], __float_as_int(b.offset));
        most[3] = max(most[3], __float_as_int(b.offset_rest));
    }
    const int lane = thread % 32;
    int own = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int all = __reduce_max_sync(0xFFFFFFFFu, most[i]);
        own = lane == i ? all : own;
    }
    if (own > 0) atomicMax(bounds + lane, own);
}
__device__ inline device::score_bounds as_bounds(const int* bounds) {
    return {__int_as_float(bounds[0]), __int_as_float(bounds[1]), __int_as_float(bounds[2]), __int_as_float(bounds[3])};
}

#endif  // CUVQ_HAS_WGMMA

}  // namespace cuvq::kernel
