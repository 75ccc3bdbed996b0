// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What a caller sees when CUDA itself fails: no device, no such device, no memory, a launch that is refused.
#include <cuvq/cuda_error.cuh>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <cuvq/accumulate.cuh>
#include <cuvq/lookup.cuh>
#include <cuvq/quantize.cuh>
#include <cuvq/train_step.cuh>

#include "support/device.cuh"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/searches.cuh"

namespace cuvq::test {
namespace {

/// What a call throws; a test failure if it is no cuda_error.
template <class Call>
cuda_error thrown_by(Call call) {
    try {
        call();
    } catch (const cuda_error& error) {
        return error;
    }
    ADD_FAILURE() << "no cuvq::cuda_error";
    return cuda_error(cudaSuccess, "", "", 0);
}

bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

/// Whether the error tells what failed where, and in which file of cuvq.
void expect_told(const cuda_error& error, const char* call, const char* file) {
    EXPECT_NE(std::string(error.call()).find(call), std::string::npos) << error.call();
    EXPECT_TRUE(ends_with(error.file(), file)) << error.file();
    EXPECT_GT(error.line(), 0);
    const std::string text = error.what();
    EXPECT_EQ(text.rfind("cuvq: ", 0), 0u) << text;
    for (const std::string& part :
         {std::string(cudaGetErrorName(error.code())), std::string(cudaGetErrorString(error.code())),
          std::string(error.call()), std::string(error.file()) + ":" + std::to_string(error.line())})
        EXPECT_NE(text.find(part), std::string::npos) << text << " without " << part;
    if (device_count() > 0) EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "left behind for whoever asks next";
}

/// Memory of a call that is refused before it is touched: an address, as such.
template <class T>
T* address(std::uintptr_t number) {
    return reinterpret_cast<T*>(number << 44);
}

template <class T>
matrix_view<T> matrix_at(std::uintptr_t number, std::int64_t rows, std::int64_t columns) {
    return matrix_view<T>(address<T>(number), rows, columns);
}

/// A state of K x D at made-up addresses.
codebook_state<float> state_nowhere(std::int64_t k, std::int64_t d) {
    return {matrix_at<float>(1, k, d), matrix_at<float>(2, k, d), vector_view<float>(address<float>(3), k),
            vector_view<std::int32_t>(address<std::int32_t>(4), k), address<std::int64_t>(5)};
}

TEST(CudaErrorTest, HoldsWhatItIsGiven) {
    const cuda_error error(cudaErrorInvalidValue, "cudaSomething(1, 2)", "some/file.cuh", 42);
    EXPECT_EQ(error.code(), cudaErrorInvalidValue);
    EXPECT_STREQ(error.call(), "cudaSomething(1, 2)");
    EXPECT_STREQ(error.file(), "some/file.cuh");
    EXPECT_EQ(error.line(), 42);
    EXPECT_STREQ(error.what(),
                 "cuvq: cudaErrorInvalidValue (invalid argument) from cudaSomething(1, 2) at some/file.cuh:42");
}

TEST(CudaErrorTest, WithoutADeviceEveryCallSaysSo) {
    if (device_count() > 0) GTEST_SKIP() << "there is a CUDA device";
    int count = 0;
    const cudaError_t none = cudaGetDeviceCount(&count);
    const auto state = state_nowhere(4, 3);
    const auto x = matrix_at<float>(6, 5, 3);
    const vector_view<std::int32_t> codes(address<std::int32_t>(7), 5);
    const vector_view<float> counts(address<float>(8), 4);
    const auto sums = matrix_at<float>(9, 4, 3);
    for (const cuda_error& error :
         {thrown_by([&] { quantize(x, state.codebook, codes); }),
          thrown_by([&] { accumulate(x, codes, counts, sums); }),
          thrown_by([&] { ema_apply(state, counts, sums, discard); }), thrown_by([&] { ema_update(state, x, codes); }),
          thrown_by([&] { train_step(state, x, codes); }), thrown_by([&] { lookup(state.codebook, codes, x); })}) {
        EXPECT_EQ(error.code(), none) << error.what();
        expect_told(error, "cuda", "cuvq/detail/launch.cuh");
    }
}

TEST(CudaErrorTest, MoreCodesThanASortKeyHoldsAreRefused) {
    constexpr std::int64_t k = (std::int64_t{1} << 32) - 1;
    const auto state = state_nowhere(k, 1);
    const auto x = matrix_at<float>(6, 5, 1);
    const vector_view<std::int64_t> codes(address<std::int64_t>(7), 5);
    const std::string got = ": got 4294967295 rows; wants at most 2^32 - 2 codes";
    EXPECT_EQ(
        refusal([&] { accumulate(x, codes, vector_view<float>(address<float>(8), k), matrix_at<float>(9, k, 1)); }),
        "cuvq::accumulate: sums" + got);
    EXPECT_EQ(refusal([&] { ema_update(state, x, codes); }), "cuvq::ema_update: state.codebook" + got);
    EXPECT_EQ(refusal([&] { train_step(state, x, codes); }), "cuvq::train_step: state.codebook" + got);
}

// Not among the tests for memcheck, to which every failed CUDA call is an error.
class CudaErrorOnDeviceTest : public gpu_test {};

TEST_F(CudaErrorOnDeviceTest, ALaunchThatIsRefusedWritesNothing) {
    random_source random;
    const device_matrix<float> codebook(random.normals<float>(10, 4)), x(random.normals<float>(20, 4));
    const device_matrix<float> quantized(20, 4);
    const device_array<std::int32_t> codes(20);
    const device_array<float> counts(10);
    const device_matrix<float> sums(10, 4);
    // A stream whose capture was broken refuses everything.
    const test_stream stream;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    ASSERT_NE(cudaStreamSynchronize(stream), cudaSuccess);
    cudaGetLastError();
    const auto launch = thrown_by([&] { lookup(codebook.view(), codes.view(), quantized.view(), stream); });
    EXPECT_EQ(launch.code(), cudaErrorStreamCaptureInvalidated) << launch.what();
    expect_told(launch, "cudaLaunchKernelEx", "cuvq/detail/launch.cuh");
    const auto search = thrown_by(
        [&] { quantize(x.view(), codebook.view(), codes.view(), quantized.view(), discard, {}, {}, stream); });
    expect_told(search, "cuda", ".cuh");
    const auto allocation =
        thrown_by([&] { accumulate(x.view(), codes.view(), counts.view(), sums.view(), {}, {}, stream); });
    expect_told(allocation, "cudaMallocAsync", "cuvq/detail/launch.cuh");
    cudaGraph_t graph = nullptr;
    EXPECT_NE(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    cudaGetLastError();
    EXPECT_TRUE(codes.untouched());
    EXPECT_TRUE(quantized.untouched());
    EXPECT_TRUE(counts.untouched());
    EXPECT_TRUE(sums.untouched());
    // And the stream is as good as new.
    quantize(x.view(), codebook.view(), codes.view(), quantized.view(), discard, {}, {}, stream);
    const auto stored = codes.download();
    EXPECT_TRUE(codes_are_nearest(x.download(), codebook.download(), {stored.begin(), stored.end()}));
}

__global__ void nothing() {}

TEST_F(CudaErrorOnDeviceTest, ALaunchOfMoreThreadsThanABlockHolds) {
    const auto error = thrown_by([] { detail::launch(nothing, 1, 2048, nullptr, 0); });
    // Which of the two is the driver's choice.
    EXPECT_TRUE(error.code() == cudaErrorInvalidValue || error.code() == cudaErrorInvalidConfiguration) << error.what();
    expect_told(error, "cudaLaunchKernelEx", "cuvq/detail/launch.cuh");
}

TEST_F(CudaErrorOnDeviceTest, AWorkspaceThatNoDeviceHasTheMemoryFor) {
    constexpr std::int64_t k = std::int64_t{1} << 31, d = 1024;  // sums of 8 TiB
    const auto error = thrown_by([&] {
        ema_update(state_nowhere(k, d), matrix_at<const float>(6, 1, d),
                   vector_view<const std::int32_t>(address<std::int32_t>(7), 1));
    });
    EXPECT_EQ(error.code(), cudaErrorMemoryAllocation) << error.what();
    expect_told(error, "cudaMallocAsync", "cuvq/detail/launch.cuh");
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST_F(CudaErrorOnDeviceTest, ADeviceThatIsNotThereLeavesTheOthersAtWork) {
    ASSERT_EQ(cudaSetDevice(device_count()), cudaErrorInvalidDevice);
    cudaGetLastError();
    random_source random;
    const auto x = random.normals<float>(30, 3), codebook = random.normals<float>(12, 3);
    const device_matrix<float> rows(x), centres(codebook);
    const device_array<std::int32_t> codes(30);
    quantize(rows.view(), centres.view(), codes.view());
    const auto stored = codes.download();
    EXPECT_TRUE(codes_are_nearest(x, codebook, {stored.begin(), stored.end()}));
}

/// A step on the current device.
std::vector<float> codebook_after_step(const matrix<float>& x, const matrix<float>& codebook) {
    const device_state<float> state{host_state<float>(codebook)};
    const device_matrix<float> rows(x);
    const device_array<std::int32_t> codes(x.rows);
    train_step(state.view(), rows.view(), codes.view(), discard, ema_params::rectokens());
    return state.download().codebook.data;
}

TEST_F(CudaErrorOnDeviceTest, ASecondDeviceGivesWhatTheFirstGives) {
    if (device_count() < 2) GTEST_SKIP() << "one CUDA device only";
    cudaDeviceProp first{}, second{};
    check(cudaGetDeviceProperties(&first, 0));
    check(cudaGetDeviceProperties(&second, 1));
    if (std::strcmp(first.name, second.name) != 0) GTEST_SKIP() << "the second CUDA device is another model";
    random_source random;
    const auto x = random.normals<float>(200, 9), codebook = random.normals<float>(50, 9);
    const auto on_first = codebook_after_step(x, codebook);
    check(cudaSetDevice(1));
    const auto on_second = codebook_after_step(x, codebook);
    check(cudaSetDevice(0));
    EXPECT_TRUE(same_bits(on_first, on_second));
}

}  // namespace
}  // namespace cuvq::test
