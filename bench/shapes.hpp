// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The named shapes of the benchmark. This table is their only place: results.py reads it from here, so keep one shape
// to a line.
#pragma once

#include <string>

#include <cuvq/workspace.hpp>

namespace cuvq::bench {

struct named_shape {
    const char* set;
    const char* name;  ///< the model that has it, or ""
    cuvq::shape shape;
};

inline constexpr named_shape named_shapes[] = {
    {"small", "", {256, 512, 64}},
    {"small", "", {1024, 512, 64}},
    {"small", "", {1024, 1024, 128}},
    {"small", "", {4096, 512, 64}},
    {"small", "", {4096, 1024, 128}},
    {"small", "", {8192, 512, 64}},

    {"models", "EnCodec", {4800, 1024, 128}},
    {"models", "Mimi, 1 frame", {1, 2048, 256}},
    {"models", "Mimi, 8 frames", {8, 2048, 256}},
    {"models", "Mimi, 64 frames", {64, 2048, 256}},
    {"models", "Mimi, 2048 frames", {2048, 2048, 256}},
    {"models", "VQGAN", {32768, 16384, 256}},
    {"models", "LlamaGen", {33000, 16384, 8}},
    {"models", "DAC", {2400, 1024, 8}},
    {"models", "Jukebox", {49152, 2048, 64}},
    {"models", "ImageGPT", {1048576, 512, 3}},
    {"models", "RecTokens", {1024, 256, 32}},

    {"large", "", {32768, 1024, 128}},
    {"large", "", {65536, 1024, 128}},
    {"large", "", {65536, 8192, 256}},
    {"large", "", {1048576, 1024, 128}},
    {"large", "", {1048576, 256, 8}},
    {"large", "", {262144, 16384, 8}},
    {"large", "", {1048576, 16384, 64}},

    // Over N, over K, over D.
    {"scaling", "", {1024, 1024, 128}},
    {"scaling", "", {4096, 1024, 128}},
    {"scaling", "", {16384, 1024, 128}},
    {"scaling", "", {65536, 1024, 128}},
    {"scaling", "", {262144, 1024, 128}},
    {"scaling", "", {1048576, 1024, 128}},
    {"scaling", "", {65536, 256, 128}},
    {"scaling", "", {65536, 4096, 128}},
    {"scaling", "", {65536, 16384, 128}},
    {"scaling", "", {65536, 65536, 128}},
    {"scaling", "", {65536, 1024, 8}},
    {"scaling", "", {65536, 1024, 16}},
    {"scaling", "", {65536, 1024, 32}},
    {"scaling", "", {65536, 1024, 64}},
    {"scaling", "", {65536, 1024, 256}},
    {"scaling", "", {65536, 1024, 512}},
};

/// As rows and flags of the benchmark name a shape: "65536x1024x128".
inline std::string text(const cuvq::shape& s) {
    return std::to_string(s.vectors) + "x" + std::to_string(s.codes) + "x" + std::to_string(s.dimensions);
}

inline bool same(const cuvq::shape& a, const cuvq::shape& b) {
    return a.vectors == b.vectors && a.codes == b.codes && a.dimensions == b.dimensions;
}

}  // namespace cuvq::bench
