// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Rows cut into chunks, two by two: of every `pair` groups of rows, the first `chunk` are one, the others another. So
/// the rows of a block of the search, whatever their number, may be two chunks.
struct row_chunks {
    static constexpr int group_rows = 64;
    std::uint32_t pair = 2, chunk = 1;  // groups; a chunk is half a pair, rounded up

    CUVQ_HOST_DEVICE std::int64_t begin(std::uint32_t number) const {
        return (std::int64_t{number / 2} * pair + number % 2 * chunk) * group_rows;
    }
    CUVQ_HOST_DEVICE std::int64_t rows() const { return std::int64_t{chunk} * group_rows; }  // at most
    CUVQ_HOST_DEVICE std::uint32_t number(std::int64_t row) const {
        const auto group = static_cast<std::uint32_t>(row / group_rows);
        return group / pair * 2 + (group % pair >= chunk);
    }
};

/// What a search counts for the first pass of a sort by code: in each chunk of rows, the digits `code & mask`.
struct digit_counts {
    std::uint32_t* histogram = nullptr;  // [chunks][bins], or null
    std::uint32_t bins = 0, mask = 0;
    row_chunks chunks{};

    /// Where the digits of a row's chunk are counted; null if they are not.
    __device__ std::uint32_t* of(std::int64_t row) const {
        return histogram ? histogram + std::int64_t{chunks.number(row)} * bins : nullptr;
    }
};

}  // namespace cuvq::kernel
