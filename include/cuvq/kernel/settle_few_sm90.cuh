// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The rows of few that leads do not settle, as of a codebook with many copies of a code: all blocks of their cluster
// settle them together.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <cuda/ptx>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/certificate.cuh>
#include <cuvq/kernel/conclude_few_sm90.cuh>
#include <cuvq/kernel/few_cluster_sm90.cuh>
#include <cuvq/kernel/filter_sm90.cuh>
#include <cuvq/kernel/outputs.cuh>

namespace cuvq::kernel {

#if CUVQ_HAS_WGMMA

/// Stands for what a score must reach to be a candidate, where a row is not the whole cluster's. 0: every code is one.
inline constexpr int no_limit = 0x7FFFFFFF;

/// The codes of the rows aside, by all blocks of a cluster, to `codes`, and there row_left_open for all others: each
/// block scores its tiles again, now that it is known what a candidate must reach, and measures those that do.
template <class Tile, class X, class C>
__device__ void settle_together(const detail::quantize_args<X, C>& a, const few_tiles<Tile>& tiles,
                                const few_rows& share, char* base, std::int64_t first, std::int64_t* codes) {
    using shared = few_shared<Tile>;
    using choice = device::exact_choice;
    static_assert(sizeof(choice) == 16, "few_shared has room for so much");
    constexpr int groups = shared::groups, teams = few_warps / 4;  // of four warps, which take wide rows in turn
    // Kept, lest what follows from it be worked out before it is known whether there are such rows.
    const int thread = arch::kept(static_cast<int>(threadIdx.x));
    const int warp = thread / 32, team = warp / 4, lane = thread % 32;
    auto* own_limits = reinterpret_cast<int*>(base + shared::limits);   // (rows of the block)
    auto* limits = reinterpret_cast<int*>(base + shared::all_limits);   // (64)
    auto* masks = reinterpret_cast<unsigned*>(base + shared::masks);    // (groups, 64 rows, 4) a bit for each code
    auto* choices = reinterpret_cast<choice*>(base + shared::choices);  // (64 rows, 4 warps)
    auto* found = reinterpret_cast<choice*>(base + shared::found);      // (rows of the block, blocks)
    // A row that scores say nothing of may have no code.
    for (int i = warp; first + share.row(i) < a.x.rows && i < share.count(); i += few_warps) {
        if (own_limits[i] != 0 || device::is_row_finite(a.x.row(first + share.row(i)), a.x.columns)) continue;
        __syncwarp();
        if (lane == 0) own_limits[i] = no_limit;
    }
    for (int i = thread; i < scored_rows * 4; i += few_threads) choices[i] = {};
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);  // what used the buffers since were ordinary instructions
    __syncthreads();
    arch::cluster<few_blocks>::sync();
    if (const int row = thread; row < scored_rows)
        limits[row] = first + row < a.x.rows
                          ? *arch::cluster<few_blocks>::at(own_limits + share.own(row), share.owner(row))
                          : no_limit;
    __syncthreads();
    const unsigned low = __ballot_sync(0xFFFFFFFFu, limits[lane] != no_limit);
    const unsigned high = __ballot_sync(0xFFFFFFFFu, limits[lane + 32] != no_limit);
    const unsigned long long wide = static_cast<unsigned long long>(high) << 32 | low;
    if (thread == 0)
        for (int j = 0; j < Tile::few_stages && tiles.has(j); ++j) tiles.fetch(j);
    __syncwarp();
    const std::uint32_t row_operand = arch::uniform(arch::operand(base + shared::rows));
    const std::uint32_t code_operands = arch::operand(base);
    for (int round = 0; tiles.has(round * groups); ++round) {
        if (team < groups && tiles.has(round * groups + team)) {
            tiles.score(
                row_operand, code_operands, round * groups + team, true, [] {},
                [&](const float(&score)[64], int) {
                    const int row0 = warp % 4 * 16 + lane / 4;
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int limit = limits[row0 + 8 * h];
                        unsigned bits = 0;
#pragma unroll
                        for (int i = 0; i < 32; ++i)
                            bits |= __float_as_int(score[i / 2 * 4 + 2 * h + i % 2]) >= limit ? 1u << i : 0u;
                        if (limit == 0) bits = ~0u;  // where integers do not order scores
                        masks[(team * scored_rows + row0 + 8 * h) * 4 + lane % 4] = bits;
                    }
                });
        }
        __syncthreads();
        // Of each row and tile, eight lanes take eight of the codes.
        const int octet = thread % 128 / 8, q = octet / 4, place0 = octet % 4 * 8;
        int turn = 0;
        for (unsigned long long left = wide; left != 0; left &= left - 1) {
            if (turn++ % teams != team) continue;
            const int r = __ffsll(static_cast<long long>(left)) - 1;
            choice best = choices[r * 4 + warp % 4];  // which a lane alone would do, too
            for (int g = 0; g < groups && tiles.has(round * groups + g); ++g) {
                unsigned open = masks[(g * scored_rows + r) * 4 + q] >> place0 & 255u;
                while (__any_sync(0xFFFFFFFFu, open != 0)) {
                    int k[2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int place = place0 + __ffs(static_cast<int>(open)) - 1;
                        const int code = scored_code(tiles.tile(round * groups + g), place, q);
                        k[i] = open != 0 && code < a.codebook.rows ? code : -1;
                        open &= open - 1;
                    }
                    const C* const from[2] = {a.codebook.row(max(k[0], 0)), a.codebook.row(max(k[1], 0))};
                    double distances[2];
                    device::squared_distances(a.x.row(first + r), from, a.x.columns, distances);
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        if (k[i] >= 0) best.consider(distances[i], k[i]);
                }
            }
            best.merge(0xFFFFFFFFu, 8);
            best.merge(0xFFFFFFFFu, 16);
            __syncwarp();
            if (lane == 0) choices[r * 4 + warp % 4] = best;
        }
        __syncthreads();
    }
    const auto nearest_of = [](const choice* from, int count) {
        choice best;
        for (int i = 0; i < count; ++i)
            if (from[i].code >= 0) best.consider(from[i].distance, from[i].code);
        return best;
    };
    if (const int row = thread; row < scored_rows && wide >> row & 1)
        *arch::cluster<few_blocks>::at(found + share.own(row) * share.blocks + share.rank, share.owner(row)) =
            nearest_of(choices + row * 4, 4);
    __syncwarp();
    arch::cluster<few_blocks>::sync();
    if (const int own = thread; own < share.count()) {
        const bool aside = codes[own] == code_aside, is_wide = wide >> share.row(own) & 1;
        codes[own] = is_wide ? nearest_of(found + own * share.blocks, share.blocks).code : aside ? -1 : row_left_open;
    }
    __syncthreads();
}

#endif  // CUVQ_HAS_WGMMA

}  // namespace cuvq::kernel
