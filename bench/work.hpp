// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// How much work a row of the benchmark stands for: the least that any implementation of it must do.
#pragma once

#include <cstdint>
#include <vector>

#include <cuvq/params.hpp>
#include <cuvq/workspace.hpp>

#include "expected.hpp"

namespace cuvq::bench {

struct work {
    double flops = 0;
    double bytes = 0;
};

inline double vector_bytes(const cuvq::shape& s, int element) {
    return static_cast<double>(s.vectors) * static_cast<double>(s.dimensions) * element;
}
inline double codebook_bytes(const cuvq::shape& s) {
    return static_cast<double>(s.codes) * static_cast<double>(s.dimensions) * 4;
}
inline work product_work(const cuvq::shape& s, double bytes) {
    return {2.0 * static_cast<double>(s.vectors) * static_cast<double>(s.codes) * static_cast<double>(s.dimensions),
            bytes};
}
/// Reads vectors and codebook; writes int32 codes and, on request, quantized vectors and distances.
inline work quantize_work(const cuvq::shape& s, int element, bool outputs) {
    const double n = static_cast<double>(s.vectors);
    return product_work(s, vector_bytes(s, element) * (outputs ? 2 : 1) + codebook_bytes(s) + n * (outputs ? 8 : 4));
}
/// Reads vectors and codes; writes counts and sums, of codes without vectors too.
inline work accumulate_work(const cuvq::shape& s, int element) {
    return {0, vector_bytes(s, element) + static_cast<double>(s.vectors + s.codes) * 4 + codebook_bytes(s)};
}

/// Codes of which an update by RecTokens' rules writes more than the idle steps.
struct touched_codes {
    std::int64_t active = 0;     ///< with vectors
    std::int64_t restarted = 0;  ///< without any, for too long
};

/// @param counts  of the batch's vectors of each code; the state is the one that every update starts from
inline touched_codes touched(const std::vector<double>& counts, const ema_params& p) {
    touched_codes t;
    for (std::size_t k = 0; k < counts.size(); ++k) {
        const bool active = counts[k] > 0;
        t.active += active;
        t.restarted += !active && idle_steps_at_start(static_cast<std::int64_t>(k), p) + 1 >= p.restart_after_steps;
    }
    return t;
}

/// Reads vectors and codes. Of active codes it reads and writes cluster size and sum, and writes idle steps and the
/// codebook's row; of others it reads and writes idle steps, and if they restart, it writes the rest.
inline work ema_update_work(const cuvq::shape& s, int element, const touched_codes& t) {
    const double row = static_cast<double>(s.dimensions) * 4, active = static_cast<double>(t.active),
                 idle = static_cast<double>(s.codes - t.active), restarted = static_cast<double>(t.restarted);
    return {0, vector_bytes(s, element) + static_cast<double>(s.vectors) * 4 + active * (3 * row + 12) + idle * 8 +
                   restarted * (2 * row + 4)};
}
/// As both, with the vectors read once.
inline work train_step_work(const cuvq::shape& s, int element, const touched_codes& t) {
    return product_work(s, ema_update_work(s, element, t).bytes + codebook_bytes(s));
}

}  // namespace cuvq::bench
