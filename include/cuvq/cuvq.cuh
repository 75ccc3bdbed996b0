// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Everything: the GPU functions, the device functions and the CPU path.
#pragma once

#include <cuvq/accumulate.cuh>
#include <cuvq/codebook.cuh>
#include <cuvq/cuda_error.cuh>
#include <cuvq/device/accumulate.cuh>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/ema.cuh>
#include <cuvq/device/nearest.cuh>
#include <cuvq/device/nearest_mma.cuh>
#include <cuvq/device/philox.cuh>
#include <cuvq/ema.cuh>
#include <cuvq/error.hpp>
#include <cuvq/lookup.cuh>
#include <cuvq/params.hpp>
#include <cuvq/quantize.cuh>
#include <cuvq/reference/codebook.hpp>
#include <cuvq/reference/ema.hpp>
#include <cuvq/reference/quantize.hpp>
#include <cuvq/train_step.cuh>
#include <cuvq/version.hpp>
#include <cuvq/views.hpp>
#include <cuvq/workspace.hpp>
