// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/version.hpp>

namespace cuvq::device {

/// Codes of one tile of a codebook's image, and of that what shares one entry of its bounds.
inline constexpr int image_tile = 128;
inline constexpr int image_part = 16;

/// Where the D elements of a row go in an operand of the tensor cores: column by column, but up to four elements of an
/// operand of a single step as two halves each, high = fp16(v) and low = fp16(v - high), of x in the order high, low,
/// high, of codes in the order high, high, low. So the narrowest rows, of which many are close to each other, are told
/// apart better, at no cost.
struct operand_columns {
    static constexpr int most_twofold = 4;
    int data;
    bool twofold;
    int width;  // columns that elements take, or zeros in their place; n or t come next

    CUVQ_HOST_DEVICE constexpr operand_columns(int dimensions, const arch::slab_layout& layout)
        : data(dimensions),
          twofold(layout.steps == 1 && dimensions <= most_twofold),
          width(layout.steps > 1 ? dimensions
                : twofold        ? 3 * most_twofold
                                 : layout.columns() - 3) {}

    /// The element that column j < width is made from, if that is below `data`; else it holds zero.
    CUVQ_HOST_DEVICE constexpr int element(int j) const { return twofold ? j % most_twofold : j; }
    CUVQ_HOST_DEVICE constexpr bool holds(int j) const { return j < width && element(j) < data; }
    /// Whether column j holds the low half, of a row of x and of a code.
    CUVQ_HOST_DEVICE constexpr bool low_of_row(int j) const { return twofold && j / most_twofold == 1; }
    CUVQ_HOST_DEVICE constexpr bool low_of_code(int j) const { return twofold && j / most_twofold == 2; }
};

/// The image of a codebook as the tensor-core searches read it, in device memory (kernel/prepare.cuh and
/// kernel/prepare_wide.cuh make it). Row k holds C^ = fp16(scale (c - centre)) and, from column `width` of
/// `operand_columns` on, n in three halves (so that a row of x extended by three ones has the score X.C + n), then
/// zeros. Rows of non-finite codes and beyond K hold zeros and n = -60000.
struct image_ref {
    const float* centre = nullptr;         ///< [D] aligned to 16 bytes
    const float* scale = nullptr;          ///< [1] power of two
    const score_bounds* bounds = nullptr;  ///< [parts(K)] Inf or NaN where a code did not fit fp16
    const char* rows = nullptr;            ///< [tiles(K)] operands of image_tile rows in `layout`, aligned to 16
    arch::slab_layout layout{};            ///< of at least D + 3 columns

    CUVQ_HOST_DEVICE static constexpr std::int64_t tiles(std::int64_t codes) { return (codes - 1) / image_tile + 1; }
    CUVQ_HOST_DEVICE static constexpr std::int64_t parts(std::int64_t codes) {
        return tiles(codes) * (image_tile / image_part);
    }
    /// The image of the codes from tile `tile` on, as that of a codebook of its own.
    CUVQ_HOST_DEVICE image_ref from_tile(std::int64_t tile) const {
        return {centre, scale, bounds + parts(1) * tile, rows + tile * image_tile * layout.row_bytes(), layout};
    }
};

}  // namespace cuvq::device
