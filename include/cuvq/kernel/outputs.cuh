// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What a search writes once the codes are known: codes, quantized rows, distances, and tallies for step_stats.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/certificate.cuh>
#include <cuvq/kernel/row_chunks.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// What a search tallies for step_stats on the way; all null when nobody asked.
struct search_tally {
    double* loss = nullptr;                      // [parts] sums of squared distances
    unsigned long long* histogram = nullptr;     // [K] rows of each code
    unsigned long long* rows_without = nullptr;  // [1] rows without a code
    digit_counts digits{};                       // for a sort by code, of the searches that can
};

/// Writes four elements in one store that does not linger in the cache.
template <class T>
__device__ void store4(T* to, const float4& v) {
    if constexpr (sizeof(T) == 4) {
        __stcs(reinterpret_cast<float4*>(to), v);
    } else {
        uint2 raw;
        T* out = reinterpret_cast<T*>(&raw);
        out[0] = static_cast<T>(v.x);
        out[1] = static_cast<T>(v.y);
        out[2] = static_cast<T>(v.z);
        out[3] = static_cast<T>(v.w);
        __stcs(reinterpret_cast<uint2*>(to), raw);
    }
}

template <class T>
CUVQ_HOST_DEVICE bool has_aligned_rows(const matrix_ref<T>& m) {
    return device::is_aligned4(m.data) && m.stride % 4 == 0;
}

/// Whether there is anything to write beside codes.
template <class X, class C>
CUVQ_HOST_DEVICE bool wants_rows(const detail::quantize_args<X, C>& a, const search_tally& tally) {
    return a.quantized || a.distances || tally.loss != nullptr;
}

/// The code of a row, -1 if it has none, by a thread. `digits`: tally.digits.of(row), or null.
template <class X, class C>
__device__ void write_code(const detail::quantize_args<X, C>& a, const search_tally& tally, std::int64_t row,
                           std::int64_t code, std::uint32_t* digits = nullptr) {
    a.codes.store(row, code);
    if (digits && code >= 0) atomicAdd(digits + (static_cast<std::uint32_t>(code) & tally.digits.mask), 1u);
    if (tally.histogram && code >= 0) atomicAdd(tally.histogram + code, 1ull);
    if (tally.rows_without && code < 0) atomicAdd(tally.rows_without, 1ull);
}

/// Stands for the code of a row that is settled, and written, later.
inline constexpr std::int64_t row_left_open = -2;

/// Sum of squares of four columns, always in the same order.
__device__ inline float square_of(const float4& x, const float4& c) {
    const float4 e{x.x - c.x, x.y - c.y, x.z - c.z, x.w - c.w};
    return fmaf(e.x, e.x, e.y * e.y) + fmaf(e.z, e.z, e.w * e.w);
}

/// Whether a sum of such over so many columns is good to the promised error of a distance: each lane adds up at most
/// D / 32 squares, or four.
__device__ inline bool is_sound_sum(float sum, std::int64_t columns) {
    return sum >= 0x1p-80f && sum <= 0x1p126f && columns <= 4096;
}

/// Sums of `Count` values over `lanes` lanes, at least so many, both powers of two: lane l of these gets that of
/// v[l * Count / lanes]. Leaves v changed.
template <int Count>
__device__ float sum_shares(float (&v)[Count], int lanes) {
    constexpr unsigned all = 0xFFFFFFFFu;
    int step = lanes;
#pragma unroll
    for (int half = Count / 2; half > 0; half /= 2) {
        step /= 2;
        const bool high = static_cast<int>(threadIdx.x) & step;
#pragma unroll
        for (int i = 0; i < half; ++i)
            v[i] = (high ? v[i + half] : v[i]) + __shfl_xor_sync(all, high ? v[i] : v[i + half], step);
    }
    while ((step /= 2) > 0) v[0] += __shfl_xor_sync(all, v[0], step);
    return v[0];
}

/// Quantized rows and distances of `count` <= 32 rows first, first + step, ... by a warp; lane r holds the code of the
/// r-th one, -1 if it has none, or row_left_open. Each lane adds distances of rows onto its `loss`, always the same
/// ones.
template <class X, class C>
__device__ void write_rows(const detail::quantize_args<X, C>& a, const search_tally& tally, std::int64_t first,
                           int step, int count, std::int64_t code, double& loss) {
    constexpr unsigned all = 0xFFFFFFFFu;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const bool wants_distance = a.distances || tally.loss != nullptr;
    const std::int64_t columns = a.x.columns;
    const bool aligned = columns % 4 == 0 && has_aligned_rows(a.x) && has_aligned_rows(a.codebook) &&
                         (!a.quantized || has_aligned_rows(a.quantized));
    int bits = 5;  // log2 of the lanes that share a row, four columns at a time
    while (bits > 0 && 2 << bits >= columns) --bits;
    constexpr int batch = 4;  // rows in flight
    const int lanes = 1 << bits, rows = 32 >> bits, start = lane >> bits, column = 4 * (lane & (lanes - 1));
    const float nan = __int_as_float(0x7FC00000);
    // The distance of row r, whose sum of squares lane `owner` of its lanes has. Whole warp.
    const auto put_distance = [&](int r, float sum, bool owner) {
        const std::int64_t k = __shfl_sync(all, code, r & 31);
        const bool has_code = r < count && k >= 0, wanted = owner && r < count && k != row_left_open;
        double distance = has_code ? sum : nan;
        const bool doubtful = has_code && !is_sound_sum(sum, columns);
        for (unsigned again = __ballot_sync(all, doubtful && owner); again != 0; again &= again - 1) {
            const int which = __ffs(again) - 1, own_row = __shfl_sync(all, r, which);
            const std::int64_t own_code = __shfl_sync(all, k, which);
            const double exact =
                device::exact_distance(a.x.row(first + own_row * step), a.codebook.row(own_code), columns);
            if (lane == which) distance = exact;
        }
        if (!wanted) return;
        if (a.distances) a.distances[first + r * step] = static_cast<float>(distance);
        if (tally.loss && has_code) loss += distance;
    };

    // An open row reads what there is in any case.
    const C* const own_from = code == row_left_open ? a.codebook.data : code < 0 ? nullptr : a.codebook.row(code);
    const unsigned open = __ballot_sync(all, code == row_left_open);
    for (int base = 0; base < count; base += batch * rows) {
        const C* from[batch];  // the code's row; null if there is none. Beyond the last row, that one again.
        bool plain = aligned;
#pragma unroll
        for (int b = 0; b < batch; ++b) {
            const int r = min(base + b * rows + start, count - 1);
            from[b] = reinterpret_cast<const C*>(__shfl_sync(all, reinterpret_cast<unsigned long long>(own_from), r));
            plain = plain && from[b] != nullptr;
        }
        float sums[batch] = {};
        // Of a lane's rows, b is there if b * rows is below `left`; a row that is not there counts as open.
        const int left = count - base - start;
        const auto is_open = [&](int b) { return b * rows >= left || open >> (base + start + b * rows) & 1; };
        if (__all_sync(all, plain)) {  // as nearly always
            const X* row[batch];
            X* to[batch];
#pragma unroll
            for (int b = 0; b < batch; ++b) {
                const std::int64_t r = first + (b * rows < left ? base + start + b * rows : 0) * step;
                row[b] = a.x.row(r);
                to[b] = a.quantized.row(r);
            }
            for (std::int64_t d = column; d < columns; d += 4 * lanes) {
                float4 x[batch], c[batch];
#pragma unroll
                for (int b = 0; b < batch; ++b) {
                    c[b] = device::load4(from[b] + d);
                    if (wants_distance) x[b] = device::load4(row[b] + d);
                }
#pragma unroll
                for (int b = 0; b < batch; ++b)
                    if (a.quantized && !is_open(b)) store4(to[b] + d, c[b]);
                if (!wants_distance) continue;
#pragma unroll
                for (int b = 0; b < batch; ++b) sums[b] += square_of(x[b], c[b]);
            }
        } else {
#pragma unroll 1
            for (std::int64_t d = column; d < columns; d += 4 * lanes) {
#pragma unroll
                for (int b = 0; b < batch; ++b) {
                    if (is_open(b)) continue;
                    const std::int64_t r = first + (base + start + b * rows) * step;
                    float4 c{nan, nan, nan, nan};
                    if (from[b]) {
                        c = device::load4(from[b], d, columns);
                        if (wants_distance) sums[b] += square_of(device::load4(a.x.row(r), d, columns), c);
                    }
                    if (!a.quantized) continue;
                    X* to = a.quantized.row(r) + d;
                    const float v[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (d + i < columns) to[i] = static_cast<X>(v[i]);
                }
            }
        }
        if (!wants_distance) continue;
        if (lanes >= batch) {  // a row for each quarter of the lanes
            const int b = (lane & (lanes - 1)) >> (bits - 2);
            put_distance(base + b * rows + start, sum_shares(sums, lanes), (lane & (lanes / batch - 1)) == 0);
        } else {
#pragma unroll
            for (int b = 0; b < batch; ++b) {
                if (lanes == 2) sums[b] += __shfl_xor_sync(all, sums[b], 1);
                put_distance(base + b * rows + start, sums[b], column == 0);
            }
        }
    }
    __syncwarp();
}

/// All outputs of the `count` <= Rows rows first, first + step, ... by a block of `Threads` threads; their codes, or
/// row_left_open, in shared memory.
template <int Threads, int Rows, class X, class C>
__device__ void write_tile(const detail::quantize_args<X, C>& a, const search_tally& tally, std::int64_t first,
                           int step, std::int64_t count, const std::int64_t* codes, double& loss) {
    constexpr int share = (Rows - 1) / (Threads / 32) + 1;  // of a warp
    static_assert(share <= 32, "a warp's lanes hold its rows' codes");
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x); r < count; r += Threads)
        if (codes[r] != row_left_open) write_code(a, tally, first + r * step, codes[r]);
    if (!wants_rows(a, tally)) return;
    const int lane = static_cast<int>(threadIdx.x) % 32, begin = static_cast<int>(threadIdx.x) / 32 * share;
    const int mine = min(share, static_cast<int>(count) - begin);
    if (mine > 0) write_rows(a, tally, first + begin * step, step, mine, lane < mine ? codes[begin + lane] : -1, loss);
}

/// Adds up the losses of a warp's lanes into `to`.
__device__ inline void write_loss(double* to, double loss) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) loss += __shfl_xor_sync(0xFFFFFFFFu, loss, step);
    if (threadIdx.x % 32 == 0) *to = loss;
}

/// Threads of a block of the kernels that write outputs of rows whose codes are there.
inline constexpr int outputs_threads = 256;

}  // namespace cuvq::kernel
