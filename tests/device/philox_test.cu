// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Device draws against cuRAND's own Philox, against the host's, and against published answers.
#include <cuvq/device/philox.cuh>

#include <cstdint>
#include <limits>
#include <vector>

#include <curand_philox4x32_x.h>
#include <gtest/gtest.h>

#include "support/device.cuh"
#include "support/random.hpp"

namespace cuvq::test {
namespace {

struct question {
    std::uint32_t counter[4];
    std::uint32_t key[2];
};
struct answer {
    std::uint32_t ours[4];
    std::uint32_t curand[4];
};

__global__ void ask(const question* questions, int count, answer* answers) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= count) return;
    const question q = questions[i];
    const detail::philox_block ours =
        detail::philox4x32_10({{q.counter[0], q.counter[1], q.counter[2], q.counter[3]}}, q.key[0], q.key[1]);
    const uint4 theirs = curand_Philox4x32_10(make_uint4(q.counter[0], q.counter[1], q.counter[2], q.counter[3]),
                                              make_uint2(q.key[0], q.key[1]));
    for (int w = 0; w < 4; ++w) answers[i].ours[w] = ours.word[w];
    answers[i].curand[0] = theirs.x;
    answers[i].curand[1] = theirs.y;
    answers[i].curand[2] = theirs.z;
    answers[i].curand[3] = theirs.w;
}

struct draw {
    std::uint64_t seed;
    std::int64_t step, code, rows;
};

/// philox_row, and the same from cuRAND by the documented formula floor(u rows / 2^64).
__global__ void draw_rows(const draw* draws, int count, std::int64_t* ours, std::int64_t* curand) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= count) return;
    const draw d = draws[i];
    ours[i] = device::philox_row(d.seed, d.step, d.code, d.rows);
    const uint4 words =
        curand_Philox4x32_10(make_uint4(static_cast<unsigned>(d.code), static_cast<unsigned>(d.code >> 32),
                                        static_cast<unsigned>(d.step), static_cast<unsigned>(d.step >> 32)),
                             make_uint2(static_cast<unsigned>(d.seed), static_cast<unsigned>(d.seed >> 32)));
    const unsigned long long bits = (static_cast<unsigned long long>(words.y) << 32) | words.x;
    curand[i] = static_cast<std::int64_t>(__umul64hi(bits, static_cast<unsigned long long>(d.rows)));
}

class DevicePhiloxSmall : public gpu_test {};

TEST_F(DevicePhiloxSmall, IsThatOfCurandAndOfTheHostAndOfThePublishedAnswers) {
    random_source random;
    std::vector<question> questions{
        {{0, 0, 0, 0}, {0, 0}},
        {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}},
    };
    const std::uint32_t published[3][4] = {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
                                           {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
                                           {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
    while (questions.size() < 5000) {
        question q;
        for (auto& word : q.counter) word = static_cast<std::uint32_t>(random.bits());
        for (auto& word : q.key) word = static_cast<std::uint32_t>(random.bits());
        questions.push_back(q);
    }
    const int count = static_cast<int>(questions.size());
    const device_array<question> device_questions(questions);
    const device_array<answer> device_answers(count);
    ask<<<(count + 127) / 128, 128>>>(device_questions.data(), count, device_answers.data());
    check(cudaGetLastError());
    const auto answers = device_answers.download();
    for (int i = 0; i < count; ++i) {
        const question& q = questions[i];
        const auto host =
            detail::philox4x32_10({{q.counter[0], q.counter[1], q.counter[2], q.counter[3]}}, q.key[0], q.key[1]);
        for (int w = 0; w < 4; ++w) {
            ASSERT_EQ(answers[i].ours[w], answers[i].curand[w]) << "question " << i;
            ASSERT_EQ(answers[i].ours[w], host.word[w]) << "question " << i;
            if (i < 3) ASSERT_EQ(answers[i].ours[w], published[i][w]) << "question " << i;
        }
    }
}

TEST_F(DevicePhiloxSmall, DrawsAreThoseOfCurandAndOfTheHost) {
    random_source random;
    const std::int64_t sizes[] = {1, 2, 3, 1000, 0xFFFFFFFFll, 0x100000000ll, std::numeric_limits<std::int64_t>::max()};
    std::vector<draw> draws;
    for (int i = 0; i < 5000; ++i)
        draws.push_back({i < 1000 ? static_cast<std::uint64_t>(i) : random.bits(), random.integer(0, (1ll << 48) - 1),
                         random.integer(0, i % 2 ? 5000 : 1ll << 40), sizes[i % 7]});
    const int count = static_cast<int>(draws.size());
    const device_array<draw> device_draws(draws);
    const device_array<std::int64_t> ours(count), curand(count);
    draw_rows<<<(count + 127) / 128, 128>>>(device_draws.data(), count, ours.data(), curand.data());
    check(cudaGetLastError());
    const auto got = ours.download();
    EXPECT_EQ(got, curand.download());
    for (int i = 0; i < count; ++i) {
        const draw& d = draws[i];
        const auto bits =
            detail::philox_bits(d.seed, static_cast<std::uint64_t>(d.code), static_cast<std::uint64_t>(d.step));
        ASSERT_EQ(got[i], detail::scale_to(bits, d.rows)) << "draw " << i;
        ASSERT_GE(got[i], 0);
        ASSERT_LT(got[i], d.rows);
    }
}

}  // namespace
}  // namespace cuvq::test
