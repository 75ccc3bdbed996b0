// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/device/accumulate.cuh>

#include <cmath>
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "support/device.cuh"
#include "support/random.hpp"
#include "support/types.hpp"

namespace cuvq::test {
namespace {

/// A user's kernel: one block of 64 threads sums the rows of one code, through shared memory or straight from global.
template <int V, class X>
__global__ void sum_of_code(const X* x, const float* weights, const int* codes, int code, int rows, int columns,
                            bool through_shared, float* sum) {
    constexpr int most_columns = 300;
    __shared__ X shared_row[most_columns];
    float mine[V] = {};
    for (int i = 0; i < rows; ++i) {
        if (codes[i] != code) continue;
        const X* row = x + std::int64_t{i} * columns;
        if (through_shared) {
            __syncthreads();
            for (int d = threadIdx.x; d < columns; d += 64) shared_row[d] = row[d];
            __syncthreads();
            row = shared_row;
        }
        device::accumulate_row(mine, row, weights[i], columns, threadIdx.x, 64);
    }
    for (int v = 0; v < V; ++v) {
        const int d = static_cast<int>(threadIdx.x) + 64 * v;
        if (d < columns) sum[d] = mine[v];
    }
}

template <class T>
class AccumulateRowSmall : public gpu_test {};
TYPED_TEST_SUITE(AccumulateRowSmall, element_types, type_names);

template <int V, class X>
void expect_sum_in_order(random_source& random, std::int64_t columns) {
    constexpr std::int64_t rows = 40;
    const auto x = random.normals<X>(rows, columns);
    std::vector<float> weights;
    std::vector<int> codes;
    for (std::int64_t i = 0; i < rows; ++i) {
        weights.push_back(random.normal());
        codes.push_back(static_cast<int>(random.integer(0, 2)));
    }
    std::vector<float> wanted(static_cast<std::size_t>(columns));
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t d = 0; d < columns && codes[i] == 1; ++d)
            wanted[d] = std::fma(weights[i], x.at(i, d), wanted[d]);
    const device_matrix<X> device_x(x);
    const device_array<float> device_weights(weights);
    const device_array<int> device_codes(codes);
    for (const bool through_shared : {false, true}) {
        const device_array<float> sum(columns);
        sum_of_code<V><<<1, 64>>>(device_x.data(), device_weights.data(), device_codes.data(), 1,
                                  static_cast<int>(rows), static_cast<int>(columns), through_shared, sum.data());
        check(cudaGetLastError());
        EXPECT_TRUE(same_bits(sum.download(), wanted)) << columns << " columns";
    }
}

TYPED_TEST(AccumulateRowSmall, IsOneFusedMultiplyAddPerElementInTheOrderOfTheCalls) {
    random_source random;
    for (const std::int64_t columns : {1, 63, 64}) expect_sum_in_order<1, TypeParam>(random, columns);
    for (const std::int64_t columns : {1, 5, 65, 130, 255, 256}) expect_sum_in_order<4, TypeParam>(random, columns);
}

}  // namespace
}  // namespace cuvq::test
