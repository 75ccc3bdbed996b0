// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Counts and sums of each code without a one-hot matrix, in an order that nothing but the input decides: rows are
// sorted by code (kernel/sort_rows.cuh), a block sums a run of sorted rows whatever their codes, and the partial sums
// of a code that spans several runs are added in order. So every block reads as many rows as the next, however skewed
// the codes are.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_runtime.h>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/accumulate.cuh>
#include <cuvq/kernel/sort_rows.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Lists the rows of a slice with their codes, those that hold a NaN or Inf without. A warp a row. For rows that are
/// summed by several blocks, none of which would see the whole of a row.
template <class X>
__global__ void list_finite_rows(matrix_ref<const X> x, row_source source, coded_row* rows) {
    arch::wait_for_predecessor();
    arch::let_successor_start();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t warps = std::int64_t{gridDim.x} * blockDim.x / 32;
    for (std::int64_t i = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32; i < source.count; i += warps) {
        coded_row row[1];
        source.load(i, source.count, row);
        bool finite = true;
        for (std::int64_t d = lane; d < x.columns; d += 32)
            finite = finite && isfinite(static_cast<float>(x.row(source.first_row + i)[d]));
        if (!__all_sync(0xFFFFFFFFu, finite)) row[0].code = coded_row::none;
        if (lane == 0) rows[i] = row[0];
    }
}

/// Rows in sorted order, and the partial sums of runs of them. A run is summed segment by segment, a segment being
/// its rows of one code; one that reaches the run's edge while its code goes on beyond it is partial.
struct sorted_rows {
    const coded_row* rows;       // [*count] by code
    const std::uint32_t* count;  // rows that have a code
    std::int64_t first_row;      // of the slice in x
    std::int64_t slice_rows;     // with a code or not
    std::int64_t run;            // rows per run
    double* partial_sums;        // [runs][2][D]: the segment that holds the run's first row; the last one, if another
    double* partial_counts;      // [runs][2] sums of weights
    std::uint32_t* last_run;     // [K] of a code that spans several: written where it ends
};

/// Rows added up in float before they go onto a sum in double: with 2^-24 for each addition, 8 rows are the most that
/// keep every sum of n rows within 2^-22 sqrt(n) even if all roundings point the same way (equal rows do that).
inline constexpr int most_float_rows = 8;

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
/// segment by segment, in an order that depends on begin and end alone. Leaves the first segment and, if there is
/// another, the last in `shared`. Whole warp, converged. `begin` < `end`.
///
/// @param left_out  of this warp: rows that are not finite, which are not added, get counted.
/// @param row_at    (i) -> coded_row, of the list.
/// @param emit_warp (column, code, sum[columns of this lane], count): called where a segment ends that is neither the
///                  first nor the last, by all lanes that have a share of it, each with its first column.
template <class Tile, class X, class RowAt, class EmitWarp>
__device__ void sum_rows(segment_storage<Tile>& shared, const detail::accumulate_args<X>& a, std::int64_t first_row,
                         std::int64_t slice, bool vectors, std::int64_t begin, std::int64_t end, unsigned& left_out,
                         const RowAt& row_at, const EmitWarp& emit_warp) {
    constexpr int columns_per_lane = Tile::columns / 32, batch = most_float_rows;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const std::int64_t columns = a.x.columns, first = slice + lane * columns_per_lane;  // column of this lane
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
    // The rows of lanes from .. to - 1 again, after float overflowed or a row turned out not to be finite: those are
    // left out, the others added in double.
    const auto add_one_by_one = [&](const coded_row& mine, float own_weight, int from, int to) {
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c) segment.part[c] = 0;
#pragma unroll 1
        for (int j = from; j < to; ++j) {
            const std::uint32_t row = __shfl_sync(0xFFFFFFFFu, mine.row, j);
            const float weight = __shfl_sync(0xFFFFFFFFu, own_weight, j);
            float value[1][columns_per_lane];
            read_rows(value, {a.x.row(first_row + row)}, first, columns, vectors);
            bool finite = true;
#pragma unroll
            for (int c = 0; c < columns_per_lane; ++c) finite = finite && isfinite(value[0][c]);
            if (__all_sync(0xFFFFFFFFu, finite)) {
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c)
                    segment.sum[c] += static_cast<double>(weight) * static_cast<double>(value[0][c]);
                segment.count += weight;
            } else {
                ++left_out;
            }
        }
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
                    add_one_by_one(mine, own_weight, j0 + from, j0 + to);
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

/// Whether x can be read by vectors of `Columns` elements.
template <int Columns, class X>
bool has_vectors(const matrix_ref<const X>& x) {
    return x.columns % Columns == 0 && x.stride % Columns == 0 &&
           reinterpret_cast<std::uintptr_t>(x.data) % (Columns * sizeof(X)) == 0;
}

/// Sums of the segments of every run: whole codes to `counts` and `sums`, parts of codes to the partial sums. A block
/// takes Tile::columns columns of a run. `vectors`: see `has_vectors`, of the columns of a lane. `Narrow`: there are at
/// most Tile::narrow_columns columns. `lanes` take a row, see Tile::lanes.
template <class Tile, bool Narrow, class X>
__global__ __launch_bounds__(Tile::threads, Tile::blocks) void sum_runs(detail::accumulate_args<X> a, sorted_rows s,
                                                                        int lanes, bool vectors, bool add,
                                                                        unsigned long long* invalid_rows) {
    constexpr int warps = Tile::threads / 32, columns_per_lane = Tile::columns / 32;
    __shared__ segment_storage<Tile> storage;
    arch::wait_for_predecessor();
    arch::let_successor_start();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t columns = a.x.columns, slices = (columns - 1) / Tile::columns + 1;
    const std::int64_t run = blockIdx.x / slices, slice = blockIdx.x % slices * Tile::columns;
    const std::int64_t count = *s.count, begin = run * s.run;
    const std::int64_t end = begin + s.run < count ? begin + s.run : count;
    if (invalid_rows && blockIdx.x == 0 && threadIdx.x == 0)
        atomicAdd(invalid_rows, static_cast<unsigned long long>(s.slice_rows - count));
    if (begin >= end) return;

    const std::int64_t column = slice + threadIdx.x;
    const bool has_column = threadIdx.x < Tile::columns && column < columns;
    const bool starts_before = begin > 0 && s.rows[begin - 1].code == s.rows[begin].code;
    bool opens = true;  // the segment holds the first row of the run
    const auto close = [&](const open_segment& segment, bool goes_on) {
        if ((opens && starts_before) || goes_on) {
            const std::int64_t slot = 2 * run + (opens ? 0 : 1);
            if (has_column) s.partial_sums[slot * columns + column] = segment.sum;
            if (threadIdx.x == 0 && slice == 0) {
                s.partial_counts[slot] = segment.count;
                if (!goes_on) s.last_run[segment.code] = static_cast<std::uint32_t>(run);
            }
        } else {
            if (has_column) put(a.sums.row(segment.code)[column], segment.sum, add);
            if (threadIdx.x == 0 && slice == 0) put(a.counts[segment.code], segment.count, add);
        }
        opens = false;
    };

    unsigned left_out = 0;
    const auto row_at = [&](std::int64_t i) { return s.rows[i]; };
    const auto emit_warp = [&](std::int64_t first, std::uint32_t code, const double(&sum)[columns_per_lane],
                               double weights) {
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c)
            if (first + c < columns) put(a.sums.row(code)[first + c], sum[c], add);
        if (first == 0) put(a.counts[code], weights, add);
    };
    const auto sum_warp = [&](std::int64_t own_begin, std::int64_t own_end) {
        if constexpr (Narrow)
            sum_narrow_rows(storage, a, s.first_row, lanes, vectors, own_begin, own_end, left_out, row_at, emit_warp);
        else
            sum_rows(storage, a, s.first_row, slice, vectors, own_begin, own_end, left_out, row_at, emit_warp);
    };
    const int room = Narrow ? Tile::narrow_rows * (32 / lanes) : Tile::rows_per_warp;
    const int most = static_cast<int>(s.run / warps < room ? s.run / warps : room);
    const open_segment last = sum_segments(storage, begin, end, most, s.rows[begin].code, sum_warp,
                                           [&](const open_segment& segment) { close(segment, false); });
    close(last, end < count && s.rows[end].code == last.code);
    if (invalid_rows && left_out > 0 && slice == 0 && lane == 0)
        atomicAdd(invalid_rows, static_cast<unsigned long long>(left_out));
}

/// The codes of several runs: of Tile::columns columns a warp takes the code that starts in its run and goes on beyond
/// it, if there is one; of one that spans many runs, all warps of the block every so many-th.
template <class Tile>
__global__ __launch_bounds__(Tile::merge_threads) void merge_runs(vector_ref<float> counts, matrix_ref<float> sums,
                                                                  sorted_rows s, bool add) {
    constexpr int warps = Tile::merge_threads / 32, columns_per_lane = Tile::columns / 32, ahead = 4;
    constexpr std::int64_t many = 4 * ahead;
    struct span {
        std::uint32_t code;
        bool whole;         // the run's first row has it
        std::int64_t last;  // run; -1: no such code
    };
    __shared__ double shared_sum[warps][Tile::columns];
    __shared__ double shared_count[warps];
    __shared__ span shared_span[warps];
    arch::wait_for_predecessor();
    arch::let_successor_start();
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const std::int64_t columns = sums.columns, slices = (columns - 1) / Tile::columns + 1;
    const std::int64_t first = blockIdx.x / slices * warps, slice = blockIdx.x % slices * Tile::columns;
    const std::int64_t all = *s.count;
    const auto span_of = [&](std::int64_t own) {  // of the code that starts in this run and goes on
        span found{coded_row::none, false, -1};
        const std::int64_t begin = own * s.run, next = begin + s.run;
        if (next >= all) return found;
        const std::uint32_t before = s.rows[begin > 0 ? begin - 1 : 0].code, start = s.rows[begin].code;
        const std::uint32_t end = s.rows[next - 1].code;
        found.code = s.rows[next].code;
        found.whole = start == found.code;
        if (end == found.code && !(found.whole && begin > 0 && before == found.code))
            found.last = s.last_run[found.code];
        return found;
    };
    // Adds up runs from, from + step, ... of the span that starts in run `own`.
    const auto add_up = [&](const span& of, std::int64_t own, std::int64_t from, int step, double& count,
                            double(&sum)[columns_per_lane]) {
        for (std::int64_t run = from; run <= of.last; run += step * ahead) {
            double value[ahead][columns_per_lane];
#pragma unroll
            for (int i = 0; i < ahead; ++i) {
                const std::int64_t at = run + i * step, slot = 2 * at + (at == own && !of.whole ? 1 : 0);
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c) {
                    const std::int64_t d = slice + lane + 32 * c;
                    value[i][c] = at <= of.last && d < columns ? s.partial_sums[slot * columns + d] : 0.0;
                }
                if (at <= of.last) count += s.partial_counts[slot];
            }
#pragma unroll
            for (int i = 0; i < ahead; ++i)
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c) sum[c] += value[i][c];
        }
    };
    const span mine = span_of(first + warp);
    const bool is_long = mine.last - (first + warp) >= many;
    if (mine.last >= 0 && !is_long) {
        double sum[columns_per_lane] = {}, count = 0;
        add_up(mine, first + warp, first + warp, 1, count, sum);
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c)
            if (slice + lane + 32 * c < columns) put(sums.row(mine.code)[slice + lane + 32 * c], sum[c], add);
        if (lane == 0 && slice == 0) put(counts[mine.code], count, add);
    }
    if (lane == 0) shared_span[warp] = mine;
    if (!__syncthreads_or(is_long)) return;
    for (int w = 0; w < warps; ++w) {
        const std::int64_t own = first + w;
        const span of = shared_span[w];
        if (of.last - own < many) continue;
        double sum[columns_per_lane] = {}, count = 0;
        add_up(of, own, own + warp, warps, count, sum);
#pragma unroll
        for (int c = 0; c < columns_per_lane; ++c) shared_sum[warp][lane + 32 * c] = sum[c];
        if (lane == 0) shared_count[warp] = count;
        __syncthreads();
        for (int c = static_cast<int>(threadIdx.x); c < Tile::columns && slice + c < columns;
             c += Tile::merge_threads) {
            double total = 0;
            for (int other = 0; other < warps; ++other) total += shared_sum[other][c];
            put(sums.row(of.code)[slice + c], total, add);
        }
        if (threadIdx.x == 0 && slice == 0) {
            double total = 0;
            for (const double c : shared_count) total += c;
            put(counts[of.code], total, add);
        }
        __syncthreads();
    }
}

}  // namespace cuvq::kernel
