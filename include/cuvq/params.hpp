// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What a call may choose, with ranges and defaults, and what a step reports. Plain structs, the same for the GPU
// functions and for `cuvq::reference`; pointers and views in them are device memory for the former, host memory for
// the latter.
#pragma once

#include <cstdint>

#include <cuvq/views.hpp>
#include <cuvq/workspace.hpp>

namespace cuvq {

/// What "nearest" means.
enum class metric {
    l2,  ///< least squared Euclidean distance
};

/// How sure a code must be.
enum class accuracy {
    exact,  ///< the code of a float64 brute force, lowest index on ties
    /// A code whose squared distance is above the least by at most 2^-8 (|x - m| + max |c - m|)^2, m near the
    /// codebook's mean, in practice by far less: one pass of the tensor cores in half precision decides. Repeatable,
    /// lowest index on equal scores. Only on Hopper and for D up to 269; elsewhere codes are exact.
    fast,
};

/// How a batch's statistics n (counts) and s (sums) move the state. g is the decay, e is epsilon.
enum class ema_rule {
    /// Only codes with n > 0 move: cluster_size = g cluster_size + (1-g) n, embed_sum likewise,
    /// codebook = embed_sum / max(cluster_size, e). Source: RecTokens, `ema_update`.
    active_only,
    /// Every code decays; codebook = embed_sum / m with the Laplace-smoothed size
    /// m = (cluster_size + e) / (total + K e) * total, total = sum of cluster_size.
    /// Source: Sonnet `VectorQuantizerEMA`, vector-quantize-pytorch, EnCodec.
    laplace,
    /// Every code decays; codebook = embed_sum / max(cluster_size, e). Source: Mimi (moshi).
    clamp,
};

/// Which codes an update gives a new row. The row r is drawn from `replacements` (in `ema_update` and `train_step`:
/// x), never a row with a NaN or Inf.
enum class dead_code_rule {
    none,
    /// Dead when steps_since_active reaches `restart_after_steps`; codebook = r, cluster_size = 0, embed_sum = 0.
    /// Source: RecTokens.
    unused_steps,
    /// Dead when cluster_size < `min_cluster_size` after the blend; codebook = r, cluster_size = reset,
    /// embed_sum = reset r with reset = `reset_cluster_size`. Source: vector-quantize-pytorch.
    min_cluster_size,
    /// Dead when cluster_size < `usage_ratio` total / K after the blend, looked at in every `check_every`-th update;
    /// reset as above with reset = `reset_usage_ratio` total / K. Source: Mimi (moshi).
    usage_ratio,
};

/// The state a codebook starts from (see `codebook::init_from_rows`).
enum class initial_statistics {
    zeros,         ///< cluster_size = 0, embed_sum = 0
    one_per_code,  ///< cluster_size = 1, embed_sum = codebook
};

/// What one call saw, overwritten by each call that is given one. A field that the call has no part in is 0, and so
/// is a mean over nothing.
struct step_stats {
    /// Mean of (x - codebook row)^2 over D and the rows that have a code, as exact as `distances`; without a weight.
    double commitment_loss = 0;
    double perplexity = 0;             ///< exp(-sum p ln p), p = each code's share of the batch
    std::int64_t active_codes = 0;     ///< codes with at least one row (of positive weight)
    std::int64_t restarted_codes = 0;  ///< dead codes that got a new row
    std::int64_t invalid_rows = 0;     ///< rows left out: NaN or Inf, bad weight, code outside [0, K)
    std::int64_t skipped_codes = 0;    ///< codes left as they were since n, s or the new row was not finite
};

struct quantize_params {
    cuvq::metric metric = cuvq::metric::l2;
    cuvq::accuracy accuracy = cuvq::accuracy::exact;
    /// Where to write commitment_loss, perplexity, active_codes and invalid_rows; null: nowhere.
    step_stats* stats = nullptr;
    /// What `prepare` made of this very codebook, as it stands; empty: the call prepares it for itself.
    prepared_codebook prepared{};
};

struct accumulate_params {
    /// [N] weight of each row, finite and not negative (else the row is left out); null: all 1.
    vector_view<const float> weights{};
    /// true: add onto what counts and sums hold (micro-batches); false: overwrite them.
    bool add = false;
    /// Where to write perplexity and active_codes (of counts as they stand after the call) and invalid_rows (of this
    /// call); null: nowhere.
    step_stats* stats = nullptr;
};

/// Parameters of an EMA update.
///
/// Presets, each with its system's defaults:
///
/// | preset                  | rule        | decay | epsilon | dead codes                          | starts from  |
/// |-------------------------|-------------|-------|---------|-------------------------------------|--------------|
/// | rectokens()             | active_only | 0.99  | 1e-5    | unused_steps, after 20 steps        | zeros        |
/// | sonnet()                | laplace, bias_correction | 0.99 | 1e-5 | none                       | zeros        |
/// | vector_quantize_pytorch() | laplace   | 0.8   | 1e-5    | min_cluster_size 2, reset 2         | one_per_code |
/// | encodec()               | laplace     | 0.99  | 1e-5    | min_cluster_size 2, reset 2         | one_per_code |
/// | mimi()                  | clamp       | 0.99  | 1e-5    | usage_ratio 0.1, reset 1, every 5   | one_per_code |
///
/// Where a preset differs from its source, on purpose:
/// - sonnet: a code that never had a row keeps its codebook row; Sonnet writes zeros over it. Sonnet has no default
///   decay; 0.99 is the one of its VQ-VAE example.
/// - vector_quantize_pytorch: `min_cluster_size` is the default of its `EuclideanCodebook`; its outer class
///   `VectorQuantize` passes 0, which is `dead_code_rule::none` here. Rows are drawn with replacement.
/// - encodec: repairs a bug. EnCodec writes a replacement row to its codebook only and then overwrites it from the
///   old statistics in the same step, so the replacement is lost; here the statistics are reset with it. EnCodec
///   starts from k-means with its cluster sizes; without k-means one_per_code is the start that keeps the rows.
/// - encodec, mimi: dead codes are looked for after the blend; there, before it.
struct ema_params {
    ema_rule rule = ema_rule::active_only;
    /// g in [0, 1]. 0: the batch replaces the statistics; 1: they stay, and the codebook is refreshed from them.
    double decay = 0.99;
    /// e > 0, finite: the least cluster size that is divided by.
    float epsilon = 1e-5f;
    /// `laplace` only: divide both averages by 1 - g^t, t = the updates made, this one included, before use; the
    /// state keeps the undivided ones. Not with decay = 1. Source: Sonnet `ExponentialMovingAverage`.
    bool bias_correction = false;

    cuvq::dead_code_rule dead_codes = cuvq::dead_code_rule::none;
    /// `unused_steps`: at least 1.
    std::int32_t restart_after_steps = 20;
    /// `min_cluster_size`: the threshold, > 0, finite.
    float min_cluster_size = 2.0f;
    /// `min_cluster_size`: the size a restarted code gets, > 0, finite.
    float reset_cluster_size = 2.0f;
    /// `usage_ratio`: the threshold as a share of the mean size, > 0, finite.
    float usage_ratio = 0.1f;
    /// `usage_ratio`: the size a restarted code gets, as a share of the mean size, > 0, finite.
    float reset_usage_ratio = 1.0f;
    /// `usage_ratio`: look for dead codes when the number of updates, this one included, is a multiple of this; at
    /// least 1.
    std::int32_t check_every = 5;
    /// Key of the replacement draws: code k of the update after `step` updates draws row
    /// floor(u M / 2^64), u = the first 64 bits of Philox4x32-10 with key `seed` and counter (k, step).
    std::uint64_t seed = 0;
    /// [K] the replacement row of each code, instead of the draw; one outside [0, M) restarts nothing. Null: draw.
    vector_view<const std::int64_t> replacement_indices{};

    /// `ema_update` and `train_step`: [N] weight of each row, as in `accumulate_params`; null: all 1.
    vector_view<const float> weights{};
    /// Where to write what the call saw; null: nowhere.
    step_stats* stats = nullptr;

    /// What `codebook::init_from_rows` fills the statistics with; the update itself does not read it.
    initial_statistics initial = initial_statistics::zeros;

    static ema_params rectokens() {
        ema_params p;
        p.dead_codes = cuvq::dead_code_rule::unused_steps;
        return p;
    }
    static ema_params sonnet() {
        ema_params p;
        p.rule = ema_rule::laplace;
        p.bias_correction = true;
        return p;
    }
    static ema_params vector_quantize_pytorch() {
        ema_params p;
        p.rule = ema_rule::laplace;
        p.decay = 0.8;
        p.dead_codes = cuvq::dead_code_rule::min_cluster_size;
        p.initial = initial_statistics::one_per_code;
        return p;
    }
    static ema_params encodec() {
        ema_params p = vector_quantize_pytorch();
        p.decay = 0.99;
        return p;
    }
    static ema_params mimi() {
        ema_params p;
        p.rule = ema_rule::clamp;
        p.dead_codes = cuvq::dead_code_rule::usage_ratio;
        p.initial = initial_statistics::one_per_code;
        return p;
    }
};

/// Parameters of a whole train step: those of the update, and how codes are found. Converts from `ema_params`, so
/// that `train_step(state, x, codes, discard, ema_params::mimi())` reads well.
struct train_params : ema_params {
    train_params() = default;
    train_params(const ema_params& ema) : ema_params(ema) {}

    cuvq::metric metric = cuvq::metric::l2;
    cuvq::accuracy accuracy = cuvq::accuracy::exact;
};

}  // namespace cuvq
