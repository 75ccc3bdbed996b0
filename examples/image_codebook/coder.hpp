// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// A codebook and the vectors it is trained on, on either path.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include <cuvq/params.hpp>
#include <cuvq/views.hpp>

namespace image_codebook {

/// [0, n) in an order that depends on the seed alone. (std::shuffle may differ between standard libraries.)
inline std::vector<std::int64_t> shuffled(std::int64_t n, std::uint64_t seed) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), std::int64_t{0});
    std::mt19937_64 random(seed);
    for (std::int64_t i = n - 1; i > 0; --i) std::swap(order[i], order[random() % static_cast<std::uint64_t>(i + 1)]);
    return order;
}

template <class Path>
class coder {
public:
    struct encoding {
        std::vector<std::int32_t> codes;  ///< [N] of the vectors, in the order they were given
        cuvq::step_stats stats;
    };

    /// @param x [N x dimensions] the vectors, in host memory.
    /// @param batch vectors of a train step, at most.
    coder(const std::vector<float>& x, std::int64_t dimensions, std::int64_t codes, std::int64_t batch,
          const cuvq::train_params& params)
        : dimensions_(dimensions),
          rows_(static_cast<std::int64_t>(x.size()) / dimensions),
          batches_((rows_ + batch - 1) / batch),
          order_(shuffled(rows_, params.seed)),
          x_(rows_in_order(x)),
          codes_(order_.size()),
          stats_(1),
          codebook_(codes, dimensions) {
        codebook_.init_from_rows(vectors(0, rows_), params.seed, params.initial);
    }

    /// Trains on the next batch. The vectors were shuffled once and lie on the device in that order, so a batch is a
    /// view: nothing is copied.
    cuvq::step_stats train_step(cuvq::train_params params) {
        const std::int64_t begin = next_ * rows_ / batches_, end = (next_ + 1) * rows_ / batches_;
        next_ = (next_ + 1) % batches_;
        params.stats = Path::data(stats_);
        Path::train_step(codebook_.state(), vectors(begin, end), codes(begin, end), cuvq::discard, params);
        return stats();
    }

    /// The code of every vector.
    encoding encode() {
        cuvq::quantize_params params;
        params.stats = Path::data(stats_);
        Path::quantize(vectors(0, rows_), codebook_.state().codebook, codes(0, rows_), cuvq::discard, cuvq::discard,
                       params);
        const std::vector<std::int32_t> found = Path::to_host(Path::data(codes_), order_.size());
        encoding result{std::vector<std::int32_t>(order_.size()), stats()};
        for (std::size_t i = 0; i < order_.size(); ++i) result.codes[order_[i]] = found[i];
        return result;
    }

    /// [codes x dimensions] the codebook rows of `codes`.
    std::vector<float> decode(const std::vector<std::int32_t>& codes) {
        typename Path::template array<std::int32_t> from(codes);
        typename Path::template array<float> to(codes.size() * static_cast<std::size_t>(dimensions_));
        const std::int64_t n = static_cast<std::int64_t>(codes.size());
        Path::lookup(codebook_.state().codebook, cuvq::vector_view<const std::int32_t>(Path::data(from), n),
                     cuvq::matrix_view<float>(Path::data(to), n, dimensions_));
        return Path::to_host(Path::data(to), to.size());
    }

    /// [K x dimensions] the codebook.
    std::vector<float> codebook() {
        const auto rows = codebook_.state().codebook;
        return Path::to_host(rows.data_handle(), rows.size());
    }

private:
    std::vector<float> rows_in_order(const std::vector<float>& x) const {
        std::vector<float> sorted(x.size());
        for (std::size_t i = 0; i < order_.size(); ++i)
            std::copy_n(x.begin() + order_[i] * dimensions_, dimensions_,
                        sorted.begin() + static_cast<std::int64_t>(i) * dimensions_);
        return sorted;
    }
    cuvq::matrix_view<const float> vectors(std::int64_t begin, std::int64_t end) {
        return cuvq::matrix_view<const float>(Path::data(x_) + begin * dimensions_, end - begin, dimensions_);
    }
    cuvq::vector_view<std::int32_t> codes(std::int64_t begin, std::int64_t end) {
        return cuvq::vector_view<std::int32_t>(Path::data(codes_) + begin, end - begin);
    }
    cuvq::step_stats stats() { return Path::to_host(Path::data(stats_), 1)[0]; }

    std::int64_t dimensions_, rows_, batches_, next_ = 0;
    std::vector<std::int64_t> order_;  // of the vectors in x_
    typename Path::template array<float> x_;
    typename Path::template array<std::int32_t> codes_;
    typename Path::template array<cuvq::step_stats> stats_;
    typename Path::template codebook<float> codebook_;
};

}  // namespace image_codebook
