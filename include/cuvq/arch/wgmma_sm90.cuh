// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// A tile of scores on Hopper's tensor cores: 64 rows times 128 codes per warpgroup, fp16 operands in shared memory,
// float accumulators in registers. Operands are stored in slabs of 64 columns (and a narrower last one), each in the
// swizzled layout that wgmma reads without bank conflicts, so that a whole tile of codes is one bulk copy.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cuvq/version.hpp>

// The instructions exist for sm_90a only; everything else compiles these kernels empty and never launches them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CUVQ_HAS_WGMMA 1
#else
#define CUVQ_HAS_WGMMA 0
#endif

namespace cuvq::arch {

/// Shared-memory layout of an operand of `Steps` k-steps of 16 columns: byte offsets, the same for rows and codes.
template <int Steps>
struct wgmma_layout {
    static constexpr int columns = 16 * Steps;
    static constexpr int slabs = Steps / 4;  // of 64 columns
    static constexpr int rest = Steps % 4;
    static constexpr int tail = rest == 0 ? 0 : rest == 3 ? 64 : 16 * rest;  // columns of the narrower last slab

    static constexpr int row_bytes = 2 * (64 * slabs + tail);

    /// Bytes of an operand of `rows` rows.
    CUVQ_HOST_DEVICE static constexpr int bytes(int rows) { return rows * row_bytes; }

    /// Where the 8 columns from `column` on (a multiple of 8) of `row` lie in an operand of `rows` rows: 16 bytes. The
    /// next 8 of the same step lie 16 bytes before or after: at this offset ^ 16, if `column` is a multiple of 16.
    CUVQ_HOST_DEVICE static constexpr int offset(int rows, int row, int column) {
        const int chunk = column % 64 / 8;
        if (column < 64 * slabs) return column / 64 * rows * 128 + row * 128 + ((chunk ^ (row & 7)) << 4);
        constexpr int width = tail == 0 ? 64 : tail;
        return slabs * rows * 128 + row * 2 * width + ((chunk ^ (row / (64 / width) & (width / 8 - 1))) << 4);
    }

    /// Upper half of the matrix descriptor of the slab that step `step` reads: stride between groups of 8 rows, and
    /// the swizzle (PTX ISA, "Asynchronous warpgroup level matrix shared memory layout").
    CUVQ_HOST_DEVICE static constexpr std::uint32_t descriptor_high(int step) {
        const int width = step / 4 < slabs ? 64 : tail;
        const std::uint32_t swizzle = width == 64 ? 1 : width == 32 ? 2 : 3;
        return (swizzle << 30) | static_cast<std::uint32_t>(8 * 2 * width >> 4);
    }

    /// Bytes from the operand's start to what step `step` reads.
    CUVQ_HOST_DEVICE static constexpr int step_offset(int rows, int step) {
        return step / 4 * rows * 128 + step % 4 * 32;
    }
};

#if CUVQ_HAS_WGMMA

__device__ inline std::uint32_t shared_address(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// Ends the life of a barrier in shared memory, so that its place can be used otherwise, for another barrier too.
__device__ inline void discard_barrier(std::uint64_t* barrier) {
    asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/// Registers per thread from here on, for whole warpgroups: more of them where others have given theirs up.
template <int Registers>
__device__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
/// Waits until at most `Groups` committed groups are under way.
template <int Groups>
__device__ void wgmma_wait_but() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}

/// d (64 x 128, float) = rows (64 x 16) * codes (16 x 128), added onto d if `add`. Thread t of the warpgroup holds in
/// d[4 j + 2 h + b] row 16 (t / 32) + 8 h + t % 32 / 4, code 8 j + 2 (t % 4) + b.
__device__ inline void wgmma_64x128x16(float (&d)[64], std::uint64_t rows, std::uint64_t codes, int add) {
#define CUVQ_R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CUVQ_R16(i) CUVQ_R4(i), CUVQ_R4(i + 4), CUVQ_R4(i + 8), CUVQ_R4(i + 12)
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n"
        "}"
        : CUVQ_R16(0), CUVQ_R16(16), CUVQ_R16(32), CUVQ_R16(48)
        : "l"(rows), "l"(codes), "r"(add));
#undef CUVQ_R4
#undef CUVQ_R16
}

/// A value that the compiler keeps in a register, rather than work it out again wherever it is used.
template <class T>
__device__ T kept(T v) {
    if constexpr (sizeof(T) == 8)
        asm volatile("" : "+l"(v));
    else
        asm volatile("" : "+r"(v));
    return v;
}

/// Lower half of the matrix descriptor of an operand's first step: its address in units of 16 bytes (a leading
/// dimension that swizzled layouts do not read stands above it).
__device__ inline std::uint32_t operand(const void* p) { return shared_address(p) >> 4 | 1u << 16; }

/// A value that is the same in all lanes, made known as such, so that it lands in a uniform register.
__device__ inline std::uint32_t uniform(std::uint32_t v) { return __shfl_sync(0xFFFFFFFFu, v, 0); }

/// Starts d = rows * codes over all steps, or the share of the steps from `First` to before `End`, added onto what the
/// steps before gave; the caller fences before, commits and waits after. `rows` and `codes`: from `operand`, of 64 and
/// 128 rows, uniform; `codes` where step `First` begins.
template <int Steps, int First = 0, int End = Steps>
__device__ void wgmma_scores(float (&d)[64], std::uint32_t rows, std::uint32_t codes) {
    using layout = wgmma_layout<Steps>;
#pragma unroll
    for (int step = First; step < End; ++step) {
        const std::uint64_t high = std::uint64_t{layout::descriptor_high(step)} << 32;
        wgmma_64x128x16(d, high | (rows + (layout::step_offset(64, step) >> 4)),
                        high | (codes + ((layout::step_offset(128, step) - layout::step_offset(128, First)) >> 4)),
                        step > 0);
    }
}

/// Starts d (64 x 128, float) = rows * codes of one slab of `Width` columns, added onto d if `add`; the caller fences
/// before, commits and waits after. `rows` and `codes`: from `operand`, of the slab's, uniform.
template <int Width>
__device__ void wgmma_slab(float (&d)[64], std::uint32_t rows, std::uint32_t codes, bool add) {
    constexpr std::uint32_t swizzle = Width == 64 ? 1 : Width == 32 ? 2 : 3;
    constexpr std::uint64_t high = std::uint64_t{(swizzle << 30) | (8 * 2 * Width >> 4)} << 32;
#pragma unroll
    for (int step = 0; step < Width / 16; ++step)
        wgmma_64x128x16(d, high | (rows + 2 * step), high | (codes + 2 * step), add || step > 0);
}

/// What waited for a tile of scores reads it after this: the compiler moves no use of it to before.
__device__ inline void wgmma_done(float (&d)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#endif  // CUVQ_HAS_WGMMA

}  // namespace cuvq::arch
