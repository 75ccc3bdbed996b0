// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>

#include <gtest/gtest.h>

#include "support/host.hpp"

namespace cuvq::test {

/// Random input of a test. The seed is CUVQ_TEST_SEED from the environment, or a fixed one; while the source lives,
/// every failure names it.
class random_source {
public:
    random_source() : random_source(seed_of_run()) {}

    std::uint64_t bits() { return engine_(); }
    /// lowest <= v <= highest
    std::int64_t integer(std::int64_t lowest, std::int64_t highest) {
        return std::uniform_int_distribution<std::int64_t>(lowest, highest)(engine_);
    }
    float normal() { return std::normal_distribution<float>()(engine_); }

    template <class T>
    matrix<T> integers(std::int64_t rows, std::int64_t columns, std::int64_t lowest, std::int64_t highest) {
        return matrix<T>::generate(rows, columns, [&](auto, auto) { return integer(lowest, highest); });
    }
    template <class T>
    matrix<T> normals(std::int64_t rows, std::int64_t columns) {
        return matrix<T>::generate(rows, columns, [&](auto, auto) { return normal(); });
    }

private:
    explicit random_source(std::uint64_t seed)
        : trace_(__FILE__, __LINE__, "CUVQ_TEST_SEED=" + std::to_string(seed)), engine_(seed) {}
    static std::uint64_t seed_of_run() {
        const char* text = std::getenv("CUVQ_TEST_SEED");
        return text ? std::strtoull(text, nullptr, 0) : 20170911;
    }

    testing::ScopedTrace trace_;
    std::mt19937_64 engine_;
};

}  // namespace cuvq::test
