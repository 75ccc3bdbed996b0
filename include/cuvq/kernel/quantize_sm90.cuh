// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The search on Hopper, as a pipeline through one persistent block's shared memory. Consumer warpgroups score 64 rows
// each against every tile of codes and keep the best. One warpgroup converts the next rows meanwhile. In the last one,
// a warp streams the tiles of codes, and three finish rows: they settle those that the filter left open and write the
// outputs.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cuda/ptx>

#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/detail/validate.hpp>
#include <cuvq/device/certificate.cuh>
#include <cuvq/kernel/prepare.cuh>
#include <cuvq/kernel/quantize.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// What the filter leaves of one warpgroup's 64 rows for the finishing warps.
struct row_results {
    static constexpr int rows = 64, words = 8;
    // A word is a code, or
    static constexpr int group = 1 << 30;          // group | tile << 2 | q: codes of that tile held by thread q of 4
    static constexpr int column = 1 << 29;         // column | q: codes of all tiles held by thread q
    static constexpr int everything = 0x7FFFFFFF;  // the whole codebook
    static constexpr std::int64_t most_codes = 1 << 29;

    int code[rows];         // the code, or -1 - n: open, to be settled from n words
    int word[rows][words];  // candidates of an open row
};

/// Shared memory of the kernel, by offsets.
template <class Tile>
struct sm90_shared {
    using layout = arch::wgmma_layout<Tile::steps>;
    static constexpr int operands = Tile::consumers * Tile::row_buffers;  // of rows
    static constexpr int code_bytes = layout::bytes(image_tile), row_bytes = layout::bytes(row_results::rows);
    static constexpr int rows = Tile::stages * code_bytes;
    static constexpr int errors = rows + operands * row_bytes;
    static constexpr int results = errors + operands * row_results::rows * 4;
    static constexpr int centre = results + Tile::consumers * static_cast<int>(sizeof(row_results));
    static constexpr int bounds = centre + 64 * Tile::steps;
    static constexpr int barriers = bounds + static_cast<int>(sizeof(device::score_bounds));
    static constexpr int bytes = barriers + 8 * 2 * (Tile::stages + operands + Tile::consumers);
    static constexpr int allocated = bytes + 1024;  // the base is aligned by hand
    /// Threads of a block with `consumers` of the Tile::consumers warpgroups that there is room for.
    CUVQ_HOST_DEVICE static constexpr int threads(int consumers = Tile::consumers) { return 128 * (consumers + 2); }
};

/// Partial losses that a block leaves: one per finishing warp.
inline constexpr int finishing_warps = 3;

/// A ring of buffers as one side of it walks: which buffer, and the parity its barrier is waited for with.
template <int Buffers>
struct ring {
    int at = 0;
    std::uint32_t parity;

    __device__ explicit ring(std::uint32_t first_parity) : parity(first_parity) {}
    __device__ void next() {
        if (++at == Buffers) {
            at = 0;
            parity ^= 1;
        }
    }
};

/// Clears the bits of a score that its tag takes: its place among the 32 that a thread holds of a row and tile.
inline constexpr int tag_mask = ~(image_tile / 4 - 1);

#if CUVQ_HAS_WGMMA

__device__ inline void wait(std::uint64_t* barrier, std::uint32_t parity) {
    while (!cuda::ptx::mbarrier_try_wait_parity(barrier, parity)) {
    }
    __syncwarp();
}

/// One warp's arrival, once all its lanes are done.
__device__ inline void arrive(std::uint64_t* barrier) {
    namespace ptx = cuda::ptx;
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier);
}

/// The barriers of the pipeline: `..._full` when there is something to read, `..._empty` when it has been read.
template <class Tile>
struct sm90_barriers {
    std::uint64_t *codes_full, *codes_empty;      // [stages]
    std::uint64_t *rows_full, *rows_empty;        // [row_buffers][consumers]
    std::uint64_t *results_full, *results_empty;  // [consumers]

    __device__ explicit sm90_barriers(std::uint64_t* base) {
        constexpr int operands = sm90_shared<Tile>::operands;
        codes_full = base;
        codes_empty = codes_full + Tile::stages;
        rows_full = codes_empty + Tile::stages;
        rows_empty = rows_full + operands;
        results_full = rows_empty + operands;
        results_empty = results_full + Tile::consumers;
    }
    __device__ void init(int consumers) const {
        namespace ptx = cuda::ptx;
        for (int i = 0; i < Tile::stages; ++i) {
            ptx::mbarrier_init(codes_full + i, 1);
            ptx::mbarrier_init(codes_empty + i, 4 * consumers);
        }
        for (int i = 0; i < sm90_shared<Tile>::operands; ++i) {
            ptx::mbarrier_init(rows_full + i, 4);
            ptx::mbarrier_init(rows_empty + i, 4);
        }
        for (int i = 0; i < Tile::consumers; ++i) {
            ptx::mbarrier_init(results_full + i, 4);
            ptx::mbarrier_init(results_empty + i, finishing_warps);
        }
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
};

/// The float bits of a score with its place in the thread in the low bits: still ordered, as integers, among
/// positive scores.
__device__ inline int tagged(float score, int mask, int tag) {
    int r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(__float_as_int(score)), "r"(mask), "r"(tag));  // (a & b) | c
    return r;
}

/// The three best tiles of one row's columns in one thread, and the best of all that was dropped.
struct leaders {
    static constexpr int least = -0x7FFFFFFF;
    int best = least, best_runner = least, best_tile = 0;
    int next = least, next_runner = least, next_tile = 0;
    int third = least, third_tile = 0;
    int rest = least;

    /// A tile's largest score and its second largest.
    __device__ void offer(int score, int runner, int tile) {
        const bool leads = score > best;
        const int second = min(score, best), second_runner = leads ? best_runner : runner;
        const int second_tile = leads ? best_tile : tile;
        best = max(score, best);
        best_runner = leads ? runner : best_runner;
        best_tile = leads ? tile : best_tile;
        const bool follows = second > next;
        const int dropped = min(second, next), dropped_tile = follows ? next_tile : second_tile;
        next = max(second, next);
        next_runner = follows ? second_runner : next_runner;
        next_tile = follows ? second_tile : next_tile;
        rest = max(rest, min(dropped, third));
        third_tile = dropped > third ? dropped_tile : third_tile;
        third = max(dropped, third);
    }
};

/// A row of x as one lane of four holds it: columns 16 s + 4 q to 16 s + 4 q + 3.
template <int Steps>
struct row_quarter {
    float4 v[Steps];

    /// `aligned`: for loads of four. Rows beyond the last read as zeros.
    template <class X>
    __device__ void load(const X* x, bool inside, int columns, bool aligned) {
        const int q = static_cast<int>(threadIdx.x) % 4;
        if (inside && aligned) {  // one branch for all loads, so that they overlap
#pragma unroll
            for (int s = 0; s < Steps; ++s) {
                v[s] = {0, 0, 0, 0};
                if (16 * s + 4 * q < columns) v[s] = device::load4(x + 16 * s + 4 * q);
            }
        } else {
#pragma unroll
            for (int s = 0; s < Steps; ++s) v[s] = device::load4(x, 16 * s + 4 * q, inside ? columns : 0);
        }
    }

    /// First half of the conversion: v becomes scale (x - centre), given the centre times scale. Returns |v|^2, in all
    /// four lanes.
    __device__ float centre_on(const float* scaled_centre, float scale) {
        const int q = static_cast<int>(threadIdx.x) % 4;
        float square = 0;
#pragma unroll
        for (int s = 0; s < Steps; ++s) {
            const float4 c = *reinterpret_cast<const float4*>(scaled_centre + 16 * s + 4 * q);
            v[s] = {fmaf(v[s].x, scale, -c.x), fmaf(v[s].y, scale, -c.y), fmaf(v[s].z, scale, -c.z),
                    fmaf(v[s].w, scale, -c.w)};
            square = fmaf(v[s].x, v[s].x, fmaf(v[s].y, v[s].y, fmaf(v[s].z, v[s].z, fmaf(v[s].w, v[s].w, square))));
        }
        square += __shfl_xor_sync(0xFFFFFFFFu, square, 1);
        return square + __shfl_xor_sync(0xFFFFFFFFu, square, 2);
    }

    /// Second half: writes t v in fp16 into the operand, then t three times, t the power of two that makes the row fit.
    /// Returns the row's error bound, NaN if it does not fit.
    __device__ float store(float square, int columns, char* operand, int row, const device::score_bounds& bounds) {
        using layout = arch::wgmma_layout<Steps>;
        const int q = static_cast<int>(threadIdx.x) % 4;
        const bool fits = square < 0x1p72f;  // fp16 holds powers of two down to 2^-24; false for NaN
        const int exponent = static_cast<int>(__float_as_uint(square) >> 24) - 63;  // |v| < 2^(exponent + 1)
        const float factor = square < 0x1p26f ? 1.0f : fits ? __int_as_float((127 + 13 - exponent) << 23) : 0.0f;
        const __half half_factor = __float2half_rn(factor);
        float residual = 0;
#pragma unroll
        for (int s = 0; s < Steps; ++s) {
            const int column = 16 * s + 4 * q;
            const float4 u{factor * v[s].x, factor * v[s].y, factor * v[s].z, factor * v[s].w};
            __half2 out[2] = {__floats2half2_rn(u.x, u.y), __floats2half2_rn(u.z, u.w)};
            const float2 low = __half22float2(out[0]), high = __half22float2(out[1]);
            const float4 e{u.x - low.x, u.y - low.y, u.z - high.x, u.w - high.y};
            residual = fmaf(e.x, e.x, fmaf(e.y, e.y, fmaf(e.z, e.z, fmaf(e.w, e.w, residual))));
            if (16 * s + 16 > columns) {  // the last data, the factors, or zeros (v is 0 beyond the data)
                __half* half = reinterpret_cast<__half*>(out);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int beyond = column + i - columns;
                    if (beyond >= 0) half[i] = beyond < 3 ? half_factor : __float2half_rn(0.0f);
                }
            }
            char* to = operand + (layout::offset(row_results::rows, row, 16 * s) ^ (q >> 1 << 4)) + (q & 1) * 8;
            *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(out);
        }
        residual += __shfl_xor_sync(0xFFFFFFFFu, residual, 1);
        residual += __shfl_xor_sync(0xFFFFFFFFu, residual, 2);
        // 1.0005 and 1e-17 cover the rounding and the underflow of the sums of squares; 2^-23 that of x - centre.
        const float length = 1.0005f * factor * sqrtf(square) + 1e-17f;
        residual = 1.0005f * sqrtf(residual) + 1e-17f + 0x1p-23f * length;
        const float error = device::score_error(length, residual, factor, bounds, Steps);
        return fits ? error : __int_as_float(0x7FC00000);
    }
};

/// The converting warp `part` of four: its 16 rows of each consumer's 64.
template <class Tile, class X>
__device__ void convert_rows(const matrix_ref<const X>& x, const float* scaled_centre, float scale,
                             const device::score_bounds& bounds, char* operands, float* errors,
                             const sm90_barriers<Tile>& barriers, int consumers, int part) {
    const int lane = static_cast<int>(threadIdx.x) % 32, columns = static_cast<int>(x.columns);
    const int row0 = part * 16 + lane / 4, row1 = row0 + 8;
    const bool aligned = device::is_aligned4(x.data) && x.stride % 4 == 0 && columns % 4 == 0;
    const std::int64_t block_rows = consumers * row_results::rows;
    ring<Tile::row_buffers> buffer(1);
    for (std::int64_t base = blockIdx.x * block_rows; base < x.rows; base += gridDim.x * block_rows, buffer.next()) {
        for (int consumer = 0; consumer < consumers; ++consumer) {
            const int at = buffer.at * Tile::consumers + consumer;
            const std::int64_t first = base + consumer * row_results::rows;
            char* operand = operands + at * sm90_shared<Tile>::row_bytes;
            const auto load = [&](row_quarter<Tile::steps>& quarter, int row) {
                const bool inside = first + row < x.rows;
                quarter.load(x.row(inside ? first + row : 0), inside, columns, aligned);
            };
            float error0, error1;
            if constexpr (Tile::steps <= 9) {  // two rows at once, as the registers hold them
                row_quarter<Tile::steps> quarter0, quarter1;
                load(quarter0, row0);
                load(quarter1, row1);
                const float square0 = quarter0.centre_on(scaled_centre, scale);
                const float square1 = quarter1.centre_on(scaled_centre, scale);
                wait(barriers.rows_empty + at, buffer.parity);
                error0 = quarter0.store(square0, columns, operand, row0, bounds);
                error1 = quarter1.store(square1, columns, operand, row1, bounds);
            } else {
                row_quarter<Tile::steps> quarter;
                load(quarter, row0);
                wait(barriers.rows_empty + at, buffer.parity);
                error0 = quarter.store(quarter.centre_on(scaled_centre, scale), columns, operand, row0, bounds);
                load(quarter, row1);
                error1 = quarter.store(quarter.centre_on(scaled_centre, scale), columns, operand, row1, bounds);
            }
            if (lane % 4 == 0) {
                errors[at * row_results::rows + row0] = error0;
                errors[at * row_results::rows + row1] = error1;
            }
            cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
            arrive(barriers.rows_full + at);
        }
    }
}

/// Turns what the four threads of a row saw into a code, or into words for the finishing warps. All four call it.
template <int Codes>
__device__ void conclude(const leaders& mine, float error, row_results& results, int row) {
    const int q = static_cast<int>(threadIdx.x) % 4;
    int best = max(mine.best, __shfl_xor_sync(0xFFFFFFFFu, mine.best, 1));
    best = max(best, __shfl_xor_sync(0xFFFFFFFFu, best, 2));
    // A tag moved the two scores by up to 32 units in the last place each.
    const float score = __int_as_float(best), limit = score - 2.0002f * error - 0x1.2p-17f * score;
    const bool decided = limit > 0.0f;  // else integers do not order scores; false for NaN too
    const int least = decided ? __float_as_int(limit) : 1;

    const auto code_of = [&](int tagged_score, int tile) {
        const int at = tagged_score & (Codes / 4 - 1);
        return tile * Codes + (at >> 1) * 8 + 2 * q + (at & 1);
    };
    const auto group_of = [&](int tile) { return row_results::group | tile << 2 | q; };
    const bool sole = mine.best >= least && max(max(mine.best_runner, mine.next), mine.rest) < least;
    int words = mine.best < least ? 0 : sole ? 1 : 1 + (mine.next >= least) + (mine.third >= least);
    if (mine.rest >= least) words = 1;
    const int from1 = __shfl_xor_sync(0xFFFFFFFFu, words, 1), pair = words + from1;
    const int from2 = __shfl_xor_sync(0xFFFFFFFFu, pair, 2), total = pair + from2;
    const unsigned quad = 0xFu << (threadIdx.x & 28u);
    const bool lone = __popc(__ballot_sync(0xFFFFFFFFu, sole || words == 0) & quad) == 4 && total == 1;
    if (decided && lone) {
        if (sole) results.code[row] = code_of(mine.best, mine.best_tile);
        return;
    }
    const bool fits = decided && total <= row_results::words;
    if (q == 0) results.code[row] = fits ? -1 - total : -2;
    if (!fits) {
        if (q == 0) results.word[row][0] = row_results::everything;
        return;
    }
    int* word = results.word[row] + (q & 1 ? from1 : 0) + (q & 2 ? from2 : 0);
    if (mine.rest >= least) {
        word[0] = row_results::column | q;
    } else if (words > 0) {
        word[0] = mine.best_runner >= least ? group_of(mine.best_tile) : code_of(mine.best, mine.best_tile);
        if (mine.next >= least)
            word[1] = mine.next_runner >= least ? group_of(mine.next_tile) : code_of(mine.next, mine.next_tile);
        if (mine.third >= least) word[2] = group_of(mine.third_tile);
    }
}

/// The exact code of an open row, from its words, by a whole warp.
template <int Codes, class X, class C>
__device__ std::int64_t settle_open(const int* words, int count, const X* row, const matrix_ref<const C>& codebook,
                                    std::int64_t columns) {
    const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 8;
    device::exact_choice choice;
    const auto held_by = [&](std::int64_t tile, std::int64_t at, int q) {  // beyond K: another look at the last code
        const std::int64_t k = tile * Codes + (at >> 1) * 8 + 2 * q + (at & 1);
        return k < codebook.rows ? k : codebook.rows - 1;
    };
    const auto consider = [&](std::int64_t among, auto at) {
        device::consider_codes(choice, row, codebook, columns, among, group, 4, at);
    };
    // Nearly always a few single codes: the groups take one each, at once.
    const int mine = words[min(group, count - 1)];
    const bool single = mine < row_results::column && count <= 4;
    if (__all_sync(0xFFFFFFFFu, single)) {
        choice.consider(device::exact_distance(row, codebook.row(mine), columns), mine);
        count = 0;
    }
    int turn = 0;
    for (int i = 0; i < count; ++i) {
        const int word = words[i];
        if (word == row_results::everything) {
            bool finite = true;
            for (std::int64_t d = lane; d < columns; d += 32) finite = finite && isfinite(static_cast<float>(row[d]));
            if (!__all_sync(0xFFFFFFFFu, finite)) return -1;
            consider(codebook.rows, [](std::int64_t k) { return k; });
        } else if (word & row_results::group) {
            const std::int64_t tile = (word ^ row_results::group) >> 2;
            consider(Codes / 4, [&](std::int64_t at) { return held_by(tile, at, word & 3); });
        } else if (word & row_results::column) {
            const std::int64_t tiles = (codebook.rows - 1) / Codes + 1;
            consider(tiles * (Codes / 4),
                     [&](std::int64_t at) { return held_by(at / (Codes / 4), at % (Codes / 4), word & 3); });
        } else if (turn++ % 4 == group) {
            choice.consider(device::exact_distance(row, codebook.row(word), columns), word);
        }
    }
    __syncwarp();
    choice.merge(0xFFFFFFFFu, 8);
    choice.merge(0xFFFFFFFFu, 16);
    return choice.code;
}

/// The outputs of `count` <= 32 rows from `first` on, by a warp; lane r holds the code of row r.
template <class X, class C>
__device__ void write_rows(const detail::quantize_args<X, C>& a, const search_tally& tally, std::int64_t first,
                           int count, std::int64_t code, double& loss) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < count) {
        a.codes.store(first + lane, code);
        if (tally.histogram && code >= 0) atomicAdd(tally.histogram + code, 1ull);
        if (tally.rows_without && code < 0) atomicAdd(tally.rows_without, 1ull);
    }
    const bool wants_distance = a.distances || tally.loss != nullptr;
    if (!wants_distance && !a.quantized) return;
    for (int base = 0; base < count; base += 4) {  // eight lanes a row
        const int r = base + lane / 8;
        const std::int64_t i = first + r, k = __shfl_sync(0xFFFFFFFFu, code, r & 31);
        if (r >= count) continue;
        if (wants_distance) {
            double distance = __longlong_as_double(0x7FF8000000000000);
            if (k >= 0) distance = device::exact_distance(a.x.row(i), a.codebook.row(k), a.x.columns);
            if (lane % 8 == 0) {
                if (a.distances) a.distances[i] = static_cast<float>(distance);
                if (tally.loss && k >= 0) loss += distance;
            }
        }
        if (a.quantized)
            for (std::int64_t d = lane % 8; d < a.x.columns; d += 8)
                a.quantized.row(i)[d] =
                    static_cast<X>(k < 0 ? __int_as_float(0x7FC00000) : static_cast<float>(a.codebook.row(k)[d]));
    }
    __syncwarp();
}

/// The finishing warp `part` of three: outputs of its share of each warpgroup's rows.
template <class Tile, class X, class C>
__device__ void finish_rows(const detail::quantize_args<X, C>& a, const search_tally& tally, row_results* results,
                            const sm90_barriers<Tile>& barriers, int consumers, int part) {
    constexpr int share = (row_results::rows - 1) / finishing_warps + 1;
    const int lane = static_cast<int>(threadIdx.x) % 32, start = part * share;
    double loss = 0;
    std::uint32_t parity = 0;
    const std::int64_t block_rows = consumers * row_results::rows;
    for (std::int64_t base = blockIdx.x * block_rows; base < a.x.rows; base += gridDim.x * block_rows, parity ^= 1) {
        for (int group = 0; group < consumers; ++group) {
            wait(barriers.results_full + group, parity);
            const std::int64_t first = base + group * row_results::rows + start;
            const std::int64_t left = min(a.x.rows - first, std::int64_t{min(share, row_results::rows - start)});
            const int count = left > 0 ? static_cast<int>(left) : 0;
            std::int64_t code = lane < count ? results[group].code[start + lane] : 0;
            for (unsigned open = __ballot_sync(0xFFFFFFFFu, code < 0); open != 0; open &= open - 1) {
                const int r = __ffs(open) - 1;
                const int words = -1 - static_cast<int>(__shfl_sync(0xFFFFFFFFu, code, r));
                const std::int64_t found = settle_open<image_tile>(results[group].word[start + r], words,
                                                                   a.x.row(first + r), a.codebook, a.x.columns);
                if (lane == r) code = found;
            }
            arrive(barriers.results_empty + group);
            write_rows(a, tally, first, count, code, loss);
        }
    }
    if (tally.loss) {
        for (int step = 8; step < 32; step *= 2) loss += __shfl_xor_sync(0xFFFFFFFFu, loss, step);
        if (lane == 0) tally.loss[finishing_warps * blockIdx.x + part] = loss;
    }
}

#endif  // CUVQ_HAS_WGMMA

/// Codes, quantized rows and distances of all rows of x; leaves `finishing_warps` partial losses per block. `consumers`
/// of the Tile::consumers warpgroups are there. `mask` is `tag_mask` (a parameter, so that clearing and tagging are one
/// instruction).
template <class Tile, class X, class C>
__global__ __launch_bounds__(CUVQ_HAS_WGMMA ? sm90_shared<Tile>::threads() : 32,
                             1) void quantize_sm90(const __grid_constant__ detail::quantize_args<X, C> a,
                                                   const __grid_constant__ codebook_image image,
                                                   const __grid_constant__ search_tally tally, int consumers,
                                                   int mask) {
#if CUVQ_HAS_WGMMA
    namespace ptx = cuda::ptx;
    using shared = sm90_shared<Tile>;
    extern __shared__ char dynamic_shared[];
    char* base = dynamic_shared + ((1024 - (arch::shared_address(dynamic_shared) & 1023)) & 1023);
    char* codes = base;                                              // (stages, 128 codes, steps * 16)
    char* rows = base + shared::rows;                                // (row_buffers, consumers, 64 rows, steps * 16)
    auto* errors = reinterpret_cast<float*>(base + shared::errors);  // (row_buffers, consumers, 64)
    auto* results = reinterpret_cast<row_results*>(base + shared::results);
    auto* centre = reinterpret_cast<float*>(base + shared::centre);
    auto* bounds = reinterpret_cast<int*>(base + shared::bounds);
    const sm90_barriers<Tile> barriers(reinterpret_cast<std::uint64_t*>(base + shared::barriers));

    const int warpgroup = static_cast<int>(threadIdx.x) / 128, warp = static_cast<int>(threadIdx.x) % 128 / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int tiles = static_cast<int>((a.codebook.rows - 1) / image_tile + 1);
    if (threadIdx.x == 0) barriers.init(consumers);
    if (threadIdx.x < 4) bounds[threadIdx.x] = 0;
    __syncthreads();
    for (int d = threadIdx.x; d < 16 * Tile::steps; d += blockDim.x)
        centre[d] = d < a.x.columns ? *image.scale * image.centre[d] : 0.0f;
    for (int i = threadIdx.x; i < tiles * (image_tile / image_part); i += blockDim.x) {
        const code_bounds b = image.bounds[i];
        atomicMax(bounds, __float_as_int(b.norm));
        atomicMax(bounds + 1, __float_as_int(b.residual));
        atomicMax(bounds + 2, __float_as_int(b.offset));
        atomicMax(bounds + 3, __float_as_int(b.offset_rest));
    }
    __syncthreads();

    const std::int64_t block_rows = consumers * row_results::rows;
    if (warpgroup == consumers + 1) {
        const device::score_bounds limits{__int_as_float(bounds[0]), __int_as_float(bounds[1]),
                                          __int_as_float(bounds[2]), __int_as_float(bounds[3])};
        convert_rows<Tile>(a.x, centre, *image.scale, limits, rows, errors, barriers, consumers, warp);
    } else if (warpgroup == consumers) {
        if (warp > 0) {
            finish_rows<Tile>(a, tally, results, barriers, consumers, warp - 1);
        } else if (lane == 0) {
            ring<Tile::stages> stage(1);
            for (std::int64_t first = blockIdx.x * block_rows; first < a.x.rows; first += gridDim.x * block_rows) {
                for (int tile = 0; tile < tiles; ++tile, stage.next()) {
                    std::uint64_t* full = barriers.codes_full + stage.at;
                    while (!ptx::mbarrier_try_wait_parity(barriers.codes_empty + stage.at, stage.parity)) {
                    }
                    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full,
                                                   shared::code_bytes);
                    ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, codes + stage.at * shared::code_bytes,
                                       image.rows + std::int64_t{tile} * shared::code_bytes, shared::code_bytes, full);
                }
            }
        }
    } else {
        const std::uint32_t row_operands = arch::operand(rows), code_operands = arch::operand(codes);
        const int row0 = warp * 16 + lane / 4, row1 = row0 + 8;
        ring<Tile::stages> stage(0);
        ring<Tile::row_buffers> buffer(0);
        std::uint32_t results_parity = 1;
        for (std::int64_t first = blockIdx.x * block_rows; first < a.x.rows; first += gridDim.x * block_rows) {
            const int at = buffer.at * Tile::consumers + warpgroup;
            const std::uint32_t row_operand = arch::uniform(row_operands + at * (shared::row_bytes >> 4));
            wait(barriers.rows_full + at, buffer.parity);
            buffer.next();
            leaders lead0, lead1;
            for (int tile = 0; tile < tiles; ++tile) {
                float score[64];
                wait(barriers.codes_full + stage.at, stage.parity);
                arch::wgmma_fence();
                arch::wgmma_scores<Tile::steps>(score, row_operand,
                                                arch::uniform(code_operands + stage.at * (shared::code_bytes >> 4)));
                arch::wgmma_commit();
                arch::wgmma_wait();
                arrive(barriers.codes_empty + stage.at);
                stage.next();

                int s[64];  // (16 pairs of codes, 2 rows, 2)
#pragma unroll
                for (int i = 0; i < 64; ++i) s[i] = tagged(score[i], mask, i / 4 * 2 + i % 2);
                int top0 = max(s[0], s[1]), top1 = max(s[2], s[3]);
#pragma unroll
                for (int j = 4; j < 64; j += 4) {
                    top0 = __vimax3_s32(top0, s[j], s[j + 1]);
                    top1 = __vimax3_s32(top1, s[j + 2], s[j + 3]);
                }
                // The second largest: as unsigned, s - top is 0 for the largest and wraps to the larger, the closer.
                const unsigned from0 = 0u - static_cast<unsigned>(top0), from1 = 0u - static_cast<unsigned>(top1);
                unsigned near0 = 0, near1 = 0, near2 = 0, near3 = 0;
#pragma unroll
                for (int j = 0; j < 64; j += 4) {
                    near0 = __viaddmax_u32(static_cast<unsigned>(s[j]), from0, near0);
                    near1 = __viaddmax_u32(static_cast<unsigned>(s[j + 1]), from0, near1);
                    near2 = __viaddmax_u32(static_cast<unsigned>(s[j + 2]), from1, near2);
                    near3 = __viaddmax_u32(static_cast<unsigned>(s[j + 3]), from1, near3);
                }
                lead0.offer(top0, static_cast<int>(max(near0, near1) + static_cast<unsigned>(top0)), tile);
                lead1.offer(top1, static_cast<int>(max(near2, near3) + static_cast<unsigned>(top1)), tile);
            }
            const float error0 = errors[at * row_results::rows + row0];
            const float error1 = errors[at * row_results::rows + row1];
            arrive(barriers.rows_empty + at);

            wait(barriers.results_empty + warpgroup, results_parity);
            results_parity ^= 1;
            conclude<image_tile>(lead0, error0, results[warpgroup], row0);
            conclude<image_tile>(lead1, error1, results[warpgroup], row1);
            arrive(barriers.results_full + warpgroup);
        }
    }
#endif  // CUVQ_HAS_WGMMA
}

}  // namespace cuvq::kernel
