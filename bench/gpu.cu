// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The rows that run on the GPU: the card's ceilings; then, for each shape and type, floors, peers, cuvq.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include <cuvq/cuvq.cuh>

#include "backends.hpp"
#include "check.cuh"
#include "peers.cuh"
#include "problem.cuh"
#include "timing.cuh"

namespace cuvq::bench {

namespace {

/// A problem, and what its codes should be, computed when first asked for.
template <class X>
struct judged_problem : any_problem {
    judged_problem(const cuvq::shape& s, data_kind kind, int sets) : data(s, kind, sets) {}

    const code_oracle<X>& oracle() {
        if (!oracle_) oracle_ = std::make_unique<code_oracle<X>>(data);
        return *oracle_;
    }

    problem<X> data;

private:
    std::unique_ptr<code_oracle<X>> oracle_;
};

/// What the rows of a run share.
class fixture {
public:
    fixture(const options& o, report& r) : settings(o), out(r), watch(o.seconds), glance(0.002, 1) {
        int device = 0;
        CUVQ_CHECK_CUDA(cudaGetDevice(&device));
        CUVQ_CHECK_CUDA(cudaGetDeviceProperties(&card, device));
    }

    /// The current problem if it is that one, else a new one in its place.
    template <class X>
    judged_problem<X>& get(const cuvq::shape& s) {
        auto* p = dynamic_cast<judged_problem<X>*>(held_.get());
        if (!p || !same(p->data.shape, s)) {
            held_.reset();
            auto fresh = std::make_unique<judged_problem<X>>(s, settings.data,
                                                             input_sets(s, sizeof(X), card.l2CacheSize, settings.cold));
            p = fresh.get();
            held_ = std::move(fresh);
        }
        return *p;
    }

    const blas& cublas() {
        if (!blas_) blas_ = std::make_unique<blas>();
        return *blas_;
    }

    const options& settings;
    report& out;
    stopwatch watch, glance;  ///< for what is reported; for a choice between ways
    cudaDeviceProp card{};

private:
    std::unique_ptr<blas> blas_;
    std::unique_ptr<any_problem> held_;
};

constexpr auto nothing = [] {};

/// A workspace for one call at a time.
class lent_memory {
public:
    explicit lent_memory(std::size_t bytes) : memory_(static_cast<std::int64_t>(bytes)) {}
    workspace lend() const { return {memory_.data(), memory_.bytes()}; }

private:
    buffer<char> memory_;
};

/// Registers a row: body(state, row). What it throws ends up in the row.
template <class Body>
void add(fixture& s, row r, Body body) {
    r.hard = r.test != "ceiling" && s.settings.data == data_kind::hard;
    const auto run = [&s, r, body](benchmark::State& state) {
        if (const auto reason = s.out.out_of_time(); !reason.empty()) {
            state.SkipWithError(reason.c_str());
            return;
        }
        try {
            body(state, r);
        } catch (const skipped& e) {
            state.SkipWithError((std::string("skipped: ") + e.what()).c_str());
        } catch (const std::exception& e) {
            cudaGetLastError();
            s.out.fail(r);
            state.SkipWithError(e.what());
        }
    };
    // One iteration: the samples and their median are made here.
    benchmark::RegisterBenchmark(r.name().c_str(), run)->UseManualTime()->Iterations(1)->Unit(benchmark::kMicrosecond);
}

// ---- the card and its floors ----------------------------------------------------------------------------------------

void add_ceilings(fixture& s) {
    add(s, {"ceiling", "copy", "", {}, ""}, [&s](benchmark::State& state, const row& r) {
        // Far larger than L2, but no longer: above some hundred MB copies become slower again.
        const buffer<float> from(std::int64_t{1} << 26), to(from.size());
        fill_x<<<loop_blocks, loop_threads>>>(from.data(), data_kind::normal, from.size(), cuvq::shape{1, 1, 1});
        CUVQ_CHECK_CUDA(cudaDeviceSynchronize());
        const auto m = s.watch.time(1, nothing, [&](int) {
            CUVQ_CHECK_CUDA(
                cudaMemcpyAsync(to.data(), from.data(), from.bytes(), cudaMemcpyDeviceToDevice, s.watch.stream()));
        });
        const work w{0, 2.0 * static_cast<double>(from.bytes())};
        s.out.most_bytes = w.bytes / m.us;
        s.out.write(state, r, m, w);
    });
    add(s, {"ceiling", product_peer, "", {}, ""}, [&s](benchmark::State& state, const row& r) {
        const cuvq::shape big{8192, 8192, 8192};
        const problem<__half> p(big, data_kind::normal, 1);
        const half_product<__half, __half> product(s.cublas(), p);
        const auto m = s.watch.time(1, nothing, [&](int set) { product(set, s.watch.stream()); });
        const work w = product_work(big, 6.0 * 8192 * 8192);
        s.out.most_flops = w.flops / m.us;
        s.out.write(state, r, m, w);
    });
}

template <class X>
void add_floors(fixture& s, const cuvq::shape& shape, const char* type) {
    const double bytes = vector_bytes(shape, sizeof(X));
    // The last few bytes of a size that is no multiple of 16 are not missed.
    const auto vectors = static_cast<std::int64_t>(bytes) / 16;
    const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(loop_blocks, vectors / loop_threads + 1));
    add(s, {"floor", "copy_x", type, shape, ""}, [&s, bytes, vectors, blocks](benchmark::State& state, const row& r) {
        const auto& p = s.get<X>(r.shape).data;
        const buffer<X> to(r.shape.vectors * r.shape.dimensions);
        // Above some hundred MB a kernel is the faster one of the two.
        const auto driver = s.watch.time(p.sets, nothing, [&](int set) {
            CUVQ_CHECK_CUDA(cudaMemcpyAsync(to.data(), p.x_of(set).data_handle(), to.bytes(), cudaMemcpyDeviceToDevice,
                                            s.watch.stream()));
        });
        const auto kernel = s.watch.time(p.sets, nothing, [&](int set) {
            copy_all<<<blocks, loop_threads, 0, s.watch.stream()>>>(
                reinterpret_cast<const uint4*>(p.x_of(set).data_handle()), reinterpret_cast<uint4*>(to.data()),
                vectors);
            CUVQ_CHECK_CUDA(cudaGetLastError());
        });
        s.out.write(state, r, vectors == 0 || driver.us < kernel.us ? driver : kernel, {0, 2 * bytes});
    });
    add(s, {"floor", "read_x", type, shape, ""}, [&s, bytes, vectors, blocks](benchmark::State& state, const row& r) {
        const auto& p = s.get<X>(r.shape).data;
        const buffer<unsigned> out(1);
        const auto m = s.watch.time(p.sets, nothing, [&](int set) {
            read_all<<<blocks, loop_threads, 0, s.watch.stream()>>>(
                reinterpret_cast<const uint4*>(p.x_of(set).data_handle()), vectors, out.data());
            CUVQ_CHECK_CUDA(cudaGetLastError());
        });
        s.out.write(state, r, m, {0, bytes});
    });
}

// ---- peers ----------------------------------------------------------------------------------------------------------

/// Times the candidates that `try_next` makes and keeps the fastest: try_next(i) gives {its label, its time}. One that
/// needs too much memory does not count if another does not.
template <class TryNext>
std::pair<std::string, measured> fastest(int candidates, TryNext&& try_next) {
    std::pair<std::string, measured> best;
    std::string reason;
    for (int i = 0; i < candidates; ++i) {
        try {
            auto next = try_next(i);
            if (best.second.us == 0 || next.second.us < best.second.us) best = std::move(next);
        } catch (const skipped& e) {
            reason = e.what();
        }
    }
    if (best.second.us == 0) throw skipped(reason);
    return best;
}

/// Seconds after which no further way of a product_argmin is tried; the label and --help say so.
constexpr double most_tuning = 1.0;

/// Chooses the fastest way that a short look finds. Returns what the row's label must add: "" if all were
/// looked at.
template <class X>
std::string tune(fixture& s, const problem<X>& p, product_argmin<X>& peer) {
    const auto start = std::chrono::steady_clock::now();
    auto best = peer.first();
    double best_us = 0;
    std::string reason;
    int untried = 0;
    const auto look_at = [&](const typename product_argmin<X>::way& way) {
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
        if (best_us > 0 && spent.count() > most_tuning) {
            ++untried;
            return;
        }
        try {
            peer.choose(way);
            const double us = s.glance.time(p.sets, nothing, [&](int set) { peer(set, s.glance.stream()); }).us;
            if (best_us > 0 && us >= best_us) return;
            best_us = us;
            best = way;
        } catch (const std::exception& e) {  // not every choice exists for every size
            cudaGetLastError();
            reason = e.what();
        }
    };
    look_at(best);
    if (const auto way = peer.in_l2(best, s.card.l2CacheSize); way.piece < best.piece) look_at(way);
    for (int product = 1; product < peer.products; ++product) {
        auto way = best;
        way.product = product;
        look_at(way);
    }
    auto way = best;
    way.threads_of_row = best.threads_of_row == 32 ? argmin_threads : 32;
    look_at(way);
    if (best_us == 0) throw std::runtime_error(reason);
    peer.choose(best);
    return untried > 0 ? "; ways untried when tuning's second was up: " + std::to_string(untried) : "";
}

template <class X>
void add_product_argmin(fixture& s, const cuvq::shape& shape, const char* type, const char* who,
                        cublasComputeType_t compute) {
    add(s, {"quantize", who, type, shape, "codes"}, [&s, compute](benchmark::State& state, const row& r) {
        auto& judged = s.get<X>(r.shape);
        const auto& p = judged.data;
        product_argmin<X> peer(s.cublas(), p, compute);
        const std::string note = tune(s, p, peer);
        const auto m = s.watch.time(
            p.sets, [&] { p.codes.poison(s.watch.stream()); }, [&](int set) { peer(set, s.watch.stream()); });
        s.out.write(state, r, m, quantize_work(p.shape, sizeof(X), false), judged.oracle().judge(p.codes.data()),
                    peer.label() + note);
    });
}

template <class X>
void add_half_product(fixture& s, const cuvq::shape& shape) {
    add(s, {"quantize", product_peer, "half", shape, ""}, [&s](benchmark::State& state, const row& r) {
        const auto& p = s.get<X>(r.shape).data;
        const auto [label, m] = fastest(2, [&](int i) {
            const auto time = [&](const auto& peer) {
                return s.watch.time(p.sets, nothing, [&](int set) { peer(set, s.watch.stream()); });
            };
            return i == 0 ? std::pair(std::string("half out"), time(half_product<X, __half>(s.cublas(), p)))
                          : std::pair(std::string("float out"), time(half_product<X, float>(s.cublas(), p)));
        });
        const double scores = static_cast<double>(r.shape.vectors) * static_cast<double>(r.shape.codes);
        s.out.write(state, r, m,
                    product_work(r.shape, vector_bytes(r.shape, 2) + codebook_bytes(r.shape) / 2 +
                                              scores * (label == "half out" ? 2 : 4)),
                    {}, label);
    });
}

template <class X>
void add_one_hot(fixture& s, const cuvq::shape& shape, const char* type) {
    add(s, {"accumulate", "cublas_one_hot", type, shape, ""}, [&s](benchmark::State& state, const row& r) {
        const auto& p = s.get<X>(r.shape).data;
        p.draw("uniform");
        const one_hot<X> peer(s.cublas(), p);
        const auto m = s.watch.time(p.sets, nothing, [&](int set) { peer(set, s.watch.stream()); });
        peer(0, s.watch.stream());
        s.watch.wait();
        s.out.write(state, r, m, accumulate_work(p.shape, sizeof(X)),
                    sum_oracle<X>(p).judge(peer.counts(), peer.sums()));
    });
}

template <class X>
void add_sort_reduce(fixture& s, const cuvq::shape& shape, const char* type, const std::string& codes) {
    add(s, {"accumulate", "cub_sort_reduce", type, shape, codes}, [&s](benchmark::State& state, const row& r) {
        const auto& p = s.get<X>(r.shape).data;
        p.draw(r.variant);
        sort_reduce<X> peer(p);
        const auto m = s.watch.time(p.sets, nothing, [&](int set) { peer(set, s.watch.stream()); });
        peer(0, s.watch.stream());
        s.watch.wait();
        s.out.write(state, r, m, accumulate_work(p.shape, sizeof(X)),
                    sum_oracle<X>(p).judge(peer.counts(), peer.sums()));
    });
}

template <class X>
void add_peers(fixture& s, const cuvq::shape& shape, const char* type) {
    if (s.settings.wants("quantize")) {
        if constexpr (std::is_same_v<X, float>) {
            add_product_argmin<X>(s, shape, type, "cublas_fp32_argmin", CUBLAS_COMPUTE_32F);
            add_product_argmin<X>(s, shape, type, "cublas_tf32_argmin", CUBLAS_COMPUTE_32F_FAST_TF32);
        } else {
            const char* who = std::is_same_v<X, __half> ? "cublas_fp16_argmin" : "cublas_bf16_argmin";
            add_product_argmin<X>(s, shape, type, who, CUBLAS_COMPUTE_32F);
        }
        // Whatever the type of the vectors, this is the product; once is enough.
        if (type == s.settings.types.front()) add_half_product<X>(s, shape);
    }
    if (s.settings.wants("accumulate") || s.settings.wants("ema_update")) {
        add_one_hot<X>(s, shape, type);
        for (const auto& codes : s.settings.codes) add_sort_reduce<X>(s, shape, type, codes);
    }
}

// ---- cuvq -----------------------------------------------------------------------------------------------------------

/// Codes only. `prepare`, outside the timed part, completes the parameters, waits for what it put on a stream, and
/// returns what must be kept alive.
template <class X, class Prepare>
void add_codes(fixture& s, const cuvq::shape& shape, const char* type, const char* variant, Prepare prepare) {
    add(s, {"quantize", "cuvq", type, shape, variant}, [&s, prepare](benchmark::State& state, const row& r) {
        auto& judged = s.get<X>(r.shape);
        const auto& p = judged.data;
        quantize_params params;
        const std::shared_ptr<void> kept = prepare(p, params);
        const lent_memory memory(quantize_workspace_bytes(p.shape, params));
        const auto m = s.watch.time(
            p.sets, [&] { p.codes.poison(s.watch.stream()); },
            [&](int set) {
                quantize(p.x_of(set), p.codebook_view(), p.codes_of(set), discard, discard, params, memory.lend(),
                         s.watch.stream());
            });
        auto v = judged.oracle().judge(p.codes.data());
        v.approximate = params.accuracy != accuracy::exact;
        s.out.write(state, r, m, quantize_work(p.shape, sizeof(X), false), v);
    });
}

/// Codes, quantized rows and distances; the codebook is prepared in each call.
template <class X>
void add_all(fixture& s, const cuvq::shape& shape, const char* type, const char* variant, accuracy how) {
    add(s, {"quantize", "cuvq", type, shape, variant}, [&s, how](benchmark::State& state, const row& r) {
        auto& judged = s.get<X>(r.shape);
        const auto& p = judged.data;
        quantize_params params;
        params.accuracy = how;
        const buffer<X> quantized(p.shape.vectors * p.shape.dimensions);
        const buffer<float> distances(p.shape.vectors);
        const lent_memory memory(quantize_workspace_bytes(p.shape, params));
        const auto launch = [&](int set) {
            quantize(p.x_of(set), p.codebook_view(), p.codes_of(set),
                     matrix_view<X>(quantized.data(), p.shape.vectors, p.shape.dimensions),
                     vector_view<float>(distances.data(), p.shape.vectors), params, memory.lend(), s.watch.stream());
        };
        const auto m = s.watch.time(p.sets, nothing, launch);
        p.codes.poison(s.watch.stream());
        quantized.poison(s.watch.stream());
        distances.poison(s.watch.stream());
        launch(0);  // the last to run above may have been another set
        s.watch.wait();
        auto v = judged.oracle().judge(p.codes.data(), quantized.data(), distances.data());
        v.approximate = how != accuracy::exact;
        s.out.write(state, r, m, quantize_work(p.shape, sizeof(X), true), v);
    });
}

template <class X>
void add_quantize(fixture& s, const cuvq::shape& shape, const char* type) {
    add_codes<X>(s, shape, type, "codes", [](const problem<X>&, quantize_params&) { return nullptr; });
    const auto prepared = [](const problem<X>& p, quantize_params& params) {
        const std::size_t bytes = prepared_codebook_bytes(p.shape.codes, p.shape.dimensions);
        auto made = std::make_shared<buffer<char>>(static_cast<std::int64_t>(bytes));
        params.prepared = {made->data(), bytes};
        prepare(p.codebook_view(), params.prepared);
        CUVQ_CHECK_CUDA(cudaDeviceSynchronize());
        return std::shared_ptr<void>(made);
    };
    add_codes<X>(s, shape, type, "prepared", prepared);
    add_codes<X>(s, shape, type, "fast", [prepared](const problem<X>& p, quantize_params& params) {
        params.accuracy = accuracy::fast;
        return prepared(p, params);
    });
    add_all<X>(s, shape, type, "all", accuracy::exact);
    add_all<X>(s, shape, type, "fast_all", accuracy::fast);
}

template <class X>
void add_accumulate(fixture& s, const cuvq::shape& shape, const char* type, const std::string& codes) {
    add(s, {"accumulate", "cuvq", type, shape, codes}, [&s](benchmark::State& state, const row& r) {
        const auto& p = s.get<X>(r.shape).data;
        p.draw(r.variant);
        const buffer<float> counts(p.shape.codes), sums(p.codebook.size());
        const lent_memory memory(accumulate_workspace_bytes(p.shape));
        const auto launch = [&](int set) {
            accumulate(p.x_of(set), p.codes_of(set), vector_view<float>(counts.data(), p.shape.codes),
                       matrix_view<float>(sums.data(), p.shape.codes, p.shape.dimensions), {}, memory.lend(),
                       s.watch.stream());
        };
        const auto m = s.watch.time(p.sets, nothing, launch);
        counts.poison(s.watch.stream());
        sums.poison(s.watch.stream());
        launch(0);
        s.watch.wait();
        s.out.write(state, r, m, accumulate_work(p.shape, sizeof(X)), sum_oracle<X>(p).judge(counts, sums));
    });
}

template <class X>
void add_ema_update(fixture& s, const cuvq::shape& shape, const char* type, const std::string& codes) {
    add(s, {"ema_update", "cuvq", type, shape, codes}, [&s](benchmark::State& state, const row& r) {
        const auto& p = s.get<X>(r.shape).data;
        p.draw(r.variant);
        const auto params = ema_params::rectokens();
        const ema_memory ema(p.codebook, p.shape, params);
        const lent_memory memory(ema_update_workspace_bytes(p.shape, params));
        const auto reset = [&] { ema.reset(s.watch.stream()); };
        const auto launch = [&](int set) {
            ema_update(ema.view(), p.x_of(set), p.codes_of(set), params, memory.lend(), s.watch.stream());
        };
        const auto m = s.watch.time(p.sets, reset, launch);
        reset();
        launch(0);
        s.watch.wait();
        const sum_oracle<X> oracle(p);
        s.out.write(state, r, m, ema_update_work(p.shape, sizeof(X), oracle.touched(params)),
                    oracle.judge(ema.view(), params));
    });
}

/// A step, or `apart`, the same as a call of `quantize` and one of `ema_update`.
template <class X>
void add_train_step(fixture& s, const cuvq::shape& shape, const char* type, bool prepared, bool apart) {
    const char* variant = apart ? (prepared ? "prepared_apart" : "apart") : prepared ? "prepared" : "";
    add(s, {"train_step", "cuvq", type, shape, variant}, [&s, prepared, apart](benchmark::State& state, const row& r) {
        auto& judged = s.get<X>(r.shape);
        const auto& p = judged.data;
        const train_params params = ema_params::rectokens();
        const ema_memory ema(p.codebook, p.shape, params, prepared);
        quantize_params search;
        search.prepared = ema.view().prepared;
        const lent_memory memory(
            apart ? std::max(quantize_workspace_bytes(p.shape, search), ema_update_workspace_bytes(p.shape, params))
                  : train_step_workspace_bytes(p.shape, params));
        const auto reset = [&] {
            ema.reset(s.watch.stream());
            p.codes.poison(s.watch.stream());
        };
        const auto launch = [&](int set) {
            if (!apart) {
                train_step(ema.view(), p.x_of(set), p.codes_of(set), discard, params, memory.lend(), s.watch.stream());
                return;
            }
            quantize(p.x_of(set), ema.view().codebook, p.codes_of(set), discard, discard, search, memory.lend(),
                     s.watch.stream());
            ema_update(ema.view(), p.x_of(set), p.codes_of(set), params, memory.lend(), s.watch.stream());
        };
        const auto m = s.watch.time(p.sets, reset, launch);
        reset();
        launch(0);
        s.watch.wait();
        const sum_oracle<X> oracle(p);
        s.out.write(state, r, m, train_step_work(p.shape, sizeof(X), oracle.touched(params)),
                    oracle.judge(ema.view(), params, judged.oracle().judge(p.codes.data())));
    });
}

template <class X>
void add_shape(fixture& s, const cuvq::shape& shape, const char* type) {
    if (s.settings.peers) {
        add_floors<X>(s, shape, type);
        add_peers<X>(s, shape, type);
    }
    if (s.settings.wants("quantize")) add_quantize<X>(s, shape, type);
    for (const auto& codes : s.settings.codes) {
        if (s.settings.wants("accumulate")) add_accumulate<X>(s, shape, type, codes);
        if (s.settings.wants("ema_update")) add_ema_update<X>(s, shape, type, codes);
    }
    if (!s.settings.wants("train_step")) return;
    add_train_step<X>(s, shape, type, false, false);
    if constexpr (std::is_same_v<X, float>) {
        add_train_step<X>(s, shape, type, true, false);
        add_train_step<X>(s, shape, type, false, true);
        add_train_step<X>(s, shape, type, true, true);
    }
}

std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string cublas_version() {
    std::string text;
    for (const auto part : {MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL}) {
        int value = 0;
        CUVQ_BENCH_CHECK_CUBLAS(cublasGetProperty(part, &value));
        text += (text.empty() ? "" : ".") + std::to_string(value);
    }
    return text;
}

}  // namespace

std::string no_gpu() {
    int devices = 0;
    const cudaError_t code = cudaGetDeviceCount(&devices);
    cudaGetLastError();
    if (code != cudaSuccess) return cudaGetErrorString(code);
    return devices > 0 ? "" : "no device";
}

std::shared_ptr<void> register_gpu(const options& o, report& r) {
    const auto shared = std::make_shared<fixture>(o, r);
    fixture& s = *shared;
    int runtime = 0, driver = 0;
    CUVQ_CHECK_CUDA(cudaRuntimeGetVersion(&runtime));
    CUVQ_CHECK_CUDA(cudaDriverGetVersion(&driver));
    benchmark::AddCustomContext("device", s.card.name);
    benchmark::AddCustomContext("compute_capability",
                                std::to_string(s.card.major) + "." + std::to_string(s.card.minor));
    benchmark::AddCustomContext("inputs", o.cold ? "rotated" : "rotated where larger than L2");
    benchmark::AddCustomContext("multiprocessors", std::to_string(s.card.multiProcessorCount));
    benchmark::AddCustomContext("l2_bytes", std::to_string(s.card.l2CacheSize));
    benchmark::AddCustomContext("cuda_runtime", version_text(runtime));
    benchmark::AddCustomContext("cuda_driver", version_text(driver));
    benchmark::AddCustomContext("cublas", cublas_version());

    add_ceilings(s);
    for (const auto& shape : o.shapes)
        for (const auto& type : o.types) {
            if (type == "float") add_shape<float>(s, shape, "float");
            if (type == "half") add_shape<__half>(s, shape, "half");
            if (type == "bfloat16") add_shape<__nv_bfloat16>(s, shape, "bfloat16");
        }
    return shared;
}

}  // namespace cuvq::bench
