// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// A tile of scores on the tensor cores of any architecture from sm_80 on: fp16 operands in shared memory, float
// accumulators in registers. Operands lie in slabs of 64 columns (and a narrower last one), swizzled as in
// arch/wgmma_sm90.cuh, so that both paths read the same image of a codebook; ldmatrix meets no bank twice in it.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/version.hpp>

// Older architectures compile these kernels empty and never launch them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define CUVQ_HAS_MMA 1
#else
#define CUVQ_HAS_MMA 0
#endif

namespace cuvq::arch {

/// Layout of an operand of `steps` k-steps of 16 columns, a run-time number: byte offsets as in `wgmma_layout`.
struct slab_layout {
    int steps;

    CUVQ_HOST_DEVICE constexpr int columns() const { return 16 * steps; }
    CUVQ_HOST_DEVICE constexpr int whole_slabs() const { return steps / 4; }
    /// Columns of the narrower last slab, 0 if there is none.
    CUVQ_HOST_DEVICE constexpr int tail() const { return steps % 4 == 3 ? 64 : 16 * (steps % 4); }
    CUVQ_HOST_DEVICE constexpr int slabs() const { return whole_slabs() + (tail() > 0); }
    CUVQ_HOST_DEVICE constexpr int width(int slab) const { return slab < whole_slabs() ? 64 : tail(); }
    CUVQ_HOST_DEVICE constexpr int row_bytes() const { return 2 * (64 * whole_slabs() + tail()); }
    /// Bytes from an operand's start to a slab of it.
    CUVQ_HOST_DEVICE static constexpr int slab_offset(int rows, int slab) { return slab * rows * 128; }
    /// Bytes from a slab's start to its 8 columns `chunk` (of width / 8) of `row`: 16 bytes.
    CUVQ_HOST_DEVICE static constexpr int chunk_offset(int width, int row, int chunk) {
        return row * 2 * width + ((chunk ^ (row * width / 64 & (width / 8 - 1))) << 4);
    }
    /// Bytes from an operand's start to the 8 columns from `column` on, a multiple of 8.
    CUVQ_HOST_DEVICE constexpr int offset(int rows, int row, int column) const {
        return slab_offset(rows, column / 64) + chunk_offset(width(column / 64), row, column % 64 / 8);
    }
};

#if CUVQ_HAS_MMA

/// A shared-memory address as the instructions below take it.
__device__ inline std::uint32_t shared_window(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// Starts a copy of 16 bytes from global to shared memory, past the L1 cache.
__device__ inline void copy16_async(std::uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
/// Closes a group of copies, possibly of none.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `Groups` of this thread's groups are under way.
template <int Groups>
__device__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

/// Four 8 x 8 matrices of halves; lane i names row i % 8 of matrix i / 8.
__device__ inline void load_matrices(std::uint32_t (&m)[4], std::uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

/// d (16 x 8, float) += rows (16 x 16) * codes (16 x 8). Lane t holds in d[2 h + b] row 8 h + t / 4, code 2 (t % 4) +
/// b.
__device__ inline void mma_16x8x16(float (&d)[4], const std::uint32_t (&rows)[4], std::uint32_t codes0,
                                   std::uint32_t codes1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(codes0), "r"(codes1));
}

/// One warp's share of a tile of scores: 16 RowTiles rows times 8 Columns codes. Lane t holds in score[i][j][2 h + b]
/// row 16 i + 8 h + t / 4, code 8 j + 2 (t % 4) + b.
template <int RowTiles, int Columns>
using mma_scores = float[RowTiles][Columns][4];

/// Adds the products of one slab of `Width` columns. `rows` and `codes`: where the warp's first row and code lie in the
/// slabs, which are aligned to 128 bytes; both are multiples of 16.
template <int Width, int RowTiles, int Columns>
__device__ void mma_slab(mma_scores<RowTiles, Columns>& score, std::uint32_t rows, std::uint32_t codes) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::uint32_t row = rows + slab_layout::chunk_offset(Width, lane % 16, 0);
    const std::uint32_t code = codes + slab_layout::chunk_offset(Width, lane % 8 + lane / 16 * 8, 0);
    // A chunk's number enters the offset by exclusive or alone, and 16 rows on the swizzle is the same.
    const std::uint32_t row_chunk = lane / 16 << 4, code_chunk = lane / 8 % 2 << 4;
    constexpr int steps = Width / 16, parts = Columns / 2;  // of 16 columns, of 16 codes
    // Each operand is loaded one part ahead of its use.
    std::uint32_t a[2][RowTiles][4], b[2][4];
    const auto load_rows = [&](int step) {
#pragma unroll
        for (int i = 0; i < RowTiles; ++i)
            load_matrices(a[step % 2][i], (row ^ (row_chunk + 32 * step)) + i * 16 * 2 * Width);
    };
    const auto load_codes = [&](int step, int part) {
        load_matrices(b[(step * parts + part) % 2], (code ^ (code_chunk + 32 * step)) + part * 16 * 2 * Width);
    };
    load_rows(0);
    load_codes(0, 0);
#pragma unroll
    for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int part = 0; part < parts; ++part) {
            const int next = step * parts + part + 1;
            if (next < steps * parts) load_codes(next / parts, next % parts);
            if (part == parts - 2 && step + 1 < steps) load_rows(step + 1);
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int i = 0; i < RowTiles; ++i)
                    mma_16x8x16(score[i][2 * part + j], a[step % 2][i], b[(next - 1) % 2][2 * j],
                                b[(next - 1) % 2][2 * j + 1]);
        }
    }
}

/// The same of a slab whose width is known at run time.
template <int RowTiles, int Columns>
__device__ void mma_slab(mma_scores<RowTiles, Columns>& score, std::uint32_t rows, std::uint32_t codes, int width) {
    if (width == 64)
        mma_slab<64>(score, rows, codes);
    else if (width == 32)
        mma_slab<32>(score, rows, codes);
    else
        mma_slab<16>(score, rows, codes);
}

#endif  // CUVQ_HAS_MMA

}  // namespace cuvq::arch
