// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The search on tensor cores of any architecture. For few rows it is two kernels: blocks search the rows in parts of
// the codebook, and a second one takes the nearest of what they found. Of more rows, the blocks search the whole
// codebook, and a second kernel settles the rows that many codes are near.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/device/nearest_mma.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/kernel/shared_rows.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// The parts into which the codebook is cut, and what blocks find in each for every row; one part: nothing is kept.
struct codebook_parts {
    std::int64_t count = 1;
    std::int64_t tiles = 0;       // of the image, of each part but the last
    double* distances = nullptr;  // [count][N] exact, where there is a code
    int* codes = nullptr;         // [count][N] nearest of the part, -1 if it has none
};

/// The hard rows of a search, listed by each block in those places that are the numbers of its rows: the row's number
/// in all but the low bits, which tell its slots with candidates.
struct hard_rows {
    static constexpr int slot_bits = 2 * device::exact_lanes;
    unsigned long long* rows = nullptr;  // [N]; null: each block settles its own
    int* counts = nullptr;               // [blocks]
    shared_row* shared = nullptr;        // [most_shared_rows], if the codebook has `shared_parts`

    /// Place `i` of block `block` of `blocks`, which takes every so many-th `tile` rows.
    __device__ static std::int64_t place(int i, std::int64_t block, std::int64_t blocks, int tile) {
        return (block + i / tile * blocks) * tile + i % tile;
    }
};

/// As `quantize`, on tensor cores: sm_80 and later. Takes the tile's nearest_storage as dynamic shared memory. With
/// several parts it writes these only, for `choose_part`; where it lists hard rows, codes of the others; else all.
template <class Policy, class X, class C>
__global__ __launch_bounds__(device::has_tensor_cores<Policy> ? Policy::threads : 32,
                             Policy::blocks) void quantize_mma(const __grid_constant__ detail::quantize_args<X, C> a,
                                                               const __grid_constant__ device::image_ref image,
                                                               const __grid_constant__ search_tally tally,
                                                               const __grid_constant__ codebook_parts parts,
                                                               const __grid_constant__ hard_rows hard) {
#if CUVQ_HAS_MMA
    if constexpr (!device::has_tensor_cores<Policy>) return;
    extern __shared__ __align__(128) char dynamic_shared[];
    __shared__ std::int64_t codes[Policy::rows];
    constexpr unsigned alignment = device::mma_shape<Policy>::alignment;
    const unsigned misaligned = alignment > 128 ? arch::shared_window(dynamic_shared) % alignment : 0;
    const device::nearest_storage<Policy> storage{dynamic_shared + (misaligned ? alignment - misaligned : 0)};
    if (blockIdx.x == 0 && hard.shared)
        for (int i = threadIdx.x; i < most_shared_rows; i += Policy::threads) hard.shared[i].done = 0;
    double loss = 0;
    int listed = 0;
    const std::int64_t groups = (a.x.rows - 1) / Policy::rows + 1;
    for (std::int64_t turn = blockIdx.x; turn < groups * parts.count; turn += gridDim.x) {
        const std::int64_t first = turn / parts.count * Policy::rows, part = turn % parts.count;
        const std::int64_t left = a.x.rows - first;
        const matrix_ref<const X> rows{a.x.row(first), left < Policy::rows ? left : Policy::rows, a.x.columns,
                                       a.x.stride};
        const std::int64_t first_code = part * parts.tiles * device::image_tile;
        const std::int64_t part_codes =
            part + 1 < parts.count ? parts.tiles * device::image_tile : a.codebook.rows - first_code;
        const matrix_ref<const C> codebook{a.codebook.row(first_code), part_codes, a.codebook.columns,
                                           a.codebook.stride};
        const device::image_ref own_image = image.from_tile(part * parts.tiles);
        const auto settling = device::nearest_but_hard<Policy>(storage, rows, codebook, own_image, codes);
        if (hard.rows) {
            const int count = settling.hard_count();
            if (static_cast<int>(threadIdx.x) < count) {
                const auto [row, slots] = settling.hard(static_cast<int>(threadIdx.x));
                hard.rows[hard.place(listed + static_cast<int>(threadIdx.x), blockIdx.x, gridDim.x, Policy::rows)] =
                    static_cast<unsigned long long>(first + row) << hard.slot_bits | slots;
                codes[row] = row_left_open;
            }
            listed += count;
            __syncthreads();
        } else {
            settling.settle_hard_rows(codes);
        }
        if (parts.count == 1) {
            write_tile<Policy::threads, Policy::rows>(a, tally, first, 1, rows.rows, codes, loss);
        } else {
            constexpr int groups_of_lanes = Policy::threads / device::exact_lanes;
            for (int r = threadIdx.x / device::exact_lanes; r < rows.rows; r += groups_of_lanes) {
                const std::int64_t k = codes[r], at = part * a.x.rows + first + r;
                const double distance = k < 0 ? 0.0 : device::exact_distance(rows.row(r), codebook.row(k), a.x.columns);
                if (threadIdx.x % device::exact_lanes == 0) {
                    parts.distances[at] = distance;
                    parts.codes[at] = static_cast<int>(k < 0 ? -1 : first_code + k);
                }
            }
        }
        __syncthreads();  // codes are rewritten for the next tile
    }
    if (hard.rows && threadIdx.x == 0) hard.counts[blockIdx.x] = listed;
    if (tally.loss && parts.count == 1)
        write_loss(tally.loss + (std::int64_t{blockIdx.x} * Policy::threads + threadIdx.x) / 32, loss);
#endif
}

/// Codes of the hard rows that a search of `blocks` blocks, of `tile` rows at a time each, has listed.
template <class X, class C>
__global__ __launch_bounds__(settle_threads,
                             settle_blocks) void settle_hard_rows(const __grid_constant__ detail::quantize_args<X, C> a,
                                                                  const __grid_constant__ search_tally tally,
                                                                  const __grid_constant__ hard_rows hard,
                                                                  device::slot_layout layout, int blocks, int tile) {
#if CUVQ_HAS_MMA
    __shared__ segment_starts starts;
    struct listed_row {
        std::int64_t row;
        unsigned slots;
    };
    arch::let_successor_start();
    arch::wait_for_predecessor();
    bool any = false;
    for (int block = static_cast<int>(threadIdx.x); block < blocks; block += settle_threads)
        any = any || hard.counts[block] > 0;
    if (!__syncthreads_or(any)) return;  // as mostly
    const std::int64_t total = starts.set(blocks, [&](int block) { return hard.counts[block]; });
    const auto find = [&](std::int64_t number) {
        const auto [block, before] = starts.find(number);
        const unsigned long long listed = hard.rows[hard.place(before, block, blocks, tile)];
        return listed_row{static_cast<std::int64_t>(listed >> hard.slot_bits),
                          static_cast<unsigned>(listed & ((1u << hard.slot_bits) - 1))};
    };
    settle_spread(a, tally, total, hard.shared, find,
                  [&](device::exact_choice& choice, const listed_row& found, int part, int parts) {
                      device::consider_slots(choice, a.x.row(found.row), a.codebook, a.x.columns, found.slots, layout,
                                             static_cast<int>(threadIdx.x) / device::exact_lanes,
                                             settle_threads / device::exact_lanes, part, parts);
                  });
#endif
}

/// Rows that a warp of `choose_part` looks at together.
inline constexpr int choose_rows = 8;

/// All outputs, from what was found in the parts. Leaves a partial loss per warp.
template <class X, class C>
__global__ __launch_bounds__(outputs_threads) void choose_part(const __grid_constant__ detail::quantize_args<X, C> a,
                                                               const __grid_constant__ search_tally tally,
                                                               const __grid_constant__ codebook_parts parts) {
    arch::wait_for_predecessor();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t warp = (std::int64_t{blockIdx.x} * outputs_threads + threadIdx.x) / 32;
    constexpr int rows = choose_rows, shares = 32 / rows;  // lane: row lane % rows, and one of the shares of the parts
    double loss = 0;
    for (std::int64_t first = warp * rows; first < a.x.rows;
         first += std::int64_t{gridDim.x} * (outputs_threads / 32) * rows) {
        const int count = static_cast<int>(min(a.x.rows - first, std::int64_t{rows}));
        device::exact_choice choice;
        if (lane % rows < count) {
#pragma unroll 4
            for (std::int64_t part = lane / rows; part < parts.count; part += shares) {
                const std::int64_t at = part * a.x.rows + first + lane % rows;
                const double distance = parts.distances[at];
                const int code = parts.codes[at];
                if (code >= 0) choice.consider(distance, code);
            }
        }
        __syncwarp();
#pragma unroll
        for (int step = rows; step < 32; step *= 2) choice.merge(0xFFFFFFFFu, step);
        if (lane < count) write_code(a, tally, first + lane, choice.code);
        if (wants_rows(a, tally)) write_rows(a, tally, first, 1, count, choice.code, loss);
    }
    if (tally.loss) write_loss(tally.loss + warp, loss);
}

}  // namespace cuvq::kernel
