// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// cuvq_bench: reads the command line, registers the rows, runs them. `cuvq_bench --help` says what it does.

#include <cstdio>
#include <exception>
#include <memory>
#include <string>

#include <benchmark/benchmark.h>

#include <cuvq/version.hpp>

#include "backends.hpp"
#include "options.hpp"
#include "rows.hpp"

namespace {

namespace bench = cuvq::bench;

/// @return what must stay alive while the rows run.
std::shared_ptr<void> register_rows(const bench::options& options, bench::report& report) {
#if defined(CUVQ_BENCH_GPU)
    const std::string reason = bench::no_gpu();
    if (reason.empty()) return bench::register_gpu(options, report);
#else
    const std::string reason = "built without a CUDA compiler";
#endif
    std::fprintf(stderr, "cuvq_bench: no GPU (%s): timing cuvq::reference on the CPU, without peers\n", reason.c_str());
    benchmark::AddCustomContext("device", "CPU");
    bench::register_cpu(options, report);
    return nullptr;
}

int run(int count, char** arguments) {
    bench::options options = bench::parse(count, arguments);
    if (options.help) {
        std::fputs(bench::help_text(), stdout);
        return 0;
    }
    int left = static_cast<int>(options.google.size());
    benchmark::Initialize(&left, options.google.data());
    if (left > 1) throw bench::usage_error(std::string("unknown argument '") + options.google[1] + "'; see --help");

    benchmark::AddCustomContext("cuvq", std::to_string(CUVQ_VERSION_MAJOR) + "." + std::to_string(CUVQ_VERSION_MINOR) +
                                            "." + std::to_string(CUVQ_VERSION_PATCH));
    benchmark::AddCustomContext("data", options.data == bench::data_kind::hard ? "hard" : "normal");
    bench::report report(options.budget);
    const auto alive = register_rows(options, report);
    if (benchmark::RunSpecifiedBenchmarks() == 0)
        throw bench::usage_error(
            "--benchmark_filter matches no row of these shapes, cases and types; --benchmark_list_tests lists them");
    benchmark::Shutdown();
    if (!report.good()) std::fputs("cuvq_bench: rows of cuvq are wrong or failed, see above\n", stderr);
    return report.good() ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
    try {
        return run(count, arguments);
    } catch (const bench::usage_error& e) {
        std::fprintf(stderr, "cuvq_bench: %s\n", e.what());
        return 2;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "cuvq_bench: %s\n", e.what());
        return 1;
    }
}
