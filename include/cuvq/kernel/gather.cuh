// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Counts and sums of a small batch in one launch. Each cluster of blocks has a few codes of its own. Each of its blocks
// looks through the codes of all rows, and so knows where each of the cluster's rows belongs, by code and in order,
// without a word from the others. The rows of codes that have few are listed for the block whose code it is, and summed
// by it, a warp a code. Those of the other codes are a list that the cluster shares: each block sums an equal part of
// it, and sends what it has of a code to the block whose code it is. Looking through the codes grows with N K, so this
// is for batches of a few thousand rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>
#include <cub/warp/warp_reduce.cuh>
#include <cub/warp/warp_scan.cuh>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/kernel/row_adder.cuh>
#include <cuvq/kernel/segments.cuh>
#include <cuvq/kernel/sort_rows.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Rows begin .. end - 1 of a list.
struct list_range {
    unsigned begin, end;

    __device__ bool has_rows() const { return begin < end; }
};

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
    static constexpr int most_own = Tile::most_codes * Tile::most_own_rows;  // rows that the block sums alone

    union {
        segment_storage<Tile> segments;
        entry found[warps][warp_rows];  // a warp's rows of the cluster's codes: code << 10 | row of the warp
    };
    alignas(16) float sum[Tile::most_sums];            // [codes of the block][stride]
    float count[Tile::most_codes];                     // [codes of the block] of weights
    double part_sum[Tile::cluster][2][Tile::columns];  // sent by each block: of the first and the last code of its part
    double part_count[Tile::cluster][2];               // of the shared list, where others have rows of them too
    arch::mailbox<Tile::cluster> box;                  // of these four
    entry listed[most_own + Tile::rows / Tile::cluster];  // the block's own rows; its part of the shared: code, row
    std::uint32_t place[warps][most_codes];               // rows that a warp has found; then their place in a list
    std::uint32_t start[most_codes + 1];            // of a code's first row: in the own lists, << 16 in the shared
    std::uint32_t ordered[(most_codes + 31) / 32];  // rows of the codes that each ordering warp takes, likewise
    typename cub::WarpScan<std::uint32_t>::TempStorage scan[warps];
    typename cub::WarpReduce<unsigned>::TempStorage reduce;

    /// Where the rows of a code are in the own lists of the cluster's blocks, or in its shared list.
    __device__ list_range own_rows(unsigned code) const { return {start[code] & 0xFFFFu, start[code + 1] & 0xFFFFu}; }
    __device__ list_range shared_rows(unsigned code) const { return {start[code] >> 16, start[code + 1] >> 16}; }
    /// Row i of what the block has listed.
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

/// What a block has listed: its own rows, which begin at `own` in the own lists of its cluster, and its part of the
/// shared list: rows begin .. end - 1, `most` of them but in the last part that has any. `all`: rows of that list.
struct listed_rows {
    unsigned own, begin, end, most, all;

    /// Whether block `b` of the cluster has some of these rows of the shared list.
    __device__ bool has_share(unsigned b, const list_range& rows) const {
        return max(rows.begin, b * most) < min(rows.end, (b + 1) * most);
    }
};

/// Lists the rows of the cluster's codes: those of the block to shared.listed, and shared.start. Ends with a barrier.
template <class Tile>
__device__ listed_rows list_rows(gather_storage<Tile>& shared, const row_source& source, const gathered_codes& codes,
                                 unsigned& without) {
    using storage = gather_storage<Tile>;
    constexpr int warps = storage::warps, most_codes = storage::most_codes;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int count = static_cast<int>(source.count), per_warp = ((count - 1) / (128 * warps) + 1) * 128;
    const int first = warp * per_warp, stop = max(first, min(first + per_warp, count));
    const int found = find_rows(shared, source, codes, first, stop, without);
    bool alike = false;  // so many that it counts, and all of one code, which is shared
    if (found > 64) {
        __syncwarp();
        alike = shared.place[warp][shared.found[warp][0] >> 10] == static_cast<unsigned>(found);
    }
    __syncthreads();
    // By code, then by warp: a thread for each code.
    constexpr int ordering = (most_codes + 31) / 32;  // warps
    const int code = static_cast<int>(threadIdx.x);
    constexpr std::uint32_t is_shared = 1 << 15;  // on a place
    std::uint32_t own[warps], total = 0, start = 0;
    if (warp < ordering) {
#pragma unroll
        for (int w = 0; w < warps; ++w) {
            own[w] = code < most_codes ? shared.place[w][code] : 0;
            total += own[w];
        }
        if (total > Tile::most_own_rows) total <<= 16;
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
        std::uint32_t place = total >> 16 != 0 ? start >> 16 | is_shared : start & 0xFFFFu;
#pragma unroll
        for (int w = 0; w < warps; ++w) {
            shared.place[w][code] = place;
            place += own[w];
        }
    }
    __syncthreads();
    listed_rows list;
    list.own = shared.own_rows(codes.own).begin;
    const unsigned own_count = (shared.start[codes.own + codes.own_count] & 0xFFFFu) - list.own;
    list.all = shared.start[most_codes] >> 16;
    list.most =  // whole batches of a warp
        (list.all + Tile::cluster * most_float_rows - 1) / (Tile::cluster * most_float_rows) * most_float_rows;
    list.begin = min(arch::cluster<Tile::cluster>::rank() * list.most, list.all);
    list.end = min(list.begin + list.most, list.all);
    const auto put_row = [&](unsigned place, unsigned entry) {
        const bool shares = (place & is_shared) != 0;
        const unsigned to = place - (shares ? list.begin | is_shared : list.own);
        if (to < (shares ? list.end - list.begin : own_count))
            shared.listed[shares ? storage::most_own + to : to] =
                static_cast<typename storage::entry>(entry >> 10 << storage::row_bits | (first + (entry & 1023u)));
    };
    if (alike) {  // only those of the block's part
        const unsigned place = shared.place[warp][shared.found[warp][0] >> 10];
        const int before = static_cast<int>(list.begin | is_shared) - static_cast<int>(place);
        const int end = min(before + static_cast<int>(list.end - list.begin), found);
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
    return list;
}

/// Takes the rows that hold a NaN or Inf off rows begin .. end - 1 of what the block has listed; returns the new end.
/// Whole warp.
template <class Tile, class X>
__device__ int drop_bad_rows(gather_storage<Tile>& shared, const matrix_ref<const X>& x, bool vectors, int begin,
                             int end, unsigned& left_out) {
    constexpr int batch = most_float_rows, columns_per_lane = Tile::columns / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int kept = begin;
    for (int at = begin; at < end; at += batch) {
        const int in_batch = min(end - at, batch);
        const X* row[batch];
#pragma unroll
        for (int j = 0; j < batch; ++j) row[j] = x.row(shared.row(min(at + j, end - 1)).row);
        float probe[batch] = {};  // NaN as soon as an element is NaN or Inf
        for (std::int64_t d = lane * columns_per_lane; d - lane * columns_per_lane < x.columns; d += Tile::columns) {
            float value[batch][columns_per_lane];
            read_rows(value, row, d, x.columns, vectors);
#pragma unroll
            for (int j = 0; j < batch; ++j)
#pragma unroll
                for (int c = 0; c < columns_per_lane; ++c) probe[j] = __fmaf_rn(value[j][c], 0.0f, probe[j]);
        }
        unsigned good = 0;
#pragma unroll
        for (int j = 0; j < batch; ++j)
            if (__all_sync(0xFFFFFFFFu, probe[j] == 0)) good |= 1u << j;
        good &= (1u << in_batch) - 1;
        const auto entry = shared.listed[at + min(lane, in_batch - 1)];
        __syncwarp();  // all have read
        if (good >> lane & 1) shared.listed[kept + __popc(good & ((1u << lane) - 1))] = entry;
        __syncwarp();
        kept += __popc(good);
        left_out += in_batch - __popc(good);
    }
    return kept;
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

/// The sum of what the first `count` lanes have. Whole warp.
__device__ inline float sum_of_weights(float own, int count) {
    double sum = static_cast<int>(threadIdx.x) % 32 < count ? own : 0;
#pragma unroll 1
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    return static_cast<float>(sum);
}

/// Sums the rows of the block's codes that are not shared into shared.sum and shared.count, a warp each code: warp w
/// those numbered w, w + warps, ..., or, `from_last`, as if the warps were numbered from the last. `own`: see
/// `listed_rows`.
template <class Tile, class X>
__device__ void sum_own_codes(gather_storage<Tile>& shared, const detail::accumulate_args<X>& a,
                              const gathered_codes& codes, bool vectors, bool checks, unsigned own, bool from_last,
                              unsigned& left_out) {
    constexpr int warps = gather_storage<Tile>::warps, columns_per_lane = Tile::columns / 32;
    static_assert(Tile::most_own_rows <= 32 && columns_per_lane == 4,
                  "a lane for each row; it writes four sums at once");
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int stride = gather_stride(a.x.columns);
#pragma unroll 1
    for (unsigned c = from_last ? warps - 1 - warp : warp; c < codes.own_count; c += warps) {
        if (shared.shared_rows(codes.own + c).has_rows()) continue;
        const list_range rows = shared.own_rows(codes.own + c);
        const int first = static_cast<int>(rows.begin - own);
        int last = static_cast<int>(rows.end - own);
        unsigned bad = 0;  // rows that a slice has found
        do {
            if (bad > 0) last = drop_bad_rows(shared, a.x, vectors, first, last, left_out);
            bad = 0;
            const bool has_row = first + lane < last;
            const std::uint32_t row = has_row ? shared.row(first + lane).row : 0;
            const float weight = has_row && a.weights ? a.weights[row] : 1.0f;
#pragma unroll 1
            for (int slice = 0; slice < stride; slice += Tile::columns) {
                const row_adder<Tile, X> adder{a, 0, slice, vectors};
                float sum[columns_per_lane] = {}, count = 0;
                if (first < last) {
                    if (adder.sum_few(sum, row, weight, last - first)) {
                        count = a.weights ? sum_of_weights(weight, last - first) : static_cast<float>(last - first);
                    } else {
                        segment_sum<columns_per_lane> segment;
                        adder.add_one_by_one(segment, row, weight, 0, last - first, bad);
#pragma unroll
                        for (int i = 0; i < columns_per_lane; ++i) sum[i] = static_cast<float>(segment.sum[i]);
                        count = static_cast<float>(segment.count);
                    }
                }
                const int column = static_cast<int>(adder.first_column());
                if (column < stride)
                    *reinterpret_cast<float4*>(shared.sum + static_cast<int>(c) * stride + column) =
                        float4{sum[0], sum[1], sum[2], sum[3]};
                if (column == 0) shared.count[c] = count;
            }
        } while (checks && bad > 0);  // other slices have added those rows
        left_out += bad;
    }
    __syncwarp();
}

/// Of the block's part of the shared list, the warp's rows: listed rows first .. last - 1, of which there were `listed`
/// before some were dropped.
struct shared_part {
    int first, last, listed;

    template <class Tile>
    static __device__ shared_part of(const listed_rows& list) {
        using storage = gather_storage<Tile>;
        constexpr int batches = storage::warps * most_float_rows;  // whole ones for a warp
        const int length = static_cast<int>(list.end - list.begin), warp = static_cast<int>(threadIdx.x) / 32;
        const int most = (length + batches - 1) / batches * most_float_rows;
        shared_part part{};
        part.first = storage::most_own + min(warp * most, length);
        part.last = storage::most_own + min((warp + 1) * most, length);
        part.listed = part.last - part.first;
        return part;
    }
};

/// Bytes that the block is sent for each column. Whole warp; in lane 0.
template <class Tile>
__device__ unsigned expected_bytes(gather_storage<Tile>& shared, const gathered_codes& codes, const listed_rows& list) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    unsigned bytes = 0;
    if (lane < static_cast<int>(codes.own_count)) {
        const list_range rows = shared.shared_rows(codes.own + lane);
        unsigned blocks = 0;  // that have some of them
#pragma unroll
        for (unsigned b = 0; b < Tile::cluster; ++b) blocks += list.has_share(b, rows);
        bytes = blocks == 1 ? sizeof(float) : blocks * sizeof(double);
    }
    return cub::WarpReduce<unsigned>(shared.reduce).Sum(bytes);
}

/// Where the warp's rows are few, all of one code, without weights, and their sum is finite: leaves it where `sum_rows`
/// would, and returns true.
template <class Tile, class X>
__device__ bool sum_short_run(gather_storage<Tile>& shared, const detail::accumulate_args<X>& a,
                              const shared_part& part, bool vectors, int slice) {
    constexpr int most = 2 * most_float_rows, columns_per_lane = Tile::columns / 32;
    constexpr unsigned all = 0xFFFFFFFFu;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int count = part.last - part.first;
    if (count > most || a.weights) return false;
    const coded_row mine = shared.row(part.first + min(lane, count - 1));
    if (!__all_sync(all, mine.code == __shfl_sync(all, mine.code, 0))) return false;
    const row_adder<Tile, X> adder{a, 0, slice, vectors};
    float sum[columns_per_lane];
    if (!adder.sum_few(sum, mine.row, 1.0f, count)) return false;
#pragma unroll
    for (int c = 0; c < columns_per_lane; ++c) shared.segments.sum[warp][0][lane * columns_per_lane + c] = sum[c];
    if (lane == 0) {
        shared.segments.count[warp][0] = count;
        shared.segments.code[warp][0] = mine.code;
        shared.segments.code[warp][1] = coded_row::none;
    }
    return true;
}

/// Sums the block's part of the shared list, columns `slice` and on, and sends the sums to the blocks whose codes they
/// are of. Whole block.
template <class Tile, class X>
__device__ void send_shares(gather_storage<Tile>& shared, const detail::accumulate_args<X>& a,
                            const gathered_codes& codes, const listed_rows& list, const shared_part& part, bool vectors,
                            bool checks, int slice, unsigned& left_out) {
    using storage = gather_storage<Tile>;
    constexpr int columns_per_lane = Tile::columns / 32;
    static_assert(columns_per_lane == 4, "a lane sends four sums at once");
    const int stride = gather_stride(a.x.columns), width = min(stride - slice, Tile::columns);
    const unsigned rank = arch::cluster<Tile::cluster>::rank(), own_mask = (1u << codes.block_bits) - 1;
    const auto add = [&](const open_segment& segment, int column) {
        const unsigned code = segment.code, owner = code >> codes.block_bits;
        const list_range rows = shared.shared_rows(code);
        const bool has_column = column < width, has_count = column == 0 && slice == 0;
        if (rows.begin >= list.begin && rows.end <= list.end) {
            float* sum = shared.sum + (code & own_mask) * stride + slice + column;
            if (has_column) shared.box.send(sum, owner, static_cast<float>(segment.sum));
            if (has_count) shared.box.send(&shared.count[code & own_mask], owner, static_cast<float>(segment.count));
        } else {
            const int slot = rows.begin <= list.begin ? 0 : 1;
            if (has_column) shared.box.send(shared.part_sum[rank][slot] + column, owner, segment.sum);
            if (has_count) shared.box.send(&shared.part_count[rank][slot], owner, segment.count);
        }
    };
    if (part.first == part.last) {
        shared.segments.leave_none();
    } else if (!sum_short_run(shared, a, part, vectors, slice)) {
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
        sum_rows<true>(shared.segments, a, 0, slice, vectors, part.first, part.last, left_out, row_at, emit_warp);
    }
    __syncthreads();
    if (threadIdx.x / 32 == storage::warps - 1) {  // it rarely has something to merge
        const unsigned bytes = expected_bytes(shared, codes, list);
        if (threadIdx.x % 32 == 0) shared.box.expect(bytes * (width + (slice == 0 ? 1 : 0)));
    }
    merge_segments(shared.segments, width, add);
    // What is expected of codes whose rows are all bad.
    if (checks && __syncthreads_or(part.last - part.first < part.listed)) {
        for (unsigned code = 0; code < storage::most_codes; ++code) {
            const list_range rows = shared.shared_rows(code);
            if (max(rows.begin, list.begin) >= min(rows.end, list.end)) continue;
            bool has_row = false;
            for (int i = part.first + static_cast<int>(threadIdx.x) % 32; i < part.last; i += 32)
                has_row = has_row || shared.row(i).code == code;
            if (!__syncthreads_or(has_row)) add({code}, static_cast<int>(threadIdx.x));
        }
    }
}

/// Waits for what all blocks send of the block's codes, and adds it up. Whole block.
template <class Tile>
__device__ void take_shares(gather_storage<Tile>& shared, const gathered_codes& codes, const listed_rows& list,
                            int slice, int stride) {
    constexpr int teams = Tile::threads / Tile::columns;
    const int lane = static_cast<int>(threadIdx.x) % 32, column = static_cast<int>(threadIdx.x) % Tile::columns;
    unsigned left = __ballot_sync(
        0xFFFFFFFFu, lane < static_cast<int>(codes.own_count) && shared.shared_rows(codes.own + lane).has_rows());
    shared.box.receive(static_cast<unsigned>(slice / Tile::columns));
#pragma unroll 1
    for (int number = 0; left != 0; ++number, left &= left - 1) {
        if (number % teams != static_cast<int>(threadIdx.x) / Tile::columns) continue;
        const int c = __ffs(static_cast<int>(left)) - 1;
        const list_range rows = shared.shared_rows(codes.own + c);
        int blocks = 0;  // that have some of them
        double sum = 0, count = 0;
#pragma unroll
        for (unsigned b = 0; b < Tile::cluster; ++b) {
            if (!list.has_share(b, rows)) continue;
            const int slot = rows.begin <= b * list.most ? 0 : 1;
            ++blocks;
            sum += shared.part_sum[b][slot][column];
            count += shared.part_count[b][slot];
        }
        if (blocks == 1) continue;  // it has sent the sum
        if (slice + column < stride) shared.sum[c * stride + slice + column] = static_cast<float>(sum);
        if (column == 0 && slice == 0) shared.count[c] = static_cast<float>(count);
    }
}

/// Sums the rows of the block's codes into shared.sum and shared.count, after `open_gather`. `checks`: there are
/// several slices, not each of which finds all rows that hold a NaN or Inf, so those of the shared list are looked for
/// before it is summed, and own rows again where a slice has found one. `invalid_rows`: null, or gets the rows without
/// a code and those not finite added. After it warp w may read the counts and sums of the block's codes w, w + warps,
/// ...; others need a barrier first.
template <class Tile, class X>
__device__ void gather_codes(gather_storage<Tile>& shared, const detail::accumulate_args<X>& a,
                             const row_source& source, const gathered_codes& codes, bool vectors, bool checks,
                             unsigned long long* invalid_rows) {
    using blocks = arch::cluster<Tile::cluster>;
    unsigned left_out = 0, without = 0;
    const listed_rows list = list_rows(shared, source, codes, without);
    blocks::wait();  // all have opened their mailboxes
    const bool shares = list.all > 0;
    const int stride = gather_stride(a.x.columns);
    shared_part part{};
    if (shares) {
        part = shared_part::of<Tile>(list);
        if (checks) part.last = drop_bad_rows(shared, a.x, vectors, part.first, part.last, left_out);
    }
#pragma unroll 1
    for (int slice = 0; slice < stride; slice += Tile::columns) {
        if (slice > 0) blocks::sync();  // all are done with the parts of the slice before
        if (shares) send_shares(shared, a, codes, list, part, vectors, checks, slice, left_out);
        if (slice == 0) sum_own_codes(shared, a, codes, vectors, checks, list.own, shares, left_out);
        if (!shares) break;
        take_shares(shared, codes, list, slice, stride);
    }
    if (shares) __syncthreads();
    if (!invalid_rows) return;
    if (blockIdx.x == 0 && without > 0) atomicAdd(invalid_rows, static_cast<unsigned long long>(without));
    if (threadIdx.x % 32 == 0 && left_out > 0) atomicAdd(invalid_rows, static_cast<unsigned long long>(left_out));
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
