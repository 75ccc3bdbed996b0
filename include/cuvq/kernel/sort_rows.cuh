// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// A stable sort of rows by code: counting sort, one pass for each digit of the code. Which row goes where depends on
// the codes alone, never on timing. A pass is three launches: `count_digits` (a histogram for every chunk of rows),
// `scan_histograms` (where in its digit each chunk begins), `place_rows`; without the first, where a search has counted
// the digits of its codes.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <cub/block/block_scan.cuh>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/kernel/row_chunks.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// A row of a slice and its code.
struct alignas(8) coded_row {
    static constexpr std::uint32_t none = 0xFFFFFFFFu;  // the code of a row that is left out

    std::uint32_t code;
    std::uint32_t row;
};

/// The rows of a slice, in the order that a pass reads them in: those of the batch, or those that another kernel wrote.
struct row_source {
    std::int64_t first_row = 0, count = 0;  // of the slice in the batch; of `rows`, at most
    const_codes_ref codes{};                // of the whole batch
    vector_ref<const float> weights{};      // likewise, or null
    vector_ref<const float> distances{};    // likewise, or null: NaN for a row without a code
    std::int64_t code_count = 0;

    const coded_row* rows = nullptr;           // [*row_count] instead, where not null
    const std::uint32_t* row_count = nullptr;  // null: `count`

    __device__ std::int64_t size() const { return row_count ? std::int64_t{*row_count} : count; }

    /// Rows at, at + 32, ... below `end`; the others are `none`. All loads are under way before the first is used.
    template <int V>
    __device__ void load(std::int64_t at, std::int64_t end, coded_row (&r)[V]) const {
        if (rows) {
#pragma unroll
            for (int i = 0; i < V; ++i) r[i] = at + 32 * i < end ? rows[at + 32 * i] : coded_row{coded_row::none, 0};
            return;
        }
        std::uint32_t code[V];
        load_codes([&](int i) { return at + 32 * i; }, end, code);
#pragma unroll
        for (int i = 0; i < V; ++i) r[i] = {code[i], static_cast<std::uint32_t>(at + 32 * i)};
    }

    /// Codes of the batch's rows at + 128 q .. at + 128 q + 3, those below `end`; `none` for the others and for rows
    /// that are left out. `at`: a multiple of 4. As `load`.
    template <int Quads>
    __device__ void load_quads(std::int64_t at, std::int64_t end, std::uint32_t (&code)[4 * Quads]) const {
        const auto* words = codes.as<std::int32_t>() + first_row;
        if (codes.type == code_type::int32 && !weights && !distances &&
            reinterpret_cast<std::uintptr_t>(words) % sizeof(int4) == 0 && end % 4 == 0) {
            int4 quad[Quads];
#pragma unroll
            for (int q = 0; q < Quads; ++q)
                quad[q] =
                    at + 128 * q < end ? *reinterpret_cast<const int4*>(words + at + 128 * q) : int4{-1, -1, -1, -1};
#pragma unroll
            for (int q = 0; q < Quads; ++q) {
                const int four[4] = {quad[q].x, quad[q].y, quad[q].z, quad[q].w};
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    code[4 * q + i] = static_cast<std::uint32_t>(four[i]) < code_count
                                          ? static_cast<std::uint32_t>(four[i])
                                          : std::uint32_t{coded_row::none};
            }
            return;
        }
        load_codes([&](int i) { return at + 128 * (i / 4) + i % 4; }, end, code);
    }

private:
    /// Codes of the batch's rows row_of(i) below `end`.
    template <int V, class RowOf>
    __device__ void load_codes(const RowOf& row_of, std::int64_t end, std::uint32_t (&to)[V]) const {
        std::int64_t code[V];
        const auto load_from = [&](const auto* from) {
#pragma unroll
            for (int i = 0; i < V; ++i)
                code[i] = row_of(i) < end ? static_cast<std::int64_t>(from[first_row + row_of(i)]) : -1;
        };
        switch (codes.type) {
            case code_type::int64: load_from(codes.as<std::int64_t>()); break;
            case code_type::uint8: load_from(codes.as<std::uint8_t>()); break;
            case code_type::uint16: load_from(codes.as<std::uint16_t>()); break;
            case code_type::uint32: load_from(codes.as<std::uint32_t>()); break;
            default: load_from(codes.as<std::int32_t>()); break;
        }
        bool valid[V];
#pragma unroll
        for (int i = 0; i < V; ++i) valid[i] = code[i] >= 0 && code[i] < code_count;
        if (weights) {
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const float w = row_of(i) < end ? weights[first_row + row_of(i)] : 0.0f;
                valid[i] = valid[i] && w >= 0 && isfinite(w);
            }
        }
        if (distances) {
#pragma unroll
            for (int i = 0; i < V; ++i)
                valid[i] = valid[i] && !isnan(row_of(i) < end ? distances[first_row + row_of(i)] : 0.0f);
        }
#pragma unroll
        for (int i = 0; i < V; ++i)
            to[i] = valid[i] ? static_cast<std::uint32_t>(code[i]) : std::uint32_t{coded_row::none};
    }
};

/// Digit `(code >> shift) & mask` of a pass, one of `bins`; and how the rows are cut.
struct digit_pass {
    int shift = 0;
    std::uint32_t mask = 0xFFFFFFFFu;
    std::uint32_t bins = 0;
    row_chunks chunks{};  // one for each block

    __device__ std::uint32_t digit(std::uint32_t code) const { return (code >> shift) & mask; }
};

/// Threads of a block that sorts, by its bins: the fewer the bins, the more warps fit their histograms into shared
/// memory. A tile has at most `most_tile` rows, whose number in a bin fits 16 bits.
template <int Threads>
struct sort_block {
    static constexpr int threads = Threads;
    static constexpr int warps = Threads / 32;
    static constexpr int rows_per_lane = 8;
    static constexpr int most_bins = Threads == 512 ? 1024 : 2048;
    static constexpr int most_tile = Threads * rows_per_lane;
    static constexpr bool may_gather = most_bins == 2 * threads;  // a thread counts two bins of a tile, see place_rows
    static std::size_t count_bytes(std::uint32_t bins) { return bins * sizeof(std::uint32_t); }
    /// Where in the shared memory of `place_rows` the rows of a tile are gathered.
    CUVQ_HOST_DEVICE static constexpr std::uint32_t gathered_at(std::uint32_t bins) {
        const std::uint32_t words = bins + (warps + 1) * ((bins + 1) / 2);
        return (words + words % 2) * static_cast<std::uint32_t>(sizeof(std::uint32_t));
    }
    static constexpr std::size_t place_bytes(std::uint32_t bins, bool gathers) {
        return gathers ? gathered_at(bins) + most_tile * sizeof(coded_row)
                       : (bins + warps * ((bins + 1) / 2)) * sizeof(std::uint32_t);
    }
};

/// Rows of a lane in a tile.
template <class Block>
__device__ int rows_of_lane(const row_chunks& chunks) {
    const std::int64_t tile = chunks.rows() < Block::most_tile ? chunks.rows() : Block::most_tile;
    return static_cast<int>((tile - 1) / Block::threads + 1);
}

/// Calls use(rows) with the rows of each lane, tile by tile of the block's chunk; a warp has consecutive rows of a
/// tile, and its lane 0 the first. Whole block.
template <class Block, class Use>
__device__ void walk_chunk(const row_source& source, const row_chunks& chunks, const Use& use) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const std::int64_t count = source.size(), begin = chunks.begin(blockIdx.x), next = chunks.begin(blockIdx.x + 1);
    const std::int64_t end = next < count ? next : count;
    const int per_warp = 32 * rows_of_lane<Block>(chunks);
    for (std::int64_t tile = begin; tile < end; tile += Block::warps * per_warp) {
        const std::int64_t first = tile + warp * per_warp;
        const std::int64_t stop = first + per_warp < end ? first + per_warp : end;
        coded_row rows[Block::rows_per_lane];
        source.load(first + lane, stop, rows);
        use(rows);
    }
}

/// Sets counts and sums to zero; `warp` of `warps`.
__device__ inline void clear_sums(const vector_ref<float>& counts, const matrix_ref<float>& sums, std::int64_t warp,
                                  std::int64_t warps) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (std::int64_t k = warp; k < sums.rows; k += warps) {
        for (std::int64_t d = lane; d < sums.columns; d += 32) sums.row(k)[d] = 0.0f;
        if (lane == 0) counts[k] = 0.0f;
    }
}

/// histogram[chunks][bins]: the digits of each chunk, a block's.
template <class Block>
__global__ __launch_bounds__(Block::threads) void count_digits(row_source source, digit_pass pass,
                                                               std::uint32_t* histogram) {
    extern __shared__ std::uint32_t shared_bins[];
    arch::wait_for_predecessor();
    arch::let_successor_start();
    for (std::uint32_t b = threadIdx.x; b < pass.bins; b += Block::threads) shared_bins[b] = 0;
    __syncthreads();
    walk_chunk<Block>(source, pass.chunks, [&](const coded_row(&rows)[Block::rows_per_lane]) {
#pragma unroll
        for (const coded_row& r : rows)
            if (r.code != coded_row::none) atomicAdd(&shared_bins[pass.digit(r.code)], 1u);
    });
    __syncthreads();
    for (std::uint32_t b = threadIdx.x; b < pass.bins; b += Block::threads)
        histogram[std::int64_t{blockIdx.x} * pass.bins + b] = shared_bins[b];
}

/// A block of `scan_histograms`: a thread for each of `bins` bins in each of `warps` parts of the chunks.
struct scan_tile {
    static constexpr int bins = 32;
    static constexpr int warps = 32;
};

/// Turns histogram[chunks][bins] into where each chunk's rows begin within the bin's, and totals[bins] into its rows.
/// On the way sets counts and sums to zero, if `clear`, with which any blocks beyond the bins help.
template <class Tile>
__global__ __launch_bounds__(Tile::bins* Tile::warps) void scan_histograms(std::uint32_t* histogram,
                                                                           std::uint32_t chunks, std::uint32_t bins,
                                                                           std::uint32_t* totals, bool clear,
                                                                           vector_ref<float> counts,
                                                                           matrix_ref<float> sums) {
    constexpr std::uint32_t scan_bins = Tile::bins, scan_warps = Tile::warps;
    constexpr std::uint32_t held = 16;  // chunks of a thread that are read once
    __shared__ std::uint32_t shared_sum[scan_warps][scan_bins];
    arch::wait_for_predecessor();
    arch::let_successor_start();
    const std::uint32_t lane = threadIdx.x % scan_bins, warp = threadIdx.x / scan_bins;
    const std::uint32_t bin = blockIdx.x * scan_bins + lane;
    const std::uint32_t part = (chunks + scan_warps - 1) / scan_warps;
    const std::uint32_t begin = warp * part, end = begin + part < chunks ? begin + part : chunks;
    const auto at = [&](std::uint32_t chunk) -> std::uint32_t& { return histogram[std::int64_t{chunk} * bins + bin]; };
    std::uint32_t value[held], sum = 0;
    if (bin < bins) {
#pragma unroll
        for (std::uint32_t i = 0; i < held; ++i) value[i] = begin + i < end ? at(begin + i) : 0;
#pragma unroll
        for (std::uint32_t i = 0; i < held; ++i) sum += value[i];
        for (std::uint32_t chunk = begin + held; chunk < end; ++chunk) sum += at(chunk);
    }
    shared_sum[warp][lane] = sum;
    if (clear)
        clear_sums(counts, sums, std::int64_t{blockIdx.x} * scan_warps + warp, std::int64_t{gridDim.x} * scan_warps);
    __syncthreads();
    std::uint32_t before = 0, total = 0;
    for (std::uint32_t w = 0; w < scan_warps; ++w) {
        if (w == warp) before = total;
        total += shared_sum[w][lane];
    }
    if (bin >= bins) return;
#pragma unroll
    for (std::uint32_t i = 0; i < held; ++i) {
        if (begin + i < end) at(begin + i) = before;
        before += value[i];
    }
    for (std::uint32_t chunk = begin + held; chunk < end; ++chunk) {
        const std::uint32_t own = at(chunk);
        at(chunk) = before;
        before += own;
    }
    if (warp == 0) totals[bin] = total;
}

/// Lanes of the warp whose digit, below 2^bits or `none`, is that of this one, for the first `used` of several digits.
/// (By a vote on each bit: of digits that differ, the instruction made for this takes several times as long.) Whole
/// warp, converged.
template <int V>
__device__ void find_peers(const std::uint32_t (&digit)[V], int used, int bits, unsigned (&peers)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
        if (i >= used) break;
        const bool valid = digit[i] != coded_row::none;
        const unsigned votes = __ballot_sync(0xFFFFFFFFu, valid);
        peers[i] = valid ? votes : ~votes;
    }
#pragma unroll 1
    for (int b = 0; b < bits; ++b) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            if (i >= used) break;
            const bool bit = digit[i] >> b & 1u;
            const unsigned votes = __ballot_sync(0xFFFFFFFFu, bit);
            peers[i] &= bit ? votes : ~votes;
        }
    }
}

/// Writes the rows of this block's chunk where they belong, and their number to `placed`. Within a tile, warps count
/// their digits, the counts are summed up over the warps, and each warp numbers its rows in order from there.
/// `gathers`: a tile has several rows for each bin, and sorts them in shared memory first, since scattered writes are
/// slow.
template <class Block>
__global__ __launch_bounds__(Block::threads) void place_rows(row_source source, digit_pass pass,
                                                             const std::uint32_t* histogram,
                                                             const std::uint32_t* totals, coded_row* to,
                                                             std::uint32_t* placed, bool gathers) {
    constexpr int words_per_thread = (Block::most_bins / 2 + Block::threads - 1) / Block::threads;
    constexpr int bins_per_thread = Block::most_bins / Block::threads;
    constexpr bool may_gather = Block::may_gather;
    extern __shared__ uint2 shared_memory[];
    auto* shared_start = reinterpret_cast<std::uint32_t*>(shared_memory);  // [bins] where the next row of a bin goes
    using scan = cub::BlockScan<std::uint32_t, Block::threads, cub::BLOCK_SCAN_WARP_SCANS>;
    __shared__ typename scan::TempStorage shared_scan;
    arch::wait_for_predecessor();
    arch::let_successor_start();
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const std::uint32_t words = (pass.bins + 1) / 2;
    std::uint32_t* shared_words = shared_start + pass.bins;  // [warps][words]: two bins a word
    auto* own_bins = reinterpret_cast<std::uint16_t*>(shared_words + warp * words);
    std::uint32_t* shared_first = shared_words + Block::warps * words;  // [words] of the tile's rows by bin
    auto* firsts = reinterpret_cast<std::uint16_t*>(shared_first);
    // [most_tile] the tile's rows by bin
    auto* gathered = reinterpret_cast<coded_row*>(shared_start + Block::gathered_at(pass.bins) / sizeof(*shared_start));

    {  // starts of the bins
        const std::uint32_t first = threadIdx.x * bins_per_thread;
        std::uint32_t value[bins_per_thread], sum = 0;
#pragma unroll
        for (int i = 0; i < bins_per_thread; ++i) {
            value[i] = first + i < pass.bins ? totals[first + i] : 0;
            sum += value[i];
        }
        std::uint32_t start;
        scan(shared_scan).ExclusiveSum(sum, start);
#pragma unroll
        for (int i = 0; i < bins_per_thread; ++i) {
            if (first + i < pass.bins)
                shared_start[first + i] = start + histogram[std::int64_t{blockIdx.x} * pass.bins + first + i];
            start += value[i];
        }
        if (blockIdx.x == 0 && threadIdx.x == Block::threads - 1) *placed = start;
    }

    walk_chunk<Block>(source, pass.chunks, [&](const coded_row(&rows)[Block::rows_per_lane]) {
        for (std::uint32_t w = lane; w < words; w += 32) shared_words[warp * words + w] = 0;
        __syncwarp();
        std::uint32_t digit[Block::rows_per_lane];
        unsigned peers[Block::rows_per_lane] = {};
#pragma unroll
        for (int i = 0; i < Block::rows_per_lane; ++i) {
            const bool valid = rows[i].code != coded_row::none;
            digit[i] = valid ? pass.digit(rows[i].code) : coded_row::none;
            if (valid) atomicAdd(&shared_words[warp * words + digit[i] / 2], digit[i] % 2 ? 0x10000u : 1u);
        }
        find_peers(digit, rows_of_lane<Block>(pass.chunks), 32 - __clz(static_cast<int>(pass.bins - 1)), peers);
        __syncthreads();
        std::uint32_t tile_bins[words_per_thread];  // two bins a word: the rows of the tile
#pragma unroll
        for (int i = 0; i < words_per_thread; ++i) {
            const std::uint32_t w = threadIdx.x + i * Block::threads;
            std::uint32_t before = 0;
            if (w < words) {
                for (int other = 0; other < Block::warps; ++other) {
                    const std::uint32_t own = shared_words[other * words + w];
                    shared_words[other * words + w] = before;
                    before += own;
                }
            }
            tile_bins[i] = before;
        }
        std::uint32_t tile_rows = 0;
        if (may_gather && gathers) {
            std::uint32_t first;
            scan(shared_scan).ExclusiveSum((tile_bins[0] & 0xFFFFu) + (tile_bins[0] >> 16), first, tile_rows);
            if (threadIdx.x < words) shared_first[threadIdx.x] = (first + (tile_bins[0] & 0xFFFFu)) << 16 | first;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Block::rows_per_lane; ++i) {
            const bool valid = digit[i] != coded_row::none;
            const int rank = __popc(peers[i] & ((1u << lane) - 1));
            std::uint32_t before = 0;
            if (valid) {
                before = own_bins[digit[i]];
                if (may_gather && gathers)
                    gathered[firsts[digit[i]] + before + rank] = rows[i];
                else
                    to[shared_start[digit[i]] + before + rank] = rows[i];
            }
            __syncwarp();
            if (valid && rank == 0) own_bins[digit[i]] = static_cast<std::uint16_t>(before + __popc(peers[i]));
            __syncwarp();
        }
        __syncthreads();
        if (may_gather && gathers) {
            for (std::uint32_t i = threadIdx.x; i < tile_rows; i += Block::threads) {
                const coded_row row = gathered[i];
                const std::uint32_t bin = pass.digit(row.code);
                to[shared_start[bin] + i - firsts[bin]] = row;
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < words_per_thread; ++i) {
            const std::uint32_t w = threadIdx.x + i * Block::threads;
            if (w >= words) continue;
            shared_start[2 * w] += tile_bins[i] & 0xFFFFu;
            if (2 * w + 1 < pass.bins) shared_start[2 * w + 1] += tile_bins[i] >> 16;
        }
        __syncthreads();
    });
}

}  // namespace cuvq::kernel
