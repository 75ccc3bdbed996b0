// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What both translation units of `two_units` do: include every header, call every function of the CPU path and, where
// nvcc compiles this and there is a GPU, those of the GPU path that are quick to compile.
#pragma once

#include <cstdint>
#include <vector>

#if defined(__CUDACC__)
#include <thrust/device_vector.h>
#include <thrust/host_vector.h>
#endif

#include <all_headers.hpp>

/// A number that depends on every call.
inline double use_everything() {
    namespace reference = cuvq::reference;
    constexpr std::int64_t rows = 6, columns = 2, codes = 3;
    const std::vector<float> x_data = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    std::vector<std::int32_t> code_data(rows);
    std::vector<float> quantized_data(rows * columns), counts_data(codes), sums_data(codes * columns);
    const cuvq::matrix_view<const float> x(x_data.data(), rows, columns);
    const cuvq::vector_view<std::int32_t> code(code_data.data(), rows);
    const cuvq::matrix_view<float> quantized(quantized_data.data(), rows, columns);
    const cuvq::vector_view<float> counts(counts_data.data(), codes);
    const cuvq::matrix_view<float> sums(sums_data.data(), codes, columns);

    reference::codebook<float> book(codes, columns);
    book.init_from_rows(x, 7);
    reference::quantize(x, book.state().codebook, code);
    reference::accumulate(x, code, counts, sums);
    reference::ema_apply(book.state(), counts, sums, x, cuvq::ema_params::rectokens());
    reference::ema_update(book.state(), x, code, cuvq::ema_params::sonnet());
    reference::train_step(book.state(), x, code, quantized, cuvq::ema_params::mimi());
    reference::lookup(book.state().codebook, code, quantized);

    double sum = static_cast<double>(book.step());
    for (const float v : quantized_data) sum += v;

#if defined(__CUDACC__)
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return sum;
    const thrust::device_vector<float> device_x(x_data.begin(), x_data.end());
    const thrust::device_vector<std::int32_t> device_code(code_data.begin(), code_data.end());
    thrust::device_vector<float> device_quantized(rows * columns);
    cuvq::codebook<float> device_book(codes, columns);
    device_book.init_from_rows(cuvq::matrix_view<const float>(device_x.data().get(), rows, columns), 7);
    cuvq::lookup(device_book.state().codebook, cuvq::vector_view<const std::int32_t>(device_code.data().get(), rows),
                 cuvq::matrix_view<float>(device_quantized.data().get(), rows, columns));
    for (const float v : thrust::host_vector<float>(device_quantized)) sum += v;
#endif
    return sum;
}
