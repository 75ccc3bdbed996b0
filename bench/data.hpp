// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The random data that is timed: each element a function of its place, the same on host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <cuvq/detail/philox.hpp>
#include <cuvq/version.hpp>

namespace cuvq::bench {

enum class data_kind {
    normal,  ///< everything standard normal
    hard,    ///< what makes nearest codes hard to tell apart; see `hard_codebook_element` and `hard_x_element`
};

/// What each stream of random numbers is for.
enum seed : std::uint64_t { seed_x = 1, seed_codebook = 2, seed_codes = 3, seed_near = 4 };

/// Element `i` of an endless standard normal sequence (Box-Muller).
CUVQ_HOST_DEVICE inline float normal(std::uint64_t seed, std::int64_t i) {
    const std::uint64_t bits = cuvq::detail::philox_bits(seed, static_cast<std::uint64_t>(i), 0);
    const float u = (static_cast<float>(bits >> 40) + 1.0f) * (1.0f / 16777216.0f);  // in (0, 1]
    const float v = static_cast<float>(bits & 0xFFFFFFu) * (1.0f / 16777216.0f);
    return sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v);
}

/// A tenth of the rows are copies of others; all lie 100 away from the origin in every dimension.
CUVQ_HOST_DEVICE inline float hard_codebook_element(std::int64_t k, std::int64_t d, std::int64_t codes,
                                                    std::int64_t dimensions) {
    if (k % 10 == 9) k = k * 7919 % codes / 10 * 10;
    return 100.0f + normal(seed_codebook, k * dimensions + d);
}

CUVQ_HOST_DEVICE inline float codebook_element(data_kind kind, std::int64_t k, std::int64_t d, std::int64_t codes,
                                               std::int64_t dimensions) {
    return kind == data_kind::hard ? hard_codebook_element(k, d, codes, dimensions)
                                   : normal(seed_codebook, k * dimensions + d);
}

/// Row i, of all sets together, lies near some codebook row.
CUVQ_HOST_DEVICE inline float hard_x_element(std::int64_t i, std::int64_t d, std::int64_t codes,
                                             std::int64_t dimensions) {
    const std::int64_t k =
        cuvq::detail::scale_to(cuvq::detail::philox_bits(seed_near, static_cast<std::uint64_t>(i), 0), codes);
    return hard_codebook_element(k, d, codes, dimensions) + 0.3f * normal(seed_x, i * dimensions + d);
}

CUVQ_HOST_DEVICE inline float x_element(data_kind kind, std::int64_t i, std::int64_t d, std::int64_t codes,
                                        std::int64_t dimensions) {
    return kind == data_kind::hard ? hard_x_element(i, d, codes, dimensions) : normal(seed_x, i * dimensions + d);
}

/// Shares of K codes, added up, as the EMA cases are given them: "uniform"; "zipf", the j-th most frequent code having
/// a share as 1/j; "one", all rows on one code.
inline std::vector<double> cumulative_shares(const std::string& distribution, std::int64_t codes) {
    std::vector<double> sum(static_cast<std::size_t>(codes), 1.0);
    if (distribution == "one") return sum;
    double total = 0;
    for (std::int64_t j = 0; j < codes; ++j)
        sum[j] = total += distribution == "zipf" ? 1.0 / static_cast<double>(j + 1) : 1.0;
    for (double& s : sum) s /= total;
    return sum;
}

/// The code of row i, drawn by `cumulative`; frequent codes are not neighbours.
CUVQ_HOST_DEVICE inline std::int32_t drawn_code(const double* cumulative, std::int64_t codes, std::int64_t i) {
    const std::uint64_t bits = cuvq::detail::philox_bits(seed_codes, static_cast<std::uint64_t>(i), 0);
    const double u = static_cast<double>(bits >> 11) * (1.0 / 9007199254740992.0);
    std::int64_t low = 0, high = codes - 1;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (cumulative[middle] > u)
            high = middle;
        else
            low = middle + 1;
    }
    return static_cast<std::int32_t>(cuvq::detail::permute(seed_codes, low, codes));
}

}  // namespace cuvq::bench
