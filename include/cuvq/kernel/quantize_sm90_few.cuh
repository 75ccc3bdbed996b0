// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The search of few rows on Hopper, in one launch and made for latency: a cluster of blocks shares 64 rows. Each of its
// warpgroups scores them against its own tiles of codes and sends what could win to the block that finishes the row.
// Nothing waits for the whole cluster but, at the start, for its blocks to be there, and at the end, for word that they
// have settled their rows: those with more candidates than were sent, as of a codebook with many copies of a code, are
// settled by all blocks together.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <cuda/ptx>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/kernel/conclude_few_sm90.cuh>
#include <cuvq/kernel/few_cluster_sm90.cuh>
#include <cuvq/kernel/filter_sm90.cuh>
#include <cuvq/kernel/image_frame.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/kernel/rows_sm90.cuh>
#include <cuvq/kernel/settle_few_sm90.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

#if CUVQ_HAS_WGMMA

/// A thread's share in making the operand of the cluster's rows of x, of which each block makes its own: `load`, then
/// `convert`, with a barrier between them that keeps later copies behind these loads. A warp converts as many rows as
/// it can at once. The operand's rows behind the last hold anything: their scores are of no use to anyone.
template <class Tile, class X>
struct few_conversion {
    using shared = few_shared<Tile>;
    using split = row_split<Tile::steps>;
    static constexpr bool is_short = Tile::steps == 1;  // a lane takes a row
    static constexpr int warp_rows = is_short ? 32 : split::rows;

    const codebook_image& image;
    char* copied;  // (copied rows, columns) where one copy, if it can, brings rows of x as they are
    std::uint64_t* copied_full;
    int columns, row_count;  // of x; of the cluster
    int row;                 // the thread's
    bool converts, inside;   // the warp has rows to convert; the thread's is one of x
    bool vectors;            // loads of four serve
    int copied_bytes;
    bool copies, is_copied;  // that copy can; it brings the thread's row, as all of a warp
    const X *x, *x_copy;     // the row
    float4 v[split::parts], centre[split::parts];
    short_row short_x, short_centre;
    float scale;

    __device__ few_conversion(const matrix_ref<const X>& all, std::int64_t first, const codebook_image& of, char* room,
                              std::uint64_t* full)
        : image(of), copied(room), copied_full(full) {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
        columns = static_cast<int>(all.columns);
        row_count = static_cast<int>(min(all.rows - first, std::int64_t{scored_rows}));
        row = warp * warp_rows + (is_short ? lane : lane / split::lanes);
        converts = warp * warp_rows < row_count;
        inside = row < row_count;
        vectors = loads_vectors(all);
        copied_bytes = min(row_count, shared::copied_rows) * columns * static_cast<int>(sizeof(X));
        copies = shared::copied_rows > 0 && all.stride == all.columns && copied_bytes % 16 == 0 &&
                 reinterpret_cast<std::uintptr_t>(all.row(first)) % 16 == 0;
        is_copied = copies && row < shared::copied_rows;
        x = all.row(inside ? first + row : 0);
        x_copy = reinterpret_cast<const X*>(copied) + (inside ? row : 0) * columns;
    }

    /// One thread, if `copies`: starts the copy. `from`: the first of the rows, which no other thread keeps a register
    /// for.
    __device__ void copy(const X* from) const {
        namespace ptx = cuda::ptx;
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, copied_full, copied_bytes);
        ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, copied, from, copied_bytes, copied_full);
    }
    /// What no copy brings, into registers.
    __device__ void load() {
        scale = *image.scale;
        if (is_short && converts) {
            short_x.load(x, columns, vectors);
            short_centre.load(image.centre, columns, false);
        } else if (converts && vectors) {
            if (!is_copied) load_row(x);
#pragma unroll
            for (int s = 0; s < split::parts; ++s)
                centre[s] = load_part<Tile::steps>(image.centre, columns, vectors, s);
        }
    }
    /// Writes rows of `operand` and their `measures` (64), to be read after a barrier.
    __device__ void convert(char* operand, row_measure* measures) {
        if (converts) {
            if constexpr (is_short)
                measures[row] = short_x.put(operand, row, {columns, arch::slab_layout{1}}, scale,
                                            [&](int d) { return __fmaf_ieee_rn(scale, short_centre.v[d], 0.0f); });
            else
                convert_row({operand, row}, measures);
            cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
        } else if (row < scored_rows) {
            measures[row] = {0, 0, 1};
        }
    }
    /// The same of a row that several lanes share.
    __device__ void convert_row(row_image<Tile::steps> to, row_measure* measures) {
        const auto scaled = [&](const float4& c) {
            return float4{__fmaf_ieee_rn(scale, c.x, 0.0f), __fmaf_ieee_rn(scale, c.y, 0.0f),
                          __fmaf_ieee_rn(scale, c.z, 0.0f), __fmaf_ieee_rn(scale, c.w, 0.0f)};
        };
        const auto centre_at = [&](int d) { return scaled(device::load4(image.centre, d, columns)); };
        float factor = 1.0f;
        if (is_copied) {
            while (!cuda::ptx::mbarrier_try_wait_parity(copied_full, 0)) {
            }
            __syncwarp();
        }
        if (vectors) {
            if (is_copied) load_row(x_copy);
#pragma unroll
            for (int s = 0; s < split::parts; ++s)
                to.put_last(to.centred(v[s], scale, scaled(centre[s])), factor, columns, s);
        }
        if (!vectors || !to.fits())
            factor =
                to.template put_all<3>(is_copied ? x_copy : x, inside, columns, vectors, centre_at, scale, vectors);
        const row_measure measure = to.measured(factor);
        if (split::lane() == 0) measures[row] = measure;
    }
    __device__ void load_row(const X* from) {
#pragma unroll
        for (int s = 0; s < split::parts; ++s) v[s] = load_part<Tile::steps>(from, columns, vectors, s);
    }
};

/// The rows that a block finishes, once all their leads are there and nobody scores any more.
template <class Tile>
struct few_block_rows {
    using shared = few_shared<Tile>;
    few_rows share;
    few_leads leads;      // (rows of the block, parts, 4)
    int parts, count;     // of a row; rows that are there
    int& listed;          // candidates of all open rows
    const float* errors;  // (64)
    std::int64_t* codes;  // (rows of the block)
    int* limits;          // (rows of the block)
    int2* opened;         // (rows of the block) candidates: first, last + 1
    double* distance;     // (most_candidates)
    int* candidate;       // (most_candidates)
    int* candidate_row;   // (most_candidates)

    __device__ few_block_rows(char* base, const few_rows& rows, const few_leads& all, int all_parts, int row_count,
                              int& all_listed)
        : share(rows),
          leads(all),
          parts(all_parts),
          count(row_count > share.rank ? share.own(row_count - 1 - share.rank) + 1 : 0),
          listed(all_listed),
          errors(reinterpret_cast<const float*>(base + shared::errors)),
          codes(reinterpret_cast<std::int64_t*>(base + shared::codes)),
          limits(reinterpret_cast<int*>(base + shared::limits)),
          opened(reinterpret_cast<int2*>(base + shared::opened)),
          distance(reinterpret_cast<double*>(base)),
          candidate(reinterpret_cast<int*>(distance + shared::most_candidates)),
          candidate_row(candidate + shared::most_candidates) {}

    /// Codes and limits of the rows, as their leads say, by as many lanes each as there are, and the candidates of all
    /// that are open. Whether the thread saw a row aside.
    __device__ bool conclude(bool exact) const {
        if (static_cast<int>(threadIdx.x) / 32 >= count) return false;
        if (share.count() <= few_warps) return conclude_by<32>(exact);
        if (share.count() <= 2 * few_warps) return conclude_by<16>(exact);
        return conclude_by<8>(exact);
    }
    template <int Lanes>
    __device__ bool conclude_by(bool exact) const {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
        const int number = lane / Lanes * few_warps + warp, own = min(number, count - 1);
        const few_conclusion c = conclude_few<Lanes>(leads.from(own * parts * 4), parts * 4, shared::row_candidates,
                                                     errors[share.row(own)], exact);
        const bool leads_row = lane % Lanes == 0 && number < count;
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
        return leads_row && c.code == code_aside;
    }

    /// Codes of the rows whose candidates are listed: measures these, for a whole block. `first`: the cluster's first
    /// row.
    template <class X, class C>
    __device__ void measure_listed(const detail::quantize_args<X, C>& a, std::int64_t first) const {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
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
};

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
    constexpr int groups = shared::groups, stages = Tile::few_stages;
    static_assert(stages % groups == 0, "a stage belongs to one warpgroup, which so sees all its phases");
    extern __shared__ __align__(128) char dynamic_shared[];
    char* base = dynamic_shared + ((1024 - (arch::shared_address(dynamic_shared) & 1023)) & 1023);
    char* operands = base;                                                // (stages, 128 codes, steps * 16)
    char* rows = base + shared::rows;                                     // (64 rows, steps * 16)
    const few_leads leads{reinterpret_cast<int4*>(base + shared::leads),  // (rows of the block, parts, 4)
                          reinterpret_cast<int2*>(base + shared::leads + shared::most_leads * sizeof(int4))};
    auto* full = arch::kept(reinterpret_cast<std::uint64_t*>(base + shared::barriers));  // (stages)
    auto& box = *reinterpret_cast<few_mailbox*>(full + stages);            // of the leads of all the block's rows
    auto& asked_box = *reinterpret_cast<few_mailbox*>(full + stages + 1);  // of what is in `asked`
    std::uint64_t* const copied_full = full + stages + 2;
    auto* measures = reinterpret_cast<row_measure*>(base + shared::measures);  // (64)
    auto* errors = reinterpret_cast<float*>(base + shared::errors);            // (64)
    auto* bounds = reinterpret_cast<int*>(base + shared::bounds);
    auto* asked = reinterpret_cast<int*>(base + shared::asked);  // (blocks) whether one has rows aside

    const int warp = static_cast<int>(threadIdx.x) / 32, group = warp / 4, lane = static_cast<int>(threadIdx.x) % 32;
    const int rank = static_cast<int>(blockIdx.x % blocks);
    const std::int64_t first = std::int64_t{blockIdx.x / blocks} * scored_rows;
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
    few_conversion<Tile, X> conversion(a.x, first, image, base + shared::copied, copied_full);
    __syncthreads();
    arch::cluster<few_blocks>::arrive_relaxed();  // the barriers are there, fenced above
    arch::wait_for_predecessor();

    // The rows come first of all, since all else waits for them, or takes up what connects the processor to the L2
    // cache: the tiles of codes. Where one copy can fetch them it does, which is faster than loads by threads.
    if (conversion.copies && starts) conversion.copy(a.x.row(first));
    __syncwarp();
    conversion.load();
    __syncthreads();
    if (starts) {
#pragma unroll 1
        for (int j = 0; j < stages && tiles.has(j); ++j) tiles.fetch(j);
    }
    __syncwarp();
    load_bounds(image, tiles.tiles, bounds, few_threads - 1 - static_cast<int>(threadIdx.x));
    conversion.convert(rows, measures);
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

    if (blocks > 1) box.receive(0);
    __syncthreads();  // of the rows of a block not every warp has sent some: only now are all done with the operands
    const few_block_rows<Tile> own(base, share, leads, parts, conversion.row_count, listed);
    const int asks = __syncthreads_or(own.conclude(exact));
    if (threadIdx.x < blocks && blocks > 1) asked_box.send(asked + rank, threadIdx.x, asks);
    if (starts) asked_box.expect(blocks * 4);  // by now some may have come in
    if (listed > 0) own.measure_listed(a, first);
    double loss = 0;
    for (bool again = false;; again = true) {
        write_tile<few_threads, scored_rows>(a, tally, first + rank, tiles.blocks, own.count, own.codes, loss);
        if (again) break;
        bool any = asks != 0;
        if (blocks > 1) {
            asked_box.receive(0);
            any = __any_sync(0xFFFFFFFFu, lane < tiles.blocks && asked[lane] != 0);
        }
        if (__builtin_expect(!any, 1)) break;
        settle_together(a, tiles, share, base, first, own.codes);
    }
    if (tally.loss) write_loss(tally.loss + std::int64_t{blockIdx.x} * few_warps + warp, loss);
#endif  // CUVQ_HAS_WGMMA
}

}  // namespace cuvq::kernel
