// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The image_codebook example: its parts, the program as its user meets it, and how good its codebook is.
#include <gtest/gtest.h>
#include <png.h>
#include <sys/wait.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include <cuvq/params.hpp>

#include "image_codebook/coder.hpp"
#include "image_codebook/errors.hpp"
#include "image_codebook/options.hpp"
#include "image_codebook/patches.hpp"
#include "image_codebook/path.hpp"
#include "image_codebook/pictures.hpp"
#include "image_codebook/png.hpp"

namespace {

using namespace image_codebook;
namespace fs = std::filesystem;

const std::string photo = std::string(CUVQ_EXAMPLE_DATA_DIR) + "/coffee.png";

/// A directory that goes with its test.
class ImageCodebook : public ::testing::Test {
protected:
    void SetUp() override {
        const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
        directory = fs::temp_directory_path() /
                    ("cuvq_image_codebook_" + std::string(test->name()) + "_" + std::to_string(std::random_device{}()));
        fs::create_directories(directory);
    }
    void TearDown() override { fs::remove_all(directory); }

    std::string file(const std::string& name) const { return (directory / name).string(); }

    fs::path directory;
};

std::string read_file(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void write_file(const std::string& path, const std::string& bytes) {
    std::ofstream out(path, std::ios::binary);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

image noise(std::int64_t width, std::int64_t height, std::uint64_t seed) {
    image picture(width, height);
    std::mt19937_64 random(seed);
    for (std::uint8_t& v : picture.rgb) v = static_cast<std::uint8_t>(random());
    return picture;
}

std::string error_of(const std::string& path) {
    try {
        read_png(path);
    } catch (const user_error& error) {
        return error.what();
    }
    return "no error";
}

// ---- PNG --------------------------------------------------------------------------------------------------------

using ImageCodebookPng = ImageCodebook;

/// Writes a PNG by libpng's full interface, which knows every format. `rows` holds the packed bytes of each row.
struct raw_png {
    png_uint_32 width = 0;
    int depth = 8, type = PNG_COLOR_TYPE_RGB, interlace = PNG_INTERLACE_NONE;
    std::vector<std::vector<png_byte>> rows;
    std::vector<png_color> palette{};
    std::vector<png_byte> palette_alpha{};

    void write(const std::string& path) {
        std::FILE* out = std::fopen(path.c_str(), "wb");
        ASSERT_NE(out, nullptr);
        png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
        png_infop info = png_create_info_struct(png);
        if (setjmp(png_jmpbuf(png))) {
            ADD_FAILURE() << "libpng could not write " << path;
        } else {
            png_init_io(png, out);
            png_set_IHDR(png, info, width, static_cast<png_uint_32>(rows.size()), depth, type, interlace,
                         PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
            if (!palette.empty()) png_set_PLTE(png, info, palette.data(), static_cast<int>(palette.size()));
            if (!palette_alpha.empty())
                png_set_tRNS(png, info, palette_alpha.data(), static_cast<int>(palette_alpha.size()), nullptr);
            std::vector<png_bytep> pointers;
            for (auto& row : rows) pointers.push_back(row.data());
            png_set_rows(png, info, pointers.data());
            png_write_png(png, info, PNG_TRANSFORM_IDENTITY, nullptr);
        }
        png_destroy_write_struct(&png, &info);
        std::fclose(out);
    }
};

using bytes = std::vector<std::uint8_t>;

TEST_F(ImageCodebookPng, WhatIsWrittenIsRead) {
    for (const auto& [width, height] : {std::pair{1, 1}, {17, 5}, {5, 17}, {64, 48}}) {
        const image picture = noise(width, height, 1);
        write_png(file("rgb.png"), picture);
        const image again = read_png(file("rgb.png"));
        EXPECT_EQ(again.width, width);
        EXPECT_EQ(again.height, height);
        EXPECT_EQ(again.rgb, picture.rgb);
    }
}

TEST_F(ImageCodebookPng, ReadsRgbOfEitherDepthAndInterlaced) {
    const image picture = noise(7, 6, 2);
    raw_png eight, sixteen;
    eight.width = sixteen.width = 7;
    sixteen.depth = 16;
    for (int y = 0; y < 6; ++y) {
        eight.rows.emplace_back(picture.pixel(0, y), picture.pixel(0, y) + 21);
        sixteen.rows.emplace_back();
        // v of 255 is 257 v of 65535.
        for (const std::uint8_t v : eight.rows.back()) sixteen.rows.back().insert(sixteen.rows.back().end(), {v, v});
    }
    for (const int interlace : {PNG_INTERLACE_NONE, PNG_INTERLACE_ADAM7}) {
        eight.interlace = sixteen.interlace = interlace;
        eight.write(file("8.png"));
        EXPECT_EQ(read_png(file("8.png")).rgb, picture.rgb);
        sixteen.write(file("16.png"));
        EXPECT_EQ(read_png(file("16.png")).rgb, picture.rgb);
    }
}

TEST_F(ImageCodebookPng, ReadsGreyOfEveryDepth) {
    struct grey {
        int depth;
        std::vector<png_byte> row;
        bytes rgb;
    };
    const std::vector<grey> cases{
        {1, {0b01100000}, {0, 0, 0, 255, 255, 255, 255, 255, 255}},
        {2, {0b00011000}, {0, 0, 0, 85, 85, 85, 170, 170, 170}},
        {4, {0x1F, 0x80}, {17, 17, 17, 255, 255, 255, 136, 136, 136}},
        {8, {3, 128, 254}, {3, 3, 3, 128, 128, 128, 254, 254, 254}},
        {16, {3, 3, 128, 128, 254, 254}, {3, 3, 3, 128, 128, 128, 254, 254, 254}},
    };
    for (const grey& g : cases) {
        raw_png png;
        png.width = 3;
        png.depth = g.depth;
        png.type = PNG_COLOR_TYPE_GRAY;
        png.rows = {g.row};
        png.write(file("grey.png"));
        EXPECT_EQ(read_png(file("grey.png")).rgb, g.rgb) << g.depth << " bits";
    }
}

TEST_F(ImageCodebookPng, ReadsPalettes) {
    raw_png png;
    png.width = 4;
    png.type = PNG_COLOR_TYPE_PALETTE;
    png.palette = {{10, 20, 30}, {200, 100, 0}, {255, 255, 255}, {1, 2, 3}};
    const bytes expected{10, 20, 30, 1, 2, 3, 200, 100, 0, 255, 255, 255};
    png.depth = 8;
    png.rows = {{0, 3, 1, 2}};
    png.write(file("palette8.png"));
    EXPECT_EQ(read_png(file("palette8.png")).rgb, expected);
    png.depth = 2;
    png.rows = {{0b00110110}};
    png.write(file("palette2.png"));
    EXPECT_EQ(read_png(file("palette2.png")).rgb, expected);

    png.palette_alpha = {255, 0};
    png.write(file("transparent.png"));
    EXPECT_EQ(read_png(file("transparent.png")).rgb, (bytes{10, 20, 30, 1, 2, 3, 255, 255, 255, 255, 255, 255}));
}

TEST_F(ImageCodebookPng, LaysAlphaOverWhite) {
    raw_png png;
    png.width = 3;
    png.type = PNG_COLOR_TYPE_RGB_ALPHA;
    png.rows = {{10, 20, 30, 255, 10, 20, 30, 0, 0, 100, 255, 128}};
    png.write(file("rgba.png"));
    const bytes rgb = read_png(file("rgba.png")).rgb;
    EXPECT_EQ(bytes(rgb.begin(), rgb.begin() + 6), (bytes{10, 20, 30, 255, 255, 255}));
    // (128 v + 127 255) / 255, rounded.
    EXPECT_EQ(bytes(rgb.begin() + 6, rgb.end()), (bytes{127, 177, 255}));

    png.width = 2;
    png.type = PNG_COLOR_TYPE_GRAY_ALPHA;
    png.rows = {{77, 255, 77, 0}};
    png.write(file("grey_alpha.png"));
    EXPECT_EQ(read_png(file("grey_alpha.png")).rgb, (bytes{77, 77, 77, 255, 255, 255}));
}

TEST_F(ImageCodebookPng, NamesTheFileItCannotRead) {
    EXPECT_EQ(error_of(file("missing.png")), file("missing.png") + ": No such file or directory");
    EXPECT_EQ(error_of(directory.string()), directory.string() + ": Is a directory");
    const std::string whole = read_file(photo);
    ASSERT_GT(whole.size(), 1000u);
    for (const std::size_t length : {std::size_t{0}, std::size_t{4}}) {
        write_file(file("cut.png"), whole.substr(0, length));
        EXPECT_EQ(error_of(file("cut.png")), file("cut.png") + ": not a PNG file") << length << " bytes";
    }
    for (const std::size_t length : {std::size_t{8}, std::size_t{20}, std::size_t{33}, std::size_t{100},
                                     whole.size() / 2, whole.size() - 200, whole.size() - 12, whole.size() - 1}) {
        write_file(file("cut.png"), whole.substr(0, length));
        EXPECT_EQ(error_of(file("cut.png")).rfind(file("cut.png") + ": broken PNG file (", 0), 0u) << length;
    }
    write_file(file("text.png"), "This is a text of more than eight bytes.\n");
    EXPECT_EQ(error_of(file("text.png")), file("text.png") + ": not a PNG file");
    std::string damaged = whole;
    for (std::size_t i = damaged.size() / 2; i < damaged.size() / 2 + 64; ++i) damaged[i] = static_cast<char>(0xA5);
    write_file(file("damaged.png"), damaged);
    EXPECT_EQ(error_of(file("damaged.png")).rfind(file("damaged.png") + ": broken PNG file (", 0), 0u);
    raw_png wide;
    wide.width = 1000000;
    wide.depth = 1;
    wide.type = PNG_COLOR_TYPE_GRAY;
    wide.rows.assign(300, std::vector<png_byte>(125000));
    wide.write(file("wide.png"));
    EXPECT_EQ(error_of(file("wide.png")), file("wide.png") + ": 1000000 x 300 pixels; wants at most 268435456");
    EXPECT_THROW(write_png(file("missing/a.png"), noise(2, 2, 0)), user_error);
}

// ---- patches ----------------------------------------------------------------------------------------------------

TEST(ImageCodebookPatches, RoundTrip) {
    for (const std::int64_t side : {1, 2, 3, 4, 5, 8})
        for (const auto& [width, height] : {std::pair{8, 8}, {16, 8}, {13, 9}, {9, 13}, {40, 25}}) {
            const image picture = noise(width, height, 3);
            const patch_grid grid(picture, side);
            const std::vector<float> patches = cut(picture, grid);
            EXPECT_EQ(static_cast<std::int64_t>(patches.size()), grid.patches() * grid.dimensions());
            const image again = assemble(patches, grid);
            EXPECT_EQ(again.width, picture.width);
            EXPECT_EQ(again.height, picture.height);
            EXPECT_EQ(again.rgb, picture.rgb) << width << " x " << height << " by " << side;
        }
}

TEST(ImageCodebookPatches, AreRowsFromTheTopLeft) {
    image picture(4, 4);
    for (int y = 0; y < 4; ++y)
        for (int x = 0; x < 4; ++x)
            for (int c = 0; c < 3; ++c) picture.pixel(x, y)[c] = static_cast<std::uint8_t>(100 * c + 10 * y + x);
    const patch_grid grid(picture, 2);
    EXPECT_EQ(grid.patches(), 4);
    EXPECT_EQ(grid.dimensions(), 12);
    const std::vector<float> patches = cut(picture, grid);
    // The patch at the top right.
    const std::vector<int> expected{2, 102, 202, 3, 103, 203, 12, 112, 212, 13, 113, 213};
    for (int d = 0; d < 12; ++d) EXPECT_EQ(patches[12 + d], expected[d] / 255.0f);
}

TEST(ImageCodebookPatches, RepeatTheEdge) {
    image picture(3, 2);
    for (int x = 0; x < 3; ++x)
        for (int y = 0; y < 2; ++y) picture.pixel(x, y)[0] = static_cast<std::uint8_t>(10 * y + x + 1);
    const patch_grid grid(picture, 2);
    EXPECT_EQ(grid.across, 2);
    EXPECT_EQ(grid.down, 1);
    const std::vector<float> patches = cut(picture, grid);
    const std::vector<int> red{3, 3, 13, 13};
    for (int p = 0; p < 4; ++p) EXPECT_EQ(patches[12 + 3 * p], red[p] / 255.0f);
}

TEST(ImageCodebookPatches, WantAPictureOfAtLeastOne) {
    EXPECT_NO_THROW(patch_grid(image(4, 4), 4));
    EXPECT_THROW(patch_grid(image(3, 4), 4), user_error);
    EXPECT_THROW(patch_grid(image(4, 3), 4), user_error);
}

TEST(ImageCodebookPatches, ValuesOutsideTheRangeAreClamped) {
    EXPECT_EQ(to_byte(-0.25f), 0);
    EXPECT_EQ(to_byte(1.5f), 255);
    for (int v = 0; v < 256; ++v) EXPECT_EQ(to_byte(v / 255.0f), v);
}

// ---- pictures ---------------------------------------------------------------------------------------------------

TEST(ImageCodebookPictures, SheetShowsTheMostUsedFirst) {
    // Five codes of one pixel each, so a grid of three columns and two rows with one place left.
    std::vector<float> codebook;
    for (int k = 0; k < 5; ++k)
        for (int c = 0; c < 3; ++c) codebook.push_back(static_cast<float>(50 * k + c) / 255.0f);
    const image sheet = codebook_sheet(codebook, {7, 0, 9, 7, 1}, 1);
    const std::int64_t zoom = 32, gap = 2, cell = zoom + gap;
    ASSERT_EQ(sheet.width, 3 * cell + gap);
    ASSERT_EQ(sheet.height, 2 * cell + gap);
    const std::vector<int> order{2, 0, 3, 4, 1};
    for (int place = 0; place < 5; ++place)
        for (const std::int64_t corner : {std::int64_t{0}, zoom - 1}) {
            const auto* pixel = sheet.pixel(place % 3 * cell + gap + corner, place / 3 * cell + gap + corner);
            for (int c = 0; c < 3; ++c) EXPECT_EQ(pixel[c], 50 * order[place] + c);
        }
    EXPECT_EQ(sheet.pixel(0, 0)[0], background);
    EXPECT_EQ(sheet.pixel(gap + zoom, gap)[0], background);
    EXPECT_EQ(sheet.pixel(2 * cell + gap, cell + gap)[0], background);
}

TEST(ImageCodebookPictures, SheetMagnifiesPixelsAsTheyAre) {
    std::vector<float> codebook(2 * 12);
    for (int d = 0; d < 24; ++d) codebook[d] = static_cast<float>(10 * d) / 255.0f;
    const image sheet = codebook_sheet(codebook, {2, 1}, 2);
    const std::int64_t zoom = 32, gap = 5;
    ASSERT_EQ(sheet.width, 2 * (2 * zoom + gap) + gap);
    for (int y = 0; y < 2; ++y)
        for (int x = 0; x < 2; ++x)
            for (const std::int64_t corner : {std::int64_t{0}, zoom - 1})
                EXPECT_EQ(sheet.pixel(gap + x * zoom + corner, gap + y * zoom + corner)[1], 10 * ((2 * y + x) * 3 + 1));
}

TEST(ImageCodebookPictures, SideBySide) {
    const image left = noise(5, 4, 5), right = noise(5, 4, 6);
    const image both = side_by_side(left, right);
    ASSERT_EQ(both.width, 5 + 8 + 5);
    ASSERT_EQ(both.height, 4);
    for (int y = 0; y < 4; ++y)
        for (int x = 0; x < 5; ++x)
            for (int c = 0; c < 3; ++c) {
                EXPECT_EQ(both.pixel(x, y)[c], left.pixel(x, y)[c]);
                EXPECT_EQ(both.pixel(13 + x, y)[c], right.pixel(x, y)[c]);
            }
}

TEST(ImageCodebookPictures, Psnr) {
    const image a = noise(10, 10, 7);
    image b = a;
    EXPECT_EQ(psnr(a, b), std::numeric_limits<double>::infinity());
    for (std::uint8_t& v : b.rgb) v = static_cast<std::uint8_t>(v < 128 ? v + 5 : v - 5);
    EXPECT_NEAR(psnr(a, b), 20 * std::log10(255.0 / 5.0), 1e-12);
}

// ---- the command line -------------------------------------------------------------------------------------------

options parse_line(std::vector<const char*> arguments) {
    arguments.insert(arguments.begin(), "image_codebook");
    return parse(static_cast<int>(arguments.size()), arguments.data());
}

std::string error_of_line(const std::vector<const char*>& arguments) {
    try {
        parse_line(arguments);
    } catch (const user_error& error) {
        return error.what();
    }
    return "no error";
}

TEST(ImageCodebookOptions, Defaults) {
    const options o = parse_line({"--input", "a.png"});
    EXPECT_EQ(o.input, "a.png");
    EXPECT_EQ(o.codes, 256);
    EXPECT_EQ(o.patch, 4);
    EXPECT_FALSE(o.help);
    // What the help says the defaults are.
    const std::string help = help_text();
    for (const std::string& value :
         {std::to_string(o.codes), std::to_string(o.patch), std::to_string(o.steps), std::to_string(o.batch),
          std::to_string(o.seed), o.output, std::to_string(o.decay).substr(0, 3)})
        EXPECT_NE(help.find("(default: " + value + ")"), std::string::npos) << value;
}

TEST(ImageCodebookOptions, EveryFlag) {
    const options o = parse_line({"-k", "17", "--patch", "8", "--steps=30", "--batch", "512", "--decay", "0.95",
                                  "--seed", "18446744073709551615", "--input=b=c.png", "--output", "out"});
    EXPECT_EQ(o.codes, 17);
    EXPECT_EQ(o.patch, 8);
    EXPECT_EQ(o.steps, 30);
    EXPECT_EQ(o.batch, 512);
    EXPECT_EQ(o.decay, 0.95);
    EXPECT_EQ(o.seed, std::numeric_limits<std::uint64_t>::max());
    EXPECT_EQ(o.input, "b=c.png");
    EXPECT_EQ(o.output, "out");
    EXPECT_EQ(parse_line({"--codes", "5", "--input", "a"}).codes, 5);
    EXPECT_TRUE(parse_line({"--help"}).help);
    EXPECT_TRUE(parse_line({"-h"}).help);
}

TEST(ImageCodebookOptions, Errors) {
    EXPECT_EQ(error_of_line({}), "--input: wants a PNG file; see --help");
    EXPECT_EQ(error_of_line({"--colour", "3"}), "unknown argument '--colour'; see --help");
    EXPECT_EQ(error_of_line({"-x"}), "unknown argument '-x'; see --help");
    EXPECT_EQ(error_of_line({"a.png"}), "unknown argument 'a.png'; see --help");
    EXPECT_EQ(error_of_line({"--input", "a", "--steps"}), "--steps: wants a value");
    EXPECT_EQ(error_of_line({"--input", "--steps", "3"}), "--input: wants a value");
    EXPECT_EQ(error_of_line({"--output="}), "--output: wants a value");
    const std::string whole = "'; wants a whole number from ";
    EXPECT_EQ(error_of_line({"-k", "many"}), "-k: got 'many" + whole + "1 to 1048576");
    EXPECT_EQ(error_of_line({"-k", "0"}), "-k: got '0" + whole + "1 to 1048576");
    EXPECT_EQ(error_of_line({"--codes", "1048577"}), "--codes: got '1048577" + whole + "1 to 1048576");
    EXPECT_EQ(error_of_line({"--patch", "-4"}), "--patch: got '-4" + whole + "1 to 256");
    EXPECT_EQ(error_of_line({"--patch", "4.5"}), "--patch: got '4.5" + whole + "1 to 256");
    EXPECT_EQ(error_of_line({"--steps", "99999999999999999999"}),
              "--steps: got '99999999999999999999" + whole + "1 to 1000000");
    EXPECT_EQ(error_of_line({"--batch", "1e3"}), "--batch: got '1e3" + whole + "1 to 16777216");
    EXPECT_EQ(error_of_line({"--seed", "-1"}), "--seed: got '-1" + whole + "0 to 18446744073709551615");
    for (const char* decay : {"1.5", "-0.1", "nan", "inf", "half", "0.9x", " 0.9"})
        EXPECT_EQ(error_of_line({"--decay", decay}),
                  std::string("--decay: got '") + decay + "'; wants a number from 0 to 1");
}

// ---- the coder --------------------------------------------------------------------------------------------------

TEST(ImageCodebookCoder, ShuffledIsAPermutationOfItsSeed) {
    std::vector<std::int64_t> order = shuffled(1000, 4);
    EXPECT_EQ(order, shuffled(1000, 4));
    EXPECT_NE(order, shuffled(1000, 5));
    EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
    std::sort(order.begin(), order.end());
    for (std::int64_t i = 0; i < 1000; ++i) EXPECT_EQ(order[i], i);
}

TEST(ImageCodebookCoder, CodesComeInTheOrderOfTheVectors) {
    // As many codes as vectors: each vector is a row of the first codebook, and comes back as it was.
    std::vector<float> x(2 * 37);
    std::iota(x.begin(), x.end(), 1.0f);
    coder<cpu_path> all(x, 2, 37, 10, {});
    const auto encoded = all.encode();
    EXPECT_EQ(encoded.stats.commitment_loss, 0);
    EXPECT_EQ(encoded.stats.active_codes, 37);
    EXPECT_EQ(all.decode(encoded.codes), x);
    std::vector<float> rows = all.codebook();
    std::sort(rows.begin(), rows.end());
    EXPECT_EQ(rows, x);
}

TEST(ImageCodebookCoder, BatchesCoverEveryVector) {
    // With one code and decay 0, the codebook after a step is the mean of its batch.
    std::vector<float> x(23);
    std::iota(x.begin(), x.end(), 0.0f);
    cuvq::train_params params;
    params.decay = 0;
    coder<cpu_path> one(x, 1, 1, 5, params);
    // Five batches: of 4, 5, 4, 5 and 5.
    double sum = 0;
    for (std::int64_t b = 0; b < 5; ++b) {
        one.train_step(params);
        sum += one.codebook()[0] * static_cast<double>((b + 1) * 23 / 5 - b * 23 / 5);
    }
    EXPECT_NEAR(sum, 22 * 23 / 2, 1e-3);
    const float last = one.codebook()[0];
    for (int b = 0; b < 5; ++b) one.train_step(params);
    EXPECT_EQ(one.codebook()[0], last);
}

// ---- the program ------------------------------------------------------------------------------------------------

struct outcome {
    int status = -1;
    std::string out, err;
};

using ImageCodebookProgram = ImageCodebook;

outcome run(const fs::path& directory, const std::vector<std::string>& arguments) {
    const std::string out = (directory / "stdout").string(), err = (directory / "stderr").string();
    std::string command = "'" CUVQ_IMAGE_CODEBOOK_BINARY "'";
    for (const std::string& argument : arguments) command += " '" + argument + "'";
    const int status = std::system((command + " >'" + out + "' 2>'" + err + "'").c_str());
    outcome o;
    if (status != -1 && WIFEXITED(status)) o.status = WEXITSTATUS(status);
    o.out = read_file(out);
    o.err = read_file(err);
    return o;
}

TEST_F(ImageCodebookProgram, Help) {
    const outcome o = run(directory, {"--help"});
    EXPECT_EQ(o.status, 0);
    EXPECT_EQ(o.out, help_text());
    EXPECT_EQ(o.err, "");
}

TEST_F(ImageCodebookProgram, ErrorsAreOneLineAndStatus2) {
    const std::string out = file("out");
    write_file(file("text.png"), "This is no picture at all.\n");
    write_file(file("cut.png"), read_file(photo).substr(0, 20000));
    write_file(file("file"), "");
    write_png(file("tiny.png"), noise(3, 3, 8));
    write_png(file("small.png"), noise(16, 16, 9));
    write_png(file("comparison.png"), noise(32, 32, 10));
    const std::vector<std::vector<std::string>> cases{
        {},
        {"--what"},
        {"--input", photo, "--output", out, "-k"},
        {"--input", photo, "--output", out, "-k", "x"},
        {"--input", photo, "--output", out, "-k", "0"},
        {"--input", photo, "--output", out, "--decay", "2"},
        {"--input", file("missing.png"), "--output", out},
        {"--input", directory.string(), "--output", out},
        {"--input", file("text.png"), "--output", out},
        {"--input", file("cut.png"), "--output", out},
        {"--input", file("tiny.png"), "--output", out, "-k", "1"},
        {"--input", file("small.png"), "--output", out, "-k", "17"},
        {"--input", file("small.png"), "-k", "4", "--output", file("file")},
        {"--input", file("small.png"), "-k", "4", "--output", file("file/below")},
        {"--input", file("small.png"), "-k", "4", "--output", "/proc/no/such/place"},
        {"--input", file("small.png"), "-k", "4", "--output", "/proc"},
        {"--input", file("comparison.png"), "-k", "4", "--output", directory.string()},
    };
    for (const auto& arguments : cases) {
        const outcome o = run(directory, arguments);
        std::ostringstream line;
        for (const std::string& argument : arguments) line << argument << ' ';
        EXPECT_EQ(o.status, 2) << line.str();
        EXPECT_EQ(o.out, "") << line.str();
        EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << line.str() << "\n" << o.err;
        EXPECT_EQ(o.err.rfind("image_codebook: ", 0), 0u) << line.str() << "\n" << o.err;
        EXPECT_EQ(o.err.back(), '\n') << line.str();
        EXPECT_FALSE(fs::exists(out)) << line.str();
    }
}

TEST_F(ImageCodebookProgram, OddPicturesAndRepeatedRuns) {
    write_png(file("odd.png"), noise(37, 26, 11));
    const std::vector<std::string> flags{"--input", file("odd.png"), "-k", "10",      "--patch",
                                         "5",       "--steps",       "7",  "--batch", "16"};
    const auto run_to = [&](const std::string& name, const std::vector<std::string>& more = {}) {
        std::vector<std::string> arguments = flags;
        arguments.insert(arguments.end(), more.begin(), more.end());
        arguments.insert(arguments.end(), {"--output", file(name)});
        const outcome o = run(directory, arguments);
        EXPECT_EQ(o.status, 0) << o.err;
        EXPECT_EQ(o.err, "");
    };
    run_to("a");
    run_to("b");
    run_to("nested/c", {"--seed", "1"});
    const image picture = read_png(file("a/reconstruction.png"));
    EXPECT_EQ(picture.width, 37);
    EXPECT_EQ(picture.height, 26);
    for (const char* name : {"reconstruction.png", "codebook.png", "comparison.png"})
        EXPECT_EQ(read_file(file("a/") + name), read_file(file("b/") + name)) << name;
    EXPECT_NE(read_png(file("nested/c/reconstruction.png")).rgb, picture.rgb);
}

// ---- how good the codebook is -----------------------------------------------------------------------------------

/// Lloyd's k-means in float with double means, run to convergence; returns the PSNR of the picture it gives.
struct lloyd {
    static constexpr std::int64_t D = 48, K = 256, lanes = 16;

    const std::vector<float>& x;
    const std::int64_t n = static_cast<std::int64_t>(x.size()) / D;
    std::vector<float> rows = std::vector<float>(K * D);
    std::vector<std::int32_t> codes = std::vector<std::int32_t>(static_cast<std::size_t>(n), -1);
    std::vector<float> distances = std::vector<float>(static_cast<std::size_t>(n));
    int iterations = 0;

    explicit lloyd(const std::vector<float>& patches) : x(patches) {}

    void start_from_random_rows(std::uint64_t seed) {
        const std::vector<std::int64_t> order = shuffled(n, seed);
        for (std::int64_t k = 0; k < K; ++k) std::copy_n(x.begin() + order[k] * D, D, rows.begin() + k * D);
    }

    /// k-means++: each row drawn with probability in proportion to its squared distance from those drawn so far.
    void start_from_spread_rows(std::uint64_t seed) {
        std::mt19937_64 random(seed);
        std::vector<double> nearest(static_cast<std::size_t>(n), std::numeric_limits<double>::infinity());
        std::int64_t pick = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
        for (std::int64_t k = 0; k < K; ++k) {
            std::copy_n(x.begin() + pick * D, D, rows.begin() + k * D);
            double total = 0;
            for (std::int64_t i = 0; i < n; ++i) {
                double sum = 0;
                for (std::int64_t d = 0; d < D; ++d) {
                    const double difference = double{x[i * D + d]} - double{rows[k * D + d]};
                    sum += difference * difference;
                }
                nearest[i] = std::min(nearest[i], sum);
                total += nearest[i];
            }
            double left = total * static_cast<double>(random() >> 11) * 0x1p-53;
            for (pick = 0; pick < n - 1; ++pick)
                if ((left -= nearest[pick]) < 0) break;
        }
    }

    void assign() {
        // Sixteen codes side by side, which is what lets the compiler use the vector units.
        std::vector<float> lanes_of_rows(rows.size());
        for (std::int64_t k = 0; k < K; ++k)
            for (std::int64_t d = 0; d < D; ++d)
                lanes_of_rows[(k / lanes * D + d) * lanes + k % lanes] = rows[k * D + d];
#if defined(_OPENMP)
#pragma omp parallel for schedule(static)
#endif
        for (std::int64_t i = 0; i < n; ++i) {
            distances[i] = std::numeric_limits<float>::infinity();
            for (std::int64_t group = 0; group < K / lanes; ++group) {
                float sum[lanes] = {};
                for (std::int64_t d = 0; d < D; ++d) {
                    const float v = x[i * D + d];
                    const float* c = lanes_of_rows.data() + (group * D + d) * lanes;
                    for (std::int64_t j = 0; j < lanes; ++j) sum[j] += (v - c[j]) * (v - c[j]);
                }
                for (std::int64_t j = 0; j < lanes; ++j)
                    if (sum[j] < distances[i]) {
                        distances[i] = sum[j];
                        codes[i] = static_cast<std::int32_t>(group * lanes + j);
                    }
            }
        }
    }

    /// Means of the clusters; an empty one starts again from the vector that is farthest from its row.
    void update() {
        std::vector<double> sums(K * D), counts(K);
        for (std::int64_t i = 0; i < n; ++i) {
            counts[codes[i]] += 1;
            for (std::int64_t d = 0; d < D; ++d) sums[codes[i] * D + d] += x[i * D + d];
        }
        for (std::int64_t k = 0; k < K; ++k) {
            if (counts[k] > 0) {
                for (std::int64_t d = 0; d < D; ++d) rows[k * D + d] = static_cast<float>(sums[k * D + d] / counts[k]);
            } else {
                const auto farthest = std::max_element(distances.begin(), distances.end());
                *farthest = 0;
                std::copy_n(x.begin() + (farthest - distances.begin()) * D, D, rows.begin() + k * D);
            }
        }
    }

    double run(const image& picture, const patch_grid& grid) {
        bool converged = false;
        for (iterations = 0; !converged && iterations < 1000; ++iterations) {
            const std::vector<std::int32_t> before = codes;
            assign();
            converged = codes == before;
            if (!converged) update();
        }
        EXPECT_TRUE(converged);
        std::vector<float> decoded(x.size());
        for (std::int64_t i = 0; i < n; ++i) std::copy_n(rows.begin() + codes[i] * D, D, decoded.begin() + i * D);
        return psnr(picture, assemble(decoded, grid));
    }
};

TEST_F(ImageCodebookProgram, ComesWithinHalfADecibelOfLloyd) {
    const outcome o = run(directory, {"--input", photo, "--output", file("out")});
    ASSERT_EQ(o.status, 0) << o.err;
    std::fputs(o.out.c_str(), stdout);

    const image picture = read_png(photo);
    const image reconstruction = read_png(file("out/reconstruction.png"));
    ASSERT_EQ(reconstruction.width, picture.width);
    ASSERT_EQ(reconstruction.height, picture.height);
    const double ours = psnr(picture, reconstruction);
    char printed[64];
    std::snprintf(printed, sizeof printed, "\nPSNR            %.2f dB\n", ours);
    EXPECT_NE(o.out.find(printed), std::string::npos) << printed;
    EXPECT_NE(o.out.find("\nbits per pixel  0.500 "), std::string::npos);
    EXPECT_NE(o.out.find("\nperplexity "), std::string::npos);
    EXPECT_EQ(o.out.rfind("using     ", 0), 0u);
    const image comparison = read_png(file("out/comparison.png"));
    EXPECT_EQ(comparison.width, 2 * picture.width + 8);
    const image sheet = read_png(file("out/codebook.png"));
    EXPECT_EQ(sheet.width, sheet.height);

    const patch_grid grid(picture, 4);
    const std::vector<float> patches = cut(picture, grid);
    lloyd random(patches), spread(patches);
    random.start_from_random_rows(1);
    spread.start_from_spread_rows(1);
    const double from_random = random.run(picture, grid), from_spread = spread.run(picture, grid);
    std::printf(
        "PSNR: %.3f dB by image_codebook; %.3f dB by Lloyd from random rows (%d iterations), %.3f dB from "
        "k-means++ (%d)\n",
        ours, from_random, random.iterations, from_spread, spread.iterations);
    EXPECT_GE(ours, std::max(from_random, from_spread) - 0.5);
}

}  // namespace
