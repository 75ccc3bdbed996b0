// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What Hopper and later cards add to a launch: a kernel that starts while the one before it ends, and clusters of
// blocks that reach each other's shared memory. Compiled for earlier cards all this is nothing, or a cluster of one.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace cuvq::arch {

/// Waits until the kernels before this one on the stream are done and their writes visible. First of all that a kernel
/// launched by `detail::launch_dependent` does.
__device__ inline void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// The next kernel, launched by `detail::launch_dependent`, may come up to its `wait_for_predecessor` as soon as all
/// blocks of this one have called this or are done.
__device__ inline void let_successor_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" :::);
#endif
}

/// Reads the byte at p, so that what lies there is at hand when it is needed.
__device__ inline void touch(const void* p) {
    [[maybe_unused]] unsigned ignored;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(ignored) : "l"(p));
}

/// A cluster of `Blocks` blocks; of one where that is 1.
template <int Blocks>
struct cluster {
    static __device__ unsigned rank() {
        unsigned r = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
        return r;
    }
    /// Every thread of the cluster calls arrive, then wait; shared memory written before is visible after.
    static __device__ void arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
    }
    static __device__ void wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
        if (Blocks == 1) __syncthreads();
    }
    static __device__ void sync() {
        arrive();
        wait();
    }
    /// Where block `other` has what lies at `own` in the shared memory of this one.
    template <class T>
    static __device__ T* at(T* own, unsigned other) {
        T* there = own;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1) asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(other));
#endif
        return there;
    }
};

}  // namespace cuvq::arch
