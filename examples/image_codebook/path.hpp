// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The two paths of cuvq under one interface: where vectors live, and which of the library's functions works on them.
// The rest of the example is written once, against this.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <thrust/device_vector.h>

#include <cuvq/cuvq.cuh>
#endif
#include <cuvq/reference/codebook.hpp>
#include <cuvq/reference/ema.hpp>
#include <cuvq/reference/quantize.hpp>

namespace image_codebook {

/// Host memory and `cuvq::reference`.
struct cpu_path {
    static std::string name() {
#if defined(_OPENMP)
        const int threads = omp_get_max_threads();
#else
        const int threads = 1;
#endif
        return "CPU path, " + std::to_string(threads) + (threads == 1 ? " thread" : " threads");
    }

    /// An array of this path's memory; made from a std::vector or a size.
    template <class T>
    using array = std::vector<T>;
    template <class T>
    static T* data(array<T>& a) {
        return a.data();
    }
    /// Waits for the work so far, then copies to the host.
    template <class T>
    static std::vector<T> to_host(const T* from, std::size_t count) {
        return std::vector<T>(from, from + count);
    }

    template <class T>
    using codebook = cuvq::reference::codebook<T>;
    template <class... Arguments>
    static void quantize(const Arguments&... arguments) {
        cuvq::reference::quantize(arguments...);
    }
    template <class... Arguments>
    static void train_step(const Arguments&... arguments) {
        cuvq::reference::train_step(arguments...);
    }
    template <class... Arguments>
    static void lookup(const Arguments&... arguments) {
        cuvq::reference::lookup(arguments...);
    }
};

#if defined(__CUDACC__)
/// Device memory and `cuvq`.
struct gpu_path {
    static bool available() {
        // A device, and kernels that were compiled for it.
        int devices = 0;
        cudaFuncAttributes attributes;
        return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0 &&
               cudaFuncGetAttributes(&attributes, cuvq::kernel::lookup<float, float>) == cudaSuccess;
    }
    static std::string name() {
        cudaDeviceProp properties;
        if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) return "GPU path";
        return std::string("GPU path, ") + properties.name;
    }

    template <class T>
    using array = thrust::device_vector<T>;
    template <class T>
    static T* data(array<T>& a) {
        return thrust::raw_pointer_cast(a.data());
    }
    template <class T>
    static std::vector<T> to_host(const T* from, std::size_t count) {
        std::vector<T> to(count);
        thrust::copy_n(thrust::device_pointer_cast(from), count, to.begin());
        return to;
    }

    template <class T>
    using codebook = cuvq::codebook<T>;
    template <class... Arguments>
    static void quantize(const Arguments&... arguments) {
        cuvq::quantize(arguments...);
    }
    template <class... Arguments>
    static void train_step(const Arguments&... arguments) {
        cuvq::train_step(arguments...);
    }
    template <class... Arguments>
    static void lookup(const Arguments&... arguments) {
        cuvq::lookup(arguments...);
    }
};
#endif

/// Calls `work` with the best path that this build and this machine have.
template <class Work>
auto with_best_path(Work&& work) {
#if defined(__CUDACC__)
    if (gpu_path::available()) return work(gpu_path{});
#endif
    return work(cpu_path{});
}

}  // namespace image_codebook
