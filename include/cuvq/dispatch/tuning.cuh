// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The tile table: sizes only, no code. Pass another struct of the same shape to override one.
#pragma once

namespace cuvq {

/// `arch/simt.cuh`: a block of `threads` finds the nearest codes of `rows` rows, `codes` codes and `depth` dimensions
/// at a time. 16 threads share a row. rows * 16 and codes are multiples of threads and 16; depth is one of 4.
struct simt_tile {
    static constexpr int threads = 256;
    static constexpr int rows = 64;
    static constexpr int codes = 64;
    static constexpr int depth = 16;
};

/// `kernel/accumulate.cuh`: a warp sums `columns` columns of a run of sorted rows.
struct sum_tile {
    static constexpr int threads = 128;
    static constexpr int columns = 128;
    /// Rows of one partial sum. Growing with D it keeps the partial sums at 4 bytes per row.
    static constexpr long long rows(long long dimensions) { return dimensions > 32 ? 2 * dimensions : 64; }
};

}  // namespace cuvq
