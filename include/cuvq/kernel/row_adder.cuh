// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// How a warp reads rows of x and adds them up, four columns a lane: the order of all additions depends on the rows, D
// and whether there are weights.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_runtime.h>

#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/accumulate.cuh>
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

}  // namespace cuvq::kernel
