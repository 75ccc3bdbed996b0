// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The tile table: sizes only, no code. Pass another struct of the same shape to override one.
#pragma once

namespace cuvq {

/// `arch/simt.cuh`: a block of `threads` finds the nearest codes of `rows` rows, `codes` codes and `depth` dimensions
/// at a time. 16 threads share a row. 16 divides codes, 4 divides depth, and threads divides 16 rows, rows * depth and
/// codes * depth.
struct simt_tile {
    static constexpr int threads = 256;
    static constexpr int rows = 64;
    static constexpr int codes = 64;
    static constexpr int depth = 16;
};

/// `kernel/quantize_sm90.cuh`: operands of `steps` times 16 columns (D + 3 of them in use), up to `consumers`
/// warpgroups of 64 rows, each with `row_buffers` operands of rows, and `stages` tiles of 128 codes in flight.
template <int Steps, int Consumers, int RowBuffers, int Stages>
struct sm90_tile {
    static constexpr int steps = Steps;
    static constexpr int consumers = Consumers;
    static constexpr int row_buffers = RowBuffers;
    static constexpr int stages = Stages;
    static constexpr int dimensions = 16 * Steps - 3;  // at most
};
using sm90_d13 = sm90_tile<1, 2, 2, 8>;
using sm90_d77 = sm90_tile<5, 2, 2, 6>;
using sm90_d141 = sm90_tile<9, 2, 2, 4>;
using sm90_d269 = sm90_tile<17, 2, 1, 2>;

/// `kernel/accumulate.cuh`: a block sums `columns` columns of a run of sorted rows, each warp at most `rows_per_warp`
/// at a time; `blocks` of them fit a multiprocessor. `merge_threads` add up the runs of a code.
struct sum_tile {
    static constexpr int threads = 256;
    static constexpr int blocks = 2;
    static constexpr int columns = 128;
    static constexpr int rows_per_warp = 64;
    static constexpr int merge_threads = 512;
    static constexpr long long wanted_runs = 1024;
    static constexpr long long least_rows = 8 * threads / 32;  // of a run: a batch of loads for each warp

    /// Rows of one run, for `count` rows: short enough that all multiprocessors are busy, long enough that the partial
    /// sums, in double, take at most 8 bytes per row and two copies of the codebook.
    static constexpr long long rows(long long count, long long codes, long long dimensions) {
        constexpr long long unit = least_rows, most = rows_per_warp * threads / 32;
        long long run = count / wanted_runs / unit * unit;
        run = run < unit ? unit : run > most ? most : run;
        // Each run has two parts of D doubles, and two counts.
        const long long room = count / (2 * dimensions + 2) + codes / 2;
        if (count / run >= room) {
            const long long most_runs = room > 1 ? room - 1 : 1;
            run = (count / most_runs / unit + 1) * unit;
            if (run > most) run = (run + most - 1) / most * most;
        }
        return run;
    }
};

/// `kernel/gather.cuh`: `cluster` blocks look through the codes of `rows` rows each at a time, and sum those of their
/// `most_codes` codes each. Otherwise as `sum_tile`.
template <int Cluster>
struct gather_tile {
    static constexpr int threads = 256;
    static constexpr int blocks = 2;
    static constexpr int columns = 128;
    static constexpr int cluster = Cluster;
    static constexpr int rows = 1024;
    static constexpr int most_codes = 8;    // of a block
    static constexpr int most_sums = 1024;  // codes of a block times D
};

/// The shapes that are summed by `gather_tile`, in one launch.
struct gather_shapes {
    static constexpr long long most_rows = 8192;
    static constexpr long long most_columns = gather_tile<1>::most_sums;
    /// Every cluster looks through the codes of all rows: with more blocks than this, sorting is faster.
    static constexpr long long most_blocks = 512;

    /// Log2 of the codes of a block: few enough that all multiprocessors of a large card have a block.
    static constexpr int block_bits(long long codes, long long dimensions) {
        using tile = gather_tile<1>;
        int bits = 0;
        while ((2 << bits) <= tile::most_codes && (2 << bits) * dimensions <= tile::most_sums && codes > 128LL << bits)
            ++bits;
        return bits;
    }
    static constexpr bool include(long long rows, long long codes, long long dimensions) {
        return rows <= most_rows && dimensions <= most_columns &&
               (codes - 1) >> block_bits(codes, dimensions) < most_blocks;
    }
};

}  // namespace cuvq
