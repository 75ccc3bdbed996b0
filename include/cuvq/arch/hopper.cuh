// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What Hopper and later cards add to a launch: a kernel that starts while the one before it ends, and clusters of
// blocks that reach each other's shared memory. Compiled for earlier cards all this is nothing, or a cluster of one.
#pragma once

#include <cstdint>
#include <cstring>

#include <cuda_runtime.h>
#include <cuda/ptx>

namespace cuvq::arch {

/// Waits until the kernels before this one on the stream are done and their writes visible. What a kernel launched by
/// `detail::launch_dependent` does before it touches global memory, but by `fetch`.
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

/// Has the line that p points into brought into the L2 cache, which shows nothing of it.
__device__ inline void fetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

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
    /// As arrive, but shows others nothing, and so need not wait until it could.
    static __device__ void arrive_relaxed() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
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

/// Where the blocks of a cluster send things to; in shared memory. It counts the bytes that come in, so that neither
/// side pays for a fence of global memory. Of a cluster of one, ordinary stores and barriers.
template <int Blocks>
struct mailbox {
    std::uint64_t barrier;

    /// One thread, before all of the block's `cluster::arrive_relaxed`; others send after their `wait`. In a cluster of
    /// several blocks its fence covers the barriers that this thread has initialised before, too.
    __device__ void open() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks == 1) return;
        cuda::ptx::mbarrier_init(&barrier, 1);
        cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
#endif
    }
    /// One thread, once for each delivery: how many bytes it has.
    __device__ void expect(unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1)
            cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared,
                                                 &barrier, bytes);
#endif
    }
    /// Whole block: until delivery number `delivery`, counted from 0, is there.
    __device__ void receive(unsigned delivery) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks == 1) return __syncthreads();
        // Of shared memory alone: to acquire all that the cluster may have written throws the L1 cache away.
        const auto address = static_cast<unsigned>(__cvta_generic_to_shared(&barrier));
        unsigned there = 0;
        while (!there)
            asm volatile(
                "{\n"
                ".reg .pred p;\n"
                "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\n"
                "selp.u32 %0, 1, 0, p;\n"
                "}"
                : "=r"(there)
                : "r"(address), "r"(delivery & 1)
                : "memory");
        asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
#else
        __syncthreads();
#endif
    }
    /// Writes to where block `other` has what lies at `to`, which its mailbox counts. A value of 4 or 8 bytes.
    template <class T>
    __device__ void send(T* to, unsigned other, const T& value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1) {
            cuda::ptx::st_async(cluster<Blocks>::at(to, other), value, cluster<Blocks>::at(&barrier, other));
            return;
        }
#endif
        *to = value;
    }
    /// Four of 4 bytes each; `to` aligned to 16.
    template <class T>
    __device__ void send(T* to, unsigned other, const T (&values)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1) {
            cuda::ptx::st_async(cluster<Blocks>::at(to, other), values, cluster<Blocks>::at(&barrier, other));
            return;
        }
#endif
        struct alignas(16) {
            T value[4];
        } const all{values[0], values[1], values[2], values[3]};
        memcpy(to, &all, sizeof(all));
    }
};

}  // namespace cuvq::arch
