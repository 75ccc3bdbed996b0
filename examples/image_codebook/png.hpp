// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// PNG files to 8-bit RGB and back.
#pragma once

#include <png.h>

#include <cerrno>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "errors.hpp"

namespace image_codebook {

/// An 8-bit RGB picture: channel c of the pixel in column x, row y lies at rgb[(y * width + x) * 3 + c].
struct image {
    std::int64_t width = 0;
    std::int64_t height = 0;
    std::vector<std::uint8_t> rgb;

    image() = default;
    image(std::int64_t w, std::int64_t h, std::uint8_t grey = 0)
        : width(w), height(h), rgb(static_cast<std::size_t>(w * h * 3), grey) {}

    std::uint8_t* pixel(std::int64_t x, std::int64_t y) { return rgb.data() + (y * width + x) * 3; }
    const std::uint8_t* pixel(std::int64_t x, std::int64_t y) const { return rgb.data() + (y * width + x) * 3; }
};

namespace detail {

/// One PNG being read. libpng reports an error by longjmp, which runs no destructor: `begin` and `finish`, which it
/// leaves in that way, hold nothing that would need one.
class png_reader {
public:
    explicit png_reader(const std::string& path) : file_(std::fopen(path.c_str(), "rb")) {
        if (!file_) std::snprintf(error_, sizeof error_, "%s", std::strerror(errno));
    }
    ~png_reader() {
        if (png_) png_destroy_read_struct(&png_, &info_, nullptr);
        if (file_) std::fclose(file_);
    }
    png_reader(const png_reader&) = delete;
    png_reader& operator=(const png_reader&) = delete;

    /// Up to the pixels, which will be RGBA of 8 bits each whatever the file holds. False: see `error`.
    bool begin() {
        if (!file_) return false;
        png_byte signature[8];
        const std::size_t got = std::fread(signature, 1, sizeof signature, file_);
        if (got < sizeof signature || png_sig_cmp(signature, 0, sizeof signature) != 0) {
            std::snprintf(error_, sizeof error_, "%s", std::ferror(file_) ? std::strerror(errno) : "not a PNG file");
            return false;
        }
        png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, on_error, on_warning);
        info_ = png_ ? png_create_info_struct(png_) : nullptr;
        if (!info_) throw std::bad_alloc();
        if (setjmp(png_jmpbuf(png_))) return false;
        png_init_io(png_, file_);
        png_set_sig_bytes(png_, sizeof signature);
        png_read_info(png_, info_);
        png_set_expand(png_);
        png_set_scale_16(png_);
        png_set_gray_to_rgb(png_);
        png_set_add_alpha(png_, 255, PNG_FILLER_AFTER);
        png_set_interlace_handling(png_);
        png_read_update_info(png_, info_);
        return true;
    }
    std::int64_t width() const { return png_get_image_width(png_, info_); }
    std::int64_t height() const { return png_get_image_height(png_, info_); }

    /// All rows, and the end of the file, so that a file cut short anywhere is noticed.
    bool finish(png_bytepp rows) {
        if (setjmp(png_jmpbuf(png_))) return false;
        png_read_image(png_, rows);
        png_read_end(png_, nullptr);
        return true;
    }

    const char* error() const { return error_; }

private:
    static void on_error(png_structp png, png_const_charp text) {
        auto* self = static_cast<png_reader*>(png_get_error_ptr(png));
        std::snprintf(self->error_, sizeof self->error_, "broken PNG file (%s)", text);
        png_longjmp(png, 1);
    }
    // What libpng can live with, the user can.
    static void on_warning(png_structp, png_const_charp) {}

    std::FILE* file_;
    png_structp png_ = nullptr;
    png_infop info_ = nullptr;
    char error_[160] = "";
};

}  // namespace detail

/// Reads a PNG of any colour type and bit depth; what is transparent is laid over white.
// Not by libpng's simplified interface: it garbles interlaced 16-bit files (libpng issue 853).
inline image read_png(const std::string& path) {
    constexpr std::int64_t most_pixels = std::int64_t{1} << 28;
    detail::png_reader reader(path);
    if (!reader.begin()) throw user_error(path + ": " + reader.error());
    const std::int64_t width = reader.width(), height = reader.height();
    if (width > most_pixels / height)
        throw user_error(path + ": " + std::to_string(width) + " x " + std::to_string(height) +
                         " pixels; wants at most " + std::to_string(most_pixels));
    std::vector<png_byte> rgba(static_cast<std::size_t>(width * height * 4));
    std::vector<png_bytep> rows;
    for (std::int64_t y = 0; y < height; ++y) rows.push_back(rgba.data() + y * width * 4);
    if (!reader.finish(rows.data())) throw user_error(path + ": " + reader.error());

    image picture(width, height);
    for (std::int64_t i = 0; i < width * height; ++i) {
        const int alpha = rgba[i * 4 + 3];
        for (int c = 0; c < 3; ++c)
            picture.rgb[i * 3 + c] =
                static_cast<std::uint8_t>((alpha * rgba[i * 4 + c] + (255 - alpha) * 255 + 127) / 255);
    }
    return picture;
}

inline void write_png(const std::string& path, const image& picture) {
    png_image png{};
    png.version = PNG_IMAGE_VERSION;
    png.width = static_cast<png_uint_32>(picture.width);
    png.height = static_cast<png_uint_32>(picture.height);
    png.format = PNG_FORMAT_RGB;
    if (!png_image_write_to_file(&png, path.c_str(), 0, picture.rgb.data(), 0, nullptr))
        throw user_error(path + ": " + png.message);
}

}  // namespace image_codebook
