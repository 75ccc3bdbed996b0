// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Batches of a million rows that come from the device and are judged there: families of data that searches find easy
// and hard, and a float64 brute force over every pair.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "support/device.cuh"
#include "support/large.cuh"

namespace cuvq::test {

enum class family {
    normal,        ///< independent, of variance 1
    integers,      ///< from -2 to 2: rows equally near to many codes
    duplicates,    ///< every code four times
    offset,        ///< 1000 + normal
    near_codes,    ///< rows a millionth from a code
    midpoints,     ///< rows half-way between two codes, but for rounding
    mixed_scales,  ///< rows and codes each times a power of two of its own
    subnormal,     ///< nothing but
};
inline constexpr family families[] = {family::normal,     family::integers,  family::duplicates,   family::offset,
                                      family::near_codes, family::midpoints, family::mixed_scales, family::subnormal};

/// Column d of code k of `codes`.
__device__ inline float code_of_family(family f, std::uint64_t seed, std::int64_t k, std::int64_t d, std::int64_t codes,
                                       std::int64_t columns) {
    if (f == family::duplicates) k %= (codes + 3) / 4;
    const std::int64_t place = k * columns + d;
    const auto bits = hash_of(seed, place) >> 32;
    switch (f) {
        case family::integers: return static_cast<float>(static_cast<int>(bits % 5) - 2);
        case family::offset: return 1000.0f + noise(seed, place);
        case family::mixed_scales: return ldexpf(noise(seed, place), static_cast<int>(hash_of(seed + 1, k) % 20) - 10);
        case family::subnormal: return 0x1p-149f * static_cast<float>(static_cast<int>(bits % 8191) - 4095);
        default: return noise(seed, place);
    }
}

__global__ void fill_codes_of_family(family f, std::uint64_t seed, float* to, std::int64_t codes,
                                     std::int64_t columns) {
    const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
    for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < codes * columns; i += stride)
        to[i] = code_of_family(f, seed, i / columns, i % columns, codes, columns);
}

__global__ void fill_rows_of_family(family f, std::uint64_t seed, const float* codebook, std::int64_t codes, float* to,
                                    std::int64_t rows, std::int64_t columns) {
    const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
    for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * columns; i += stride) {
        const std::int64_t row = i / columns, d = i % columns;
        const auto some_code = [&](std::uint64_t which) {
            return codebook[static_cast<std::int64_t>(hash_of(seed + which, row) % codes) * columns + d];
        };
        switch (f) {
            case family::near_codes: to[i] = some_code(2) + 1e-6f * noise(seed + 4, i); break;
            case family::midpoints: to[i] = 0.5f * (some_code(2) + some_code(3)); break;
            case family::mixed_scales:
                to[i] = ldexpf(noise(seed + 4, i), static_cast<int>(hash_of(seed + 5, row) % 60) - 30);
                break;
            default:
                to[i] = code_of_family(f == family::duplicates ? family::normal : f, seed + 6, row, d, rows, columns);
        }
    }
}

inline constexpr int judged_rows = 64;  // of a block, a thread each

/// Counts rows whose code is neither the lowest nearest one nor, where float64 sums of another order may disagree,
/// within (D + 8) 2^-51 of the least distance. Takes judged_rows * columns floats of shared memory.
__global__ void judge_codes(const float* x, std::int64_t rows, const float* codebook, std::int64_t codes,
                            std::int64_t columns, const std::int32_t* got, unsigned long long* wrong) {
    extern __shared__ float columns_of_rows[];  // (columns, judged_rows)
    const std::int64_t first = std::int64_t{blockIdx.x} * judged_rows, row = first + threadIdx.x;
    for (std::int64_t i = threadIdx.x; i < judged_rows * columns; i += judged_rows)
        if (first + i / columns < rows)
            columns_of_rows[i % columns * judged_rows + i / columns] = x[first * columns + i];
    __syncthreads();
    if (row >= rows) return;
    double least = 0, of_got = -1;
    std::int64_t nearest = -1;
    for (std::int64_t k = 0; k < codes; ++k) {
        double distance = 0;
        for (std::int64_t d = 0; d < columns; ++d) {
            const double difference = static_cast<double>(columns_of_rows[d * judged_rows + threadIdx.x]) -
                                      static_cast<double>(codebook[k * columns + d]);
            distance += difference * difference;
        }
        if (nearest < 0 || distance < least) {
            least = distance;
            nearest = k;
        }
        if (k == got[row]) of_got = distance;
    }
    const bool close = of_got > least && of_got <= least * (1 + static_cast<double>(columns + 8) * 0x1p-51);
    if (got[row] != nearest && !close) atomicAdd(wrong, 1ull);
}

/// A batch of a family: rows and codes in device memory.
class family_batch {
public:
    family_batch(family f, std::uint64_t seed, std::int64_t rows, std::int64_t codes, std::int64_t columns)
        : rows_(rows), codes_(codes), columns_(columns), x_(rows * columns), codebook_(codes * columns) {
        fill_codes_of_family<<<256, 256>>>(f, seed, codebook_.data(), codes, columns);
        fill_rows_of_family<<<4096, 256>>>(f, seed, codebook_.data(), codes, x_.data(), rows, columns);
        check(cudaGetLastError());
        check(cudaDeviceSynchronize());
    }
    matrix_view<const float> x() const { return matrix_view<const float>(x_.data(), rows_, columns_); }
    matrix_view<const float> codebook() const { return matrix_view<const float>(codebook_.data(), codes_, columns_); }

    unsigned long long wrong(const device_array<std::int32_t>& codes) const {
        const device_array<unsigned long long> count(std::vector<unsigned long long>{0});
        const auto bytes = static_cast<std::size_t>(judged_rows * columns_) * sizeof(float);
        judge_codes<<<static_cast<unsigned>((rows_ - 1) / judged_rows + 1), judged_rows, bytes>>>(
            x_.data(), rows_, codebook_.data(), codes_, columns_, codes.data(), count.data());
        check(cudaGetLastError());
        return count.download()[0];
    }

private:
    std::int64_t rows_, codes_, columns_;
    device_array<float> x_, codebook_;
};

}  // namespace cuvq::test
