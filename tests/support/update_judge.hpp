// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <cuvq/reference/ema.hpp>

#include "support/host.hpp"
#include "support/oracle.hpp"
#include "support/state.hpp"

namespace cuvq::test {

/// Judge of one update from a known state: numbers by the published formulas in float64, decisions (which codes
/// restart, from which row, which are left alone) by `cuvq::reference`.
template <class T>
class update_judge {
public:
    /// @param params with host pointers.
    template <class R>
    update_judge(const host_state<T>& before, std::vector<float> counts, const matrix<float>& sums,
                 const matrix<R>& replacements, ema_params params)
        : before_(before), blended_(before), after_(before), counts_(std::move(counts)), sums_(sums), params_(params) {
        params.stats = &stats_;
        reference::ema_apply(after_.view(), test::view(std::as_const(counts_)), sums_.view(), replacements.view(),
                             params);
        params.stats = nullptr;
        params.dead_codes = dead_code_rule::none;
        reference::ema_apply(blended_.view(), test::view(std::as_const(counts_)), sums_.view(), discard, params);
        form();
    }

    const step_stats& stats() const { return stats_; }

    /// @param batch the batch whose counts and sums these are, where the update summed it up itself.
    testing::AssertionResult operator()(const host_state<T>& got, const batch_sums* batch = nullptr) const {
        if (got.step != before_.step + 1) return testing::AssertionFailure() << "step counter " << got.step;
        for (std::size_t k = 0; k < counts_.size(); ++k) {
            const std::string fault = fault_of(k, got, batch);
            if (!fault.empty())
                return testing::AssertionFailure() << "update " << got.step << ", code " << k << ": " << fault;
        }
        return testing::AssertionSuccess();
    }

private:
    static constexpr double u = 0x1p-24;

    /// What rounding to T adds beyond that to float.
    static double rounding(double v) {
        if (std::is_same_v<T, float>) return 0;
        const bool half = static_cast<float>(static_cast<T>(1.0f + 0x1p-10f)) != 1.0f;
        return half ? std::max(0x1p-11 * std::abs(v), 0x1p-25) : std::max(0x1p-8 * std::abs(v), 0x1p-134);
    }

    void form() {
        keep_ = static_cast<float>(params_.decay);
        take_ = static_cast<float>(1.0 - params_.decay);
        double total = 0;
        for (std::size_t k = 0; k < counts_.size(); ++k) {
            const auto row = sums_.row(static_cast<std::int64_t>(k));
            const bool sound = std::isfinite(counts_[k]) && counts_[k] >= 0 &&
                               std::all_of(row.begin(), row.end(), [](float v) { return std::isfinite(v); });
            blends_.push_back(sound && (counts_[k] > 0 || params_.rule != ema_rule::active_only));
            const double old = before_.cluster_size[k];
            sizes_.push_back(blends_[k] ? keep_ * old + take_ * counts_[k] : old);
            if (std::isfinite(sizes_[k])) total += sizes_[k];
        }
        const double correction =
            params_.bias_correction ? 1 - std::pow(params_.decay, static_cast<double>(before_.step + 1)) : 1;
        const double smoothed = total / correction;
        for (const double size : sizes_)
            denominators_.push_back(params_.rule == ema_rule::laplace
                                        ? (size / correction + params_.epsilon) /
                                              (smoothed + static_cast<double>(sizes_.size()) * params_.epsilon) *
                                              smoothed * correction
                                        : std::max<double>(size, params_.epsilon));
    }

    static std::string difference(const char* what, double got, double wanted) {
        return std::string(what) + " " + std::to_string(got) + " instead of " + std::to_string(wanted) + ", off by " +
               std::to_string((got - wanted) / wanted / u) + " x 2^-24";
    }

    std::string fault_of(std::size_t k, const host_state<T>& got, const batch_sums* batch) const {
        const auto code = static_cast<std::int64_t>(k);
        const auto now = got.code(code), was = before_.code(code), mixed = blended_.code(code),
                   wanted = after_.code(code);
        if (now.steps_since_active != wanted.steps_since_active)
            return "steps_since_active " + std::to_string(now.steps_since_active[0]) + " instead of " +
                   std::to_string(wanted.steps_since_active[0]);
        if (!same_bits(mixed, wanted)) return fault_of_restart(now, wanted);
        if (same_bits(mixed, was) && same_bits(now, was)) return {};
        if (!blends_[k]) {
            const bool kept = same_bits(now.codebook, was.codebook) && same_bits(now.embed_sum, was.embed_sum) &&
                              same_bits(now.cluster_size, was.cluster_size);
            return kept ? "" : "changed without a reason";
        }

        const double old_size = keep_ * was.cluster_size[0], new_size = take_ * counts_[k];
        if (!(std::abs(now.cluster_size[0] - sizes_[k]) <= 4 * u * (std::abs(old_size) + new_size)))
            return difference("cluster_size", now.cluster_size[0], sizes_[k]);
        bool zero = sizes_[k] == 0;
        for (std::int64_t d = 0; d < sums_.columns; ++d)
            zero = zero && keep_ * was.embed_sum.at(0, d) + take_ * sums_.at(code, d) == 0;
        if (zero && !same_bits(now.codebook, was.codebook)) return "a state of zeros changed the codebook";
        for (std::int64_t d = 0; d < sums_.columns; ++d) {
            const double a = keep_ * was.embed_sum.at(0, d), s = take_ * sums_.at(code, d);
            double slack = 4 * u * (std::abs(a) + std::abs(s)) + 0x1p-149;
            if (batch)
                slack += take_ *
                         batch->tolerance(k, k * static_cast<std::size_t>(sums_.columns) + static_cast<std::size_t>(d));
            if (!(std::abs(now.embed_sum.at(0, d) - (a + s)) <= slack))
                return difference("embed_sum", now.embed_sum.at(0, d), a + s);
            const double row = (a + s) / denominators_[k];
            if (!zero && !(std::abs(now.codebook.at(0, d) - row) <= slack / denominators_[k] + rounding(row)))
                return difference("codebook", now.codebook.at(0, d), row);
        }
        return {};
    }

    static std::string fault_of_restart(const host_state<T>& now, const host_state<T>& wanted) {
        if (!same_bits(now.codebook, wanted.codebook)) return "not restarted from the row that it should be";
        // The size it gets may be a share of the mean size, which has the rounding of all the others in it.
        const auto near = [](double a, double b) { return std::abs(a - b) <= 6 * u * std::abs(b) + 0x1p-149; };
        if (!near(now.cluster_size[0], wanted.cluster_size[0]))
            return difference("cluster_size of a restarted code", now.cluster_size[0], wanted.cluster_size[0]);
        for (std::int64_t d = 0; d < wanted.embed_sum.columns; ++d)
            if (!near(now.embed_sum.at(0, d), wanted.embed_sum.at(0, d)))
                return difference("embed_sum of a restarted code", now.embed_sum.at(0, d), wanted.embed_sum.at(0, d));
        return {};
    }

    host_state<T> before_, blended_, after_;
    std::vector<float> counts_;
    matrix<float> sums_;
    ema_params params_;
    step_stats stats_;
    double keep_ = 0, take_ = 0;
    std::vector<char> blends_;
    std::vector<double> sizes_, denominators_;
};

/// Judge of one `ema_update` (the whole of it after the codes): counts and sums are formed here.
/// @param params with host pointers.
template <class T, class X>
testing::AssertionResult update_of_batch_is_right(const host_state<T>& before, const matrix<X>& x,
                                                  const std::vector<std::int64_t>& codes, const ema_params& params,
                                                  const host_state<T>& got, step_stats got_stats) {
    std::vector<float> weights;
    if (params.weights.data_handle())
        weights.assign(params.weights.data_handle(), params.weights.data_handle() + params.weights.extent(0));
    const std::int64_t k = before.codebook.rows;
    const batch_sums batch(x, codes, k, weights);
    matrix<float> sums(k, x.columns);
    for (std::size_t e = 0; e < batch.sums.size(); ++e) sums.data[e] = static_cast<float>(batch.sums[e]);
    const update_judge<T> judge(before, {batch.counts.begin(), batch.counts.end()}, sums, x, params);
    step_stats wanted = judge.stats();
    wanted.invalid_rows = batch.invalid;
    got_stats.commitment_loss = 0;  // the search's
    const auto of_stats = same_stats(got_stats, wanted, 1e-6);
    return of_stats ? judge(got, &batch) : of_stats;
}

}  // namespace cuvq::test
