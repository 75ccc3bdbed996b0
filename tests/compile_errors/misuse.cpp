// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Calls that must not compile, one per macro, and one that must. CMakeLists.txt beside this file has the messages.
#include <cstdint>
#include <vector>

#include <cuda/std/mdspan>

#if defined(__CUDACC__)
#include <cuvq/quantize.cuh>
#include <cuvq/train_step.cuh>
namespace reference = cuvq;  // the GPU functions refuse the same
#else
#include <cuvq/reference/ema.hpp>
#include <cuvq/reference/quantize.hpp>
namespace reference = cuvq::reference;
#endif

void call(const cuvq::codebook_state<float>& state, const cuvq::matrix_view<const float>& x,
          const cuvq::matrix_view<float>& quantized, const cuvq::vector_view<std::int32_t>& codes,
          const cuvq::vector_view<float>& floats) {
#if defined(PARAMS_AS_QUANTIZED)
    reference::quantize(x, state.codebook, codes, cuvq::quantize_params{});
#elif defined(PARAMS_AS_DISTANCES)
    reference::quantize(x, state.codebook, codes, quantized, cuvq::quantize_params{});
#elif defined(X_IS_A_VECTOR)
    reference::quantize(std::vector<float>(4), state.codebook, codes);
#elif defined(X_IS_COLUMN_MAJOR)
    using extents = cuda::std::dextents<std::int64_t, 2>;
    reference::quantize(cuda::std::mdspan<const float, extents, cuda::std::layout_left>(x.data_handle(), 2, 2),
                        state.codebook, codes);
#elif defined(X_HOLDS_DOUBLE)
    reference::quantize(cuvq::matrix_view<const double>(nullptr, 0, 2), state.codebook, codes);
#elif defined(CODEBOOK_HOLDS_DOUBLE)
    reference::quantize(x, cuvq::matrix_view<const double>(nullptr, 0, 2), codes);
#elif defined(CODES_HOLD_FLOAT)
    reference::quantize(x, state.codebook, floats);
#elif defined(CODES_ARE_CONST)
    reference::quantize(x, state.codebook, cuvq::vector_view<const std::int32_t>(codes));
#elif defined(QUANTIZED_IS_CONST)
    reference::quantize(x, state.codebook, codes, x);
#elif defined(SUMS_ARE_CONST)
    reference::accumulate(x, codes, floats, x);
#elif defined(STATE_IS_A_MATRIX)
    reference::train_step(state.codebook, x, codes);
#elif defined(PARAMS_AS_REPLACEMENTS)
    reference::ema_apply(state, floats, quantized, cuvq::ema_params{});
#else
    reference::quantize(x, state.codebook, codes, quantized, floats);
#endif
}
