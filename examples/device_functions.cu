// Kernels of your own around cuvq's device functions. One, for any GPU, scales each vector, finds its nearest code and
// adds it to that code's sum, in one launch: `nearest` is block-level, `accumulate_row` a thread's share of one row.
// The other, from sm_80 on, finds codes on the tensor cores, in a codebook that was prepared.
#include <cstdio>
#include <vector>

#include <thrust/device_vector.h>
#include <thrust/fill.h>
#include <thrust/host_vector.h>
#include <cuvq/cuvq.cuh>

using tile = cuvq::simt_tile;
constexpr int D = 32, K = 48;

/// Each block scales up to tile::rows vectors into shared memory and quantizes them there. Then warp w walks the rows
/// whose code is w modulo the number of warps, code by code, and adds each code's sum to `sums` [blocks x K x D].
__global__ void scale_and_sum(cuvq::matrix_ref<const float> x, cuvq::matrix_ref<const float> codebook, float scale,
                              int* codes, float* sums) {
    __shared__ cuvq::device::nearest_storage<tile> storage;
    __shared__ float rows[tile::rows][D];
    __shared__ std::int64_t nearest[tile::rows];

    const std::int64_t first = std::int64_t{blockIdx.x} * tile::rows, left = x.rows - first;
    const int count = static_cast<int>(left < tile::rows ? left : tile::rows);
    for (int i = threadIdx.x; i < count * D; i += tile::threads)
        rows[i / D][i % D] = scale * x.row(first + i / D)[i % D];
    __syncthreads();

    cuvq::device::nearest<tile, D>(storage, cuvq::matrix_ref<const float>{rows[0], count, D, D}, codebook, nearest);
    for (int r = threadIdx.x; r < count; r += tile::threads) codes[first + r] = static_cast<int>(nearest[r]);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = tile::threads / 32;
    for (int k = warp; k < K; k += warps) {
        float sum[D / 32] = {};
        for (int r = 0; r < count; ++r)
            if (nearest[r] == k) cuvq::device::accumulate_row(sum, rows[r], 1.0f, D, lane, 32);
        sums[(std::int64_t{blockIdx.x} * K + k) * D + lane] = sum[0];
    }
}

using tensor_tile = cuvq::mma_few;

/// The codes of up to tensor_tile::rows vectors for each block.
__global__ __launch_bounds__(tensor_tile::threads) void search_on_tensor_cores(cuvq::matrix_ref<const float> x,
                                                                               cuvq::matrix_ref<const float> codebook,
                                                                               cuvq::device::image_ref image,
                                                                               int* codes) {
    extern __shared__ __align__(128) char memory[];
    __shared__ std::int64_t nearest[tensor_tile::rows];
    const std::int64_t first = std::int64_t{blockIdx.x} * tensor_tile::rows, left = x.rows - first;
    const cuvq::matrix_ref<const float> rows{x.row(first), left < tensor_tile::rows ? left : tensor_tile::rows,
                                             x.columns, x.stride};
    cuvq::device::nearest<tensor_tile>(cuvq::device::nearest_storage<tensor_tile>{memory}, rows, codebook, image,
                                       nearest);
    for (int r = threadIdx.x; r < rows.rows; r += tensor_tile::threads) codes[first + r] = static_cast<int>(nearest[r]);
}

int main() try {
    const int N = 1000;
    std::vector<float> host(N * D), book(K * D);
    for (int i = 0; i < N * D; ++i) host[i] = static_cast<float>((i * 7919) % 1009) / 1009;
    for (int i = 0; i < K * D; ++i) book[i] = 2 * static_cast<float>((i * 6007) % 997) / 997;
    const int blocks = (N - 1) / tile::rows + 1;
    thrust::device_vector<float> x = host, codebook = book, sums(blocks * K * D);
    thrust::device_vector<int> codes(N);

    scale_and_sum<<<blocks, tile::threads>>>({x.data().get(), N, D, D}, {codebook.data().get(), K, D, D}, 2.0f,
                                             codes.data().get(), sums.data().get());
    CUVQ_CHECK_CUDA(cudaGetLastError());
    CUVQ_CHECK_CUDA(cudaDeviceSynchronize());

    // The same through the CPU path.
    for (float& v : host) v *= 2;
    std::vector<int> expected(N);
    cuvq::reference::quantize(cuvq::matrix_view<const float>(host.data(), N, D),
                              cuvq::matrix_view<const float>(book.data(), K, D),
                              cuvq::vector_view<int>(expected.data(), N));
    double all = 0, want = 0;
    for (const float s : thrust::host_vector<float>(sums)) all += s;
    for (const float v : host) want += v;
    bool same = thrust::host_vector<int>(codes) == expected;
    std::printf("codes %s the CPU's; sum of all codes %.3f, of all vectors %.3f\n", same ? "equal" : "differ from", all,
                want);

    int device = 0, major = 0;
    CUVQ_CHECK_CUDA(cudaGetDevice(&device));
    CUVQ_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major >= 8) {
        x = host;  // scaled by now
        thrust::device_vector<char> memory(cuvq::prepared_codebook_bytes(K, D));
        const cuvq::prepared_codebook prepared{memory.data().get(), memory.size()};
        cuvq::prepare(cuvq::matrix_view<const float, D>(codebook.data().get(), K), prepared);
        const auto bytes = static_cast<int>(cuvq::device::nearest_storage<tensor_tile>::bytes(D));
        CUVQ_CHECK_CUDA(
            cudaFuncSetAttribute(search_on_tensor_cores, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        thrust::fill(codes.begin(), codes.end(), -1);
        search_on_tensor_cores<<<(N - 1) / tensor_tile::rows + 1, tensor_tile::threads, bytes>>>(
            {x.data().get(), N, D, D}, {codebook.data().get(), K, D, D}, cuvq::image_of(prepared, K, D),
            codes.data().get());
        CUVQ_CHECK_CUDA(cudaGetLastError());
        const bool same_again = thrust::host_vector<int>(codes) == expected;
        std::printf("codes from the tensor cores %s the CPU's\n", same_again ? "equal" : "differ from");
        same = same && same_again;
    }
    return same ? 0 : 1;
} catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
}
