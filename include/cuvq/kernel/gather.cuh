// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Counts and sums of a small batch in one launch: a block looks through the codes of all rows for those of its own few
// codes, lists their rows in order in shared memory, and sums them there. Work grows with N K / codes per block, so
// this is for batches of a few thousand rows.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/validate.hpp>
#include <cuvq/kernel/accumulate.cuh>
#include <cuvq/kernel/sort_rows.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Shared memory of `gather_codes`.
template <class Tile>
struct gather_storage {
    static constexpr int warps = Tile::threads / 32;

    segment_storage<Tile> segments;
    double sum[Tile::most_sums];           // [codes of the block][D]
    double count[Tile::most_codes];        // of weights
    std::uint16_t listed[Tile::window];    // rows of the window by code, then in order: own code * window + row
    std::uint32_t place[warps][Tile::most_codes];  // where the next row of a warp with that code goes
    std::uint32_t length;
};

/// Takes the rows that hold a NaN or Inf out of the list of `length` rows; returns how many are left. A warp a row.
template <class Tile, class X>
__device__ int keep_finite_rows(gather_storage<Tile>& shared, const matrix_ref<const X>& x, std::int64_t window,
                                int length, unsigned& left_out) {
    constexpr unsigned marked = 0x8000;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    bool found = false;
    for (int i = warp; i < length; i += Tile::threads / 32) {
        const unsigned listed = shared.listed[i];
        bool finite = true;
        for (std::int64_t d = lane; d < x.columns; d += 32)
            finite = finite && isfinite(static_cast<float>(x.row(window + listed % Tile::window)[d]));
        if (__all_sync(0xFFFFFFFFu, finite)) continue;
        found = true;
        ++left_out;
        if (lane == 0) shared.listed[i] = static_cast<std::uint16_t>(listed | marked);
    }
    if (!__syncthreads_or(found)) return length;
    if (warp == 0) {
        int kept = 0;
        for (int i = 0; i < length; i += 32) {
            const unsigned listed = i + lane < length ? shared.listed[i + lane] : marked;
            const unsigned keeps = __ballot_sync(0xFFFFFFFFu, !(listed & marked));
            if (!(listed & marked))
                shared.listed[kept + __popc(keeps & ((1u << lane) - 1))] = static_cast<std::uint16_t>(listed);
            kept += __popc(keeps);
            __syncwarp();
        }
        if (lane == 0) shared.length = static_cast<std::uint32_t>(kept);
    }
    __syncthreads();
    return static_cast<int>(shared.length);
}

/// A block sums the rows of codes first_code .. first_code + code_count - 1 into shared.sum and shared.count, window by
/// window of the batch. `checks`: rows that hold a NaN or Inf are looked for before summing, since a slice may not see
/// all of a row; where there is one slice, summing finds them. `invalid_rows`: null, or gets the rows without a code
/// (from block 0) and those not finite added.
template <class Tile, class X>
__device__ void gather_codes(gather_storage<Tile>& shared, const detail::accumulate_args<X>& a,
                             const row_source& source, std::int64_t first_code, unsigned code_count, bool vectors,
                             bool checks, unsigned long long* invalid_rows) {
    constexpr int warps = Tile::threads / 32, per_warp = Tile::window / warps, per_lane = per_warp / 32;
    constexpr int columns_per_lane = Tile::columns / 32;
    static_assert(Tile::window * Tile::most_codes <= 32768, "a listed row, its code and a mark fit 16 bits");
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int columns = static_cast<int>(a.x.columns);
    for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(code_count) * columns; i += Tile::threads) shared.sum[i] = 0;
    if (threadIdx.x < code_count) shared.count[threadIdx.x] = 0;
    unsigned left_out = 0, without = 0;

    for (std::int64_t window = 0; window < source.count; window += Tile::window) {
        for (int i = static_cast<int>(threadIdx.x); i < warps * Tile::most_codes; i += Tile::threads)
            shared.place[i / Tile::most_codes][i % Tile::most_codes] = 0;
        const std::int64_t first = window + warp * per_warp;
        const std::int64_t stop = first + per_warp < source.count ? first + per_warp : source.count;
        coded_row rows[per_lane];
        source.load(first + lane, stop, rows);
        __syncthreads();
        unsigned own[per_lane];  // code, counted from the first of the block; others are not its own
#pragma unroll
        for (int i = 0; i < per_lane; ++i) {
            own[i] = rows[i].code - static_cast<std::uint32_t>(first_code);
            if (rows[i].code == coded_row::none) {
                own[i] = coded_row::none;
                without += first + lane + 32 * i < stop;
            }
            if (own[i] < code_count) atomicAdd(&shared.place[warp][own[i]], 1u);
        }
        __syncthreads();
        if (warp == 0) {  // from numbers to places: by code, then by warp
            std::uint32_t total = 0;
            if (static_cast<unsigned>(lane) < code_count) {
                for (int w = 0; w < warps; ++w) {
                    const std::uint32_t number = shared.place[w][lane];
                    shared.place[w][lane] = total;
                    total += number;
                }
            }
            std::uint32_t scan = total;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const std::uint32_t other = __shfl_up_sync(0xFFFFFFFFu, scan, step);
                if (lane >= step) scan += other;
            }
            if (static_cast<unsigned>(lane) < code_count)
                for (int w = 0; w < warps; ++w) shared.place[w][lane] += scan - total;
            if (lane == 31) shared.length = scan;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < per_lane; ++i) {
            const bool is_own = own[i] < code_count;
            if (!__any_sync(0xFFFFFFFFu, is_own)) continue;
            const unsigned peers = __match_any_sync(0xFFFFFFFFu, is_own ? own[i] : coded_row::none);
            const int rank = __popc(peers & ((1u << lane) - 1));
            if (is_own) {
                const std::uint32_t at = shared.place[warp][own[i]];
                shared.listed[at + rank] =
                    static_cast<std::uint16_t>(own[i] * Tile::window + (rows[i].row - static_cast<unsigned>(window)));
            }
            __syncwarp();
            if (is_own && rank == 0) shared.place[warp][own[i]] += __popc(peers);
            __syncwarp();
        }
        __syncthreads();
        int length = static_cast<int>(shared.length);
        const auto row_at = [&](std::int64_t i) {
            const unsigned listed = shared.listed[i];
            return coded_row{listed / Tile::window, listed % Tile::window + static_cast<unsigned>(window)};
        };
        if (checks) length = keep_finite_rows(shared, a.x, window, length, left_out);
        if (length == 0) continue;
        const int most = ((length + warps - 1) / warps + most_float_rows - 1) / most_float_rows * most_float_rows;
        for (int slice = 0; slice < columns; slice += Tile::columns) {
            const auto add = [&](const open_segment& segment) {
                const int column = slice + static_cast<int>(threadIdx.x);
                if (threadIdx.x < Tile::columns && column < columns)
                    shared.sum[segment.code * columns + column] += segment.sum;
                if (threadIdx.x == 0 && slice == 0) shared.count[segment.code] += segment.count;
            };
            add(sum_segments(
                shared.segments, a, 0, slice, vectors, 0, length, most, left_out, row_at,
                [&](std::uint32_t code, const double(&sum)[columns_per_lane], double weights) {
                    const int column = slice + lane * columns_per_lane;
#pragma unroll
                    for (int c = 0; c < columns_per_lane; ++c)
                        if (column + c < columns) shared.sum[code * columns + column + c] += sum[c];
                    if (lane == 0 && slice == 0) shared.count[code] += weights;
                },
                add));
        }
    }
    __syncthreads();
    if (invalid_rows) {
        if (blockIdx.x == 0 && without > 0) atomicAdd(invalid_rows, static_cast<unsigned long long>(without));
        if (lane == 0 && left_out > 0) atomicAdd(invalid_rows, static_cast<unsigned long long>(left_out));
    }
}

/// Counts and sums of a small batch. A block takes `per_block` codes.
template <class Tile, class X>
__global__ __launch_bounds__(Tile::threads, Tile::blocks) void gather(detail::accumulate_args<X> a, row_source source,
                                                                      unsigned per_block, bool vectors, bool checks,
                                                                      bool add, unsigned long long* invalid_rows) {
    __shared__ gather_storage<Tile> shared;
    const std::int64_t first = std::int64_t{blockIdx.x} * per_block;
    const auto codes = static_cast<unsigned>(a.sums.rows - first < per_block ? a.sums.rows - first : per_block);
    gather_codes(shared, a, source, first, codes, vectors, checks, invalid_rows);
    const int columns = static_cast<int>(a.x.columns);
    for (unsigned c = threadIdx.x / 32; c < codes; c += Tile::threads / 32) {
        const double n = shared.count[c];
        for (int d = static_cast<int>(threadIdx.x) % 32; d < columns; d += 32)
            put(a.sums.row(first + c)[d], shared.sum[c * columns + d], add);
        if (threadIdx.x % 32 == 0) put(a.counts[first + c], n, add);
    }
}

}  // namespace cuvq::kernel
