// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What Hopper and later cards add to a launch: a kernel that starts while the one before it ends, and clusters of
// blocks that reach each other's shared memory. Compiled for earlier cards all this is nothing, or a cluster of one.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace cuvq::arch {

/// Waits until the kernels before this one on the stream are done and their writes visible. What a kernel launched by
/// `detail::launch_dependent` does before it touches global memory.
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

/// Where the blocks of a cluster send sums to; in shared memory. It counts the bytes that come in, so that neither
/// side pays for a fence. Of a cluster of one, ordinary stores and barriers.
template <int Blocks>
struct mailbox {
    std::uint64_t barrier;

    /// One thread, before all of the block's `cluster::arrive_relaxed`; others send after their `wait`.
    __device__ void open() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks == 1) return;
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&barrier)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    /// One thread, once for each delivery: how many bytes it has.
    __device__ void expect(unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&barrier)), "r"(bytes)
                         : "memory");
#endif
    }
    /// Whole block: until delivery number `delivery`, counted from 0, is there.
    __device__ void receive(unsigned delivery) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1) {
            unsigned done = 0;
            while (!done)
                asm volatile(
                    "{\n"
                    ".reg .pred p;\n"
                    "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                    "selp.u32 %0, 1, 0, p;\n"
                    "}"
                    : "=r"(done)
                    : "r"(address(&barrier)), "r"(delivery & 1)
                    : "memory");
        }
#endif
        if (Blocks == 1) __syncthreads();
    }
    /// Writes to where block `other` has what lies at `to`, which its mailbox counts.
    __device__ void send(float* to, unsigned other, float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1) {
            asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                             address(to, other)),
                         "f"(v), "r"(address(&barrier, other))
                         : "memory");
            return;
        }
#endif
        *to = v;
    }
    __device__ void send(double* to, unsigned other, double v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1) {
            asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f64 [%0], %1, [%2];" ::"r"(
                             address(to, other)),
                         "d"(v), "r"(address(&barrier, other))
                         : "memory");
            return;
        }
#endif
        *to = v;
    }
    /// `to` aligned to 16 bytes.
    __device__ void send(float* to, unsigned other, float4 v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (Blocks > 1) {
            asm volatile(
                "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                    address(to, other)),
                "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(address(&barrier, other))
                : "memory");
            return;
        }
#endif
        *reinterpret_cast<float4*>(to) = v;
    }

private:
    static __device__ std::uint32_t address(const void* p) {
        return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
    }
    /// In the window of all shared memory of the cluster.
    static __device__ std::uint32_t address(const void* p, unsigned other) {
        std::uint32_t there = address(p);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(p)), "r"(other));
#endif
        return there;
    }
};

}  // namespace cuvq::arch
