// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Rows that a search has listed because many codes may be the nearest, settled by all blocks of a card.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <cub/block/block_scan.cuh>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/certificate.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// A row that several blocks settle together, each some of its codes; the last one to be done decides. None is in use
/// when a search starts.
struct shared_row {
    static constexpr int most_parts = 64;
    double distance[most_parts];
    std::int64_t code[most_parts];
    unsigned done;
};
inline constexpr int most_shared_rows = 64;

/// In how many parts blocks look through a whole codebook together for one row.
CUVQ_HOST_DEVICE constexpr int shared_parts(std::int64_t codes, std::int64_t dimensions) {
    const std::int64_t elements = codes * dimensions, parts = (elements - 1) / (1 << 14) + 1;
    return elements <= 1 << 16 ? 1 : static_cast<int>(parts < shared_row::most_parts ? parts : shared_row::most_parts);
}

inline constexpr int settle_threads = 256, settle_blocks = 2;  // of a multiprocessor
inline constexpr int most_segments = 1024;                     // of the lists of such rows

#if CUVQ_HAS_MMA

/// Where the rows of each segment of a list begin among those of all. Shared memory.
struct segment_starts {
    using scan = cub::BlockScan<std::int64_t, settle_threads>;
    typename scan::TempStorage storage;
    std::int64_t starts[most_segments];

    /// From their numbers: segment s, below `segments`, has count_of(s). Returns the number of all. Whole block.
    template <class CountOf>
    __device__ std::int64_t set(int segments, const CountOf& count_of) {
        constexpr int each = most_segments / settle_threads;
        std::int64_t count[each], total;
#pragma unroll
        for (int i = 0; i < each; ++i) {
            const int segment = static_cast<int>(threadIdx.x) * each + i;
            count[i] = segment < segments ? count_of(segment) : 0;
        }
        __syncthreads();
        scan(storage).ExclusiveSum(count, count, total);
#pragma unroll
        for (int i = 0; i < each; ++i) starts[static_cast<int>(threadIdx.x) * each + i] = count[i];
        __syncthreads();
        return total;
    }
    /// Where row number `number` stands: in which segment, after how many of its rows.
    struct place {
        int segment, before;
    };
    __device__ place find(std::int64_t number) const {
        int low = 0, high = most_segments;  // of the segments that start at `number` or before, the last
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (starts[middle] <= number ? low : high) = middle;
        }
        return {low, static_cast<int>(number - starts[low])};
    }
};

/// Codes of `total` listed rows, by a block each, the last blocks first, or if they are few, by several. Whole block of
/// settle_threads.
/// @param shared   [most_shared_rows] if the codebook has `shared_parts`.
/// @param find     (number) -> what is known of a listed row, `row` among it.
/// @param consider (choice, that, part, parts): each lane considers its share of the part's candidates.
template <class X, class C, class Find, class Consider>
__device__ void settle_spread(const detail::quantize_args<X, C>& a, const search_tally& tally, std::int64_t total,
                              shared_row* shared, const Find& find, const Consider& consider) {
    constexpr int warps = settle_threads / 32;
    using device::exact_choice;
    __shared__ alignas(exact_choice) char room[warps * sizeof(exact_choice)];
    auto* choices = reinterpret_cast<exact_choice*>(room);
    __shared__ bool decides;
    const int parts = total > most_shared_rows ? 1 : shared_parts(a.codebook.rows, a.codebook.columns);
    for (std::int64_t i = gridDim.x - 1 - blockIdx.x; i < total * parts; i += gridDim.x) {
        const int part = static_cast<int>(i % parts);
        const auto found = find(i / parts);
        exact_choice choice;
        consider(choice, found, part, parts);
        device::merge_block<warps>(choice, choices);
        __syncthreads();
        if (parts > 1) {
            shared_row& with_others = shared[i / parts];
            if (threadIdx.x == 0) {
                with_others.distance[part] = choice.distance;
                with_others.code[part] = choice.code;
                __threadfence();
                decides = atomicAdd(&with_others.done, 1u) == static_cast<unsigned>(parts - 1);
                __threadfence();
            }
            __syncthreads();
            if (!decides) continue;
            choice = {};
            if (threadIdx.x < parts) {
                choice.distance = __ldcg(with_others.distance + threadIdx.x);
                choice.code = __ldcg(reinterpret_cast<const long long*>(with_others.code) + threadIdx.x);
            }
            device::merge_block<warps>(choice, choices);
            __syncthreads();
        }
        if (threadIdx.x == 0) write_code(a, tally, found.row, choice.code, tally.digits.of(found.row));
    }
}

#endif  // CUVQ_HAS_MMA

}  // namespace cuvq::kernel
