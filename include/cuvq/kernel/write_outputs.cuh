// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Quantized rows and distances of many rows, from codes that are there already: a pass at the speed of memory.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/certificate.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Of rows in vectors, blocks on a multiprocessor.
inline constexpr int outputs_blocks = 3;

/// Whether `write_outputs` can take four columns at a time.
template <class X, class C>
bool has_vector_rows(const detail::quantize_args<X, C>& a) {
    return a.x.columns % 4 == 0 && has_aligned_rows(a.x) && has_aligned_rows(a.codebook) &&
           (!a.quantized || has_aligned_rows(a.quantized));
}

/// The outputs that `write_vector_rows` does not get right: the quantized row of a row without a code, and the distance
/// of any, which is returned too, if it is wanted. By a warp.
template <class X, class C>
__device__ double write_row(const detail::quantize_args<X, C>& a, bool wants_distance, std::int64_t row,
                            std::int64_t code) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float nan = __int_as_float(0x7FC00000);
    if (a.quantized && code < 0)
        for (std::int64_t d = lane; d < a.x.columns; d += 32) a.quantized.row(row)[d] = static_cast<X>(nan);
    if (!wants_distance) return 0;
    const double distance = code < 0 ? nan : device::exact_distance(a.x.row(row), a.codebook.row(code), a.x.columns);
    if (a.distances && lane == 0) a.distances[row] = static_cast<float>(distance);
    return distance;
}

/// Rows that 2^Bits lanes each have in flight, all of a warp together.
template <int Bits>
inline constexpr int rows_at_once = (32 >> Bits) * (Bits < 2 ? 1 << Bits : 4);

/// Quantized rows and distances of `rows` rows from `first` on, of which lane r holds the code of the r-th one, -1 if
/// it has none. By a warp, 2^Bits lanes to a row, four columns each. The first `seen` rows are another warp's as well,
/// and add nothing to the loss. Distances are bitwise those of `write_rows`.
template <int Bits, class X, class C>
__device__ void write_vector_rows(const detail::quantize_args<X, C>& a, const search_tally& tally, std::int64_t first,
                                  int rows, int seen, int code, double& loss) {
    constexpr unsigned all = 0xFFFFFFFFu;
    constexpr int lanes = 1 << Bits, together = 32 >> Bits, batch = rows_at_once<Bits> / together;
    const int lane = static_cast<int>(threadIdx.x) % 32, start = lane >> Bits, column = lane & (lanes - 1);
    const int columns = static_cast<int>(a.x.columns);
    const bool wants_distance = a.distances || tally.loss != nullptr;
    unsigned again = __ballot_sync(all, code < 0 && lane < rows);  // rows for `write_row`
    const int known = max(code, 0);
    const X* x_row = a.x.row(first + start);
    X* quantized_row = a.quantized ? a.quantized.row(first + start) : nullptr;
    const std::int64_t x_step = together * a.x.stride, quantized_step = together * a.quantized.stride;
#pragma unroll 1
    for (int base = 0; base < rows; base += batch * together) {
        float sums[batch] = {};
        const C* codes[batch];
#pragma unroll
        for (int b = 0; b < batch; ++b) codes[b] = a.codebook.row(__shfl_sync(all, known, base + b * together + start));
#pragma unroll 1
        for (int d = 4 * column; d < columns; d += 4 * lanes) {
            float4 x[batch], c[batch];
#pragma unroll
            for (int b = 0; b < batch; ++b) {
                c[b] = device::load4(codes[b] + d);
                if (wants_distance) x[b] = device::load4(x_row + b * x_step + d);
            }
#pragma unroll
            for (int b = 0; b < batch; ++b)
                if (a.quantized) store4(quantized_row + b * quantized_step + d, c[b]);
            if (!wants_distance) continue;
#pragma unroll
            for (int b = 0; b < batch; ++b) sums[b] += square_of(x[b], c[b]);
        }
        x_row += batch * x_step;
        if (a.quantized) quantized_row += batch * quantized_step;
        __syncwarp();  // lanes beyond the last column wait for the others here, not in a shuffle
        if (!wants_distance) continue;
        const float sum = sum_shares(sums, lanes);
        if (column % (lanes / batch) != 0) continue;
        const int r = base + column / (lanes / batch) * together + start;
        // Where a row has no code, it or all of the codebook is not finite, and so is the sum.
        const bool sound = is_sound_sum(sum, columns);
        if (!sound) again |= 1u << r;
        if (a.distances) a.distances[first + r] = sum;
        if (tally.loss && sound && r >= seen) loss += sum;
    }
    __syncwarp();  // what was stored above is stored before what `write_row` puts in its place
    if (!__any_sync(all, again != 0)) return;
    for (int r = 0; r < rows; ++r) {
        if (!__any_sync(all, again >> r & 1)) continue;
        const int k = __shfl_sync(all, code, r);
        const double distance = write_row(a, wants_distance, first + r, k);
        if (tally.loss && lane == 0 && r >= seen && k >= 0) loss += distance;
    }
}

/// The code of a row of x, -1 if it has none: a lane has that of row first + lane, as it was stored. Whole warp.
template <class X, class C>
__device__ std::int64_t resolve_codes(const detail::quantize_args<X, C>& a, std::int64_t first, std::int64_t code) {
    if (code >= a.codebook.rows) code = -1;  // an unsigned type's mark of a row without a code
    // Where that mark is a code as well, the rows themselves tell: neither has a row of x that is not finite a code,
    // nor is such a row of the codebook one.
    for (unsigned doubtful = __ballot_sync(0xFFFFFFFFu, a.codes.is_mark(code)); doubtful != 0;
         doubtful &= doubtful - 1) {
        const int r = __ffs(doubtful) - 1;
        const std::int64_t k = __shfl_sync(0xFFFFFFFFu, code, r);
        const bool sound = device::is_row_finite(a.x.row(first + r), a.x.columns) &&
                           device::is_row_finite(a.codebook.row(k), a.x.columns);
        if (static_cast<int>(threadIdx.x) % 32 == r && !sound) code = -1;
    }
    return code;
}

/// Quantized rows and distances, from codes that are there already: of `rows` <= 32 rows at a time by a warp. Leaves a
/// partial loss per warp. Bits: as write_vector_rows, with `rows` a multiple of `rows_at_once` and not more than there
/// are; or -1 where not `has_vector_rows`. Of vectors, warps of three blocks on a multiprocessor keep memory busier
/// than what more registers would do.
template <int Bits, class X, class C>
__global__ __launch_bounds__(outputs_threads, Bits < 0 ? 2 : outputs_blocks) void write_outputs(
    const __grid_constant__ detail::quantize_args<X, C> a, const __grid_constant__ search_tally tally, int rows) {
    arch::wait_for_predecessor();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t warp = (std::int64_t{blockIdx.x} * outputs_threads + threadIdx.x) / 32;
    const std::int64_t groups = (a.x.rows - 1) / rows + 1, warps = std::int64_t{gridDim.x} * (outputs_threads / 32);
    double loss = 0;
    // Where all groups must be whole, the last one begins in the one before it.
    const auto first_of = [&](std::int64_t group) {
        return Bits < 0 ? group * rows : min(group * rows, a.x.rows - rows);
    };
    const auto load = [&](std::int64_t group) {
        const std::int64_t row = first_of(group) + lane;
        return group >= 0 && lane < rows && row < a.x.rows ? a.codes.load(row) : -1;
    };
    // Backwards: some of the last rows may still be in the cache. Codes are read a group ahead.
    std::int64_t group = groups - 1 - warp, next = load(group);
    for (; group >= 0; group -= warps) {
        const std::int64_t first = first_of(group), code = resolve_codes(a, first, next);
        next = load(group - warps);
        if constexpr (Bits >= 0)
            write_vector_rows<Bits>(a, tally, first, rows, static_cast<int>(group * rows - first),
                                    static_cast<int>(code), loss);
        else
            write_rows(a, tally, first, 1, static_cast<int>(min(a.x.rows - first, std::int64_t{rows})), code, loss);
    }
    if (tally.loss) write_loss(tally.loss + warp, loss);
}

}  // namespace cuvq::kernel
