// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// How a bad argument is reported: one line that names the function, the argument, what it got and what it wants.
#pragma once

#include <stdexcept>
#include <string>

namespace cuvq::detail {

/// The text of every std::invalid_argument that cuvq throws.
inline std::string argument_text(const char* function, const char* argument, const std::string& got,
                                 const std::string& wants) {
    return std::string("cuvq::") + function + ": " + argument + ": got " + got + "; wants " + wants;
}

[[noreturn]] inline void bad_argument(const char* function, const char* argument, const std::string& got,
                                      const std::string& wants) {
    throw std::invalid_argument(argument_text(function, argument, got, wants));
}

}  // namespace cuvq::detail
