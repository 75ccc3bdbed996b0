// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Rows of x on their way into shared memory as operands of the tensor cores.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/kernel/filter_sm90.cuh>

namespace cuvq::kernel {

/// How a row of x came out in fp16: |X|, |X - X^| and t, as `device::score_error` takes them.
struct row_measure {
    float length, rest, factor;

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
    __device__ void add(const float4& x, float scale, const float4& centre, int part) {
        put(centred(x, scale, centre), part);
    }
    __device__ void put(const float4& v, int part) {
        const __half2 half[2] = {__floats2half2_rn(v.x, v.y), __floats2half2_rn(v.z, v.w)};
        const float2 low = __half22float2(half[0]), high = __half22float2(half[1]);
        const float4 e{v.x - low.x, v.y - low.y, v.z - high.x, v.w - high.y};
        square = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, square))));
        residual = fmaf(e.x, e.x, fmaf(e.y, e.y, fmaf(e.z, e.z, fmaf(e.w, e.w, residual))));
        write(half, part);
    }
    __device__ void write(const __half2 (&half)[2], int part) {
        const int q = split::lane();
        char* to =
            operand + (layout::offset(row_results::rows, row, 4 * split::lanes * part) ^ (q >> 1 << 4)) + (q & 1) * 8;
        *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(half);
    }

    /// Writes t into the three columns from `columns` on and zeros behind, as far as part `part` holds them, over
    /// whatever data `half` holds before.
    __device__ void close(__half2 (&half)[2], float factor, int columns, int part) {
        const __half t = __float2half_rn(factor), zero = __float2half_rn(0.0f);
        __half* out = reinterpret_cast<__half*>(half);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int beyond = split::column(part) + i - columns;
            if (beyond >= 0) out[i] = beyond < 3 ? t : zero;
        }
    }

    /// The part that holds no data.
    __device__ void close_after(float factor, int columns, int part) {
        if (split::column(part) >= layout::columns) return;
        __half2 half[2];
        close(half, factor, columns, part);
        write(half, part);
    }

    /// Any row, at any alignment, part by part; for what is not done faster elsewhere. Rows beyond the last are zeros.
    /// `centre(column)`: four columns of the centre times the scale, zeros behind the last. Chooses t so that the row
    /// fits; NaN where none does.
    template <class X, class Centre>
    __device__ float convert(const X* x, bool inside, int columns, Centre centre, float scale) {
        float factor = 1.0f;
        for (int pass = 0;; ++pass) {
            square = residual = 0;
#pragma unroll 1
            for (int s = 0; s < split::parts; ++s) {
                const int column = split::column(s);
                if (column >= layout::columns) continue;
                const float4 v = centred(device::load4(x, column, inside ? columns : 0), scale, centre(column));
                const float4 u{factor * v.x, factor * v.y, factor * v.z, factor * v.w};
                put(u, s);
                if (column + 4 > columns) {
                    __half2 half[2] = {__floats2half2_rn(u.x, u.y), __floats2half2_rn(u.z, u.w)};
                    close(half, factor, columns, s);
                    write(half, s);
                }
            }
            const float sum = split::row_sum(square);
            if (__all_sync(0xFFFFFFFFu, pass > 0 || sum < 0x1p26f)) return factor;
            if (!(sum < 0x1p26f)) {
                const bool fits = sum < 0x1p72f;  // fp16 holds powers of two down to 2^-24; false for NaN
                const int exponent = static_cast<int>(__float_as_uint(sum) >> 24) - 63;  // |v| < 2^(exponent + 1)
                factor = fits ? __int_as_float((127 + 13 - exponent) << 23) : __int_as_float(0x7FC00000);
            }
        }
    }

    /// What the row's error bound is made of. To be called by all lanes of the row.
    __device__ row_measure measure(float factor) const {
        // 1.0005 and 1e-17 cover the rounding and the underflow of the sums of squares and of their roots; 2^-23 the
        // rounding of x - centre.
        const float length = 1.0005f * device::approximate_root(split::row_sum(square)) + 1e-17f;
        const float rest =
            1.0005f * device::approximate_root(split::row_sum(residual)) + 1e-17f + 0x1p-23f * length;
        return {length, rest, factor};
    }
};

/// The centre of an image times its scale, zeros behind it, for a whole block.
__device__ inline void load_centre(const codebook_image& image, int columns, int padded, float* centre) {
    const float scale = *image.scale;
    for (int d = threadIdx.x; d < padded; d += blockDim.x)
        centre[d] = d < columns ? __fmaf_ieee_rn(scale, image.centre[d], 0.0f) : 0.0f;
}

/// The largest bounds of all codes, as integers, in `bounds`, which held zeros, for a whole block. To be read after a
/// barrier.
__device__ inline void load_bounds(const codebook_image& image, int tiles, int* bounds) {
    const int parts = tiles * (image_tile / image_part), warp_first = static_cast<int>(threadIdx.x) & ~31;
    if (warp_first >= parts) return;
    int most[4] = {};  // bounds are not negative, or NaN or Inf: as integers they compare as they should
#pragma unroll 1
    for (int i = threadIdx.x; i < parts; i += blockDim.x) {
        const code_bounds b = image.bounds[i];
        most[0] = max(most[0], __float_as_int(b.norm));
        most[1] = max(most[1], __float_as_int(b.residual));
        most[2] = max(most[2], __float_as_int(b.offset));
        most[3] = max(most[3], __float_as_int(b.offset_rest));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        most[i] = __reduce_max_sync(0xFFFFFFFFu, most[i]);
        if (threadIdx.x % 32 == i && most[i] > 0) atomicMax(bounds + i, most[i]);
    }
}
__device__ inline device::score_bounds as_bounds(const int* bounds) {
    return {__int_as_float(bounds[0]), __int_as_float(bounds[1]), __int_as_float(bounds[2]), __int_as_float(bounds[3])};
}

#endif  // CUVQ_HAS_WGMMA

}  // namespace cuvq::kernel
