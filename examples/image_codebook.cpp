// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// A picture as a few hundred patches: cuts a PNG into patches, trains a codebook of them by mini-batches, and writes
// the picture as the codebook knows it. One source for both paths: compiled by nvcc it uses the GPU where there is
// one, compiled by any C++17 compiler it runs on the CPU.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <new>
#include <string>
#include <vector>

#include <cuvq/params.hpp>

#include "image_codebook/coder.hpp"
#include "image_codebook/errors.hpp"
#include "image_codebook/options.hpp"
#include "image_codebook/patches.hpp"
#include "image_codebook/path.hpp"
#include "image_codebook/pictures.hpp"
#include "image_codebook/png.hpp"

namespace {

using namespace image_codebook;

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct outputs {
    std::string reconstruction, codebook, comparison;
};

/// Names the output files in a directory that is there and can be written, which is known before the time is spent.
outputs prepare_outputs(const options& o) {
    namespace fs = std::filesystem;
    const fs::path directory = o.output;
    std::error_code error;
    fs::create_directories(directory, error);
    if (error) throw user_error("--output: cannot make the directory " + o.output + ": " + error.message());
    const fs::path probe = directory / ".image_codebook.tmp";
    errno = 0;
    if (!std::ofstream(probe))
        throw user_error("--output: cannot write into " + o.output + ": " + std::strerror(errno));
    fs::remove(probe, error);

    const outputs files{(directory / "reconstruction.png").string(), (directory / "codebook.png").string(),
                        (directory / "comparison.png").string()};
    for (const std::string& file : {files.reconstruction, files.codebook, files.comparison})
        if (fs::equivalent(file, o.input, error))
            throw user_error("--output: " + file + " is the input, which would be overwritten");
    return files;
}

/// RecTokens' update, with its choices for an encoder that keeps moving made anew for patches that stand still.
cuvq::train_params training(const options& o, std::int64_t step) {
    cuvq::train_params params = cuvq::ema_params::rectokens();
    params.decay = o.decay;
    params.seed = o.seed;
    // Less than a pass over a picture like the example's, so that the code of a single patch may become another's.
    params.restart_after_steps = 12;
    // A code that starts again is one raw patch, and needs some steps to become the mean of many.
    if (step >= o.steps - o.steps / 5) params.dead_codes = cuvq::dead_code_rule::none;
    return params;
}

/// All train steps, with a line of progress every twentieth of the way. Batches differ, so a line gives the means, and
/// the sum of the restarts, of the steps since the line before.
template <class Path>
void train(coder<Path>& coder, const options& o) {
    std::printf("%8s  %9s  %10s  %9s  %8s\n", "step", "loss", "perplexity", "restarted", "ms/step");
    const std::int64_t lines = 20;
    double loss = 0, perplexity = 0;
    std::int64_t restarted = 0, steps = 0;
    auto start = std::chrono::steady_clock::now();
    for (std::int64_t step = 0; step < o.steps; ++step) {
        const cuvq::step_stats stats = coder.train_step(training(o, step));
        loss += stats.commitment_loss;
        perplexity += stats.perplexity;
        restarted += stats.restarted_codes;
        ++steps;
        if ((step + 1) * lines / o.steps == step * lines / o.steps) continue;
        const double each = 1.0 / static_cast<double>(steps);
        std::printf("%8lld  %9.6f  %10.1f  %9lld  %8.3f\n", static_cast<long long>(step + 1), loss * each,
                    perplexity * each, static_cast<long long>(restarted), 1e3 * seconds_since(start) * each);
        std::fflush(stdout);
        loss = perplexity = 0;
        restarted = steps = 0;
        start = std::chrono::steady_clock::now();
    }
}

template <class Path>
void run(const options& o) {
    const auto start = std::chrono::steady_clock::now();
    const image picture = read_png(o.input);
    const patch_grid grid(picture, o.patch);
    if (o.codes > grid.patches())
        throw user_error("--codes: got " + std::to_string(o.codes) + "; wants at most the picture's " +
                         std::to_string(grid.patches()) + " patches");
    const outputs files = prepare_outputs(o);

    std::printf("using     %s\n", Path::name().c_str());
    std::printf("picture   %s, %lld x %lld pixels, %lld patches of %lld x %lld x 3 (D = %lld)\n", o.input.c_str(),
                static_cast<long long>(grid.width), static_cast<long long>(grid.height),
                static_cast<long long>(grid.patches()), static_cast<long long>(grid.side),
                static_cast<long long>(grid.side), static_cast<long long>(grid.dimensions()));
    std::printf("training  K = %lld, %lld steps of up to %lld patches, decay %g, seed %llu\n\n",
                static_cast<long long>(o.codes), static_cast<long long>(o.steps),
                static_cast<long long>(std::min(o.batch, grid.patches())), o.decay,
                static_cast<unsigned long long>(o.seed));

    coder<Path> coder(cut(picture, grid), grid.dimensions(), o.codes, o.batch, training(o, 0));
    train(coder, o);

    const auto encoded = coder.encode();
    const image reconstruction = assemble(coder.decode(encoded.codes), grid);
    std::vector<std::int64_t> uses(static_cast<std::size_t>(o.codes));
    for (const std::int32_t code : encoded.codes) ++uses[code];
    write_png(files.reconstruction, reconstruction);
    write_png(files.codebook, codebook_sheet(coder.codebook(), uses, grid.side));
    write_png(files.comparison, side_by_side(picture, reconstruction));

    const double patches_per_pixel =
        static_cast<double>(grid.patches()) / static_cast<double>(grid.width * grid.height);
    std::printf("\nPSNR            %.2f dB\n", psnr(picture, reconstruction));
    std::printf("bits per pixel  %.3f (%.3f with ideal entropy coding), without the codebook\n",
                patches_per_pixel * std::log2(static_cast<double>(o.codes)),
                patches_per_pixel * std::log2(encoded.stats.perplexity));
    std::printf("perplexity      %.1f (%lld of %lld codes in use)\n", encoded.stats.perplexity,
                static_cast<long long>(encoded.stats.active_codes), static_cast<long long>(o.codes));
    std::printf("total time      %.1f s\n\n", seconds_since(start));
    for (const std::string& file : {files.reconstruction, files.codebook, files.comparison})
        std::printf("wrote %s\n", file.c_str());
}

}  // namespace

int main(int count, char** arguments) {
    try {
        const options o = parse(count, arguments);
        if (o.help) {
            std::fputs(help_text(), stdout);
            return 0;
        }
        with_best_path([&](auto path) { run<decltype(path)>(o); });
        return 0;
    } catch (const user_error& error) {
        std::fprintf(stderr, "image_codebook: %s\n", error.what());
        return 2;
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr, "image_codebook: not enough memory for this picture and codebook\n");
        return 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "image_codebook: %s\n", error.what());
        return 1;
    }
}
