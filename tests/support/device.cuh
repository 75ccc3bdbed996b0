// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Device memory for tests: arrays that own exactly the elements they hold, so that an access beyond them is an error
// that compute-sanitizer sees; everything starts as `poison`, so that what was not written shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cuvq/params.hpp>
#include <cuvq/views.hpp>
#include <cuvq/workspace.hpp>

#include "support/host.hpp"
#include "support/state.hpp"

namespace cuvq::test {

inline void check(cudaError_t code) {
    if (code != cudaSuccess) throw std::runtime_error(std::string("test support: ") + cudaGetErrorString(code));
}

/// CUDA devices of this machine; 0 also where there is no driver.
inline int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    cudaGetLastError();
    return 0;
}

/// Whether the device has this much memory free.
inline bool has_free_memory(std::size_t bytes) {
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total));
    return free >= bytes;
}

/// Of every test that needs a GPU: skips where there is none, and fails where a kernel of the test did.
class gpu_test : public testing::Test {
protected:
    void SetUp() override {
        if (device_count() == 0) GTEST_SKIP() << "no CUDA device on this machine";
    }
    void TearDown() override {
        if (device_count() == 0) return;
        const cudaError_t code = cudaDeviceSynchronize();
        EXPECT_EQ(code, cudaSuccess) << cudaGetErrorString(code);
    }
};

inline constexpr unsigned char poison = 0xA5;

/// `size` elements of device memory, `offset` elements behind an address of wide alignment.
template <class T>
class device_array {
public:
    explicit device_array(std::int64_t size, std::int64_t offset = 0) : size_(size), offset_(offset) {
        if (size > 0) check(cudaMalloc(&block_, bytes()));
        fill(poison);
    }
    explicit device_array(const std::vector<T>& host, std::int64_t offset = 0)
        : device_array(static_cast<std::int64_t>(host.size()), offset) {
        upload(host);
    }
    device_array(device_array&& other) noexcept
        : block_(std::exchange(other.block_, nullptr)), size_(other.size_), offset_(other.offset_) {}
    device_array& operator=(device_array&&) = delete;
    ~device_array() { cudaFree(block_); }

    T* data() const { return block_ ? static_cast<T*>(block_) + offset_ : nullptr; }
    std::int64_t size() const { return size_; }
    vector_view<T> view() const { return vector_view<T>(data(), size_); }

    void upload(const std::vector<T>& host) {
        if (size_ > 0) check(cudaMemcpy(data(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
        check(cudaDeviceSynchronize());  // a copy from pageable memory may return before it has arrived
    }
    std::vector<T> download() const { return download(0, size_); }
    std::vector<T> download(std::int64_t first, std::int64_t count) const {
        std::vector<T> host(static_cast<std::size_t>(count));
        check(cudaDeviceSynchronize());
        if (count > 0) check(cudaMemcpy(host.data(), data() + first, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
        return host;
    }
    /// Every byte.
    void fill(int value) {
        if (block_) check(cudaMemset(block_, value, bytes()));
        check(cudaDeviceSynchronize());
    }
    /// Whether no byte was written since the last `fill(poison)`.
    bool untouched() const {
        const auto host = download();
        return all_poison(host.data(), host.size() * sizeof(T));
    }

    static bool all_poison(const void* p, std::size_t bytes) {
        for (std::size_t b = 0; b < bytes; ++b)
            if (static_cast<const unsigned char*>(p)[b] != poison) return false;
        return true;
    }

private:
    std::size_t bytes() const { return static_cast<std::size_t>(offset_ + size_) * sizeof(T); }

    void* block_ = nullptr;
    std::int64_t size_, offset_;
};

/// How the rows of a matrix lie in memory.
struct row_layout {
    std::int64_t padding = 0;  ///< elements between two rows
    std::int64_t offset = 0;   ///< elements before the first
};

/// As misaligned as a matrix can be.
inline constexpr row_layout awkward{3, 1};

/// A matrix in device memory.
template <class T>
class device_matrix {
public:
    device_matrix(std::int64_t rows, std::int64_t columns, row_layout l = {})
        : rows_(rows),
          columns_(columns),
          stride_(columns + l.padding),
          buffer_(rows > 0 ? (rows - 1) * stride_ + columns : 0, l.offset) {}
    explicit device_matrix(const matrix<T>& m, row_layout l = {}) : device_matrix(m.rows, m.columns, l) { upload(m); }

    std::int64_t rows() const { return rows_; }
    std::int64_t columns() const { return columns_; }
    T* data() const { return buffer_.data(); }
    strided_view<T> view() const { return strided(buffer_.data(), rows_, columns_, stride_); }
    /// Of contiguous rows whose number of columns the type fixes.
    template <std::size_t D>
    matrix_view<T, D> fixed() const {
        return matrix_view<T, D>(buffer_.data(), rows_);
    }

    void upload(const matrix<T>& m) {
        if (rows_ == 0) return;
        auto host = buffer_.download();
        for (std::int64_t i = 0; i < rows_; ++i)
            std::memcpy(&host[static_cast<std::size_t>(i * stride_)], &m.data[static_cast<std::size_t>(i * columns_)],
                        static_cast<std::size_t>(columns_) * sizeof(T));
        buffer_.upload(host);
    }
    matrix<T> download() const {
        const auto host = buffer_.download();
        matrix<T> m(rows_, columns_);
        for (std::int64_t i = 0; i < rows_; ++i)
            std::memcpy(&m.data[static_cast<std::size_t>(i * columns_)], &host[static_cast<std::size_t>(i * stride_)],
                        static_cast<std::size_t>(columns_) * sizeof(T));
        return m;
    }
    void fill(int value) { buffer_.fill(value); }
    bool untouched() const { return buffer_.untouched(); }
    bool padding_untouched() const {
        const auto host = buffer_.download();
        for (std::int64_t i = 0; i + 1 < rows_; ++i)
            if (!buffer_.all_poison(&host[static_cast<std::size_t>(i * stride_ + columns_)],
                                    static_cast<std::size_t>(stride_ - columns_) * sizeof(T)))
                return false;
        return true;
    }

private:
    std::int64_t rows_, columns_, stride_;
    device_array<T> buffer_;
};

/// A codebook state in device memory.
template <class T = float>
class device_state {
public:
    explicit device_state(const host_state<T>& s)
        : codebook_(s.codebook),
          embed_sum_(s.embed_sum),
          cluster_size_(s.cluster_size),
          steps_since_active_(s.steps_since_active),
          step_(std::vector<std::int64_t>{s.step}) {}

    codebook_state<T> view() const {
        return {matrix_view<T>(codebook_.data(), codebook_.rows(), codebook_.columns()),
                matrix_view<float>(embed_sum_.data(), codebook_.rows(), codebook_.columns()), cluster_size_.view(),
                steps_since_active_.view(), step_.data()};
    }
    void upload(const host_state<T>& s) {
        codebook_.upload(s.codebook);
        embed_sum_.upload(s.embed_sum);
        cluster_size_.upload(s.cluster_size);
        steps_since_active_.upload(s.steps_since_active);
        step_.upload(std::vector<std::int64_t>{s.step});
    }
    host_state<T> download() const {
        return {codebook_.download(), embed_sum_.download(), cluster_size_.download(), steps_since_active_.download(),
                step_.download()[0]};
    }

private:
    device_matrix<T> codebook_;
    device_matrix<float> embed_sum_;
    device_array<float> cluster_size_;
    device_array<std::int32_t> steps_since_active_;
    device_array<std::int64_t> step_;
};

/// Equal, the count of updates included.
template <class T>
bool same_state(const host_state<T>& a, const host_state<T>& b) {
    return same_bits(a, b) && a.step == b.step;
}

/// A workspace of just so many bytes, 0xFF throughout, with a guard behind it.
class device_workspace {
public:
    explicit device_workspace(std::size_t bytes) : bytes_(bytes), block_(static_cast<std::int64_t>(bytes + guard)) {
        if (bytes > 0) check(cudaMemset(block_.data(), 0xFF, bytes));
        check(cudaDeviceSynchronize());
    }

    workspace lent() const { return {block_.data(), bytes_}; }
    bool guard_untouched() const {
        const auto host = block_.download(static_cast<std::int64_t>(bytes_), guard);
        return block_.all_poison(host.data(), host.size());
    }

private:
    static constexpr std::size_t guard = 256;
    std::size_t bytes_;
    device_array<unsigned char> block_;
};

/// A stream that does not wait for the default stream.
class test_stream {
public:
    test_stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
    test_stream(const test_stream&) = delete;
    test_stream& operator=(const test_stream&) = delete;
    ~test_stream() { cudaStreamDestroy(stream_); }

    operator cudaStream_t() const { return stream_; }

private:
    cudaStream_t stream_ = nullptr;
};

/// A CUDA graph of what `body(stream)` puts on its stream.
class captured_graph {
public:
    template <class Body>
    explicit captured_graph(Body body) {
        cudaGraph_t graph = nullptr;
        check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
        try {
            body(static_cast<cudaStream_t>(stream_));
        } catch (...) {
            cudaStreamEndCapture(stream_, &graph);
            cudaGetLastError();
            throw;
        }
        check(cudaStreamEndCapture(stream_, &graph));
        std::size_t count = 0;
        cudaGraphGetNodes(graph, nullptr, &count);
        std::vector<cudaGraphNode_t> nodes(count);
        cudaGraphGetNodes(graph, nodes.data(), &count);
        for (const cudaGraphNode_t node : nodes) {
            cudaGraphNodeType type{};
            cudaGraphNodeGetType(node, &type);
            kernels_ += type == cudaGraphNodeTypeKernel;
            allocations_ += type == cudaGraphNodeTypeMemAlloc;
        }
        const cudaError_t code = cudaGraphInstantiate(&executable_, graph, 0);
        cudaGraphDestroy(graph);
        check(code);
    }
    captured_graph(const captured_graph&) = delete;
    captured_graph& operator=(const captured_graph&) = delete;
    ~captured_graph() {
        cudaStreamSynchronize(stream_);
        cudaGraphExecDestroy(executable_);
    }

    void replay() { check(cudaGraphLaunch(executable_, stream_)); }
    int kernels() const { return kernels_; }
    int allocations() const { return allocations_; }

private:
    test_stream stream_;
    int kernels_ = 0, allocations_ = 0;
    cudaGraphExec_t executable_ = nullptr;
};

/// How many kernels body(stream) launches.
template <class Body>
int launches(const Body& body) {
    return captured_graph(body).kernels();
}

/// How often body(stream) allocates memory.
template <class Body>
int allocations(const Body& body) {
    return captured_graph(body).allocations();
}

/// Multiprocessors of the device.
inline int processors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

}  // namespace cuvq::test
