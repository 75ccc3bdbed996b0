// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Programmatic dependent launch, seen from inside kernels; nothing before sm_90 (`detail::launch_dependent` is the
// other half).
#pragma once

#include <cuda_runtime.h>

namespace cuvq::arch {

/// Waits until the kernel before this one in the stream is done and its writes can be seen.
__device__ inline void await_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

/// Lets the next kernel of the stream start, as far as there is room, if it was launched to.
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

}  // namespace cuvq::arch
