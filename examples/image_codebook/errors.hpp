// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>

namespace image_codebook {

/// A flag or file that the user has to mend. Its text is one line; the program prints it and exits with status 2.
struct user_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace image_codebook
