// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Kernels such as a user would write, around the block-level search on tensor cores.
#include <cuvq/device/nearest_mma.cuh>

#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "support/device.cuh"
#include "support/image.cuh"
#include "support/nearest_cases.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"

namespace cuvq::test {
namespace {

/// Dynamic shared memory from its first address on that suits every policy; `slack` bytes more are asked for.
inline constexpr std::int64_t slack = 1024 - 128;
__device__ char* aligned(char* memory) {
    return memory + (1024 - static_cast<unsigned>(__cvta_generic_to_shared(memory)) % 1024) % 1024;
}

/// Rows straight from global memory, codes straight to it.
template <class Policy, class X, class C>
__global__ __launch_bounds__(Policy::threads) void search_global(matrix_ref<const X> x, matrix_ref<const C> codebook,
                                                                 device::image_ref image, std::int64_t* codes) {
    extern __shared__ __align__(128) char memory[];
    const device::nearest_storage<Policy> storage{aligned(memory)};
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
    const device::nearest_storage<Policy> storage{aligned(memory)};
    X* rows = reinterpret_cast<X*>(storage.memory + storage.bytes(x.columns));
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
    const std::int64_t bytes = device::nearest_storage<Policy>::bytes(x.columns) + slack;
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
    const std::int64_t bytes = device::nearest_storage<Policy>::bytes(x.columns) + slack +
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
struct on_tensor_cores {
    using fixture = mma_test;
    static constexpr std::int64_t columns[] = {1, 3, 4, 17, 64, 101, 130};

    template <class X, class C>
    static void expect_equal_codes(const matrix<X>& x, const matrix<C>& codebook) {
        SCOPED_TRACE(testing::Message() << x.rows << " rows, " << codebook.rows << " codes, D = " << x.columns);
        const auto codes = from_global<small_tile>(x, codebook);
        EXPECT_TRUE(codes_are_nearest(x, codebook, codes));
        EXPECT_EQ(codes, nearest_codes(x, codebook, ordered_distance64));
        EXPECT_EQ(codes, (from_global<small_streamed_tile>(x, codebook, awkward)));
        EXPECT_EQ(codes, (from_shared<small_tile>(x, codebook)));
        EXPECT_EQ(codes, (from_shared<small_streamed_tile>(x, codebook)));
    }
};
INSTANTIATE_TYPED_TEST_SUITE_P(TensorCores, NearestCasesSmall, on_tensor_cores);

/// Its own instructions are for one architecture only.
struct on_hopper {
    class fixture : public mma_test {
    protected:
        void SetUp() override {
            mma_test::SetUp();
            int major = 0;
            if (!IsSkipped()) check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
            if (!IsSkipped() && major != 9) GTEST_SKIP() << "no tensor cores of sm_90a";
        }
    };
    static constexpr std::int64_t columns[] = {62, 64, 101, 125, 130};

    template <class X, class C>
    static void expect_equal_codes(const matrix<X>& x, const matrix<C>& codebook) {
        SCOPED_TRACE(testing::Message() << x.rows << " rows, " << codebook.rows << " codes, D = " << x.columns);
        const auto codes = from_global<wgmma_tall>(x, codebook);
        EXPECT_TRUE(codes_are_nearest(x, codebook, codes));
        EXPECT_EQ(codes, nearest_codes(x, codebook, ordered_distance64));
        EXPECT_EQ(codes, (from_global<wgmma_flat>(x, codebook, awkward)));
        EXPECT_EQ(codes, (from_shared<wgmma_tile<64, 256, 2>>(x, codebook)));
        EXPECT_EQ(codes, (from_shared<wgmma_tile<128, 128, 2>>(x, codebook)));
    }
};
INSTANTIATE_TYPED_TEST_SUITE_P(Hopper, NearestCasesSmall, on_hopper);

class NearestMmaSmall : public mma_test {};

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

/// As where a first batch has filled a codebook. What the image is measured with must not come from a single one of
/// these rows, or no code fits.
TEST_F(NearestMmaSmall, AnImageOfFewRowsOverAndOver) {
    random_source random;
    for (const std::int64_t period : {2, 16, 32, 64, 100}) {
        const auto rows = random.normals<float>(period, 256);
        const device_matrix<float> codebook(
            matrix<float>::generate(2048, 256, [&](auto k, auto d) { return rows.at(k % period, d); }));
        for (const bool wide : {false, true}) {
            const device_image<float> image(matrix_ref<const float>{codebook.data(), 2048, 256, 256}, wide);
            std::vector<device::score_bounds> bounds(static_cast<std::size_t>(device::image_ref::parts(2048)));
            check(cudaMemcpy(bounds.data(), image.ref().bounds, bounds.size() * sizeof(bounds[0]),
                             cudaMemcpyDeviceToHost));
            for (const auto& b : bounds) ASSERT_LT(b.norm + b.residual + b.offset + b.offset_rest, 1e5f) << period;
        }
    }
}

}  // namespace
}  // namespace cuvq::test
