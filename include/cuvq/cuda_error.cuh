// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>

#include <cuda_runtime_api.h>

namespace cuvq {

/// A CUDA call made by cuvq failed. Thrown by the host functions of `cuvq`, never by `cuvq::reference`.
class cuda_error : public std::runtime_error {
public:
    cuda_error(cudaError_t code, const char* call, const char* file, int line)
        : std::runtime_error(std::string("cuvq: ") + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) +
                             ") from " + call + " at " + file + ":" + std::to_string(line)),
          code_(code),
          call_(call),
          file_(file),
          line_(line) {}

    cudaError_t code() const noexcept { return code_; }  ///< what CUDA returned
    const char* call() const noexcept { return call_; }  ///< the call's text
    const char* file() const noexcept { return file_; }  ///< where in cuvq
    int line() const noexcept { return line_; }

private:
    cudaError_t code_;
    const char* call_;
    const char* file_;
    int line_;
};

namespace detail {

inline void check_cuda(cudaError_t code, const char* call, const char* file, int line) {
    if (code != cudaSuccess) {
        cudaGetLastError();  // thrown here, so not to be met again by whoever asks next
        throw cuda_error(code, call, file, line);
    }
}

}  // namespace detail
}  // namespace cuvq

#define CUVQ_CHECK_CUDA(call) ::cuvq::detail::check_cuda((call), #call, __FILE__, __LINE__)
