// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The searches of a dynamic D, declared so that a test that includes this does not compile them: they take long, and
// several tests run them. The library test_searches has them, compiled once for each pair of element types.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cuvq/dispatch/quantize.cuh>

// DECLARE: `template` to compile them here, `extern template` to find them elsewhere.
#define CUVQ_TEST_MMA(DECLARE, Tile, X, C)                                                                         \
    DECLARE mma_fit fit_mma<Tile, X, C>(std::int64_t);                                                             \
    DECLARE std::int64_t quantize_mma<Tile, X, C>(const detail::quantize_args<X, C>&, const kernel::search_tally&, \
                                                  const device::image_ref&, const mma_scratch&, std::int64_t,      \
                                                  std::int64_t, const mma_fit&, cudaStream_t);
#define CUVQ_TEST_SM90(DECLARE, Tile, X, C)                                                                      \
    DECLARE bool serves_sm90<Tile, X, C>(std::int64_t, std::int64_t);                                            \
    DECLARE void quantize_sm90_many<Tile, X, C>(const detail::quantize_args<X, C>&, const kernel::search_tally&, \
                                                const search_scratch&, bool, std::int64_t, int, cudaStream_t);
#define CUVQ_TEST_SEARCHES(DECLARE, X, C)                                                                           \
    namespace cuvq::dispatch {                                                                                      \
    CUVQ_TEST_MMA(DECLARE, mma_twin, X, C)                                                                          \
    CUVQ_TEST_MMA(DECLARE, mma_tall, X, C)                                                                          \
    CUVQ_TEST_MMA(DECLARE, mma_flat, X, C)                                                                          \
    CUVQ_TEST_MMA(DECLARE, mma_streamed, X, C)                                                                      \
    CUVQ_TEST_MMA(DECLARE, mma_few, X, C)                                                                           \
    CUVQ_TEST_MMA(DECLARE, wgmma_tall, X, C)                                                                        \
    CUVQ_TEST_MMA(DECLARE, wgmma_flat, X, C)                                                                        \
    CUVQ_TEST_SM90(DECLARE, sm90_d13, X, C)                                                                         \
    CUVQ_TEST_SM90(DECLARE, sm90_d77, X, C)                                                                         \
    CUVQ_TEST_SM90(DECLARE, sm90_d141, X, C)                                                                        \
    CUVQ_TEST_SM90(DECLARE, sm90_d269, X, C)                                                                        \
    DECLARE std::int64_t quantize_mma<dynamic_extent, X, C>(const detail::quantize_args<X, C>&,                     \
                                                            const kernel::search_tally&, const device::image_ref&,  \
                                                            const mma_scratch&, std::int64_t, cudaStream_t);        \
    DECLARE std::int64_t quantize_simt<simt_tile, dynamic_extent, X, C>(const detail::quantize_args<X, C>&,         \
                                                                        const kernel::search_tally&, cudaStream_t); \
    DECLARE std::int64_t quantize<automatic_tile, dynamic_extent, X, C>(const detail::quantize_args<X, C>&,         \
                                                                        const kernel::search_tally&,                \
                                                                        const search_scratch&, bool, cudaStream_t); \
    }

CUVQ_TEST_SEARCHES(extern template, float, float)
CUVQ_TEST_SEARCHES(extern template, __half, __half)
CUVQ_TEST_SEARCHES(extern template, __half, float)
CUVQ_TEST_SEARCHES(extern template, __nv_bfloat16, __nv_bfloat16)
CUVQ_TEST_SEARCHES(extern template, __nv_bfloat16, float)
