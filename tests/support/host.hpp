// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Host memory for tests: matrices that own their rows, views of them, and comparison bit by bit.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuvq/views.hpp>

namespace cuvq::test {

/// A contiguous matrix that owns its elements.
template <class T>
struct matrix {
    std::int64_t rows = 0, columns = 0;
    std::vector<T> data;

    matrix() = default;
    matrix(std::int64_t n, std::int64_t d, float value = 0)
        : rows(n), columns(d), data(static_cast<std::size_t>(n * d), static_cast<T>(value)) {}
    matrix(std::initializer_list<std::initializer_list<float>> values)
        : rows(static_cast<std::int64_t>(values.size())), columns(static_cast<std::int64_t>(values.begin()->size())) {
        for (const auto& row : values)
            for (const float v : row) data.push_back(static_cast<T>(v));
    }
    /// Element (i, d) is at(i, d).
    template <class At>
    static matrix generate(std::int64_t n, std::int64_t d, At at) {
        matrix m(n, d);
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t j = 0; j < d; ++j) m(i, j) = static_cast<T>(static_cast<float>(at(i, j)));
        return m;
    }

    T& operator()(std::int64_t i, std::int64_t d) { return data[static_cast<std::size_t>(i * columns + d)]; }
    float at(std::int64_t i, std::int64_t d) const {
        return static_cast<float>(data[static_cast<std::size_t>(i * columns + d)]);
    }
    std::vector<float> row(std::int64_t i) const {
        std::vector<float> values;
        for (std::int64_t d = 0; d < columns; ++d) values.push_back(at(i, d));
        return values;
    }
    matrix_view<T> view() { return matrix_view<T>(data.data(), rows, columns); }
    matrix_view<const T> view() const { return matrix_view<const T>(data.data(), rows, columns); }
};

template <class T>
vector_view<T> view(std::vector<T>& v) {
    return vector_view<T>(v.data(), static_cast<std::int64_t>(v.size()));
}
template <class T>
vector_view<const T> view(const std::vector<T>& v) {
    return vector_view<const T>(v.data(), static_cast<std::int64_t>(v.size()));
}

/// A view of rows that lie `stride` elements apart.
template <class T>
using strided_view =
    cuda::std::mdspan<T, cuda::std::extents<std::int64_t, dynamic_extent, dynamic_extent>, cuda::std::layout_stride>;

template <class T>
strided_view<T> strided(T* data, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                        std::int64_t last_stride = 1) {
    using extents = typename strided_view<T>::extents_type;
    return strided_view<T>(data, typename strided_view<T>::mapping_type(
                                     extents(rows, columns), cuda::std::array<std::int64_t, 2>{stride, last_stride}));
}

/// The rows of a matrix inside a wider buffer of marks; the first row starts one element off any wide alignment.
template <class T>
class padded_matrix {
public:
    padded_matrix(const matrix<T>& m, std::int64_t stride)
        : rows_(m.rows),
          columns_(m.columns),
          stride_(stride),
          buffer_(static_cast<std::size_t>(m.rows * stride + 2), static_cast<T>(mark)) {
        for (std::int64_t i = 0; i < rows_; ++i)
            for (std::int64_t d = 0; d < columns_; ++d) element(i, d) = static_cast<T>(m.at(i, d));
    }

    strided_view<T> view() { return strided(buffer_.data() + 1, rows_, columns_, stride_); }
    matrix<T> contiguous() const {
        return matrix<T>::generate(rows_, columns_, [&](auto i, auto d) {
            return static_cast<float>(buffer_[static_cast<std::size_t>(1 + i * stride_ + d)]);
        });
    }
    bool padding_untouched() const {
        for (std::int64_t e = 0; e < static_cast<std::int64_t>(buffer_.size()); ++e) {
            const std::int64_t i = (e - 1) / stride_, d = (e - 1) % stride_;
            const bool padding = e == 0 || i >= rows_ || d >= columns_;
            if (padding && static_cast<float>(buffer_[static_cast<std::size_t>(e)]) != mark) return false;
        }
        return true;
    }

private:
    static constexpr float mark = -77;
    T& element(std::int64_t i, std::int64_t d) { return buffer_[static_cast<std::size_t>(1 + i * stride_ + d)]; }

    std::int64_t rows_, columns_, stride_;
    std::vector<T> buffer_;
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
template <class T>
bool same_bits(const matrix<T>& a, const matrix<T>& b) {
    return a.rows == b.rows && a.columns == b.columns && same_bits(a.data, b.data);
}

/// What the std::invalid_argument of a call says, or "(no error)".
template <class Call>
std::string refusal(Call call) {
    try {
        call();
    } catch (const std::invalid_argument& error) {
        return error.what();
    }
    return "(no error)";
}

}  // namespace cuvq::test
