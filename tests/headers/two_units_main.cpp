// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include "use_everything.hpp"

double from_other_unit();

int main() {
    const double here = use_everything(), there = from_other_unit();
    std::printf("this unit: %g, the other: %g\n", here, there);
    return here == there ? 0 : 1;
}
