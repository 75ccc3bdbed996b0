// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The rows that run where there is no GPU: cuvq::reference, alone.

#include <algorithm>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include <cuvq/reference/codebook.hpp>
#include <cuvq/reference/ema.hpp>
#include <cuvq/reference/quantize.hpp>

#include "backends.hpp"
#include "data.hpp"
#include "expected.hpp"

namespace cuvq::bench {

namespace {

/// Rows that are compared with a brute force of the benchmark's own.
constexpr std::int64_t most_sampled_rows = 256;

template <class X>
struct host_problem {
    host_problem(const cuvq::shape& s, data_kind kind)
        : shape(s),
          x(static_cast<std::size_t>(s.vectors * s.dimensions)),
          codebook(static_cast<std::size_t>(s.codes * s.dimensions)),
          codes(static_cast<std::size_t>(s.vectors)) {
        const std::int64_t dimensions = s.dimensions;
        for (std::int64_t e = 0; e < s.vectors * dimensions; ++e)
            x[e] = static_cast<X>(x_element(kind, e / dimensions, e % dimensions, s.codes, dimensions));
        for (std::int64_t e = 0; e < s.codes * dimensions; ++e)
            codebook[e] = static_cast<float>(
                static_cast<X>(codebook_element(kind, e / dimensions, e % dimensions, s.codes, dimensions)));
    }

    matrix_view<const X> x_view() const { return matrix_view<const X>(x.data(), shape.vectors, shape.dimensions); }
    matrix_view<const float> codebook_view() const {
        return matrix_view<const float>(codebook.data(), shape.codes, shape.dimensions);
    }
    vector_view<std::int32_t> codes_view() { return vector_view<std::int32_t>(codes.data(), shape.vectors); }
    void draw(const std::string& distribution) {
        const auto cumulative = cumulative_shares(distribution, shape.codes);
        for (std::int64_t i = 0; i < shape.vectors; ++i) codes[i] = drawn_code(cumulative.data(), shape.codes, i);
    }

    double distance(std::int64_t i, std::int64_t k) const {
        double sum = 0;
        for (std::int64_t d = 0; d < shape.dimensions; ++d) {
            const double difference = static_cast<double>(static_cast<float>(x[i * shape.dimensions + d])) -
                                      static_cast<double>(codebook[k * shape.dimensions + d]);
            sum += difference * difference;
        }
        return sum;
    }
    /// Of a sample of rows, those whose code is not the lowest of least distance, or whose outputs, where there are
    /// any, do not belong to it.
    verdict judge(const std::vector<X>& quantized = {}, const std::vector<float>& distances = {}) const {
        verdict v;
        v.compared = std::min(shape.vectors, most_sampled_rows);
        v.wrong = 0;
        for (std::int64_t j = 0; j < v.compared; ++j) {
            const std::int64_t i = v.compared > 1 ? j * (shape.vectors - 1) / (v.compared - 1) : 0;
            std::int64_t best = 0;
            for (std::int64_t k = 1; k < shape.codes; ++k)
                if (distance(i, k) < distance(i, best)) best = k;
            bool right = codes[i] == best;
            for (std::int64_t d = 0; right && !quantized.empty() && d < shape.dimensions; ++d)
                right =
                    static_cast<float>(quantized[i * shape.dimensions + d]) == codebook[best * shape.dimensions + d];
            if (right && !distances.empty()) {
                const double least = distance(i, best);
                const double most_off = 4e-7 * std::log2(static_cast<double>(shape.dimensions + 1)) * least + FLT_MIN;
                right = std::abs(distances[i] - least) <= most_off;
            }
            v.wrong += !right;
        }
        return v;
    }

    struct batch {
        std::vector<double> counts, sums;
    };
    /// Counts and sums by the codes as they are.
    batch add_up() const {
        batch b{std::vector<double>(static_cast<std::size_t>(shape.codes)), std::vector<double>(codebook.size())};
        for (std::int64_t i = 0; i < shape.vectors; ++i) {
            if (codes[i] < 0 || codes[i] >= shape.codes) continue;  // found by a broken search, which the codes show
            b.counts[codes[i]] += 1;
            for (std::int64_t d = 0; d < shape.dimensions; ++d)
                b.sums[codes[i] * shape.dimensions + d] += static_cast<float>(x[i * shape.dimensions + d]);
        }
        return b;
    }
    /// What the codes as they are touch of a state at its start.
    touched_codes touched(const ema_params& params) const { return bench::touched(add_up().counts, params); }
    verdict judge_sums(const std::vector<float>& counts, const std::vector<float>& sums) const {
        const batch wanted = add_up();
        verdict v;
        v.count_error = error(counts.data(), wanted.counts);
        v.sum_error = error(sums.data(), wanted.sums);
        return v;
    }
    /// @param state  the one of `start` after one update
    /// @param v      what is known already
    verdict judge_update(const codebook_state<float>& state, const ema_params& params, verdict v = {}) const {
        batch b = add_up();
        std::vector<double> rows(codebook.size()), sizes(b.counts.size()), idle_steps(b.counts.size());
        for (std::int64_t k = 0; k < shape.codes; ++k)
            for (std::int64_t d = 0; d < shape.dimensions; ++d) {
                const std::int64_t e = k * shape.dimensions + d;
                const auto wanted = update_once(params, k, d, codebook[e], b.counts[k], b.sums[e], x.data(),
                                                shape.vectors, shape.dimensions);
                b.sums[e] = wanted.sum;
                rows[e] = wanted.codebook;
                sizes[k] = wanted.size;
                idle_steps[k] = wanted.idle_steps;
            }
        v.count_error = worse(error(state.cluster_size.data_handle(), sizes),
                              error(state.steps_since_active.data_handle(), idle_steps));
        v.sum_error = error(state.embed_sum.data_handle(), b.sums);
        v.codebook_error = error(state.codebook.data_handle(), rows);
        return v;
    }
    /// Puts the state where every update that is judged starts.
    void start(reference::codebook<float>& book, const ema_params& params) const {
        book.init_from_rows(codebook_view(), 0, initial_statistics::one_per_code);
        const auto state = book.state();
        for (std::int64_t k = 0; k < shape.codes; ++k) {
            std::copy_n(codebook.data() + k * shape.dimensions, shape.dimensions, &state.codebook(k, 0));
            std::copy_n(codebook.data() + k * shape.dimensions, shape.dimensions, &state.embed_sum(k, 0));
            state.steps_since_active(k) = idle_steps_at_start(k, params);
        }
    }

    template <class T>
    static double error(const T* got, const std::vector<double>& wanted) {
        double should = 0, off = 0;
        for (std::size_t e = 0; e < wanted.size(); ++e) {
            const double difference = static_cast<double>(got[e]) - wanted[e];
            should += wanted[e] * wanted[e];
            off += difference * difference;
        }
        return relative_error(should, off);
    }

    cuvq::shape shape;
    std::vector<X> x;
    std::vector<float> codebook;
    std::vector<std::int32_t> codes;
};

constexpr auto nothing = [] {};

/// Median over a few calls of body(), after one that is not counted; prepare() goes before each, not timed.
template <class Prepare, class Body>
measured time_on_host(double seconds, Prepare&& prepare, Body&& body) {
    std::vector<double> samples;
    double total = 0;
    prepare();
    body();
    while (samples.size() < 3 || (total < seconds * 1e6 && samples.size() < 1001)) {
        prepare();
        const auto start = std::chrono::steady_clock::now();
        body();
        const std::chrono::duration<double, std::micro> us = std::chrono::steady_clock::now() - start;
        samples.push_back(us.count());
        total += us.count();
    }
    std::sort(samples.begin(), samples.end());
    measured m;
    m.us = samples[samples.size() / 2];
    m.us_min = samples[0];
    return m;
}

template <class Body>
void add(const options& o, report& r, row w, Body body) {
    w.hard = o.data == data_kind::hard;
    const auto run = [&r, w, body](benchmark::State& state) {
        if (const auto reason = r.out_of_time(); !reason.empty()) {
            state.SkipWithError(reason.c_str());
            return;
        }
        try {
            body(state, w);
        } catch (const std::bad_alloc&) {
            r.fail(w);
            state.SkipWithError("takes more memory than this machine gives");
        } catch (const std::exception& e) {
            r.fail(w);
            state.SkipWithError(e.what());
        }
    };
    benchmark::RegisterBenchmark(w.name().c_str(), run)->UseManualTime()->Iterations(1)->Unit(benchmark::kMicrosecond);
}

template <class X>
void add_shape(const options& o, report& r, const cuvq::shape& shape, const char* type) {
    if (o.wants("quantize")) {
        add(o, r, {"quantize", "cuvq_reference", type, shape, "codes"},
            [&o, &r](benchmark::State& state, const row& w) {
                host_problem<X> p(w.shape, o.data);
                const auto m = time_on_host(
                    o.seconds, nothing, [&] { reference::quantize(p.x_view(), p.codebook_view(), p.codes_view()); });
                r.write(state, w, m, quantize_work(w.shape, sizeof(X), false), p.judge());
            });
        add(o, r, {"quantize", "cuvq_reference", type, shape, "all"}, [&o, &r](benchmark::State& state, const row& w) {
            host_problem<X> p(w.shape, o.data);
            std::vector<X> quantized(p.x.size());
            std::vector<float> distances(p.codes.size());
            const auto m = time_on_host(o.seconds, nothing, [&] {
                reference::quantize(p.x_view(), p.codebook_view(), p.codes_view(),
                                    matrix_view<X>(quantized.data(), w.shape.vectors, w.shape.dimensions),
                                    vector_view<float>(distances.data(), w.shape.vectors));
            });
            r.write(state, w, m, quantize_work(w.shape, sizeof(X), true), p.judge(quantized, distances));
        });
    }
    for (const auto& codes : o.codes) {
        if (o.wants("accumulate"))
            add(o, r, {"accumulate", "cuvq_reference", type, shape, codes},
                [&o, &r](benchmark::State& state, const row& w) {
                    host_problem<X> p(w.shape, o.data);
                    p.draw(w.variant);
                    std::vector<float> counts(static_cast<std::size_t>(w.shape.codes)), sums(p.codebook.size());
                    const auto m = time_on_host(o.seconds, nothing, [&] {
                        reference::accumulate(p.x_view(), p.codes_view(),
                                              vector_view<float>(counts.data(), w.shape.codes),
                                              matrix_view<float>(sums.data(), w.shape.codes, w.shape.dimensions));
                    });
                    r.write(state, w, m, accumulate_work(w.shape, sizeof(X)), p.judge_sums(counts, sums));
                });
        if (o.wants("ema_update"))
            add(o, r, {"ema_update", "cuvq_reference", type, shape, codes},
                [&o, &r](benchmark::State& state, const row& w) {
                    host_problem<X> p(w.shape, o.data);
                    p.draw(w.variant);
                    reference::codebook<float> book(w.shape.codes, w.shape.dimensions);
                    const auto params = ema_params::rectokens();
                    const auto m = time_on_host(
                        o.seconds, [&] { p.start(book, params); },
                        [&] { reference::ema_update(book.state(), p.x_view(), p.codes_view(), params); });
                    r.write(state, w, m, ema_update_work(w.shape, sizeof(X), p.touched(params)),
                            p.judge_update(book.state(), params));
                });
    }
    if (o.wants("train_step"))
        add(o, r, {"train_step", "cuvq_reference", type, shape, ""}, [&o, &r](benchmark::State& state, const row& w) {
            host_problem<X> p(w.shape, o.data);
            reference::codebook<float> book(w.shape.codes, w.shape.dimensions);
            const auto params = ema_params::rectokens();
            const auto m = time_on_host(
                o.seconds, [&] { p.start(book, params); },
                [&] { reference::train_step(book.state(), p.x_view(), p.codes_view(), discard, params); });
            r.write(state, w, m, train_step_work(w.shape, sizeof(X), p.touched(params)),
                    p.judge_update(book.state(), params, p.judge()));
        });
}

}  // namespace

void register_cpu(const options& o, report& r) {
    for (const auto& shape : o.shapes)
        for (const auto& type : o.types) {
            if (type == "float") add_shape<float>(o, r, shape, "float");
#if CUVQ_HAS_HALF
            if (type == "half") add_shape<__half>(o, r, shape, "half");
            if (type == "bfloat16") add_shape<__nv_bfloat16>(o, r, shape, "bfloat16");
#endif
        }
}

}  // namespace cuvq::bench
