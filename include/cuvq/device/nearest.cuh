// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/arch/simt.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/dispatch/tuning.cuh>
#include <cuvq/views.hpp>

namespace cuvq::device {

/// Shared memory that a block lends to `nearest`; free for other use between calls, after a barrier.
template <class Policy>
struct nearest_storage {
    alignas(16) arch::simt_storage<Policy> scores;
};

/// The two least scores that a thread saw for one row, with their codes, and the least of all others.
struct contenders {
    float first = __builtin_huge_valf(), second = __builtin_huge_valf(), rest = __builtin_huge_valf();
    std::int64_t first_code = -1, second_code = -1;

    /// Codes come in ascending order. A NaN or Inf is never kept.
    __device__ void offer(float score, std::int64_t code) {
        if (score < first) {
            rest = second;
            second = first;
            second_code = first_code;
            first = score;
            first_code = code;
        } else if (score < second) {
            rest = second;
            second = score;
            second_code = code;
        } else {
            rest = fminf(rest, score);
        }
    }
};

/// The exact code of one row, from what its 16 threads (half a warp) saw. All 16 call it; all get the code.
template <class X, class C>
__device__ std::int64_t settle(const contenders& mine, const X* row, const matrix_ref<const C>& codebook,
                               std::int64_t columns) {
    const unsigned lane = threadIdx.x & 31u, base = lane & 16u, half = 0xFFFFu << base;
    float least = mine.first;
#pragma unroll
    for (int step = 1; step < 16; step *= 2) least = fminf(least, __shfl_xor_sync(half, least, step));
    const float limit = filter_limit(least, columns);

    const unsigned firsts = __ballot_sync(half, mine.first <= limit);
    const unsigned seconds = __ballot_sync(half, mine.second <= limit);
    const bool missed = __any_sync(half, mine.rest <= limit);
    const bool complete = limit == limit && !missed;
    if (complete && __popc(firsts) + __popc(seconds) == 1) return __shfl_sync(half, mine.first_code, __ffs(firsts) - 1);

    // Each of the two groups of eight lanes takes its share of the candidates, or of the whole codebook.
    const int group = (lane & 8u) ? 1 : 0;
    exact_choice choice;
    if (complete) {
        int turn = 0;
        const auto take = [&](unsigned left, std::int64_t code) {
            for (; left != 0; left &= left - 1, ++turn) {
                const std::int64_t k = __shfl_sync(half, code, __ffs(left) - 1);
                if (turn % 2 == group) choice.consider(exact_distance(row, codebook.row(k), columns), k);
            }
        };
        take(firsts, mine.first_code);
        take(seconds, mine.second_code);
    } else {
        bool finite = true;
        for (std::int64_t d = lane & 15u; d < columns; d += 16) finite = finite && isfinite(static_cast<float>(row[d]));
        if (!__all_sync(half, finite)) return -1;
        consider_codes(choice, row, codebook, columns, codebook.rows, group, 2, [](std::int64_t i) { return i; });
    }
    __syncwarp(half);
    choice.merge(half, 8);
    return choice.code;
}

/// The nearest codebook row of each of up to `Policy::rows` vectors: exact, as `cuvq::quantize` means it. For use
/// inside a kernel whose blocks have `Policy::threads` threads in x; all of them call it with the same arguments.
///
/// @tparam Policy  sizes, from `dispatch/tuning.cuh` or of your own.
/// @tparam D       dimensions if known at compile time, else `dynamic_extent`.
/// @param storage  shared memory of the caller; must not be in use.
/// @param rows     [n x D] vectors, n <= Policy::rows, in shared or global memory, written before the last barrier;
///                 float, __half or __nv_bfloat16.
/// @param codebook [K x D] global memory; any of those types.
/// @param codes    [n] out, in shared or global memory: lowest nearest code, -1 where the vector has a NaN or Inf or
///                 no codebook row is finite. Readable by all threads of the block on return.
/// Deterministic: the codes do not depend on Policy, n or the block. O(n K D) per block, plus O(K D) for each row
/// that the float filter cannot settle (many codes within float's rounding of the nearest).
template <class Policy, std::size_t D = dynamic_extent, class X, class C>
__device__ void nearest(nearest_storage<Policy>& storage, const matrix_ref<const X>& rows,
                        const matrix_ref<const C>& codebook, std::int64_t* codes) {
    static_assert(Policy::codes % 16 == 0 && Policy::rows * 16 % Policy::threads == 0 && Policy::depth % 4 == 0,
                  "cuvq: sizes of a simt_tile: 16 divides codes, threads divides 16 rows, 4 divides depth");
    constexpr int R = Policy::rows * 16 / Policy::threads, J = Policy::codes / 16;
    const std::int64_t columns = D == dynamic_extent ? rows.columns : static_cast<std::int64_t>(D);
    const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;

    contenders seen[R];
    for (std::int64_t first = 0; first < codebook.rows; first += Policy::codes) {
        float scores[R][J];  // (rows / 16 of a thread column, codes / 16)
        arch::simt_distances(storage.scores, rows, codebook, first, columns, scores);
#pragma unroll
        for (int j = 0; j < J; ++j) {
            const std::int64_t code = first + x + 16 * j;
            if (code < codebook.rows) {
#pragma unroll
                for (int i = 0; i < R; ++i) seen[i].offer(scores[i][j], code);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
        const int row = y * R + i;
        if (row < rows.rows) {
            const std::int64_t code = settle(seen[i], rows.row(row), codebook, columns);
            if (x == 0) codes[row] = code;
        }
    }
    __syncthreads();
}

}  // namespace cuvq::device
