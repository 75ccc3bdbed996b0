// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include "use_everything.hpp"

double from_other_unit() { return use_everything(); }
