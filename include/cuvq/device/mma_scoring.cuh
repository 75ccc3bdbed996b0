// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The scores of a block of the search on tensor cores, by instructions that every architecture has from sm_80 on: every
// code against every row. Threads copy the codes into a ring of buffers and meet after each slab of 64 columns.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/device/mma_leaders.cuh>
#include <cuvq/device/mma_rows.cuh>
#include <cuvq/device/mma_shape.cuh>

namespace cuvq::device {

#if CUVQ_HAS_MMA

/// Tiles of codes on their way through shared memory and the tensor cores.
template <class Policy, class X, class C>
struct mma_scoring : mma_rows<Policy, X, C> {
    using base = mma_rows<Policy, X, C>;
    using base::columns, base::slabs, base::memory, base::image, base::warp, base::lane, base::each;
    using base::words, base::errors, base::image_tiles, base::code_at, base::load, base::centre, base::store,
        base::convert_rows;
    using typename base::row_share;
    using typename base::shape;

    __device__ explicit mma_scoring(const typename base::block& b) : base(b) {}

    /// Walks the slabs of all tiles of codes, copying one at a time into the ring.
    struct loader {
        const char* tile_rows;  // of this thread's first 16 bytes, as the next two
        const char* from;
        const std::uint32_t ring;
        const std::int64_t part_rows;  // bytes from one tile of the image to the next
        int left;                      // tiles of the image
        int slab = 0, stage = 0;

        __device__ explicit loader(const mma_scoring& s)
            : tile_rows(s.image.rows + 16 * static_cast<int>(threadIdx.x)),
              from(tile_rows),
              ring(arch::shared_window(s.memory + shape::codes) + 16 * static_cast<int>(threadIdx.x)),
              part_rows(image_tile * s.image.layout.row_bytes()),
              left(s.image_tiles()) {}

        __device__ void next(const mma_scoring& s) {
            constexpr int step = 16 * Policy::threads;
            const int width = s.image.layout.width(slab);
#pragma unroll
            for (int part = 0; part < shape::parts; ++part) {
                if (part >= left) break;
                const std::uint32_t to = ring + stage * shape::slab_bytes + part * shape::part_bytes;
                const char* at = from + part * part_rows;
                arch::copy16_async(to, at);
                if (width > 16) arch::copy16_async(to + step, at + step);
                if (width > 32) {
                    arch::copy16_async(to + 2 * step, at + 2 * step);
                    arch::copy16_async(to + 3 * step, at + 3 * step);
                }
            }
            arch::copy_commit();
            from += shape::part_bytes;
            if (++slab == s.slabs) {
                slab = 0;
                left -= shape::parts;
                tile_rows += shape::parts * part_rows;
                from = tile_rows;
            }
            stage = stage + 1 == Policy::stages ? 0 : stage + 1;
        }
    };

    /// Scores every code against every row; leaves the slots.
    __device__ void search() const {
        const int tiles = this->tiles(), image_tiles = this->image_tiles();
        loader load_codes(*this);
#pragma unroll
        for (int i = 0; i < Policy::stages - 1; ++i) load_codes.next(*this);
        float factor[each], ignored[each] = {};
        convert_rows(factor);
        row_share share;
        if constexpr (Policy::streamed) {
            load(0, share);
            centre(0, *image.scale, share);
            store<false>(0, factor, share, 0, ignored);
        }

        const int warp_row = warp % shape::warps_down * shape::warp_rows,
                  warp_code = warp / shape::warps_down * shape::warp_codes;
        const int part_offset = warp_code / image_tile * shape::part_bytes, code_in_part = warp_code % image_tile;
        const int mask = *static_cast<volatile int*>(words() + shape::tag_mask);
        float error[2 * shape::row_tiles] = {};  // of rows 8 r + lane / 4
        leaders_of<Policy> leaders[2 * shape::row_tiles];
        if constexpr (shape::kept > 2) {
            __syncthreads();  // until the bounds are there
#pragma unroll
            for (int r = 0; r < 2 * shape::row_tiles; ++r) error[r] = errors()[warp_row + 8 * r + lane / 4];
        }
        int stage = 0, turn = 0;
        for (int tile = 0; tile < tiles; ++tile) {
            arch::mma_scores<shape::row_tiles, shape::pairs> score;
#pragma unroll
            for (int i = 0; i < shape::row_tiles; ++i)
#pragma unroll
                for (int j = 0; j < shape::pairs; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) score[i][j][e] = 0.0f;
            for (int slab = 0; slab < slabs; ++slab) {
                arch::copy_wait<Policy::stages - 2>();
                __syncthreads();
                const int next_slab = slab + 1 == slabs ? 0 : slab + 1;
                // Into the buffer that all warps left before the barrier.
                if (Policy::stages == 2) load_codes.next(*this);
                if constexpr (Policy::streamed) load(next_slab, share);
                const int width = image.layout.width(slab);
                const std::uint32_t x = arch::shared_window(memory + shape::rows) +
                                        (Policy::streamed ? turn : slab) * shape::row_slab_bytes + warp_row * 2 * width;
                const std::uint32_t c = arch::shared_window(memory + shape::codes) + stage * shape::slab_bytes +
                                        part_offset + code_in_part * 2 * width;
                arch::mma_slab(score, x, c, width);
                if (Policy::stages > 2) load_codes.next(*this);
                stage = stage + 1 == Policy::stages ? 0 : stage + 1;
                turn ^= 1;
                if constexpr (Policy::streamed) {
                    centre(next_slab, *image.scale, share);
                    store<false>(next_slab, factor, share, turn, ignored);
                }
            }
            if (tile * shape::parts + warp_code / image_tile >= image_tiles) continue;  // the last tile is not whole
#pragma unroll
            for (int r = 0; r < 2 * shape::row_tiles; ++r) {
                const tagged_scores<2 * shape::pairs> scores(
                    [&](int j) { return score[r / 2][j / 2][r % 2 * 2 + j % 2]; }, mask);
                offer(leaders[r], scores, tile, error[r]);
            }
        }
        arch::copy_wait<0>();
        __syncthreads();
        leave_slots(*this, leaders);
        __syncthreads();
    }
};

#endif  // CUVQ_HAS_MMA

}  // namespace cuvq::device
