// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What is written may not overlap what is read or written elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include <cuvq/error.hpp>
#include <cuvq/views.hpp>

namespace cuvq::detail {

struct memory {
    const char* name;
    std::uintptr_t begin = 0;
    std::int64_t rows = 0, row_bytes = 0, stride_bytes = 0;

    memory(const char* n, const void* p, std::int64_t bytes)
        : name(n),
          begin(reinterpret_cast<std::uintptr_t>(p)),
          rows(p && bytes ? 1 : 0),
          row_bytes(bytes),
          stride_bytes(bytes) {}
    template <class T>
    memory(const char* n, const matrix_ref<T>& m)
        : name(n),
          begin(reinterpret_cast<std::uintptr_t>(m.data)),
          rows(m.data && m.columns ? m.rows : 0),
          row_bytes(m.columns * static_cast<std::int64_t>(sizeof(T))),
          stride_bytes(m.stride * static_cast<std::int64_t>(sizeof(T))) {}
    template <class T>
    memory(const char* n, const vector_ref<T>& v) : memory(n, v.data, v.size * static_cast<std::int64_t>(sizeof(T))) {}
    template <class Void>
    memory(const char* n, const basic_codes_ref<Void>& c) : memory(n, c.data, c.size * c.bytes()) {}

    std::uintptr_t end() const { return begin + static_cast<std::uintptr_t>((rows - 1) * stride_bytes + row_bytes); }
};

inline bool overlap(const memory& a, const memory& b) {
    if (a.rows == 0 || b.rows == 0 || a.end() <= b.begin || b.end() <= a.begin) return false;
    // Column blocks of one wider matrix interleave without touching.
    const std::int64_t stride = a.rows > 1 ? a.stride_bytes : b.stride_bytes;
    const bool same_rows = (a.rows == 1 || a.stride_bytes == stride) && (b.rows == 1 || b.stride_bytes == stride);
    if (!same_rows || stride == 0) return true;
    const std::int64_t distance = static_cast<std::int64_t>(b.begin - a.begin);
    const std::int64_t offset = ((distance % stride) + stride) % stride;
    return offset < a.row_bytes || offset + b.row_bytes > stride;
}

inline void check_disjoint(const char* function, std::initializer_list<memory> written,
                           std::initializer_list<memory> read) {
    for (auto w = written.begin(); w != written.end(); ++w) {
        for (auto other = w + 1; other != written.end(); ++other)
            if (overlap(*w, *other))
                bad_argument(function, w->name, std::string("memory that overlaps ") + other->name,
                             "memory of its own, since it is written");
        for (const memory& r : read)
            if (overlap(*w, r))
                bad_argument(function, w->name, std::string("memory that overlaps ") + r.name,
                             "memory of its own, since it is written");
    }
}

/// The five arrays of a state, then `also`, must lie apart from each other and from `read`.
template <class T>
void check_state_disjoint(const char* function, const state_ref<T>& s, std::initializer_list<memory> also,
                          std::initializer_list<memory> read) {
    const std::initializer_list<memory> state{{"state.codebook", s.codebook},
                                              {"state.embed_sum", s.embed_sum},
                                              {"state.cluster_size", s.cluster_size},
                                              {"state.steps_since_active", s.steps_since_active},
                                              {"state.step", s.step, sizeof(std::int64_t)}};
    check_disjoint(function, state, also);
    check_disjoint(function, state, read);
    check_disjoint(function, also, read);
}

}  // namespace cuvq::detail
