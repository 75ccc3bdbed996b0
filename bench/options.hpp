// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The command line of cuvq_bench.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuvq/views.hpp>

#include "data.hpp"
#include "shapes.hpp"

namespace cuvq::bench {

/// A command line that cannot be understood; the text says which part, in one line.
struct usage_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct options {
    std::vector<cuvq::shape> shapes;
    std::vector<std::string> cases{"quantize", "accumulate", "ema_update", "train_step"};
    std::vector<std::string> types{"float"};
    std::vector<std::string> codes{"uniform", "zipf", "one"};
    data_kind data = data_kind::normal;
    bool peers = true;
    bool cold = false;
    double seconds = 0.1;
    double budget = 1e6;
    bool help = false;
    std::vector<char*> google;  ///< what is left for Google Benchmark; the program's name first

    bool wants(const std::string& name) const { return std::find(cases.begin(), cases.end(), name) != cases.end(); }
};

inline const char* help_text() {
    return R"(Times cuvq, and what one would use without it, on the same data in one run.

usage: cuvq_bench [flags] [Google Benchmark's flags]

What is timed
  --shapes=SET[,SET]   named: small, models, large, scaling (default: small);
                       their sizes: add --benchmark_list_tests
  --shape=N,K,D        N vectors, K codes, D dimensions; may be given several
                       times, with or without --shapes
  --cases=CASE[,CASE]  quantize, accumulate, ema_update, train_step
                       (default: all)
  --types=TYPE[,TYPE]  of the vectors: float, half, bfloat16 (default: float)
  --codes=KIND[,KIND]  the codes that accumulate and ema_update are given:
                       uniform, zipf, one (all on one code) (default: all)
  --data=KIND          normal (default): vectors and codebook are standard
                       normal; hard: all offset by 100, a tenth of the codebook
                       duplicated, the vectors near codebook rows
  --no-peers           cuvq only (--peers, the default: others too)

How
  --time=SECONDS       spent on the samples of a row (default: 0.1)
  --cold               rotate over input sets always, see below
  --budget=SECONDS     rows that would start later are skipped (default: none)
  --benchmark_...      --benchmark_filter=REGEX, --benchmark_list_tests=true,
                       --benchmark_out=FILE.json, ... as in any Google Benchmark

A row is CASE/WHO/TYPE/NxKxD/VARIANT[/hard]. Its time is the median of samples
between two CUDA events; a sample is a captured graph of as many launches as
take about 1 ms (at most 100). Vectors that fit in the card's L2 cache are timed
there, as they are right after the layer that made them; larger ones (or all,
with --cold) rotate over enough sets that none is still in L2: four times its
size together, which may be a single one. Memory is allocated, and norms and
copies that a peer needs of the codebook are made, outside the timed part. Data
are random. On Hopper, the first kernel of a call may be launched while the call
before it ends (it waits before it touches any memory), so that in a graph of
many calls part of the launches is hidden.

VARIANT: of quantize, codes (nothing else is written; the codebook is prepared
in every call), prepared (it was before), fast (the same with accuracy::fast),
all (as codes; quantized rows and distances too) or fast_all (the same with
accuracy::fast); of train_step in float, also prepared (the state carries a
prepared codebook, which each step keeps fresh), apart and prepared_apart (the
same as two calls, quantize and ema_update); of accumulate and ema_update, how
the given codes are distributed. ema_update and train_step follow RecTokens'
rules: a code restarts from a row of the batch after 20 steps without one. Their
state is reset before each sample, with the counts of idle steps spread evenly,
so that each step restarts a twentieth of the idle codes.

Peers: cublas_*_argmin: the matrix of scores by cuBLAS or cuBLASLt (its first
four choices are tried), then a kernel for the argmin, a warp or a block to the
row, in pieces that fit in L2 or whole: the fastest combination that a short
look finds, which the row's label names (and says so where a second was not
enough to look at all); cublas_fp16_product: a product of that size alone, by
cuBLAS, in half precision, written out: a floor for anyone who materializes
scores; cublas_one_hot: sums as a product with a one-hot matrix;
cub_sort_reduce: sums by sorting and DeviceReduce::ReduceByKey, what CUB has by
itself (a sort followed by a kernel written for it is faster: see flash_kmeans
in peers.py); floor/copy_x and floor/read_x: one copy (by the driver or by a
kernel, whichever is faster), one read of the vectors.
ceiling/...: the card's copy and its half-precision product of 8192x8192x8192 in
this run.

Counters
  us, us_min     median and fastest sample, microseconds per call; before its
                 samples the card rests as long as they take
  sets           of vectors, over which the calls rotate; 1: always the same
  TFLOP/s        2NKD per call (of accumulate and ema_update: none)
  GB/s           of the fewest bytes the call must move (an update leaves all of
                 a code alone but its idle steps, unless it has vectors or
                 restarts)
  of_ceiling     share of the run's copy and product ceilings; above 1 where L2
                 serves, or where the job reads only
  vs_PEER        time divided by PEER's: below 1 is faster than PEER
  wrong          rows with a wrong code, quantized row or distance, of up to
                 4096 (CPU: 256) put beside a float64 brute force
  count_error, sum_error, codebook_error
                 relative errors (Frobenius norm) against float64 of counts
                 (after an update: of cluster sizes and idle steps), of sums,
                 and of the codebook after an update

What is wrong is also named in the row's label. A peer that needs more than
40 GB is skipped and says so. Without a GPU the rows time cuvq::reference on the
CPU, by the wall clock: the median of a few calls, each from the same state.
Exit code: 0; 1 if a row of cuvq is wrong or failed; 2 for a command line that
makes no sense, or a --benchmark_filter that matches nothing.
)";
}

namespace detail {

inline std::vector<std::string> split(const std::string& list) {
    std::vector<std::string> parts{""};
    for (const char c : list) {
        if (c == ',')
            parts.emplace_back();
        else
            parts.back() += c;
    }
    return parts;
}

/// The comma-separated words of `value`, each of which must be among `known`; one that comes twice counts once.
inline std::vector<std::string> words(const std::string& flag, const std::string& value,
                                      const std::vector<std::string>& known) {
    std::string wants;
    for (const auto& k : known) wants += (wants.empty() ? "" : ", ") + k;
    std::vector<std::string> found;
    for (const auto& p : split(value)) {
        if (std::find(known.begin(), known.end(), p) == known.end())
            throw usage_error(flag + ": got '" + p + "'; wants " + wants);
        if (std::find(found.begin(), found.end(), p) == found.end()) found.push_back(p);
    }
    return found;
}

inline cuvq::shape shape_of(const std::string& flag, const std::string& value) {
    constexpr std::int64_t most = std::int64_t{1} << 40;
    const auto parts = split(value);
    std::int64_t sizes[3] = {};
    bool good = parts.size() == 3;
    for (std::size_t i = 0; good && i < 3; ++i) {
        const char* end = parts[i].data() + parts[i].size();
        const auto [rest, error] = std::from_chars(parts[i].data(), end, sizes[i]);
        good = error == std::errc() && rest == end && sizes[i] >= 1 && sizes[i] <= most;
    }
    good = good && sizes[0] <= most / sizes[2] && sizes[1] <= most / sizes[2] && sizes[1] <= 0x7FFFFFFF;
    if (!good)
        throw usage_error(flag + ": got '" + value +
                          "'; wants N,K,D: whole numbers from 1, K below 2^31, N*D and K*D at most 2^40");
    return {sizes[0], sizes[1], sizes[2]};
}

inline double seconds_of(const std::string& flag, const std::string& value, double most) {
    char* rest = nullptr;
    const double seconds = std::strtod(value.c_str(), &rest);
    if (*rest != '\0' || !(seconds > 0 && seconds <= most))
        throw usage_error(flag + ": got '" + value + "'; wants seconds, above 0 and at most " +
                          std::to_string(std::lround(most)));
    return seconds;
}

inline void add_shape(std::vector<cuvq::shape>& shapes, const cuvq::shape& s) {
    for (const auto& known : shapes)
        if (same(known, s)) return;
    shapes.push_back(s);
}

}  // namespace detail

/// Reads the command line, given as `main` gets it. Flags that begin with --benchmark_ or --v= are Google Benchmark's.
inline options parse(int count, char** arguments) {
    const std::string all[] = {"--shapes", "--shape", "--cases", "--types", "--codes", "--data", "--time", "--budget"};
    options o;
    o.google.push_back(arguments[0]);
    for (int i = 1; i < count; ++i) {
        const std::string argument = arguments[i];
        if (argument == "-h" || argument == "--help") {
            o.help = true;
            return o;
        }
        if (argument.rfind("--benchmark_", 0) == 0 || argument.rfind("--v=", 0) == 0) {
            o.google.push_back(arguments[i]);
            continue;
        }
        if (argument == "--peers" || argument == "--no-peers") {
            o.peers = argument == "--peers";
            continue;
        }
        if (argument == "--cold") {
            o.cold = true;
            continue;
        }
        const std::size_t equals = argument.find('=');
        const std::string flag = argument.substr(0, equals);
        if (std::find(std::begin(all), std::end(all), flag) == std::end(all))
            throw usage_error("unknown argument '" + argument + "'; see --help");
        if (equals == std::string::npos || equals + 1 == argument.size())
            throw usage_error(flag + ": wants a value, as in " + flag + "=...");
        const std::string value = argument.substr(equals + 1);

        if (flag == "--shape") detail::add_shape(o.shapes, detail::shape_of(flag, value));
        if (flag == "--shapes")
            for (const auto& set : detail::words(flag, value, {"small", "models", "large", "scaling"}))
                for (const auto& s : named_shapes)
                    if (s.set == set) detail::add_shape(o.shapes, s.shape);
        if (flag == "--cases") o.cases = detail::words(flag, value, options().cases);
        if (flag == "--types") {
            o.types = detail::words(flag, value, {"float", "half", "bfloat16"});
            if (!CUVQ_HAS_HALF && o.types != options().types)
                throw usage_error("--types: this build has float only; half and bfloat16 need CUDA's headers");
        }
        if (flag == "--codes") o.codes = detail::words(flag, value, options().codes);
        if (flag == "--data") {
            if (value != "normal" && value != "hard")
                throw usage_error(flag + ": got '" + value + "'; wants normal or hard, one of them");
            o.data = value == "hard" ? data_kind::hard : data_kind::normal;
        }
        if (flag == "--time") o.seconds = detail::seconds_of(flag, value, 60);
        if (flag == "--budget") o.budget = detail::seconds_of(flag, value, 1e6);
    }
    if (o.shapes.empty())
        for (const auto& s : named_shapes)
            if (s.set == std::string("small")) detail::add_shape(o.shapes, s.shape);
    return o;
}

}  // namespace cuvq::bench
