// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The tile table: sizes, and what follows from them. `quantize<Tile>` takes one of these, or another of the same shape,
// in place of the table's choice.
#pragma once

namespace cuvq {

/// No tile in particular: the one that suits the device, the types, N, K and D.
struct automatic_tile {};

/// `arch/simt.cuh`: a block of `threads` finds the nearest codes of `rows` rows, `codes` codes and `depth` dimensions
/// at a time. 16 threads share a row. 16 divides codes, 4 divides depth, and threads divides 16 rows, rows * depth and
/// codes * depth.
struct simt_tile {
    static constexpr int threads = 256;
    static constexpr int rows = 64;
    static constexpr int codes = 64;
    static constexpr int depth = 16;
};

/// The searches on Hopper. Operands of `steps` times 16 columns: the elements', see `device::operand_columns`, and
/// three. `kernel/quantize_sm90.cuh`: `consumers` warpgroups of 64 rows, at most three, `row_buffers` operands of 64
/// rows, and `stages` tiles of 128 codes in flight, of more than 9 steps half tiles, two at least.
/// `kernel/quantize_sm90_few.cuh`: `few_groups` warpgroups score 64 rows, with `few_stages` tiles in flight, as many
/// for each.
template <int Steps, int Consumers, int RowBuffers, int Stages, int FewGroups, int FewStages>
struct sm90_tile {
    static constexpr int steps = Steps;
    static constexpr int consumers = Consumers;
    static constexpr int row_buffers = RowBuffers;
    static constexpr int stages = Stages;
    static constexpr int few_groups = FewGroups;
    static constexpr int few_stages = FewStages;
    static constexpr int dimensions = 16 * Steps - 3;  // at most
};
template <class>
inline constexpr bool is_sm90_tile = false;
template <int... Sizes>
inline constexpr bool is_sm90_tile<sm90_tile<Sizes...>> = true;
using sm90_d13 = sm90_tile<1, 3, 6, 8, 4, 8>;
using sm90_d77 = sm90_tile<5, 3, 6, 5, 4, 8>;
using sm90_d141 = sm90_tile<9, 3, 5, 3, 4, 4>;
using sm90_d269 = sm90_tile<17, 3, 3, 3, 2, 2>;

/// Up to so many groups of 64 rows per processor, `kernel/quantize_sm90_few.cuh` is the faster one.
inline constexpr int few_waves = 1;

/// Of somewhat more groups, and a codebook of so many tiles of 128 codes, it is the faster one too, in two launches:
/// `kernel/quantize_sm90.cuh`, where a block takes whole groups, would leave half the card idle.
constexpr bool takes_few_twice(long long groups, long long tiles, int processors) {
    return tiles >= 64 && 3 * groups <= 4LL * few_waves * processors;
}

/// So many codes at most, or its leads could not number their tiles.
inline constexpr long long most_few_codes = 1LL << 23;

/// So few rows of a codebook so large that the blocks of one cluster take longer than all blocks of the portable
/// search.
constexpr bool wants_all_blocks(long long rows, long long codes, long long dimensions) {
    return rows <= 64 && (codes > most_few_codes || (codes >= 49152 && dimensions > sm90_d141::dimensions));
}

/// Blocks of it that a card of so many processors holds at once, in clusters of `cluster`: larger clusters do not
/// come out even in the card's groups of processors (measured on an H100: 66 of 2, 30 of 4, 15 of 8).
constexpr int few_room(long long cluster, int processors) {
    return cluster > 8 ? processors / 2 : cluster > 2 ? processors * 10 / 11 : processors;
}

/// Blocks that make the image of a codebook, if they suffice. Each begins with work that does not depend on its share
/// of the codes, so there are as many as find room at once on a large card.
inline constexpr int prepare_blocks = 264;

/// `kernel/write_outputs.cuh`: rows of a warp at a time, at most 32, of which it has `at_once` in flight. Of few wide
/// rows it takes less, so that all warps have some.
constexpr int output_rows(long long rows, int at_once) { return rows >= 1 << 17 ? 32 : at_once < 8 ? 8 : at_once; }

/// `device/nearest_mma.cuh`: a block finds the nearest codes of `rows` rows (64 or 128), `codes` codes (128 or 256) and
/// 64 columns at a time, with `stages` such slabs of the codebook's image in its shared memory. The rows' fp16 stays
/// there as a whole, or if `streamed`, is made again for every `codes` codes. The library's own kernel has registers
/// for `blocks` blocks on a multiprocessor.
template <int Rows, int Codes, int Stages, bool Streamed, int Blocks>
struct mma_tile {
    static constexpr bool warpgroups = false;
    static constexpr int threads = 256;
    static constexpr int rows = Rows;
    static constexpr int codes = Codes;
    static constexpr int warp_codes = 64;  // of a warp at a time
    static constexpr int stages = Stages;
    static constexpr bool streamed = Streamed;
    static constexpr int blocks = Blocks;
};
using mma_twin = mma_tile<128, 128, 3, false, 2>;    // rows so narrow that two blocks fit on a multiprocessor
using mma_tall = mma_tile<128, 256, 2, false, 1>;    // wider
using mma_flat = mma_tile<64, 256, 2, false, 1>;     // wider still, or few rows
using mma_streamed = mma_tile<64, 256, 2, true, 1>;  // any
using mma_few = mma_tile<64, 128, 4, false, 1>;      // so few rows that they are to wait for little: short tiles

/// The same by Hopper's own instructions, for sm_90a only: two warpgroups score 64 rows times 128 codes each, one below
/// the other (128 rows, 128 codes) or side by side (64, 256).
template <int Rows, int Codes, int Stages>
struct wgmma_tile {
    static constexpr bool warpgroups = true;
    static constexpr int threads = 256;
    static constexpr int rows = Rows;
    static constexpr int codes = Codes;
    static constexpr int warp_codes = 128;
    static constexpr int stages = Stages;
    static constexpr bool streamed = false;
    static constexpr int blocks = 1;
};
template <class>
inline constexpr bool is_mma_tile = false;
template <int Rows, int Codes, int Stages, bool Streamed, int Blocks>
inline constexpr bool is_mma_tile<mma_tile<Rows, Codes, Stages, Streamed, Blocks>> = true;
template <int Rows, int Codes, int Stages>
inline constexpr bool is_mma_tile<wgmma_tile<Rows, Codes, Stages>> = true;
using wgmma_tall = wgmma_tile<128, 128, 4>;
using wgmma_flat = wgmma_tile<64, 256, 3>;  // wider rows, or fewer

/// Where the portable search cuts the codebook into parts that blocks search beside each other, for at most so many
/// rows times parts.
inline constexpr long long most_split_rows = 1 << 14;

/// Of a search that the CUDA cores may answer before a codebook's image is there: so many tiles of codes and depth, as
/// simt_tile has them, and rows at most.
inline constexpr long long most_simt_steps = 16, most_simt_rows = 8192;

/// `kernel/accumulate.cuh`: a block sums `columns` columns of a run of sorted rows, each warp at most `rows_per_warp`
/// at a time; `blocks` of them fit a multiprocessor. Of rows of up to `narrow_columns` columns, a group of lanes takes
/// one, `narrow_rows` at most at a time, with the loads of `narrow_batch` under way. There are `wanted_blocks` where
/// that leaves none of them without a batch, or with more rows than one time: about as many as a large card holds at
/// once. `merge_threads` add up the runs of a code.
struct sum_tile {
    static constexpr int threads = 256;
    static constexpr int blocks = 2;
    static constexpr int columns = 128;
    static constexpr int rows_per_warp = 64;
    static constexpr int narrow_columns = 64;
    static constexpr int narrow_rows = 32;
    static constexpr int narrow_batch = 8;
    static constexpr int merge_threads = 512;
    static constexpr long long wanted_blocks = 256;
    static constexpr long long least_rows = 8 * threads / 32;  // of a run: a batch of loads for each warp

    /// Lanes of a warp that take a row: a power of two.
    static constexpr int lanes(long long dimensions) {
        int n = 1;
        while (n < 32 && n * (columns / 32) < dimensions) n *= 2;
        return n;
    }

    /// Rows of one run, for `count` rows: short enough that all multiprocessors are busy, long enough that the partial
    /// sums, in double, take at most 8 bytes per row and two copies of the codebook (of a single code four).
    static constexpr long long rows(long long count, long long codes, long long dimensions) {
        const bool narrow = dimensions <= narrow_columns;
        const long long slices = (dimensions - 1) / columns + 1;
        const long long most = (narrow ? narrow_rows * (32 / lanes(dimensions)) : rows_per_warp) * (threads / 32);
        constexpr long long unit = least_rows;
        long long run = count * slices / wanted_blocks / unit * unit;
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

/// `kernel/gather.cuh`: `cluster` blocks look through the codes of at most `rows` rows, and sum those of their
/// `most_codes` codes each, of `most_sums` elements together. Otherwise as `sum_tile`. A block alone has half as many:
/// the list of all rows is its own, and takes the shared memory.
template <int Cluster>
struct gather_tile {
    static constexpr int threads = 256;
    static constexpr int blocks = 2;
    static constexpr int columns = 128;
    static constexpr int cluster = Cluster;
    static constexpr int rows = 8192;
    static constexpr int most_codes = Cluster > 1 ? 16 : 8;
    static constexpr int most_sums = 256 * most_codes;
    /// A warp alone sums a code of no more rows; all blocks of a cluster those of more.
    static constexpr int most_own_rows = 32;

    /// Log2 of the codes of a block: few enough that all multiprocessors of a large card have a block.
    static constexpr int block_bits(long long codes, long long dimensions) {
        int bits = 0;
        while ((2 << bits) <= most_codes && (2 << bits) * dimensions <= most_sums && codes > 128LL << bits) ++bits;
        return bits;
    }
};

/// The shapes that are summed by `gather_tile`, in one launch.
struct gather_shapes {
    static constexpr int cluster = 8;  // where the card has clusters, else 1
    static constexpr long long most_rows = gather_tile<cluster>::rows;
    static constexpr long long most_columns = 1024;
    /// Every cluster looks through the codes of all rows: with more blocks in clusters than this, sorting is faster.
    static constexpr long long most_blocks = 256;

    static constexpr bool include(long long rows, long long codes, long long dimensions) {
        return rows <= most_rows && dimensions <= most_columns &&
               (codes - 1) >> gather_tile<cluster>::block_bits(codes, dimensions) < most_blocks;
    }
};

}  // namespace cuvq
