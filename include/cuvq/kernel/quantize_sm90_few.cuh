// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The search of few rows on Hopper, in one launch and made for latency: a cluster of blocks shares 64 rows. Each of its
// warpgroups scores them against its own tiles of codes and sends what could win to the block that finishes the row.
// Nothing waits for the whole cluster but, at the start, for its blocks to be there, and at the end, for word that they
// have settled their rows: those with more candidates than were sent, as of a codebook with many copies of a code, are
// settled by all blocks together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

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
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Sizes of a block, and the most blocks of a cluster.
inline constexpr int few_warps = 16, few_threads = 32 * few_warps, few_blocks = 16;

/// Stands for the code of a row that leads do not settle, and of one that they narrow down to candidates.
inline constexpr int code_aside = -2, code_listed = -3;
static_assert(code_aside == row_left_open, "rows of the whole cluster are written later");

/// What one of the four threads that share a row in a warpgroup found: its leaders, and the best of all that it
/// dropped.
struct few_lead {
    int best, best_runner, next, next_runner;
    int rest, best_tile, next_tile;
};

/// Such leads in shared memory, in two arrays, since they are sent in words of 16 and of 8 bytes.
struct few_leads {
    static constexpr int bytes = 24;            // of a lead
    static constexpr int most_tiles = 1 << 16;  // of a codebook

    int4* scores;  // best, best_runner, next, next_runner
    int2* others;  // rest, and both tiles

    __device__ few_leads from(int i) const { return {scores + i, others + i}; }
    __device__ int best(int i) const { return scores[i].x; }
    __device__ few_lead operator[](int i) const {
        const int4 s = scores[i];
        const int2 o = others[i];
        return {s.x, s.y, s.z, s.w, o.x, o.y & (most_tiles - 1), static_cast<int>(static_cast<unsigned>(o.y) >> 16)};
    }
};

/// Shared memory of the kernel, by offsets.
template <class Tile>
struct few_shared {
    using layout = arch::wgmma_layout<Tile::steps>;
    static constexpr int groups = Tile::few_groups;  // warpgroups that score
    static_assert(groups >= 1 && groups <= few_warps / 4,
                  "cuvq: a block of sm90_tile has four warpgroups for few rows");
    static constexpr int code_bytes = layout::bytes(image_tile), row_bytes = layout::bytes(scored_rows);
    static constexpr int rows = Tile::few_stages * code_bytes;
    static constexpr int leads = rows + row_bytes, most_leads = scored_rows * groups * 4;
    // Over the leads, once all rows are concluded: what the cluster finds of rows that these do not settle.
    static constexpr int masks = leads, choices = masks + groups * scored_rows * 16;
    static constexpr int found = choices + scored_rows * 4 * 16;
    static constexpr int all_limits = found + scored_rows * 16;
    static constexpr int settling_end = all_limits + scored_rows * 4, leads_end = leads + most_leads * few_leads::bytes;
    static constexpr int codes = settling_end > leads_end ? settling_end : leads_end;
    // Rows of x as they are: all of them, or of long ones, half. Of short ones none, which threads load as soon.
    static constexpr int copied_rows = Tile::steps == 1 ? 0 : Tile::steps > 9 ? scored_rows / 2 : scored_rows;
    static constexpr int copied = codes + scored_rows * 8;
    static constexpr int barriers = copied + copied_rows * Tile::dimensions * 4;
    static constexpr int measures = barriers + 8 * (Tile::few_stages + 3);
    static constexpr int errors = measures + scored_rows * static_cast<int>(sizeof(row_measure));
    static constexpr int bounds = errors + scored_rows * 4;
    static constexpr int limits = bounds + static_cast<int>(sizeof(device::score_bounds));
    static constexpr int opened = limits + scored_rows * 4;
    static constexpr int asked = opened + scored_rows * 8;
    static constexpr int bytes = asked + few_blocks * 4;
    static constexpr int allocated = bytes + 1024;  // the base is aligned by hand
    // Over the tiles of codes, once they are scored: candidates, and their distances. So many of a row are measured one
    // by one; rows with more, or with unknown ones, are the whole cluster's.
    static constexpr int row_room = rows / 16 / scored_rows, row_candidates = row_room < 32 ? row_room : 32;
    static constexpr int most_candidates = scored_rows * row_candidates;
};

#if CUVQ_HAS_WGMMA

using few_mailbox = arch::mailbox<few_blocks>;

/// The rows of a cluster: its blocks, a power of two, finish them in turn, so that of few rows, too, each has some.
struct few_rows {
    int blocks, bits, rank;  // bits: log2 of blocks; rank: of this block

    __device__ few_rows(int all_blocks, int own_rank) : blocks(all_blocks), bits(31 - __clz(blocks)), rank(own_rank) {}
    __device__ int count() const { return scored_rows >> bits; }
    /// Of the 64, the block's i-th.
    __device__ int row(int i) const { return (i << bits) + rank; }
    __device__ int owner(int row) const { return row & (blocks - 1); }
    __device__ int own(int row) const { return row >> bits; }
};

/// Sends a thread's leaders of a row to `to` in the shared memory of block `owner`; `here`: of this one, just there.
__device__ inline void send(const leaders& lead, const few_leads& to, unsigned owner, few_mailbox& box, bool here) {
    const int scores[4] = {lead.best, lead.best_runner, lead.next, lead.next_runner};
    const int2 others{max(lead.rest, lead.third),
                      (lead.best_tile & (few_leads::most_tiles - 1)) | lead.next_tile << 16};
    if (here) {
        *to.scores = {scores[0], scores[1], scores[2], scores[3]};
        *to.others = others;
    } else {
        box.send(reinterpret_cast<int*>(to.scores), owner, scores);
        box.send(to.others, owner, others);
    }
}

/// The tiles of codes of a block on their way through its shared memory: its j-th goes to the buffer j mod stages, to
/// be scored by the warpgroup j mod groups.
template <class Tile>
struct few_tiles {
    using shared = few_shared<Tile>;
    char* operands;       // (stages, 128 codes, steps * 16)
    std::uint64_t* full;  // (stages)
    const codebook_image& image;
    int tiles, blocks, rank;  // of the codebook; of the cluster; of this block

    /// Blocks take tiles in turn.
    __device__ int tile(int j) const { return j * blocks + rank; }
    __device__ bool has(int j) const { return tile(j) < tiles; }
    /// How many of its warpgroups have tiles.
    __device__ int parts() const { return rank < tiles ? min((tiles - 1 - rank) / blocks + 1, shared::groups) : 0; }
    /// One thread.
    __device__ void fetch(int j) const {
        namespace ptx = cuda::ptx;
        const int stage = j % Tile::few_stages;
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full + stage,
                                       shared::code_bytes);
        ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, operands + stage * shared::code_bytes,
                           image.rows + std::int64_t{tile(j)} * shared::code_bytes, shared::code_bytes, full + stage);
    }
    /// How often a walk over all the block's tiles fills a buffer.
    __device__ int fillings(int stage) const { return (tiles - 1 - tile(stage)) / (blocks * Tile::few_stages) + 1; }
    /// A warpgroup scores the rows against tile j, which is in its buffer, or on its way: use(score, tile), and before,
    /// meanwhile(). `row_operand` and `code_operands`: of the rows and of the buffers. `again`: the block has walked
    /// over all its tiles once before. The buffer is filled again, if there is a tile for it.
    template <class Meanwhile, class Use>
    __device__ void score(std::uint32_t row_operand, std::uint32_t code_operands, int j, bool again,
                          const Meanwhile& meanwhile, const Use& use) const {
        float score[64];  // (16 pairs of codes, 2 rows, 2)
        const int stage = j % Tile::few_stages, before = j / Tile::few_stages + (again ? fillings(stage) : 0);
        while (!cuda::ptx::mbarrier_try_wait_parity(full + stage, before & 1)) {
        }
        __syncwarp();
        arch::wgmma_fence();
        arch::wgmma_scores<Tile::steps>(score, row_operand,
                                        arch::uniform(code_operands + stage * (shared::code_bytes >> 4)));
        arch::wgmma_commit();
        meanwhile();
        arch::wgmma_wait();
        if (has(j + Tile::few_stages)) {  // once all four warps are done with it
            asm volatile("bar.sync %0, 128;" ::"r"(1 + static_cast<int>(threadIdx.x) / 128) : "memory");
            if (threadIdx.x % 128 == 0) fetch(j + Tile::few_stages);
        }
        use(score, tile(j));
    }
};

__device__ inline int code_of(int tagged_score, int tile, int lead) {
    return scored_code(tile, place_of(tagged_score), lead & 3);
}

/// What the lanes of a row conclude from its leads.
struct few_conclusion {
    int least;  // what a lead must reach to be a candidate; 0 where leads say nothing
    int total;  // candidates
    int code;   // of the row, or code_aside, or code_listed
};

/// A value of all `Lanes` lanes of a row, from each one's: joined two by two, or of a whole warp at once.
template <int Lanes, class Two, class Warp>
__device__ int join_lanes(int v, const Two& two, const Warp& warp) {
    if constexpr (Lanes == 32) {
        return warp(0xFFFFFFFFu, v);
    } else {
#pragma unroll
        for (int step = 1; step < Lanes; step *= 2) v = two(v, __shfl_xor_sync(0xFFFFFFFFu, v, step));
        return v;
    }
}

/// From the `count` leads of the threads that scored a row, four for every warpgroup; a row has at most `most`
/// candidates one by one. `Lanes` lanes a row; whole warps, converged: shuffles of diverged ones are slow. Loops over
/// leads are not unrolled: they are short, and run from a cold instruction cache.
template <int Lanes>
__device__ few_conclusion conclude_few(const few_leads& leads, int count, int most, float error, bool exact) {
    const int lane = static_cast<int>(threadIdx.x) % Lanes;
    int best = leaders::least;
#pragma unroll 1
    for (int i = lane; i < count; i += Lanes) best = max(best, leads.best(i));
    best = join_lanes<Lanes>(
        best, [](int a, int b) { return max(a, b); }, [](unsigned all, int v) { return __reduce_max_sync(all, v); });
    const int top = best & tag_mask, least = exact ? least_candidate(best, error) : top;
    int code = 0x7FFFFFFF, total = 0;
    constexpr int lost = 1 << 16;  // more than all candidates
#pragma unroll 1
    for (int i = lane; i < count; i += Lanes) {
        const few_lead l = leads[i];
        const bool may_win = exact ? l.best >= least : (l.best & tag_mask) == top;
        if (may_win) code = min(code, code_of(l.best, l.best_tile, i));
        if (!exact) continue;
        total += may_win + (l.best_runner >= least) + (l.next >= least) + (l.next_runner >= least);
        if (l.rest >= least) total += lost;  // something dropped could win
    }
    code = join_lanes<Lanes>(
        code, [](int a, int b) { return min(a, b); }, [](unsigned all, int v) { return __reduce_min_sync(all, v); });
    total = join_lanes<Lanes>(
        total, [](int a, int b) { return a + b; }, [](unsigned all, int v) { return __reduce_add_sync(all, v); });
    if (!(least > 0 && error == error)) return {0, 0, code_aside};  // integers order positive scores only
    return {least, total, total > most ? code_aside : total > 1 ? code_listed : code};
}

/// Lists the candidates of row `own` from `at` on: those of its `count` leads that reach `least`. Whole warp.
__device__ inline void list_few(const few_leads& leads, int count, int least, int own, int* candidate,
                                int* candidate_row, int at) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int from = 0; from < count; from += 32) {
        const int i = from + lane;
        const few_lead l = i < count ? leads[i] : few_lead{};  // which reaches nothing
        const auto list = [&](int score, int tile) {
            const unsigned reach = __ballot_sync(0xFFFFFFFFu, score >= least);
            if (score >= least) {
                const int to = at + __popc(reach & ((1u << lane) - 1));
                candidate[to] = code_of(score, tile, i);
                candidate_row[to] = own;
            }
            at += __popc(reach);
        };
        list(l.best, l.best_tile);
        list(l.best_runner, l.best_tile);
        list(l.next, l.next_tile);
        list(l.next_runner, l.next_tile);
    }
    __syncwarp();
}

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
    for (int i = warp; first + share.row(i) < a.x.rows && i < share.count();
         i += few_warps) {  // a row that scores say nothing of may have no code
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
    extern __shared__ __align__(128) char dynamic_shared[];
    char* base = dynamic_shared + ((1024 - (arch::shared_address(dynamic_shared) & 1023)) & 1023);
    char* operands = base;                                                // (stages, 128 codes, steps * 16)
    char* rows = base + shared::rows;                                     // (64 rows, steps * 16)
    const few_leads leads{reinterpret_cast<int4*>(base + shared::leads),  // (rows of the block, parts, 4)
                          reinterpret_cast<int2*>(base + shared::leads + shared::most_leads * sizeof(int4))};
    auto* codes = reinterpret_cast<std::int64_t*>(base + shared::codes);                 // (rows of the block)
    auto* full = arch::kept(reinterpret_cast<std::uint64_t*>(base + shared::barriers));  // (stages)
    auto& box = *reinterpret_cast<few_mailbox*>(full + stages);            // of the leads of all the block's rows
    auto& asked_box = *reinterpret_cast<few_mailbox*>(full + stages + 1);  // of that question
    std::uint64_t* const copied_full = full + stages + 2;
    auto* measures = reinterpret_cast<row_measure*>(base + shared::measures);  // (64)
    auto* errors = reinterpret_cast<float*>(base + shared::errors);            // (64)
    auto* bounds = reinterpret_cast<int*>(base + shared::bounds);
    auto* limits = reinterpret_cast<int*>(base + shared::limits);   // (rows of the block)
    auto* opened = reinterpret_cast<int2*>(base + shared::opened);  // (rows of the block) candidates: first, last + 1
    auto* asked = reinterpret_cast<int*>(base + shared::asked);     // (blocks) whether one has rows aside

    const int warp = static_cast<int>(threadIdx.x) / 32, group = warp / 4, lane = static_cast<int>(threadIdx.x) % 32;
    const int rank = static_cast<int>(blockIdx.x % blocks);
    const std::int64_t first = std::int64_t{blockIdx.x / blocks} * scored_rows;
    const int columns = static_cast<int>(a.x.columns);
    const few_tiles<Tile> tiles{
        operands, full, image, static_cast<int>(device::image_ref::tiles(a.codebook.rows)), static_cast<int>(blocks),
        rank};
    // Of a block's tiles its warpgroups take turns; a part is what one warpgroup takes.
    const int parts = min(tiles.tiles, groups * tiles.blocks), part = tiles.tile(group);
    const few_rows share{static_cast<int>(blocks), rank};
    arch::let_successor_start();
    const bool starts = threadIdx.x == few_threads - 32;  // of the last warp, which has the fewest rows
    __shared__ int listed;                                // candidates of all open rows of the block
    if (starts) {
        listed = 0;
        for (int i = 0; i < stages; ++i) ptx::mbarrier_init(full + i, 1);
        ptx::mbarrier_init(copied_full, 1);
        asked_box.open();
        box.open();  // with a fence for all of them
        box.expect(share.count() * (parts - tiles.parts()) * 4 * few_leads::bytes);
    }
    if (threadIdx.x < 4) bounds[threadIdx.x] = 0;
    // A warp converts as many rows as it can at once. The operand's rows behind the last hold anything: their scores
    // are of no use to anyone.
    constexpr bool is_short = Tile::steps == 1;  // a lane takes a row
    constexpr int warp_rows = is_short ? 32 : split::rows;
    const int row_count = static_cast<int>(min(a.x.rows - first, std::int64_t{scored_rows}));
    const bool converts = warp * warp_rows < row_count;
    const int row = warp * warp_rows + (is_short ? lane : lane / split::lanes);
    const bool inside = row < row_count, vectors = loads_vectors(a.x);
    const int copied_bytes = min(row_count, shared::copied_rows) * columns * static_cast<int>(sizeof(X));
    const auto* const copied = reinterpret_cast<const X*>(base + shared::copied);
    const bool copies = shared::copied_rows > 0 && a.x.stride == a.x.columns && copied_bytes % 16 == 0 &&
                        reinterpret_cast<std::uintptr_t>(a.x.row(first)) % 16 == 0;
    const auto has_copy = [&](int row) { return copies && row < shared::copied_rows; };
    const bool is_copied = has_copy(row);  // the same for all rows of a warp
    const X* const x = a.x.row(inside ? first + row : 0);
    const X* const x_copy = copied + (inside ? row : 0) * columns;
    __syncthreads();
    arch::cluster<few_blocks>::arrive_relaxed();  // the barriers are there, fenced above
    arch::wait_for_predecessor();

    // The rows come first of all, since all else waits for them, or takes up what connects the processor to the L2
    // cache: the tiles of codes. Where one copy can fetch them it does, which is faster than loads by threads.
    if (copies && starts) {
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, copied_full, copied_bytes);
        ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, base + shared::copied, a.x.row(first), copied_bytes,
                           copied_full);
    }
    __syncwarp();
    float4 v[split::parts], centre[split::parts];
    const auto load_x = [&](const X* from) {
#pragma unroll
        for (int s = 0; s < split::parts; ++s) v[s] = load_part<Tile::steps>(from, columns, vectors, s);
    };
    short_row short_x, short_centre;
    const float scale = *image.scale;
    if (is_short && converts) {
        short_x.load(x, columns, vectors);
        short_centre.load(image.centre, columns, false);
    } else if (converts && vectors) {
        if (!is_copied) load_x(x);
#pragma unroll
        for (int s = 0; s < split::parts; ++s) centre[s] = load_part<Tile::steps>(image.centre, columns, vectors, s);
    }
    __syncthreads();
    if (starts) {
#pragma unroll 1
        for (int j = 0; j < stages && tiles.has(j); ++j) tiles.fetch(j);
    }
    __syncwarp();
    load_bounds(image, tiles.tiles, bounds, few_threads - 1 - static_cast<int>(threadIdx.x));
    if (converts) {
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
            if (is_copied) {
                while (!ptx::mbarrier_try_wait_parity(copied_full, 0)) {
                }
                __syncwarp();
            }
            if (vectors) {
                if (is_copied) load_x(x_copy);
#pragma unroll
                for (int s = 0; s < split::parts; ++s)
                    operand.put_last(operand.centred(v[s], scale, scaled(centre[s])), factor, columns, s);
            }
            if (!vectors || !operand.fits())
                factor = operand.template put_all<3>(is_copied ? x_copy : x, inside, columns, vectors, centre_at, scale,
                                                     vectors);
            const row_measure measure = operand.measured(factor);
            if (split::lane() == 0) measures[row] = measure;
        }
        ptx::fence_proxy_async(ptx::space_shared);
    } else if (row < scored_rows) {
        measures[row] = {0, 0, 1};
    }
    __syncthreads();

    const int row0 = warp % 4 * 16 + lane / 4;  // of the rows that a thread scores; and the eighth after it
    float error0, error1;
    const auto measure = [&] {
        error0 = measures[row0].error(as_bounds(bounds), Tile::steps);
        error1 = measures[row0 + 8].error(as_bounds(bounds), Tile::steps);
        if (group == 0 && lane % 4 == 0) {
            errors[row0] = error0;
            errors[row0 + 8] = error1;
        }
        __syncwarp();
    };
    if (group < groups && part < tiles.tiles) {
        leaders lead0, lead1;
        const std::uint32_t row_operand = arch::uniform(arch::kept(arch::operand(rows)));
        const std::uint32_t code_operands = arch::kept(arch::operand(operands));
        for (int j = group; tiles.has(j); j += groups)
            tiles.score(row_operand, code_operands, j, false, measure, [&](const float(&score)[64], int tile) {
                if (exact)
                    offer_scores(score, tile, mask, error0, error1, lead0, lead1);
                else
                    offer_best(score, tile, mask, lead0, lead1);
            });
        arch::cluster<few_blocks>::wait();
        const auto send_row = [&](const leaders& lead, int row) {
            const int owner = share.owner(row);
            send(lead, leads.from((share.own(row) * parts + part) * 4 + lane % 4), owner, box, owner == rank);
        };
        send_row(lead0, row0);
        send_row(lead1, row0 + 8);
    } else {
        if (group == 0) measure();
        arch::cluster<few_blocks>::wait();
    }

    // The block's rows, as many lanes each as there are; then the candidates of all that are open.
    auto* distance = reinterpret_cast<double*>(base);                              // (most_candidates)
    auto* candidate = reinterpret_cast<int*>(distance + shared::most_candidates);  // (most_candidates)
    auto* candidate_row = candidate + shared::most_candidates;                     // (most_candidates)
    if (blocks > 1) box.receive(0);
    __syncthreads();  // of the rows of a block not every warp has sent some: only now are all done with the operands
    const int count = row_count > rank ? share.own(row_count - 1 - rank) + 1 : 0;
    bool any_aside = false;
    const auto conclude = [&](auto lanes_of_row) {
        constexpr int lanes = decltype(lanes_of_row)::value;
        const int number = lane / lanes * few_warps + warp, own = min(number, count - 1);
        const few_conclusion c = conclude_few<lanes>(leads.from(own * parts * 4), parts * 4, shared::row_candidates,
                                                     errors[share.row(own)], exact);
        const bool leads_row = lane % lanes == 0 && number < count;
        unsigned open = __ballot_sync(0xFFFFFFFFu, leads_row && c.code == code_listed);
        for (; open != 0; open &= open - 1) {
            const int from = __ffs(static_cast<int>(open)) - 1;
            const int r = __shfl_sync(0xFFFFFFFFu, own, from), least = __shfl_sync(0xFFFFFFFFu, c.least, from);
            const int at = __shfl_sync(0xFFFFFFFFu, lane == from ? atomicAdd(&listed, c.total) : 0, from);
            list_few(leads.from(r * parts * 4), parts * 4, least, r, candidate, candidate_row, at);
            if (lane == from) opened[r] = {at, at + c.total};
        }
        if (leads_row) {
            codes[own] = c.code;
            limits[own] = c.code == code_aside ? c.least : no_limit;
        }
        any_aside = leads_row && c.code == code_aside;
    };
    if (warp < count) {
        if (share.count() <= few_warps)
            conclude(std::integral_constant<int, 32>());
        else if (share.count() <= 2 * few_warps)
            conclude(std::integral_constant<int, 16>());
        else
            conclude(std::integral_constant<int, 8>());
    }
    const int asks = __syncthreads_or(any_aside);
    if (threadIdx.x < blocks && blocks > 1) asked_box.send(asked + rank, threadIdx.x, asks);
    if (starts) asked_box.expect(blocks * 4);  // by now some may have come in
    if (listed > 0) {
        for (int i = warp; i < listed; i += few_threads / 8) {  // whole warps: shuffles of diverged ones are slow
            const int mine = min(i + lane / 8 * few_warps, listed - 1);
            const int r = share.row(candidate_row[mine]);
            const double d =
                device::exact_distance<true>(a.x.row(first + r), a.codebook.row(candidate[mine]), a.x.columns);
            if (lane % 8 == 0) distance[mine] = d;
        }
        __syncthreads();
        if (const int own = static_cast<int>(threadIdx.x); own < count && codes[own] == code_listed) {
            device::exact_choice choice;
            for (int i = opened[own].x; i < opened[own].y; ++i) choice.consider(distance[i], candidate[i]);
            codes[own] = choice.code;
        }
        __syncthreads();
    }
    double loss = 0;
    for (bool again = false;; again = true) {
        write_tile<few_threads, scored_rows>(a, tally, first + rank, tiles.blocks, count, codes, loss);
        if (again) break;
        bool any = asks != 0;
        if (blocks > 1) {
            asked_box.receive(0);
            any = __any_sync(0xFFFFFFFFu, lane < tiles.blocks && asked[lane] != 0);
        }
        if (__builtin_expect(!any, 1)) break;
        settle_together(a, tiles, share, base, first, codes);
    }
    if (tally.loss) write_loss(tally.loss + std::int64_t{blockIdx.x} * few_warps + warp, loss);
#endif  // CUVQ_HAS_WGMMA
}

}  // namespace cuvq::kernel
