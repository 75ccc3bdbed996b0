// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What the tensor-core search derives from a codebook: its rows in fp16, moved by a centre and scaled by a power of
// two, in the layout that the search copies tile by tile; and how far that is from the truth.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cub/block/block_reduce.cuh>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

using device::image_part;
using device::image_tile;
using code_bounds = device::score_bounds;  // Inf where a code did not fit fp16: then no bound holds

/// The image of a codebook, in device memory. Row k holds C^ = fp16(scale (c - centre)), then n in three halves (so
/// that a row of x extended by three ones has the score X.C + n), then zeros. Rows of non-finite codes and beyond K
/// hold zeros and n = -60000.
struct codebook_image {
    float* centre;        // [D]
    float* scale;         // [1] power of two
    code_bounds* bounds;  // [tiles * image_tile / image_part]
    char* rows;           // [tiles] operands of 128 rows, see wgmma_layout
};

/// Rows that the centre and scale are taken from. Any centre is right; a good one makes the filter sharp.
inline constexpr int centre_rows = 32;

/// One warp a code. Each block first finds the same centre, scale and shift from rows spread over the codebook, so
/// that no block waits for another.
template <int Threads, int Steps, class C>
__global__ __launch_bounds__(Threads) void prepare(matrix_ref<const C> codebook, codebook_image image) {
    arch::wait_for_predecessor();
    arch::let_successor_start();
    using layout = arch::wgmma_layout<Steps>;
    using reduce = cub::BlockReduce<double, Threads>;
    __shared__ typename reduce::TempStorage storage;
    __shared__ float centre[layout::columns];
    __shared__ float shared_scale;
    __shared__ double shared_shift;
    __shared__ int bounds[4];
    constexpr int warps = Threads / 32;
    const int columns = static_cast<int>(codebook.columns);
    const std::int64_t samples = codebook.rows < centre_rows ? codebook.rows : centre_rows;
    const std::int64_t stride = codebook.rows / samples * codebook.stride;
    const auto sample = [&](int i, int d) { return static_cast<float>(codebook.data[i * stride + d]); };

    const float share = 1.0f / static_cast<float>(samples);
    double square = 0;
    for (int d = threadIdx.x; d < columns; d += Threads) {
        float v[centre_rows], mean = 0;
#pragma unroll
        for (int i = 0; i < centre_rows; ++i) {
            v[i] = i < samples ? sample(i, d) : 0.0f;
            if (isfinite(v[i])) mean += v[i] * share;
        }
        centre[d] = isfinite(mean) ? mean : 0.0f;
#pragma unroll
        for (int i = 0; i < centre_rows; ++i) {
            const double difference = static_cast<double>(v[i]) - static_cast<double>(centre[d]);
            if (i < samples && isfinite(v[i])) square += difference * difference;
        }
    }
    square = reduce(storage).Sum(square) / static_cast<double>(samples);
    if (threadIdx.x == 0) {
        // The typical row gets a norm of 8 to 16: far from fp16's limits in both directions.
        int exponent = 0;
        if (square > 0) frexp(sqrt(square), &exponent);
        const int power = exponent > 130 ? -126 : exponent < -120 ? 124 : 4 - exponent;
        shared_scale = ldexpf(1.0f, power);
        shared_shift = 0.5 * square * shared_scale * shared_scale;
        if (blockIdx.x == 0) *image.scale = shared_scale;
    }
    if (threadIdx.x < 4) bounds[threadIdx.x] = 0;
    __syncthreads();
    if (blockIdx.x == 0)
        for (int d = threadIdx.x; d < columns; d += Threads) image.centre[d] = centre[d];

    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const double scale = shared_scale, shift = shared_shift;
    constexpr int parts_per_tile = image_tile / image_part;
    char* tile = image.rows + std::int64_t{blockIdx.x / parts_per_tile} * layout::bytes(image_tile);
    for (int i = warp; i < image_part; i += warps) {
        const std::int64_t k = std::int64_t{blockIdx.x} * image_part + i;
        const int r = static_cast<int>(blockIdx.x) % parts_per_tile * image_part + i;
        constexpr int groups = (layout::columns / 8 + 31) / 32;  // of 8 columns, per lane
        double norm = 0, residual = 0, length = 0;
        bool finite = k < codebook.rows;
        uint4 packed[groups];
#pragma unroll
        for (int g = 0; g < groups; ++g) {
            const int first = 8 * (lane + 32 * g);
            __half half[8];
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int d = first + e;
                const float c = k < codebook.rows && d < columns ? static_cast<float>(codebook.row(k)[d]) : 0.0f;
                finite = finite && isfinite(c);
                const double v = d < columns ? scale * (static_cast<double>(c) - static_cast<double>(centre[d])) : 0.0;
                half[e] = __float2half_rn(static_cast<float>(v));
                const double rounded = static_cast<double>(__half2float(half[e]));
                norm += v * v;
                length += rounded * rounded;
                residual += (v - rounded) * (v - rounded);
            }
            packed[g] = *reinterpret_cast<const uint4*>(half);
        }
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            norm += __shfl_xor_sync(0xFFFFFFFFu, norm, step);
            length += __shfl_xor_sync(0xFFFFFFFFu, length, step);
            residual += __shfl_xor_sync(0xFFFFFFFFu, residual, step);
        }
        finite = __all_sync(0xFFFFFFFFu, finite);
        const double offset = finite ? shift - 0.5 * norm : -60000.0;
        __half parts[3];
        double rest = offset;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            parts[i] = __float2half_rn(static_cast<float>(rest));
            rest -= static_cast<double>(__half2float(parts[i]));
        }
        if (!finite) parts[1] = parts[2] = __float2half_rn(0.0f);
#pragma unroll
        for (int g = 0; g < groups; ++g) {
            const int first = 8 * (lane + 32 * g);
            if (first >= layout::columns) continue;
            __half* half = reinterpret_cast<__half*>(&packed[g]);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                if (!finite) half[e] = __float2half_rn(0.0f);
#pragma unroll
                for (int i = 0; i < 3; ++i)
                    if (first + e == columns + i) half[e] = parts[i];
            }
            *reinterpret_cast<uint4*>(tile + layout::offset(image_tile, r, first)) = packed[g];
        }
        if (lane < 4 && finite) {
            constexpr double up = 1.0001;
            const double bound = lane == 0   ? sqrt(length)
                                 : lane == 1 ? sqrt(residual)
                                 : lane == 2 ? fabs(offset)
                                             : fabs(rest);
            // Floats that are not negative order as integers do; a NaN orders above Inf and spoils every bound, as
            // it must.
            atomicMax(&bounds[lane], __float_as_int(static_cast<float>(bound * up)) & 0x7FFFFFFF);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0)
        image.bounds[blockIdx.x] = {__int_as_float(bounds[0]), __int_as_float(bounds[1]), __int_as_float(bounds[2]),
                                    __int_as_float(bounds[3])};
}

}  // namespace cuvq::kernel
