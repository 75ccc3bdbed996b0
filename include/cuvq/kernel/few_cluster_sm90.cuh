// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// How the blocks of a cluster share 64 rows in the search of few rows (kernel/quantize_sm90_few.cuh): their sizes and
// their shared memory, which of them finishes a row, what its leads are and how they get there, and the tiles of codes
// that each scores.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <cuda/ptx>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/kernel/filter_sm90.cuh>
#include <cuvq/kernel/image_frame.cuh>
#include <cuvq/kernel/rows_sm90.cuh>

namespace cuvq::kernel {

/// Sizes of a block, and the most blocks of a cluster.
inline constexpr int few_warps = 16, few_threads = 32 * few_warps, few_blocks = 16;

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

#endif  // CUVQ_HAS_WGMMA

}  // namespace cuvq::kernel
