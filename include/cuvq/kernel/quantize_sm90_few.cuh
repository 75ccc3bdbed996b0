// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The search of few rows on Hopper, in one launch and made for latency: a cluster of blocks shares 64 rows, each of its
// warpgroups scores them against its own tiles of codes, and every warp of the cluster then finishes some of the rows.
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
#include <cuvq/kernel/filter_sm90.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/kernel/prepare.cuh>
#include <cuvq/kernel/rows_sm90.cuh>
#include <cuvq/kernel/settle.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Sizes of a block, and the most blocks of a cluster.
inline constexpr int few_warps = 16, few_threads = 32 * few_warps, few_blocks = 8;

/// Candidates of a row that a warp settles alone.
inline constexpr int few_candidates = 32;

/// Shared memory of the kernel, by offsets.
template <class Tile>
struct few_shared {
    using layout = arch::wgmma_layout<Tile::steps>;
    static constexpr int groups = Tile::few_groups;  // warpgroups that score
    static constexpr int code_bytes = layout::bytes(image_tile), row_bytes = layout::bytes(row_results::rows);
    static constexpr int rows = Tile::few_stages * code_bytes;
    static constexpr int errors = rows + row_bytes;
    static constexpr int results = errors + row_results::rows * 4;
    static constexpr int centre = results + groups * static_cast<int>(sizeof(row_results));
    static constexpr int bounds = centre + 64 * Tile::steps;
    static constexpr int barriers = bounds + static_cast<int>(sizeof(device::score_bounds));
    static constexpr int wide = barriers + 8 * Tile::few_stages;  // rows that the whole block is to settle
    static constexpr int lists = wide + row_results::rows * 4;    // of candidates, a warp each
    static constexpr int bytes = lists + few_warps * few_candidates * 4;
    static constexpr int allocated = bytes + 1024;  // the base is aligned by hand
};

#if CUVQ_HAS_WGMMA

/// Row `row` of the 64, from what the warpgroups of the cluster made of it: its exact code; or `code_aside` where only
/// the whole block should look. `list`: room for few_candidates, the warp's own. Whole warp.
template <int Groups, class X, class C>
__device__ std::int64_t settle_few(const row_results* results, unsigned blocks, int row, float error, bool exact,
                                   int* list, const X* x, const matrix_ref<const C>& codebook, std::int64_t columns) {
    const unsigned lane = threadIdx.x % 32;
    const bool part = lane < Groups * blocks;  // a lane per warpgroup
    const row_results* result = arch::cluster<few_blocks>::at(results + lane % Groups, part ? lane / Groups : 0);
    const int mine = part ? result->best[row] : leaders::least, code = result->code[row];
    const int best = __reduce_max_sync(0xFFFFFFFFu, mine);
    if (!exact) {
        const int top = best & tag_mask;
        if (!(top > 0 && error == error)) return code_aside;  // integers order positive scores only
        return __reduce_min_sync(0xFFFFFFFFu, part && (mine & tag_mask) == top ? code : 0x7FFFFFFF);
    }
    const int least = least_candidate(best, error);
    if (least <= 0) return code_aside;
    unsigned live = __ballot_sync(0xFFFFFFFFu, part && mine >= least);
    if (__popc(live) == 1) {
        const int sole = __shfl_sync(0xFFFFFFFFu, code, __ffs(live) - 1);
        if (sole >= 0) return sole;
    }
    // All candidates in one list, then four at a time, a group of eight lanes each.
    const bool lives = live >> lane & 1;
    const int words = !lives ? 0 : code >= 0 ? 1 : -1 - code;
    int end = words;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(0xFFFFFFFFu, end, step);
        if (lane >= static_cast<unsigned>(step)) end += before;
    }
    const int total = __shfl_sync(0xFFFFFFFFu, end, 31);
    bool wide = total > few_candidates;
    for (int i = 0; i < words && !wide; ++i) {
        const int k = code >= 0 ? code : result->word[row][i];
        wide = k >= row_results::column;
        list[end - words + i] = k;
    }
    if (__any_sync(0xFFFFFFFFu, wide)) return code_aside;
    __syncwarp();
    device::exact_choice choice;
    for (int i = static_cast<int>(lane) / 8; i - static_cast<int>(lane) / 8 < total; i += 4) {
        const int k = list[min(i, total - 1)];
        choice.consider(device::exact_distance(x, codebook.row(k), columns), k);
    }
    __syncwarp();
    merge_warp(choice);
    return choice.code;
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
    char* codes = base;                                                      // (stages, 128 codes, steps * 16)
    char* rows = base + shared::rows;                                        // (64 rows, steps * 16)
    auto* errors = reinterpret_cast<float*>(base + shared::errors);          // (64)
    auto* results = reinterpret_cast<row_results*>(base + shared::results);  // (groups)
    auto* centre = reinterpret_cast<float*>(base + shared::centre);
    auto* bounds = reinterpret_cast<int*>(base + shared::bounds);
    auto* full = arch::kept(reinterpret_cast<std::uint64_t*>(base + shared::barriers));  // (stages)
    auto* lists = reinterpret_cast<int*>(base + shared::lists);                          // (few_warps, few_candidates)
    auto* wide = reinterpret_cast<int*>(base + shared::wide);                            // (64)

    const int group = static_cast<int>(threadIdx.x) / 128, warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const unsigned rank = blockIdx.x % blocks;
    const std::int64_t first = std::int64_t{blockIdx.x / blocks} * row_results::rows;
    const int columns = static_cast<int>(a.x.columns);
    const int tiles = static_cast<int>((a.codebook.rows - 1) / image_tile + 1);
    // The block's j-th tile: its warpgroups take them in turn.
    const auto tile_of = [&](int j) {
        return (j / groups) * static_cast<int>(blocks) * groups + static_cast<int>(rank) * groups + j % groups;
    };
    const auto fetch = [&](int j) {
        if (tile_of(j) >= tiles) return;
        const int stage = j % stages;
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full + stage,
                                       shared::code_bytes);
        ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, codes + stage * shared::code_bytes,
                           image.rows + std::int64_t{tile_of(j)} * shared::code_bytes, shared::code_bytes,
                           full + stage);
    };
    arch::let_successor_start();
    if (threadIdx.x < 4) bounds[threadIdx.x] = 0;
    if (threadIdx.x < row_results::rows) wide[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) ptx::mbarrier_init(full + i, 1);
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    arch::wait_for_predecessor();
    if (threadIdx.x == 0)
        for (int j = 0; j < stages; ++j) fetch(j);

    // Rows: a warp converts as many as it can at once; their loads are under way while the codebook's bounds come in.
    constexpr int data_parts = (Tile::steps - 1) * 4 / split::lanes, held = data_parts > 0 ? data_parts : 1;
    const bool whole =
        Tile::steps > 1 && columns == 16 * (Tile::steps - 1) && device::is_aligned4(a.x.data) && a.x.stride % 4 == 0;
    const bool converts = warp < row_results::rows / split::rows;
    const int row = warp * split::rows + lane / split::lanes;
    const bool inside = first + row < a.x.rows;
    const X* x = a.x.row(inside ? first + row : 0);
    float4 v[held];
    if (converts && whole) {
#pragma unroll
        for (int s = 0; s < data_parts; ++s) v[s] = device::load4(x + split::column(s));
    }
    __syncthreads();
    load_centre(image, columns, 16 * Tile::steps, centre);
    load_bounds(image, tiles, bounds);
    const float scale = *image.scale;
    __syncthreads();
    if (converts) {
        row_image<Tile::steps> operand{rows, row};
        float factor = 1.0f;
        if (whole) {
#pragma unroll
            for (int s = 0; s < data_parts; ++s)
                operand.add(v[s], scale, *reinterpret_cast<const float4*>(centre + split::column(s)), s);
            operand.close_after(factor, columns, data_parts);
        }
        if (!whole || __any_sync(0xFFFFFFFFu, !(split::row_sum(operand.square) < 0x1p26f)))
            factor = operand.convert(x, inside, columns, centre, scale);
        const float error = operand.error(factor, as_bounds(bounds));
        if (split::lane() == 0) errors[row] = error;
        ptx::fence_proxy_async(ptx::space_shared);
    }
    __syncthreads();

    const std::uint32_t row_operand = arch::uniform(arch::kept(arch::operand(rows)));
    const std::uint32_t code_operands = arch::kept(arch::operand(codes));
    const int row0 = warp % 4 * 16 + lane / 4;
    const float error0 = errors[row0], error1 = errors[row0 + 8];
    leaders lead0, lead1;
    for (int j = group; group < groups && tile_of(j) < tiles; j += groups) {
        float score[64];  // (16 pairs of codes, 2 rows, 2)
        const int stage = j % stages;
        while (!ptx::mbarrier_try_wait_parity(full + stage, j / stages & 1)) {
        }
        __syncwarp();
        arch::wgmma_fence();
        arch::wgmma_scores<Tile::steps>(score, row_operand,
                                        arch::uniform(code_operands + stage * (shared::code_bytes >> 4)));
        arch::wgmma_commit();
        arch::wgmma_wait();
        if (tile_of(j + stages) < tiles) {  // once all four warps are done with it, the stage is free
            asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
            if (threadIdx.x % 128 == 0) fetch(j + stages);
        }
        offer_tile(score, tile_of(j), mask, exact, error0, error1, lead0, lead1);
    }
    if (group < groups) {
        conclude(lead0, error0, exact, results[group], row0);
        conclude(lead1, error1, exact, results[group], row0 + 8);
    }
    ptx::barrier_cluster_arrive(ptx::sem_release);
    ptx::barrier_cluster_wait(ptx::sem_acquire);

    // This block's share of the rows, and each warp's share of those.
    const int block_rows = row_results::rows / static_cast<int>(blocks), share = (block_rows - 1) / few_warps + 1;
    const int start = static_cast<int>(rank) * block_rows + warp * share;
    const std::int64_t left = a.x.rows - first - start;
    const int count = warp * share < block_rows ? static_cast<int>(min(left > 0 ? left : 0, std::int64_t{share})) : 0;
    std::int64_t code = code_aside;
    for (int r = 0; r < count; ++r) {
        const std::int64_t found =
            settle_few<groups>(results, blocks, start + r, errors[start + r], exact, lists + warp * few_candidates,
                               a.x.row(first + start + r), a.codebook, a.x.columns);
        if (lane == r) code = found;
    }
    if (lane < count && code == code_aside) wide[start + lane] = 1;
    const bool any_wide = __syncthreads_or(lane < count && code == code_aside);
    ptx::barrier_cluster_arrive(ptx::sem_release);  // nobody reads this block's results after all have come here
    if (any_wide) {
        __shared__ double distances[few_warps];
        __shared__ std::int64_t found[few_warps];
        const int everything = row_results::everything;
        for (int r = 0; r < row_results::rows; ++r) {
            if (!wide[r]) continue;
            device::exact_choice choice;
            consider_words(choice, &everything, 1, a.x.row(first + r), a.codebook, a.x.columns,
                           static_cast<int>(threadIdx.x) / 8, few_threads / 8);
            merge_block(choice, distances, found);
            if (threadIdx.x == 0) found[0] = choice.code;
            __syncthreads();
            if (start <= r && r < start + count && lane == r - start) code = found[0];
            __syncthreads();
        }
    }
    double loss = 0;
    write_codes(a, tally, first + start, count, code);
    write_rows(a, tally, first + start, count, code, loss);
    if (tally.loss) write_loss(tally.loss + std::int64_t{blockIdx.x} * few_warps + warp, loss);
    ptx::barrier_cluster_wait(ptx::sem_acquire);
#endif  // CUVQ_HAS_WGMMA
}

}  // namespace cuvq::kernel
