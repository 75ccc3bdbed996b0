// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// A tile of scores on the CUDA cores of any architecture: squared distances in float, summed from differences, so
// that a common offset costs no accuracy.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/views.hpp>

namespace cuvq::arch {

/// Shared memory of `simt_distances`. Rows are padded by 16 bytes so that eight threads reading float4 from eight
/// rows meet no bank twice.
template <class Tile>
struct simt_storage {
    float x[Tile::rows][Tile::depth + 4];
    float c[Tile::codes][Tile::depth + 4];
};

/// One block stages [Rows x depth] elements of `m` from (first_row, first_column) on, as float, zeros beyond its edge.
template <class Tile, int Rows, class T>
__device__ void simt_stage(float (&to)[Rows][Tile::depth + 4], const matrix_ref<const T>& m, std::int64_t first_row,
                           std::int64_t first_column, std::int64_t columns) {
    static_assert(Rows * Tile::depth % Tile::threads == 0, "each thread stages the same number of elements");
#pragma unroll
    for (int e = 0; e < Rows * Tile::depth / Tile::threads; ++e) {
        const int at = static_cast<int>(threadIdx.x) + e * Tile::threads;
        const int row = at / Tile::depth, column = at % Tile::depth;
        const bool inside = first_row + row < m.rows && first_column + column < columns;
        to[row][column] = inside ? static_cast<float>(m.row(first_row + row)[first_column + column]) : 0.0f;
    }
}

/// Thread (y, x) of the block, y = threadIdx.x / 16, x = threadIdx.x % 16, gets in distances[i][j] the squared
/// distance of row y * R + i of `rows` to code first_code + x + 16 j. Whole block; synchronises.
template <class Tile, class X, class C, int R, int J>
__device__ void simt_distances(simt_storage<Tile>& storage, const matrix_ref<const X>& rows,
                               const matrix_ref<const C>& codebook, std::int64_t first_code, std::int64_t columns,
                               float (&distances)[R][J]) {
    static_assert(R == Tile::rows * 16 / Tile::threads && J == Tile::codes / 16, "the thread's share of the tile");
    const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < J; ++j) distances[i][j] = 0.0f;

    for (std::int64_t first = 0; first < columns; first += Tile::depth) {
        __syncthreads();
        simt_stage<Tile>(storage.x, rows, 0, first, columns);               // (rows, depth)
        simt_stage<Tile>(storage.c, codebook, first_code, first, columns);  // (codes, depth)
        __syncthreads();
        const int span = columns - first < Tile::depth ? static_cast<int>(columns - first) : Tile::depth;
#pragma unroll 2
        for (int d = 0; d < span; d += 4) {
            float4 a[R], b[J];
#pragma unroll
            for (int i = 0; i < R; ++i) a[i] = *reinterpret_cast<const float4*>(&storage.x[y * R + i][d]);
#pragma unroll
            for (int j = 0; j < J; ++j) b[j] = *reinterpret_cast<const float4*>(&storage.c[x + 16 * j][d]);
#pragma unroll
            for (int i = 0; i < R; ++i) {
#pragma unroll
                for (int j = 0; j < J; ++j) {
                    float& sum = distances[i][j];
                    float difference = a[i].x - b[j].x;
                    sum = fmaf(difference, difference, sum);
                    difference = a[i].y - b[j].y;
                    sum = fmaf(difference, difference, sum);
                    difference = a[i].z - b[j].z;
                    sum = fmaf(difference, difference, sum);
                    difference = a[i].w - b[j].w;
                    sum = fmaf(difference, difference, sum);
                }
            }
        }
    }
}

}  // namespace cuvq::arch
