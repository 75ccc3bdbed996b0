// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Matrices too large to come from the host: every element is a function of its place, known on both sides.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "support/device.cuh"
#include "support/host.hpp"

namespace cuvq::test {

/// 64 random bits of a place.
__host__ __device__ inline std::uint64_t hash_of(std::uint64_t seed, std::int64_t place) {
    std::uint64_t v = (static_cast<std::uint64_t>(place) + 1) * 0x9E3779B97F4A7C15u + seed * 0xD1B54A32D192ED03u;
    v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9u;
    return (v ^ (v >> 27)) * 0x94D049BB133111EBu;
}

/// Element `place` of pattern `seed`: a multiple of 1/8 in [-4, 4), exact in every element type.
__host__ __device__ inline float pattern(std::uint64_t seed, std::int64_t place) {
    return static_cast<float>(static_cast<int>((hash_of(seed, place) >> 32) & 63u) - 32) * 0.125f;
}

/// Element `place` of noise `seed`: nearly normal, of mean 0 and variance 1.
__host__ __device__ inline float noise(std::uint64_t seed, std::int64_t place) {
    const std::uint64_t v = hash_of(seed, place);
    const int sum = static_cast<int>((v & 0xFFFFu) + ((v >> 16) & 0xFFFFu) + ((v >> 32) & 0xFFFFu) + (v >> 48));
    return static_cast<float>(sum - 2 * 0xFFFF) * (1.7320508f / 65536.0f);
}

template <class T>
__global__ void fill_pattern(T* to, std::int64_t count, std::uint64_t seed, bool with_noise) {
    const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
    for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride)
        to[i] = static_cast<T>(with_noise ? noise(seed, i) : pattern(seed, i));
}

/// [count] elements of the pattern, or of the noise, in device memory.
template <class T>
device_array<T> pattern_array(std::int64_t count, std::uint64_t seed, bool with_noise = false) {
    device_array<T> a(count);
    fill_pattern<<<4096, 256>>>(a.data(), count, seed, with_noise);
    check(cudaGetLastError());
    check(cudaDeviceSynchronize());
    return a;
}

/// Rows first .. first + rows - 1 of a matrix [any x columns] of the pattern.
template <class T>
matrix<T> pattern_rows(std::int64_t first, std::int64_t rows, std::int64_t columns, std::uint64_t seed) {
    return matrix<T>::generate(rows, columns, [&](auto i, auto d) { return pattern(seed, (first + i) * columns + d); });
}

}  // namespace cuvq::test
