// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The search of few rows on Hopper, in one launch and made for latency: a cluster of blocks shares 64 rows. Each of its
// warpgroups scores them against its own tiles of codes and sends what could win to the block that finishes the row.
// Nothing waits for the whole cluster but, at the start, for its blocks to be there.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cuda/ptx>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/kernel/filter_sm90.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/kernel/prepare.cuh>
#include <cuvq/kernel/rows_sm90.cuh>
#include <cuvq/kernel/settle.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Sizes of a block, and the most blocks of a cluster.
inline constexpr int few_warps = 16, few_threads = 32 * few_warps, few_blocks = 16;

/// Stands for the code of a row that is the whole block's: this, or less by what a lead must reach to be a candidate.
inline constexpr std::int64_t code_aside = -2;

/// What one of the four threads that share a row in a warpgroup found: its leaders, and the best of all that it
/// dropped.
struct alignas(16) few_lead {
    int best, best_runner, next, next_runner;
    int rest, best_tile, next_tile, unused;
};

/// Shared memory of the kernel, by offsets.
template <class Tile>
struct few_shared {
    using layout = arch::wgmma_layout<Tile::steps>;
    static constexpr int groups = Tile::few_groups;  // warpgroups that score
    static_assert(groups >= 1 && groups <= few_warps / 4,
                  "cuvq: a block of sm90_tile has four warpgroups for few rows");
    static constexpr int code_bytes = layout::bytes(image_tile), row_bytes = layout::bytes(row_results::rows);
    static constexpr int rows = Tile::few_stages * code_bytes;
    static constexpr int leads = rows + row_bytes;
    static constexpr int codes = leads + row_results::rows * groups * 4 * static_cast<int>(sizeof(few_lead));
    static constexpr int barriers = codes + row_results::rows * 8;
    static constexpr int measures = barriers + 8 * (Tile::few_stages + 1);
    static constexpr int bounds = measures + row_results::rows * static_cast<int>(sizeof(row_measure));
    static constexpr int bytes = bounds + static_cast<int>(sizeof(device::score_bounds));
    static constexpr int allocated = bytes + 1024;  // the base is aligned by hand
    // Over the tiles of codes, once they are scored: candidates, and their distances. So many of a row are measured one
    // by one; rows with more, or with unknown ones, are the whole block's.
    static constexpr int row_room = rows / 16 / row_results::rows, row_candidates = row_room < 32 ? row_room : 32;
    static constexpr int most_candidates = row_results::rows * row_candidates;
};

#if CUVQ_HAS_WGMMA

using few_mailbox = arch::mailbox<few_blocks>;

/// Sends a thread's leaders of a row to `to` in the shared memory of block `owner`; in a cluster of one, just there.
__device__ inline void send(const leaders& lead, few_lead* to, unsigned owner, few_mailbox& box, bool alone) {
    const int first[4] = {lead.best, lead.best_runner, lead.next, lead.next_runner};
    const int second[4] = {max(lead.rest, lead.third), lead.best_tile, lead.next_tile, 0};
    if (alone) {
        auto* here = reinterpret_cast<int4*>(to);
        here[0] = {first[0], first[1], first[2], first[3]};
        here[1] = {second[0], second[1], second[2], second[3]};
    } else {
        box.send(&to->best, owner, first);
        box.send(&to->rest, owner, second);
    }
}

/// What the lanes of a row conclude from its leads.
struct few_conclusion {
    int least;   // what a lead must reach to be a candidate; 0 where leads say nothing
    int number;  // of candidates that this lane has seen
    int total;   // of the row
    int code;    // of the row, or code_aside where only the whole block can tell, or -3: one of the candidates
};

__device__ inline int code_of(int tagged_score, int tile, int lead) {
    const int at = place_of(tagged_score);
    return tile * image_tile + (at >> 1) * 8 + 2 * (lead & 3) + (at & 1);
}

/// From the `count` leads of the threads that scored a row, four for every warpgroup; a row has at most `most`
/// candidates one by one. `lanes` lanes a row, a power of
/// two; whole warps, converged: shuffles of diverged ones are slow. Loops over leads are not unrolled: they are short,
/// and run from a cold instruction cache.
__device__ inline few_conclusion conclude_few(const few_lead* leads, int count, int most, float error, bool exact,
                                              int lanes) {
    constexpr unsigned all = 0xFFFFFFFFu;
    const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    int best = leaders::least;
#pragma unroll 1
    for (int i = lane; i < count; i += lanes) best = max(best, leads[i].best);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_xor_sync(all, best, step);
        best = step < lanes ? max(best, other) : best;
    }
    const int top = best & tag_mask;
    few_conclusion c{exact ? least_candidate(best, error) : top, 0, 0, 0x7FFFFFFF};
    constexpr int lost = 1 << 16;            // more than all candidates
    if (!(c.least > 0 && error == error)) {  // integers order positive scores only
        c.total = lost;
        c.least = 0;
    }
#pragma unroll 1
    for (int i = lane; i < count; i += lanes) {
        const few_lead l = leads[i];
        const bool may_win = exact ? l.best >= c.least : (l.best & tag_mask) == top;
        const int code = code_of(l.best, l.best_tile, i);
        c.code = may_win && code < c.code ? code : c.code;
        if (!exact) continue;
        c.number += may_win + (l.best_runner >= c.least) + (l.next >= c.least) + (l.next_runner >= c.least);
        if (l.rest >= c.least) c.total = lost;  // something dropped could win
    }
    c.total += c.number;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int code = __shfl_xor_sync(all, c.code, step), total = __shfl_xor_sync(all, c.total, step);
        if (step < lanes) c.code = min(c.code, code);
        if (step < lanes) c.total += total;
    }
    if (c.total > 1) c.code = c.total > most ? static_cast<int>(code_aside) : -3;
    return c;
}

#endif  // CUVQ_HAS_WGMMA

/// Codes, quantized rows and distances of all rows of x, 64 by each cluster; leaves a partial loss per warp. `mask` is
/// `tag_mask` (a parameter, so that clearing and tagging are one instruction).
template <class Tile, class X, class C>
__global__ __launch_bounds__(CUVQ_HAS_WGMMA ? few_threads : 32,
                             1) void quantize_sm90_few(const __grid_constant__ detail::quantize_args<X, C> a,
                                                       const __grid_constant__ codebook_image image,
                                                       const __grid_constant__ search_tally tally, unsigned blocks,
                                                       bool exact, int mask) {
#if CUVQ_HAS_WGMMA
    namespace ptx = cuda::ptx;
    using shared = few_shared<Tile>;
    using split = row_split<Tile::steps>;
    constexpr int groups = shared::groups, stages = Tile::few_stages;
    static_assert(stages % groups == 0, "a stage belongs to one warpgroup, which so sees all its phases");
    extern __shared__ char dynamic_shared[];
    char* base = dynamic_shared + ((1024 - (arch::shared_address(dynamic_shared) & 1023)) & 1023);
    char* operands = base;                                                // (stages, 128 codes, steps * 16)
    char* rows = base + shared::rows;                                     // (64 rows, steps * 16)
    auto* leads = reinterpret_cast<few_lead*>(base + shared::leads);      // (rows of the block, parts, 4)
    auto* codes = reinterpret_cast<std::int64_t*>(base + shared::codes);  // (rows of the block)
    auto* full = arch::kept(reinterpret_cast<std::uint64_t*>(base + shared::barriers));  // (stages)
    auto& box = *reinterpret_cast<few_mailbox*>(full + stages);                // of the leads of all the block's rows
    auto* measures = reinterpret_cast<row_measure*>(base + shared::measures);  // (64)
    auto* bounds = reinterpret_cast<int*>(base + shared::bounds);

    const int warp = static_cast<int>(threadIdx.x) / 32, group = warp / 4, lane = static_cast<int>(threadIdx.x) % 32;
    const unsigned rank = blockIdx.x % blocks;
    const std::int64_t first = std::int64_t{blockIdx.x / blocks} * row_results::rows;
    const int columns = static_cast<int>(a.x.columns);
    const int tiles = static_cast<int>(device::image_ref::tiles(a.codebook.rows));
    // Blocks take tiles in turn, and of a block's tiles its warpgroups; a part is what one warpgroup takes.
    const auto tile_of = [&](int j) { return j * static_cast<int>(blocks) + static_cast<int>(rank); };
    const int parts = min(tiles, groups * static_cast<int>(blocks)), part = tile_of(group);
    const int block_rows = row_results::rows / static_cast<int>(blocks);  // that the block finishes
    const auto fetch = [&](int j) {
        const int stage = j % stages;
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full + stage,
                                       shared::code_bytes);
        ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, operands + stage * shared::code_bytes,
                           image.rows + std::int64_t{tile_of(j)} * shared::code_bytes, shared::code_bytes,
                           full + stage);
    };
    arch::let_successor_start();
    const bool starts = threadIdx.x == few_threads - 32;  // a warp that has the least to do
    __shared__ int listed;                                // candidates of all open rows of the block
    if (starts) {
        listed = 0;
        for (int i = 0; i < stages; ++i) ptx::mbarrier_init(full + i, 1);
        box.open();  // with a fence for all of them
        box.expect(block_rows * parts * 4 * static_cast<int>(sizeof(few_lead)));
    }
    if (threadIdx.x < 4) bounds[threadIdx.x] = 0;
    __syncthreads();
    arch::cluster<few_blocks>::arrive_relaxed();  // the barriers are there, fenced above
    arch::wait_for_predecessor();

    // A warp converts as many rows as it can at once. Loads of the rows come first of all, since all else waits for
    // them, or takes up what connects the processor to the L2 cache: the tiles of codes.
    constexpr bool is_short = Tile::steps == 1;  // a lane takes a row
    const bool converts = warp < row_results::rows / (is_short ? 32 : split::rows);
    const int row = is_short ? threadIdx.x : warp * split::rows + lane / split::lanes;
    const bool inside = first + row < a.x.rows, vectors = loads_vectors(a.x);
    const X* x = a.x.row(inside ? first + row : 0);
    float4 v[split::parts], centre[split::parts];
    short_row short_x, short_centre;
    if (is_short && converts) {
        short_x.load(x, columns, vectors);
        short_centre.load(image.centre, columns, false);
    } else if (converts && vectors) {
#pragma unroll
        for (int s = 0; s < split::parts; ++s) v[s] = load_part<Tile::steps>(x, columns, vectors, s);
#pragma unroll
        for (int s = 0; s < split::parts; ++s) centre[s] = load_part<Tile::steps>(image.centre, columns, vectors, s);
    }
    __syncthreads();
    if (starts) {
#pragma unroll 1
        for (int j = 0; j < stages && tile_of(j) < tiles; ++j) fetch(j);
    }
    __syncwarp();
    load_bounds(image, tiles, bounds);
    if (converts) {
        const float scale = *image.scale;
        const auto scaled = [&](const float4& c) {
            return float4{__fmaf_ieee_rn(scale, c.x, 0.0f), __fmaf_ieee_rn(scale, c.y, 0.0f),
                          __fmaf_ieee_rn(scale, c.z, 0.0f), __fmaf_ieee_rn(scale, c.w, 0.0f)};
        };
        if constexpr (is_short) {
            measures[row] = short_x.put(rows, row, {columns, arch::slab_layout{1}}, scale,
                                        [&](int d) { return __fmaf_ieee_rn(scale, short_centre.v[d], 0.0f); });
        } else {
            row_image<Tile::steps> operand{rows, row};
            float factor = 1.0f;
            const auto centre_at = [&](int d) { return scaled(device::load4(image.centre, d, columns)); };
            if (vectors) {
#pragma unroll
                for (int s = 0; s < split::parts; ++s)
                    operand.put_last(operand.centred(v[s], scale, scaled(centre[s])), factor, columns, s);
            }
            if (!vectors || !operand.fits())
                factor = operand.template put_all<3>(x, inside, columns, vectors, centre_at, scale, vectors);
            const row_measure measure = operand.measured(factor);
            if (split::lane() == 0) measures[row] = measure;
        }
        ptx::fence_proxy_async(ptx::space_shared);
    }
    __syncthreads();

    if (group < groups && part < tiles) {
        const std::uint32_t row_operand = arch::uniform(arch::kept(arch::operand(rows)));
        const std::uint32_t code_operands = arch::kept(arch::operand(operands));
        const int row0 = warp % 4 * 16 + lane / 4;
        leaders lead0, lead1;
        for (int j = group; tile_of(j) < tiles; j += groups) {
            float score[64];  // (16 pairs of codes, 2 rows, 2)
            const int stage = j % stages;
            while (!ptx::mbarrier_try_wait_parity(full + stage, j / stages & 1)) {
            }
            __syncwarp();
            arch::wgmma_fence();
            arch::wgmma_scores<Tile::steps>(score, row_operand,
                                            arch::uniform(code_operands + stage * (shared::code_bytes >> 4)));
            arch::wgmma_commit();
            const float error0 = measures[row0].error(as_bounds(bounds), Tile::steps);
            const float error1 = measures[row0 + 8].error(as_bounds(bounds), Tile::steps);
            arch::wgmma_wait();
            if (tile_of(j + stages) < tiles) {  // once all four warps are done with it, the stage is free
                asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
                if (threadIdx.x % 128 == 0) fetch(j + stages);
            }
            offer_scores<true>(all_scores{}, score, tile_of(j), mask, exact, error0, error1, lead0, lead1);
        }
        arch::cluster<few_blocks>::wait();
        const auto send_row = [&](const leaders& lead, int row) {
            const int owner = row / block_rows;
            send(lead, leads + ((row - owner * block_rows) * parts + part) * 4 + lane % 4, owner, box, blocks == 1);
        };
        send_row(lead0, row0);
        send_row(lead1, row0 + 8);
    } else {
        arch::cluster<few_blocks>::wait();
    }

    // The block's rows, as many lanes each as there are; then the candidates of all that are open.
    auto* distance = reinterpret_cast<double*>(base);                              // (most_candidates)
    auto* candidate = reinterpret_cast<int*>(distance + shared::most_candidates);  // (most_candidates)
    auto* candidate_row = candidate + shared::most_candidates;                     // (most_candidates)
    if (blocks > 1) box.receive(0);
    __syncthreads();  // of the rows of a block not every warp has sent some: only now are all done with the operands
    const int lanes = min(32 / ((block_rows - 1) / few_warps + 1), parts > 4 ? 32 : 16);  // of a row
    const int start = static_cast<int>(rank) * block_rows, own = lane / lanes * few_warps + warp;
    const bool leads_row = lane % lanes == 0;
    const std::int64_t left = a.x.rows - first - start;
    const int count = left < block_rows ? max(static_cast<int>(left), 0) : block_rows;
    int code = 0, own_first = 0, own_candidates = 0;
    if (warp < count) {  // lanes beyond the last row repeat another one
        const int r = own < count ? own : warp;
        const few_conclusion c = conclude_few(leads + r * parts * 4, parts * 4, shared::row_candidates,
                                              measures[start + r].error(as_bounds(bounds), Tile::steps), exact, lanes);
        const bool open = own < count && c.code == -3;
        if (own < count) code = c.code;
        if (__any_sync(0xFFFFFFFFu, open)) {
            own_candidates = open ? c.total : 0;
            const int number = open ? c.number : 0;
            int end = number;  // of the warp's candidates up to this lane's last
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int others = __shfl_up_sync(0xFFFFFFFFu, end, step);
                if (lane >= step) end += others;
            }
            const int base = __shfl_sync(0xFFFFFFFFu, lane == 31 ? atomicAdd(&listed, end) : 0, 31);
            int at = base + end - number;
            own_first = __shfl_sync(0xFFFFFFFFu, at, 0, lanes);
            const auto list = [&](int score, int tile, int i) {
                if (score < c.least) return;
                candidate[at] = code_of(score, tile, i);
                candidate_row[at++] = own;
            };
#pragma unroll 1
            for (int i = lane % lanes; i < parts * 4 && at < base + end; i += lanes) {
                const few_lead l = leads[own * parts * 4 + i];
                list(l.best, l.best_tile, i);
                list(l.best_runner, l.best_tile, i);
                list(l.next, l.next_tile, i);
                list(l.next_runner, l.next_tile, i);
            }
            __syncwarp();
        }
        if (own < count && leads_row) codes[own] = code == code_aside ? code_aside - c.least : code;
    }
    const bool any_wide = __syncthreads_or(code == code_aside);
    if (listed > 0) {
        for (int i = warp; i < listed; i += few_threads / 8) {  // whole warps, as above
            const int mine = min(i + lane / 8 * few_warps, listed - 1);
            const double d = device::exact_distance(a.x.row(first + start + candidate_row[mine]),
                                                    a.codebook.row(candidate[mine]), a.x.columns);
            if (lane % 8 == 0) distance[mine] = d;
        }
        __syncthreads();
        if (code == -3 && leads_row) {
            device::exact_choice choice;
            for (int i = own_first; i < own_first + own_candidates; ++i) choice.consider(distance[i], candidate[i]);
            codes[own] = choice.code;
        }
        __syncthreads();
    }
    if (any_wide) {
        __shared__ double distances[few_warps];
        __shared__ std::int64_t found[few_warps];
        const open_words everything{{open_words::everything, open_words::none, open_words::none, open_words::none}};
        constexpr int held = image_tile / 4, groups_of_lanes = few_threads / 8;
        static_assert((groups_of_lanes & (groups_of_lanes - 1)) == 0, "turns wrap around by a mask");
        const int lanes_group = static_cast<int>(threadIdx.x) / 8;
        for (int r = 0; r < count; ++r) {
            if (codes[r] > code_aside) continue;
            const int least = static_cast<int>(code_aside - codes[r]);
            const X* const row = a.x.row(first + start + r);
            device::exact_choice choice;
            if (least == 0)
                consider_words(choice, everything, row, a.codebook, a.x.columns, lanes_group, groups_of_lanes);
            // Groups of lanes take turns at what leads name, so that none waits long for the others.
            int turn = 0;
            for (int i = 0; least > 0 && i < parts * 4; ++i) {
                const few_lead l = leads[r * parts * 4 + i];
                if (l.best < least) continue;
                if (l.rest >= least) {  // something dropped could win: all codes that the thread scored
                    const int scored = ((tiles - 1 - i / 4) / parts + 1) * held;
                    device::consider_codes(choice, row, a.codebook, a.x.columns, scored,
                                           (lanes_group - turn) & (groups_of_lanes - 1), groups_of_lanes,
                                           [&](std::int64_t at) {
                                               const int place = static_cast<int>(at) % held;
                                               const int tile = i / 4 + static_cast<int>(at) / held * parts;
                                               const std::int64_t k = std::int64_t{tile} * image_tile +
                                                                      (place >> 1) * 8 + 2 * (i % 4) + (place & 1);
                                               return min(k, a.codebook.rows - 1);
                                           });
                    turn += scored / device::codes_at_once;
                    continue;
                }
                const auto consider = [&](int score, int tile) {
                    if (score < least || (turn++ & (groups_of_lanes - 1)) != lanes_group) return;
                    const int k = code_of(score, tile, i);
                    choice.consider(device::exact_distance(row, a.codebook.row(k), a.x.columns), k);
                };
                consider(l.best, l.best_tile);
                consider(l.best_runner, l.best_tile);
                consider(l.next, l.next_tile);
                consider(l.next_runner, l.next_tile);
            }
            __syncwarp();
            merge_block(choice, distances, found);
            if (threadIdx.x == 0) codes[r] = choice.code;
            __syncthreads();
        }
    }
    double loss = 0;
    write_tile<few_threads, row_results::rows>(a, tally, first + start, count, codes, loss);
    if (tally.loss) write_loss(tally.loss + std::int64_t{blockIdx.x} * few_warps + warp, loss);
#endif  // CUVQ_HAS_WGMMA
}

}  // namespace cuvq::kernel
