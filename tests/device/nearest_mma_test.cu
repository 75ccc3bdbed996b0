// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Kernels such as a user would write, around the block-level search on tensor cores.
#include <cuvq/device/nearest_mma.cuh>

#include <cstdint>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "support/device.cuh"
#include "support/image.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"

namespace cuvq::test {
namespace {

/// Rows straight from global memory, codes straight to it.
template <class Policy, class X, class C>
__global__ __launch_bounds__(Policy::threads) void search_global(matrix_ref<const X> x, matrix_ref<const C> codebook,
                                                                 device::image_ref image, std::int64_t* codes) {
    extern __shared__ __align__(128) char memory[];
    const device::nearest_storage<Policy> storage{memory};
    for (std::int64_t first = std::int64_t{blockIdx.x} * Policy::rows; first < x.rows;
         first += std::int64_t{gridDim.x} * Policy::rows) {
        const std::int64_t left = x.rows - first;
        const matrix_ref<const X> tile{x.row(first), left < Policy::rows ? left : Policy::rows, x.columns, x.stride};
        device::nearest<Policy>(storage, tile, codebook, image, codes + first);
    }
}

/// Rows made in registers (here: read and negated), put into shared memory behind the search's; codes into shared
/// memory, and used there.
template <class Policy, class X, class C>
__global__ __launch_bounds__(Policy::threads) void search_shared(matrix_ref<const X> x, matrix_ref<const C> codebook,
                                                                 device::image_ref image, std::int64_t* codes,
                                                                 int* rows_of_code) {
    extern __shared__ __align__(128) char memory[];
    const device::nearest_storage<Policy> storage{memory};
    X* rows = reinterpret_cast<X*>(memory + storage.bytes(x.columns));
    const int stride = static_cast<int>(x.columns) + 1;
    __shared__ std::int64_t found[Policy::rows];
    for (std::int64_t first = std::int64_t{blockIdx.x} * Policy::rows; first < x.rows;
         first += std::int64_t{gridDim.x} * Policy::rows) {
        const int count = static_cast<int>(x.rows - first < Policy::rows ? x.rows - first : Policy::rows);
        const int size = count * static_cast<int>(x.columns);
        for (int e = threadIdx.x; e < size; e += Policy::threads) {
            const int row = e / static_cast<int>(x.columns), column = e % static_cast<int>(x.columns);
            rows[row * stride + column] = static_cast<X>(-static_cast<float>(x.row(first + row)[column]));
        }
        __syncthreads();
        const matrix_ref<const X> tile{rows, count, x.columns, stride};
        device::nearest<Policy>(storage, tile, codebook, image, found);
        for (int row = threadIdx.x; row < count; row += Policy::threads) {
            codes[first + row] = found[row];
            if (found[row] >= 0) atomicAdd(rows_of_code + found[row], 1);
        }
        __syncthreads();
    }
}

template <class T>
matrix_ref<const T> ref(const device_matrix<T>& m, row_layout layout = {}) {
    return {m.data(), m.rows(), m.columns(), m.columns() + layout.padding};
}

/// Whether a block may have so much shared memory; if so, it is asked for.
template <class Kernel>
bool allow_shared(Kernel kernel, std::int64_t bytes) {
    int most = 0;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel));
    if (bytes + static_cast<std::int64_t>(attributes.sharedSizeBytes) > most) return false;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    return true;
}

template <class Policy, class X, class C>
std::vector<std::int64_t> from_global(const matrix<X>& x, const matrix<C>& codebook, row_layout layout = {}) {
    const device_matrix<X> rows(x, layout);
    const device_matrix<C> centres(codebook, layout);
    const device_image<C> image(ref(centres, layout));
    const device_array<std::int64_t> codes(x.rows);
    const std::int64_t bytes = device::nearest_storage<Policy>::bytes(x.columns);
    EXPECT_TRUE(allow_shared(search_global<Policy, X, C>, bytes));
    search_global<Policy><<<3, Policy::threads, static_cast<std::size_t>(bytes)>>>(
        ref(rows, layout), ref(centres, layout), image.ref(), codes.data());
    check(cudaGetLastError());
    return codes.download();
}

template <class Policy, class X, class C>
std::vector<std::int64_t> from_shared(const matrix<X>& x, const matrix<C>& codebook) {
    const auto negated = matrix<X>::generate(x.rows, x.columns, [&](auto i, auto d) { return -x.at(i, d); });
    const device_matrix<X> rows(negated);
    const device_matrix<C> centres(codebook);
    const device_image<C> image(ref(centres));
    const device_array<std::int64_t> codes(x.rows);
    const device_array<int> rows_of_code(std::vector<int>(static_cast<std::size_t>(codebook.rows)));
    const std::int64_t bytes = device::nearest_storage<Policy>::bytes(x.columns) +
                               static_cast<std::int64_t>(sizeof(X)) * Policy::rows * (x.columns + 1);
    EXPECT_TRUE(allow_shared(search_shared<Policy, X, C>, bytes));
    search_shared<Policy><<<3, Policy::threads, static_cast<std::size_t>(bytes)>>>(ref(rows), ref(centres), image.ref(),
                                                                                   codes.data(), rows_of_code.data());
    check(cudaGetLastError());
    const auto found = codes.download();
    std::vector<int> counted(static_cast<std::size_t>(codebook.rows));
    for (const std::int64_t code : found)
        if (code >= 0) ++counted[static_cast<std::size_t>(code)];
    EXPECT_EQ(rows_of_code.download(), counted);
    return found;
}

using small_tile = mma_tile<64, 128, 2, false, 1>;
using small_streamed_tile = mma_tile<64, 128, 2, true, 1>;

/// The codes, whatever the policy.
template <class X, class C>
void expect_equal_codes(const matrix<X>& x, const matrix<C>& codebook) {
    SCOPED_TRACE(testing::Message() << x.rows << " rows, " << codebook.rows << " codes, D = " << x.columns);
    const auto codes = from_global<small_tile>(x, codebook);
    EXPECT_TRUE(codes_are_nearest(x, codebook, codes));
    EXPECT_EQ(codes, nearest_codes(x, codebook, ordered_distance64));
    EXPECT_EQ(codes, (from_global<small_streamed_tile>(x, codebook, awkward)));
    EXPECT_EQ(codes, (from_shared<small_tile>(x, codebook)));
    EXPECT_EQ(codes, (from_shared<small_streamed_tile>(x, codebook)));
}

class NearestMmaSmall : public mma_test {};

TEST_F(NearestMmaSmall, NormalDataInShapesThatFillNoTile) {
    random_source random;
    for (const std::int64_t d : {1, 3, 4, 17, 64, 101})
        for (const std::int64_t n : {1, 9, 70, 200})
            expect_equal_codes(random.normals<float>(n, d), random.normals<float>(d == 17 ? 300 : 133, d));
    expect_equal_codes(random.normals<float>(300, 8), random.normals<float>(1, 8));
}

TEST_F(NearestMmaSmall, TheLibrarysOwnTiles) {
    random_source random;
    const auto x = random.normals<float>(400, 24), codebook = random.normals<float>(290, 24);
    const auto codes = nearest_codes(x, codebook, ordered_distance64);
    EXPECT_EQ(codes, (from_global<mma_streamed>(x, codebook)));
    int most = 0;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    if (most < device::nearest_storage<mma_tall>::bytes(24)) GTEST_SKIP() << "too little shared memory for the others";
    EXPECT_EQ(codes, (from_global<mma_twin>(x, codebook)));
    EXPECT_EQ(codes, (from_global<mma_tall>(x, codebook)));
    EXPECT_EQ(codes, (from_global<mma_flat>(x, codebook)));
}

TEST_F(NearestMmaSmall, TiesNanAndRowsThatTheFilterCannotTellApart) {
    random_source random;
    auto x = random.integers<float>(90, 5, -2, 2);
    auto codebook = random.integers<float>(200, 5, -2, 2);
    for (std::int64_t k = 50; k < 90; ++k)
        for (std::int64_t d = 0; d < 5; ++d) codebook(k, d) = codebook.at(3, d);
    x(4, 4) = std::numeric_limits<float>::quiet_NaN();
    codebook(0, 1) = std::numeric_limits<float>::infinity();
    expect_equal_codes(x, codebook);

    const auto base = random.normals<float>(1, 30);
    const auto near = [&](std::int64_t rows) {
        return matrix<float>::generate(
            rows, 30, [&](auto, auto d) { return base.at(0, d) * (1 + 0x1p-22f * random.integer(-2, 2)); });
    };
    expect_equal_codes(near(66), near(150));
    expect_equal_codes(random.normals<float>(66, 30), near(150));
}

TEST_F(NearestMmaSmall, ACodebookWithoutAFiniteRow) {
    random_source random;
    const matrix<float> codebook(20, 3, std::numeric_limits<float>::quiet_NaN());
    EXPECT_EQ(from_shared<small_tile>(random.normals<float>(140, 3), codebook), std::vector<std::int64_t>(140, -1));
}

TEST_F(NearestMmaSmall, HalfRowsAndFloatCodebook) {
    random_source random;
    expect_equal_codes(random.normals<__half>(80, 20), random.normals<float>(160, 20));
    expect_equal_codes(random.normals<__nv_bfloat16>(80, 130), random.normals<__nv_bfloat16>(160, 130));
}

}  // namespace
}  // namespace cuvq::test
