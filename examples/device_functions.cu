// A kernel of your own around cuvq's device functions: scale each vector, find its nearest code and add it to that
// code's sum, in one launch. `nearest` is block-level, `accumulate_row` a thread's share of one row.
#include <cstdio>
#include <vector>

#include <thrust/device_vector.h>
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
    const bool same = thrust::host_vector<int>(codes) == expected;
    std::printf("codes %s the CPU's; sum of all codes %.3f, of all vectors %.3f\n", same ? "equal" : "differ from", all,
                want);
    return same ? 0 : 1;
} catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
}
