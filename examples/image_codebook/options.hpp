// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>

#include "errors.hpp"

namespace image_codebook {

struct options {
    std::int64_t codes = 256;
    std::int64_t patch = 4;
    std::int64_t steps = 300;
    std::int64_t batch = 1024;
    double decay = 0.8;
    std::uint64_t seed = 0;
    std::string input;
    std::string output = "image_codebook_output";
    bool help = false;
};

inline const char* help_text() {
    return R"(Trains a codebook of picture patches and shows the picture through it.

usage: image_codebook --input FILE [flags]

  --input FILE    the picture, a PNG
  --output DIR    where reconstruction.png, codebook.png and comparison.png go;
                  made if need be (default: image_codebook_output)
  -k, --codes K   patches in the codebook, 1 to 1048576 (default: 256)
  --patch P       side of a patch in pixels, 1 to 256 (default: 4)
  --steps S       train steps, 1 to 1000000 (default: 300)
  --batch B       patches of a step, at most, 1 to 16777216 (default: 1024)
  --decay G       of the moving averages, 0 to 1 (default: 0.8)
  --seed S        of the first codebook, the batches and the restarts of unused
                  codes, 0 to 2^64 - 1 (default: 0)
  -h, --help      this text
)";
}

namespace detail {

template <class Int>
Int parse_integer(const std::string& flag, const std::string& value, Int least, Int most) {
    Int number{};
    const char* end = value.data() + value.size();
    const auto [rest, error] = std::from_chars(value.data(), end, number);
    const bool is_integer = rest == end && error != std::errc::invalid_argument;
    if (!is_integer || error == std::errc::result_out_of_range || number < least || number > most)
        throw user_error(flag + ": got '" + value + "'; wants a whole number from " + std::to_string(least) + " to " +
                         std::to_string(most));
    return number;
}

inline double parse_share(const std::string& flag, const std::string& value) {
    char* rest = nullptr;
    const double number = std::strtod(value.c_str(), &rest);
    const bool is_number = !value.empty() && !std::isspace(static_cast<unsigned char>(value[0])) && *rest == '\0';
    if (!is_number || !(number >= 0 && number <= 1))
        throw user_error(flag + ": got '" + value + "'; wants a number from 0 to 1");
    return number;
}

}  // namespace detail

/// Reads the command line, given as `main` gets it. `--flag value` and `--flag=value` both do.
inline options parse(int count, const char* const* arguments) {
    options o;
    for (int i = 1; i < count; ++i) {
        std::string flag = arguments[i];
        if (flag == "-h" || flag == "--help") {
            o.help = true;
            return o;
        }
        std::string value;
        const std::size_t equals = flag.find('=');
        const bool attached = flag.rfind("--", 0) == 0 && equals != std::string::npos;
        if (attached) {
            value = flag.substr(equals + 1);
            flag.resize(equals);
        }
        const bool known = flag == "-k" || flag == "--codes" || flag == "--patch" || flag == "--steps" ||
                           flag == "--batch" || flag == "--decay" || flag == "--seed" || flag == "--input" ||
                           flag == "--output";
        if (!known) throw user_error("unknown argument '" + flag + "'; see --help");
        if (!attached) {
            if (i + 1 < count) value = arguments[++i];
            // A flag in a value's place is a forgotten value, not a file of that name.
            if (value.rfind("--", 0) == 0) value.clear();
        }
        if (value.empty()) throw user_error(flag + ": wants a value");

        if (flag == "-k" || flag == "--codes") o.codes = detail::parse_integer<std::int64_t>(flag, value, 1, 1 << 20);
        if (flag == "--patch") o.patch = detail::parse_integer<std::int64_t>(flag, value, 1, 256);
        if (flag == "--steps") o.steps = detail::parse_integer<std::int64_t>(flag, value, 1, 1000000);
        if (flag == "--batch") o.batch = detail::parse_integer<std::int64_t>(flag, value, 1, 1 << 24);
        if (flag == "--decay") o.decay = detail::parse_share(flag, value);
        if (flag == "--seed")
            o.seed = detail::parse_integer<std::uint64_t>(flag, value, 0, std::numeric_limits<std::uint64_t>::max());
        if (flag == "--input") o.input = value;
        if (flag == "--output") o.output = value;
    }
    if (o.input.empty()) throw user_error("--input: wants a PNG file; see --help");
    return o;
}

}  // namespace image_codebook
