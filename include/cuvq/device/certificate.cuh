// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Exact codes: a fast filter finds every code that could win, float64 decides between them.
//
// What "exact" means. The code of a row is the lowest k that minimises
//     d64(x, c) = ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7)),
//     pj = sum, in ascending order of d, over all d with floor(d / 4) mod 8 = j of fma(x_d - c_d, x_d - c_d, pj),
// every operation rounded to double (`squared_distances`). With e64 = (D + 8) 2^-52, |d64 - d| <= e64 d for the real
// distance d: a difference of two floats has one rounding, its square two of those and one of the fma, and no sum is
// longer than D; floats are too large and too small to overflow or underflow a double's square.
//
// The SIMT filter (arch/simt.cuh) sums fl(x_d - c_d)^2 in float by fma, in any order. With u = 2^-24 and every rounding
// written out, its value f satisfies
//     |f - d| <= e d + t,   e = (D + 8) u,   t = D 2^-120.
// A difference contributes 1 + 2u at most (one rounding; the second u pays for subnormals that a compiler flag may
// flush: a flushed operand changes a difference above 2^-100 by less than u of itself, and below that the square is
// under 2^-200, which t covers); its square doubles that; each of at most D additions contributes 1 + u. So all
// factors lie within (1 + u)^(D + 4), which is at most 1 + 1.04 e, and at least 1 - e, while e <= 2^-4. Underflow of a
// product or a sum adds at most 2^-125 each.
//   Let b have the least f, and w be the exact code. Then d64_w <= d64_b, so
//     d_w <= d_b (1 + e64) / (1 - e64),
//     f_w <= (1 + e) d_w + t <= (1 + e)(1 + 3 e64) / (1 - e) (f_b + t) + t <= (1 + 3 e) f_b + 3 t,
// with 1.04 e for e above, using e <= 2^-4 and e64 far below u. `filter_limit` is that right-hand side, rounded up.
// Codes with f above it cannot win. Overflow: f may be Inf where d is finite, but only where d > 2^127; the limit is
// trusted up to 2^126, so such codes lose rightly, and where the limit itself is larger (or NaN) the row takes the full
// float64 pass.
//
// The tensor-core filter (kernel/quantize_sm90.cuh, kernel/quantize_sm90_few.cuh, device/nearest_mma.cuh) compares
// scores. With any centre m and powers of two s and t (t the row's own), X = t s (x - m), C_k = s (c_k - m) and
// n_k = g - |C_k|^2 / 2 for any g,
//     S_k = X . C_k + t n_k = const(x) - t s^2 |x - c_k|^2 / 2,
// so the nearest code has the largest S. It computes S^_k from X^ = fp16(X), C^ = fp16(C) and n_k in three halves. By
// Cauchy-Schwarz and the triangle inequality, |S^_k - S_k| is at most the sum of
//   operands      |X| |C - C^| + |X - X^| |C^|, since X.C - X^.C^ = X.(C - C^) + (X - X^).C^. Both residuals are
//                 measured when converting (subnormals and saturation show in them), in double for C; for x, x - m is
//                 rounded once in float, which adds 2^-23 |X| to |X - X^| with room to spare;
//   accumulation  products of halves are exact in float. Each step adds 16 of them to the accumulator.
//                 How it aligns and cuts the 17 terms is not documented; measurements on the generations before Hopper
//                 see each cut below the last of at least 24 bits of the largest, by less than 2^-23 of that (Fasi,
//                 Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021), and so is the sum when
//                 it is rounded to float. The bound assumes nearly twice that, 2^-22 of the largest term for each of
//                 the 17; in tests/device/certificate_test.cu, an H200 loses about an eighth of it. "Largest" is by
//                 exponents: an operand that is subnormal counts as 2^-14 (the test shows that it does). So no term is
//                 larger than (|X^| + 2^-14) (|C^| + 2^-14) + (t + 2^-14) (|n| + 2^-14): a partial sum of products is
//                 at most |X^| |C^|, and the first of n's halves at most 2^-11 of n above it, which the spare half of
//                 the bound pays for;
//   norm          t |n_k - three halves|, measured in double;
//   float64       the distance of scores that d64 cannot tell apart: e64 of t s^2 |x - c|^2, at most
//                 (D + 8) 2^-50 (|X| + t |C|)^2 / t with the slack of its own evaluation.
// Rows of up to four elements (`operand_columns`) enter twofold: X^ = H + L with H = fp16(X) and L = fp16(X - H), C^
// likewise, and the product of the low halves is left out. Where fp16 is subnormal L is 0, else each |L_d| <= 2^-11
// |H_d|; so leaving it out costs at most 2^-22 |H| |H_C|, which 2^-21 |X| in |X - X^| covers, and no partial sum of
// products exceeds (1 + 2^-10) |H| |H_C| <= 1.002 |X^| |C^|, which the image's |C^| is 1.002 times too large for.
// `score_error` is the sum, e, with the norms of C their maxima over the codebook; the factors by which the callers
// round their norms up (1.0005, 1.0001) pay for the float arithmetic that evaluates it. If b has the largest S^ and w
// is the exact code, S_w >= S_b - (the float64 part of e), and each S^ is within the rest of e of its S, so S^_w >=
// S^_b - 2 e: codes below that cannot win. Tagging a score's low 5 bits moves it by less than 2^-18 of itself, two
// scores by 2^-17: the limit is lowered by that of the best (of 7 bits, by four times as much). That holds unless a
// score is 0; others are at least 2^-48. The comparison is one of integers, right for positive floats only. So a row
// whose limit is not above 0 by more than a tag, or is NaN because a norm is (the row or a code did not fit fp16),
// takes the full float64 pass. Codes that are not finite have n = -60000 t, so they lose to any positive limit.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/views.hpp>

namespace cuvq::device {

/// v as double, subnormals included whatever the compiler's flags make of them elsewhere.
__device__ inline double widened(float v) {
    double w;
    asm("cvt.f64.f32 %0, %1;" : "=d"(w) : "f"(v));
    return w;
}

/// The root of v >= 0 to within 2^-22 of itself; 0 below 2^-126.
__device__ inline float approximate_root(float v) {
    float r;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

/// Threads that compute one exact distance together: eight consecutive lanes of a warp, aligned to eight.
inline constexpr int exact_lanes = 8;

/// Whether four elements at a time can be loaded from `p`.
template <class T>
CUVQ_HOST_DEVICE bool is_aligned4(const T* p) {
    return reinterpret_cast<std::uintptr_t>(p) % (4 * sizeof(T)) == 0;
}

/// Four consecutive elements, as float, in one load.
template <class T>
__device__ float4 load4(const T* p) {
    if constexpr (sizeof(T) == 4) {
        return *reinterpret_cast<const float4*>(p);
    } else {
        const uint2 raw = *reinterpret_cast<const uint2*>(p);
        const T* v = reinterpret_cast<const T*>(&raw);
        return {static_cast<float>(v[0]), static_cast<float>(v[1]), static_cast<float>(v[2]), static_cast<float>(v[3])};
    }
}

/// Four consecutive elements of a row from `column` on, as float, zeros from `columns` on.
template <class T>
__device__ float4 load4(const T* row, std::int64_t column, std::int64_t columns) {
    const auto at = [&](std::int64_t d) { return d < columns ? static_cast<float>(row[d]) : 0.0f; };
    return {at(column), at(column + 1), at(column + 2), at(column + 3)};
}

/// Whether all elements of a row are finite. Called by a whole warp, converged; every lane gets the answer.
template <class T>
__device__ bool is_row_finite(const T* row, std::int64_t columns) {
    bool finite = true;
    for (std::int64_t d = threadIdx.x % 32; d < columns; d += 32)
        finite = finite && isfinite(static_cast<float>(row[d]));
    return __all_sync(0xFFFFFFFFu, finite);
}

/// sum + (u - v)^2, with the head comment's roundings: those of d64, and of the filter.
__device__ inline void add_square(double& sum, float u, float v) {
    const double difference = __dsub_rn(widened(u), widened(v));
    sum = __fma_rn(difference, difference, sum);
}
__device__ inline void add_square(float& sum, float u, float v) { sum = fmaf(u - v, u - v, sum); }
__device__ inline double sum_of(double a, double b) { return __dadd_rn(a, b); }
__device__ inline float sum_of(float a, float b) { return a + b; }

/// In double d64(x, c) of the head comment, in float the SIMT filter's value, for several codes at once, of rows of
/// `columns` elements in any memory. Called by all eight lanes of a group with the same arguments; every lane gets the
/// sums. Not finite if an element is not. `Once`: few instructions, for code that runs once, and so from a cold cache.
template <bool Once = false, class Sum, int Codes, class X, class C>
__device__ void squared_distances(const X* x, const C* const (&codes)[Codes], std::int64_t columns,
                                  Sum (&distances)[Codes]) {
    const unsigned lane = threadIdx.x & 31u, mask = 0xFFu << (lane & 24u);
    const std::int64_t first = 4 * (lane & 7u);
#pragma unroll
    for (int k = 0; k < Codes; ++k) distances[k] = 0;
    const auto add_four = [&](const float4& a, const float4(&b)[Codes]) {
#pragma unroll
        for (int k = 0; k < Codes; ++k) {
            add_square(distances[k], a.x, b[k].x);
            add_square(distances[k], a.y, b[k].y);
            add_square(distances[k], a.z, b[k].z);
            add_square(distances[k], a.w, b[k].w);
        }
    };
    bool aligned = columns % 4 == 0 && is_aligned4(x);
#pragma unroll
    for (int k = 0; k < Codes; ++k) aligned = aligned && is_aligned4(codes[k]);
    float4 b[Codes];
    constexpr int ahead = Codes <= 2 ? 4 : 2;
    if (aligned && Once) {
#pragma unroll 1
        for (std::int64_t start = 0; start < columns; start += 4 * exact_lanes * ahead) {
            float4 a_next[ahead], b_next[ahead][Codes];
#pragma unroll
            for (int i = 0; i < ahead; ++i) {
                const std::int64_t d = start + 4 * exact_lanes * i + first;
                a_next[i] = d < columns ? load4(x + d) : float4{0, 0, 0, 0};
#pragma unroll
                for (int k = 0; k < Codes; ++k) b_next[i][k] = d < columns ? load4(codes[k] + d) : float4{0, 0, 0, 0};
            }
#pragma unroll
            for (int i = 0; i < ahead && start + 4 * exact_lanes * i < columns; ++i) add_four(a_next[i], b_next[i]);
        }
    } else if (aligned) {  // one branch for all loads, so that they overlap
#pragma unroll(ahead)
        for (std::int64_t d = first; d < columns; d += 4 * exact_lanes) {
            const float4 a = load4(x + d);
#pragma unroll
            for (int k = 0; k < Codes; ++k) b[k] = load4(codes[k] + d);
            add_four(a, b);
        }
    } else {  // beyond the end both are 0, which adds nothing
        for (std::int64_t d = first; d < columns; d += 4 * exact_lanes) {
            const float4 a = load4(x, d, columns);
#pragma unroll
            for (int k = 0; k < Codes; ++k) b[k] = load4(codes[k], d, columns);
            add_four(a, b);
        }
    }
#pragma unroll
    for (int step = 1; step < exact_lanes; step *= 2)
#pragma unroll
        for (int k = 0; k < Codes; ++k) distances[k] = sum_of(distances[k], __shfl_xor_sync(mask, distances[k], step));
}

/// d64(x, c), of one code. `Once`: as squared_distances.
template <bool Once = false, class X, class C>
__device__ double exact_distance(const X* x, const C* code, std::int64_t columns) {
    const C* const codes[1] = {code};
    double distance[1];
    squared_distances<Once>(x, codes, columns, distance);
    return distance[0];
}

/// d64(x, c) of the head comment by one thread alone: for rows too short to share.
template <class X, class C>
__device__ double exact_distance_alone(const X* x, const C* code, std::int64_t columns) {
    double p[exact_lanes] = {};
    const bool aligned = columns % 4 == 0 && is_aligned4(x) && is_aligned4(code);
    for (std::int64_t first = 0; first < columns; first += 4 * exact_lanes) {
#pragma unroll
        for (int j = 0; j < exact_lanes; ++j) {
            const std::int64_t d = first + 4 * j;
            if (d >= columns) break;
            const float4 a = aligned ? load4(x + d) : load4(x, d, columns);
            const float4 b = aligned ? load4(code + d) : load4(code, d, columns);
            add_square(p[j], a.x, b.x);
            add_square(p[j], a.y, b.y);
            add_square(p[j], a.z, b.z);
            add_square(p[j], a.w, b.w);
        }
    }
#pragma unroll
    for (int step = 1; step < exact_lanes; step *= 2) {
#pragma unroll
        for (int j = 0; j < exact_lanes; j += 2 * step) p[j] = __dadd_rn(p[j], p[j + step]);
    }
    return p[0];
}

/// Whether (distance, code) comes before (other_distance, other_code): nearer, or as near and lower.
__device__ inline bool comes_before(double distance, std::int64_t code, double other_distance,
                                    std::int64_t other_code) {
    return distance < other_distance || (distance == other_distance && code < other_code);
}

/// The nearest code that a thread has seen; -1 before the first.
struct exact_choice {
    double distance = __builtin_huge_val();
    std::int64_t code = -1;

    __device__ void consider(double d, std::int64_t k) {
        if (isfinite(d) && (code < 0 || comes_before(d, k, distance, code))) {
            distance = d;
            code = k;
        }
    }
    /// Takes over the choice of the lane `lane ^ step`, if better.
    __device__ void merge(unsigned mask, int step) {
        const double d = __shfl_xor_sync(mask, distance, step);
        const std::int64_t k = __shfl_xor_sync(mask, code, step);
        if (k >= 0) consider(d, k);
    }
};

/// The choice of a block of `Warps` warps, from those of its lanes; in warp 0. All threads call it. `room` [Warps]:
/// shared memory that nobody uses any more, and that may be used again after the next barrier.
template <int Warps>
__device__ void merge_block(exact_choice& choice, exact_choice* room) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) choice.merge(0xFFFFFFFFu, step);
    if (threadIdx.x % 32 == 0) room[warp] = choice;
    __syncthreads();
    if (warp != 0) return;
    for (int w = 1; w < Warps; ++w)
        if (room[w].code >= 0) choice.consider(room[w].distance, room[w].code);
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

/// One of `parts` equal shares of `all` items: its first, and how many, below 1 if there are none left.
struct share_of {
    std::int64_t first, count;

    __device__ share_of(std::int64_t all, int part, int parts) {
        const std::int64_t each = (all - 1) / parts + 1;
        first = part * each;
        count = min(each, all - first);
    }
};

/// Considers those of the codes at(0) .. at(count - 1) that group `group` of `groups` groups of eight lanes is to take
/// and that the filter does not rule out: some at a time, so that their loads overlap. `at` may name a code twice.
template <class X, class C, class At>
__device__ void consider_codes(exact_choice& choice, const X* row, const matrix_ref<const C>& codebook,
                               std::int64_t columns, std::int64_t count, int group, int groups, At at) {
    constexpr int batch = 4;
    const auto code_at = [&](std::int64_t i) { return at(i < count ? i : count - 1); };
    float least = __int_as_float(0x7F800000);
    for (std::int64_t i = std::int64_t{group} * batch; i < count; i += std::int64_t{groups} * batch) {
        const C* codes[batch];
        float near[batch];
#pragma unroll
        for (int j = 0; j < batch; ++j) codes[j] = codebook.row(code_at(i + j));
        squared_distances(row, reinterpret_cast<const C* const(&)[batch]>(codes), columns, near);
#pragma unroll
        for (int j = 0; j < batch; ++j) least = fminf(least, near[j]);  // which is not NaN
        const float limit = filter_limit(least, columns);
        int open = 0;
#pragma unroll
        for (int j = 0; j < batch; ++j) open |= near[j] > limit ? 0 : 1 << j;  // NaN rules nothing out
        if (open == (1 << batch) - 1) {  // as of copies, and where the filter decides nothing
            double distances[batch];
            squared_distances(row, reinterpret_cast<const C* const(&)[batch]>(codes), columns, distances);
#pragma unroll
            for (int j = 0; j < batch; ++j) choice.consider(distances[j], code_at(i + j));
            continue;
        }
        for (; open != 0; open &= open - 1) {
            const std::int64_t k = code_at(i + __ffs(open) - 1);
            choice.consider(exact_distance(row, codebook.row(k), columns), k);
        }
    }
}

/// What the tensor-core filter knows of the codebook: largest norms over all codes, rounded up.
struct score_bounds {
    float norm = 0;         ///< |C^|
    float residual = 0;     ///< |C - C^|
    float offset = 0;       ///< |n|
    float offset_rest = 0;  ///< |n - (n in three halves)|
};

/// The power of two t that makes a row of this |s (x - centre)|^2 fit fp16, which can hold t itself; 0 if there is
/// none, for NaN too.
__device__ inline float row_factor(float square) {
    const int exponent = static_cast<int>(__float_as_uint(square) >> 24) - 63;  // the norm is below 2^(exponent + 1)
    return square < 0x1p26f ? 1.0f : square < 0x1p72f ? __int_as_float((127 + 13 - exponent) << 23) : 0.0f;
}

/// The t of a row that does not fit with t = 1; NaN where none does.
__device__ inline float fitting_factor(float square) {
    const float factor = row_factor(square);
    return factor > 0 ? factor : __int_as_float(0x7FC00000);
}

/// Bound of |S^ - S| for one row and every code: the head comment's e.
/// @param length    |X|, at least
/// @param residual  |X - X^|, at least
/// @param factor    t, the row's own power of two
/// @param steps     k16 steps of the product
__device__ inline float score_error(float length, float residual, float factor, const score_bounds& c, int steps) {
    const float image = length + residual, code = c.norm + c.residual;
    const float spread = image + factor * code;
    const float operand = length * c.residual + residual * c.norm;
    constexpr float least = 0x1p-14f;  // as what each half counts at least
    const float accumulation = static_cast<float>(17 * steps) * 0x1p-22f *
                               ((image + least) * (c.norm + least) + (factor + least) * (c.offset + least));
    const float exact = static_cast<float>(16 * steps + 8) * 0x1p-50f * __fdividef(spread * spread, factor);
    return 1.0001f * (operand + accumulation + factor * c.offset_rest + exact);
}

}  // namespace cuvq::device
