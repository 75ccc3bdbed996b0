// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The block-level search on tensor cores. The block converts its rows to fp16 once (or slab by slab, again for every
// tile of codes, where shared memory does not hold them), streams the codebook's image through a ring of buffers, keeps
// per thread and row the best of its codes, and settles in float64 what the bound of device/certificate.cuh leaves
// open.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cuvq/arch/mma_sm80.cuh>
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

/// What the threads of a row leave for settling it, from one thread: its two best tiles and the best of all that it
/// dropped.
struct row_leaders {
    static constexpr int least = -0x7FFFFFFF;
    int best = least, best_tile = 0;
    int next = least, next_tile = 0;
    int rest = least;

    /// A tile's largest score and its second largest, as integers.
    __device__ void offer(int score, int runner, int tile) {
        const bool leads = score > best;
        const int second = min(score, best), second_tile = leads ? best_tile : tile;
        best = max(score, best);
        best_tile = leads ? tile : best_tile;
        const bool follows = second > next;
        rest = max(max(rest, runner), min(second, next));
        next = max(second, next);
        next_tile = follows ? second_tile : next_tile;
    }
};

/// How a tile's block divides it, and its shared memory, by offsets from an address aligned to 128 bytes.
template <class Policy>
struct mma_shape {
    static constexpr int warps = Policy::threads / 32;
    static constexpr int warp_codes = 64, warps_across = Policy::codes / warp_codes;
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
    static_assert(Policy::stages >= 2 && Policy::rows % groups == 0 && slots % exact_lanes == 0 && slots <= 16, "");

    static constexpr int part_bytes = 128 * image_tile, slab_bytes = parts * part_bytes;
    static constexpr int row_slab_bytes = 128 * Policy::rows;
    static constexpr int errors = 0;                                                        // float [rows]
    static constexpr int hard = errors + 4 * Policy::rows;                                  // int [rows]
    static constexpr int open = hard + 4 * Policy::rows;                                    // int [rows]
    static constexpr int choices = open + 4 * Policy::rows;                                 // exact_choice [warps]
    static constexpr int words = choices + warps * static_cast<int>(sizeof(exact_choice));  // int [8]
    static constexpr int codes = (words + 4 * 8 + 127) / 128 * 128;                         // [stages] slabs of codes
    static constexpr int rows = codes + Policy::stages * slab_bytes;  // slabs of rows: all, or two

    /// Which of the words is what; the first four are the codebook's score_bounds.
    static constexpr int hard_count = 4, tag_mask = 5, candidate_count = 6;

    // Once all tiles are scored, in place of the slabs of codes:
    /// What a thread's `row_leaders` become; [rows][slots].
    struct slot {
        int best, best_code, next, next_code, rest;
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
    static_assert(Policy::rows <= Policy::threads && Policy::rows <= 256, "");
};

/// Shared memory that a block lends to `nearest` on the tensor cores.
template <int Rows, int Codes, int Stages, bool Streamed, int Blocks>
struct nearest_storage<mma_tile<Rows, Codes, Stages, Streamed, Blocks>> {
    char* memory;  ///< `bytes(D)` of shared memory, aligned to 128 bytes

    /// How much for vectors of so many dimensions.
    CUVQ_HOST_DEVICE static constexpr std::int64_t bytes(std::int64_t dimensions) {
        using shape = mma_shape<mma_tile<Rows, Codes, Stages, Streamed, Blocks>>;
        const std::int64_t slabs = Streamed ? 2 : (dimensions + 2) / 64 + 1;
        return shape::rows + slabs * shape::row_slab_bytes;
    }
};

#if CUVQ_HAS_MMA

/// The power of two that makes a row of this |scale (x - centre)|^2 fit fp16, and fp16 can hold itself; 0 if there is
/// none, for NaN too.
__device__ inline float row_factor(float square) {
    const int exponent = static_cast<int>(__float_as_uint(square) >> 24) - 63;  // the norm is below 2^(exponent + 1)
    return square < 0x1p26f ? 1.0f : square < 0x1p72f ? __int_as_float((127 + 13 - exponent) << 23) : 0.0f;
}

/// The steps of `nearest` on tensor cores, for one block's rows.
template <class Policy, class X, class C>
struct mma_search {
    using shape = mma_shape<Policy>;

    static constexpr int each = Policy::rows / shape::groups;  // rows that a group of eight lanes converts

    char* const memory;
    const matrix_ref<const X>& rows;
    const matrix_ref<const C>& codebook;
    const image_ref& image;
    const int columns, slabs;  // slabs that hold data
    const int lane, warp, group, group_lane;
    const int whole;  // slabs, from the first on, that hold nothing but data, in rows aligned for loads of four

    __device__ mma_search(const nearest_storage<Policy>& storage, const matrix_ref<const X>& x,
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

    /// A group's lane's part of one slab: 8 columns of each of its rows.
    using row_share = float[each][8];

    /// The columns of x, zeros beyond the last. Beyond the last row, that one again: nobody looks at what comes of it.
    __device__ void load(int slab, row_share& v) const {
        const int first = 64 * slab + 8 * group_lane;
        const auto row = [&](int i) {
            const std::int64_t r = group + i * shape::groups;
            return rows.row(r < rows.rows ? r : rows.rows - 1) + first;
        };
        if (slab < whole) {  // one branch for all loads, so that they overlap
#pragma unroll
            for (int i = 0; i < each; ++i) {
                const float4 low = load4(row(i)), high = load4(row(i) + 4);
                v[i][0] = low.x, v[i][1] = low.y, v[i][2] = low.z, v[i][3] = low.w;
                v[i][4] = high.x, v[i][5] = high.y, v[i][6] = high.z, v[i][7] = high.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < each; ++i)
#pragma unroll
                for (int e = 0; e < 8; ++e) v[i][e] = first + e < columns ? static_cast<float>(row(i)[e]) : 0.0f;
        }
    }
    /// Makes scale (x - centre) of them, with one rounding: the scale is a power of two, and these multiply-adds keep
    /// subnormal numbers whatever the compiler's flags.
    __device__ void centre(int slab, float scale, row_share& v) const {
        const int first = 64 * slab + 8 * group_lane;
        float c[8];
        if (first + 8 <= columns) {
            const float4 low = load4(image.centre + first), high = load4(image.centre + first + 4);
            c[0] = low.x, c[1] = low.y, c[2] = low.z, c[3] = low.w;
            c[4] = high.x, c[5] = high.y, c[6] = high.z, c[7] = high.w;
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e) c[e] = first + e < columns ? image.centre[first + e] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < each; ++i)
#pragma unroll
            for (int e = 0; e < 8; ++e) v[i][e] = __fmaf_ieee_rn(__fmaf_ieee_rn(-1.0f, c[e], v[i][e]), scale, 0.0f);
    }
    /// Writes centred columns to buffer `to` in fp16, times the rows' factors, and the factors themselves in the three
    /// columns behind the data. Adds the squares of what rounding leaves to `residual`, or does that alone.
    template <bool MeasureOnly>
    __device__ void store(int slab, const float (&factor)[each], const row_share& v, int to,
                          float (&residual)[each]) const {
        const int first = 64 * slab + 8 * group_lane, width = image.layout.width(slab);
        const bool inside = 8 * group_lane < width;
        static_assert(shape::groups % 8 == 0, "so that a lane's rows are swizzled alike");
        char* to_first = memory + shape::rows + to * shape::row_slab_bytes +
                         arch::slab_layout::chunk_offset(width, group, inside ? group_lane : 0);
#pragma unroll
        for (int i = 0; i < each; ++i) {
            alignas(16) __half2 out[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float2 u{factor[i] * v[i][2 * e], factor[i] * v[i][2 * e + 1]};
                out[e] = __floats2half2_rn(u.x, u.y);
                const float2 back = __half22float2(out[e]);
                residual[i] = fmaf(u.x - back.x, u.x - back.x, fmaf(u.y - back.y, u.y - back.y, residual[i]));
            }
            if (MeasureOnly) continue;
            if (first + 8 > columns) {
                __half* half = reinterpret_cast<__half*>(out);
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const int beyond = first + e - columns;
                    if (beyond >= 0) half[e] = __float2half_rn(beyond < 3 ? factor[i] : 0.0f);
                }
            }
            if (inside)
                *reinterpret_cast<uint4*>(to_first + i * shape::groups * 2 * width) = *reinterpret_cast<uint4*>(out);
        }
    }

    /// Measures all rows: errors and factors; writes the operand too, if it is to stay.
    __device__ void convert_rows(float (&factor)[each]) const {
        const auto* b = reinterpret_cast<const float*>(words());
        const score_bounds bounds{b[0], b[1], b[2], b[3]};
        const float scale = *image.scale;
        const auto sum_over_group = [](float v) {
#pragma unroll
            for (int step = 1; step < exact_lanes; step *= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, step);
            return v;
        };
        float square[each] = {}, residual[each] = {};
        bool fits = true;
#pragma unroll
        for (int i = 0; i < each; ++i) factor[i] = 1.0f;
        const auto convert = [&](int slab, row_share& v) {
            centre(slab, scale, v);
#pragma unroll
            for (int i = 0; i < each; ++i)
#pragma unroll
                for (int e = 0; e < 8; ++e) square[i] = fmaf(v[i][e], v[i][e], square[i]);
            store<Policy::streamed>(slab, factor, v, slab, residual);
        };
        row_share even, odd;  // one is on its way while the other is converted
        load(0, even);
        for (int slab = 0; slab < slabs; slab += 2) {
            if (slab + 1 < slabs) load(slab + 1, odd);
            convert(slab, even);
            if (slab + 2 < slabs) load(slab + 2, even);
            if (slab + 1 < slabs) convert(slab + 1, odd);
        }
#pragma unroll
        for (int i = 0; i < each; ++i) {
            square[i] = sum_over_group(square[i]);
            factor[i] = row_factor(square[i]);
            fits = fits && factor[i] == 1.0f;
        }
        if (!__all_sync(0xFFFFFFFFu, fits)) {  // rarely: once more, with the right factors
#pragma unroll
            for (int i = 0; i < each; ++i) residual[i] = 0;
            for (int slab = 0; slab < slabs; ++slab) {
                row_share v;
                load(slab, v);
                centre(slab, scale, v);
                store<Policy::streamed>(slab, factor, v, slab, residual);
            }
        }
#pragma unroll
        for (int i = 0; i < each; ++i) {
            // 1.0005 and 1e-16 cover the rounding and the underflow of the sums of squares; 2^-23 that of x - centre.
            const float length = 1.0005f * factor[i] * sqrtf(square[i]) + 1e-16f;
            const float rest = 1.0005f * sqrtf(sum_over_group(residual[i])) + 1e-16f + 0x1p-23f * length;
            const int steps = 4 * (slabs - 1) + image.layout.width(slabs - 1) / 16;
            const float error = score_error(length, rest, factor[i], bounds, steps);
            if (group_lane == 0)
                errors()[group + i * shape::groups] = factor[i] > 0 ? error : __int_as_float(0x7FC00000);
        }
    }

    /// Tiles of codes, and of the image.
    __device__ int tiles() const { return static_cast<int>((codebook.rows - 1) / Policy::codes + 1); }
    __device__ int image_tiles() const { return static_cast<int>(image_ref::tiles(codebook.rows)); }

    /// Walks the slabs of all tiles of codes, copying one at a time into the ring.
    struct loader {
        const char* tile_rows;  // of this thread's first 16 bytes, as the next two
        const char* from;
        const std::uint32_t ring;
        const std::int64_t part_rows;  // bytes from one tile of the image to the next
        int left;                      // tiles of the image
        int slab = 0, stage = 0;

        __device__ explicit loader(const mma_search& s)
            : tile_rows(s.image.rows + 16 * static_cast<int>(threadIdx.x)),
              from(tile_rows),
              ring(arch::shared_window(s.memory + shape::codes) + 16 * static_cast<int>(threadIdx.x)),
              part_rows(image_tile * s.image.layout.row_bytes()),
              left(s.image_tiles()) {}

        __device__ void next(const mma_search& s) {
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
        // The compiler must not know the mask: else clearing and tagging are two instructions.
        const int mask = *static_cast<volatile int*>(words() + shape::tag_mask);
        row_leaders leaders[2 * shape::row_tiles];  // of rows 8 r + lane / 4
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
                if (width == 64)
                    arch::mma_slab<64>(score, x, c);
                else if (width == 32)
                    arch::mma_slab<32>(score, x, c);
                else
                    arch::mma_slab<16>(score, x, c);
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
                int s[2 * shape::pairs];
#pragma unroll
                for (int j = 0; j < 2 * shape::pairs; ++j) {
                    // The score's bits with its place in the thread in the low ones: (bits & mask) | place.
                    const int bits = __float_as_int(score[r / 2][j / 2][r % 2 * 2 + j % 2]);
                    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(s[j]) : "r"(bits), "r"(mask), "r"(j));
                }
                int top = max(s[0], s[1]);
#pragma unroll
                for (int j = 2; j < 2 * shape::pairs; j += 2) top = __vimax3_s32(top, s[j], s[j + 1]);
                // The second largest: as unsigned, s - top is 0 for the largest and wraps to the larger, the closer.
                const unsigned from_top = 0u - static_cast<unsigned>(top);
                unsigned near[2] = {0, 0};
#pragma unroll
                for (int j = 0; j < 2 * shape::pairs; ++j)
                    near[j % 2] = __viaddmax_u32(static_cast<unsigned>(s[j]), from_top, near[j % 2]);
                leaders[r].offer(top, static_cast<int>(max(near[0], near[1]) + static_cast<unsigned>(top)), tile);
            }
        }
        arch::copy_wait<0>();
        __syncthreads();
        auto* slots = reinterpret_cast<typename shape::slot*>(memory + shape::slots_at);
        const int slot = warp / shape::warps_down * 4 + lane % 4;
#pragma unroll
        for (int r = 0; r < 2 * shape::row_tiles; ++r) {
            const row_leaders& l = leaders[r];
            slots[(warp_row + 8 * r + lane / 4) * shape::slots + slot] = {
                l.best, code_at(slot, l.best_tile, l.best), l.next, code_at(slot, l.next_tile, l.next), l.rest};
        }
        __syncthreads();
    }

    /// The code that thread `slot` of a row holds of `tile` at this place, the low bits of a score.
    __device__ static int code_at(int slot, int tile, int place) {
        const int at = place & (2 * shape::pairs - 1);
        return tile * Policy::codes + slot / 4 * shape::warp_codes + at / 2 * 8 + slot % 4 * 2 + at % 2;
    }

    /// Every row's code from its slots. Rows with candidates that the slots do not know are listed as hard.
    __device__ void settle_rows(std::int64_t* codes) const {
        const auto* all_slots = reinterpret_cast<const typename shape::slot*>(memory + shape::slots_at);
        auto* candidates = reinterpret_cast<typename shape::candidate*>(memory + shape::candidates_at);
        int* open = reinterpret_cast<int*>(memory + shape::open);
        int* hard = reinterpret_cast<int*>(memory + shape::hard);
        int* hard_count = words() + shape::hard_count;
        int* candidate_count = words() + shape::candidate_count;
        const unsigned first_lane = static_cast<unsigned>(lane) & 24u, mask = 0xFFu << first_lane;
        constexpr int per_lane = shape::slots / exact_lanes;
        for (int r = group; r < rows.rows; r += shape::groups) {
            typename shape::slot mine[per_lane];
            int best = row_leaders::least;
#pragma unroll
            for (int i = 0; i < per_lane; ++i) {
                mine[i] = all_slots[r * shape::slots + i * exact_lanes + group_lane];
                best = max(best, mine[i].best);
            }
#pragma unroll
            for (int step = 1; step < exact_lanes; step *= 2) best = max(best, __shfl_xor_sync(mask, best, step));
            // A tag moved the two scores by up to 32 units in the last place each.
            const float score = __int_as_float(best);
            const float limit = score - 2.0002f * errors()[r] - 0x1.2p-17f * score;
            const bool decided = limit > 0.0f;  // else integers do not order scores; false for NaN too
            const int least = decided ? __float_as_int(limit) : 1;

            unsigned firsts[per_lane], seconds[per_lane], slots = 0;
            int count = 0;
            bool missed = false;
#pragma unroll
            for (int i = 0; i < per_lane; ++i) {
                firsts[i] = __ballot_sync(mask, mine[i].best >= least);
                seconds[i] = __ballot_sync(mask, mine[i].next >= least);
                count += __popc(firsts[i]) + __popc(seconds[i]);
                slots |= firsts[i] >> first_lane << (i * exact_lanes);
                missed = missed || mine[i].rest >= least;
            }
            missed = __any_sync(mask, missed);
            bool listed = decided && !missed;
            int at = 0;
            if (listed && count > 1) {
                if (group_lane == 0) at = atomicAdd(candidate_count, count);
                at = __shfl_sync(mask, at, static_cast<int>(first_lane));
                listed = at + count <= shape::most_candidates;
                if (!listed)  // what of its places there is stays empty
                    for (int i = at + group_lane; i < min(at + count, shape::most_candidates); i += exact_lanes)
                        candidates[i].code = -1;
            }
            if (group_lane == 0) {
                open[r] = listed && count > 1 ? at << 8 | count : 0;
                if (!listed) hard[atomicAdd(hard_count, 1)] = r | (decided ? slots << 8 : 0u);
            }
            if (!listed) continue;
            const auto list = [&](unsigned among, int code) {
                if (among >> lane & 1u) {
                    if (count == 1)
                        codes[r] = code;
                    else
                        candidates[at + __popc(among & ((1u << lane) - 1))] = {0, r, code};
                }
                at += __popc(among);
            };
#pragma unroll
            for (int i = 0; i < per_lane; ++i) {
                list(firsts[i], mine[i].best_code);
                list(seconds[i], mine[i].next_code);
            }
        }
        __syncthreads();
        // The candidates of all rows, shared out evenly.
        const int listed = min(*candidate_count, shape::most_candidates);
        for (int i = group; i < listed; i += shape::groups) {
            typename shape::candidate& c = candidates[i];
            if (c.code < 0) continue;
            const double distance = exact_distance(rows.row(c.row), codebook.row(c.code), columns);
            if (group_lane == 0) c.distance = distance;
        }
        __syncthreads();
        if (threadIdx.x < rows.rows && open[threadIdx.x] != 0) {
            const int first = open[threadIdx.x] >> 8, count = open[threadIdx.x] & 255;
            exact_choice choice;
            for (int i = first; i < first + count; ++i) choice.consider(candidates[i].distance, candidates[i].code);
            codes[threadIdx.x] = choice.code;
        }
        __syncthreads();
    }

    /// The hard rows, each by the whole block.
    __device__ void settle_hard_rows(std::int64_t* codes) const {
        const int* hard = reinterpret_cast<const int*>(memory + shape::hard);
        auto* choices = reinterpret_cast<exact_choice*>(memory + shape::choices);
        const int count = words()[shape::hard_count];
        constexpr int in_tile = 2 * shape::pairs;  // codes of one slot
        for (int h = 0; h < count; ++h) {
            const int r = hard[h] & 255;
            unsigned open = static_cast<unsigned>(hard[h]) >> 8;  // slots with candidates; 0: the whole codebook
            const X* row = rows.row(r);
            exact_choice choice;
            if (open == 0) {
                bool finite = true;
                for (int d = threadIdx.x; d < columns; d += Policy::threads)
                    finite = finite && isfinite(static_cast<float>(row[d]));
                if (__syncthreads_and(finite))
                    consider_codes(choice, row, codebook, columns, codebook.rows, group, shape::groups,
                                   [](std::int64_t k) { return k; });
            }
            for (; open != 0; open &= open - 1) {
                const int slot = __ffs(open) - 1;
                const auto at = [&](std::int64_t i) {  // beyond K: another look at the last code
                    const std::int64_t k = code_at(slot, static_cast<int>(i / in_tile), static_cast<int>(i % in_tile));
                    return k < codebook.rows ? k : codebook.rows - 1;
                };
                consider_codes(choice, row, codebook, columns, std::int64_t{tiles()} * in_tile, group, shape::groups,
                               at);
            }
            __syncwarp();
            choice.merge(0xFFFFFFFFu, 8);
            choice.merge(0xFFFFFFFFu, 16);
            if (lane == 0) choices[warp] = choice;
            __syncthreads();
            if (threadIdx.x == 0) {
                for (int w = 1; w < shape::warps; ++w)
                    if (choices[w].code >= 0) choice.consider(choices[w].distance, choices[w].code);
                codes[r] = choice.code;
            }
            __syncthreads();
        }
    }
};

#endif  // CUVQ_HAS_MMA

/// As `nearest` above, on the tensor cores: exact too, and many times as fast. From sm_80 on; compiled for older
/// architectures it does nothing.
///
/// @tparam Policy  an `mma_tile`, from `dispatch/tuning.cuh` or with your own sizes. The block has Policy::threads
///                 threads in x.
/// @param storage  shared memory of the caller, usually dynamic: it must not be in use; free again after a barrier.
/// @param rows     [n x D] vectors, n <= Policy::rows, in shared or global memory, written before the last barrier;
///                 float, __half or __nv_bfloat16; D <= most_mma_columns.
/// @param codebook [K x D] global memory; any of those types; K < most_mma_codes.
/// @param image    of that codebook, as it is now: any centre and scale will do.
/// @param codes    [n] out, in shared or global memory: lowest nearest code, -1 where the vector has a NaN or Inf or
///                 no codebook row is finite. Readable by all threads of the block on return.
/// Deterministic: the codes do not depend on Policy, n, the block or the image. O(n K D) per block, plus O(K D) in
/// float64 for each row that the filter cannot settle.
template <class Policy, class X, class C>
__device__ void nearest(const nearest_storage<Policy>& storage, const matrix_ref<const X>& rows,
                        const matrix_ref<const C>& codebook, const image_ref& image, std::int64_t* codes) {
#if CUVQ_HAS_MMA
    if (rows.rows == 0) return;
    using shape = mma_shape<Policy>;
    const mma_search<Policy, X, C> search(storage, rows, codebook, image);
    int* words = search.words();
    __syncthreads();
    if (threadIdx.x < 8) words[threadIdx.x] = threadIdx.x == shape::tag_mask ? ~(2 * shape::pairs - 1) : 0;
    __syncthreads();
    score_bounds most;
    for (std::int64_t i = threadIdx.x; i < image_ref::parts(codebook.rows); i += Policy::threads) {
        const score_bounds b = image.bounds[i];
        // Floats that are not negative order as integers do, Inf and NaN above all others.
        const auto raise = [](float& to, float v) { to = __int_as_float(max(__float_as_int(to), __float_as_int(v))); };
        raise(most.norm, b.norm);
        raise(most.residual, b.residual);
        raise(most.offset, b.offset);
        raise(most.offset_rest, b.offset_rest);
    }
    const float values[4] = {most.norm, most.residual, most.offset, most.offset_rest};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned largest = __reduce_max_sync(0xFFFFFFFFu, __float_as_uint(values[i]));
        if (threadIdx.x % 32 == 0) atomicMax(words + i, static_cast<int>(largest));
    }
    __syncthreads();
    search.search();
    search.settle_rows(codes);
    search.settle_hard_rows(codes);
#endif
}

}  // namespace cuvq::device
