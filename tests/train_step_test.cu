// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/train_step.cuh>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <cuda_fp16.h>

#include <cuvq/accumulate.cuh>
#include <cuvq/lookup.cuh>
#include <cuvq/prepare.cuh>
#include <cuvq/quantize.cuh>

#include "support/device.cuh"
#include "support/large.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/searches.cuh"
#include "support/training.hpp"
#include "support/types.hpp"
#include "support/update_judge.hpp"

namespace cuvq::test {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

/// The memory of a train step.
template <class T, class X, class Int = std::int32_t>
struct train_memory {
    device_state<T> state;
    device_matrix<X> x;
    device_array<Int> codes;
    device_matrix<X> quantized;
    device_array<float> weights;
    device_array<step_stats> stats{1};
    train_params params;
    shape size;
    prepared_codebook prepared{};  // of the state, or none

    train_memory(const host_state<T>& s, const matrix<X>& rows, const ema_params& p,
                 const std::vector<float>& weight_of = {}, row_layout layout = {})
        : state(s),
          x(rows, layout),
          codes(rows.rows, layout.offset),
          quantized(rows.rows, rows.columns, layout),
          weights(weight_of, layout.offset),
          params(p),
          size{rows.rows, s.codebook.rows, rows.columns} {
        params.stats = stats.data();
        if (!weight_of.empty()) params.weights = vector_view<const float>(weights.data(), weights.size());
    }
    /// Prepares the codebook, in `room` for that; the state carries it from here on.
    void carry(const workspace& room) {
        prepared = {room.data, room.bytes};
        prepare(state.view().codebook, prepared);
    }
    /// The state, with what it carries.
    codebook_state<T> view() const {
        auto with = state.view();
        with.prepared = prepared;
        return with;
    }
    void run(const workspace& ws = {}, cudaStream_t stream = nullptr) {
        train_step(view(), x.view(), codes.view(), quantized.view(), params, ws, stream);
    }
    void poison_outputs() {
        codes.fill(poison);
        quantized.fill(poison);
        stats.fill(poison);
    }
    std::size_t workspace_bytes() const { return train_step_workspace_bytes(size, params); }
    std::vector<std::int64_t> signed_codes() const {
        const auto stored = codes.download();
        return {stored.begin(), stored.end()};
    }
};

/// Everything that a step leaves.
template <class T, class X>
struct left_behind {
    host_state<T> state;
    std::vector<std::int64_t> codes;
    matrix<X> quantized;
    step_stats stats;

    template <class Int>
    explicit left_behind(const train_memory<T, X, Int>& m)
        : state(m.state.download()),
          codes(m.signed_codes()),
          quantized(m.quantized.download()),
          stats(m.stats.download()[0]) {}
};

template <class T, class X>
bool same(const left_behind<T, X>& a, const left_behind<T, X>& b) {
    return same_state(a.state, b.state) && a.codes == b.codes && same_bits(a.quantized, b.quantized) &&
           std::memcmp(&a.stats, &b.stats, sizeof(step_stats)) == 0;
}

/// One step, judged; the state after it.
template <class T, class X>
host_state<T> expect_step(const host_state<T>& before, const matrix<X>& x, const ema_params& params,
                          const std::vector<float>& weights = {}, row_layout layout = {}) {
    train_memory<T, X> memory(before, x, params, weights, layout);
    const device_workspace ws(memory.workspace_bytes());
    memory.run(ws.lent());
    EXPECT_TRUE(ws.guard_untouched());
    const left_behind<T, X> got(memory);
    EXPECT_TRUE(codes_are_nearest(x, before.codebook, got.codes));
    EXPECT_TRUE(rows_are_of(before.codebook, got.codes, got.quantized));
    EXPECT_TRUE(memory.quantized.padding_untouched());
    ema_params host = params;
    if (!weights.empty()) host.weights = view(weights);
    EXPECT_TRUE(update_of_batch_is_right(before, x, got.codes, host, got.state, got.stats));
    const double loss = search_stats(x, before.codebook, got.codes).commitment_loss;
    EXPECT_NEAR(got.stats.commitment_loss, loss, loss_tolerance * loss);
    return got.state;
}

class TrainStepSmall : public gpu_test {};
class TrainStepTest : public gpu_test {};
class LargeTest : public gpu_test {};

// ---- prepared codebooks ---------------------------------------------------------------------------------------------

TEST_F(TrainStepSmall, AStateThatCarriesAPreparedCodebookKeepsItFresh) {
    random_source random;
    for (const std::int64_t d : {24, 64, 300}) {
        SCOPED_TRACE(testing::Message() << "D = " << d);
        const host_state<float> start(random.normals<float>(300, d));
        const auto x = random.normals<float>(3000, d);
        auto params = ema_params::rectokens();
        params.restart_after_steps = 2;
        train_memory<float, float> plain(start, x, params), carrying(start, x, params);
        const device_workspace space(prepared_codebook_bytes(300, d));
        carrying.carry(space.lent());
        for (int step = 0; step < 4; ++step) {
            plain.run();
            carrying.run();
            ASSERT_TRUE(same(left_behind<float, float>(plain), left_behind<float, float>(carrying))) << "step " << step;
        }

        const auto expect_fresh = [&](const char* after) {
            device_array<std::int32_t> with(3000), without(3000);
            quantize_params search;
            quantize(carrying.x.view(), carrying.view().codebook, without.view(), discard, discard, search);
            search.prepared = carrying.prepared;
            quantize(carrying.x.view(), carrying.view().codebook, with.view(), discard, discard, search);
            EXPECT_EQ(with.download(), without.download()) << after;
        };
        params.decay = 0.1;
        ema_update(carrying.view(), carrying.x.view(), carrying.codes.view(), params);
        expect_fresh("ema_update");
        const device_array<float> counts(std::vector<float>(300, 1.0f));
        const device_matrix<float> sums(random.normals<float>(300, d));
        params.dead_codes = dead_code_rule::none;
        ema_apply(carrying.view(), counts.view(), sums.view(), discard, params);
        expect_fresh("ema_apply");
        EXPECT_TRUE(space.guard_untouched());
    }
    train_memory<float, float> memory(host_state<float>(random.normals<float>(20, 8)), random.normals<float>(30, 8),
                                      ema_params::rectokens());
    memory.prepared.bytes = 1000;
    EXPECT_EQ(refusal([&] { memory.run(); }),
              "cuvq::train_step: state.prepared: got a null pointer; wants a device pointer, or none at all");
}

/// An image in host memory.
struct read_image {
    std::vector<float> centre;
    float scale = 0;
    device::score_bounds most{};  // over all entries
    matrix<double> rows;          // of every code, decoded: C^
    std::vector<double> offsets;  // n
    bool twofold = false;         // whether each element is there in two halves

    read_image(const prepared_codebook& prepared, std::int64_t k, std::int64_t d)
        : centre(static_cast<std::size_t>(d)), rows(k, d), offsets(static_cast<std::size_t>(k)) {
        const device::image_ref image = image_of(prepared, k, d);
        check(cudaDeviceSynchronize());
        check(cudaMemcpy(centre.data(), image.centre, centre.size() * sizeof(float), cudaMemcpyDeviceToHost));
        check(cudaMemcpy(&scale, image.scale, sizeof scale, cudaMemcpyDeviceToHost));
        std::vector<device::score_bounds> bounds(static_cast<std::size_t>(image.parts(k)));
        check(cudaMemcpy(bounds.data(), image.bounds, bounds.size() * sizeof(bounds[0]), cudaMemcpyDeviceToHost));
        const auto largest = [](float a, float b) { return b > a || b != b ? b : a; };  // NaN: no bound at all
        for (const auto& b : bounds)
            most = {largest(most.norm, b.norm), largest(most.residual, b.residual), largest(most.offset, b.offset),
                    largest(most.offset_rest, b.offset_rest)};
        const std::int64_t tile = device::image_tile * image.layout.row_bytes();
        std::vector<char> bytes(static_cast<std::size_t>(image.tiles(k) * tile));
        check(cudaMemcpy(bytes.data(), image.rows, bytes.size(), cudaMemcpyDeviceToHost));
        const auto element = [&](std::int64_t code, std::int64_t column) {
            __half half;
            const auto at = code / device::image_tile * tile +
                            image.layout.offset(device::image_tile, static_cast<int>(code % device::image_tile),
                                                static_cast<int>(column / 8 * 8)) +
                            column % 8 * 2;
            std::memcpy(&half, &bytes[static_cast<std::size_t>(at)], sizeof half);
            return __half2float(half);
        };
        twofold = d <= 4;  // then columns 0 to 3 hold high halves, and so do 4 to 7; 8 to 11 the low ones
        const std::int64_t n_column = d <= 4 ? 12 : d <= 13 ? 13 : d;
        for (std::int64_t code = 0; code < k; ++code) {
            for (std::int64_t c = 0; c < d; ++c) {
                rows(code, c) = static_cast<double>(element(code, c)) + (twofold ? element(code, c + 8) : 0.0f);
                if (twofold) EXPECT_EQ(element(code, c + 4), element(code, c)) << "code " << code << ", column " << c;
            }
            for (int part = 0; part < 3; ++part)
                offsets[static_cast<std::size_t>(code)] += element(code, n_column + part);
            for (std::int64_t c = d; c < image.layout.columns(); ++c)
                if ((twofold ? c % 4 >= d || c >= 12 : true) && (c < n_column || c >= n_column + 3))
                    EXPECT_EQ(element(code, c), 0) << "code " << code << ", column " << c;
        }
    }

    /// Whether this is the image of a codebook, with bounds that hold; `tight`: and are no larger than they have to be.
    template <class T>
    testing::AssertionResult is_of(const matrix<T>& codebook, bool tight) const {
        double norm = 0, residual = 0, offset = 0, least_shift = inf, most_shift = -inf, largest = 0;
        for (std::int64_t k = 0; k < codebook.rows; ++k) {
            double true_square = 0, square = 0, rest = 0;
            for (std::int64_t d = 0; d < codebook.columns; ++d) {
                const double v =
                    static_cast<double>(scale) * (static_cast<double>(static_cast<float>(codebook.at(k, d))) -
                                                  static_cast<double>(centre[static_cast<std::size_t>(d)]));
                const double held =
                    rows.data[static_cast<std::size_t>(k * codebook.columns + d)];  // not rounded to float
                true_square += v * v;
                square += held * held;
                rest += (v - held) * (v - held);
            }
            norm = std::max(norm, std::sqrt(square));
            residual = std::max(residual, std::sqrt(rest));
            const double n = offsets[static_cast<std::size_t>(k)];
            offset = std::max(offset, std::abs(n));
            largest = std::max(largest, true_square);
            least_shift = std::min(least_shift, n + true_square / 2);
            most_shift = std::max(most_shift, n + true_square / 2);
        }
        if (!(norm > most.norm || residual > most.residual) && !(most.offset_rest < inf))
            return testing::AssertionSuccess();  // some row does not fit fp16, and the bounds say so
        if (!(norm <= most.norm && residual <= most.residual && offset <= most.offset + most.offset_rest))
            return testing::AssertionFailure() << "norm " << norm << ", " << most.norm << "; residual " << residual
                                               << ", " << most.residual << "; offset " << offset << ", " << most.offset;
        // One shift for all.
        if (!(most_shift - least_shift <= 2 * most.offset_rest + 1e-13 * (largest + offset)))
            return testing::AssertionFailure() << "shifts from " << least_shift << " to " << most_shift;
        if (tight && most.offset_rest < inf &&
            !(most.norm <= (twofold ? 1.003 : 1.001) * norm && most.residual <= 1.001 * residual &&
              most.offset <= 1.001 * (offset + most.offset_rest)))
            return testing::AssertionFailure()
                   << "loose: norm " << norm << ", " << most.norm << "; residual " << residual << ", " << most.residual
                   << "; offset " << offset << ", " << most.offset;
        return testing::AssertionSuccess();
    }
};

/// Steps of a state that carries a prepared codebook, against those of one that does not. `batch(step)`: rows.
template <class T, class Batch>
void expect_image_follows(const host_state<T>& start, const ema_params& params, int steps, const Batch& batch,
                          float most_norm) {
    const std::int64_t k = start.codebook.rows, d = start.codebook.columns;
    train_memory<T, float> plain(start, batch(0), params), carrying(start, batch(0), params);
    const device_workspace space(prepared_codebook_bytes(k, d));
    carrying.carry(space.lent());
    ASSERT_TRUE(read_image(carrying.prepared, k, d).is_of(start.codebook, true));
    for (int step = 0; step < steps; ++step) {
        SCOPED_TRACE(testing::Message() << "step " << step);
        plain.x.upload(batch(step));
        carrying.x.upload(batch(step));
        plain.run();
        carrying.run();
        const left_behind<T, float> after(carrying);
        ASSERT_TRUE(same(left_behind<T, float>(plain), after));
        const read_image image(carrying.prepared, k, d);
        ASSERT_TRUE(image.is_of(after.state.codebook, step > 0));
        if (step == steps - 1) EXPECT_LE(image.most.norm, most_norm);
    }
    EXPECT_TRUE(space.guard_untouched());
}

TEST_F(TrainStepSmall, AnImageFollowsEveryRule) {
    random_source random;
    for (const std::int64_t d : {3, 4, 9}) {
        std::vector<matrix<float>> batches;
        for (int step = 0; step < 4; ++step) batches.push_back(random.normals<float>(150, d));
        for (const auto& [name, params] : every_rule()) {
            SCOPED_TRACE(testing::Message() << name << ", " << d << " columns");
            expect_image_follows(
                trained_state<float>(random, 60, d), params, 4,
                [&](int step) { return batches[static_cast<std::size_t>(step)]; }, 200.0f);
        }
    }
}

TEST_F(TrainStepTest, AnImageFollowsACodebookFromZeroToFarAwayAndOn) {
    random_source random;
    auto rectokens = ema_params::rectokens();
    rectokens.restart_after_steps = 2;
    rectokens.decay = 0.5;
    auto clamp = ema_params::mimi();
    clamp.decay = 0.2;
    clamp.check_every = 1;
    for (const auto& params : {rectokens, clamp})
        for (const std::int64_t n : {700, 9000})
            for (const std::int64_t d : {3, 5, 64, 130, 300}) {
                SCOPED_TRACE(testing::Message() << n << " rows, " << d << " columns");
                const std::int64_t k = d == 130 ? 33 : 300;
                const auto noise = random.normals<float>(n, d);
                // From zero, to 1000 standard deviations away, to a million, with a slow drift, then staying there.
                const auto batch = [&](int step) {
                    const float offset = step < 4 ? 1000.0f : step < 8 ? 1000.0f + 20.0f * step : 1e6f;
                    return matrix<float>::generate(n, d, [&](auto i, auto c) { return offset + noise.at(i, c); });
                };
                expect_image_follows(host_state<float>(matrix<float>(k, d)), params, 16, batch, 200.0f);
            }
}

TEST_F(TrainStepSmall, AnImageFollowsBadRowsAndOtherTypes) {
    random_source random;
    auto before = trained_state<__nv_bfloat16>(random, 140, 20);
    before.codebook(3, 4) = __float2bfloat16(nan);
    auto x = random.normals<__nv_bfloat16>(200, 20);
    x(5, 5) = __float2bfloat16(nan);
    train_memory<__nv_bfloat16, __nv_bfloat16> plain(before, x, ema_params::encodec()),
        carrying(before, x, ema_params::encodec());
    const device_workspace space(prepared_codebook_bytes(140, 20));
    carrying.carry(space.lent());
    for (int step = 0; step < 4; ++step) {
        plain.run();
        carrying.run();
        ASSERT_TRUE(
            same(left_behind<__nv_bfloat16, __nv_bfloat16>(plain), left_behind<__nv_bfloat16, __nv_bfloat16>(carrying)))
            << "step " << step;
    }
}

TEST_F(TrainStepSmall, ReplaysKeepAnImageAsEagerStepsDo) {
    random_source random;
    for (const auto& [name, params] : presets()) {
        SCOPED_TRACE(name);
        const auto before = trained_state<float>(random, 80, 6);
        train_memory<float, float> memory(before, random.normals<float>(60, 6), params);
        const device_array<char> space(static_cast<std::int64_t>(prepared_codebook_bytes(80, 6)));
        const workspace room{space.data(), static_cast<std::size_t>(space.size())};
        memory.carry(room);
        captured_graph graph([&](cudaStream_t stream) { memory.run({}, stream); });
        check(cudaDeviceSynchronize());  // the graph's stream does not wait for that of the preparation
        for (int step = 0; step < 5; ++step) graph.replay();
        const left_behind<float, float> replayed(memory);
        const auto image = space.download();
        memory.state.upload(before);
        memory.carry(room);
        for (int step = 0; step < 5; ++step) memory.run();
        EXPECT_TRUE(same(left_behind<float, float>(memory), replayed));
        EXPECT_EQ(space.download(), image);
    }
}

// ---- steps ----------------------------------------------------------------------------------------------------------

template <class Elements>
class TrainStepTypes : public gpu_test {
protected:
    using x = typename Elements::x;
    using codebook = typename Elements::codebook;
};
template <class Elements>
class TrainStepTypesSmall : public TrainStepTypes<Elements> {};
// The search and the update have tests of their own for every pair; a step only joins them.
using step_elements =
    testing::Types<elements<float, float>, elements<__half, float>, elements<__nv_bfloat16, __nv_bfloat16>>;
TYPED_TEST_SUITE(TrainStepTypes, step_elements, type_names);
TYPED_TEST_SUITE(TrainStepTypesSmall, step_elements, type_names);

TYPED_TEST(TrainStepTypesSmall, PresetsStepByStep) {
    random_source random;
    for (const auto& [name, params] : presets()) {
        SCOPED_TRACE(name);
        auto state = trained_state<typename TestFixture::codebook>(random, 40, 7);
        for (int step = 0; step < 4; ++step) {
            auto x = random.normals<typename TestFixture::x>(70, 7);
            x(9, 6) = nan;
            x(69, 0) = inf;
            std::vector<float> weights;
            for (int i = 0; i < 70 && step == 1; ++i) weights.push_back(std::abs(random.normal()));
            if (step == 1) weights[3] = nan;
            state = expect_step(state, x, params, weights, step == 2 ? awkward : row_layout{});
        }
    }
}

TEST_F(TrainStepSmall, EveryRuleStepByStep) {
    random_source random;
    for (const auto& [name, params] : every_rule()) {
        SCOPED_TRACE(name);
        auto state = trained_state<float>(random, 30, 5);
        for (int step = 0; step < 4; ++step) state = expect_step(state, random.normals<float>(66, 5), params);
    }
}

/// A step against `quantize` and `ema_update`, bit by bit; its codes.
std::vector<std::int64_t> expect_quantize_then_update(const host_state<float>& before, const matrix<float>& x,
                                                      const ema_params& params, accuracy how) {
    train_memory<float, float> whole(before, x, params), parts(before, x, params);
    whole.params.accuracy = how;
    whole.run();
    quantize_params search;
    search.accuracy = how;
    search.stats = parts.stats.data();
    quantize(parts.x.view(), parts.state.view().codebook, parts.codes.view(), parts.quantized.view(), discard, search);
    const double loss = parts.stats.download()[0].commitment_loss;
    ema_update(parts.state.view(), parts.x.view(), parts.codes.view(), parts.params);
    auto stats = parts.stats.download();
    EXPECT_EQ(stats[0].commitment_loss, 0);
    stats[0].commitment_loss = loss;
    parts.stats.upload(stats);
    EXPECT_TRUE(same(left_behind<float, float>(whole), left_behind<float, float>(parts)));
    return whole.signed_codes();
}

TEST_F(TrainStepSmall, IsQuantizeThenUpdate) {
    random_source random;
    for (const auto& [name, params] : presets())
        for (const accuracy how : {accuracy::exact, accuracy::fast}) {
            SCOPED_TRACE(testing::Message() << name << ", accuracy " << static_cast<int>(how));
            auto x = random.normals<float>(140, 11);
            x(77, 1) = nan;
            expect_quantize_then_update(trained_state<float>(random, 50, 11), x, params, how);
        }
}

TEST_F(TrainStepTest, FastCodesAreThoseOfAFastQuantize) {
    random_source random;
    constexpr std::int64_t k = 600;
    const bool is_hopper = dispatch::serves_sm90<sm90_d77, float, float>(k, 64);  // this device and build
    for (const std::int64_t n : {5000, 10000})  // updated in one launch, and by sorting
        for (const std::int64_t d : {8, 64, 300}) {
            SCOPED_TRACE(testing::Message() << n << " rows, " << d << " columns");
            // Every code has a near copy, which half precision hardly tells from it.
            auto before = trained_state<float>(random, k, d);
            for (std::int64_t j = k / 2; j < k; ++j)
                for (std::int64_t c = 0; c < d; ++c)
                    before.codebook(j, c) = before.codebook.at(j - k / 2, c) * (1 + 0x1p-14f * random.normal());
            auto x = random.normals<float>(n, d);
            x(77, 1) = nan;
            const auto params = ema_params::rectokens();
            const auto exact = expect_quantize_then_update(before, x, params, accuracy::exact);
            const auto fast = expect_quantize_then_update(before, x, params, accuracy::fast);
            // Else equal states would show nothing.
            EXPECT_EQ(fast != exact, is_hopper && d <= sm90_d269::dimensions);
        }
}

TEST_F(TrainStepTest, ASearchThatCountsDigitsSparesTheUpdateALaunch) {
    random_source random;
    const bool is_hopper = dispatch::serves_sm90<sm90_d77, float, float>(600, 64);  // this device and build
    struct {
        std::int64_t n, k, d;
        bool counts;
    } cases[] = {{65536, 1000, 64, true},  // a chunk of rows for each block of the search
                 {600001, 300, 20, true},  // two
                 {60001, 256, 9, true},    // where -1 may be a code, but not of this type
                 {40000, 5000, 40, true},  // sorted digit by digit
                 {40000, 65536, 3, true},  // both of these
                 {9000, 1, 128, false},    // searched without tensor cores
                 {10000, 2000, 3, false},  // too little room
                 {3000, 300, 20, false}};  // not sorted
    for (const auto& [n, k, d, counts] : cases) {
        SCOPED_TRACE(testing::Message() << n << " rows, " << k << " codes, " << d << " columns");
        auto x = random.normals<float>(n, d);
        x(n / 3, 1) = nan;
        const auto before = trained_state<float>(random, k, d);
        const auto params = ema_params::rectokens();
        const auto codes = expect_quantize_then_update(before, x, params, accuracy::exact);
        EXPECT_EQ(expect_quantize_then_update(before, x, params, accuracy::exact), codes);

        train_memory<float, float> memory(before, x, params, std::vector<float>(static_cast<std::size_t>(n), 0.5f));
        const auto step = [&](const train_params& p) {
            return launches([&](cudaStream_t stream) {
                train_step(memory.state.view(), memory.x.view(), memory.codes.view(), discard, p, {}, stream);
            });
        };
        const int search = launches([&](cudaStream_t stream) {
            quantize(memory.x.view(), memory.state.view().codebook, memory.codes.view(), discard, discard, {}, {},
                     stream);
        });
        const int update = launches([&](cudaStream_t stream) {
            ema_update(memory.state.view(), memory.x.view(), memory.codes.view(), params, {}, stream);
        });
        EXPECT_EQ(step(params), search + update - (is_hopper && counts));
        train_params weighted = params;
        weighted.weights = memory.params.weights;
        EXPECT_EQ(step(weighted), search + update) << "a row with a bad weight is not sorted";
    }
}

/// Searches and steps that are captured, never run: memory is all they need.
struct launch_memory {
    static constexpr std::int64_t codes = 600;
    std::int64_t n, d;
    train_memory<float, float> step;
    device_array<float> distances;
    device_array<char> image;

    launch_memory(std::int64_t rows, std::int64_t columns)
        : n(rows),
          d(columns),
          step(host_state<float>(matrix<float>(codes, d)), matrix<float>(n, d), {}),
          distances(n),
          image(static_cast<std::int64_t>(prepared_codebook_bytes(codes, d))) {}

    prepared_codebook prepared() const { return {image.data(), static_cast<std::size_t>(image.size())}; }

    template <class Quantized, class Distances>
    int of_search(bool carries, accuracy how, const Quantized& quantized, const Distances& to) const {
        quantize_params params;
        params.accuracy = how;
        if (carries) params.prepared = prepared();
        return launches([&](cudaStream_t stream) {
            quantize(step.x.view(), step.state.view().codebook, step.codes.view(), quantized, to, params, {}, stream);
        });
    }
    codebook_state<float> state(bool carries) const {
        auto s = step.state.view();
        if (carries) s.prepared = prepared();
        return s;
    }
    int of_update(bool carries, const ema_params& params) const {
        return launches([&](cudaStream_t stream) {
            ema_update(state(carries), step.x.view(), step.codes.view(), params, {}, stream);
        });
    }
    int of_step(bool carries, const ema_params& params) const {
        return launches([&](cudaStream_t stream) {
            train_step(state(carries), step.x.view(), step.codes.view(), step.quantized.view(), params, {}, stream);
        });
    }
};

/// Whether this device and build have Hopper's own searches.
bool has_hopper_searches() { return dispatch::serves_sm90<sm90_d77, float, float>(launch_memory::codes, 64); }

/// Most rows that the search of a single launch takes.
std::int64_t few_rows() { return std::int64_t{kernel::row_results::rows} * few_waves * processors(); }

TEST_F(TrainStepTest, FewRowsArePreparedAndSearchedInALaunchEach) {
    if (!has_hopper_searches()) GTEST_SKIP() << "no searches of Hopper's own on this device, as compiled";
    for (const std::int64_t d : {1, 3, 13, 14, 64, 141, 269})
        for (const std::int64_t n : {std::int64_t{1}, std::int64_t{65}, few_rows(), few_rows() + 1}) {
            SCOPED_TRACE(testing::Message() << n << " rows, " << d << " columns");
            const launch_memory memory(n, d);
            const auto quantized = memory.step.quantized.view();
            const auto distances = memory.distances.view();
            const bool few = n <= few_rows();  // else those left open, and outputs, have launches of their own
            for (const accuracy how : {accuracy::exact, accuracy::fast}) {
                EXPECT_EQ(memory.of_search(true, how, discard, discard), few ? 1 : 2);
                EXPECT_EQ(memory.of_search(true, how, quantized, distances), few ? 1 : 3);
                EXPECT_EQ(memory.of_search(false, how, discard, discard), few ? 2 : 3);
            }
        }
}

TEST_F(TrainStepTest, AStepOfFewRowsThatCarriesAPreparedCodebookIsTwoLaunches) {
    if (!has_hopper_searches()) GTEST_SKIP() << "no searches of Hopper's own on this device, as compiled";
    const ema_params active_only;
    ema_params clamp;
    clamp.rule = ema_rule::clamp;
    for (const std::int64_t d : {1, 3, 64, 269})
        for (const std::int64_t n : {1, 4096, 8192, 8193, 20000}) {
            SCOPED_TRACE(testing::Message() << n << " rows, " << d << " columns");
            const launch_memory memory(n, d);
            for (const auto& params : {active_only, clamp}) {
                const int carrying = memory.of_step(true, params);
                if (n <= std::min<std::int64_t>(gather_shapes::most_rows, few_rows())) EXPECT_EQ(carrying, 2);
                EXPECT_EQ(memory.of_step(false, params), carrying + 1) << "a launch spared";
            }
        }
}

TEST_F(TrainStepTest, APreparedCodebookIsMadeInALaunchOrTwoAndKeptFreshInNoneMore) {
    for (const std::int64_t d : {3, 269, 270})
        for (const std::int64_t n : {300, 9000}) {
            const launch_memory memory(n, d);
            const auto preparing = [&](cudaStream_t stream) {
                prepare(memory.state(false).codebook, memory.prepared(), stream);
            };
            EXPECT_EQ(launches(preparing), d > 269 ? 2 : 1);
            const device_array<float> counts(memory.codes);
            const device_matrix<float> sums(memory.codes, d);
            for (const auto& rule : every_rule()) {
                SCOPED_TRACE(testing::Message() << rule.first << ", " << n << " rows, " << d << " columns");
                const ema_params& params = rule.second;
                EXPECT_EQ(memory.of_update(true, params), memory.of_update(false, params));
                const auto applying = [&](bool carries) {
                    return launches([&](cudaStream_t stream) {
                        ema_apply(memory.state(carries), counts.view(), sums.view(), memory.step.x.view(), params, {},
                                  stream);
                    });
                };
                EXPECT_EQ(applying(true), applying(false));
            }
        }
}

TEST_F(TrainStepSmall, EmptyAndSingleBatchesAndACodebookLargerThanTheBatch) {
    random_source random;
    for (const auto& [name, params] : presets()) {
        SCOPED_TRACE(name);
        expect_step(trained_state<float>(random, 9, 4), matrix<float>(0, 4), params);
        expect_step(trained_state<float>(random, 9, 4), random.normals<float>(1, 4), params);
        expect_step(trained_state<float>(random, 1, 4), random.normals<float>(20, 4), params);
        expect_step(trained_state<float>(random, 200, 4), random.normals<float>(33, 4), params);
        expect_step(trained_state<float>(random, 5, 4), matrix<float>(7, 4, nan), params);
    }
}

TEST_F(TrainStepSmall, OddDimensions) {
    random_source random;
    for (const std::int64_t d : {1, 3, 31, 33, 64, 129})
        expect_step(trained_state<float>(random, 20, d), random.normals<float>(80, d), ema_params::encodec());
}

TEST_F(TrainStepSmall, AStaticNumberOfColumnsChangesNothing) {
    random_source random;
    const auto before = trained_state<float>(random, 20, 24);
    const auto x = random.normals<float>(80, 24);
    train_memory<float, float> dynamic(before, x, ema_params::mimi()), fixed(before, x, ema_params::mimi());
    dynamic.run();
    const auto s = fixed.state.view();
    const codebook_state<float, 24> state{matrix_view<float, 24>(s.codebook.data_handle(), 20),
                                          matrix_view<float, 24>(s.embed_sum.data_handle(), 20), s.cluster_size,
                                          s.steps_since_active, s.step};
    train_step(state, fixed.x.fixed<24>(), fixed.codes.view(), fixed.quantized.view(), fixed.params);
    EXPECT_TRUE(same(left_behind<float, float>(fixed), left_behind<float, float>(dynamic)));
}

/// Steps with as many codes as Int has values, so that the mark of a row without a code is one too: as with codes that
/// tell them apart, but for that mark.
template <class Int>
void expect_marks_to_be_told_from_codes(std::int64_t n, std::int64_t d) {
    SCOPED_TRACE(testing::Message() << n << " rows, " << d << " columns, codes of " << sizeof(Int) << " bytes");
    constexpr std::int64_t k = std::int64_t{1} << 8 * sizeof(Int), mark = k - 1;
    random_source random;
    const auto before = trained_state<float>(random, k, d);
    auto x = random.normals<float>(n, d);
    for (std::int64_t i = 0; i < n; i += 9)
        for (std::int64_t c = 0; c < d; ++c) x(i, c) = before.codebook.at(mark, c) + 0.01f * x.at(i, c);
    for (std::int64_t i = 0; i < n; i += 30) x(i, i / 30 % d) = i % 4 ? nan : -inf;  // of those rows, too
    std::vector<float> weights;
    for (std::int64_t i = 0; i < n; ++i) weights.push_back(std::abs(random.normal()));
    weights[18] = nan;  // a row close to the code that is the mark
    // Few rows are summed by a launch that updates as well, or by one before that.
    for (const auto& params : {ema_params{}, ema_params::vector_quantize_pytorch()})
        for (const bool plain : {true, false}) {
            const auto own_weights = plain ? std::vector<float>{} : weights;
            const auto layout = plain ? row_layout{} : awkward;
            train_memory<float, float, Int> memory(before, x, params, own_weights, layout);
            train_memory<float, float> wide(before, x, params, own_weights, layout);
            memory.run();
            wide.run();
            const left_behind<float, float> got(memory);
            left_behind<float, float> wanted(wide);
            EXPECT_EQ(std::count(wanted.codes.begin(), wanted.codes.end(), -1), (n - 1) / 30 + 1);
            EXPECT_GT(std::count(wanted.codes.begin(), wanted.codes.end(), mark), n / 100);
            // The oracle is slow, and codes depend on no params.
            if (plain && params.rule == ema_rule::active_only && k <= 256)
                EXPECT_TRUE(codes_are_nearest(x, before.codebook, wanted.codes));
            ema_params host = params;
            if (!plain) host.weights = view(own_weights);
            EXPECT_TRUE(update_of_batch_is_right(before, x, wanted.codes, host, got.state, got.stats));
            std::replace(wanted.codes.begin(), wanted.codes.end(), std::int64_t{-1}, mark);
            EXPECT_TRUE(same(got, wanted));
        }
}

TEST_F(TrainStepSmall, ARowOfNanMovesNothingWhereItsMarkIsACode) {
    for (const std::int64_t d : {2, 130}) expect_marks_to_be_told_from_codes<std::uint8_t>(300, d);
}

TEST_F(TrainStepTest, RowsOfNanAmongManyMoveNothingWhereTheirMarkIsACode) {
    for (const std::int64_t d : {2, 130, 300}) expect_marks_to_be_told_from_codes<std::uint8_t>(9000, d);
    expect_marks_to_be_told_from_codes<std::uint8_t>(8300, 5);   // sorted, but few for the search
    expect_marks_to_be_told_from_codes<std::uint16_t>(9000, 3);  // sorted digit by digit
}

TEST_F(TrainStepSmall, ACodebookWithoutAFiniteRowTakesNoRowsWhereTheirMarkIsACode) {
    random_source random;
    for (const std::int64_t n : {90, 9000}) {  // in one launch, and sorted; rows all finite, so that no sum tells
        const auto x = random.normals<float>(n, 2);
        auto before = trained_state<float>(random, 256, 2);
        before.codebook = matrix<float>(256, 2, nan);
        train_memory<float, float, std::uint8_t> memory(before, x, ema_params{});
        memory.run();
        const auto rows = static_cast<std::size_t>(n);
        EXPECT_EQ(memory.signed_codes(), std::vector<std::int64_t>(rows, 255));
        const auto stats = memory.stats.download()[0];
        EXPECT_EQ(stats.invalid_rows, n);
        EXPECT_EQ(stats.active_codes, 0);
        const std::vector<std::int64_t> none(rows, -1);
        EXPECT_TRUE(update_of_batch_is_right(before, x, none, ema_params{}, memory.state.download(), stats));
    }
}

TEST_F(TrainStepTest, ManyColumns) {
    random_source random;
    for (const std::int64_t d : {768, 2050})
        expect_step(trained_state<float>(random, 60, d), random.normals<float>(150, d), ema_params::rectokens());
}

TEST_F(TrainStepTest, ThousandsOfRowsAndCodes) {
    random_source random;
    for (const auto& [name, params] : presets()) {
        SCOPED_TRACE(name);
        auto state = initial_state(random.normals<float>(1000, 16), params);
        for (int step = 0; step < 6; ++step) state = expect_step(state, random.normals<float>(3000, 16), params);
    }
}

// ---- outputs, workspace, refusals -----------------------------------------------------------------------------------

TEST_F(TrainStepSmall, WorkspaceAndOptionalOutputsChangeNothing) {
    random_source random;
    for (const auto& [name, params] : presets()) {
        SCOPED_TRACE(name);
        const auto before = trained_state<float>(random, 33, 7);
        train_memory<float, float> memory(before, random.normals<float>(150, 7), params);
        memory.run();
        const left_behind<float, float> whole(memory);
        memory.state.upload(before);
        memory.poison_outputs();
        const device_workspace ws(memory.workspace_bytes());
        memory.run(ws.lent());
        EXPECT_TRUE(same(left_behind<float, float>(memory), whole));
        EXPECT_TRUE(ws.guard_untouched());
        memory.state.upload(before);
        memory.poison_outputs();
        train_step(memory.state.view(), memory.x.view(), memory.codes.view(), discard, train_params(params));
        EXPECT_TRUE(same_state(memory.state.download(), whole.state));
        EXPECT_EQ(memory.signed_codes(), whole.codes);
        EXPECT_TRUE(memory.quantized.untouched());
        EXPECT_TRUE(memory.stats.untouched());
    }
}

/// Expects of a call in so many bytes of workspace that it allocates nothing, and without one that it does: else the
/// former would show nothing. call(workspace, stream).
template <class Call>
void expect_allocations(const char* function, std::size_t bytes, const Call& call) {
    ASSERT_GT(bytes, 0u) << function;
    const device_workspace ws(bytes);
    EXPECT_EQ(allocations([&](cudaStream_t stream) { call(ws.lent(), stream); }), 0) << function;
    EXPECT_EQ(allocations([&](cudaStream_t stream) { call(workspace{}, stream); }), 1) << function;
}

TEST_F(TrainStepSmall, NothingIsAllocatedWhereAWorkspaceIsGiven) {
    for (const std::int64_t n : {300, 9000})
        for (const std::int64_t d : {20, 300}) {
            SCOPED_TRACE(testing::Message() << n << " rows, " << d << " columns");
            const std::int64_t k = launch_memory::codes;
            const shape size{n, k, d};
            const launch_memory memory(n, d);
            const auto& step = memory.step;
            const auto x = step.x.view();
            const auto codes = step.codes.view();
            const auto state = step.state.view();
            const device_array<float> counts(k);
            const device_matrix<float> sums(k, d);
            step_stats* const stats = step.stats.data();
            quantize_params search;
            search.stats = stats;
            accumulate_params adding;
            adding.stats = stats;
            auto params = ema_params::vector_quantize_pytorch();
            params.stats = stats;
            expect_allocations("quantize", quantize_workspace_bytes(size, search), [&](auto ws, auto stream) {
                quantize(x, state.codebook, codes, step.quantized.view(), memory.distances.view(), search, ws, stream);
            });
            expect_allocations("accumulate", accumulate_workspace_bytes(size, adding), [&](auto ws, auto stream) {
                accumulate(x, codes, counts.view(), sums.view(), adding, ws, stream);
            });
            expect_allocations("ema_apply", ema_apply_workspace_bytes(size, params), [&](auto ws, auto stream) {
                ema_apply(state, counts.view(), sums.view(), x, params, ws, stream);
            });
            expect_allocations("ema_update", ema_update_workspace_bytes(size, params),
                               [&](auto ws, auto stream) { ema_update(state, x, codes, params, ws, stream); });
            expect_allocations("train_step", train_step_workspace_bytes(size, params), [&](auto ws, auto stream) {
                train_step(state, x, codes, step.quantized.view(), params, ws, stream);
            });
            // These have no use for one.
            EXPECT_EQ(allocations([&](auto stream) { prepare(state.codebook, memory.prepared(), stream); }), 0);
            EXPECT_EQ(allocations([&](auto stream) { lookup(state.codebook, codes, step.quantized.view(), stream); }),
                      0);
        }
}

TEST(TrainStepWorkspaceSmall, ThatOfASearchIsAtMostTwentyFourBytesARowAndFourCodebooks) {
    step_stats stats;  // not followed
    for (const std::int64_t n : {0, 1, 65, 1024, 8192, 8193, 40000, 1 << 20, 1 << 24})
        for (const std::int64_t k : {1, 16, 255, 1000, 1025, 2048, 16384, 65536})
            for (const std::int64_t d : {1, 2, 3, 13, 14, 77, 78, 141, 142, 269, 270, 1024, 5000}) {
                SCOPED_TRACE(testing::Message() << n << " x " << k << " x " << d);
                quantize_params params;
                const auto bytes = [&] {
                    return static_cast<std::int64_t>(quantize_workspace_bytes({n, k, d}, params));
                };
                // With an image of its own, which is of whole tiles of 128 codes, each of 32 bytes at least.
                const std::int64_t image_codes = (k + 127) / 128 * 128, own_image = bytes();
                if (d >= 3) EXPECT_LE(own_image, 24 * n + 16 * image_codes * d);
                params.stats = &stats;  // documented on top: 8 bytes per code and 256 KB
                EXPECT_LE(bytes(), own_image + 8 * k + (256 << 10) + 2 * 256);
                params.stats = nullptr;
                // With one that the caller has prepared.
                params.prepared = {&stats, prepared_codebook_bytes(k, d)};
                EXPECT_LE(bytes(), 24 * n + 16 * k * d + 8 * 256);
            }
}

TEST(TrainStepWorkspaceSmall, IsAtMostTwentyFourBytesARowAndFourCodebooks) {
    for (const shape& size :
         {shape{1 << 20, 1024, 128}, shape{1 << 20, 4096, 128}, shape{1 << 20, 16384, 64}, shape{65536, 8192, 256},
          shape{262144, 16384, 8}, shape{32768, 65536, 512}, shape{1 << 20, 512, 3}, shape{100000, 256, 1},
          shape{1 << 20, 256, 256}, shape{65536, 256, 1024}, shape{8193, 16384, 2}, shape{32768, 65535, 2},
          shape{9000, 255, 256}, shape{8193, 2049, 1}, shape{4096, 512, 64}, shape{8, 2048, 256}, shape{1, 1, 1},
          shape{0, 300, 20}})
        for (const bool reports : {false, true}) {
            train_params params;
            params.rule = ema_rule::laplace;
            step_stats stats;
            if (reports) params.stats = &stats;  // not followed
            // Counts of open rows, and images of the narrowest codebooks, take 16 KB that grow with nothing.
            const std::int64_t rounding = 64 * workspace::alignment, losses = reports ? 257 << 10 : 0;
            EXPECT_LE(static_cast<std::int64_t>(train_step_workspace_bytes(size, params)),
                      24 * size.vectors + 16 * size.codes * size.dimensions + losses + rounding)
                << size.vectors << " x " << size.codes << " x " << size.dimensions;
        }
}

TEST_F(TrainStepSmall, ARefusedCallNamesTheFunctionAndWritesNothing) {
    random_source random;
    const auto before = trained_state<float>(random, 10, 6);
    train_memory<float, float> memory(before, random.normals<float>(20, 6), ema_params::mimi());
    const std::size_t bytes = memory.workspace_bytes();
    const device_workspace block(bytes + 256);
    char* data = static_cast<char*>(block.lent().data);
    for (const workspace& ws :
         {workspace{data, bytes - 1}, workspace{data, 0}, workspace{data + 64, bytes}, workspace{nullptr, bytes}}) {
        const auto text = refusal([&] { memory.run(ws); });
        EXPECT_EQ(text.rfind("cuvq::train_step: workspace: ", 0), 0u) << text;
    }
    memory.params.decay = 1.5;
    EXPECT_EQ(refusal([&] { memory.run(); }).rfind("cuvq::train_step: params.decay: ", 0), 0u);
    EXPECT_TRUE(same_state(memory.state.download(), before));
    EXPECT_TRUE(memory.codes.untouched());
    EXPECT_TRUE(memory.quantized.untouched());
    EXPECT_TRUE(memory.stats.untouched());
}

// ---- determinism ----------------------------------------------------------------------------------------------------

TYPED_TEST(TrainStepTypes, TwentyRunsAreBitwiseEqual) {
    using x_type = typename TestFixture::x;
    using codebook_type = typename TestFixture::codebook;
    random_source random;
    // `close`: so many rows lie near a hundred codes that the filter cannot tell apart.
    const struct {
        std::int64_t n, k, d, close;
        bool weighted = false, carries = false;  // weights; a prepared codebook
    } cases[] = {
        {5000, 500, 20, 500},               // few rows: one launch sums them
        {5000, 500, 20, 500, true, true},   // as a step that prepares nothing
        {3000, 300, 130, 300},              // in two slices of columns
        {2000, 200, 300, 200},              // in three; more columns than Hopper's own search takes
        {9000, 500, 20, 900},               // many rows: sorted first
        {9000, 300, 200, 900},              // then summed in two slices
        {8500, 200, 300, 850},              // in three
        {40000, 1000, 64, 400},             // the search counts for the sort
        {9000, 1000, 64, 400, true},        // as it does not where rows have weights
        {9000, 2000, 100, 90, true, true},  // by one digit of many bins; the sums of wide rows
        {9000, 3000, 24, 40},               // by two digits; rows left open, so few that several blocks share each
        {9000, 3000, 24, 9000},             // more than several blocks share
        {9000, 2100, 300, 90, true, true},  // two digits and three slices
    };
    auto total = ema_params::vector_quantize_pytorch(), single = total;
    single.rule = ema_rule::active_only;
    for (const auto& [n, k, d, close, weighted, carries] : cases) {
        SCOPED_TRACE(testing::Message() << n << " rows, " << k << " codes, " << d << " columns, " << close << " close"
                                        << (weighted ? ", weights" : "") << (carries ? ", prepared" : ""));
        auto before = trained_state<codebook_type>(random, k, d);
        for (std::int64_t j = 1; j < 100; ++j)
            for (std::int64_t c = 0; c < d; ++c)
                before.codebook(j, c) =
                    static_cast<codebook_type>(before.codebook.at(0, c) * (1 + 0x1p-20f * random.normal()));
        auto x = random.normals<x_type>(n, d);
        for (std::int64_t i = 0; i < close; ++i)
            for (std::int64_t c = 0; c < d; ++c) {
                const std::int64_t row = i * (n / close);
                x(row, c) = static_cast<x_type>(before.codebook.at(0, c) + 0.1f * x.at(row, c));
            }
        std::vector<float> weights;
        for (std::int64_t i = 0; i < n && weighted; ++i) weights.push_back(std::abs(random.normal()));
        const device_array<char> image(carries ? static_cast<std::int64_t>(prepared_codebook_bytes(k, d)) : 0);
        for (const auto& params : {total, single}) {
            train_memory<codebook_type, x_type> memory(before, x, params, weights);
            const device_workspace ws(memory.workspace_bytes());
            const auto run_from_start = [&](const workspace& lent) {
                memory.state.upload(before);
                memory.poison_outputs();
                if (image.size() > 0) memory.carry({image.data(), static_cast<std::size_t>(image.size())});
                memory.run(lent);
                return left_behind<codebook_type, x_type>(memory);
            };
            const auto first = run_from_start({});
            const auto first_image = image.download();
            EXPECT_GT(first.stats.restarted_codes, 0);
            for (int run = 1; run < 20; ++run) {
                ASSERT_TRUE(same(run_from_start(run % 2 ? ws.lent() : workspace{}), first)) << "run " << run;
                ASSERT_EQ(image.download(), first_image) << "run " << run;
            }
            EXPECT_TRUE(ws.guard_untouched());
        }
    }
}

TEST_F(TrainStepTest, TwoStreamsAtOnce) {
    random_source random;
    const auto before_a = trained_state<float>(random, 300, 16), before_b = trained_state<float>(random, 400, 12);
    train_memory<float, float> a(before_a, random.normals<float>(5000, 16), ema_params::mimi());
    train_memory<float, __half> b(before_b, random.normals<__half>(4000, 12), ema_params::encodec());
    const auto sequence = [](auto& memory, cudaStream_t stream, const workspace& ws) {
        for (int step = 0; step < 5; ++step) memory.run(ws, stream);
    };
    sequence(a, nullptr, {});
    sequence(b, nullptr, {});
    const left_behind<float, float> alone_a(a);
    const left_behind<float, __half> alone_b(b);
    const device_workspace ws(b.workspace_bytes());
    const test_stream stream_a, stream_b;
    for (int round = 0; round < 4; ++round) {
        a.state.upload(before_a);
        b.state.upload(before_b);
        a.poison_outputs();
        b.poison_outputs();
        sequence(a, stream_a, {});
        sequence(b, stream_b, ws.lent());
        ASSERT_TRUE(same(left_behind<float, float>(a), alone_a));
        ASSERT_TRUE(same(left_behind<float, __half>(b), alone_b));
    }
}

/// Five replays of a captured step against five eager ones. The capture comes first: it must not need a warm-up.
void expect_replays_are_steps(bool lends, std::int64_t n = 60, std::int64_t k = 80, std::int64_t d = 6) {
    random_source random;
    for (const auto& [name, params] : presets()) {
        SCOPED_TRACE(name);
        auto before = trained_state<float>(random, k, d);
        for (auto& steps : before.steps_since_active) steps += 16;  // so that rectokens restarts some
        train_memory<float, float> memory(before, random.normals<float>(n, d), params);
        const device_workspace ws(memory.workspace_bytes());
        const workspace lent = lends ? ws.lent() : workspace{};
        captured_graph graph([&](cudaStream_t stream) { memory.run(lent, stream); });
        EXPECT_TRUE(same_state(memory.state.download(), before)) << "a capture runs nothing";
        std::vector<left_behind<float, float>> replayed;
        for (int step = 0; step < 5; ++step) {
            graph.replay();
            replayed.emplace_back(memory);
        }
        memory.state.upload(before);
        std::int64_t restarted = 0;
        for (int step = 0; step < 5; ++step) {
            memory.poison_outputs();
            memory.run(lent);
            const left_behind<float, float> eager(memory);
            EXPECT_TRUE(same(eager, replayed[static_cast<std::size_t>(step)])) << "step " << step;
            restarted += eager.stats.restarted_codes;
        }
        EXPECT_EQ(memory.state.download().step, before.step + 5);
        EXPECT_EQ(restarted > 0, params.dead_codes != dead_code_rule::none);
        // And all at once, without a look in between.
        memory.state.upload(before);
        for (int step = 0; step < 5; ++step) graph.replay();
        EXPECT_TRUE(same(left_behind<float, float>(memory), replayed.back()));
    }
}

TEST_F(TrainStepSmall, ReplaysInALentWorkspaceAreSteps) { expect_replays_are_steps(true); }

TEST_F(TrainStepSmall, ReplaysThatAllocateAreSteps) { expect_replays_are_steps(false); }

TEST_F(TrainStepTest, ReplaysOfManyRowsAndCodesAreSteps) { expect_replays_are_steps(true, 10000, 3000, 20); }

// ---- beyond 2^31 ----------------------------------------------------------------------------------------------------

TEST_F(LargeTest, MoreThan2To31ElementsOfTheState) {
    constexpr std::int64_t k = 70000, columns = 32768, n = 8;
    const shape size{n, k, columns};
    if (!has_free_memory(2 * static_cast<std::size_t>(k * columns) * sizeof(float) + train_step_workspace_bytes(size) +
                         (std::size_t{1} << 30)))
        GTEST_SKIP() << "too little device memory for a state of " << k << " x " << columns << " floats";
    const auto codebook = pattern_array<float>(k * columns, 17), embed_sum = pattern_array<float>(k * columns, 17);
    const device_array<float> cluster_size(std::vector<float>(k, 1.0f));
    device_array<std::int32_t> steps(k);
    steps.fill(0);
    const device_array<std::int64_t> step(std::vector<std::int64_t>{0});
    const codebook_state<float> state{matrix_view<float>(codebook.data(), k, columns),
                                      matrix_view<float>(embed_sum.data(), k, columns), cluster_size.view(),
                                      steps.view(), step.data()};
    const std::vector<std::int64_t> planted{0, 65535, 65536, 65537, k - 1, 65536, 1, 40000};
    const auto row_of = [&](std::int64_t code) { return pattern_rows<float>(code, 1, columns, 17); };
    const auto x = matrix<float>::generate(n, columns, [&](auto i, auto d) {
        return pattern(17, planted[i] * columns + d) + 0.125f * pattern(7, i * columns + d);
    });
    const device_matrix<float> rows(x);
    device_array<std::int32_t> codes(n);
    ema_params params;
    params.decay = 0.5;
    train_step(state, rows.view(), codes.view(), discard, params);
    const auto got = codes.download();
    EXPECT_EQ(std::vector<std::int64_t>(got.begin(), got.end()), planted);
    EXPECT_EQ(step.download()[0], 1);
    const auto sizes = cluster_size.download();
    const auto unused = steps.download();
    for (const std::int64_t code : {0, 1, 2, 40000, 65534, 65535, 65536, 65537, 65538, 69998, 69999}) {
        std::vector<std::int64_t> members;
        for (std::int64_t i = 0; i < n; ++i)
            if (planted[i] == code) members.push_back(i);
        const auto old = row_of(code);
        const auto now = codebook.download(code * columns, columns), sum = embed_sum.download(code * columns, columns);
        const double count = static_cast<double>(members.size());
        EXPECT_EQ(unused[code], members.empty() ? 1 : 0) << "code " << code;
        EXPECT_EQ(sizes[code], members.empty() ? 1.0f : static_cast<float>(0.5 + 0.5 * count)) << "code " << code;
        for (std::int64_t d = 0; d < columns; ++d) {
            double wanted = old.at(0, d);
            for (const std::int64_t i : members) wanted += x.at(i, d);
            if (!members.empty()) wanted *= 0.5;  // small multiples of 1/64: exact
            ASSERT_EQ(sum[d], wanted) << "code " << code << ", column " << d;
            const double row = members.empty() ? old.at(0, d) : wanted / (0.5 + 0.5 * count);
            ASSERT_NEAR(now[d], row, 0x1p-22 * std::abs(row)) << "code " << code << ", column " << d;
        }
    }
}

}  // namespace
}  // namespace cuvq::test
