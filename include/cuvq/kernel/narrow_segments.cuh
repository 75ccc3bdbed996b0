// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Sums of narrow rows that a list holds sorted by code: `kernel/segments.cuh`'s, by a warp that takes several rows at a
// time.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/arguments.hpp>
#include <cuvq/kernel/row_adder.cuh>
#include <cuvq/kernel/segments.cuh>
#include <cuvq/kernel/sort_rows.cuh>

namespace cuvq::kernel {

/// v, of which the compiler knows nothing: what a loop makes of it is made there, and does not wait in registers from
/// before the loop.
__device__ inline float opaque(float v) {
    asm volatile("" : "+f"(v));
    return v;
}

/// As `sum_rows`, of rows of at most Tile::narrow_columns columns: `lanes` lanes, a power of two, take a row, and each
/// group of so many its own rows, one after the other. A segment that spans groups is added up from theirs, in an order
/// that depends on begin, end and `lanes` alone. All is added in double, so that nothing overflows on the way.
template <class Tile, class X, class RowAt, class EmitWarp>
__device__ void sum_narrow_rows(segment_storage<Tile>& shared, const detail::accumulate_args<X>& a,
                                std::int64_t first_row, int lanes, bool vectors, std::int64_t begin, std::int64_t end,
                                unsigned& left_out, const RowAt& row_at, const EmitWarp& emit_warp) {
    constexpr int columns_per_lane = Tile::columns / 32, batch = Tile::narrow_batch;
    static_assert(2 * Tile::narrow_columns <= Tile::columns, "a warp takes several rows");
    constexpr unsigned all = 0xFFFFFFFFu;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int groups = 32 / lanes, group = lane / lanes, column = lane % lanes * columns_per_lane;
    // Whole batches, since a part of one takes as long: the groups at the end may have no rows.
    const int rows = static_cast<int>(end - begin), share = ((rows - 1) / (groups * batch) + 1) * batch;
    const std::int64_t own = begin + group * share;
    double sum[columns_per_lane] = {}, count = 0, head_count = 0;
    // Of the segment that the group is at, and of its first; none: it has no rows.
    std::uint32_t code = coded_row::none, head_code = coded_row::none;
    for (int at = 0; at < share; at += batch) {
        const int left = rows - group * share - at, here = left < 0 ? 0 : left < batch ? left : batch;
        // Beyond `here`, row 0 is read, and not used.
        const X* row[batch];
        float weight[batch], value[batch][columns_per_lane];
        unsigned starts = 0;  // of segments, a bit each
        {
            coded_row entry[batch];
#pragma unroll
            for (int j = 0; j < batch; ++j) entry[j] = j < here ? row_at(own + at + j) : coded_row{coded_row::none, 0};
            if (at == 0) code = head_code = entry[0].code;
            std::uint32_t before = code;
#pragma unroll
            for (int j = 0; j < batch; ++j) {
                if (j < here && entry[j].code != before) starts |= 1u << j;
                before = entry[j].code;
                row[j] = a.x.row(first_row + entry[j].row);
                weight[j] = a.weights ? a.weights[first_row + entry[j].row] : 1.0f;
            }
        }
        read_rows(value, row, column, a.x.columns, vectors);
        float probe = 0;  // NaN as soon as an element is NaN or Inf
#pragma unroll
        for (int j = 0; j < batch; ++j)
#pragma unroll
            for (int c = 0; c < columns_per_lane; ++c) probe = __fmaf_rn(value[j][c], 0.0f, probe);
        unsigned finite = (1u << here) - 1;  // rows, a bit each
        if (__any_sync(all, probe != 0)) {
            const unsigned peers = ((1u << lanes) - 1) << group * lanes;
#pragma unroll
            for (int j = 0; j < batch; ++j) {
                bool bad = false;
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c) bad = bad || !isfinite(value[j][c]);
                bad = (__ballot_sync(all, bad && j < here) & peers) != 0;
                if (bad) finite &= ~(1u << j);
                left_out += __popc(__ballot_sync(all, bad && column == 0));
            }
        }
#pragma unroll 1
        for (int from = 0; from < here;) {  // one part of the batch for each segment in it
            if (starts >> from & 1) {
                if (code == head_code) {  // waits for what the groups before have of it
#pragma unroll
                    for (int c = 0; c < columns_per_lane; ++c)
                        shared.sum[warp][0][lane * columns_per_lane + c] = sum[c];
                    head_count = count;
                } else {
                    emit_warp(column, code, sum, count);
                }
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c) sum[c] = 0;
                count = 0;
                code = row_at(own + at + from).code;
                starts &= starts - 1;
            }
            const int to = starts ? __ffs(static_cast<int>(starts)) - 1 : here;
            const unsigned part = finite & ((1u << to) - (1u << from));
#pragma unroll
            for (int j = 0; j < batch; ++j) {
                if (!(part >> j & 1)) continue;
                const double factor = static_cast<double>(opaque(weight[j]));
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c)
                    sum[c] = fma(factor, static_cast<double>(opaque(value[j][c])), sum[c]);
                count += factor;
            }
            from = to;
        }
        __syncwarp();
    }

    const std::uint32_t first_code = __shfl_sync(all, head_code, 0);
    std::uint32_t before = __shfl_up_sync(all, code, lanes), after = __shfl_down_sync(all, head_code, lanes);
    if (group == 0) before = coded_row::none;
    if (group == groups - 1) after = coded_row::none;
    const bool joins = head_code != coded_row::none && head_code == before;
    // Onto the last segment of each group, what the groups before have of it: of 1, 2, 4, ... groups at a time.
    bool is_whole = code != head_code || !joins;
    for (int step = lanes; __any_sync(all, !is_whole); step *= 2) {
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c) {
            const double more = __shfl_up_sync(all, sum[c], step);
            if (!is_whole) sum[c] += more;
        }
        const double more = __shfl_up_sync(all, count, step);
        if (!is_whole) count += more;
        const bool was_whole = __shfl_up_sync(all, is_whole, step);
        is_whole = is_whole || was_whole;
    }
    const auto keep = [&](int slot, std::uint32_t of, const double(&total)[columns_per_lane], double weights) {
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c) shared.sum[warp][slot][column + c] = total[c];
        if (column == 0) {
            shared.count[warp][slot] = weights;
            shared.code[warp][slot] = of;
        }
    };
    // The first segment of each group that has another. Where the warp's first comes from another group than its first,
    // that one has nothing in the place it is put to.
    double head[columns_per_lane];
#pragma unroll
    for (int c = 0; c < columns_per_lane; ++c) {
        const double more = __shfl_up_sync(all, sum[c], lanes);
        head[c] = joins ? more : 0;
    }
    const double more = __shfl_up_sync(all, count, lanes);
    if (joins) head_count += more;
    if (code != head_code) {
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c) head[c] += shared.sum[warp][0][lane * columns_per_lane + c];
        if (head_code == first_code)
            keep(0, head_code, head, head_count);
        else
            emit_warp(column, head_code, head, head_count);
    }
    // The last segment of each group with which it ends.
    if (code != after) {
        const bool is_first = code == first_code, is_last = after == coded_row::none;
        if (is_last && is_first && column == 0) shared.code[warp][1] = coded_row::none;
        if (is_first || is_last)
            keep(is_first ? 0 : 1, code, sum, count);
        else
            emit_warp(column, code, sum, count);
    }
    __syncwarp();
}

}  // namespace cuvq::kernel
