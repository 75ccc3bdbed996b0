// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Exact codes: a fast filter finds every code that could win, float64 decides between them.
//
// What "exact" means. The code of a row is the lowest k that minimises
//     d64(x, c) = ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7)),
//     pj = sum over d = j, j + 8, j + 16, ... in that order of fma(x_d - c_d, x_d - c_d, pj),
// every operation rounded to double (`exact_distance`). With e64 = (D + 8) 2^-52, |d64 - d| <= e64 d for the real
// distance d: a difference of two floats has one rounding, its square two of those and one of the fma, and no sum is
// longer than D / 8 + 3; floats are too large and too small to overflow or underflow a double's square.
//
// What the filter knows (arch/simt.cuh). It sums fl(x_d - c_d)^2 in float by fma, in any order. With u = 2^-24 and
// every rounding written out, its value f satisfies
//     |f - d| <= e d + t,   e = (D + 8) u,   t = D 2^-120.
// A difference contributes 1 + 2u at most (one rounding; the second u pays for subnormals that a compiler flag may
// flush: a flushed operand changes a difference above 2^-100 by less than u of itself, and below that the square is
// under 2^-200, which t covers); its square doubles that; each of at most D additions contributes 1 + u. So all
// factors lie within (1 + u)^(D + 4), which is at most 1 + (D + 8) u, and at least 1 - (D + 8) u, while
// (D + 8) u <= 2^-4. Underflow of a product or a sum adds at most 2^-125 each.
//
// Why nothing is missed. Let b have the least f, and w be the exact code. Then d64_w <= d64_b, so
//     d_w <= d_b (1 + e64) / (1 - e64),
//     f_w <= (1 + e) d_w + t <= (1 + e)(1 + 3 e64) / (1 - e) (f_b + t) + t <= (1 + 3 e) f_b + 3 t,
// using e <= 2^-4 and e64 far below u. `filter_limit` is that right-hand side, rounded up. Codes with f above it
// cannot win. Overflow: f may be Inf where d is finite, but only where d > 2^127; the limit is trusted up to 2^126,
// so such codes lose rightly, and where the limit itself is larger (or NaN) the row takes the full float64 pass.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

namespace cuvq::device {

/// Threads that compute one exact distance together: eight consecutive lanes of a warp.
inline constexpr int exact_lanes = 8;

/// The eight lanes of this thread's group, as a mask.
__device__ inline unsigned exact_mask(unsigned lane) { return 0xFFu << (lane & 24u); }

/// d64(x, c) of the head comment, of rows of `columns` elements in any memory. Called by all eight lanes of a group
/// (aligned to 8 in the warp), with the same arguments; every lane gets the sum. Not finite if an element is not.
template <class X, class C>
__device__ double exact_distance(const X* x, const C* c, std::int64_t columns) {
    const unsigned lane = threadIdx.x & 31u, mask = exact_mask(lane);
    double sum = 0;
    for (std::int64_t d = lane & 7u; d < columns; d += exact_lanes) {
        const double difference =
            __dsub_rn(static_cast<double>(static_cast<float>(x[d])), static_cast<double>(static_cast<float>(c[d])));
        sum = __fma_rn(difference, difference, sum);
    }
#pragma unroll
    for (int step = 1; step < exact_lanes; step *= 2) sum = __dadd_rn(sum, __shfl_xor_sync(mask, sum, step));
    return sum;
}

/// The largest filter value that the exact code can have when the least one is `least`, or NaN where the filter
/// decides nothing. Monotone in `least`.
__device__ inline float filter_limit(float least, std::int64_t columns) {
    constexpr float u = 0x1p-24f, largest = 0x1p126f;
    const float terms = static_cast<float>(columns + 8);
    if (!(terms <= 0x1p20f)) return __int_as_float(0x7FC00000);
    const float factor = __fadd_ru(1.0f, __fmul_ru(3.0f * u, terms));
    const float limit = __fmaf_ru(least, factor, __fmul_ru(3.0f * 0x1p-120f, terms));
    return limit <= largest ? limit : __int_as_float(0x7FC00000);
}

/// Whether (distance, code) comes before (other_distance, other_code): nearer, or as near and lower.
__device__ inline bool comes_before(double distance, std::int64_t code, double other_distance,
                                    std::int64_t other_code) {
    return distance < other_distance || (distance == other_distance && code < other_code);
}

}  // namespace cuvq::device
