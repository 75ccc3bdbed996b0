// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include <cuvq/views.hpp>

#include "support/host.hpp"

namespace cuvq::test {

/// A codebook state whose every member a test can set and read.
template <class T = float>
struct host_state {
    matrix<T> codebook;
    matrix<float> embed_sum;
    std::vector<float> cluster_size;
    std::vector<std::int32_t> steps_since_active;
    std::int64_t step = 0;

    /// These rows, and statistics of zero.
    explicit host_state(matrix<T> rows)
        : codebook(std::move(rows)),
          embed_sum(codebook.rows, codebook.columns),
          cluster_size(static_cast<std::size_t>(codebook.rows)),
          steps_since_active(static_cast<std::size_t>(codebook.rows)) {}
    host_state(matrix<T> rows, matrix<float> sums, std::vector<float> sizes, std::vector<std::int32_t> steps = {},
               std::int64_t updates = 0)
        : codebook(std::move(rows)),
          embed_sum(std::move(sums)),
          cluster_size(std::move(sizes)),
          steps_since_active(std::move(steps)),
          step(updates) {
        steps_since_active.resize(cluster_size.size());
    }

    codebook_state<T> view() {
        return {codebook.view(), embed_sum.view(), test::view(cluster_size), test::view(steps_since_active), &step};
    }

    /// Everything the state knows of code k.
    host_state code(std::int64_t k) const {
        const auto j = static_cast<std::size_t>(k);
        return {matrix<T>::generate(1, codebook.columns, [&](auto, auto d) { return codebook.at(k, d); }),
                matrix<float>::generate(1, codebook.columns, [&](auto, auto d) { return embed_sum.at(k, d); }),
                {cluster_size[j]},
                {steps_since_active[j]}};
    }
};

/// Equal but for the count of updates.
template <class T>
bool same_bits(const host_state<T>& a, const host_state<T>& b) {
    return same_bits(a.codebook, b.codebook) && same_bits(a.embed_sum, b.embed_sum) &&
           same_bits(a.cluster_size, b.cluster_size) && same_bits(a.steps_since_active, b.steps_since_active);
}

}  // namespace cuvq::test
