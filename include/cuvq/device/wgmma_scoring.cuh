// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The scores of a block of the search on Hopper's own tensor cores. Slabs of codes come by bulk copies into a ring of
// buffers; the warp that is last to be done with a buffer has it filled again. So the warpgroups do not wait for each
// other, and one can look through its scores while the other's are made.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <cuda/ptx>

#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/device/mma_leaders.cuh>
#include <cuvq/device/mma_rows.cuh>
#include <cuvq/device/mma_shape.cuh>

namespace cuvq::device {

#if CUVQ_HAS_WGMMA

/// As `mma_scoring`, for `wgmma_tile`s.
template <class Policy, class X, class C>
struct wgmma_scoring : mma_rows<Policy, X, C> {
    using base = mma_rows<Policy, X, C>;
    using base::slabs, base::memory, base::image, base::warp, base::lane, base::each;
    using base::words, base::errors, base::image_tiles, base::convert_rows;
    using typename base::shape;

    __device__ explicit wgmma_scoring(const typename base::block& b) : base(b) {}

    __device__ std::uint64_t* full() const { return reinterpret_cast<std::uint64_t*>(memory + shape::barriers); }
    __device__ int* readers() const { return reinterpret_cast<int*>(memory + shape::readers); }

    /// Walks the slabs of all tiles of codes, in step with the ring.
    struct walk {
        int tile = 0, slab = 0, stage = 0;

        __device__ void next(int slabs) {
            if (++slab == slabs) {
                slab = 0;
                ++tile;
            }
            stage = stage + 1 == Policy::stages ? 0 : stage + 1;
        }
    };

    /// Starts the copies of a slab, if there is such a tile. One thread.
    __device__ void fetch(const walk& at) const {
        namespace ptx = cuda::ptx;
        const int parts = min(shape::parts, image_tiles() - at.tile * shape::parts);
        if (parts <= 0) return;
        const std::uint32_t bytes = image_tile * 2 * image.layout.width(at.slab);
        const std::int64_t part_rows = image_tile * image.layout.row_bytes();
        std::uint64_t* barrier = full() + at.stage;
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier, parts * bytes);
        const char* from = image.rows + std::int64_t{at.tile} * shape::parts * part_rows +
                           arch::slab_layout::slab_offset(image_tile, at.slab);
        char* to = memory + shape::codes + at.stage * shape::slab_bytes;
        for (int part = 0; part < parts; ++part)
            ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, to + part * shape::part_bytes,
                               from + part * part_rows, bytes, barrier);
    }

    /// This warp is done with the buffer that slab `next` is to come into.
    __device__ void release(walk& next) const {
        __syncwarp();
        if (lane == 0) {
            __threadfence_block();
            const int before = atomicAdd(readers() + next.stage, 1);
            if (before % shape::warps == shape::warps - 1) {
                __threadfence_block();
                fetch(next);
            }
        }
        next.next(slabs);
    }

    /// Waits for the copies of a slab.
    __device__ void wait(int stage, unsigned parity) const {
        while (!cuda::ptx::mbarrier_try_wait_parity(full() + stage, parity)) {
        }
        __syncwarp();
    }

    /// All tiles, with a last slab of `Width` columns. A loop of its own for each width: with branches around the
    /// products their accumulators would be moved about.
    template <int Width>
    __device__ void score_tiles(walk& next, leaders_of<Policy> (&leaders)[2]) const {
        const int group_row = warp % shape::warps_down / 4 * 64, part = warp / shape::warps_down;
        const int tiles = this->tiles(), image_tiles = this->image_tiles(), whole = slabs - 1;
        const std::uint32_t rows = arch::uniform(arch::operand(memory + shape::rows)),
                            codes = arch::uniform(arch::operand(memory + shape::codes + part * shape::part_bytes));
        const std::uint32_t slab_rows = arch::uniform(rows + (group_row * 128 >> 4)),
                            last_rows =
                                arch::uniform(rows + ((whole * shape::row_slab_bytes + group_row * 2 * Width) >> 4));
        const int mask = *static_cast<volatile int*>(words() + shape::tag_mask);
        const int row = warp % shape::warps_down * shape::warp_rows + lane / 4;
        const float error[2] = {errors()[row], errors()[row + 8]};
        int stage = 0;
        unsigned parity = 0;
        const auto step = [&] {
            stage = stage + 1 == Policy::stages ? 0 : stage + 1;
            parity ^= stage == 0;
        };
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
            float score[64];  // (16 pairs of codes, 2 rows, 2)
            wait(stage, parity);
            arch::wgmma_fence();
            arch::wgmma_slab<64>(score, slab_rows, codes + stage * (shape::slab_bytes >> 4), false);
            arch::wgmma_commit();
            step();
#pragma unroll 1
            for (int slab = 1; slab < whole; ++slab) {
                wait(stage, parity);
                arch::wgmma_fence();
                arch::wgmma_slab<64>(score, slab_rows + slab * (shape::row_slab_bytes >> 4),
                                     codes + stage * (shape::slab_bytes >> 4), true);
                arch::wgmma_commit();
                arch::wgmma_wait_but<1>();
                release(next);
                step();
            }
            wait(stage, parity);
            arch::wgmma_fence();
            arch::wgmma_slab<Width>(score, last_rows, codes + stage * (shape::slab_bytes >> 4), true);
            arch::wgmma_commit();
            arch::wgmma_wait();
            arch::wgmma_done(score);
            release(next);
            release(next);
            step();
            if (tile * shape::parts + part >= image_tiles) continue;  // the last tile is not whole
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const tagged_scores<2 * shape::pairs> scores([&](int j) { return score[4 * (j / 2) + 2 * r + j % 2]; },
                                                             mask);
                offer(leaders[r], scores, tile, error[r]);
            }
        }
    }

    /// Scores every code against every row; leaves the slots.
    __device__ void search() const {
        namespace ptx = cuda::ptx;
        walk next;
        if (threadIdx.x == 0) {
            for (int i = 0; i < Policy::stages; ++i) {
                ptx::mbarrier_init(full() + i, 1);
                readers()[i] = 0;
            }
            ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
        }
        ptx::fence_proxy_async(ptx::space_shared);  // what used the buffers before were ordinary instructions
        __syncthreads();
        for (int i = 0; i < Policy::stages; ++i) {
            if (threadIdx.x == 0) fetch(next);
            next.next(slabs);
        }
        float factor[each];
        convert_rows(factor);
        ptx::fence_proxy_async(ptx::space_shared);
        __syncthreads();

        leaders_of<Policy> leaders[2];  // of rows 8 r + lane / 4
        const int width = image.layout.width(slabs - 1);
        if (width == 64)
            score_tiles<64>(next, leaders);
        else if (width == 32)
            score_tiles<32>(next, leaders);
        else
            score_tiles<16>(next, leaders);
        __syncthreads();
        if (threadIdx.x == 0)
            for (int i = 0; i < Policy::stages; ++i) arch::discard_barrier(full() + i);
        leave_slots(*this, leaders);
        __syncthreads();
    }
};

#endif  // CUVQ_HAS_WGMMA

}  // namespace cuvq::device
