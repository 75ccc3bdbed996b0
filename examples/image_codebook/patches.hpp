// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// A picture as a matrix of patches, one a row, and back.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "errors.hpp"
#include "png.hpp"

namespace image_codebook {

/// How a picture is cut: square patches, row by row from the top left. Those at the right and bottom edges may reach
/// past the picture; the edge pixels are repeated there, so that all of the picture is covered.
struct patch_grid {
    std::int64_t width, height;  ///< of the picture
    std::int64_t side;           ///< of a patch
    std::int64_t across, down;   ///< patches

    patch_grid(const image& picture, std::int64_t patch_side)
        : width(picture.width),
          height(picture.height),
          side(patch_side),
          across((width + side - 1) / side),
          down((height + side - 1) / side) {
        if (width < side || height < side)
            throw user_error("the picture has " + std::to_string(width) + " x " + std::to_string(height) +
                             " pixels; --patch " + std::to_string(side) + " wants at least " + std::to_string(side) +
                             " x " + std::to_string(side));
    }

    std::int64_t patches() const { return across * down; }       ///< N
    std::int64_t dimensions() const { return side * side * 3; }  ///< D
};

/// [N x D] the patches, with 0 to 255 scaled to 0 to 1.
inline std::vector<float> cut(const image& picture, const patch_grid& grid) {
    std::vector<float> patches;
    patches.reserve(static_cast<std::size_t>(grid.patches() * grid.dimensions()));
    for (std::int64_t row = 0; row < grid.down; ++row)
        for (std::int64_t column = 0; column < grid.across; ++column)
            for (std::int64_t y = 0; y < grid.side; ++y)
                for (std::int64_t x = 0; x < grid.side; ++x) {
                    const std::uint8_t* pixel = picture.pixel(std::min(column * grid.side + x, grid.width - 1),
                                                              std::min(row * grid.side + y, grid.height - 1));
                    for (int c = 0; c < 3; ++c) patches.push_back(pixel[c] / 255.0f);
                }
    return patches;
}

inline std::uint8_t to_byte(float value) {
    return static_cast<std::uint8_t>(std::lround(std::clamp(value, 0.0f, 1.0f) * 255.0f));
}

/// The picture of N patches; undoes `cut`.
inline image assemble(const std::vector<float>& patches, const patch_grid& grid) {
    image picture(grid.width, grid.height);
    for (std::int64_t y = 0; y < grid.height; ++y)
        for (std::int64_t x = 0; x < grid.width; ++x) {
            const std::int64_t patch = y / grid.side * grid.across + x / grid.side;
            const std::int64_t within = (y % grid.side * grid.side + x % grid.side) * 3;
            for (int c = 0; c < 3; ++c)
                picture.pixel(x, y)[c] = to_byte(patches[patch * grid.dimensions() + within + c]);
        }
    return picture;
}

}  // namespace image_codebook
