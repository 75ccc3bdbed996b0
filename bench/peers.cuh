// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What one would use without cuvq: cuBLAS, CUB, plain copies. Each peer is an object that owns the memory it needs,
// made outside the timed part, and is called as peer(set, stream).
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>
#include <cub/block/block_reduce.cuh>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_reduce.cuh>
#include <cub/device/device_run_length_encode.cuh>
#include <cub/warp/warp_reduce.cuh>

#include <cuvq/cuda_error.cuh>

#include "problem.cuh"

namespace cuvq::bench {

/// A peer that is not run; the text says why.
struct skipped : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// Most device memory that a peer may take for itself.
inline constexpr double most_peer_bytes = 40e9;

inline void check_memory(double bytes) {
    if (bytes > most_peer_bytes)
        throw skipped("needs " + std::to_string(static_cast<long long>(bytes / 1e9 + 0.5)) + " GB, more than " +
                      std::to_string(static_cast<long long>(most_peer_bytes / 1e9)));
}

inline void check_cublas(cublasStatus_t status, const char* call) {
    if (status != CUBLAS_STATUS_SUCCESS)
        throw std::runtime_error(std::string(call) + ": " + cublasGetStatusString(status));
}
#define CUVQ_BENCH_CHECK_CUBLAS(call) ::cuvq::bench::check_cublas((call), #call)

template <class T>
constexpr cudaDataType_t cuda_type() {
    if constexpr (std::is_same_v<T, __half>) return CUDA_R_16F;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return CUDA_R_16BF;
    return CUDA_R_32F;
}

/// cuBLAS and cuBLASLt with a workspace of their own, so that they can be captured.
class blas {
public:
    blas() : workspace_(std::int64_t{64} << 20) {
        CUVQ_BENCH_CHECK_CUBLAS(cublasCreate(&handle_));
        CUVQ_BENCH_CHECK_CUBLAS(cublasLtCreate(&light_));
        CUVQ_BENCH_CHECK_CUBLAS(cublasSetWorkspace(handle_, workspace_.data(), workspace_.bytes()));
    }
    blas(const blas&) = delete;
    blas& operator=(const blas&) = delete;
    ~blas() {
        cublasLtDestroy(light_);
        cublasDestroy(handle_);
    }

    cublasLtHandle_t light() const { return light_; }
    const buffer<char>& workspace() const { return workspace_; }

    /// out [rows x columns] = alpha a b^T with a [rows x depth], b [columns x depth], all row-major.
    template <class T, class Out>
    void product(const T* a, const T* b, Out* out, std::int64_t rows, std::int64_t columns, std::int64_t depth,
                 float alpha, cublasComputeType_t compute, cudaStream_t stream) const {
        gemm(CUBLAS_OP_T, CUBLAS_OP_N, columns, rows, depth, alpha, b, depth, a, depth, out, columns, compute, stream);
    }
    /// out [columns x depth] = a^T b with a [rows x columns], b [rows x depth], all row-major.
    template <class T>
    void transposed_product(const T* a, const T* b, float* out, std::int64_t rows, std::int64_t columns,
                            std::int64_t depth, cudaStream_t stream) const {
        gemm(CUBLAS_OP_N, CUBLAS_OP_T, depth, columns, rows, 1.0f, b, depth, a, columns, out, depth, CUBLAS_COMPUTE_32F,
             stream);
    }

private:
    template <class T, class Out>
    void gemm(cublasOperation_t first, cublasOperation_t second, std::int64_t m, std::int64_t n, std::int64_t k,
              float alpha, const T* a, std::int64_t a_stride, const T* b, std::int64_t b_stride, Out* out,
              std::int64_t out_stride, cublasComputeType_t compute, cudaStream_t stream) const {
        const float zero = 0;
        CUVQ_BENCH_CHECK_CUBLAS(cublasSetStream(handle_, stream));
        // Setting a stream puts the handle's own workspace back.
        CUVQ_BENCH_CHECK_CUBLAS(cublasSetWorkspace(handle_, workspace_.data(), workspace_.bytes()));
        CUVQ_BENCH_CHECK_CUBLAS(cublasGemmEx_64(handle_, first, second, m, n, k, &alpha, a, cuda_type<T>(), a_stride, b,
                                                cuda_type<T>(), b_stride, &zero, out, cuda_type<Out>(), out_stride,
                                                compute, CUBLAS_GEMM_DEFAULT));
    }

    buffer<char> workspace_;
    cublasHandle_t handle_ = nullptr;
    cublasLtHandle_t light_ = nullptr;
};

// ---- quantize -------------------------------------------------------------------------------------------------------

/// Threads of an argmin block; a row is a warp's or a block's.
inline constexpr int argmin_threads = 256;

/// Least of scores[i][k] + norms[k] over k, or of the scores alone where norms is null.
template <int Threads>
__global__ void __launch_bounds__(argmin_threads)
    argmin(const float* scores, const float* norms, std::int64_t rows, std::int64_t codes, std::int32_t* out) {
    using pair = cub::KeyValuePair<std::int32_t, float>;
    using reduce = std::conditional_t<Threads == 32, cub::WarpReduce<pair>, cub::BlockReduce<pair, argmin_threads>>;
    constexpr int rows_per_block = argmin_threads / Threads;
    __shared__ typename reduce::TempStorage memory[rows_per_block];
    const int place = threadIdx.x / Threads, lane = threadIdx.x % Threads;
    const std::int64_t row = blockIdx.x * std::int64_t{rows_per_block} + place;
    if (row >= rows) return;
    const float* mine = scores + row * codes;
    pair best(0x7FFFFFFF, FLT_MAX);
    const auto look = [&](std::int64_t k, float score) {
        if (score < best.value) best = pair(static_cast<std::int32_t>(k), score);
    };
    if (codes % 4 == 0) {
#pragma unroll 4
        for (std::int64_t k = 4 * lane; k < codes; k += 4 * Threads) {
            float4 s = *reinterpret_cast<const float4*>(mine + k);
            if (norms) {
                const float4 n = *reinterpret_cast<const float4*>(norms + k);
                s = make_float4(s.x + n.x, s.y + n.y, s.z + n.z, s.w + n.w);
            }
            look(k, s.x);
            look(k + 1, s.y);
            look(k + 2, s.z);
            look(k + 3, s.w);
        }
    } else {
        for (std::int64_t k = lane; k < codes; k += Threads) look(k, norms ? mine[k] + norms[k] : mine[k]);
    }
    best = reduce(memory[place]).Reduce(best, cub::ArgMin());
    if (lane == 0) out[row] = best.key;
}

static __global__ void square_norms(const float* codebook, cuvq::shape s, float* norms) {
    for (std::int64_t k = loop_first(); k < s.codes; k += loop_step()) {
        double sum = 0;
        for (std::int64_t d = 0; d < s.dimensions; ++d) {
            const double c = codebook[k * s.dimensions + d];
            sum += c * c;
        }
        norms[k] = static_cast<float>(sum);
    }
}

/// norms - 2 x c^T of so many rows by cuBLASLt, which adds the norms as its bias, in each of its first few choices.
template <class X>
class biased_product {
public:
    static constexpr int most_choices = 4;

    biased_product(cublasLtHandle_t handle, std::int64_t rows, const cuvq::shape& s, cublasComputeType_t compute,
                   const buffer<char>& workspace)
        : handle_(handle), workspace_(workspace) {
        // Column-major, as cuBLASLt sees it: scores^T [K x rows] = (c^T)^T x^T.
        const auto codes = static_cast<std::uint64_t>(s.codes), dimensions = static_cast<std::uint64_t>(s.dimensions);
        CUVQ_BENCH_CHECK_CUBLAS(cublasLtMatmulDescCreate(&operation_.value, compute, CUDA_R_32F));
        set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
        set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
        CUVQ_BENCH_CHECK_CUBLAS(cublasLtMatrixLayoutCreate(&c_.value, cuda_type<X>(), dimensions, codes, s.dimensions));
        CUVQ_BENCH_CHECK_CUBLAS(cublasLtMatrixLayoutCreate(&x_.value, cuda_type<X>(), dimensions,
                                                           static_cast<std::uint64_t>(rows), s.dimensions));
        CUVQ_BENCH_CHECK_CUBLAS(
            cublasLtMatrixLayoutCreate(&scores_.value, CUDA_R_32F, codes, static_cast<std::uint64_t>(rows), s.codes));
        owner<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> preference;
        CUVQ_BENCH_CHECK_CUBLAS(cublasLtMatmulPreferenceCreate(&preference.value));
        const std::size_t bytes = workspace.bytes();
        CUVQ_BENCH_CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(
            preference.value, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes)));
        const auto status =
            cublasLtMatmulAlgoGetHeuristic(handle_, operation_.value, c_.value, x_.value, scores_.value, scores_.value,
                                           preference.value, most_choices, choices_, &found_);
        if (status != CUBLAS_STATUS_SUCCESS) found_ = 0;
    }

    /// @param choice  from 0; one that cuBLASLt does not have is refused
    void operator()(int choice, const X* x, const X* codebook, const float* norms, float* scores, cudaStream_t stream) {
        if (choice >= found_) throw skipped("no such choice of cuBLASLt");
        const float minus_two = -2, zero = 0;
        set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, norms);
        CUVQ_BENCH_CHECK_CUBLAS(cublasLtMatmul(handle_, operation_.value, &minus_two, codebook, c_.value, x, x_.value,
                                               &zero, scores, scores_.value, scores, scores_.value,
                                               &choices_[choice].algo, workspace_.data(), workspace_.bytes(), stream));
    }

private:
    template <class Handle, cublasStatus_t (*Destroy)(Handle)>
    struct owner {
        owner() = default;
        owner(const owner&) = delete;
        owner& operator=(const owner&) = delete;
        ~owner() {
            if (value) Destroy(value);
        }
        Handle value = nullptr;
    };
    using layout = owner<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;

    template <class Value>
    void set(cublasLtMatmulDescAttributes_t attribute, const Value& value) {
        CUVQ_BENCH_CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(operation_.value, attribute, &value, sizeof(value)));
    }

    cublasLtHandle_t handle_;
    const buffer<char>& workspace_;
    owner<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> operation_;
    layout c_, x_, scores_;
    cublasLtMatmulHeuristicResult_t choices_[most_choices] = {};
    int found_ = 0;
};

/// |c|^2 - 2 x c^T by cuBLAS or cuBLASLt, then the argmin of that. Writes the problem's codes.
template <class X>
class product_argmin {
public:
    /// One way to do it.
    struct way {
        int product = 0;         ///< 0: cuBLAS, and the norms added by the argmin; from 1: a choice of cuBLASLt's
        int threads_of_row = 0;  ///< in the argmin: 32 or argmin_threads
        std::int64_t piece = 0;  ///< rows at a time
    };
    static constexpr int products = 1 + biased_product<X>::most_choices;

    product_argmin(const blas& b, const problem<X>& p, cublasComputeType_t compute)
        : blas_(b),
          problem_(p),
          compute_(compute),
          whole_(std::min(p.shape.vectors, rows_of(most_peer_bytes))),
          codebook_(converted<X>(p.codebook)),
          norms_(p.shape.codes),
          scores_((check_memory(4.0 * static_cast<double>(whole_) * static_cast<double>(p.shape.codes)),
                   whole_ * p.shape.codes)) {
        square_norms<<<loop_blocks, loop_threads>>>(p.codebook.data(), p.shape, norms_.data());
        CUVQ_CHECK_CUDA(cudaGetLastError());
        CUVQ_CHECK_CUDA(cudaDeviceSynchronize());
    }

    /// What to begin with: all rows at once, or as many as there may be scores of.
    way first() const { return {0, problem_.shape.codes <= 1024 ? 32 : argmin_threads, whole_}; }
    /// The same by so many rows that their scores stay in L2.
    way in_l2(way w, std::int64_t l2_bytes) const {
        w.piece = std::min(whole_, rows_of(static_cast<double>(l2_bytes) / 2));
        return w;
    }

    void choose(const way& w) {
        way_ = w;
        const auto& s = problem_.shape;
        plan_.reset();
        rest_plan_.reset();
        if (w.product == 0) return;
        const auto plan = [&](std::int64_t rows) {
            return std::make_unique<biased_product<X>>(blas_.light(), rows, s, compute_, blas_.workspace());
        };
        plan_ = plan(w.piece);
        if (s.vectors % w.piece > 0) rest_plan_ = plan(s.vectors % w.piece);
    }

    std::string label() const {
        const auto choice = way_.product == 0 ? "cuBLAS" : "cuBLASLt's choice " + std::to_string(way_.product);
        const auto rows =
            way_.piece < problem_.shape.vectors ? std::to_string(way_.piece) + " rows at a time" : "whole";
        return choice + ", a " + (way_.threads_of_row == 32 ? "warp" : "block") + " to a row, " + rows;
    }

    void operator()(int set, cudaStream_t stream) const {
        const auto& s = problem_.shape;
        const X* x = problem_.x_of(set).data_handle();
        std::int32_t* codes = problem_.codes_of(set).data_handle();
        for (std::int64_t first = 0; first < s.vectors; first += way_.piece) {
            const std::int64_t rows = std::min(way_.piece, s.vectors - first);
            const X* mine = x + first * s.dimensions;
            if (way_.product == 0)
                blas_.product(mine, codebook_.data(), scores_.data(), rows, s.codes, s.dimensions, -2.0f, compute_,
                              stream);
            else if (rows == way_.piece)
                (*plan_)(way_.product - 1, mine, codebook_.data(), norms_.data(), scores_.data(), stream);
            else  // another size may have fewer choices
                (*rest_plan_)(0, mine, codebook_.data(), norms_.data(), scores_.data(), stream);
            const auto blocks = static_cast<unsigned>((rows * way_.threads_of_row - 1) / argmin_threads + 1);
            const auto kernel = way_.threads_of_row == 32 ? argmin<32> : argmin<argmin_threads>;
            kernel<<<blocks, argmin_threads, 0, stream>>>(scores_.data(), way_.product == 0 ? norms_.data() : nullptr,
                                                          rows, s.codes, codes + first);
            CUVQ_CHECK_CUDA(cudaGetLastError());
        }
    }

private:
    /// So many that their scores take that much memory; a multiple of 128, which keeps every piece aligned.
    std::int64_t rows_of(double bytes) const {
        return std::max<std::int64_t>(128, static_cast<std::int64_t>(bytes) / (4 * problem_.shape.codes) / 128 * 128);
    }

    const blas& blas_;
    const problem<X>& problem_;
    cublasComputeType_t compute_;
    std::int64_t whole_;
    buffer<X> codebook_;
    buffer<float> norms_, scores_;
    way way_;
    std::unique_ptr<biased_product<X>> plan_, rest_plan_;
};

/// x c^T in half precision, summed in float32, written out as Out.
template <class X, class Out>
class half_product {
public:
    half_product(const blas& b, const problem<X>& p)
        : blas_(b),
          problem_(p),
          x_(converted<__half>(p.x)),
          codebook_(converted<__half>(p.codebook)),
          scores_((check_memory(static_cast<double>(sizeof(Out)) * static_cast<double>(p.shape.vectors) *
                                static_cast<double>(p.shape.codes)),
                   p.shape.vectors * p.shape.codes)) {}

    void operator()(int set, cudaStream_t stream) const {
        const auto& s = problem_.shape;
        blas_.product(x_.data() + set * problem_.rows * s.dimensions, codebook_.data(), scores_.data(), s.vectors,
                      s.codes, s.dimensions, 1.0f, CUBLAS_COMPUTE_32F, stream);
    }

private:
    const blas& blas_;
    const problem<X>& problem_;
    buffer<__half> x_, codebook_;
    buffer<Out> scores_;
};

// ---- accumulate -----------------------------------------------------------------------------------------------------

template <class X>
__global__ void set_one_hot(X* matrix, const std::int32_t* codes, cuvq::shape s) {
    for (std::int64_t i = loop_first(); i < s.vectors; i += loop_step())
        matrix[i * s.codes + codes[i]] = static_cast<X>(1.0f);
}

template <class T>
__global__ void fill(T* out, T value, std::int64_t size) {
    for (std::int64_t e = loop_first(); e < size; e += loop_step()) out[e] = value;
}

/// The N x K one-hot matrix of the codes, in the type of x; counts and sums as its products with ones and x.
template <class X>
class one_hot {
public:
    one_hot(const blas& b, const problem<X>& p)
        : blas_(b),
          problem_(p),
          matrix_((check_memory(static_cast<double>(sizeof(X)) * static_cast<double>(p.shape.vectors) *
                                static_cast<double>(p.shape.codes)),
                   p.shape.vectors * p.shape.codes)),
          ones_(p.shape.vectors),
          counts_(p.shape.codes),
          sums_(p.codebook.size()) {
        fill<<<loop_blocks, loop_threads>>>(ones_.data(), static_cast<X>(1.0f), ones_.size());
        CUVQ_CHECK_CUDA(cudaGetLastError());
        CUVQ_CHECK_CUDA(cudaDeviceSynchronize());
    }

    const buffer<float>& counts() const { return counts_; }
    const buffer<float>& sums() const { return sums_; }

    void operator()(int set, cudaStream_t stream) const {
        const auto& s = problem_.shape;
        CUVQ_CHECK_CUDA(cudaMemsetAsync(matrix_.data(), 0, matrix_.bytes(), stream));
        set_one_hot<<<loop_blocks, loop_threads, 0, stream>>>(matrix_.data(), problem_.codes_of(set).data_handle(), s);
        CUVQ_CHECK_CUDA(cudaGetLastError());
        blas_.transposed_product(matrix_.data(), ones_.data(), counts_.data(), s.vectors, s.codes, 1, stream);
        blas_.transposed_product(matrix_.data(), problem_.x_of(set).data_handle(), sums_.data(), s.vectors, s.codes,
                                 s.dimensions, stream);
    }

private:
    const blas& blas_;
    const problem<X>& problem_;
    buffer<X> matrix_, ones_;
    buffer<float> counts_, sums_;
};

/// Neighbouring columns of a row at once: of float32, a sector of memory.
struct alignas(16) column_chunk {
    static constexpr int count = 8;
    float v[count];
};
struct add_chunks {
    __host__ __device__ column_chunk operator()(const column_chunk& a, const column_chunk& b) const {
        column_chunk sum;
        for (int i = 0; i < column_chunk::count; ++i) sum.v[i] = a.v[i] + b.v[i];
        return sum;
    }
};

/// Item j: columns 8c to 8c + 7 of the i-th row in the order of codes, with j = c N + i. The key is c K + code.
struct sorted_keys {
    const std::int32_t* codes;  // [N] sorted
    std::int32_t rows, most_codes;
    __host__ __device__ std::int32_t operator()(std::int32_t j) const {
        return j / rows * most_codes + codes[j % rows];
    }
};
template <class X>
struct sorted_chunks {
    const X* x;
    const std::int32_t* order;  // [N] the row at each place
    std::int32_t rows, dimensions;
    __host__ __device__ column_chunk operator()(std::int32_t j) const {
        const std::int32_t d = j / rows * column_chunk::count;
        const X* from = x + static_cast<std::int64_t>(order[j % rows]) * dimensions + d;
        column_chunk c;
        for (int i = 0; i < column_chunk::count; ++i) c.v[i] = d + i < dimensions ? static_cast<float>(from[i]) : 0.0f;
        return c;
    }
};

static __global__ void scatter_sums(const std::int32_t* keys, const column_chunk* values, const std::int32_t* count,
                                    cuvq::shape s, float* sums) {
    for (std::int64_t e = loop_first(); e < *count; e += loop_step()) {
        const std::int64_t d = keys[e] / s.codes * column_chunk::count, code = keys[e] % s.codes;
        const column_chunk c = values[e];
        for (int i = 0; i < column_chunk::count; ++i)
            if (d + i < s.dimensions) sums[code * s.dimensions + d + i] = c.v[i];
    }
}
static __global__ void scatter_counts(const std::int32_t* keys, const std::int32_t* values, const std::int32_t* count,
                                      float* counts) {
    for (std::int64_t e = loop_first(); e < *count; e += loop_step()) counts[keys[e]] = static_cast<float>(values[e]);
}

/// CUB alone: sorts row numbers by code, then counts runs and reduces by key.
template <class X>
class sort_reduce {
public:
    sort_reduce(const problem<X>& p)
        : problem_(p),
          items_(items(p.shape)),
          order_(std::vector<std::int32_t>(identity(p.shape.vectors))),
          sorted_codes_(p.shape.vectors),
          sorted_order_(p.shape.vectors),
          keys_(most_keys(p.shape)),
          lengths_(p.shape.codes),
          found_(1),
          chunks_(most_keys(p.shape)),
          counts_(p.shape.codes),
          sums_(p.codebook.size()) {
        std::size_t bytes[3] = {};
        sort(0, nullptr, bytes[0], nullptr);
        count(nullptr, bytes[1], nullptr);
        reduce(0, nullptr, bytes[2], nullptr);
        bytes_ = std::max({bytes[0], bytes[1], bytes[2]});
        memory_ = buffer<char>(static_cast<std::int64_t>(bytes_));
    }

    const buffer<float>& counts() const { return counts_; }
    const buffer<float>& sums() const { return sums_; }

    void operator()(int set, cudaStream_t stream) {
        const auto& s = problem_.shape;
        sort(set, memory_.data(), bytes_, stream);
        CUVQ_CHECK_CUDA(cudaMemsetAsync(counts_.data(), 0, counts_.bytes(), stream));
        CUVQ_CHECK_CUDA(cudaMemsetAsync(sums_.data(), 0, sums_.bytes(), stream));
        count(memory_.data(), bytes_, stream);
        scatter_counts<<<256, loop_threads, 0, stream>>>(keys_.data(), lengths_.data(), found_.data(), counts_.data());
        reduce(set, memory_.data(), bytes_, stream);
        scatter_sums<<<256, loop_threads, 0, stream>>>(keys_.data(), chunks_.data(), found_.data(), s, sums_.data());
        CUVQ_CHECK_CUDA(cudaGetLastError());
    }

private:
    static std::int64_t chunks_of(const cuvq::shape& s) {
        return (s.dimensions + column_chunk::count - 1) / column_chunk::count;
    }
    static std::int64_t most_keys(const cuvq::shape& s) { return chunks_of(s) * s.codes; }
    static std::int32_t items(const cuvq::shape& s) {
        const std::int64_t chunks = chunks_of(s);
        if (std::max(s.vectors, s.codes) > 0x7FFFFFFF / chunks) throw skipped("has more items than fit in 32 bits");
        return static_cast<std::int32_t>(s.vectors * chunks);
    }
    static std::vector<std::int32_t> identity(std::int64_t n) {
        std::vector<std::int32_t> v(static_cast<std::size_t>(n));
        for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<std::int32_t>(i);
        return v;
    }

    void sort(int set, void* memory, std::size_t& bytes, cudaStream_t stream) const {
        const std::int64_t codes = problem_.shape.codes;
        int bits = 1;
        while (bits < 31 && (codes - 1) >> bits != 0) ++bits;
        CUVQ_CHECK_CUDA(cub::DeviceRadixSort::SortPairs(
            memory, bytes, reinterpret_cast<const std::uint32_t*>(problem_.codes_of(set).data_handle()),
            reinterpret_cast<std::uint32_t*>(sorted_codes_.data()),
            reinterpret_cast<const std::uint32_t*>(order_.data()),
            reinterpret_cast<std::uint32_t*>(sorted_order_.data()), static_cast<int>(problem_.shape.vectors), 0, bits,
            stream));
    }
    void count(void* memory, std::size_t& bytes, cudaStream_t stream) const {
        CUVQ_CHECK_CUDA(cub::DeviceRunLengthEncode::Encode(memory, bytes, sorted_codes_.data(), keys_.data(),
                                                           lengths_.data(), found_.data(),
                                                           static_cast<int>(problem_.shape.vectors), stream));
    }
    void reduce(int set, void* memory, std::size_t& bytes, cudaStream_t stream) const {
        const auto rows = static_cast<std::int32_t>(problem_.shape.vectors);
        const thrust::counting_iterator<std::int32_t> j(0);
        const auto keys = thrust::make_transform_iterator(
            j, sorted_keys{sorted_codes_.data(), rows, static_cast<std::int32_t>(problem_.shape.codes)});
        const auto values = thrust::make_transform_iterator(
            j, sorted_chunks<X>{problem_.x_of(set).data_handle(), sorted_order_.data(), rows,
                                static_cast<std::int32_t>(problem_.shape.dimensions)});
        CUVQ_CHECK_CUDA(cub::DeviceReduce::ReduceByKey(memory, bytes, keys, keys_.data(), values, chunks_.data(),
                                                       found_.data(), add_chunks(), items_, stream));
    }

    const problem<X>& problem_;
    std::int32_t items_;
    buffer<std::int32_t> order_, sorted_codes_, sorted_order_, keys_, lengths_, found_;
    buffer<column_chunk> chunks_;
    buffer<float> counts_, sums_;
    buffer<char> memory_;
    std::size_t bytes_ = 0;
};

// ---- floors ---------------------------------------------------------------------------------------------------------

/// Reads 16 bytes at a time; what is read must not look unused.
static __global__ void read_all(const uint4* data, std::int64_t size, unsigned* out) {
    unsigned bits = 0;
#pragma unroll 4
    for (std::int64_t e = loop_first(); e < size; e += loop_step()) {
        const uint4 v = data[e];
        bits ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (bits == 0x9E3779B9u) *out = bits;
}

static __global__ void copy_all(const uint4* __restrict__ from, uint4* __restrict__ to, std::int64_t size) {
#pragma unroll 4
    for (std::int64_t e = loop_first(); e < size; e += loop_step()) to[e] = from[e];
}

}  // namespace cuvq::bench
