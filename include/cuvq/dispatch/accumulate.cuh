// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The launches of an `accumulate`: sort rows by code (three for each digit, but for one that a search has counted), sum
// runs, merge what spans runs; or just one for a small batch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/arguments.hpp>
#include <cuvq/detail/launch.cuh>
#include <cuvq/dispatch/tuning.cuh>
#include <cuvq/kernel/accumulate.cuh>
#include <cuvq/kernel/gather.cuh>
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

/// How the rows of a slice are sorted: passes over digits of the code, from the lowest.
struct sort_plan {
    using few_bins = kernel::sort_block<512>;
    using many_bins = kernel::sort_block<256>;

    int passes = 1, bits = 0;  // of a digit
    std::uint32_t bins = 0;    // of a pass, at most
    kernel::row_chunks cut{};  // a chunk for each block
    std::uint32_t chunks = 0;  // blocks
    bool has_few_bins = true;

    sort_plan(std::int64_t count, std::int64_t codes) {
        constexpr std::int64_t wanted_chunks = 256;
        int code_bits = 1;
        while (code_bits < 32 && (codes - 1) >> code_bits != 0) ++code_bits;
        while (codes > many_bins::most_bins && (code_bits + passes - 1) / passes > 11) ++passes;
        bits = (code_bits + passes - 1) / passes;
        bins = static_cast<std::uint32_t>(passes == 1 ? codes : std::int64_t{1} << bits);
        has_few_bins = bins <= few_bins::most_bins;
        const std::int64_t unit = has_few_bins ? few_bins::threads : 4 * many_bins::threads;
        const std::int64_t chunk =
            std::max<std::int64_t>(1, (count + wanted_chunks * unit - 1) / (wanted_chunks * unit)) * unit;
        cut.chunk = static_cast<std::uint32_t>(chunk / kernel::row_chunks::group_rows);
        cut.pair = 2 * cut.chunk;
        chunks = static_cast<std::uint32_t>(std::max<std::int64_t>(1, (count + chunk - 1) / chunk));
    }
    kernel::digit_pass pass(int i) const {
        kernel::digit_pass p;
        p.shift = i * bits;
        p.mask = passes == 1 ? 0xFFFFFFFFu : bins - 1;
        p.bins = bins;
        p.chunks = cut;
        return p;
    }
};

struct accumulate_scratch {
    std::int64_t slice = 0;              // rows sorted at a time
    std::int64_t run = 0;                // rows of a partial sum
    kernel::coded_row* rows[2] = {};     // [slice] each; the second where there are several passes, or rows to check
    std::uint32_t* histogram = nullptr;  // [chunks][bins], dead before the partial sums are written over it
    std::uint32_t* totals = nullptr;     // [bins]
    std::uint32_t* placed = nullptr;     // [2] rows that a pass has sorted
    std::uint32_t* last_run = nullptr;   // [K]
    double* partial_sums = nullptr;      // [runs][2][D]
    double* partial_counts = nullptr;    // [runs][2]

    /// `trusted`: see `provenance`.
    accumulate_scratch(detail::carver& c, const shape& s, bool trusted)
        : slice(std::min(s.vectors, most_slice_rows)), run(sum_tile::rows(slice, s.codes, s.dimensions)) {
        if (gather_shapes::include(s.vectors, s.codes, s.dimensions)) return;  // needs none
        const sort_plan plan(slice, s.codes);
        rows[0] = c.take<kernel::coded_row>(slice);
        if (plan.passes > 1 || (s.dimensions > sum_tile::columns && !trusted))
            rows[1] = c.take<kernel::coded_row>(slice);
        totals = c.take<std::uint32_t>(plan.bins);
        placed = c.take<std::uint32_t>(2);
        last_run = c.take<std::uint32_t>(s.codes);
        const std::int64_t runs = (slice + run - 1) / run;
        partial_counts = c.take<double>(runs * 2);
        const std::int64_t histogram_words = (std::int64_t{plan.chunks} * plan.bins + 1) / 2;
        partial_sums = c.take<double>(std::max(runs * 2 * s.dimensions, histogram_words));
        histogram = reinterpret_cast<std::uint32_t*>(partial_sums);
    }
};

/// What the search that made the codes knows of them.
struct provenance {
    bool trusted = false;                 // x was found finite wherever there is a code
    vector_ref<const float> distances{};  // NaN for a row without a code, where the codes cannot say so; or null
    kernel::digit_counts digits{};        // of the codes, if it has counted them
};

/// One pass of the sort. `counted`: its digits, if its rows have been counted already. `clears`: sets counts and sums
/// to zero on the way. `depends`: see detail::launch_next.
template <class Block>
void sort_pass(const kernel::row_source& source, kernel::digit_pass pass, std::uint32_t chunks,
               const kernel::digit_counts& counted, const accumulate_scratch& m, kernel::coded_row* to,
               std::uint32_t* placed, bool clears, const vector_ref<float>& counts, const matrix_ref<float>& sums,
               bool depends, cudaStream_t stream) {
    // Sums that are worth a block, as many as a narrow code counts for, and blocks.
    constexpr std::int64_t cleared = 1 << 14, least = 128, most = 256;
    std::uint32_t* histogram = m.histogram;
    if (counted.histogram) {
        histogram = counted.histogram;
        pass.chunks = counted.chunks;
        chunks = pass.chunks.number(source.count - 1) + 1;
    } else {
        detail::launch_next(depends, kernel::count_digits<Block>, chunks, Block::threads, stream,
                            Block::count_bytes(pass.bins), source, pass, histogram);
    }
    using scan = kernel::scan_tile;
    const std::uint32_t clearing =
        clears ? detail::blocks_for(sums.rows * std::max(sums.columns, least), cleared, most) : 0;
    detail::launch_next(depends, kernel::scan_histograms<scan>,
                        std::max((pass.bins + scan::bins - 1) / scan::bins, clearing), scan::bins * scan::warps, stream,
                        0, histogram, chunks, pass.bins, m.totals, clears, counts, sums);
    const auto place = kernel::place_rows<Block>;
    const bool gathers = Block::may_gather && depends &&
                         std::min<std::int64_t>(pass.chunks.rows(), Block::most_tile) >= 2 * std::int64_t{pass.bins};
    // What is allowed holds for all threads of the host: it must not depend on the call.
    if (gathers) detail::allow_shared_bytes(place, static_cast<int>(Block::place_bytes(Block::most_bins, true)));
    const std::size_t place_bytes = Block::place_bytes(pass.bins, gathers);
    detail::launch_next(depends, place, chunks, Block::threads, stream, place_bytes, source, pass, histogram, m.totals,
                        to, placed, gathers);
}

inline kernel::row_source rows_of(const const_codes_ref& codes, const vector_ref<const float>& weights,
                                  const provenance& from, std::int64_t code_count, std::int64_t first,
                                  std::int64_t count) {
    kernel::row_source source;
    source.first_row = first;
    source.count = count;
    source.codes = codes;
    source.weights = weights;
    source.distances = from.distances;
    source.code_count = code_count;
    return source;
}

/// The launch that sums a small batch, for either tile.
struct gather_plan {
    using in_clusters = gather_tile<gather_shapes::cluster>;
    using alone = gather_tile<1>;

    kernel::row_source source;
    bool vectors = false;  // also bounds the stride, see kernel::row_adder::sum_few
    bool checks = false;

    template <class X>
    gather_plan(const detail::accumulate_args<X>& a, const provenance& from)
        : source(rows_of(a.codes, a.weights, from, a.sums.rows, 0, a.x.rows)),
          vectors(kernel::has_vectors<alone::columns / 32>(a.x) && a.x.stride <= 0xFFFFFFFF),
          checks(a.x.columns > alone::columns && !from.trusted) {}

    /// Launches the kernel in clusters where the card has them, `extra` of which have no codes: `clustered` and
    /// `single` are it with either tile, and take the log2 of the codes of a block before the `arguments`. Returns the
    /// number of blocks.
    template <class... Parameters, class... Arguments>
    static unsigned launch(const matrix_ref<float>& sums, unsigned extra, void (*clustered)(Parameters...),
                           void (*single)(Parameters...), cudaStream_t stream, const Arguments&... arguments) {
        return detail::is_for_hopper(clustered) ? launch_tile<in_clusters>(sums, extra, clustered, stream, arguments...)
                                                : launch_tile<alone>(sums, extra, single, stream, arguments...);
    }
    template <class Tile, class... Parameters, class... Arguments>
    static unsigned launch_tile(const matrix_ref<float>& sums, unsigned extra, void (*gather)(Parameters...),
                                cudaStream_t stream, const Arguments&... arguments) {
        constexpr unsigned cluster = Tile::cluster;
        constexpr std::size_t bytes = sizeof(kernel::gather_storage<Tile>);
        const int bits = Tile::block_bits(sums.rows, sums.columns);
        unsigned clusters = 1;  // a power of two, so that a code's is easily told
        while (std::int64_t{clusters * cluster} << bits < sums.rows) clusters *= 2;
        const unsigned blocks = (clusters + extra) * cluster;
        detail::allow_shared_bytes(gather, static_cast<int>(bytes));
        if (cluster > 1)
            detail::launch_dependent(gather, blocks, Tile::threads, stream, bytes, cluster, bits, arguments...);
        else
            detail::launch(gather, blocks, Tile::threads, stream, bytes, bits, arguments...);
        return blocks;
    }
};

/// @param invalid_rows  [1] gets the rows left out added, or null.
template <class X>
void accumulate(const detail::accumulate_args<X>& a, bool add, const provenance& from, const accumulate_scratch& m,
                unsigned long long* invalid_rows, cudaStream_t stream) {
    if (gather_shapes::include(a.x.rows, a.sums.rows, a.x.columns)) {
        const gather_plan plan(a, from);
        plan.launch(a.sums, 0, kernel::gather<gather_plan::in_clusters, X>, kernel::gather<gather_plan::alone, X>,
                    stream, a, plan.source, plan.vectors, plan.checks, add, invalid_rows);
        return;
    }
    constexpr std::int64_t most = 1 << 20;
    constexpr int vector = sum_tile::columns / 32;
    const std::int64_t columns = a.x.columns, codes = a.sums.rows;
    const std::int64_t slices = (columns - 1) / sum_tile::columns + 1;
    const bool vectors = kernel::has_vectors<vector>(a.x);
    const auto sum = columns <= sum_tile::narrow_columns ? kernel::sum_runs<sum_tile, true, X>
                                                         : kernel::sum_runs<sum_tile, false, X>;
    const bool depends = detail::is_for_hopper(sum);
    std::int64_t first = 0;
    do {  // once at least: an empty batch still writes counts and sums
        const std::int64_t count = std::min(m.slice, a.x.rows - first);
        const bool onto = add || first > 0;
        const sort_plan plan(m.slice, codes);
        kernel::row_source source = rows_of(a.codes, a.weights, from, codes, first, count);
        int into = 0;
        if (count > 0 && slices > 1 && !from.trusted) {
            detail::launch_next(depends, kernel::list_finite_rows<X>, detail::blocks_for(count, 8, most), 256, stream,
                                0, a.x, source, m.rows[1]);
            source.rows = m.rows[1];
        }
        for (int i = 0; i < plan.passes; ++i) {
            const auto sort = plan.has_few_bins ? sort_pass<sort_plan::few_bins> : sort_pass<sort_plan::many_bins>;
            sort(source, plan.pass(i), plan.chunks, i == 0 ? from.digits : kernel::digit_counts{}, m, m.rows[into],
                 m.placed + into, i == 0 && !onto, a.counts, a.sums, depends, stream);
            source.rows = m.rows[into];
            source.row_count = m.placed + into;
            into = 1 - into;
        }
        if (count > 0) {
            const kernel::sorted_rows s{source.rows,    source.row_count, first,     count, m.run,
                                        m.partial_sums, m.partial_counts, m.last_run};
            const std::int64_t runs = (count + m.run - 1) / m.run;
            detail::launch_next(depends, sum, static_cast<unsigned>(runs * slices), sum_tile::threads, stream, 0, a, s,
                                sum_tile::lanes(columns), vectors, onto, invalid_rows);
            constexpr int merge_warps = sum_tile::merge_threads / 32;
            if (runs > 1)
                detail::launch_next(depends, kernel::merge_runs<sum_tile>,
                                    static_cast<unsigned>(((runs - 2) / merge_warps + 1) * slices),
                                    sum_tile::merge_threads, stream, 0, a.counts, a.sums, s, onto);
        }
        first += count;
    } while (first < a.x.rows);
}

}  // namespace cuvq::dispatch
