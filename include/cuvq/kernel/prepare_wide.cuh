// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The image of a codebook of any number of dimensions: what kernel/prepare.cuh makes of rows that registers hold, in
// two launches. The first finds the centre, so that not every block has to.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cub/block/block_reduce.cuh>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/kernel/prepare.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// One block. Centre and scale as `prepare` chooses them; scale[1] gets the shift of n (any value is right, so a float
/// will do).
template <int Threads, class C>
__global__ __launch_bounds__(Threads) void prepare_centre(matrix_ref<const C> codebook, codebook_image image) {
    using reduce = cub::BlockReduce<double, Threads>;
    __shared__ typename reduce::TempStorage storage;
    const std::int64_t samples = codebook.rows < centre_rows ? codebook.rows : centre_rows;
    const std::int64_t stride = codebook.rows / samples * codebook.stride;
    const float share = 1.0f / static_cast<float>(samples);
    double square = 0;
    for (std::int64_t d = threadIdx.x; d < codebook.columns; d += Threads) {
        float v[centre_rows], mean = 0;
#pragma unroll
        for (int i = 0; i < centre_rows; ++i) {
            v[i] = i < samples ? static_cast<float>(codebook.data[i * stride + d]) : 0.0f;
            if (isfinite(v[i])) mean += v[i] * share;
        }
        if (!isfinite(mean)) mean = 0;
        image.centre[d] = mean;
#pragma unroll
        for (int i = 0; i < centre_rows; ++i) {
            const double difference = device::widened(v[i]) - device::widened(mean);
            if (i < samples && isfinite(v[i])) square += difference * difference;
        }
    }
    square = reduce(storage).Sum(square) / static_cast<double>(samples);
    if (threadIdx.x == 0) {
        // The typical row gets a norm of 8 to 16: far from fp16's limits in both directions.
        int exponent = 0;
        if (square > 0) frexp(sqrt(square), &exponent);
        const int power = exponent > 130 ? -126 : exponent < -120 ? 124 : 4 - exponent;
        const float scale = ldexpf(1.0f, power);
        image.scale[0] = scale;
        image.scale[1] = static_cast<float>(0.5 * square * scale * scale);
    }
}

/// One warp a code, each block one part of a tile: its rows of the image, and their bounds.
template <int Threads, class C>
__global__ __launch_bounds__(Threads) void prepare_rows(matrix_ref<const C> codebook, codebook_image image,
                                                        arch::slab_layout layout) {
    __shared__ int bounds[4];
    if (threadIdx.x < 4) bounds[threadIdx.x] = 0;
    __syncthreads();

    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int columns = static_cast<int>(codebook.columns), chunks = layout.row_bytes() / 16;
    const double scale = image.scale[0], shift = image.scale[1];
    constexpr int parts_per_tile = image_tile / image_part;
    char* tile = image.rows + std::int64_t{blockIdx.x / parts_per_tile} * image_tile * layout.row_bytes();
    for (int i = warp; i < image_part; i += Threads / 32) {
        const std::int64_t k = std::int64_t{blockIdx.x} * image_part + i;
        const int r = static_cast<int>(blockIdx.x) % parts_per_tile * image_part + i;
        const bool inside = k < codebook.rows;
        const C* row = codebook.row(inside ? k : 0);
        double norm = 0, residual = 0, length = 0;
        bool finite = inside;
        // 8 columns from `first` on: in fp16, and what they add to the sums.
        const auto convert = [&](int first, __half(&half)[8]) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int d = first + e;
                double v = 0;
                if (inside && d < columns) {
                    const float c = static_cast<float>(row[d]);
                    finite = finite && isfinite(c);
                    v = scale * (device::widened(c) - device::widened(image.centre[d]));
                }
                half[e] = __float2half_rn(static_cast<float>(v));
                const double rounded = static_cast<double>(__half2float(half[e]));
                norm += v * v;
                length += rounded * rounded;
                residual += (v - rounded) * (v - rounded);
            }
        };
        const auto store = [&](int chunk, const __half(&half)[8]) {
            *reinterpret_cast<uint4*>(tile + layout.offset(image_tile, r, 8 * chunk)) =
                *reinterpret_cast<const uint4*>(half);
        };
        const int whole = columns / 8;  // chunks of nothing but data
        alignas(16) __half last[8];     // the one after them, with the rest of the data
        for (int chunk = lane; chunk < whole; chunk += 32) {
            alignas(16) __half half[8];
            convert(8 * chunk, half);
            store(chunk, half);
        }
        if (lane == 0) convert(8 * whole, last);
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
        for (int p = 0; p < 3; ++p) {
            parts[p] = __float2half_rn(static_cast<float>(rest));
            rest -= static_cast<double>(__half2float(parts[p]));
        }
        if (!finite) parts[1] = parts[2] = __float2half_rn(0.0f);
        // What follows the data; of a code that is not finite, everything.
        for (int chunk = (finite ? whole : 0) + lane; chunk < chunks; chunk += 32) {
            alignas(16) __half half[8];
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int d = 8 * chunk + e;
                half[e] = chunk == whole && d < columns && finite ? last[e] : __float2half_rn(0.0f);
#pragma unroll
                for (int p = 0; p < 3; ++p)
                    if (d == columns + p) half[e] = parts[p];
            }
            store(chunk, half);
        }
        if (lane < 4 && finite) {
            constexpr double up = 1.0001;
            const double bound = lane == 0   ? sqrt(length)
                                 : lane == 1 ? sqrt(residual)
                                 : lane == 2 ? fabs(offset)
                                             : fabs(rest);
            // As integers, and a NaN above Inf: it spoils every bound, as it must.
            atomicMax(&bounds[lane], __float_as_int(static_cast<float>(bound * up)) & 0x7FFFFFFF);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0)
        image.bounds[blockIdx.x] = {__int_as_float(bounds[0]), __int_as_float(bounds[1]), __int_as_float(bounds[2]),
                                    __int_as_float(bounds[3])};
}

}  // namespace cuvq::kernel
