// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

/// Version of the library, as MAJOR*10000 + MINOR*100 + PATCH. The CMake package reads these lines.
#define CUVQ_VERSION_MAJOR 0
#define CUVQ_VERSION_MINOR 1
#define CUVQ_VERSION_PATCH 0
#define CUVQ_VERSION (CUVQ_VERSION_MAJOR * 10000 + CUVQ_VERSION_MINOR * 100 + CUVQ_VERSION_PATCH)

/// Marks what both the host compiler and nvcc compile: plain under g++, `__host__ __device__` under nvcc.
#if defined(__CUDACC__)
#define CUVQ_HOST_DEVICE __host__ __device__
#else
#define CUVQ_HOST_DEVICE
#endif
