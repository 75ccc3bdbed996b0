// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Device memory of one shape and type: input sets, codebook, outputs, EMA state.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <cuvq/cuda_error.cuh>
#include <cuvq/prepare.cuh>
#include <cuvq/views.hpp>
#include <cuvq/workspace.hpp>

#include "data.hpp"
#include "expected.hpp"
#include "rows.hpp"

namespace cuvq::bench {

template <class T>
class buffer {
public:
    explicit buffer(std::int64_t size = 0) : size_(size) {
        if (size > 0) CUVQ_CHECK_CUDA(cudaMalloc(&data_, bytes()));
    }
    explicit buffer(const std::vector<T>& host) : buffer(static_cast<std::int64_t>(host.size())) {
        CUVQ_CHECK_CUDA(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice));
        // The copy may return before the data is there, and the stream that is timed waits for no other.
        CUVQ_CHECK_CUDA(cudaDeviceSynchronize());
    }
    buffer(buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
        other.data_ = nullptr;
        other.size_ = 0;
    }
    buffer& operator=(buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~buffer() { cudaFree(data_); }

    T* data() const { return data_; }
    std::int64_t size() const { return size_; }
    std::size_t bytes() const { return static_cast<std::size_t>(size_) * sizeof(T); }
    /// All ones: NaN for floating point, -1 for integers.
    void poison(cudaStream_t stream) const {
        if (size_ > 0) CUVQ_CHECK_CUDA(cudaMemsetAsync(data_, 0xFF, bytes(), stream));
    }
    std::vector<T> download() const {
        std::vector<T> host(static_cast<std::size_t>(size_));
        CUVQ_CHECK_CUDA(cudaDeviceSynchronize());
        CUVQ_CHECK_CUDA(cudaMemcpy(host.data(), data_, bytes(), cudaMemcpyDeviceToHost));
        return host;
    }

private:
    T* data_ = nullptr;
    std::int64_t size_ = 0;
};

/// Threads of a grid-stride loop.
inline constexpr int loop_blocks = 2048, loop_threads = 256;

inline __device__ std::int64_t loop_first() { return blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; }
inline __device__ std::int64_t loop_step() { return gridDim.x * std::int64_t{blockDim.x}; }

/// @param rows of all sets together
template <class X>
__global__ void fill_x(X* x, data_kind kind, std::int64_t rows, cuvq::shape s) {
    for (std::int64_t e = loop_first(); e < rows * s.dimensions; e += loop_step())
        x[e] = static_cast<X>(x_element(kind, e / s.dimensions, e % s.dimensions, s.codes, s.dimensions));
}

/// Rounded to X, so that a codebook of that type holds the same rows.
template <class X>
__global__ void fill_codebook(float* codebook, data_kind kind, cuvq::shape s) {
    for (std::int64_t e = loop_first(); e < s.codes * s.dimensions; e += loop_step())
        codebook[e] = static_cast<float>(
            static_cast<X>(codebook_element(kind, e / s.dimensions, e % s.dimensions, s.codes, s.dimensions)));
}

template <class To, class From>
__global__ void convert(To* to, const From* from, std::int64_t size) {
    for (std::int64_t e = loop_first(); e < size; e += loop_step())
        to[e] = static_cast<To>(static_cast<float>(from[e]));
}

static __global__ void draw_codes(std::int32_t* out, const double* cumulative, std::int64_t codes, std::int64_t rows) {
    for (std::int64_t i = loop_first(); i < rows; i += loop_step()) out[i] = drawn_code(cumulative, codes, i);
}

/// A copy of `from` as elements of another type.
template <class To, class From>
buffer<To> converted(const buffer<From>& from) {
    buffer<To> to(from.size());
    convert<<<loop_blocks, loop_threads>>>(to.data(), from.data(), from.size());
    CUVQ_CHECK_CUDA(cudaGetLastError());
    CUVQ_CHECK_CUDA(cudaDeviceSynchronize());
    return to;
}

/// A codebook_state that can be put back to its start: cluster sizes 1, sums the codebook, idle steps spread.
class ema_memory {
public:
    /// `prepared`: the state carries a prepared codebook.
    ema_memory(const buffer<float>& codebook, const cuvq::shape& s, const ema_params& params, bool prepared = false)
        : shape_(s),
          start_(codebook),
          ones_(std::vector<float>(static_cast<std::size_t>(s.codes), 1.0f)),
          idle_(idle_steps(s.codes, params)),
          codebook_(codebook.size()),
          embed_sum_(codebook.size()),
          cluster_size_(s.codes),
          steps_since_active_(s.codes),
          step_(1),
          prepared_(prepared ? static_cast<std::int64_t>(prepared_codebook_bytes(s.codes, s.dimensions)) : 0) {}

    codebook_state<float> view() const {
        codebook_state<float> state{matrix_view<float>(codebook_.data(), shape_.codes, shape_.dimensions),
                                    matrix_view<float>(embed_sum_.data(), shape_.codes, shape_.dimensions),
                                    vector_view<float>(cluster_size_.data(), shape_.codes),
                                    vector_view<std::int32_t>(steps_since_active_.data(), shape_.codes), step_.data()};
        if (prepared_.size() > 0) state.prepared = {prepared_.data(), prepared_.bytes()};
        return state;
    }
    void reset(cudaStream_t stream) const {
        copy(codebook_, start_, stream);
        copy(embed_sum_, start_, stream);
        copy(cluster_size_, ones_, stream);
        copy(steps_since_active_, idle_, stream);
        CUVQ_CHECK_CUDA(cudaMemsetAsync(step_.data(), 0, step_.bytes(), stream));
        if (prepared_.size() > 0) prepare(view().codebook, view().prepared, stream);
    }

private:
    static std::vector<std::int32_t> idle_steps(std::int64_t codes, const ema_params& params) {
        std::vector<std::int32_t> steps(static_cast<std::size_t>(codes));
        for (std::int64_t k = 0; k < codes; ++k) steps[k] = idle_steps_at_start(k, params);
        return steps;
    }
    template <class T>
    static void copy(const buffer<T>& to, const buffer<T>& from, cudaStream_t stream) {
        CUVQ_CHECK_CUDA(cudaMemcpyAsync(to.data(), from.data(), to.bytes(), cudaMemcpyDeviceToDevice, stream));
    }

    cuvq::shape shape_;
    const buffer<float>& start_;
    buffer<float> ones_;
    buffer<std::int32_t> idle_;
    buffer<float> codebook_, embed_sum_, cluster_size_;
    buffer<std::int32_t> steps_since_active_;
    buffer<std::int64_t> step_;
    buffer<char> prepared_;
};

/// What every type of problem has, so that one owner can hold the current one.
struct any_problem {
    virtual ~any_problem() = default;
};

/// Input sets to rotate over: 1 where the vectors fit in L2, else so many that together they are four times as large.
inline int input_sets(const cuvq::shape& s, int element, std::int64_t l2_bytes, bool cold) {
    const double bytes = vector_bytes(s, element);
    if (!cold && bytes <= static_cast<double>(l2_bytes)) return 1;
    return static_cast<int>(std::min(1024.0, std::ceil(4.0 * static_cast<double>(l2_bytes) / bytes)));
}

/// Input sets one after the other, a codebook, and room for codes.
template <class X>
class problem : public any_problem {
public:
    problem(const cuvq::shape& s, data_kind kind, int input_sets)
        : shape(s),
          sets(input_sets),
          rows(sets == 1 ? s.vectors : (s.vectors + 127) / 128 * 128),
          x(sets * rows * s.dimensions),
          codebook(s.codes * s.dimensions),
          codes(sets * rows) {
        fill_x<<<loop_blocks, loop_threads>>>(x.data(), kind, sets * rows, s);
        fill_codebook<X><<<loop_blocks, loop_threads>>>(codebook.data(), kind, s);
        CUVQ_CHECK_CUDA(cudaGetLastError());
        CUVQ_CHECK_CUDA(cudaDeviceSynchronize());
    }

    matrix_view<const X> x_of(int set) const {
        return matrix_view<const X>(x.data() + set * rows * shape.dimensions, shape.vectors, shape.dimensions);
    }
    matrix_view<const float> codebook_view() const {
        return matrix_view<const float>(codebook.data(), shape.codes, shape.dimensions);
    }
    vector_view<std::int32_t> codes_of(int set) const {
        return vector_view<std::int32_t>(codes.data() + set * rows, shape.vectors);
    }
    /// Fills `codes`, of every set, by that distribution.
    void draw(const std::string& distribution) const {
        const buffer<double> cumulative(cumulative_shares(distribution, shape.codes));
        draw_codes<<<loop_blocks, loop_threads>>>(codes.data(), cumulative.data(), shape.codes, codes.size());
        CUVQ_CHECK_CUDA(cudaGetLastError());
        CUVQ_CHECK_CUDA(cudaDeviceSynchronize());
    }

    const cuvq::shape shape;
    const int sets;
    const std::int64_t rows;     ///< from one set to the next: N, or more so that sets are aligned
    buffer<X> x;                 ///< [sets x rows x D]
    buffer<float> codebook;      ///< [K x D], exact in X
    buffer<std::int32_t> codes;  ///< [sets x rows]
};

}  // namespace cuvq::bench
