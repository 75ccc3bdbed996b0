// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What each function says of each bad argument, by calls of the functions of cuvq::reference, which share the checks
// with the GPU functions. Each test spoils arguments of good calls, one at a time.
#include <cuvq/detail/validate.hpp>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <cuvq/reference/codebook.hpp>
#include <cuvq/reference/ema.hpp>
#include <cuvq/reference/quantize.hpp>

#include "support/host.hpp"
#include "support/state.hpp"

namespace cuvq::test {
namespace {

constexpr std::int64_t n = 4, k = 5, d = 3;
constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

/// p, one byte off.
template <class T>
T* misaligned(T* p) {
    return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(p) + 1);
}

struct QuantizeErrors : testing::Test {
    matrix<float> x{n, d}, codebook{k, d}, quantized{n, d};
    std::vector<std::int32_t> codes = std::vector<std::int32_t>(n);
    std::vector<float> distances = std::vector<float>(n);
    quantize_params params;

    template <class X, class C, class I, class Q, class E>
    std::string call(const X& xs, const C& rows, const I& to, const Q& q, const E& e) const {
        return refusal([&] { reference::quantize(xs, rows, to, q, e, params); });
    }
    std::string call() { return call(x.view(), codebook.view(), view(codes), quantized.view(), view(distances)); }
    template <class X>
    std::string with_x(const X& xs) {
        return call(xs, codebook.view(), view(codes), quantized.view(), view(distances));
    }
    template <class C>
    std::string with_codebook(const C& rows) {
        return call(x.view(), rows, view(codes), quantized.view(), view(distances));
    }
    template <class I>
    std::string with_codes(const I& to) {
        return call(x.view(), codebook.view(), to, quantized.view(), view(distances));
    }
    template <class Q>
    std::string with_quantized(const Q& q) {
        return call(x.view(), codebook.view(), view(codes), q, view(distances));
    }
    template <class E>
    std::string with_distances(const E& e) {
        return call(x.view(), codebook.view(), view(codes), quantized.view(), e);
    }
};

TEST_F(QuantizeErrors, GoodArgumentsAreTaken) { EXPECT_EQ(call(), "(no error)"); }

TEST_F(QuantizeErrors, EmptyCodebook) {
    EXPECT_EQ(with_codebook(matrix_view<float>(nullptr, 0, d)),
              "cuvq::reference::quantize: codebook: got K = 0 rows; wants at least 1");
    EXPECT_EQ(with_codebook(matrix_view<float>(nullptr, k, 0)),
              "cuvq::reference::quantize: codebook: got D = 0 columns; wants at least 1");
}

TEST_F(QuantizeErrors, NullPointers) {
    EXPECT_EQ(with_x(matrix_view<float>(nullptr, n, d)),
              "cuvq::reference::quantize: x: got a null pointer; wants 4 x 3 elements");
    EXPECT_EQ(with_codebook(matrix_view<float>(nullptr, k, d)),
              "cuvq::reference::quantize: codebook: got a null pointer; wants 5 x 3 elements");
    EXPECT_EQ(with_codes(vector_view<std::int32_t>(nullptr, n)),
              "cuvq::reference::quantize: codes: got a null pointer; wants 1 x 4 elements");
    EXPECT_EQ(with_quantized(matrix_view<float>(nullptr, n, d)),
              "cuvq::reference::quantize: quantized: got a null pointer; wants 4 x 3 elements");
    EXPECT_EQ(with_distances(vector_view<float>(nullptr, n)),
              "cuvq::reference::quantize: distances: got a null pointer; wants 1 x 4 elements");
}

TEST_F(QuantizeErrors, MisalignedPointers) {
    EXPECT_EQ(with_x(matrix_view<float>(misaligned(x.data.data()), n, d)),
              "cuvq::reference::quantize: x: got a misaligned pointer; wants 4-byte alignment");
    EXPECT_EQ(with_codebook(matrix_view<float>(misaligned(codebook.data.data()), k, d)),
              "cuvq::reference::quantize: codebook: got a misaligned pointer; wants 4-byte alignment");
    EXPECT_EQ(with_codes(vector_view<std::int32_t>(misaligned(codes.data()), n)),
              "cuvq::reference::quantize: codes: got a misaligned pointer; wants 4-byte alignment");
    EXPECT_EQ(with_quantized(matrix_view<float>(misaligned(quantized.data.data()), n, d)),
              "cuvq::reference::quantize: quantized: got a misaligned pointer; wants 4-byte alignment");
    EXPECT_EQ(with_distances(vector_view<float>(misaligned(distances.data()), n)),
              "cuvq::reference::quantize: distances: got a misaligned pointer; wants 4-byte alignment");
    std::vector<std::int64_t> wide(n + 1);
    EXPECT_EQ(with_codes(vector_view<std::int64_t>(misaligned(wide.data()), n)),
              "cuvq::reference::quantize: codes: got a misaligned pointer; wants 8-byte alignment");
    step_stats stats;
    params.stats = misaligned(&stats);
    EXPECT_EQ(call(), "cuvq::reference::quantize: params.stats: got a misaligned pointer; wants 8-byte alignment");
}

TEST_F(QuantizeErrors, ShapesThatDoNotMatch) {
    EXPECT_EQ(with_x(matrix_view<float>(x.data.data(), n, 2)),
              "cuvq::reference::quantize: x: got 2 columns; wants 3, the columns of the codebook");
    EXPECT_EQ(with_codes(vector_view<std::int32_t>(codes.data(), 3)),
              "cuvq::reference::quantize: codes: got 3 elements; wants 4, one for each row of x");
    EXPECT_EQ(with_quantized(matrix_view<float>(quantized.data.data(), 3, d)),
              "cuvq::reference::quantize: quantized: got 3 rows; wants 4, the rows of x");
    EXPECT_EQ(with_quantized(matrix_view<float>(quantized.data.data(), n, 2)),
              "cuvq::reference::quantize: quantized: got 2 columns; wants 3, the columns of x");
    EXPECT_EQ(with_distances(vector_view<float>(distances.data(), 3)),
              "cuvq::reference::quantize: distances: got 3 elements; wants 4, one for each row of x");
    EXPECT_EQ(with_x(matrix_view<float, 2>(x.data.data(), n)),
              "cuvq::reference::quantize: x: got 2 columns; wants 3, the columns of the codebook");
}

TEST_F(QuantizeErrors, ShapesThatDoNotMatchWithoutAnyRow) {
    EXPECT_EQ(call(matrix_view<float>(nullptr, 0, 2), codebook.view(), vector_view<std::int32_t>(), discard, discard),
              "cuvq::reference::quantize: x: got 2 columns; wants 3, the columns of the codebook");
    EXPECT_EQ(call(matrix_view<float>(nullptr, 0, d), codebook.view(), view(codes), discard, discard),
              "cuvq::reference::quantize: codes: got 4 elements; wants 0, one for each row of x");
}

TEST_F(QuantizeErrors, RowsOfTheOutputThatOverlap) {
    EXPECT_EQ(with_x(strided(x.data.data(), n, d, 2)), "(no error)");
    EXPECT_EQ(with_quantized(strided(quantized.data.data(), n, d, 2)),
              "cuvq::reference::quantize: quantized: got row stride 2 for 3 columns; wants rows that do not overlap, "
              "since it is written");
}

TEST_F(QuantizeErrors, CodesTooNarrowForK) {
    const auto refused = [&](auto code, std::int64_t rows) {
        matrix<float> wide(rows, 1), points(2, 1);
        std::vector<decltype(code)> to(2);
        return call(points.view(), wide.view(), view(to), discard, discard);
    };
    EXPECT_EQ(refused(std::uint8_t{}, 256), "(no error)");
    EXPECT_EQ(refused(std::uint8_t{}, 257),
              "cuvq::reference::quantize: codes: got uint8 elements for K = 257; wants a type that holds K - 1");
    EXPECT_EQ(refused(std::uint16_t{}, 65536), "(no error)");
    EXPECT_EQ(refused(std::uint16_t{}, 65537),
              "cuvq::reference::quantize: codes: got uint16 elements for K = 65537; wants a type that holds K - 1");
    EXPECT_EQ(refused(std::int32_t{}, 65537), "(no error)");
}

TEST_F(QuantizeErrors, NoSuchMetricOrAccuracy) {
    params.metric = static_cast<metric>(99);
    EXPECT_EQ(call(), "cuvq::reference::quantize: params.metric: got no enumerator of metric; wants metric::l2");
    params = {};
    params.accuracy = static_cast<accuracy>(99);
    EXPECT_EQ(call(),
              "cuvq::reference::quantize: params.accuracy: got no enumerator of accuracy; wants accuracy::exact or "
              "accuracy::fast");
}

TEST_F(QuantizeErrors, ARefusedCallWritesNothing) {
    codes.assign(n, 42);
    distances.assign(n, 42);
    quantized = matrix<float>(n, d, 42);
    step_stats stats;
    stats.perplexity = 42;
    params.stats = &stats;
    params.metric = static_cast<metric>(99);
    EXPECT_NE(call(), "(no error)");
    EXPECT_EQ(codes, std::vector<std::int32_t>(n, 42));
    EXPECT_EQ(distances, std::vector<float>(n, 42));
    EXPECT_TRUE(same_bits(quantized, matrix<float>(n, d, 42)));
    EXPECT_EQ(stats.perplexity, 42);
}

struct LookupErrors : testing::Test {
    matrix<float> codebook{k, d}, quantized{n, d};
    std::vector<std::int32_t> codes = std::vector<std::int32_t>(n);

    template <class C, class I, class Q>
    static std::string call(const C& rows, const I& from, const Q& q) {
        return refusal([&] { reference::lookup(rows, from, q); });
    }
};

TEST_F(LookupErrors, EachArgument) {
    const auto rows = codebook.view();
    const auto from = view(codes);
    const auto q = quantized.view();
    EXPECT_EQ(call(rows, from, q), "(no error)");
    EXPECT_EQ(call(matrix_view<float>(nullptr, 0, d), from, q),
              "cuvq::reference::lookup: codebook: got K = 0 rows; wants at least 1");
    EXPECT_EQ(call(matrix_view<float>(nullptr, k, 0), from, q),
              "cuvq::reference::lookup: codebook: got D = 0 columns; wants at least 1");
    EXPECT_EQ(call(matrix_view<float>(nullptr, k, d), from, q),
              "cuvq::reference::lookup: codebook: got a null pointer; wants 5 x 3 elements");
    EXPECT_EQ(call(rows, vector_view<std::int32_t>(nullptr, n), q),
              "cuvq::reference::lookup: codes: got a null pointer; wants 1 x 4 elements");
    EXPECT_EQ(call(rows, from, matrix_view<float>(nullptr, n, d)),
              "cuvq::reference::lookup: quantized: got a null pointer; wants 4 x 3 elements");
    EXPECT_EQ(call(rows, from, matrix_view<float>(quantized.data.data(), 3, d)),
              "cuvq::reference::lookup: quantized: got 3 rows; wants 4, one for each code");
    EXPECT_EQ(call(rows, from, matrix_view<float>(quantized.data.data(), n, 2)),
              "cuvq::reference::lookup: quantized: got 2 columns; wants 3, the columns of the codebook");
    EXPECT_EQ(call(rows, from, strided(quantized.data.data(), n, d, 1)),
              "cuvq::reference::lookup: quantized: got row stride 1 for 3 columns; wants rows that do not overlap, "
              "since it is written");
    const matrix<float> wide(257, d);
    const std::vector<std::uint8_t> narrow(n);
    EXPECT_EQ(call(wide.view(), view(narrow), q),
              "cuvq::reference::lookup: codes: got uint8 elements for K = 257; wants a type that holds K - 1");
}

struct AccumulateErrors : testing::Test {
    matrix<float> x{n, d}, sums{k, d};
    std::vector<std::int32_t> codes = std::vector<std::int32_t>(n);
    std::vector<float> counts = std::vector<float>(k), weights = std::vector<float>(n, 1.0f);
    accumulate_params params;

    template <class X, class I, class N, class S>
    std::string call(const X& xs, const I& from, const N& to, const S& s) const {
        return refusal([&] { reference::accumulate(xs, from, to, s, params); });
    }
    std::string call() { return call(x.view(), view(codes), view(counts), sums.view()); }
};

TEST_F(AccumulateErrors, EachArgument) {
    const auto xs = x.view();
    const auto from = view(codes);
    const auto to = view(counts);
    const auto s = sums.view();
    EXPECT_EQ(call(), "(no error)");
    EXPECT_EQ(call(xs, from, to, matrix_view<float>(nullptr, 0, d)),
              "cuvq::reference::accumulate: sums: got K = 0 rows; wants at least 1");
    EXPECT_EQ(call(xs, from, to, matrix_view<float>(nullptr, k, 0)),
              "cuvq::reference::accumulate: sums: got D = 0 columns; wants at least 1");
    EXPECT_EQ(call(xs, from, to, matrix_view<float>(nullptr, k, d)),
              "cuvq::reference::accumulate: sums: got a null pointer; wants 5 x 3 elements");
    EXPECT_EQ(
        call(xs, from, to, strided(sums.data.data(), k, d, 2)),
        "cuvq::reference::accumulate: sums: got row stride 2 for 3 columns; wants rows that do not overlap, since "
        "it is written");
    EXPECT_EQ(call(xs, from, vector_view<float>(nullptr, k), s),
              "cuvq::reference::accumulate: counts: got a null pointer; wants 1 x 5 elements");
    EXPECT_EQ(call(xs, from, vector_view<float>(counts.data(), 4), s),
              "cuvq::reference::accumulate: counts: got 4 elements; wants 5, the rows of sums");
    EXPECT_EQ(call(matrix_view<float>(nullptr, n, d), from, to, s),
              "cuvq::reference::accumulate: x: got a null pointer; wants 4 x 3 elements");
    EXPECT_EQ(call(matrix_view<float>(x.data.data(), n, 2), from, to, s),
              "cuvq::reference::accumulate: x: got 2 columns; wants 3, the columns of sums");
    EXPECT_EQ(call(xs, vector_view<std::int32_t>(codes.data(), 3), to, s),
              "cuvq::reference::accumulate: codes: got 3 elements; wants 4, one for each row of x");
    matrix<float> wide(257, d);
    std::vector<float> many(257);
    const std::vector<std::uint8_t> narrow(n);
    EXPECT_EQ(call(xs, view(narrow), view(many), wide.view()),
              "cuvq::reference::accumulate: codes: got uint8 elements for K = 257; wants a type that holds K - 1");
}

TEST_F(AccumulateErrors, Params) {
    params.weights = view(weights);
    EXPECT_EQ(call(), "(no error)");
    params.weights = vector_view<const float>(weights.data(), 3);
    EXPECT_EQ(call(), "cuvq::reference::accumulate: params.weights: got 3 elements; wants 4, one for each row of x");
    params.weights = vector_view<const float>(weights.data(), 0);
    EXPECT_EQ(call(), "cuvq::reference::accumulate: params.weights: got 0 elements; wants 4, one for each row of x");
    params.weights = vector_view<const float>(nullptr, n);
    EXPECT_EQ(call(), "cuvq::reference::accumulate: params.weights: got a null pointer; wants 1 x 4 elements");
    params.weights = {};
    step_stats stats;
    params.stats = misaligned(&stats);
    EXPECT_EQ(call(), "cuvq::reference::accumulate: params.stats: got a misaligned pointer; wants 8-byte alignment");
}

struct EmaErrors : testing::Test {
    host_state<> state{matrix<float>(k, d)};
    matrix<float> x{n, d}, sums{k, d}, replacements{2, d};
    std::vector<std::int32_t> codes = std::vector<std::int32_t>(n);
    std::vector<float> counts = std::vector<float>(k), weights = std::vector<float>(n, 1.0f);
    std::vector<std::int64_t> indices = std::vector<std::int64_t>(k);
    ema_params params;

    template <class N, class S, class R>
    std::string apply(const N& from, const S& s, const R& r) {
        return refusal([&] { reference::ema_apply(state.view(), from, s, r, params); });
    }
    std::string apply() { return apply(view(counts), sums.view(), replacements.view()); }
    template <class X, class I>
    std::string update(const X& xs, const I& from) {
        return refusal([&] { reference::ema_update(state.view(), xs, from, params); });
    }
    std::string update() { return update(x.view(), view(codes)); }
    template <class X, class I, class Q>
    std::string train(const X& xs, const I& to, const Q& q, train_params p) {
        return refusal([&] { reference::train_step(state.view(), xs, to, q, p); });
    }
    std::string train() { return train(x.view(), view(codes), discard, params); }
    /// What the three functions that take a state and ema_params say: the same but for the function's name.
    void expect_refused(const std::string& text) {
        EXPECT_EQ(apply(), "cuvq::reference::ema_apply: " + text);
        EXPECT_EQ(update(), "cuvq::reference::ema_update: " + text);
        EXPECT_EQ(train(), "cuvq::reference::train_step: " + text);
    }
};

TEST_F(EmaErrors, GoodArgumentsAreTaken) {
    EXPECT_EQ(apply(), "(no error)");
    EXPECT_EQ(apply(view(counts), sums.view(), discard), "(no error)");
    EXPECT_EQ(update(), "(no error)");
    EXPECT_EQ(train(), "(no error)");
}

TEST_F(EmaErrors, ApplyStatisticsAndReplacements) {
    const auto from = view(counts);
    const auto s = sums.view();
    EXPECT_EQ(apply(vector_view<float>(nullptr, k), s, discard),
              "cuvq::reference::ema_apply: counts: got a null pointer; wants 1 x 5 elements");
    EXPECT_EQ(apply(vector_view<float>(counts.data(), 4), s, discard),
              "cuvq::reference::ema_apply: counts: got 4 elements; wants 5, the rows of state.codebook");
    EXPECT_EQ(apply(from, matrix_view<float>(nullptr, k, d), discard),
              "cuvq::reference::ema_apply: sums: got a null pointer; wants 5 x 3 elements");
    EXPECT_EQ(apply(from, matrix_view<float>(sums.data.data(), 4, d), discard),
              "cuvq::reference::ema_apply: sums: got 4 rows; wants 5, the rows of state.codebook");
    EXPECT_EQ(apply(from, matrix_view<float>(sums.data.data(), k, 2), discard),
              "cuvq::reference::ema_apply: sums: got 2 columns; wants 3, the columns of state.codebook");
    EXPECT_EQ(apply(from, s, matrix_view<float>(replacements.data.data(), 2, 2)),
              "cuvq::reference::ema_apply: replacements: got 2 columns; wants 3, the columns of state.codebook");
    EXPECT_EQ(apply(from, s, matrix_view<float>(nullptr, 2, d)),
              "cuvq::reference::ema_apply: replacements: got a null pointer; wants 2 x 3 elements");
    for (const auto rule :
         {dead_code_rule::unused_steps, dead_code_rule::min_cluster_size, dead_code_rule::usage_ratio}) {
        params.dead_codes = rule;
        EXPECT_EQ(apply(from, s, discard),
                  "cuvq::reference::ema_apply: replacements: got discard; wants a matrix to draw from, or "
                  "dead_code_rule::none");
        EXPECT_EQ(apply(), "(no error)");
    }
}

TEST_F(EmaErrors, UpdateBatch) {
    const auto xs = x.view();
    const auto from = view(codes);
    EXPECT_EQ(update(matrix_view<float>(nullptr, n, d), from),
              "cuvq::reference::ema_update: x: got a null pointer; wants 4 x 3 elements");
    EXPECT_EQ(update(matrix_view<float>(x.data.data(), n, 2), from),
              "cuvq::reference::ema_update: x: got 2 columns; wants 3, the columns of state.codebook");
    EXPECT_EQ(update(xs, vector_view<std::int32_t>(nullptr, n)),
              "cuvq::reference::ema_update: codes: got a null pointer; wants 1 x 4 elements");
    EXPECT_EQ(update(xs, vector_view<std::int32_t>(codes.data(), 3)),
              "cuvq::reference::ema_update: codes: got 3 elements; wants 4, one for each row of x");
}

TEST_F(EmaErrors, TrainStepBatchAndOutputs) {
    const auto xs = x.view();
    const auto to = view(codes);
    matrix<float> q(n, d);
    EXPECT_EQ(train(xs, to, q.view(), {}), "(no error)");
    EXPECT_EQ(train(matrix_view<float>(x.data.data(), n, 2), to, discard, {}),
              "cuvq::reference::train_step: x: got 2 columns; wants 3, the columns of state.codebook");
    EXPECT_EQ(train(xs, vector_view<std::int32_t>(codes.data(), 3), discard, {}),
              "cuvq::reference::train_step: codes: got 3 elements; wants 4, one for each row of x");
    EXPECT_EQ(train(xs, to, matrix_view<float>(q.data.data(), 3, d), {}),
              "cuvq::reference::train_step: quantized: got 3 rows; wants 4, the rows of x");
    EXPECT_EQ(train(xs, to, matrix_view<float>(q.data.data(), n, 2), {}),
              "cuvq::reference::train_step: quantized: got 2 columns; wants 3, the columns of x");
    EXPECT_EQ(train(xs, to, matrix_view<float>(nullptr, n, d), {}),
              "cuvq::reference::train_step: quantized: got a null pointer; wants 4 x 3 elements");
    train_params p;
    p.metric = static_cast<metric>(99);
    EXPECT_EQ(train(xs, to, discard, p),
              "cuvq::reference::train_step: params.metric: got no enumerator of metric; wants metric::l2");
    p = {};
    p.accuracy = static_cast<accuracy>(99);
    EXPECT_EQ(train(xs, to, discard, p),
              "cuvq::reference::train_step: params.accuracy: got no enumerator of accuracy; wants accuracy::exact or "
              "accuracy::fast");
}

TEST_F(EmaErrors, CodesTooNarrowForK) {
    state = host_state<>(matrix<float>(257, d));
    std::vector<std::uint8_t> narrow(n);
    EXPECT_EQ(update(x.view(), view(narrow)),
              "cuvq::reference::ema_update: codes: got uint8 elements for K = 257; wants a type that holds K - 1");
    EXPECT_EQ(train(x.view(), view(narrow), discard, {}),
              "cuvq::reference::train_step: codes: got uint8 elements for K = 257; wants a type that holds K - 1");
}

/// Like EmaErrors, with a state that is spoilt after it became views.
struct StateErrors : EmaErrors {
    codebook_state<float> views = state.view();

    void expect_state_refused(const std::string& text) {
        EXPECT_EQ(refusal([&] { reference::ema_apply(views, view(counts), sums.view(), replacements.view(), params); }),
                  "cuvq::reference::ema_apply: " + text);
        EXPECT_EQ(refusal([&] { reference::ema_update(views, x.view(), view(codes), params); }),
                  "cuvq::reference::ema_update: " + text);
        EXPECT_EQ(refusal([&] { reference::train_step(views, x.view(), view(codes), discard, params); }),
                  "cuvq::reference::train_step: " + text);
        views = state.view();
    }
};

TEST_F(StateErrors, EmptyCodebook) {
    views.codebook = matrix_view<float>(nullptr, 0, d);
    expect_state_refused("state.codebook: got K = 0 rows; wants at least 1");
    views.codebook = matrix_view<float>(nullptr, k, 0);
    expect_state_refused("state.codebook: got D = 0 columns; wants at least 1");
}

TEST_F(StateErrors, NullPointers) {
    views.codebook = matrix_view<float>(nullptr, k, d);
    expect_state_refused("state.codebook: got a null pointer; wants 5 x 3 elements");
    views.embed_sum = matrix_view<float>(nullptr, k, d);
    expect_state_refused("state.embed_sum: got a null pointer; wants 5 x 3 elements");
    views.cluster_size = vector_view<float>(nullptr, k);
    expect_state_refused("state.cluster_size: got a null pointer; wants 1 x 5 elements");
    views.steps_since_active = vector_view<std::int32_t>(nullptr, k);
    expect_state_refused("state.steps_since_active: got a null pointer; wants 1 x 5 elements");
    views.step = nullptr;
    expect_state_refused("state.step: got a null pointer; wants the counter of updates");
}

TEST_F(StateErrors, MisalignedPointers) {
    views.codebook = matrix_view<float>(misaligned(state.codebook.data.data()), k, d);
    expect_state_refused("state.codebook: got a misaligned pointer; wants 4-byte alignment");
    views.cluster_size = vector_view<float>(misaligned(state.cluster_size.data()), k);
    expect_state_refused("state.cluster_size: got a misaligned pointer; wants 4-byte alignment");
    views.step = misaligned(&state.step);
    expect_state_refused("state.step: got a misaligned pointer; wants 8-byte alignment");
}

TEST_F(StateErrors, ShapesThatDoNotMatch) {
    views.embed_sum = matrix_view<float>(state.embed_sum.data.data(), 4, d);
    expect_state_refused("state.embed_sum: got 4 rows; wants 5, the rows of state.codebook");
    views.embed_sum = matrix_view<float>(state.embed_sum.data.data(), k, 2);
    expect_state_refused("state.embed_sum: got 2 columns; wants 3, the columns of state.codebook");
    views.cluster_size = vector_view<float>(state.cluster_size.data(), 4);
    expect_state_refused("state.cluster_size: got 4 elements; wants 5, the rows of state.codebook");
    views.steps_since_active = vector_view<std::int32_t>(state.steps_since_active.data(), 4);
    expect_state_refused("state.steps_since_active: got 4 elements; wants 5, the rows of state.codebook");
}

TEST_F(EmaErrors, NoSuchRule) {
    params.rule = static_cast<ema_rule>(99);
    expect_refused("params.rule: got no enumerator of ema_rule; wants one of its enumerators");
    params = {};
    params.dead_codes = static_cast<dead_code_rule>(99);
    expect_refused("params.dead_codes: got no enumerator of dead_code_rule; wants one of its enumerators");
}

TEST_F(EmaErrors, DecayOutsideZeroToOne) {
    params.decay = -0.25;
    expect_refused("params.decay: got -0.25; wants 0 to 1");
    params.decay = 1.5;
    expect_refused("params.decay: got 1.5; wants 0 to 1");
    params.decay = std::numeric_limits<double>::quiet_NaN();
    expect_refused("params.decay: got nan; wants 0 to 1");
    for (const double good : {0.0, 1.0}) {
        params.decay = good;
        EXPECT_EQ(update(), "(no error)");
    }
}

TEST_F(EmaErrors, NumbersThatMustBePositiveAndFinite) {
    const auto expect_positive = [&](float ema_params::*member, const std::string& name, dead_code_rule rule) {
        const std::pair<float, const char*> bad[] = {
            {0.0f, "0"}, {-1.5f, "-1.5"}, {nan, "nan"}, {infinity, "inf"}, {-infinity, "-inf"}};
        for (const auto& [value, text] : bad) {
            params = {};
            params.dead_codes = rule;
            params.*member = value;
            expect_refused("params." + name + ": got " + text + "; wants a finite number above 0");
        }
        params.*member = std::numeric_limits<float>::denorm_min();
        EXPECT_EQ(update(), "(no error)") << name;
    };
    expect_positive(&ema_params::epsilon, "epsilon", dead_code_rule::none);
    expect_positive(&ema_params::min_cluster_size, "min_cluster_size", dead_code_rule::min_cluster_size);
    expect_positive(&ema_params::reset_cluster_size, "reset_cluster_size", dead_code_rule::min_cluster_size);
    expect_positive(&ema_params::usage_ratio, "usage_ratio", dead_code_rule::usage_ratio);
    expect_positive(&ema_params::reset_usage_ratio, "reset_usage_ratio", dead_code_rule::usage_ratio);
}

TEST_F(EmaErrors, NumbersOfDeadCodeRulesThatAreNotChosenAreNotRead) {
    params.min_cluster_size = params.reset_cluster_size = params.usage_ratio = params.reset_usage_ratio = nan;
    params.restart_after_steps = params.check_every = -1;
    EXPECT_EQ(apply(), "(no error)");
    EXPECT_EQ(update(), "(no error)");
    EXPECT_EQ(train(), "(no error)");
}

TEST_F(EmaErrors, StepsBelowOne) {
    for (const std::int32_t bad : {0, -3}) {
        params = {};
        params.dead_codes = dead_code_rule::unused_steps;
        params.restart_after_steps = bad;
        expect_refused("params.restart_after_steps: got " + std::to_string(bad) + "; wants at least 1");
        params = {};
        params.dead_codes = dead_code_rule::usage_ratio;
        params.check_every = bad;
        expect_refused("params.check_every: got " + std::to_string(bad) + "; wants at least 1");
    }
}

TEST_F(EmaErrors, BiasCorrectionOutsideLaplaceOrWithoutDecay) {
    params.bias_correction = true;
    for (const auto rule : {ema_rule::active_only, ema_rule::clamp}) {
        params.rule = rule;
        expect_refused("params.bias_correction: got true with another rule; wants ema_rule::laplace with it");
    }
    params.rule = ema_rule::laplace;
    EXPECT_EQ(update(), "(no error)");
    // The last but one is below 1, but not as a float.
    for (const double decay : {1.0, 1.0 - 1e-9}) {
        params.decay = decay;
        expect_refused("params.bias_correction: got true with decay = 1; wants decay below 1 with it");
    }
    params.bias_correction = false;
    EXPECT_EQ(update(), "(no error)");
}

TEST_F(EmaErrors, ReplacementIndices) {
    params.replacement_indices = view(indices);
    EXPECT_EQ(update(), "(no error)");
    params.replacement_indices = vector_view<const std::int64_t>(indices.data(), 4);
    expect_refused("params.replacement_indices: got 4 elements; wants 5, one for each code");
    params.replacement_indices = vector_view<const std::int64_t>(nullptr, k);
    expect_refused("params.replacement_indices: got a null pointer; wants 1 x 5 elements");
    params.replacement_indices = vector_view<const std::int64_t>(misaligned(indices.data()), k);
    expect_refused("params.replacement_indices: got a misaligned pointer; wants 8-byte alignment");
}

TEST_F(EmaErrors, Stats) {
    step_stats stats;
    params.stats = misaligned(&stats);
    expect_refused("params.stats: got a misaligned pointer; wants 8-byte alignment");
}

TEST_F(EmaErrors, Weights) {
    params.weights = view(weights);
    EXPECT_EQ(update(), "(no error)");
    params.weights = vector_view<const float>(weights.data(), 3);
    EXPECT_EQ(update(), "cuvq::reference::ema_update: params.weights: got 3 elements; wants 4, one for each row of x");
    EXPECT_EQ(train(), "cuvq::reference::train_step: params.weights: got 3 elements; wants 4, one for each row of x");
    params.weights = vector_view<const float>(nullptr, n);
    EXPECT_EQ(update(), "cuvq::reference::ema_update: params.weights: got a null pointer; wants 1 x 4 elements");
    EXPECT_EQ(train(), "cuvq::reference::train_step: params.weights: got a null pointer; wants 1 x 4 elements");
}

TEST_F(EmaErrors, ARefusedCallWritesNothing) {
    state.step = 7;
    state.cluster_size.assign(k, 2);
    const host_state<> before = state;
    codes.assign(n, 1);
    counts.assign(k, 1);
    params.decay = 2;
    EXPECT_NE(apply(), "(no error)");
    EXPECT_NE(update(), "(no error)");
    EXPECT_NE(train(), "(no error)");
    EXPECT_TRUE(same_bits(state, before));
    EXPECT_EQ(state.step, 7);
    EXPECT_EQ(codes, std::vector<std::int32_t>(n, 1));
}

TEST(CodebookErrors, EachArgument) {
    EXPECT_EQ(refusal([] { reference::codebook<float>(0, 3); }),
              "cuvq::reference::codebook: codebook: got K = 0 rows; wants at least 1");
    EXPECT_EQ(refusal([] { reference::codebook<float>(-5, 3); }),
              "cuvq::reference::codebook: codebook: got K = -5 rows; wants at least 1");
    EXPECT_EQ(refusal([] { reference::codebook<float>(3, 0); }),
              "cuvq::reference::codebook: codebook: got D = 0 columns; wants at least 1");
    EXPECT_EQ(refusal([] { reference::codebook<float>(3, -2); }),
              "cuvq::reference::codebook: codebook: got D = -2 columns; wants at least 1");
    reference::codebook<float> codebook(k, d);
    matrix<float> x(n, d);
    EXPECT_EQ(refusal([&] { codebook.init_from_rows(x.view(), 1); }), "(no error)");
    EXPECT_EQ(refusal([&] { codebook.init_from_rows(matrix_view<float>(nullptr, 0, d), 1); }),
              "cuvq::reference::codebook::init_from_rows: x: got 0 rows; wants at least 1");
    EXPECT_EQ(refusal([&] { codebook.init_from_rows(matrix_view<float>(x.data.data(), n, 2), 1); }),
              "cuvq::reference::codebook::init_from_rows: x: got 2 columns; wants 3, the columns of the codebook");
    EXPECT_EQ(refusal([&] { codebook.init_from_rows(matrix_view<float>(nullptr, n, d), 1); }),
              "cuvq::reference::codebook::init_from_rows: x: got a null pointer; wants 4 x 3 elements");
    EXPECT_EQ(refusal([&] { codebook.init_from_rows(matrix_view<float>(misaligned(x.data.data()), n, d), 1); }),
              "cuvq::reference::codebook::init_from_rows: x: got a misaligned pointer; wants 4-byte alignment");
}

// ---- memory that overlaps -------------------------------------------------------------------------------------------

/// One block of memory per argument of a call, any two of which can be put at the same address.
class arguments {
public:
    explicit arguments(std::vector<std::string> names) : names_(std::move(names)), memory_(names_.size() * words) {
        reset();
    }
    template <class T>
    T* at(const std::string& name) {
        for (std::size_t i = 0; i < names_.size(); ++i)
            if (names_[i] == name) return reinterpret_cast<T*>(address_[i]);
        throw std::logic_error("no argument " + name);
    }
    /// Puts argument `b` where `a` lies.
    void alias(const std::string& a, const std::string& b) {
        reset();
        for (std::size_t i = 0; i < names_.size(); ++i)
            if (names_[i] == b) address_[i] = at<std::uint64_t>(a);
    }
    void reset() {
        address_.clear();
        for (std::size_t i = 0; i < names_.size(); ++i) address_.push_back(memory_.data() + i * words);
    }

private:
    static constexpr std::size_t words = 64;
    std::vector<std::string> names_;
    std::vector<std::uint64_t> memory_;
    std::vector<std::uint64_t*> address_;
};

/// Pairs (argument named first in the text, the other one) must be refused when they share memory.
void expect_overlaps_refused(const std::string& function, arguments& memory, const std::function<void()>& call,
                             const std::vector<std::pair<std::string, std::string>>& pairs) {
    EXPECT_EQ(refusal(call), "(no error)");
    for (const auto& [written, other] : pairs) {
        memory.alias(written, other);
        EXPECT_EQ(refusal(call), "cuvq::reference::" + function + ": " + written + ": got memory that overlaps " +
                                     other + "; wants memory of its own, since it is written");
    }
}

TEST(OverlapErrors, Quantize) {
    arguments a({"codes", "quantized", "distances", "params.stats", "x", "codebook"});
    expect_overlaps_refused("quantize", a,
                            [&] {
                                quantize_params p;
                                p.stats = a.at<step_stats>("params.stats");
                                reference::quantize(matrix_view<float>(a.at<float>("x"), n, d),
                                                    matrix_view<float>(a.at<float>("codebook"), k, d),
                                                    vector_view<std::int32_t>(a.at<std::int32_t>("codes"), n),
                                                    matrix_view<float>(a.at<float>("quantized"), n, d),
                                                    vector_view<float>(a.at<float>("distances"), n), p);
                            },
                            {{"codes", "quantized"},
                             {"codes", "distances"},
                             {"codes", "params.stats"},
                             {"codes", "x"},
                             {"codes", "codebook"},
                             {"quantized", "distances"},
                             {"quantized", "params.stats"},
                             {"quantized", "x"},
                             {"quantized", "codebook"},
                             {"distances", "params.stats"},
                             {"distances", "x"},
                             {"distances", "codebook"},
                             {"params.stats", "x"},
                             {"params.stats", "codebook"}});
}

TEST(OverlapErrors, Lookup) {
    arguments a({"quantized", "codebook", "codes"});
    expect_overlaps_refused("lookup", a,
                            [&] {
                                reference::lookup(matrix_view<float>(a.at<float>("codebook"), k, d),
                                                  vector_view<std::int32_t>(a.at<std::int32_t>("codes"), n),
                                                  matrix_view<float>(a.at<float>("quantized"), n, d));
                            },
                            {{"quantized", "codebook"}, {"quantized", "codes"}});
}

TEST(OverlapErrors, Accumulate) {
    arguments a({"counts", "sums", "params.stats", "x", "codes", "params.weights"});
    expect_overlaps_refused("accumulate", a,
                            [&] {
                                accumulate_params p;
                                p.weights = vector_view<const float>(a.at<float>("params.weights"), n);
                                p.stats = a.at<step_stats>("params.stats");
                                reference::accumulate(matrix_view<float>(a.at<float>("x"), n, d),
                                                      vector_view<std::int32_t>(a.at<std::int32_t>("codes"), n),
                                                      vector_view<float>(a.at<float>("counts"), k),
                                                      matrix_view<float>(a.at<float>("sums"), k, d), p);
                            },
                            {{"counts", "sums"},
                             {"counts", "params.stats"},
                             {"counts", "x"},
                             {"counts", "codes"},
                             {"counts", "params.weights"},
                             {"sums", "params.stats"},
                             {"sums", "x"},
                             {"sums", "codes"},
                             {"sums", "params.weights"},
                             {"params.stats", "x"},
                             {"params.stats", "codes"},
                             {"params.stats", "params.weights"}});
}

const std::vector<std::string> state_names = {"state.codebook", "state.embed_sum", "state.cluster_size",
                                              "state.steps_since_active", "state.step"};

codebook_state<float> state_of(arguments& a) {
    return {matrix_view<float>(a.at<float>("state.codebook"), k, d),
            matrix_view<float>(a.at<float>("state.embed_sum"), k, d),
            vector_view<float>(a.at<float>("state.cluster_size"), k),
            vector_view<std::int32_t>(a.at<std::int32_t>("state.steps_since_active"), k),
            a.at<std::int64_t>("state.step")};
}

/// Each array of the state with each later one, and with each of `others`.
std::vector<std::pair<std::string, std::string>> state_pairs(const std::vector<std::string>& others) {
    std::vector<std::pair<std::string, std::string>> pairs;
    for (std::size_t i = 0; i < state_names.size(); ++i) {
        for (std::size_t j = i + 1; j < state_names.size(); ++j) pairs.emplace_back(state_names[i], state_names[j]);
        for (const std::string& other : others) pairs.emplace_back(state_names[i], other);
    }
    return pairs;
}

std::vector<std::string> state_and(std::vector<std::string> others) {
    others.insert(others.begin(), state_names.begin(), state_names.end());
    return others;
}

TEST(OverlapErrors, EmaApply) {
    const std::vector<std::string> read = {"counts", "sums", "replacements", "params.replacement_indices"};
    arguments a(state_and({"params.stats", "counts", "sums", "replacements", "params.replacement_indices"}));
    auto pairs = state_pairs({"params.stats", "counts", "sums", "replacements", "params.replacement_indices"});
    for (const std::string& name : read) pairs.emplace_back("params.stats", name);
    expect_overlaps_refused(
        "ema_apply", a,
        [&] {
            ema_params p;
            p.stats = a.at<step_stats>("params.stats");
            p.replacement_indices =
                vector_view<const std::int64_t>(a.at<std::int64_t>("params.replacement_indices"), k);
            reference::ema_apply(state_of(a), vector_view<float>(a.at<float>("counts"), k),
                                 matrix_view<float>(a.at<float>("sums"), k, d),
                                 matrix_view<float>(a.at<float>("replacements"), 2, d), p);
        },
        pairs);
}

TEST(OverlapErrors, EmaUpdate) {
    const std::vector<std::string> read = {"x", "codes", "params.weights", "params.replacement_indices"};
    arguments a(state_and({"params.stats", "x", "codes", "params.weights", "params.replacement_indices"}));
    auto pairs = state_pairs({"params.stats", "x", "codes", "params.weights", "params.replacement_indices"});
    for (const std::string& name : read) pairs.emplace_back("params.stats", name);
    expect_overlaps_refused(
        "ema_update", a,
        [&] {
            ema_params p;
            p.stats = a.at<step_stats>("params.stats");
            p.weights = vector_view<const float>(a.at<float>("params.weights"), n);
            p.replacement_indices =
                vector_view<const std::int64_t>(a.at<std::int64_t>("params.replacement_indices"), k);
            reference::ema_update(state_of(a), matrix_view<float>(a.at<float>("x"), n, d),
                                  vector_view<std::int32_t>(a.at<std::int32_t>("codes"), n), p);
        },
        pairs);
}

TEST(OverlapErrors, TrainStep) {
    arguments a(state_and({"params.stats", "x", "codes", "quantized", "params.weights", "params.replacement_indices"}));
    auto pairs = state_pairs({"params.stats", "x", "codes", "params.weights", "params.replacement_indices"});
    for (const std::string name : {"x", "codes", "params.weights", "params.replacement_indices"})
        pairs.emplace_back("params.stats", name);
    for (const std::string name : {"embed_sum", "cluster_size", "steps_since_active", "step"})
        pairs.emplace_back("state." + name, "quantized");
    for (const std::string name : {"x", "quantized", "params.weights", "params.replacement_indices"})
        pairs.emplace_back("codes", name);
    for (const std::string name :
         {"x", "state.codebook", "params.stats", "params.weights", "params.replacement_indices"})
        pairs.emplace_back("quantized", name);
    expect_overlaps_refused(
        "train_step", a,
        [&] {
            train_params p;
            p.stats = a.at<step_stats>("params.stats");
            p.weights = vector_view<const float>(a.at<float>("params.weights"), n);
            p.replacement_indices =
                vector_view<const std::int64_t>(a.at<std::int64_t>("params.replacement_indices"), k);
            reference::train_step(state_of(a), matrix_view<float>(a.at<float>("x"), n, d),
                                  vector_view<std::int32_t>(a.at<std::int32_t>("codes"), n),
                                  matrix_view<float>(a.at<float>("quantized"), n, d), p);
        },
        pairs);
}

TEST(OverlapErrors, NoneWhereOutputsInterleaveWithInputsInOneWiderMatrix) {
    // [ x | quantized ] side by side in rows of 6.
    matrix<float> both{{1, 2, 3, 0, 0, 0}, {4, 5, 6, 0, 0, 0}};
    const matrix<float> codebook{{1, 2, 3}, {4, 5, 6}};
    std::vector<std::int32_t> codes(2);
    reference::quantize(strided(both.data.data(), 2, d, 6), codebook.view(), view(codes),
                        strided(both.data.data() + 3, 2, d, 6));
    EXPECT_TRUE(same_bits(both, matrix<float>{{1, 2, 3, 1, 2, 3}, {4, 5, 6, 4, 5, 6}}));
}

TEST(OverlapErrors, NoneWhereInputsShareMemory) {
    const matrix<float> rows{{1, 2, 3}, {4, 5, 6}};
    std::vector<std::int32_t> codes(2);
    EXPECT_EQ(refusal([&] { reference::quantize(rows.view(), rows.view(), view(codes)); }), "(no error)");
    EXPECT_EQ(codes, (std::vector<std::int32_t>{0, 1}));
}

}  // namespace
}  // namespace cuvq::test
