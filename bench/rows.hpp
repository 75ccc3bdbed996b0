// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What a row of the benchmark is called, and which counters it gets.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include "shapes.hpp"
#include "work.hpp"

namespace cuvq::bench {

struct row {
    std::string test;     ///< quantize, accumulate, ema_update, train_step, floor, ceiling
    std::string who;      ///< cuvq, or a peer
    std::string type;     ///< of the vectors
    cuvq::shape shape;    ///< all zero: of the card
    std::string variant;  ///< outputs, or the distribution of codes; "": the time does not depend on it
    bool hard = false;    ///< on hard data

    std::string name() const {
        std::string s = test + "/" + who;
        if (!type.empty()) s += "/" + type;
        if (shape.codes > 0) s += "/" + text(shape);
        if (!variant.empty()) s += "/" + variant;
        if (hard) s += "/hard";
        return s;
    }
};

inline constexpr const char* product_peer = "cublas_fp16_product";

/// Whether a row of cuvq names its time as a share of that peer's.
inline bool comparable(const row& mine, const row& peer) {
    if (peer.who == "cuvq" || !same(mine.shape, peer.shape)) return false;
    if (peer.test == "floor") return peer.type == mine.type;
    if (peer.who == product_peer) return mine.test == "quantize";
    const bool sums = peer.test == "accumulate" && mine.test == "ema_update";
    return (peer.test == mine.test || sums) && peer.type == mine.type &&
           (mine.test == "quantize" || peer.variant.empty() || peer.variant == mine.variant);
}

struct measured {
    double us = 0;      ///< median
    double us_min = 0;  ///< fastest
    int launches = 1;   ///< of one sample
    int sets = 1;       ///< of vectors, over which the launches rotate
};

/// How a row compares with a float64 computation; negative where it was not compared. Errors are relative (Frobenius
/// norm).
struct verdict {
    std::int64_t wrong = -1, compared = 0;  ///< codes
    bool approximate = false;               ///< wrong codes are counted, but are no fault
    double count_error = -1;                ///< of counts; of an EMA state, of cluster sizes and idle steps
    double sum_error = -1;                  ///< of sums; of an EMA state, of embed_sum
    double codebook_error = -1;
};

/// Largest errors that go without a mark. Sums of a million vectors around zero nearly cancel, which costs float32 sums
/// three digits; counts are whole numbers, and one too many in a million must show.
inline constexpr double most_sum_error = 1e-4, most_count_error = 5e-7;

/// Relative error from sums of squares: of what should be, and of how far off it is.
inline double relative_error(double should, double off) { return off == 0 ? 0 : std::sqrt(off / should); }
/// The larger error; NaN if one is.
inline double worse(double a, double b) { return a >= b || std::isnan(a) ? a : b; }

/// Fills the counters of rows; remembers times, so that later rows can be put beside earlier ones.
class report {
public:
    /// @param budget  seconds from now after which rows are skipped
    explicit report(double budget) : budget_(budget) {}

    /// Why no further row may start; empty if one may.
    std::string out_of_time() const {
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start_;
        if (spent.count() < budget_) return "";
        char seconds[32];
        std::snprintf(seconds, sizeof(seconds), "%.7g", budget_);
        return std::string("skipped: the budget of ") + seconds + " s is spent";
    }

    /// The card's rates, per microsecond, once measured.
    double most_flops = 0, most_bytes = 0;

    /// False once a row of cuvq, or of its CPU path, was wrong or failed.
    bool good() const { return good_; }
    void fail(const row& r) {
        if (r.who.rfind("cuvq", 0) == 0) good_ = false;
    }

    void write(benchmark::State& state, const row& r, const measured& m, const work& w, const verdict& v = {},
               std::string label = "") {
        for (auto _ : state) state.SetIterationTime(m.us * 1e-6);
        auto& c = state.counters;
        c["us"] = m.us;
        c["us_min"] = m.us_min;
        c["sets"] = m.sets;
        if (w.flops > 0) c["TFLOP/s"] = w.flops / m.us * 1e-6;
        if (w.bytes > 0) c["GB/s"] = w.bytes / m.us * 1e-3;
        if (most_flops > 0 && most_bytes > 0 && r.test != "ceiling")
            c["of_ceiling"] = std::max(w.flops / most_flops, w.bytes / most_bytes) / m.us;
        if (r.who == "cuvq")
            for (const auto& [peer, us] : times_)
                if (comparable(r, peer)) c["vs_" + peer.who] = m.us / us;
        if (v.wrong >= 0) c["wrong"] = static_cast<double>(v.wrong);
        if (!(v.count_error < 0)) c["count_error"] = v.count_error;
        if (!(v.sum_error < 0)) c["sum_error"] = v.sum_error;
        if (!(v.codebook_error < 0)) c["codebook_error"] = v.codebook_error;
        const auto note = [&](const std::string& what) { label = what + (label.empty() ? "" : "; " + label); };
        const auto mark = [&](bool good, const std::string& what) {
            if (good) return;
            note("WRONG " + what);
            fail(r);
        };
        const std::string codes = std::to_string(v.wrong) + " of " + std::to_string(v.compared) + " rows";
        if (v.approximate && v.wrong > 0) note("not exact: " + codes);
        mark(v.wrong <= (v.approximate ? v.compared / 4 : 0), "CODES: " + codes);
        mark(v.count_error <= most_count_error, "COUNTS");
        mark(v.sum_error <= most_sum_error, "SUMS");
        mark(v.codebook_error <= most_sum_error, "CODEBOOK");
        state.SetLabel(label);
        times_.emplace_back(r, m.us);
    }

private:
    std::vector<std::pair<row, double>> times_;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
    double budget_;
    bool good_ = true;
};

}  // namespace cuvq::bench
