// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What every host function does on its stream: take scratch memory, launch, check.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include <cuda_runtime.h>

#include <cuvq/cuda_error.cuh>
#include <cuvq/detail/check_params.hpp>
#include <cuvq/workspace.hpp>

namespace cuvq::detail {

/// Lays out arrays one after the other, each aligned to workspace::alignment. Over a null base it only measures.
class carver {
public:
    explicit carver(void* base = nullptr) : base_(static_cast<char*>(base)) {}

    template <class T>
    T* take(std::int64_t count) {
        char* at = base_ ? base_ + used_ : nullptr;
        constexpr std::size_t unit = workspace::alignment;
        used_ += (static_cast<std::size_t>(count) * sizeof(T) + unit - 1) / unit * unit;
        return reinterpret_cast<T*>(at);
    }
    /// Counts in what `other`, a copy of this one, has laid out over the same memory, for use at another time.
    void share(const carver& other) { used_ = std::max(used_, other.used_); }
    std::size_t bytes() const { return used_; }

private:
    char* base_;
    std::size_t used_ = 0;
};

/// Scratch memory of one call: the caller's workspace, checked, or memory allocated and freed in stream order.
class scratch {
public:
    scratch(const char* function, const workspace& lent, std::size_t bytes, cudaStream_t stream) : stream_(stream) {
        if (lent.data != nullptr || lent.bytes != 0) {
            check_workspace(function, lent, bytes);
            data_ = lent.data;
        } else if (bytes > 0) {
            CUVQ_CHECK_CUDA(cudaMallocAsync(&data_, bytes, stream));
            owned_ = true;
        }
    }
    ~scratch() {
        if (owned_) cudaFreeAsync(data_, stream_);
    }
    scratch(const scratch&) = delete;
    scratch& operator=(const scratch&) = delete;

    void* data() const { return data_; }

private:
    void* data_ = nullptr;
    cudaStream_t stream_;
    bool owned_ = false;
};

/// Blocks for `work` items of which each block takes `per_block` at a time; kernels loop, so `most` may cut it.
inline unsigned blocks_for(std::int64_t work, std::int64_t per_block, std::int64_t most) {
    return static_cast<unsigned>(std::min(most, std::max<std::int64_t>(1, (work - 1) / per_block + 1)));
}

inline cudaLaunchConfig_t launch_config(unsigned blocks, unsigned threads, cudaStream_t stream,
                                        std::size_t shared_bytes) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.stream = stream;
    config.dynamicSmemBytes = shared_bytes;
    return config;
}

/// `shared_bytes`: dynamic shared memory.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
            std::size_t shared_bytes, Arguments&&... arguments) {
    const cudaLaunchConfig_t config = launch_config(blocks, threads, stream, shared_bytes);
    CUVQ_CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...));
}

/// Multiprocessors of the current device.
inline int processor_count() {
    int device = 0, processors = 0;
    CUVQ_CHECK_CUDA(cudaGetDevice(&device));
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    return processors;
}

/// Blocks of a kernel that the device holds at once, with so much dynamic shared memory each.
template <class... Parameters>
int blocks_at_once(void (*kernel)(Parameters...), unsigned threads, std::size_t shared_bytes) {
    int each = 0;
    CUVQ_CHECK_CUDA(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, static_cast<int>(threads), shared_bytes));
    return each * processor_count();
}

/// As `launch`, of at most `blocks_at_once`, which then all run at the same time and may wait for each other.
template <class... Parameters, class... Arguments>
void launch_together(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
                     std::size_t shared_bytes, Arguments&&... arguments) {
    cudaLaunchConfig_t config = launch_config(blocks, threads, stream, shared_bytes);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    CUVQ_CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...));
}

inline cudaLaunchAttribute cluster_attribute(unsigned blocks) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    return attribute;
}

/// The same for a kernel that may start while the one before it in the stream still runs, in clusters of `cluster`
/// blocks. It must wait for that one by arch::wait_for_predecessor() in every thread, before it reads or writes
/// anything in global memory.
template <class... Parameters, class... Arguments>
void launch_dependent(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
                      std::size_t shared_bytes, unsigned cluster, Arguments&&... arguments) {
    cudaLaunchConfig_t config = launch_config(blocks, threads, stream, shared_bytes);
    cudaLaunchAttribute attributes[2] = {{}, cluster_attribute(cluster)};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = cluster > 1 ? 2 : 1;
    CUVQ_CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...));
}

/// Lets a kernel have so much dynamic shared memory.
template <class... Parameters>
void allow_shared_bytes(void (*kernel)(Parameters...), int bytes) {
    CUVQ_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

/// How many clusters of so many blocks the device holds at once. Clusters of up to 8 any Hopper card takes; of larger
/// ones this must be asked first.
template <class... Parameters>
int clusters_at_once(void (*kernel)(Parameters...), unsigned threads, std::size_t shared_bytes, unsigned cluster) {
    cudaLaunchConfig_t config = launch_config(cluster, threads, nullptr, shared_bytes);
    cudaLaunchAttribute attribute = cluster_attribute(cluster);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    CUVQ_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    CUVQ_CHECK_CUDA(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    return clusters;
}

/// Whether `kernel` has code for Hopper or later cards, and so runs on one: launch_dependent is for such kernels only.
template <class... Parameters>
bool is_for_hopper(void (*kernel)(Parameters...)) {
    cudaFuncAttributes attributes;
    CUVQ_CHECK_CUDA(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.ptxVersion >= 90;
}

/// As `launch`; `depends`: as `launch_dependent`.
template <class... Parameters, class... Arguments>
void launch_next(bool depends, void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
                 std::size_t shared_bytes, Arguments&&... arguments) {
    if (depends)
        launch_dependent(kernel, blocks, threads, stream, shared_bytes, 1, std::forward<Arguments>(arguments)...);
    else
        launch(kernel, blocks, threads, stream, shared_bytes, std::forward<Arguments>(arguments)...);
}

}  // namespace cuvq::detail
