// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Sums of rows that a list holds sorted by code, segment by segment, a segment being the rows of one code. A warp sums
// a part of the list, a block puts together what its warps have of a segment; the order of all additions depends on the
// list, D and whether there are weights.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_runtime.h>

#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/accumulate.cuh>
#include <cuvq/kernel/sort_rows.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Rows added up in float before they go onto a sum in double: with 2^-24 for each addition, 8 rows are the most that
/// keep every sum of n rows within 2^-22 sqrt(n) even if all roundings point the same way (equal rows do that). Where
/// sqrt(n) leaves room, such sums are added up in float too: two of a run of 32 or more, all of a code of no more.
inline constexpr int most_float_rows = 8;

/// Whether x can be read by vectors of `Columns` elements.
template <int Columns, class X>
bool has_vectors(const matrix_ref<const X>& x) {
    return x.columns % Columns == 0 && x.stride % Columns == 0 &&
           reinterpret_cast<std::uintptr_t>(x.data) % (Columns * sizeof(X)) == 0;
}

/// Adds `value` onto what the caller had, or replaces it.
__device__ inline void put(float& to, double value, bool add) {
    to = static_cast<float>(add ? value + static_cast<double>(to) : value);
}

/// One lane's share of several rows, as float: `Columns` columns from `first` on, or, beyond the last column, some that
/// others have too, so that no lane reads beyond a row and all reads are under way before the first is used. `vectors`:
/// rows are aligned to Columns elements, which divide their number of columns. x is read once: it should not push the
/// sorted rows out of the caches.
template <int Rows, int Columns, class X>
__device__ inline void read_rows(float (&value)[Rows][Columns], const X* const (&row)[Rows], std::int64_t first,
                                 std::int64_t columns, bool vectors) {
    using word = std::conditional_t<Columns * sizeof(X) == 16, uint4, uint2>;
    static_assert(sizeof(word) == Columns * sizeof(X), "a vector read of 8 or 16 bytes");
    if (vectors) {
        const std::int64_t at = first < columns ? first : columns - Columns;
        word bits[Rows];
#pragma unroll
        for (int j = 0; j < Rows; ++j) bits[j] = __ldcs(reinterpret_cast<const word*>(row[j] + at));
#pragma unroll
        for (int j = 0; j < Rows; ++j) {
            X element[Columns];
            memcpy(element, &bits[j], sizeof(word));
#pragma unroll
            for (int c = 0; c < Columns; ++c) value[j][c] = static_cast<float>(element[c]);
        }
    } else {
        X element[Rows][Columns];
#pragma unroll
        for (int c = 0; c < Columns; ++c) {
            const std::int64_t at = first + c < columns ? first + c : columns - 1;
#pragma unroll
            for (int j = 0; j < Rows; ++j) element[j][c] = row[j][at];
        }
#pragma unroll
        for (int j = 0; j < Rows; ++j)
#pragma unroll
            for (int c = 0; c < Columns; ++c) value[j][c] = static_cast<float>(element[j][c]);
    }
}

/// What a warp holds of the segment that it is at: `Columns` columns a lane.
template <int Columns>
struct segment_sum {
    double sum[Columns] = {};
    double count = 0;
    float part[Columns] = {};  // of the rows since the last fold

    /// Whether part is finite in every lane. Whole warp, converged.
    __device__ bool is_sound() const {
        float probe = 0;  // NaN as soon as a part is NaN or Inf
#pragma unroll
        for (int c = 0; c < Columns; ++c) probe = __fmaf_rn(part[c], 0.0f, probe);
        return __all_sync(0xFFFFFFFFu, probe == 0);
    }
    __device__ void fold() {
#pragma unroll
        for (int c = 0; c < Columns; ++c) {
            sum[c] += part[c];
            part[c] = 0;
        }
    }
};

/// Adds rows of a list onto what a warp holds of a segment: columns slice .. slice + Tile::columns - 1. All its
/// functions are called by a whole warp, converged; each lane has a row of the list, and its weight.
template <class Tile, class X>
struct row_adder {
    static constexpr int columns_per_lane = Tile::columns / 32, batch = most_float_rows;
    using segment_type = segment_sum<columns_per_lane>;

    const detail::accumulate_args<X>& a;
    std::int64_t first_row;  // of x, the list's row 0
    std::int64_t slice;
    bool vectors;

    __device__ std::int64_t first_column() const {
        return slice + static_cast<int>(threadIdx.x) % 32 * columns_per_lane;
    }
    /// The rows of lanes from .. to - 1 again, after float overflowed or a row turned out not to be finite: those are
    /// left out, the others added in double.
    __device__ void add_one_by_one(segment_type& segment, std::uint32_t own_row, float own_weight, int from, int to,
                                   unsigned& left_out) const {
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c) segment.part[c] = 0;
#pragma unroll 1
        for (int j = from; j < to; ++j) {
            const std::uint32_t row = __shfl_sync(all, own_row, j);
            const float weight = __shfl_sync(all, own_weight, j);
            float value[1][columns_per_lane];
            read_rows(value, {a.x.row(first_row + row)}, first_column(), a.x.columns, vectors);
            bool finite = true;
#pragma unroll
            for (int c = 0; c < columns_per_lane; ++c) finite = finite && isfinite(value[0][c]);
            if (__all_sync(all, finite)) {
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c)
                    segment.sum[c] += static_cast<double>(weight) * static_cast<double>(value[0][c]);
                segment.count += weight;
            } else {
                ++left_out;
            }
        }
    }
    /// The rows of all lanes, which have the code of the segment and no weights: two batches of loads at a time. Rows
    /// that are not aligned are added in the same order.
    __device__ void add_long_run(segment_type& segment, std::uint32_t own_row, unsigned& left_out) const {
        const int rows = 2 * batch_rows();
#pragma unroll 1
        for (int from = 0; from < 32; from += rows) {
            const auto row_of = [&](int load) {
                const int i = has_halves() ? 2 * load + static_cast<int>(threadIdx.x) % 32 / 16 : load;
                return a.x.row(first_row + __shfl_sync(all, own_row, from + i));
            };
            segment_type other;  // of the second batch
            const auto add = [&](const float(&value)[columns_per_lane],
                                 const float(&value_of_other)[columns_per_lane]) {
                device::accumulate_row(segment.part, value, 1.0f, columns_per_lane, 0, 1);
                device::accumulate_row(other.part, value_of_other, 1.0f, columns_per_lane, 0, 1);
            };
            if (vectors) {
                const X* row[2 * batch];
                float value[2 * batch][columns_per_lane];
#pragma unroll
                for (int j = 0; j < 2 * batch; ++j) row[j] = row_of(j);
                read_rows(value, row, column_of_load(), a.x.columns, true);
#pragma unroll
                for (int j = 0; j < batch; ++j) add(value[j], value[batch + j]);
            } else {
#pragma unroll 1
                for (int j = 0; j < batch; ++j) {
                    const X* const row[2] = {row_of(j), row_of(batch + j)};
                    float value[2][columns_per_lane];
                    read_rows(value, row, column_of_load(), a.x.columns, false);
                    add(value[0], value[1]);
                }
            }
            if (has_halves()) {
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c) {
                    segment.part[c] += __shfl_xor_sync(all, segment.part[c], 16);
                    other.part[c] += __shfl_xor_sync(all, other.part[c], 16);
                }
            }
            if (segment.is_sound() && other.is_sound()) {
                segment.fold();
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c) segment.sum[c] += other.part[c];
                segment.count += rows;
            } else {
                add_one_by_one(segment, own_row, 1.0f, from, from + rows, left_out);
            }
        }
    }
    /// The float sum of the rows of the first `count` lanes, from 1 to 32; whether it is finite. A batch of loads at a
    /// time, each summed alone: a sum has no more than min(n, 8) + n / 8 roundings, and 4 sqrt(n) are allowed. Aligned
    /// rows are less than 2^32 elements apart.
    __device__ bool sum_few(float (&sum)[columns_per_lane], std::uint32_t own_row, float own_weight, int count) const {
        // What this lane brings for all. Where a load gets two rows, the lower half of the warp takes rows 0 .. 7 and
        // 16 .. 23, the upper the others.
        const int lane = static_cast<int>(threadIdx.x) % 32, width = has_halves() ? 16 : 32;
        const int number = has_halves() ? (lane & 7) | (lane & 8) << 1 | (lane & 16) >> 1 : lane;
        std::uint32_t row = __shfl_sync(all, own_row, min(number, count - 1));  // beyond, the last, of no weight
        float weight = __shfl_sync(all, own_weight, number);
        if (number >= count) weight = 0;
        const X* const x = a.x.data + first_row * a.x.stride;
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c) sum[c] = 0;
#pragma unroll 1
        for (int from = 0; from < count; from += batch_rows()) {
            float part[columns_per_lane] = {};
            const auto add = [&](int j, const float(&value)[columns_per_lane]) {
                device::accumulate_row(part, value, __shfl_sync(all, weight, j, width), columns_per_lane, 0, 1);
            };
            if (vectors) {
                const X* at[batch];
                float value[batch][columns_per_lane];
#pragma unroll
                for (int j = 0; j < batch; ++j)
                    at[j] = x + std::uint64_t{__shfl_sync(all, row, j, width)} * static_cast<std::uint32_t>(a.x.stride);
                read_rows(value, at, column_of_load(), a.x.columns, true);
#pragma unroll
                for (int j = 0; j < batch; ++j) add(j, value[j]);
            } else {
#pragma unroll 1
                for (int j = 0; j < batch; ++j) {
                    float value[1][columns_per_lane];
                    read_rows(value, {x + __shfl_sync(all, row, j, width) * a.x.stride}, column_of_load(), a.x.columns,
                              false);
                    add(j, value[0]);
                }
            }
#pragma unroll
            for (int c = 0; c < columns_per_lane; ++c) sum[c] += part[c];
            row = __shfl_down_sync(all, row, batch);
            weight = __shfl_down_sync(all, weight, batch);
        }
        float probe = 0;  // NaN as soon as a sum is NaN or Inf
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c) {
            if (has_halves()) sum[c] += __shfl_xor_sync(all, sum[c], 16);
            probe = __fmaf_rn(sum[c], 0.0f, probe);
        }
        return __all_sync(all, probe == 0);
    }

private:
    static constexpr unsigned all = 0xFFFFFFFFu;

    /// Whether half a warp has lanes for a row, so that a load gets two.
    __device__ bool has_halves() const { return a.x.columns <= Tile::columns / 2; }
    __device__ int batch_rows() const { return has_halves() ? 2 * batch : batch; }
    __device__ std::int64_t column_of_load() const {
        return has_halves() ? static_cast<int>(threadIdx.x) % 16 * columns_per_lane : first_column();
    }
};

/// Rows of one code in a row, as a block has them: a column a thread.
struct open_segment {
    std::uint32_t code;
    double sum = 0;    // of the thread's column of the slice, if it has one
    double count = 0;  // of weights; every thread has it
};

/// Shared memory of `sum_segments` and `merge_segments`: of each warp's rows, the segment that holds the first, and the
/// last, if another.
template <class Tile>
struct segment_storage {
    double sum[Tile::threads / 32][2][Tile::columns];
    double count[Tile::threads / 32][2];
    std::uint32_t code[Tile::threads / 32][2];  // none: no such segment

    /// By a warp that has no rows.
    __device__ void leave_none() {
        if (threadIdx.x % 32 < 2) code[threadIdx.x / 32][threadIdx.x % 32] = coded_row::none;
    }
};

/// A warp sums rows begin .. end - 1 of a list, sorted by code: columns slice .. slice + Tile::columns - 1 of each,
/// segment by segment, in an order that depends on the list, begin, end, D, `LongRuns` and whether there are weights.
/// Leaves the first segment and, if there is another, the last in `shared`. Whole warp, converged. `begin` < `end`.
/// `LongRuns`: many rows of a code are taken more at a time, for latency's sake.
///
/// @param left_out  of this warp: rows that are not finite, which are not added, get counted.
/// @param row_at    (i) -> coded_row, of the list.
/// @param emit_warp (column, code, sum[columns of this lane], count): called where a segment ends that is neither the
///                  first nor the last, by all lanes that have a share of it, each with its first column.
template <bool LongRuns, class Tile, class X, class RowAt, class EmitWarp>
__device__ void sum_rows(segment_storage<Tile>& shared, const detail::accumulate_args<X>& a, std::int64_t first_row,
                         std::int64_t slice, bool vectors, std::int64_t begin, std::int64_t end, unsigned& left_out,
                         const RowAt& row_at, const EmitWarp& emit_warp) {
    constexpr int columns_per_lane = Tile::columns / 32, batch = most_float_rows;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const std::int64_t columns = a.x.columns, first = slice + lane * columns_per_lane;  // column of this lane
    const row_adder<Tile, X> adder{a, first_row, slice, vectors};
    segment_sum<columns_per_lane> segment;
    bool is_first = true;
    const auto load = [&](std::int64_t i) { return i < end ? row_at(i) : coded_row{coded_row::none, 0}; };
    coded_row next = load(begin + lane);
    std::uint32_t code = __shfl_sync(0xFFFFFFFFu, next.code, 0);
    // What ends within the rows of a warp, but did not start with them, is a whole segment.
    const auto flush = [&](bool is_last) {
        if (is_first || is_last) {
            const int slot = is_first ? 0 : 1;
#pragma unroll
            for (int c = 0; c < columns_per_lane; ++c)
                shared.sum[warp][slot][lane * columns_per_lane + c] = segment.sum[c];
            if (lane == 0) {
                shared.count[warp][slot] = segment.count;
                shared.code[warp][slot] = code;
                if (is_first) shared.code[warp][1] = coded_row::none;
            }
        } else {
            emit_warp(first, code, segment.sum, segment.count);
        }
        is_first = false;
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c) segment.sum[c] = 0;
        segment.count = 0;
    };
    for (std::int64_t at = begin; at < end; at += 32) {
        const coded_row mine = next;
        const bool valid = at + lane < end;
        float own_weight = 1;
        if (a.weights && valid) own_weight = a.weights[first_row + mine.row];
        next = load(at + 32 + lane);
        std::uint32_t before = __shfl_up_sync(0xFFFFFFFFu, mine.code, 1);
        if (lane == 0) before = code;
        const unsigned starts = __ballot_sync(0xFFFFFFFFu, valid && mine.code != before);
        const int here = end - at < 32 ? static_cast<int>(end - at) : 32;
        if (LongRuns && starts == 0 && here == 32 && !a.weights) {
            adder.add_long_run(segment, mine.row, left_out);
            continue;
        }
        for (int j0 = 0; j0 < here; j0 += batch) {
            // Beyond `here`, row 0 is read, and not used.
            const X* row[batch];
            float value[batch][columns_per_lane];
#pragma unroll
            for (int j = 0; j < batch; ++j) row[j] = a.x.row(first_row + __shfl_sync(0xFFFFFFFFu, mine.row, j0 + j));
            read_rows(value, row, first, columns, vectors);
            const int in_batch = here - j0 < batch ? here - j0 : batch;
            unsigned marks = starts >> j0 & ((1u << in_batch) - 1);
#pragma unroll 1
            for (int from = 0; from < in_batch;) {  // one part of the batch for each segment in it
                if (marks >> from & 1) {
                    flush(false);
                    code = __shfl_sync(0xFFFFFFFFu, mine.code, j0 + from);
                    marks &= marks - 1;
                }
                const int to = marks ? __ffs(static_cast<int>(marks)) - 1 : in_batch;
                double weights = a.weights ? 0 : to - from;
#pragma unroll
                for (int j = 0; j < batch; ++j) {
                    const float weight = a.weights ? __shfl_sync(0xFFFFFFFFu, own_weight, j0 + j) : 1.0f;
                    if (j < from || j >= to) continue;
                    device::accumulate_row(segment.part, value[j], weight, columns_per_lane, 0, 1);
                    if (a.weights) weights += weight;
                }
                if (segment.is_sound()) {
                    segment.fold();
                    segment.count += weights;
                } else {
                    adder.add_one_by_one(segment, mine.row, own_weight, j0 + from, j0 + to, left_out);
                }
                from = to;
            }
        }
    }
    flush(true);
}

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

/// A block sums rows begin .. end - 1 of a list, sorted by code, segment by segment, in an order that depends on begin,
/// end and `most` alone.
///
/// @param most     rows of a warp at a time.
/// @param code     of the first row.
/// @param sum_warp (begin, end): called by one warp, sums these rows as `sum_rows` does.
/// @param emit     (open_segment): called by the block where a segment ends that is not the last, and that is some
///                 warp's first or last.
/// Returns the last segment. Ends with a barrier. `begin` < `end`.
template <class Tile, class SumWarp, class Emit>
__device__ open_segment sum_segments(segment_storage<Tile>& shared, std::int64_t begin, std::int64_t end, int most,
                                     std::uint32_t code, const SumWarp& sum_warp, const Emit& emit) {
    constexpr int warps = Tile::threads / 32;
    static_assert(Tile::threads >= Tile::columns, "a thread of the block merges a column");
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    open_segment open{code};
    for (std::int64_t round = begin; round < end; round += warps * most) {
        const std::int64_t own_begin = round + warp * most;
        const std::int64_t own_end = own_begin + most < end ? own_begin + most : end;
        if (own_begin < own_end)
            sum_warp(own_begin, own_end);
        else
            shared.leave_none();
        __syncthreads();
        // The segments of all warps in order, each read while the one before it is added.
        static_assert(2 * warps <= 32, "a lane for each segment");
        const std::uint32_t code_of_lane =
            lane < 2 * warps ? shared.code[lane / 2][lane % 2] : std::uint32_t{coded_row::none};
        unsigned left = __ballot_sync(0xFFFFFFFFu, code_of_lane != coded_row::none);
        const int own_column = static_cast<int>(threadIdx.x) % Tile::columns;
        int i = __ffs(static_cast<int>(left)) - 1;
        double sum = shared.sum[i / 2][i % 2][own_column], weights = shared.count[i / 2][i % 2];
#pragma unroll 1
        while (left) {
            left &= left - 1;
            const int after = left ? __ffs(static_cast<int>(left)) - 1 : i;
            const double next_sum = shared.sum[after / 2][after % 2][own_column];
            const double next_weights = shared.count[after / 2][after % 2];
            const std::uint32_t next_code = __shfl_sync(0xFFFFFFFFu, code_of_lane, i);
            if (next_code != open.code) {
                emit(open);
                open = {next_code};
            }
            open.sum += sum;
            open.count += weights;
            i = after;
            sum = next_sum;
            weights = next_weights;
        }
        __syncthreads();
    }
    return open;
}

/// Adds up what the warps of a block left of each code in `shared`, in order. Teams of threads take the codes in turn,
/// a thread of a team one of `width` columns.
/// @param emit  (open_segment, column): called by all threads of a team, also by those beyond the last column.
template <class Tile, class Emit>
__device__ void merge_segments(const segment_storage<Tile>& shared, int width, const Emit& emit) {
    constexpr unsigned all = 0xFFFFFFFFu;
    constexpr int slots = Tile::threads / 16;  // two of each warp
    static_assert(slots <= 32, "a lane for each");
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::uint32_t code = lane < slots ? shared.code[lane / 2][lane % 2] : std::uint32_t{coded_row::none};
    const unsigned used = __ballot_sync(all, code != coded_row::none), before = used & ((1u << lane) - 1);
    const std::uint32_t code_before = __shfl_sync(all, code, before != 0 ? 31 - __clz(static_cast<int>(before)) : lane);
    unsigned heads = __ballot_sync(all, code != coded_row::none && (before == 0 || code != code_before));
    const int team_threads = width <= 32 ? 32 : width <= 64 ? 64 : Tile::columns;
    const int teams = Tile::threads / team_threads, team = static_cast<int>(threadIdx.x) / team_threads;
    const int column = static_cast<int>(threadIdx.x) % team_threads;
#pragma unroll 1
    for (int number = 0; heads != 0; ++number) {
        const int first = __ffs(static_cast<int>(heads)) - 1;
        heads &= heads - 1;
        if (number % teams != team) continue;
        unsigned own = used & ~((1u << first) - 1);
        if (heads != 0) own &= (heads & -heads) - 1;
        open_segment segment{__shfl_sync(all, code, first)};
#pragma unroll 1
        for (; own != 0; own &= own - 1) {
            const int i = __ffs(static_cast<int>(own)) - 1;
            segment.sum += shared.sum[i / 2][i % 2][column];
            segment.count += shared.count[i / 2][i % 2];
        }
        emit(segment, column);
    }
}

}  // namespace cuvq::kernel
