// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/codebook.cuh>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <cuvq/quantize.cuh>
#include <cuvq/reference/codebook.hpp>
#include <cuvq/train_step.cuh>

#include "support/device.cuh"
#include "support/random.hpp"
#include "support/types.hpp"

namespace cuvq::test {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

static_assert(std::is_trivially_copyable_v<codebook_state<float>>);

template <class T>
void expect_same(const codebook<T>& got, const reference::codebook<T>& wanted) {
    EXPECT_EQ(got.codes(), wanted.codes());
    EXPECT_EQ(got.dimensions(), wanted.dimensions());
    EXPECT_TRUE(same_bits(got.rows(), wanted.rows()));
    EXPECT_TRUE(same_bits(got.embed_sum(), wanted.embed_sum()));
    EXPECT_EQ(got.cluster_size(), wanted.cluster_size());
    EXPECT_EQ(got.steps_since_active(), wanted.steps_since_active());
    EXPECT_EQ(got.step(), wanted.step());
}

/// Both codebooks, started from the same rows.
template <class T, class X>
void expect_same_start(const matrix<X>& x, std::int64_t k, std::uint64_t seed, initial_statistics initial,
                       row_layout layout = {}) {
    const device_matrix<X> rows(x, layout);
    codebook<T> got(k, x.columns);
    reference::codebook<T> wanted(k, x.columns);
    got.init_from_rows(rows.view(), seed, initial);
    wanted.init_from_rows(x.view(), seed, initial);
    expect_same(got, wanted);
}

class CodebookSmall : public gpu_test {};

template <class Elements>
class CodebookTypesSmall : public gpu_test {};
TYPED_TEST_SUITE(CodebookTypesSmall, element_pairs, type_names);

TYPED_TEST(CodebookTypesSmall, StartsFromTheRowsThatTheReferenceStartsFrom) {
    using T = typename TypeParam::codebook;
    using X = typename TypeParam::x;
    random_source random;
    for (const auto initial : {initial_statistics::zeros, initial_statistics::one_per_code})
        for (const std::int64_t k : {1, 20, 33, 90}) {  // fewer, as many and more codes than rows
            const auto x = random.normals<X>(33, 35);
            expect_same_start<T>(x, k, random.bits(), initial);
            expect_same_start<T>(x, k, random.bits(), initial, awkward);
        }
}

TEST_F(CodebookSmall, IsZeroBeforeItStarts) { expect_same(codebook<float>(5, 7), reference::codebook<float>(5, 7)); }

TEST_F(CodebookSmall, ABadRowGivesWayToTheNextFiniteOneAndNoneToZeros) {
    random_source random;
    auto x = random.normals<float>(200, 4);
    for (std::int64_t i = 20; i < 85; ++i) x(i, i % 4) = nan;  // 65 in a row: one more than the search goes
    for (std::int64_t i = 195; i < 200; ++i) x(i, 0) = std::numeric_limits<float>::infinity();
    expect_same_start<float>(x, 200, 1, initial_statistics::one_per_code);
    expect_same_start<float>(matrix<float>(3, 4, nan), 5, 1, initial_statistics::one_per_code);
}

TEST_F(CodebookSmall, StartsAfreshAfterSteps) {
    random_source random;
    const auto x = random.normals<float>(30, 3);
    const device_matrix<float> rows(x);
    codebook<float> got(10, 3);
    got.init_from_rows(rows.view(), 4, initial_statistics::one_per_code);
    const std::int64_t steps = 17;
    check(cudaMemcpy(got.state().step, &steps, sizeof steps, cudaMemcpyHostToDevice));
    check(cudaMemset(got.state().steps_since_active.data_handle(), 1, 10 * sizeof(std::int32_t)));
    EXPECT_EQ(got.step(), 17);
    got.init_from_rows(rows.view(), 5);
    reference::codebook<float> wanted(10, 3);
    wanted.init_from_rows(x.view(), 5);
    expect_same(got, wanted);
}

TEST_F(CodebookSmall, ACopyIsItsOwn) {
    random_source random;
    const device_matrix<float> rows(random.normals<float>(30, 3));
    codebook<float> original(10, 3);
    original.init_from_rows(rows.view(), 1);
    const auto before = original.rows();
    codebook<float> copy = original;
    EXPECT_EQ(copy.rows(), before);
    copy.init_from_rows(rows.view(), 2);
    EXPECT_EQ(original.rows(), before);
    EXPECT_NE(copy.rows(), before);
}

TEST_F(CodebookSmall, StartsOnAStreamAndInAGraph) {
    random_source random;
    const auto x = random.normals<float>(50, 6);
    const device_matrix<float> rows(x);
    reference::codebook<float> wanted(40, 6);
    wanted.init_from_rows(x.view(), 9);
    const test_stream stream;
    codebook<float> streamed(40, 6), captured(40, 6);
    streamed.init_from_rows(rows.view(), 9, initial_statistics::zeros, stream);
    expect_same(streamed, wanted);
    captured_graph graph(
        [&](cudaStream_t s) { captured.init_from_rows(rows.view(), 9, initial_statistics::zeros, s); });
    expect_same(captured, reference::codebook<float>(40, 6));
    graph.replay();
    expect_same(captured, wanted);
}

TEST_F(CodebookSmall, APreparedOneLearnsTheSame) {
    random_source random;
    constexpr std::int64_t n = 300, k = 40, d = 6;
    using fixed = matrix_view<const float, 6>;
    std::vector<device_matrix<float>> batches;
    for (int i = 0; i < 4; ++i) batches.emplace_back(random.normals<float>(n, d));
    const auto x = [&](int i) { return fixed(batches[i].data(), n); };
    device_array<std::int32_t> plain_codes(n), codes(n);
    codebook<float> plain(k, d), prepared(k, d);
    EXPECT_EQ(prepared.prepared().data, nullptr);
    for (const std::uint64_t seed : {1, 2}) {
        plain.init_from_rows(x(0), seed);
        prepared.init_from_rows(x(0), seed);
        if (seed == 1) {
            EXPECT_EQ(prepared.state().prepared.data, nullptr);
            prepared.prepare();
        }
        EXPECT_NE(prepared.state().prepared.data, nullptr);
        for (int i = 0; i < 4; ++i) {
            train_step(plain.state(), x(i), plain_codes.view(), discard, ema_params::rectokens());
            train_step(prepared.state(), x(i), codes.view(), discard, ema_params::rectokens());
            EXPECT_EQ(codes.download(), plain_codes.download());
            EXPECT_TRUE(same_bits(prepared.rows(), plain.rows()));
        }
    }
    codebook<float> copy = prepared, moved = codebook<float>(copy);
    EXPECT_NE(copy.prepared().data, moved.prepared().data);
    EXPECT_NE(copy.prepared().data, prepared.prepared().data);
    prepared.init_from_rows(x(1), 3);
    quantize_params params;
    params.prepared = moved.prepared();
    quantize(x(3), copy.state().codebook, codes.view(), discard, discard, params);
    quantize(x(3), plain.state().codebook, plain_codes.view());
    EXPECT_EQ(codes.download(), plain_codes.download());
}

TEST_F(CodebookSmall, APreparedOneInAGraph) {
    random_source random;
    constexpr std::int64_t n = 200, k = 500, d = 20;
    const device_matrix<float> first(random.normals<float>(n, d)), second(random.normals<float>(n, d));
    device_array<std::int32_t> plain_codes(n), codes(n);
    codebook<float> plain(k, d), prepared(k, d);
    prepared.prepare();
    captured_graph graph([&](cudaStream_t s) {
        prepared.init_from_rows(first.view(), 9, initial_statistics::zeros, s);
        train_step(prepared.state(), first.view(), codes.view(), discard, ema_params::rectokens(), {}, s);
        train_step(prepared.state(), second.view(), codes.view(), discard, ema_params::rectokens(), {}, s);
    });
    plain.init_from_rows(first.view(), 9);
    train_step(plain.state(), first.view(), plain_codes.view(), discard, ema_params::rectokens());
    train_step(plain.state(), second.view(), plain_codes.view(), discard, ema_params::rectokens());
    for (int replay = 0; replay < 2; ++replay) {
        graph.replay();
        EXPECT_EQ(codes.download(), plain_codes.download());
        EXPECT_TRUE(same_bits(prepared.rows(), plain.rows()));
    }
}

TEST_F(CodebookSmall, OneThatNothingIsPreparedOf) {
    codebook<float> wide(2, 65537);
    wide.prepare();
    EXPECT_EQ(wide.prepared().data, nullptr);
}

TEST_F(CodebookSmall, RefusesWhatCannotBe) {
    EXPECT_EQ(refusal([] { codebook<float>(0, 3); }).rfind("cuvq::codebook: ", 0), 0u);
    EXPECT_EQ(refusal([] { codebook<float>(3, 0); }).rfind("cuvq::codebook: ", 0), 0u);
    codebook<float> target(4, 3);
    const device_matrix<float> x(matrix<float>(5, 2, 1));
    const auto text = refusal([&] { target.init_from_rows(x.view(), 0); });
    EXPECT_EQ(text.rfind("cuvq::codebook::init_from_rows: x: ", 0), 0u) << text;
    EXPECT_NE(refusal([&] { target.init_from_rows(strided(x.data(), 0, 3, 3), 0); }).find("0 rows"), std::string::npos);
    expect_same(target, reference::codebook<float>(4, 3));
}

}  // namespace
}  // namespace cuvq::test
