// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The two sides of the benchmark that main.cpp chooses between.
#pragma once

#include <memory>
#include <string>

#include "options.hpp"
#include "rows.hpp"

namespace cuvq::bench {

/// Registers rows that time cuvq::reference; both arguments outlive the run.
void register_cpu(const options& o, report& r);

#if defined(CUVQ_BENCH_GPU)
/// Why nothing can be timed on a GPU; empty if it can.
std::string no_gpu();

/// Registers rows that time cuvq and its peers on the current GPU, and describes the GPU in the run's context; both
/// arguments, and what it returns, outlive the run.
std::shared_ptr<void> register_gpu(const options& o, report& r);
#endif

}  // namespace cuvq::bench
