// Quantize a batch and make one train step, all on the GPU.
#include <cstdio>

#include <thrust/device_vector.h>
#include <thrust/random.h>
#include <thrust/tabulate.h>
#include <cuvq/cuvq.cuh>

struct normal {
    __device__ float operator()(long i) const {
        thrust::default_random_engine engine;
        engine.discard(2 * i);
        return thrust::normal_distribution<float>()(engine);
    }
};

int main() {
    const long N = 65536, K = 1024, D = 64;
    thrust::device_vector<float> data(N * D), quantized(N * D);
    thrust::device_vector<int> code_data(N);
    thrust::device_vector<cuvq::step_stats> stats(1);
    thrust::tabulate(data.begin(), data.end(), normal{});

    const cuvq::matrix_view<const float, D> x(data.data().get(), N);
    const cuvq::matrix_view<float, D> rows(quantized.data().get(), N);
    const cuvq::vector_view<int> codes(code_data.data().get(), N);

    cuvq::codebook<float> codebook(K, D);
    codebook.init_from_rows(x, /*seed=*/1);
    cuvq::quantize(x, codebook.state().codebook, codes, rows);  // nearest rows, exact

    codebook.prepare();  // for many steps: each is spared a launch, and keeps what this made fresh
    cuvq::train_params params = cuvq::ema_params::rectokens();
    params.stats = stats.data().get();
    cuvq::train_step(codebook.state(), x, codes, rows, params);  // nearest rows, then move the codebook

    const cuvq::step_stats s = stats[0];
    std::printf("loss %.4f, perplexity %.1f of %ld codes\n", s.commitment_loss, s.perplexity, K);
}
