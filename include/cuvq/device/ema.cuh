// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// One code's share of an EMA update, by one warp.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/philox.cuh>
#include <cuvq/params.hpp>
#include <cuvq/views.hpp>

namespace cuvq::device {

/// The arrays of an update: state [K codes, D dimensions], counts [K], sums [K x D], replacements [M x D] and
/// replacement_indices [K], null references where there are none; all in device memory.
template <class T, class R>
using ema_arrays = detail::ema_args<T, R>;

/// What an update needs to know beside its arrays, the same for every code.
struct ema_step {
    float keep = 0;         ///< decay, as float
    float take = 0;         ///< 1 - decay, formed in double, as float
    std::int64_t step = 0;  ///< updates made before this one
    double total = 0;       ///< sum of the blended cluster sizes; for `laplace` and `usage_ratio`
};

/// The blended cluster size of a code, and what may happen to it.
struct ema_size {
    float size;          ///< the size after the blend
    std::int32_t steps;  ///< updates since a vector last had the code, after this one
    bool sound;          ///< counts and sums are finite, counts not negative: the update may touch the code
    bool active;         ///< sound, and the batch had a row of it
    bool blend;          ///< sound, and the rule moves it: active, or any code under the rules that decay every code
};

/// keep * old + take * now, as the blend rounds it: two roundings, on every path.
__device__ inline float ema_mix(const ema_step& e, float old, float now) {
    return __fmaf_rn(e.keep, old, __fmul_rn(e.take, now));
}

/// Size of code k after the blend. Called by a whole warp, converged; every lane gets it. Reads only. O(D).
template <class T, class R>
__device__ ema_size blended_size(const ema_arrays<T, R>& a, const ema_params& p, const ema_step& e, std::int64_t k) {
    const float n = a.counts[k], old = a.state.cluster_size[k];
    const std::int32_t steps = a.state.steps_since_active[k];
    bool finite = isfinite(n) && n >= 0;
    for (std::int64_t d = threadIdx.x % 32; d < a.sums.columns; d += 32) finite = finite && isfinite(a.sums.row(k)[d]);
    ema_size s;
    s.sound = __all_sync(0xFFFFFFFFu, finite);
    s.active = s.sound && n > 0;
    s.blend = s.sound && (s.active || p.rule != ema_rule::active_only);
    s.size = s.blend ? ema_mix(e, old, n) : old;
    s.steps = s.active ? 0 : steps < 0x7FFFFFFF ? steps + 1 : steps;
    return s;
}

/// Blend and codebook refresh of code k, and its counter of unused steps, by the rule in `p` (see `ema_rule` for the
/// formulas and their sources).
///
/// @param a  arrays: state in/out, in global memory; counts and sums in, in any.
/// @param e  the step; `total` only for `ema_rule::laplace`.
/// @param s  `blended_size` of k.
/// Called by a whole warp, converged. Returns true if the code was left wholly as it was, since its counts, sums or
/// new row were not finite. Deterministic. O(D). No other warp may work on k at the same time.
template <class T, class R>
__device__ bool ema_blend(const ema_arrays<T, R>& a, const ema_params& p, const ema_step& e, const ema_size& s,
                          std::int64_t k) {
    const std::int64_t columns = a.sums.columns;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float divide = fmaxf(s.size, p.epsilon);
    if (p.rule == ema_rule::laplace) {
        const double correction = p.bias_correction ? 1.0 - pow(p.decay, static_cast<double>(e.step + 1)) : 1.0;
        const double total = e.total / correction, codes = static_cast<double>(a.counts.size);
        divide =
            static_cast<float>((s.size / correction + p.epsilon) / (total + codes * p.epsilon) * total * correction);
    }
    // The new sums and row, of as many columns as a lane has in registers.
    constexpr int each = 2;
    float sum[each];
    T row[each];
    const auto blend = [&](std::int64_t from) {
        float old[each];
#pragma unroll
        for (int i = 0; i < each; ++i)
            old[i] = from + 32 * i < columns ? a.state.embed_sum.row(k)[from + 32 * i] : 0.0f;
#pragma unroll
        for (int i = 0; i < each; ++i) {
            sum[i] = from + 32 * i < columns ? ema_mix(e, old[i], a.sums.row(k)[from + 32 * i]) : 0.0f;
            row[i] = static_cast<T>(__fdiv_rn(sum[i], divide));
        }
    };

    // Look before writing: a state of nothing but zeros knows no row, so the codebook keeps the one it has; and a row
    // that would not be finite must leave the whole code alone.
    bool zero = s.size == 0, finite = isfinite(s.size);
    if (s.blend) {
#pragma unroll 1
        for (std::int64_t from = lane; from - lane < columns; from += 32 * each) {
            blend(from);
#pragma unroll
            for (int i = 0; i < each; ++i) {
                zero = zero && sum[i] == 0;
                finite = finite && isfinite(sum[i]) && isfinite(static_cast<float>(row[i]));
            }
        }
    }
    const bool refresh = s.blend && !__all_sync(0xFFFFFFFFu, zero);
    if (!s.sound || (refresh && !__all_sync(0xFFFFFFFFu, finite))) return true;
    if (s.blend) {
#pragma unroll 1
        for (std::int64_t from = lane; from - lane < columns; from += 32 * each) {
            if (columns > 32 * each) blend(from);
#pragma unroll
            for (int i = 0; i < each; ++i) {
                if (from + 32 * i >= columns) continue;
                a.state.embed_sum.row(k)[from + 32 * i] = sum[i];
                if (refresh) a.state.codebook.row(k)[from + 32 * i] = row[i];
            }
        }
    }
    if (lane == 0) {
        a.state.cluster_size[k] = s.size;
        a.state.steps_since_active[k] = s.steps;
    }
    __syncwarp();
    return false;
}

/// Row of `a.replacements` that code k restarts from: the one named or drawn, else the next within 64, cyclically,
/// that is finite and stays so in the state (as T, and times `reset`); -1 if none is. Whole warp, converged.
template <class T, class R>
__device__ std::int64_t replacement_row(const ema_arrays<T, R>& a, const ema_params& p, const ema_step& e,
                                        std::int64_t k, float reset) {
    const std::int64_t rows = a.replacements.rows;
    if (rows == 0) return -1;
    const std::int64_t first = a.replacement_indices ? a.replacement_indices[k] : philox_row(p.seed, e.step, k, rows);
    if (first < 0 || first >= rows) return -1;
    for (std::int64_t t = 0; t <= 64 && t < rows; ++t) {
        const std::int64_t row = first + t < rows ? first + t : first + t - rows;
        bool fits = true;
        for (std::int64_t d = threadIdx.x % 32; d < a.replacements.columns; d += 32) {
            const float v = static_cast<float>(a.replacements.row(row)[d]);
            fits =
                fits && isfinite(v) && isfinite(static_cast<float>(static_cast<T>(v))) && isfinite(__fmul_rn(reset, v));
        }
        if (__all_sync(0xFFFFFFFFu, fits)) return row;
    }
    return -1;
}

/// Gives code k a new row if the dead-code rule in `p` says so (see `dead_code_rule` for the rules and their
/// sources). Called by a whole warp, converged, after `ema_blend` of the same code did not skip it.
///
/// @param e  the step; `total` only for `dead_code_rule::usage_ratio`.
/// @param s  `blended_size` of k.
/// Returns whether it did. Deterministic: the draw depends on seed, step and k alone. O(D), O(65 D) at worst.
template <class T, class R>
__device__ bool dead_code_refresh(const ema_arrays<T, R>& a, const ema_params& p, const ema_step& e, const ema_size& s,
                                  std::int64_t k) {
    const auto mean_size = [&] { return e.total / static_cast<double>(a.counts.size); };
    bool dead = false;
    float reset = 0;
    switch (p.dead_codes) {
        case dead_code_rule::none: return false;
        case dead_code_rule::unused_steps: dead = s.steps >= p.restart_after_steps; break;
        case dead_code_rule::min_cluster_size:
            dead = s.size < p.min_cluster_size;
            reset = p.reset_cluster_size;
            break;
        case dead_code_rule::usage_ratio:
            dead = (e.step + 1) % p.check_every == 0 && s.size < p.usage_ratio * mean_size();
            reset = static_cast<float>(p.reset_usage_ratio * mean_size());
            break;
    }
    if (!dead) return false;
    const std::int64_t from = replacement_row(a, p, e, k, reset);
    if (from < 0) return false;
    for (std::int64_t d = threadIdx.x % 32; d < a.sums.columns; d += 32) {
        const float v = static_cast<float>(a.replacements.row(from)[d]);
        a.state.codebook.row(k)[d] = static_cast<T>(v);
        a.state.embed_sum.row(k)[d] = __fmul_rn(reset, v);
    }
    if (threadIdx.x % 32 == 0) {
        a.state.cluster_size[k] = reset;
        a.state.steps_since_active[k] = 0;
    }
    return true;
}

}  // namespace cuvq::device
