// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The launches of an `accumulate`: sort rows by code, sum runs, merge what spans runs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>
#include <cub/device/device_radix_sort.cuh>

#include <cuvq/detail/launch.cuh>
#include <cuvq/detail/validate.hpp>
#include <cuvq/dispatch/tuning.cuh>
#include <cuvq/kernel/accumulate.cuh>
#include <cuvq/workspace.hpp>

namespace cuvq::dispatch {

/// Rows sorted at a time. A larger batch is added up slice by slice, so that row numbers fit 32 bits.
inline constexpr std::int64_t most_slice_rows = std::int64_t{1} << 30;

/// Codes that `accumulate` and what builds on it can serve: K itself is a sort key too.
inline constexpr std::int64_t most_codes = (std::int64_t{1} << 32) - 2;

inline void check_codes(const char* function, const char* argument, std::int64_t codes) {
    if (codes > most_codes)
        detail::bad_argument(function, argument, detail::text(codes) + " rows", "at most 2^32 - 2 codes");
}

struct accumulate_scratch {
    std::int64_t slice = 0;                      // rows sorted at a time
    std::int64_t run = 0;                        // rows of a partial sum
    std::uint32_t *keys[2] = {}, *rows[2] = {};  // [slice] each
    double* partial_sums = nullptr;              // [runs][2][D]
    double* partial_counts = nullptr;            // [runs][2]
    void* sort = nullptr;                        // [sort_bytes]
    std::size_t sort_bytes = 0;

    accumulate_scratch(detail::carver& c, const shape& s)
        : slice(std::min(s.vectors, most_slice_rows)), run(sum_tile::rows(s.dimensions)) {
        const std::int64_t runs = (slice + run - 1) / run;
        for (int i = 0; i < 2; ++i) {
            keys[i] = c.take<std::uint32_t>(slice);
            rows[i] = c.take<std::uint32_t>(slice);
        }
        partial_sums = c.take<double>(runs * 2 * s.dimensions);
        partial_counts = c.take<double>(runs * 2);
        // What CUB asks for depends on the device; this covers its one-sweep sort (a histogram of 256 bins for every
        // tile of at least 2048 pairs, and a few kilobytes) without asking. Were it ever too little, `sort_rows`
        // allocates.
        sort_bytes = slice > 0 ? static_cast<std::size_t>(slice / 2 + 65536) : 0;
        sort = c.take<char>(static_cast<std::int64_t>(sort_bytes));
    }
};

/// Sorts (keys[0], rows[0]) by key, stable; returns which of the two buffers hold the result.
inline int sort_rows(const accumulate_scratch& m, std::int64_t count, std::int64_t codes, cudaStream_t stream) {
    int bits = 1;
    while (bits < 32 && (codes >> bits) != 0) ++bits;
    cub::DoubleBuffer<std::uint32_t> keys(m.keys[0], m.keys[1]), rows(m.rows[0], m.rows[1]);
    std::size_t bytes = 0;
    const int n = static_cast<int>(count);
    CUVQ_CHECK_CUDA(cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys, rows, n, 0, bits, stream));
    const bool fits = bytes <= m.sort_bytes;
    const detail::scratch extra("accumulate", {}, fits ? 0 : bytes, stream);
    CUVQ_CHECK_CUDA(
        cub::DeviceRadixSort::SortPairs(fits ? m.sort : extra.data(), bytes, keys, rows, n, 0, bits, stream));
    return keys.selector;
}

/// What the search that made the codes knows of them.
struct provenance {
    bool trusted = false;                 // x was found finite wherever there is a code
    vector_ref<const float> distances{};  // NaN for a row without a code, where the codes cannot say so; or null
};

/// @param invalid_rows  [1] gets the rows left out added, or null.
template <class X>
void accumulate(const detail::accumulate_args<X>& a, bool add, const provenance& from, const accumulate_scratch& m,
                unsigned long long* invalid_rows, cudaStream_t stream) {
    constexpr std::int64_t most = 1 << 20;
    const std::int64_t columns = a.x.columns, codes = a.sums.rows;
    const std::int64_t slices = (columns - 1) / sum_tile::columns + 1;
    std::int64_t first = 0;
    do {  // once at least: an empty batch still writes counts and sums
        const std::int64_t count = std::min(m.slice, a.x.rows - first);
        kernel::sorted_rows s{m.keys[0], m.rows[0], count, first, m.run, m.partial_sums, m.partial_counts};
        const bool onto = add || first > 0;
        if (count > 0) {
            detail::launch(kernel::sort_keys<X>, detail::blocks_for(count, 8, most), 256, stream, 0, a.x, a.codes,
                           a.weights, from.distances, codes, from.trusted, first, count, m.keys[0], m.rows[0]);
            const int sorted = sort_rows(m, count, codes, stream);
            s.keys = m.keys[sorted];
            s.rows = m.rows[sorted];
            const std::int64_t work = ((count - 1) / m.run + 1) * slices;
            detail::launch(kernel::sum_runs<sum_tile, X>, detail::blocks_for(work, sum_tile::threads / 32, most),
                           sum_tile::threads, stream, 0, a, s, onto);
        }
        detail::launch(kernel::merge_runs<sum_tile, X>, detail::blocks_for(codes * slices, 1, most), sum_tile::threads,
                       stream, 0, a, s, onto, invalid_rows);
        first += count;
    } while (first < a.x.rows);
}

}  // namespace cuvq::dispatch
