// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Counts and sums of a small batch in one launch. Each cluster of blocks has a few codes of its own. Each of its blocks
// looks through the codes of all rows, and so knows where in the list of the cluster's rows, by code and in order, each
// of them belongs, without a word from the others. Where none of the cluster's codes has many rows, a block sums its
// own codes, a warp each; else it sums an equal part of that list, so that a code with many rows is the work of all
// blocks of the cluster. Looking through the codes grows with N K, so this is for batches of a few thousand rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>
#include <cub/warp/warp_scan.cuh>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/kernel/segments.cuh>
#include <cuvq/kernel/sort_rows.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Dynamic shared memory of `gather_codes`. Codes are counted within those of the cluster.
template <class Tile>
struct gather_storage {
    static constexpr int warps = Tile::threads / 32;
    static constexpr int most_codes = Tile::most_codes * Tile::cluster;  // of a cluster
    static constexpr int warp_rows = Tile::rows / warps;                 // that a warp looks through
    static constexpr int row_bits = Tile::cluster > 1 ? 16 : 13;
    using entry = std::conditional_t<(Tile::cluster > 1), std::uint32_t, std::uint16_t>;
    static_assert(Tile::rows <= 1 << 13 && warp_rows <= 1 << 10 && (Tile::cluster > 1 || most_codes <= 8),
                  "an entry holds a code and a row");
    static_assert(most_float_rows == 8, "a byte of bits");
    static_assert(Tile::most_apart * Tile::most_codes <= Tile::rows / Tile::cluster, "listed holds a block's own rows");

    union {
        segment_storage<Tile> segments;
        entry found[warps][warp_rows];  // a warp's rows of the cluster's codes: code << 10 | row of the warp
    };
    alignas(16) float sum[Tile::most_sums];            // [codes of the block][stride]
    float count[Tile::most_codes];                     // [codes of the block] of weights
    double part_sum[Tile::cluster][2][Tile::columns];  // sent by each block: of the first and the last code of its part
    double part_count[Tile::cluster][2];               // of the list, where others have rows of them too
    arch::mailbox<Tile::cluster> box;                  // of these four
    entry listed[Tile::rows / Tile::cluster];          // the block's part of the list: code << row_bits | row
    std::uint8_t bad[Tile::rows / Tile::cluster / most_float_rows];  // of the list, a bit each
    std::uint32_t place[warps][most_codes];         // rows that a warp has found; then their place in the list
    std::uint32_t start[most_codes + 1];            // list position of a code's first row
    std::uint32_t ordered[(most_codes + 31) / 32];  // rows of the codes that each ordering warp takes
    typename cub::WarpScan<std::uint32_t>::TempStorage scan[warps];

    /// Row i of the block's part of the list.
    __device__ coded_row row(std::int64_t i) const {
        const std::uint32_t e = listed[i];
        return {e >> row_bits, e & ((1u << row_bits) - 1)};
    }
};

/// The codes of a cluster, and those of one of its blocks. Cluster c of C, a power of two, has codes c, c + C, c + 2 C,
/// ...: where the lower codes are the more frequent ones, as in a codebook that was sorted so, clusters still get about
/// as many rows.
struct gathered_codes {
    std::uint32_t cluster, mask;   // mask: the bits that tell a code's cluster, and the highest
    int cluster_bits, block_bits;  // log2 of the clusters, and of the codes of a block
    unsigned own, own_count;       // of this block: the first, counted within the cluster's, and their number

    /// `extra` clusters at the end have no codes.
    template <class Tile>
    static __device__ gathered_codes of(std::int64_t codes, int block_bits, unsigned extra = 0) {
        gathered_codes g;
        const unsigned rank = blockIdx.x % Tile::cluster, clusters = gridDim.x / Tile::cluster - extra;
        g.cluster = blockIdx.x / Tile::cluster;
        g.mask = (clusters - 1) | 1u << 31;  // so that `coded_row::none` is in no cluster
        g.cluster_bits = 31 - __clz(static_cast<int>(clusters));
        g.block_bits = block_bits;
        g.own = rank << block_bits;
        const int count = ((static_cast<int>(codes) - 1 - static_cast<int>(g.cluster)) >> g.cluster_bits) + 1;
        g.own_count = min(max(count - static_cast<int>(g.own), 0), 1 << block_bits);
        return g;
    }
    /// Code c of this block.
    __device__ std::int64_t code(unsigned c) const { return cluster + (std::int64_t{own + c} << cluster_bits); }
    /// Whether it is one of the cluster's; `coded_row::none` is not.
    __device__ bool has(std::uint32_t code) const { return (code & mask) == cluster; }
    /// Number of a code within its cluster.
    __device__ std::uint32_t within(std::uint32_t code) const { return code >> cluster_bits; }
};

/// A warp looks through the codes of its rows, from `first` to `stop` - 1: it writes those of the cluster's codes to
/// shared.found, returns their number, and leaves that of each code in shared.place. `without` gets the rows without a
/// code added, in block 0 alone.
template <class Tile>
__device__ int find_rows(gather_storage<Tile>& shared, const row_source& source, const gathered_codes& codes, int first,
                         int stop, unsigned& without) {
    using storage = gather_storage<Tile>;
    using entry = typename storage::entry;
    constexpr int quads = 4, round = 128 * quads;  // rows at a time: of a lane, so many times four
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    entry* const found = shared.found[warp];
    int rows = 0;
#pragma unroll 1
    for (int at = first; at < stop; at += round) {
        std::uint32_t code[4 * quads];
        source.load_quads<quads>(at + 4 * lane, stop, code);
#pragma unroll
        for (int q = 0; q < quads; ++q) {
            int to = rows;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const unsigned hits = __ballot_sync(0xFFFFFFFFu, codes.has(code[4 * q + i]));
                to += __popc(hits & ((1u << lane) - 1));
                rows += __popc(hits);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const std::uint32_t of = code[4 * q + i];
                const int row = at - first + 4 * lane + 128 * q + i;
                if (codes.has(of)) found[to++] = static_cast<entry>(codes.within(of) << 10 | row);
            }
        }
        if (blockIdx.x == 0) {
#pragma unroll
            for (int i = 0; i < 4 * quads; ++i)
                without += code[i] == coded_row::none && at + 4 * lane + i / 4 * 128 + i % 4 < stop;
        }
    }
    for (int c = lane; c < storage::most_codes; c += 32) shared.place[warp][c] = 0;
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < rows; i += 4 * 32) {
        unsigned code[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) code[j] = i + 32 * j < rows ? found[i + 32 * j] >> 10 : 0;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (i + 32 * j < rows) atomicAdd(&shared.place[warp][code[j]], 1u);
    }
    return rows;
}

/// A block's part of the list of the cluster's rows: if `apart`, which it is where no code of the cluster has more than
/// Tile::most_apart, those of its own codes, else as many as the other blocks take.
struct list_part {
    unsigned begin, length, most;  // most: length of a full part, if not apart
    bool apart;
};

/// Lists the rows of the cluster's codes: the block's part of them to shared.listed, and shared.start. Ends with a
/// barrier.
template <class Tile>
__device__ list_part list_rows(gather_storage<Tile>& shared, const row_source& source, const gathered_codes& codes,
                               unsigned& without) {
    using storage = gather_storage<Tile>;
    constexpr int warps = storage::warps, most_codes = storage::most_codes;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int count = static_cast<int>(source.count), per_warp = ((count - 1) / (128 * warps) + 1) * 128;
    const int first = warp * per_warp, stop = max(first, min(first + per_warp, count));
    const int found = find_rows(shared, source, codes, first, stop, without);
    bool alike = false;  // so many that it counts, and all of one code
    if (found > 64) {
        __syncwarp();
        alike = shared.place[warp][shared.found[warp][0] >> 10] == static_cast<unsigned>(found);
    }
    __syncthreads();
    // By code, then by warp: a thread for each code.
    constexpr int ordering = (most_codes + 31) / 32;  // warps
    const int code = static_cast<int>(threadIdx.x);
    std::uint32_t own[warps], total = 0, start = 0;
    if (warp < ordering) {
#pragma unroll
        for (int w = 0; w < warps; ++w) {
            own[w] = code < most_codes ? shared.place[w][code] : 0;
            total += own[w];
        }
        std::uint32_t all;
        cub::WarpScan<std::uint32_t>(shared.scan[warp]).ExclusiveSum(total, start, all);
        if (lane == 0) shared.ordered[warp] = all;
    }
    if (ordering > 1) __syncthreads();
    if (code < most_codes) {
#pragma unroll
        for (int w = 0; w < ordering - 1; ++w)
            if (w < warp) start += shared.ordered[w];
        shared.start[code] = start;
        if (code == most_codes - 1) shared.start[most_codes] = start + total;
#pragma unroll
        for (int w = 0; w < warps; ++w) {
            shared.place[w][code] = start;
            start += own[w];
        }
    }
    list_part part;
    part.apart = __syncthreads_or(total > Tile::most_apart) == 0;
    const unsigned all = shared.start[most_codes];
    if (part.apart) {
        part.begin = shared.start[codes.own];
        part.length = part.most = shared.start[codes.own + codes.own_count] - part.begin;
    } else {  // whole batches of a warp
        part.most = (all + Tile::cluster * most_float_rows - 1) / (Tile::cluster * most_float_rows) * most_float_rows;
        part.begin = arch::cluster<Tile::cluster>::rank() * part.most;
        part.length = all <= part.begin ? 0 : min(all - part.begin, part.most);
    }
    const auto put_row = [&](unsigned place, unsigned entry) {
        const unsigned to = place - part.begin;
        if (to < part.length)
            shared.listed[to] =
                static_cast<typename storage::entry>(entry >> 10 << storage::row_bits | (first + (entry & 1023u)));
    };
    if (alike) {  // only those of the block's part
        const unsigned place = shared.place[warp][shared.found[warp][0] >> 10];
        const int before = static_cast<int>(part.begin) - static_cast<int>(place);
        const int end = min(before + static_cast<int>(part.length), found);
        for (int i = max(before, 0) + lane; i < end; i += 32) put_row(place + i, shared.found[warp][i]);
    } else {
        constexpr unsigned none = 0xFFFFFFFFu;
        unsigned next = lane < found ? shared.found[warp][lane] : none;
#pragma unroll 1
        for (int at = 0; at < found; at += 32) {
            const unsigned entry = next, code = entry >> 10;
            next = at + 32 + lane < found ? shared.found[warp][at + 32 + lane] : none;
            const unsigned peers = __match_any_sync(0xFFFFFFFFu, code);
            const int before = __popc(peers & ((1u << lane) - 1));
            if (entry != none) put_row(shared.place[warp][code] + before, entry);
            __syncwarp();
            if (entry != none && before == 0) shared.place[warp][code] += __popc(peers);
            __syncwarp();
        }
    }
    __syncthreads();
    return part;
}

/// Takes the rows that hold a NaN or Inf off the block's part of the list; returns how many are left. Whole block.
template <class Tile, class X>
__device__ int drop_bad_rows(gather_storage<Tile>& shared, const matrix_ref<const X>& x, bool vectors, int length,
                             unsigned& left_out) {
    using storage = gather_storage<Tile>;
    constexpr int batch = most_float_rows, columns_per_lane = Tile::columns / 32;
    constexpr unsigned row_mask = (1u << storage::row_bits) - 1;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    unsigned dropped = 0;
    for (int i = warp * batch; i < length; i += storage::warps * batch) {
        const X* row[batch];
#pragma unroll
        for (int j = 0; j < batch; ++j) row[j] = x.row(shared.listed[min(i + j, length - 1)] & row_mask);
        float probe[batch] = {};  // NaN as soon as an element is NaN or Inf
        for (std::int64_t d = lane * columns_per_lane; d - lane * columns_per_lane < x.columns; d += Tile::columns) {
            float value[batch][columns_per_lane];
            read_rows(value, row, d, x.columns, vectors);
#pragma unroll
            for (int j = 0; j < batch; ++j)
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c) probe[j] = __fmaf_rn(value[j][c], 0.0f, probe[j]);
        }
        unsigned bad = 0;
#pragma unroll
        for (int j = 0; j < batch; ++j)
            if (!__all_sync(0xFFFFFFFFu, probe[j] == 0) && i + j < length) bad |= 1u << j;
        if (lane == 0) shared.bad[i / batch] = static_cast<std::uint8_t>(bad);
        dropped += __popc(bad);
    }
    left_out += dropped;
    if (!__syncthreads_or(dropped > 0)) return length;
    int kept = 0;
    if (warp == 0) {
        for (int at = 0; at < length; at += 32) {
            const int i = at + lane;
            const bool keep = i < length && !(shared.bad[i / batch] >> i % batch & 1);
            const typename storage::entry e = keep ? shared.listed[i] : typename storage::entry{0};
            const unsigned keeps = __ballot_sync(0xFFFFFFFFu, keep);
            __syncwarp();  // all have read
            if (keep) shared.listed[kept + __popc(keeps & ((1u << lane) - 1))] = e;
            kept += __popc(keeps);
            __syncwarp();
        }
        if (lane == 0) shared.place[0][0] = kept;
    }
    __syncthreads();
    return static_cast<int>(shared.place[0][0]);
}

/// Floats between two codes in gather_storage::sum: rows of 16 bytes.
__device__ inline int gather_stride(std::int64_t columns) { return (static_cast<int>(columns) + 3) / 4 * 4; }

/// What the blocks of a cluster do before their first access to global memory.
template <class Tile>
__device__ void open_gather(gather_storage<Tile>& shared) {
    if (threadIdx.x == 0) shared.box.open();
    __syncwarp();
    arch::cluster<Tile::cluster>::arrive_relaxed();
}

/// Sums the rows of the block's codes, a warp each code, into shared.sum and shared.count. The block's part of the list
/// begins at `begin` and had `listed` rows, of which `drop_bad_rows` has left `length`. Whole block.
template <class Tile, class X>
__device__ void sum_own_codes(gather_storage<Tile>& shared, const detail::accumulate_args<X>& a,
                              const gathered_codes& codes, bool vectors, unsigned begin, int listed, int length,
                              unsigned& left_out) {
    using storage = gather_storage<Tile>;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int stride = gather_stride(a.x.columns);
    const auto row_at = [&](std::int64_t i) { return shared.row(i); };
    std::uint32_t* const start = shared.start + codes.own;
    if (length < listed) {  // those behind the ones dropped have moved up
        __syncthreads();
        for (unsigned c = threadIdx.x; c <= codes.own_count; c += Tile::threads) {
            unsigned before = 0;
            for (int i = 0; i < length; ++i) before += shared.row(i).code < codes.own + c;
            start[c] = begin + before;
        }
        __syncthreads();
    }
    const auto no_other = [](std::int64_t, std::uint32_t, const auto&, double) {};  // never called: there is one code
#pragma unroll 1
    for (unsigned c = warp; c < codes.own_count; c += storage::warps) {
        const int first = static_cast<int>(start[c] - begin), last = static_cast<int>(start[c + 1] - begin);
        const bool has_rows = first < last;
#pragma unroll 1
        for (int slice = 0; slice < stride; slice += Tile::columns) {
            if (has_rows)
                sum_rows<false>(shared.segments, a, 0, slice, vectors, first, last, left_out, row_at, no_other);
            __syncwarp();
            for (int column = lane; column < min(stride - slice, Tile::columns); column += 32)
                shared.sum[static_cast<int>(c) * stride + slice + column] =
                    has_rows ? static_cast<float>(shared.segments.sum[warp][0][column]) : 0.0f;
            if (slice == 0 && lane == 0)
                shared.count[c] = has_rows ? static_cast<float>(shared.segments.count[warp][0]) : 0.0f;
            __syncwarp();
        }
    }
}

/// Sums the rows of the block's codes into shared.sum and shared.count, after `open_gather`. `checks`: rows that hold a
/// NaN or Inf are looked for before summing, since a slice may not see all of a row; where there is one slice, summing
/// finds them. `invalid_rows`: null, or gets the rows without a code and those not finite added. After it warp w
/// may read the counts and sums of the block's codes w, w + warps, ...; others need a barrier first.
template <class Tile, class X>
__device__ void gather_codes(gather_storage<Tile>& shared, const detail::accumulate_args<X>& a,
                             const row_source& source, const gathered_codes& codes, bool vectors, bool checks,
                             unsigned long long* invalid_rows) {
    using blocks = arch::cluster<Tile::cluster>;
    using storage = gather_storage<Tile>;
    constexpr int warps = storage::warps, columns_per_lane = Tile::columns / 32;
    static_assert(columns_per_lane == 4, "a lane sends four sums at once");
    const int lane = static_cast<int>(threadIdx.x) % 32, stride = gather_stride(a.x.columns);
    const unsigned rank = blocks::rank(), own_mask = (1u << codes.block_bits) - 1;
    unsigned left_out = 0, without = 0;
    const list_part own = list_rows(shared, source, codes, without);
    const auto report = [&] {
        if (!invalid_rows) return;
        if (blockIdx.x == 0 && without > 0) atomicAdd(invalid_rows, static_cast<unsigned long long>(without));
        if (lane == 0 && left_out > 0) atomicAdd(invalid_rows, static_cast<unsigned long long>(left_out));
    };
    blocks::wait();  // all have opened their mailboxes
    const int listed = static_cast<int>(own.length);
    const int length = checks && listed > 0 ? drop_bad_rows(shared, a.x, vectors, listed, left_out) : listed;
    if (own.apart) {
        sum_own_codes(shared, a, codes, vectors, own.begin, listed, length, left_out);
        report();
        return;
    }
    const unsigned begin = own.begin, end = own.begin + own.length, part = own.most;
    // i / part by a product: positions and parts are far below 2^16.
    const unsigned inverse = part > 1 ? 0xFFFFFFFFu / part + 1 : 0;
    const auto part_of = [&](unsigned i) { return __umulhi(i, inverse); };
    const int most = ((length + warps - 1) / warps + most_float_rows - 1) / most_float_rows * most_float_rows;
    for (int slice = 0; slice < stride; slice += Tile::columns) {
        if (slice > 0) blocks::sync();  // all are done with the parts of the slice before
        const int width = min(stride - slice, Tile::columns);
        if (threadIdx.x == Tile::threads - 1) {  // every block with rows of a code sends one sum of it
            unsigned bytes = 0;
            for (unsigned c = 0; c < codes.own_count; ++c) {
                const unsigned begins = shared.start[codes.own + c], ends = shared.start[codes.own + c + 1];
                if (begins == ends) continue;
                const unsigned parts = part_of(ends - 1) - part_of(begins) + 1;
                bytes += parts == 1 ? sizeof(float) : parts * sizeof(double);
            }
            shared.box.expect(bytes * (width + (slice == 0 ? 1 : 0)));
        }
        const auto add = [&](const open_segment& segment, int column) {
            const unsigned code = segment.code, owner = code >> codes.block_bits, starts = shared.start[code];
            const bool whole = starts >= begin && shared.start[code + 1] <= end;
            const bool has_column = column < width, has_count = column == 0 && slice == 0;
            if (whole) {
                const unsigned own_code = code & own_mask;
                float* sum = shared.sum + own_code * stride + slice + column;
                if (has_column) shared.box.send(sum, owner, static_cast<float>(segment.sum));
                if (has_count) shared.box.send(&shared.count[own_code], owner, static_cast<float>(segment.count));
            } else {
                const int slot = starts <= begin ? 0 : 1;
                if (has_column) shared.box.send(shared.part_sum[rank][slot] + column, owner, segment.sum);
                if (has_count) shared.box.send(&shared.part_count[rank][slot], owner, segment.count);
            }
        };
        if (length > 0) {
            const auto row_at = [&](std::int64_t i) { return shared.row(i); };
            const auto emit_warp = [&](std::int64_t first, std::uint32_t code, const double(&sum)[columns_per_lane],
                                       double weights) {
                const unsigned owner = code >> codes.block_bits;
                if (first < stride)
                    shared.box.send(shared.sum + (code & own_mask) * stride + first, owner,
                                    {static_cast<float>(sum[0]), static_cast<float>(sum[1]), static_cast<float>(sum[2]),
                                     static_cast<float>(sum[3])});
                if (first == 0) shared.box.send(&shared.count[code & own_mask], owner, static_cast<float>(weights));
            };
            const int own_begin = static_cast<int>(threadIdx.x) / 32 * most, own_end = min(own_begin + most, length);
            if (own_begin < own_end)
                sum_rows<true>(shared.segments, a, 0, slice, vectors, own_begin, own_end, left_out, row_at, emit_warp);
            else
                shared.segments.leave_none();
            __syncthreads();
            merge_segments(shared.segments, width, add);
        }
        if (length < listed) {  // what is expected of codes whose rows are all bad
            for (unsigned code = 0; code < storage::most_codes; ++code) {
                if (max(shared.start[code], begin) >= min(shared.start[code + 1], end)) continue;
                bool has_row = false;
                for (int i = static_cast<int>(threadIdx.x); i < length; i += Tile::threads)
                    has_row = has_row || shared.row(i).code == code;
                if (!__syncthreads_or(has_row)) add({code}, static_cast<int>(threadIdx.x));
            }
        }
        shared.box.receive(static_cast<unsigned>(slice / Tile::columns));
        for (unsigned c = threadIdx.x / Tile::columns; c < codes.own_count; c += Tile::threads / Tile::columns) {
            const unsigned begins = shared.start[codes.own + c], ends = shared.start[codes.own + c + 1];
            const unsigned from = part_of(begins), to = ends == begins ? from : part_of(ends - 1);
            if (from == to && begins < ends) continue;
            const unsigned column = threadIdx.x % Tile::columns;
            double sum = 0, count = 0;
#pragma unroll
            for (unsigned b = 0; b < Tile::cluster; ++b) {
                if (from == to || b < from || b > to) continue;
                const int slot = b == from && begins != from * part ? 1 : 0;
                sum += shared.part_sum[b][slot][column];
                count += shared.part_count[b][slot];
            }
            if (static_cast<int>(column) < width) shared.sum[c * stride + slice + column] = static_cast<float>(sum);
            if (column == 0 && slice == 0) shared.count[c] = static_cast<float>(count);
        }
    }
    __syncthreads();
    report();
}

/// The body of `gather`: also writes what `gather_codes` sums to counts and sums, or `add`s it there. Returns the codes
/// of the block, whose sums are still in `shared`.
template <class Tile, class X>
__device__ gathered_codes gather_batch(gather_storage<Tile>& shared, int block_bits,
                                       const detail::accumulate_args<X>& a, const row_source& source, bool vectors,
                                       bool checks, bool add, unsigned long long* invalid_rows) {
    open_gather(shared);
    arch::wait_for_predecessor();
    arch::let_successor_start();
    const auto codes = gathered_codes::of<Tile>(a.sums.rows, block_bits);
    gather_codes(shared, a, source, codes, vectors, checks, invalid_rows);
    const int columns = static_cast<int>(a.x.columns), stride = gather_stride(columns);
    for (unsigned c = threadIdx.x / 32; c < codes.own_count; c += Tile::threads / 32) {
        const std::int64_t k = codes.code(c);
        for (int d = static_cast<int>(threadIdx.x) % 32; d < columns; d += 32)
            put(a.sums.row(k)[d], shared.sum[c * stride + d], add);
        if (threadIdx.x % 32 == 0) put(a.counts[k], shared.count[c], add);
    }
    return codes;
}

/// Counts and sums of a small batch. A block takes 2^block_bits codes.
template <class Tile, class X>
__global__ __launch_bounds__(Tile::threads, Tile::blocks) void gather(int block_bits, detail::accumulate_args<X> a,
                                                                      row_source source, bool vectors, bool checks,
                                                                      bool add, unsigned long long* invalid_rows) {
    extern __shared__ __align__(128) char dynamic_shared[];
    auto& shared = *reinterpret_cast<gather_storage<Tile>*>(dynamic_shared);
    gather_batch(shared, block_bits, a, source, vectors, checks, add, invalid_rows);
}

}  // namespace cuvq::kernel
