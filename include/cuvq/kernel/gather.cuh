// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Counts and sums of a small batch in one launch. Each cluster of blocks has a few codes of its own. Its blocks look
// through the codes of all rows, a part each, list those of the cluster by code and in order, and sum equal parts of
// that list, so that a code with many rows is the work of all of them. Looking through the codes grows with N K, so
// this is for batches of a few thousand rows.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/detail/validate.hpp>
#include <cuvq/kernel/accumulate.cuh>
#include <cuvq/kernel/sort_rows.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Shared memory of `gather_codes`. Codes are counted within those of the cluster.
template <class Tile>
struct gather_storage {
    static constexpr int warps = Tile::threads / 32;
    static constexpr int most_codes = Tile::most_codes * Tile::cluster;  // of a cluster

    segment_storage<Tile> segments;
    double sum[Tile::most_sums];             // [codes of the block][D]
    double count[Tile::most_codes];          // [codes of the block] of weights
    double part_sum[2][Tile::columns];       // of the first and the last code of the block's part of the list, where
    double part_count[2];                    // others have rows of them too
    coded_row listed[Tile::rows];            // the block's part of the list
    std::uint32_t place[warps][most_codes];  // rows that a warp has found; then their place among the block's
    std::uint32_t found[most_codes];         // rows that the block has found
    std::uint32_t base[most_codes];          // list position of the first of them
    std::uint32_t start[most_codes + 1];     // list position of a code's first row
};

/// The codes of a cluster, and those of one of its blocks. Cluster c of C has codes c, c + C, c + 2 C, ...: where the
/// lower codes are the more frequent ones, as in a codebook that was sorted so, clusters still get about as many rows.
struct gathered_codes {
    std::uint32_t clusters, cluster;
    unsigned count;           // of the cluster
    int block_bits;           // log2 of the codes of a block
    unsigned own, own_count;  // of this block: the first, counted within the cluster's, and their number

    template <class Tile>
    static __device__ gathered_codes of(std::int64_t codes, int block_bits, unsigned extra = 0) {
        gathered_codes g;
        const unsigned rank = blockIdx.x % Tile::cluster;
        g.clusters = gridDim.x / Tile::cluster - extra;
        g.cluster = blockIdx.x / Tile::cluster;
        g.count = static_cast<unsigned>((codes - 1 - g.cluster) / g.clusters + 1);
        g.block_bits = block_bits;
        const unsigned per_block = 1u << block_bits;
        g.own = rank << block_bits;
        g.own_count = g.count <= g.own ? 0 : g.count - g.own < per_block ? g.count - g.own : per_block;
        return g;
    }
    /// Code c of this block.
    __device__ std::int64_t code(unsigned c) const { return cluster + std::int64_t{own + c} * clusters; }
};

/// Sums the rows of the block's codes into shared.sum and shared.count. `checks`: rows that hold a NaN or Inf are
/// looked for before summing, since a slice may not see all of a row; where there is one slice, summing finds them.
/// `invalid_rows`: null, or gets the rows without a code and those not finite added. The caller ends with
/// `cluster::wait`, once it is done with its own shared memory.
template <class Tile, class X>
__device__ void gather_codes(gather_storage<Tile>& shared, const detail::accumulate_args<X>& a,
                             const row_source& source, const gathered_codes& codes, bool vectors, bool checks,
                             unsigned long long* invalid_rows) {
    using blocks = arch::cluster<Tile::cluster>;
    constexpr int warps = Tile::threads / 32, per_warp = Tile::rows / warps, per_lane = per_warp / 32;
    constexpr int columns_per_lane = Tile::columns / 32, window = Tile::rows * Tile::cluster;
    constexpr unsigned most_codes = gather_storage<Tile>::most_codes, codes_per_lane = (most_codes + 31) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int columns = static_cast<int>(a.x.columns);
    const unsigned rank = blocks::rank();
    unsigned left_out = 0, without = 0;
    bool pending = false;  // other blocks may still read part_sum of this one
    const auto settle = [&] {
        if (pending) blocks::wait();
        pending = false;
    };

    for (std::int64_t at = 0; at == 0 || at < source.count; at += window) {
        settle();
        for (unsigned i = threadIdx.x; i < warps * most_codes; i += Tile::threads)
            shared.place[i / most_codes][i % most_codes] = 0;
        if (at == 0) {
            for (unsigned i = threadIdx.x; i < codes.own_count * columns; i += Tile::threads) shared.sum[i] = 0;
            if (threadIdx.x < codes.own_count) shared.count[threadIdx.x] = 0;
        }
        const std::int64_t first = at + rank * Tile::rows + warp * per_warp;
        const std::int64_t stop = first + per_warp < source.count ? first + per_warp : source.count;
        coded_row rows[per_lane];
        source.load(first + lane, stop, rows);
#pragma unroll
        for (int i = 0; i < per_lane; ++i) {  // from here on codes count within the cluster's
            if (rows[i].code == coded_row::none) {
                without += first + lane + 32 * i < stop;
            } else {
                const std::uint32_t within = rows[i].code / codes.clusters;
                rows[i].code = rows[i].code % codes.clusters == codes.cluster ? within : std::uint32_t{coded_row::none};
            }
            if (!checks) continue;
            for (unsigned hits = __ballot_sync(0xFFFFFFFFu, rows[i].code != coded_row::none); hits; hits &= hits - 1) {
                const int hit = __ffs(static_cast<int>(hits)) - 1;
                bool finite = true;
                for (int d = lane; d < columns; d += 32)
                    finite = finite && isfinite(static_cast<float>(a.x.row(first + 32 * i + hit)[d]));
                if (__all_sync(0xFFFFFFFFu, finite)) continue;
                ++left_out;
                if (lane == hit) rows[i].code = coded_row::none;
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < per_lane; ++i)
            if (rows[i].code != coded_row::none) atomicAdd(&shared.place[warp][rows[i].code], 1u);
        __syncthreads();
        if (threadIdx.x < most_codes) {
            std::uint32_t number[warps], total = 0;
#pragma unroll
            for (int w = 0; w < warps; ++w) number[w] = shared.place[w][threadIdx.x];
#pragma unroll
            for (int w = 0; w < warps; ++w) {
                shared.place[w][threadIdx.x] = total;
                total += number[w];
            }
            shared.found[threadIdx.x] = total;
        }
        blocks::sync();
        if (warp == 0) {  // the list: by code, then by block
            std::uint32_t total[codes_per_lane], before[codes_per_lane], sum = 0;
#pragma unroll
            for (unsigned i = 0; i < codes_per_lane; ++i) {
                const unsigned code = lane * codes_per_lane + i;
                total[i] = before[i] = 0;
                if (code >= most_codes) continue;
                std::uint32_t found[Tile::cluster];
#pragma unroll
                for (unsigned b = 0; b < Tile::cluster; ++b) found[b] = blocks::at(shared.found, b)[code];
#pragma unroll
                for (unsigned b = 0; b < Tile::cluster; ++b) {
                    if (b < rank) before[i] += found[b];
                    total[i] += found[b];
                }
                sum += total[i];
            }
            std::uint32_t scan = sum;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const std::uint32_t other = __shfl_up_sync(0xFFFFFFFFu, scan, step);
                if (lane >= step) scan += other;
            }
            std::uint32_t start = scan - sum;
#pragma unroll
            for (unsigned i = 0; i < codes_per_lane; ++i) {
                const unsigned code = lane * codes_per_lane + i;
                if (code >= most_codes) continue;
                shared.start[code] = start;
                shared.base[code] = start + before[i];
                start += total[i];
            }
            if (lane == 31) shared.start[most_codes] = scan;
        }
        __syncthreads();
        const auto length = shared.start[most_codes];
        // Rows of the list for each block: whole batches of a warp.
        const unsigned part =
            ((length + Tile::cluster - 1) / Tile::cluster + most_float_rows - 1) / most_float_rows * most_float_rows;
        // i / part by a product: positions and parts are far below 2^16.
        const unsigned inverse = part > 0 ? 0xFFFFFFFFu / part + 1 : 0;
        const auto part_of = [&](unsigned i) { return __umulhi(i, inverse); };
#pragma unroll
        for (int i = 0; i < per_lane; ++i) {
            const std::uint32_t code = rows[i].code;
            const bool listed = code != coded_row::none;
            if (!__any_sync(0xFFFFFFFFu, listed)) continue;
            const unsigned peers = __match_any_sync(0xFFFFFFFFu, code);
            const int before = __popc(peers & ((1u << lane) - 1));
            if (listed) {
                const std::uint32_t to = shared.base[code] + shared.place[warp][code] + before;
                const unsigned owner = part_of(to);
                *blocks::at(&shared.listed[to - owner * part], owner) = rows[i];
            }
            __syncwarp();
            if (listed && before == 0) shared.place[warp][code] += __popc(peers);
            __syncwarp();
        }
        blocks::sync();
        const unsigned begin = rank * part;
        const int own_length = length <= begin ? 0 : static_cast<int>(length - begin < part ? length - begin : part);
        const int most = ((own_length + warps - 1) / warps + most_float_rows - 1) / most_float_rows * most_float_rows;
        for (int slice = 0; slice < columns && length > 0; slice += Tile::columns) {
            settle();
            const int column = slice + static_cast<int>(threadIdx.x);
            const bool has_column = threadIdx.x < Tile::columns && column < columns;
            if (own_length > 0) {
                bool opens = true;  // the segment holds the first row of the block's part
                const auto add = [&](const open_segment& segment) {
                    const unsigned code = segment.code;  // its sum is 0 before the first window
                    if (shared.start[code] >= begin && shared.start[code + 1] <= begin + own_length) {
                        const unsigned owner = code >> codes.block_bits,
                                       own_code = code & ((1u << codes.block_bits) - 1);
                        double* sum = blocks::at(&shared.sum[own_code * columns + column], owner);
                        double* count = blocks::at(&shared.count[own_code], owner);
                        if (has_column) *sum = at == 0 ? segment.sum : *sum + segment.sum;
                        if (threadIdx.x == 0 && slice == 0) *count = at == 0 ? segment.count : *count + segment.count;
                    } else {
                        if (has_column) shared.part_sum[opens ? 0 : 1][threadIdx.x] = segment.sum;
                        if (threadIdx.x == 0) shared.part_count[opens ? 0 : 1] = segment.count;
                    }
                    opens = false;
                };
                add(sum_segments(
                    shared.segments, a, 0, slice, vectors, 0, own_length, most, left_out,
                    [&](std::int64_t i) { return shared.listed[i]; },
                    [&](std::uint32_t code, const double(&sum)[columns_per_lane], double weights) {
                        const unsigned owner = code >> codes.block_bits,
                                       own_code = code & ((1u << codes.block_bits) - 1);
                        const int of_lane = slice + lane * columns_per_lane;
                        double* to = blocks::at(&shared.sum[own_code * columns + of_lane], owner);
#pragma unroll
                        for (int c = 0; c < columns_per_lane; ++c)
                            if (of_lane + c < columns) to[c] = at == 0 ? sum[c] : to[c] + sum[c];
                        double* count = blocks::at(&shared.count[own_code], owner);
                        if (lane == 0 && slice == 0) *count = at == 0 ? weights : *count + weights;
                    },
                    add));
            }
            blocks::sync();
            for (unsigned c = threadIdx.x / Tile::columns; c < codes.own_count; c += Tile::threads / Tile::columns) {
                const unsigned code = codes.own + c, begins = shared.start[code], ends = shared.start[code + 1];
                const unsigned from = part_of(begins), to = ends == begins ? from : part_of(ends - 1);
                if (from == to) continue;
                const unsigned own_column = threadIdx.x % Tile::columns;
                double sum = 0, count = 0;
#pragma unroll
                for (unsigned b = 0; b < Tile::cluster; ++b) {
                    if (b < from || b > to) continue;
                    const int slot = b == from && begins != from * part ? 1 : 0;
                    sum += *blocks::at(&shared.part_sum[slot][own_column], b);
                    count += *blocks::at(&shared.part_count[slot], b);
                }
                if (slice + own_column < static_cast<unsigned>(columns))
                    shared.sum[c * columns + slice + own_column] += sum;
                if (own_column == 0 && slice == 0) shared.count[c] += count;
            }
            blocks::arrive();
            pending = true;
        }
    }
    if (!pending) blocks::arrive();
    __syncthreads();
    if (invalid_rows) {
        if (blockIdx.x < Tile::cluster && without > 0)
            atomicAdd(invalid_rows, static_cast<unsigned long long>(without));
        if (lane == 0 && left_out > 0) atomicAdd(invalid_rows, static_cast<unsigned long long>(left_out));
    }
}

/// Counts and sums of a small batch. A block takes 2^block_bits codes.
template <class Tile, class X>
__global__ __launch_bounds__(Tile::threads, Tile::blocks) void gather(detail::accumulate_args<X> a, row_source source,
                                                                      int block_bits, bool vectors, bool checks,
                                                                      bool add, unsigned long long* invalid_rows) {
    __shared__ gather_storage<Tile> shared;
    arch::wait_for_predecessor();
    arch::let_successor_start();
    const auto codes = gathered_codes::of<Tile>(a.sums.rows, block_bits);
    gather_codes(shared, a, source, codes, vectors, checks, invalid_rows);
    const int columns = static_cast<int>(a.x.columns);
    for (unsigned c = threadIdx.x / 32; c < codes.own_count; c += Tile::threads / 32) {
        const std::int64_t k = codes.code(c);
        for (int d = static_cast<int>(threadIdx.x) % 32; d < columns; d += 32)
            put(a.sums.row(k)[d], shared.sum[c * columns + d], add);
        if (threadIdx.x % 32 == 0) put(a.counts[k], shared.count[c], add);
    }
    arch::cluster<Tile::cluster>::wait();
}

}  // namespace cuvq::kernel
