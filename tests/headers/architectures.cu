// Every public function for the architectures beside the one that the tests run on: that they compile, and that none
// but sm_90a is asked for instructions it has not.
#include <cstdint>

#include <cuvq/cuvq.cuh>

namespace architectures {

template <class T>
using matrix = cuvq::matrix_view<T, 16>;
using codes = cuvq::vector_view<std::int32_t>;
using floats = cuvq::vector_view<float>;

template <class T>
void use(const cuvq::codebook_state<float, 16>& state, const matrix<T>& x, const codes& c, const floats& f) {
    cuvq::prepare(state.codebook, state.prepared);
    cuvq::quantize(x, state.codebook, c, x, f);
    cuvq::lookup(state.codebook, c, x);
    cuvq::accumulate(x, c, f, state.embed_sum);
    cuvq::ema_apply(state, f, state.embed_sum, x);
    cuvq::ema_update(state, x, c);
    cuvq::train_step(state, x, c, x);
}

// The type of vectors that differs from the codebook's asks for the most.
template void use(const cuvq::codebook_state<float, 16>&, const matrix<__half>&, const codes&, const floats&);

}  // namespace architectures
