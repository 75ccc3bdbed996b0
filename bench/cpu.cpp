// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The rows that run where there is no GPU: cuvq::reference, alone.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include <cuvq/reference/codebook.hpp>
#include <cuvq/reference/ema.hpp>
#include <cuvq/reference/quantize.hpp>

#include "backends.hpp"
#include "data.hpp"

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
    /// Of a sample of rows, those whose code is not the lowest of least distance.
    verdict judge() const {
        verdict v;
        v.compared = std::min(shape.vectors, most_sampled_rows);
        v.wrong = 0;
        for (std::int64_t j = 0; j < v.compared; ++j) {
            const std::int64_t i = v.compared > 1 ? j * (shape.vectors - 1) / (v.compared - 1) : 0;
            std::int64_t best = 0;
            for (std::int64_t k = 1; k < shape.codes; ++k)
                if (distance(i, k) < distance(i, best)) best = k;
            v.wrong += codes[i] != best;
        }
        return v;
    }

    cuvq::shape shape;
    std::vector<X> x;
    std::vector<float> codebook;
    std::vector<std::int32_t> codes;
};

/// Median over a few calls of body(), after one that is not counted.
template <class Body>
measured time_on_host(double seconds, Body&& body) {
    std::vector<double> samples;
    double total = 0;
    body();
    while (samples.size() < 3 || (total < seconds * 1e6 && samples.size() < 1001)) {
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
        try {
            body(state, w);
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
                    o.seconds, [&] { reference::quantize(p.x_view(), p.codebook_view(), p.codes_view()); });
                r.write(state, w, m, quantize_work(w.shape, sizeof(X), false), p.judge());
            });
        add(o, r, {"quantize", "cuvq_reference", type, shape, "all"}, [&o, &r](benchmark::State& state, const row& w) {
            host_problem<X> p(w.shape, o.data);
            std::vector<X> quantized(p.x.size());
            std::vector<float> distances(p.codes.size());
            const auto m = time_on_host(o.seconds, [&] {
                reference::quantize(p.x_view(), p.codebook_view(), p.codes_view(),
                                    matrix_view<X>(quantized.data(), w.shape.vectors, w.shape.dimensions),
                                    vector_view<float>(distances.data(), w.shape.vectors));
            });
            r.write(state, w, m, quantize_work(w.shape, sizeof(X), true), p.judge());
        });
    }
    for (const auto& codes : o.codes) {
        if (o.wants("accumulate"))
            add(o, r, {"accumulate", "cuvq_reference", type, shape, codes},
                [&o, &r](benchmark::State& state, const row& w) {
                    host_problem<X> p(w.shape, o.data);
                    p.draw(w.variant);
                    std::vector<float> counts(static_cast<std::size_t>(w.shape.codes)), sums(p.codebook.size());
                    const auto m = time_on_host(o.seconds, [&] {
                        reference::accumulate(p.x_view(), p.codes_view(),
                                              vector_view<float>(counts.data(), w.shape.codes),
                                              matrix_view<float>(sums.data(), w.shape.codes, w.shape.dimensions));
                    });
                    r.write(state, w, m, accumulate_work(w.shape, sizeof(X)));
                });
        if (o.wants("ema_update"))
            add(o, r, {"ema_update", "cuvq_reference", type, shape, codes},
                [&o, &r](benchmark::State& state, const row& w) {
                    host_problem<X> p(w.shape, o.data);
                    p.draw(w.variant);
                    reference::codebook<float> book(w.shape.codes, w.shape.dimensions);
                    book.init_from_rows(p.codebook_view(), 0, initial_statistics::one_per_code);
                    const auto m = time_on_host(o.seconds, [&] {
                        reference::ema_update(book.state(), p.x_view(), p.codes_view(), ema_params::rectokens());
                    });
                    r.write(state, w, m, ema_update_work(w.shape, sizeof(X)));
                });
    }
    if (o.wants("train_step"))
        add(o, r, {"train_step", "cuvq_reference", type, shape, ""}, [&o, &r](benchmark::State& state, const row& w) {
            host_problem<X> p(w.shape, o.data);
            reference::codebook<float> book(w.shape.codes, w.shape.dimensions);
            book.init_from_rows(p.codebook_view(), 0, initial_statistics::one_per_code);
            const auto m = time_on_host(o.seconds, [&] {
                reference::train_step(book.state(), p.x_view(), p.codes_view(), discard, ema_params::rectokens());
            });
            r.write(state, w, m, train_step_work(w.shape, sizeof(X)));
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
