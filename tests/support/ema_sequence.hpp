// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Reads the files that tests/scripts/make_ema_sequences.py writes to tests/data/.
#pragma once

#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/host.hpp"
#include "support/state.hpp"

namespace cuvq::test {

/// A file of lines "name value value ...", read in order. The shape line comes first.
class sequence_file {
public:
    explicit sequence_file(const std::string& name)
        : path_(std::string(CUVQ_TEST_DATA_DIR) + "/" + name), stream_(path_) {
        std::string comment;
        std::getline(stream_, comment);
        expect("shape");
        stream_ >> codes >> dimensions >> rows >> steps;
        check();
    }
    std::vector<double> read(const std::string& name, std::int64_t count) {
        expect(name);
        std::vector<double> values(static_cast<std::size_t>(count));
        for (double& v : values) stream_ >> v;
        check();
        return values;
    }
    template <class T>
    std::vector<T> read_as(const std::string& name, std::int64_t count) {
        std::vector<T> values;
        for (const double v : read(name, count)) values.push_back(static_cast<T>(v));
        return values;
    }

    std::int64_t codes = 0, dimensions = 0, rows = 0, steps = 0;

private:
    void expect(const std::string& name) {
        std::string word;
        stream_ >> word;
        if (word != name) throw std::runtime_error(path_ + ": expected " + name + ", found '" + word + "'");
    }
    void check() {
        if (!stream_) throw std::runtime_error(path_ + ": not what make_ema_sequences.py writes");
    }

    std::string path_;
    std::ifstream stream_;
};

/// A codebook state in float64.
struct exact_state {
    std::vector<double> codebook, embed_sum, cluster_size;
    std::vector<std::int32_t> steps_since_active;

    static exact_state read(sequence_file& file) {
        const std::int64_t k = file.codes, size = k * file.dimensions;
        exact_state state;
        state.codebook = file.read("codebook", size);
        state.embed_sum = file.read("embed_sum", size);
        state.cluster_size = file.read("cluster_size", k);
        state.steps_since_active = file.read_as<std::int32_t>("steps", k);
        return state;
    }
    /// Rounded to float.
    host_state<> rounded(std::int64_t dimensions, std::int64_t step) const {
        const auto k = static_cast<std::int64_t>(cluster_size.size());
        const auto matrix_of = [&](const std::vector<double>& values) {
            return matrix<float>::generate(
                k, dimensions, [&](auto i, auto d) { return values[static_cast<std::size_t>(i * dimensions + d)]; });
        };
        return {matrix_of(codebook),
                matrix_of(embed_sum),
                {cluster_size.begin(), cluster_size.end()},
                steps_since_active,
                step};
    }
};

/// One train step: what goes in, and what must come out.
struct sequence_step {
    matrix<float> x;
    std::vector<float> weights;
    std::vector<std::int64_t> replacement_indices;
    std::vector<std::int32_t> codes;
    exact_state after;
    double commitment_loss, perplexity;
    std::int64_t active_codes, restarted_codes;
};

struct ema_sequence {
    std::int64_t dimensions = 0;
    exact_state start;
    std::vector<sequence_step> steps;

    explicit ema_sequence(const std::string& name) {
        sequence_file inputs("ema_inputs.txt"), outputs("ema_" + name + ".txt");
        const std::int64_t n = inputs.rows, k = inputs.codes;
        dimensions = inputs.dimensions;
        start = exact_state::read(outputs);
        for (std::int64_t t = 0; t < inputs.steps; ++t) {
            sequence_step s;
            s.x = matrix<float>(n, dimensions);
            s.x.data = inputs.read_as<float>("x", n * dimensions);
            s.weights = inputs.read_as<float>("weights", n);
            s.replacement_indices = inputs.read_as<std::int64_t>("replacement_indices", k);
            s.codes = outputs.read_as<std::int32_t>("codes", n);
            s.after = exact_state::read(outputs);
            const auto stats = outputs.read("stats", 4);
            s.commitment_loss = stats[0];
            s.perplexity = stats[1];
            s.active_codes = static_cast<std::int64_t>(stats[2]);
            s.restarted_codes = static_cast<std::int64_t>(stats[3]);
            steps.push_back(s);
        }
    }
};

}  // namespace cuvq::test
