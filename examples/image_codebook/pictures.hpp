// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What the example shows of its result: the codebook as a picture, two pictures side by side, and how far apart they
// are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "patches.hpp"
#include "png.hpp"

namespace image_codebook {

inline constexpr std::uint8_t background = 32;

/// The patches of a codebook [K x side side 3] as a near-square grid with gaps, most used first.
/// @param uses [K] how many patches of the picture have each code.
inline image codebook_sheet(const std::vector<float>& codebook, const std::vector<std::int64_t>& uses,
                            std::int64_t side) {
    const std::int64_t codes = static_cast<std::int64_t>(uses.size()), dimensions = side * side * 3;
    std::vector<std::int64_t> order(uses.size());
    std::iota(order.begin(), order.end(), std::int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return uses[a] > uses[b]; });

    const std::int64_t across = static_cast<std::int64_t>(std::ceil(std::sqrt(static_cast<double>(codes))));
    const std::int64_t down = (codes + across - 1) / across;
    // Whole magnification, for pixels that stay square, to a sheet of about 600 pixels.
    const std::int64_t zoom = std::clamp<std::int64_t>(600 / (across * side), 1, 32);
    const std::int64_t gap = std::max<std::int64_t>(1, zoom * side / 12), cell = zoom * side + gap;
    image sheet(across * cell + gap, down * cell + gap, background);
    for (std::int64_t place = 0; place < codes; ++place) {
        const float* patch = codebook.data() + order[place] * dimensions;
        const std::int64_t left = place % across * cell + gap, top = place / across * cell + gap;
        for (std::int64_t y = 0; y < zoom * side; ++y)
            for (std::int64_t x = 0; x < zoom * side; ++x)
                for (int c = 0; c < 3; ++c)
                    sheet.pixel(left + x, top + y)[c] = to_byte(patch[(y / zoom * side + x / zoom) * 3 + c]);
    }
    return sheet;
}

/// Two pictures of one size, left and right.
inline image side_by_side(const image& left, const image& right) {
    const std::int64_t gap = 8;
    image both(left.width + gap + right.width, left.height, background);
    for (std::int64_t y = 0; y < left.height; ++y) {
        std::copy_n(left.pixel(0, y), left.width * 3, both.pixel(0, y));
        std::copy_n(right.pixel(0, y), right.width * 3, both.pixel(left.width + gap, y));
    }
    return both;
}

/// Peak signal-to-noise ratio in dB of two pictures of one size, over all pixels and channels; infinite where they
/// are equal.
inline double psnr(const image& a, const image& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.rgb.size(); ++i) {
        const double difference = static_cast<double>(a.rgb[i]) - b.rgb[i];
        sum += difference * difference;
    }
    if (sum == 0) return std::numeric_limits<double>::infinity();
    return 10 * std::log10(255.0 * 255.0 * static_cast<double>(a.rgb.size()) / sum);
}

}  // namespace image_codebook
