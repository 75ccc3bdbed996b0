// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The centre, scale and shift that the image of a codebook is measured with, and how they follow a codebook that is
// trained.
//
// Every update writes the image row of every code anew, so each may choose another frame, and the codebook before it
// says which. But no block knows the whole codebook before the last one is done, and waiting for that would cost a
// launch, or its like. So update t writes rows in the frame of codebook t - 2:
//   update t    the warps that write the sampled rows of codebook t leave them in samples[t % 2], and all measure rows
//               in frame[t % 2]; one block more makes frame[(t + 1) % 2] of samples[(t + 1) % 2], which update t - 1
//               left, and copies frame[t % 2] to where the searches look for it.
// Nobody reads what another writes in the same launch: samples and frames are written in one slot and read in the
// other, and the place of the searches is written by one block and read by none. So the image is right, whatever the
// blocks' order, and even if the caller sets the step counter to another number: any frame is right, and each slot
// holds one from `prepare` on. What its age costs is time alone: a codebook that leaps out of fp16's range in two
// updates has bounds of Inf, and rows of x take the full float64 pass, until the frame has caught up two updates later.
//
// Bounds: the searches take the maximum over all entries, so what share of the codes an entry is for is free. Update t
// adds its rows by atomic maxima (their order changes nothing) onto the entries of its parity, one of two for each 32
// codes, and sets the others to zero for update t + 1, which the searches before it do not mind. `prepare` fills all
// entries; so the first update after it may find its own in use, and leaves maxima that are larger than they have to
// be, which is right too; the second does not.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <cub/block/block_reduce.cuh>

#include <cuvq/arch/mma_sm80.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/device/image_row.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

using device::image_part;
using device::image_tile;
using code_bounds = device::score_bounds;  // Inf where a code did not fit fp16: then no bound holds

/// The image of a codebook, in device memory: see device::image_ref.
struct codebook_image {
    float* centre;        // [D]
    float* scale;         // [1] power of two
    code_bounds* bounds;  // [tiles * image_tile / image_part]
    char* rows;           // [tiles] operands of 128 rows, see wgmma_layout
};

/// Rows that the centre and scale are taken from. Any centre is right; a good one makes the filter sharp.
inline constexpr int centre_rows = 32;

/// Number `i` of those rows: one of every `every` rows, but not at equal distances, where a codebook made of the same
/// few rows over and over would show just one of them.
__device__ inline unsigned centre_row(unsigned i, unsigned every) {
    return i * every + __umulhi((i + 1) * 0x9E3779B9u, every);
}

/// What the head comment says of frames and samples, in device memory; null in an image that no update keeps.
struct image_trail {
    float* centres = nullptr;  // [2][stride]
    float* scales = nullptr;   // [2][2]: scale, shift
    float* samples = nullptr;  // [2][samples][D]

    __device__ explicit operator bool() const { return centres != nullptr; }
    /// Floats between two centres: rows of 16 bytes.
    CUVQ_HOST_DEVICE static constexpr std::int64_t stride(std::int64_t columns) { return (columns + 3) / 4 * 4; }
    CUVQ_HOST_DEVICE static constexpr int sample_count(std::int64_t codes) {
        return codes < centre_rows ? static_cast<int>(codes) : centre_rows;
    }
    /// Leaves code k in slots first to last, if it is one of the samples. Whole warp.
    template <class T>
    __device__ void leave_sample(const matrix_ref<T>& codebook, unsigned k, int first, int last) const {
        const auto samples = static_cast<unsigned>(sample_count(codebook.rows));
        const unsigned every = static_cast<unsigned>(codebook.rows) / samples, sample = k / every;
        if (sample >= samples || k != centre_row(sample, every)) return;
        const std::int64_t columns = codebook.columns;
#pragma unroll 1
        for (int d = static_cast<int>(threadIdx.x) % 32; d < columns; d += 32) {
            const float v = static_cast<float>(codebook.row(k)[d]);
            for (int slot = first; slot <= last; ++slot)
                this->samples[(std::int64_t{slot} * samples + sample) * columns + d] = v;
        }
    }
    /// In both slots.
    __device__ void put_centre(std::int64_t columns, int d, float centre) const {
        centres[d] = centres[stride(columns) + d] = centre;
    }
    __device__ void put_scales(float2 s) const {
        scales[0] = scales[2] = s.x;
        scales[1] = scales[3] = s.y;
    }
    __device__ device::image_frame frame(int slot, std::int64_t columns) const {
        return {centres + slot * stride(columns), scales[2 * slot], scales[2 * slot + 1]};
    }
};

/// A block finds the frame of a codebook from rows spread over it. Thread 0 gets scale and shift.
/// @param sample  (i, d) -> float, of row i < samples <= centre_rows.
/// @param put     (d, the centre's element): called once for each column, by some thread.
template <int Threads, class Sample, class Put>
__device__ float2 find_frame(typename cub::BlockReduce<double, Threads>::TempStorage& storage, int samples, int columns,
                             const Sample& sample, const Put& put) {
    const float share = 1.0f / static_cast<float>(samples);
    double square = 0;
#pragma unroll 1
    for (int d = static_cast<int>(threadIdx.x); d < columns; d += Threads) {
        float v[centre_rows], mean = 0;
#pragma unroll
        for (int i = 0; i < centre_rows; ++i) {
            v[i] = i < samples ? sample(i, d) : 0.0f;
            if (isfinite(v[i])) mean += v[i] * share;
        }
        if (!isfinite(mean)) mean = 0;
        put(d, mean);
#pragma unroll
        for (int i = 0; i < centre_rows; ++i) {
            const double difference = device::widened(v[i]) - device::widened(mean);
            if (i < samples && isfinite(v[i])) square += difference * difference;
        }
    }
    square = cub::BlockReduce<double, Threads>(storage).Sum(square) / static_cast<double>(samples);
    // The typical row gets a norm of 8 to 16: far from fp16's limits in both directions.
    int exponent = 0;
    if (square > 0) frexp(sqrt(square), &exponent);
    const int power = exponent > 130 ? -126 : exponent < -120 ? 124 : 4 - exponent;
    const float scale = ldexpf(1.0f, power);
    return {scale, static_cast<float>(0.5 * square * scale * scale)};
}

/// As `find_frame`, from a codebook.
template <int Threads, class C, class Put>
__device__ float2 find_first_frame(typename cub::BlockReduce<double, Threads>::TempStorage& storage,
                                   const matrix_ref<const C>& codebook, const Put& put) {
    const int samples = image_trail::sample_count(codebook.rows);
    const unsigned every = static_cast<unsigned>(codebook.rows / samples);
    return find_frame<Threads>(
        storage, samples, static_cast<int>(codebook.columns),
        [&](int i, int d) { return static_cast<float>(codebook.row(centre_row(i, every))[d]); }, put);
}

/// An image as the updates keep it fresh; null where there is none.
struct image_refresh {
    codebook_image image{};
    image_trail trail{};
    arch::slab_layout layout{};

    CUVQ_HOST_DEVICE explicit operator bool() const { return image.rows != nullptr; }

    /// Code k, as update `step` leaves it. Whole warp, converged; the row was written by this warp, or before.
    template <class T>
    __device__ void write_row(const matrix_ref<T>& codebook, std::int64_t k, std::int64_t step) const {
        const auto code = static_cast<unsigned>(k);
        const int slot = static_cast<int>(step & 1), lane = static_cast<int>(threadIdx.x) % 32;
        const std::int64_t columns = codebook.columns;
        __syncwarp();
        char* tile = image.rows + std::int64_t{code / image_tile} * image_tile * layout.row_bytes();
        const int bits = device::write_image_row<T>(tile, layout, static_cast<int>(code % image_tile), codebook.row(k),
                                                    static_cast<int>(columns), trail.frame(slot, columns));
        if (bits != 0)
            atomicMax(reinterpret_cast<int*>(image.bounds + 2 * (code / (2 * image_part)) + slot) + lane, bits);
        trail.leave_sample(codebook, code, slot, slot);
    }

    /// What update `step` does for the searches after it and for the next update; one block.
    template <int Threads>
    __device__ void lead(typename cub::BlockReduce<double, Threads>::TempStorage& storage, std::int64_t codes,
                         std::int64_t columns, std::int64_t step) const {
        const int slot = static_cast<int>(step & 1), other = 1 - slot, samples = image_trail::sample_count(codes);
        for (std::int64_t i = 2 * std::int64_t{threadIdx.x} + other; i < device::image_ref::parts(codes);
             i += 2 * Threads)
            image.bounds[i] = {0, 0, 0, 0};
        const device::image_frame now = trail.frame(slot, columns);
        for (std::int64_t d = threadIdx.x; d < columns; d += Threads) image.centre[d] = now.centre[d];
        if (threadIdx.x == 0) *image.scale = now.scale;
        const float* from = trail.samples + std::int64_t{other} * samples * columns;
        float* to = trail.centres + other * image_trail::stride(columns);
        const float2 scales = find_frame<Threads>(
            storage, samples, static_cast<int>(columns), [&](int i, int d) { return from[i * columns + d]; },
            [&](int d, float centre) { to[d] = centre; });
        if (threadIdx.x == 0) {
            trail.scales[2 * other] = scales.x;
            trail.scales[2 * other + 1] = scales.y;
        }
    }
};

}  // namespace cuvq::kernel
