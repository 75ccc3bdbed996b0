// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Whether what was timed was right: float64 on the GPU, plain loops; of cuvq, only its random numbers.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

#include <cuda_runtime.h>

#include <cuvq/cuda_error.cuh>
#include <cuvq/params.hpp>
#include <cuvq/views.hpp>

#include "expected.hpp"
#include "problem.cuh"
#include "rows.hpp"
#include "work.hpp"

namespace cuvq::bench {

/// Rows that are compared, spread over the batch, first and last included.
inline constexpr std::int64_t most_sampled_rows = 4096;

struct sample {
    std::int64_t size, rows;
    __host__ __device__ std::int64_t row(std::int64_t i) const { return size > 1 ? i * (rows - 1) / (size - 1) : 0; }
};

/// Least distance and lowest code of each sampled row, one row to a block.
template <class X>
__global__ void brute_force(sample rows, cuvq::shape s, const X* x, const float* codebook, double* least,
                            std::int32_t* code) {
    constexpr int threads = 256;
    __shared__ double best[threads];
    __shared__ std::int64_t best_code[threads];
    const X* mine = x + rows.row(blockIdx.x) * s.dimensions;
    double low = DBL_MAX;
    std::int64_t low_code = 0;
    for (std::int64_t k = threadIdx.x; k < s.codes; k += threads) {
        double sum = 0;
        for (std::int64_t d = 0; d < s.dimensions; ++d) {
            const double difference =
                static_cast<double>(static_cast<float>(mine[d])) - static_cast<double>(codebook[k * s.dimensions + d]);
            sum += difference * difference;
        }
        if (sum < low) {
            low = sum;
            low_code = k;
        }
    }
    best[threadIdx.x] = low;
    best_code[threadIdx.x] = low_code;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int t = 1; t < threads; ++t)
        if (best[t] < low || (best[t] == low && best_code[t] < low_code)) {
            low = best[t];
            low_code = best_code[t];
        }
    least[blockIdx.x] = low;
    code[blockIdx.x] = static_cast<std::int32_t>(low_code);
}

/// A code is right if it is the lowest of least distance, or if float64 cannot tell the two distances apart in another
/// order of summation. Where there are quantized rows and distances, they must belong to the code.
template <class X>
__global__ void count_wrong(sample rows, cuvq::shape s, const X* x, const float* codebook, const double* least,
                            const std::int32_t* reference, const std::int32_t* codes, const X* quantized,
                            const float* distances, unsigned long long* wrong) {
    const std::int64_t i = loop_first();
    if (i >= rows.size) return;
    const std::int64_t row = rows.row(i), code = codes[row], dimensions = s.dimensions;
    bool right = code >= 0 && code < s.codes;
    double sum = 0;
    for (std::int64_t d = 0; right && d < dimensions; ++d) {
        const float c = codebook[code * dimensions + d];
        const double difference =
            static_cast<double>(static_cast<float>(x[row * dimensions + d])) - static_cast<double>(c);
        sum += difference * difference;
        if (quantized) right = static_cast<float>(quantized[row * dimensions + d]) == c;
    }
    if (right && code != reference[i])
        right = sum != least[i] && sum <= least[i] * (1.0 + static_cast<double>(dimensions + 8) * 0x1p-51);
    if (right && distances)
        right = fabs(distances[row] - sum) <= 4e-7 * log2(static_cast<double>(dimensions + 1)) * sum + FLT_MIN;
    if (!right) atomicAdd(wrong, 1ull);
}

/// Judges codes of input set 0, by what `brute_force` found on first use.
template <class X>
class code_oracle {
public:
    explicit code_oracle(const problem<X>& p)
        : problem_(p),
          rows_{std::min(p.shape.vectors, most_sampled_rows), p.shape.vectors},
          least_(rows_.size),
          code_(rows_.size) {
        brute_force<<<static_cast<unsigned>(rows_.size), 256>>>(rows_, p.shape, p.x.data(), p.codebook.data(),
                                                                least_.data(), code_.data());
        CUVQ_CHECK_CUDA(cudaGetLastError());
        CUVQ_CHECK_CUDA(cudaDeviceSynchronize());
    }

    verdict judge(const std::int32_t* codes, const X* quantized = nullptr, const float* distances = nullptr) const {
        const buffer<unsigned long long> wrong(std::vector<unsigned long long>{0});
        count_wrong<<<static_cast<unsigned>((rows_.size + 127) / 128), 128>>>(
            rows_, problem_.shape, problem_.x.data(), problem_.codebook.data(), least_.data(), code_.data(), codes,
            quantized, distances, wrong.data());
        CUVQ_CHECK_CUDA(cudaGetLastError());
        verdict v;
        v.wrong = static_cast<std::int64_t>(wrong.download()[0]);
        v.compared = rows_.size;
        return v;
    }

private:
    const problem<X>& problem_;
    sample rows_;
    buffer<double> least_;
    buffer<std::int32_t> code_;
};

template <class X>
__global__ void add_up(cuvq::shape s, const X* x, const std::int32_t* codes, double* counts, double* sums) {
    for (std::int64_t e = loop_first(); e < s.vectors * s.dimensions; e += loop_step()) {
        const std::int64_t i = e / s.dimensions, d = e % s.dimensions, code = codes[i];
        if (code < 0 || code >= s.codes) continue;  // found by a broken search, which the codes show
        atomicAdd(&sums[code * s.dimensions + d], static_cast<double>(static_cast<float>(x[e])));
        if (d == 0) atomicAdd(&counts[code], 1.0);
    }
}

/// Adds up squares of what an array should be, and of how far it is from that.
template <class T>
__global__ void add_squares(const T* got, const double* wanted, std::int64_t size, double* squares) {
    double should = 0, off = 0;
    for (std::int64_t e = loop_first(); e < size; e += loop_step()) {
        const double difference = static_cast<double>(got[e]) - wanted[e];
        should += wanted[e] * wanted[e];
        off += difference * difference;
    }
    atomicAdd(&squares[0], should);
    atomicAdd(&squares[1], off);
}

/// Turns counts and sums of a batch into the state that an update leaves.
template <class X>
__global__ void update_sums(cuvq::shape s, cuvq::ema_params params, const X* x, const float* start,
                            const double* counts, double* sums, double* codebook, double* sizes, double* idle_steps) {
    for (std::int64_t e = loop_first(); e < s.codes * s.dimensions; e += loop_step()) {
        const std::int64_t k = e / s.dimensions, d = e % s.dimensions;
        const auto wanted = update_once(params, k, d, start[e], counts[k], sums[e], x, s.vectors, s.dimensions);
        sums[e] = wanted.sum;
        codebook[e] = wanted.codebook;
        sizes[k] = wanted.size;
        idle_steps[k] = wanted.idle_steps;
    }
}

/// Judges what is made of input set 0 and the problem's codes as they are when this is made.
template <class X>
class sum_oracle {
public:
    explicit sum_oracle(const problem<X>& p)
        : problem_(p), counts_(zeros(p.shape.codes)), sums_(zeros(p.codebook.size())) {
        add_up<<<loop_blocks, loop_threads>>>(p.shape, p.x.data(), p.codes.data(), counts_.data(), sums_.data());
        CUVQ_CHECK_CUDA(cudaGetLastError());
        CUVQ_CHECK_CUDA(cudaDeviceSynchronize());
    }

    /// What the codes touch of a state at its start.
    touched_codes touched(const ema_params& params) const { return bench::touched(counts_.download(), params); }

    verdict judge(const buffer<float>& counts, const buffer<float>& sums) const {
        verdict v;
        v.count_error = error(counts.data(), counts_);
        v.sum_error = error(sums.data(), sums_);
        return v;
    }

    /// @param state  an ema_memory's after one update by `params`, which are RecTokens' or like them
    /// @param v      what is known already
    verdict judge(const codebook_state<float>& state, const ema_params& params, verdict v = {}) const {
        const buffer<double> sums(sums_.download()), codebook(sums_.size()), sizes(counts_.size()),
            idle(counts_.size());
        update_sums<<<loop_blocks, loop_threads>>>(problem_.shape, params, problem_.x.data(), problem_.codebook.data(),
                                                   counts_.data(), sums.data(), codebook.data(), sizes.data(),
                                                   idle.data());
        CUVQ_CHECK_CUDA(cudaGetLastError());
        v.count_error =
            worse(error(state.cluster_size.data_handle(), sizes), error(state.steps_since_active.data_handle(), idle));
        v.sum_error = error(state.embed_sum.data_handle(), sums);
        v.codebook_error = error(state.codebook.data_handle(), codebook);
        return v;
    }

private:
    static std::vector<double> zeros(std::int64_t size) { return std::vector<double>(static_cast<std::size_t>(size)); }
    template <class T>
    static double error(const T* got, const buffer<double>& wanted) {
        const buffer<double> squares(zeros(2));
        add_squares<<<128, loop_threads>>>(got, wanted.data(), wanted.size(), squares.data());
        CUVQ_CHECK_CUDA(cudaGetLastError());
        const auto found = squares.download();
        return relative_error(found[0], found[1]);
    }

    const problem<X>& problem_;
    buffer<double> counts_, sums_;
};

}  // namespace cuvq::bench
