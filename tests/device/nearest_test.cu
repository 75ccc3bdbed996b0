// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Kernels such as a user would write, around the block-level search.
#include <cuvq/device/nearest.cuh>

#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "support/device.cuh"
#include "support/nearest_cases.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"

namespace cuvq::test {
namespace {

// Tiles of other sizes than the library's own.
struct narrow_tile {
    static constexpr int threads = 64;
    static constexpr int rows = 8;
    static constexpr int codes = 32;
    static constexpr int depth = 8;
};
struct flat_tile {
    static constexpr int threads = 512;
    static constexpr int rows = 32;
    static constexpr int codes = 16;
    static constexpr int depth = 32;
};
struct tall_tile {
    static constexpr int threads = 128;
    static constexpr int rows = 32;
    static constexpr int codes = 80;
    static constexpr int depth = 8;
};

/// Rows straight from global memory, codes straight to it.
template <class Policy, std::size_t D, class X, class C>
__global__ void search_global(matrix_ref<const X> x, matrix_ref<const C> codebook, std::int64_t* codes) {
    __shared__ device::nearest_storage<Policy> storage;
    for (std::int64_t first = std::int64_t{blockIdx.x} * Policy::rows; first < x.rows;
         first += std::int64_t{gridDim.x} * Policy::rows) {
        const std::int64_t left = x.rows - first;
        const matrix_ref<const X> tile{x.row(first), left < Policy::rows ? left : Policy::rows, x.columns, x.stride};
        device::nearest<Policy, D>(storage, tile, codebook, codes + first);
    }
}

inline constexpr int most_columns = 40;

/// Rows made in registers (here: read and negated), put into shared memory; codes into shared memory, and used there.
template <class Policy, class X, class C>
__global__ void search_shared(matrix_ref<const X> x, matrix_ref<const C> codebook, std::int64_t* codes,
                              int* rows_of_code) {
    __shared__ device::nearest_storage<Policy> storage;
    __shared__ X rows[Policy::rows][most_columns + 1];
    __shared__ std::int64_t found[Policy::rows];
    for (std::int64_t first = std::int64_t{blockIdx.x} * Policy::rows; first < x.rows;
         first += std::int64_t{gridDim.x} * Policy::rows) {
        const int count = static_cast<int>(x.rows - first < Policy::rows ? x.rows - first : Policy::rows);
        const int size = count * static_cast<int>(x.columns);
        for (int e = threadIdx.x; e < size; e += Policy::threads) {
            const int row = e / static_cast<int>(x.columns), column = e % static_cast<int>(x.columns);
            const float made = -static_cast<float>(x.row(first + row)[column]);
            rows[row][column] = static_cast<X>(made);
        }
        __syncthreads();
        const matrix_ref<const X> tile{&rows[0][0], count, x.columns, most_columns + 1};
        device::nearest<Policy>(storage, tile, codebook, found);
        for (int row = threadIdx.x; row < count; row += Policy::threads) {
            codes[first + row] = found[row];
            if (found[row] >= 0) atomicAdd(rows_of_code + found[row], 1);
        }
        __syncthreads();
    }
}

template <class T>
matrix_ref<const T> ref(const device_matrix<T>& m, std::int64_t stride) {
    return {m.data(), m.rows(), m.columns(), stride};
}

template <class Policy, std::size_t D = dynamic_extent, class X, class C>
std::vector<std::int64_t> from_global(const matrix<X>& x, const matrix<C>& codebook, row_layout layout = {}) {
    const device_matrix<X> rows(x, layout);
    const device_matrix<C> centres(codebook, layout);
    const device_array<std::int64_t> codes(x.rows);
    search_global<Policy, D><<<3, Policy::threads>>>(ref(rows, x.columns + layout.padding),
                                                     ref(centres, x.columns + layout.padding), codes.data());
    check(cudaGetLastError());
    return codes.download();
}

template <class Policy, class X, class C>
std::vector<std::int64_t> from_shared(const matrix<X>& x, const matrix<C>& codebook) {
    const auto negated = matrix<X>::generate(x.rows, x.columns, [&](auto i, auto d) { return -x.at(i, d); });
    const device_matrix<X> rows(negated);
    const device_matrix<C> centres(codebook);
    const device_array<std::int64_t> codes(x.rows);
    const device_array<int> rows_of_code(std::vector<int>(static_cast<std::size_t>(codebook.rows)));
    search_shared<Policy>
        <<<3, Policy::threads>>>(ref(rows, x.columns), ref(centres, x.columns), codes.data(), rows_of_code.data());
    check(cudaGetLastError());
    const auto found = codes.download();
    std::vector<int> counted(static_cast<std::size_t>(codebook.rows));
    for (const std::int64_t code : found)
        if (code >= 0) ++counted[static_cast<std::size_t>(code)];
    EXPECT_EQ(rows_of_code.download(), counted);
    return found;
}

/// The codes, whatever the policy.
struct on_cuda_cores {
    using fixture = gpu_test;
    static constexpr std::int64_t columns[] = {1, 3, 4, 17, 32, most_columns};

    template <class X, class C>
    static void expect_equal_codes(const matrix<X>& x, const matrix<C>& codebook) {
        const auto codes = from_global<simt_tile>(x, codebook);
        EXPECT_TRUE(codes_are_nearest(x, codebook, codes));
        EXPECT_EQ(codes, nearest_codes(x, codebook, ordered_distance64));
        EXPECT_EQ(codes, from_global<narrow_tile>(x, codebook, awkward));
        EXPECT_EQ(codes, from_shared<simt_tile>(x, codebook));
        EXPECT_EQ(codes, from_shared<tall_tile>(x, codebook));
    }
};
INSTANTIATE_TYPED_TEST_SUITE_P(CudaCores, NearestCasesSmall, on_cuda_cores);

class NearestSmall : public gpu_test {};

TEST_F(NearestSmall, TheFlatTileAndAStaticNumberOfColumns) {
    random_source random;
    const auto x = random.normals<float>(100, 24), codebook = random.normals<float>(90, 24);
    const auto codes = from_global<simt_tile>(x, codebook);
    EXPECT_EQ(codes, (from_global<flat_tile>(x, codebook)));
    EXPECT_EQ(codes, (from_global<simt_tile, 24>(x, codebook)));
}

}  // namespace
}  // namespace cuvq::test
