// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// How a block of the search on tensor cores divides its rows and codes, and its shared memory.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/device/nearest.cuh>
#include <cuvq/dispatch/tuning.cuh>
#include <cuvq/views.hpp>

namespace cuvq::device {

/// Most columns and codes of the tensor-core search: float sums of more squares would need a wider bound, and a code
/// is kept in 32 bits.
inline constexpr std::int64_t most_mma_columns = 1 << 16;
inline constexpr std::int64_t most_mma_codes = 1 << 30;

/// Whether this compilation has the instructions of a tile's search; without, its kernels are empty.
template <class Policy>
inline constexpr bool has_tensor_cores = Policy::warpgroups ? CUVQ_HAS_WGMMA : CUVQ_HAS_MMA;

/// Which codes a thread scores of a row, a slot: in each tile of `codes` codes, of which a warp has `warp_codes`.
struct slot_layout {
    int codes, warp_codes;

    CUVQ_HOST_DEVICE constexpr int in_tile() const { return warp_codes / 4; }
    /// Code `at` of those that slot `slot` has of a tile.
    CUVQ_HOST_DEVICE constexpr int code(int slot, int tile, int at) const {
        return tile * codes + slot / 4 * warp_codes + at / 2 * 8 + slot % 4 * 2 + at % 2;
    }
};

/// How a tile's block divides it, and its shared memory, by offsets from an address aligned to `alignment`.
template <class Policy>
struct mma_shape {
    static constexpr int warps = Policy::threads / 32;
    static constexpr int warp_codes = Policy::warp_codes, warps_across = Policy::codes / warp_codes;
    static constexpr int warps_down = warps / warps_across, warp_rows = Policy::rows / warps_down;
    static constexpr int row_tiles = warp_rows / 16;  // of 16 rows, of one warp
    static constexpr int pairs = warp_codes / 8;      // of neighbouring codes that a thread holds of a row and tile
    static constexpr int slots = 4 * warps_across;    // threads that share a row
    static constexpr int groups = Policy::threads / exact_lanes;
    static constexpr int parts = Policy::codes / image_tile;  // tiles of the image in a tile of codes
    static_assert(parts * image_tile == Policy::codes && warps_across * warp_codes == Policy::codes,
                  "a tile of codes is whole tiles of the image");
    static_assert(warps_down * warps_across == warps && warps_down * row_tiles * 16 == Policy::rows,
                  "each warp takes a multiple of 16 rows");
    static_assert(16 * Policy::threads == 32 * image_tile, "the narrowest slab is one copy a thread");
    static_assert(Policy::stages >= 2 && Policy::rows % groups == 0 && slots <= 2 * exact_lanes, "");
    static_assert(!Policy::warpgroups || (warps_down % 4 == 0 && row_tiles == 1), "warpgroups take 64 rows");

    static constexpr int part_bytes = 128 * image_tile, slab_bytes = parts * part_bytes;
    static constexpr int row_slab_bytes = 128 * Policy::rows;
    static constexpr int errors = 0;                                                        // float [rows]
    static constexpr int hard = errors + 4 * Policy::rows;                                  // int [rows]
    static constexpr int open = hard + 4 * Policy::rows;                                    // int [rows]
    static constexpr int choices = open + 4 * Policy::rows;                                 // exact_choice [warps]
    static constexpr int words = choices + warps * static_cast<int>(sizeof(exact_choice));  // int [8]
    static constexpr int barriers = (words + 4 * 8 + 7) / 8 * 8;  // of warpgroups: 8 bytes [stages]
    static constexpr int readers = barriers + (Policy::warpgroups ? 8 * Policy::stages : 0);  // int [stages]
    static constexpr int control = readers + (Policy::warpgroups ? 4 * Policy::stages : 0);   // bytes up to here
    static constexpr int alignment = Policy::warpgroups ? 1024 : 128;
    static constexpr int codes = (control + alignment - 1) / alignment * alignment;  // [stages] slabs of codes
    static constexpr int rows = codes + Policy::stages * slab_bytes;                 // slabs of rows: all, or two

    /// Which of the words is what; the first four are the codebook's score_bounds.
    static constexpr int hard_count = 4, tag_mask = 5, candidate_count = 6;

    // Once all tiles are scored, in place of the slabs of codes:
    /// What a thread leaves of a row: so many scores, as registers allow, the best one first, with their codes, and
    /// the best of all that it dropped; [rows][slots].
    static constexpr int kept = Policy::warpgroups || Policy::rows <= 64 ? 5 : 2;
    struct slot {
        int score[kept], code[kept];
        int rest;
    };
    /// A code whose distance decides.
    struct candidate {
        double distance;
        int row, code;
    };
    static constexpr int most_candidates = 512;
    static constexpr int slots_at = codes;
    static constexpr int candidates_at = slots_at + Policy::rows * slots * static_cast<int>(sizeof(slot));
    static_assert(candidates_at + most_candidates * static_cast<int>(sizeof(candidate)) <= rows, "");
    static_assert(Policy::rows <= Policy::threads && (Policy::rows == 64 || Policy::rows == 128), "");

    CUVQ_HOST_DEVICE static constexpr slot_layout layout() { return {Policy::codes, warp_codes}; }

    /// Least number of dimensions: warpgroups begin with a whole slab.
    static constexpr int least_columns = Policy::warpgroups ? 62 : 1;

    CUVQ_HOST_DEVICE static constexpr std::int64_t bytes(std::int64_t dimensions) {
        return rows + (Policy::streamed ? 2 : (dimensions + 2) / 64 + 1) * row_slab_bytes;
    }
};

/// Shared memory that a block lends to `nearest` on the tensor cores.
template <int Rows, int Codes, int Stages, bool Streamed, int Blocks>
struct nearest_storage<mma_tile<Rows, Codes, Stages, Streamed, Blocks>> {
    char* memory;  ///< `bytes(D)` of shared memory, aligned to 128 bytes

    /// How much for vectors of so many dimensions.
    CUVQ_HOST_DEVICE static constexpr std::int64_t bytes(std::int64_t dimensions) {
        return mma_shape<mma_tile<Rows, Codes, Stages, Streamed, Blocks>>::bytes(dimensions);
    }
};
template <int Rows, int Codes, int Stages>
struct nearest_storage<wgmma_tile<Rows, Codes, Stages>> {
    char* memory;  ///< `bytes(D)` of shared memory, aligned to 1024 bytes

    /// How much for vectors of so many dimensions.
    CUVQ_HOST_DEVICE static constexpr std::int64_t bytes(std::int64_t dimensions) {
        return mma_shape<wgmma_tile<Rows, Codes, Stages>>::bytes(dimensions);
    }
};

#if CUVQ_HAS_MMA

/// What the steps of `nearest` on tensor cores know, in every thread of a block.
template <class Policy, class X, class C>
struct mma_block {
    using shape = mma_shape<Policy>;

    char* const memory;
    const matrix_ref<const X>& rows;
    const matrix_ref<const C>& codebook;
    const image_ref& image;
    const int columns, slabs;  // slabs that hold data
    const int lane, warp, group, group_lane;
    const int whole;  // slabs, from the first on, that hold nothing but data, in rows aligned for loads of four

    __device__ mma_block(const nearest_storage<Policy>& storage, const matrix_ref<const X>& x,
                         const matrix_ref<const C>& c, const image_ref& i)
        : memory(storage.memory),
          rows(x),
          codebook(c),
          image(i),
          columns(static_cast<int>(x.columns)),
          slabs((columns + 2) / 64 + 1),
          lane(static_cast<int>(threadIdx.x) % 32),
          warp(static_cast<int>(threadIdx.x) / 32),
          group(static_cast<int>(threadIdx.x) / exact_lanes),
          group_lane(static_cast<int>(threadIdx.x) % exact_lanes),
          whole(is_aligned4(x.data) && x.stride % 4 == 0 ? columns / 64 : 0) {}

    __device__ float* errors() const { return reinterpret_cast<float*>(memory + shape::errors); }
    __device__ int* words() const { return reinterpret_cast<int*>(memory + shape::words); }

    /// Tiles of codes, and of the image.
    __device__ int tiles() const { return static_cast<int>((codebook.rows - 1) / Policy::codes + 1); }
    __device__ int image_tiles() const { return static_cast<int>(image_ref::tiles(codebook.rows)); }

    /// The code that thread `slot` of a row holds of `tile` at this place, the low bits of a score.
    __device__ static int code_at(int slot, int tile, int place) {
        return shape::layout().code(slot, tile, place & (shape::layout().in_tile() - 1));
    }
};

#endif  // CUVQ_HAS_MMA

}  // namespace cuvq::device
