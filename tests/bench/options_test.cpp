// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The command line of cuvq_bench.
#include "bench/options.hpp"

#include <sstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace cuvq::bench {
namespace {

options parsed(const std::vector<std::string>& flags) {
    std::vector<char*> arguments{const_cast<char*>("cuvq_bench")};
    for (const auto& flag : flags) arguments.push_back(const_cast<char*>(flag.data()));
    return parse(static_cast<int>(arguments.size()), arguments.data());
}

/// The line that a stranger reads.
std::string refusal(const std::string& flag) {
    try {
        parsed({flag});
    } catch (const usage_error& e) {
        return e.what();
    }
    return "(taken)";
}

std::vector<std::string> texts(const std::vector<cuvq::shape>& shapes) {
    std::vector<std::string> all;
    for (const auto& s : shapes) all.push_back(text(s));
    return all;
}

using strings = std::vector<std::string>;

TEST(BenchOptions, WithoutFlagsTheSmallShapesInFloat) {
    const options o = parsed({});
    EXPECT_EQ(texts(o.shapes),
              (strings{"256x512x64", "1024x512x64", "1024x1024x128", "4096x512x64", "4096x1024x128", "8192x512x64"}));
    EXPECT_EQ(o.types, strings{"float"});
    EXPECT_EQ(o.data, data_kind::normal);
    EXPECT_TRUE(o.peers);
}

TEST(BenchOptions, ShapesAddUpAndComeOnce) {
    EXPECT_EQ(texts(parsed({"--shape=7,5,3"}).shapes), strings{"7x5x3"});
    EXPECT_EQ(texts(parsed({"--shape=7,5,3", "--shape=8,5,3", "--shape=7,5,3"}).shapes), (strings{"7x5x3", "8x5x3"}));
    const options o = parsed({"--shape=1024,1024,128", "--shapes=small,scaling,small"});
    EXPECT_EQ(o.shapes.size(), 6u + 16u - 2u);  // two of the small ones are on the scaling chart too
    EXPECT_EQ(text(o.shapes[0]), "1024x1024x128");
}

TEST(BenchOptions, AWordGivenTwiceCountsOnce) {
    EXPECT_EQ(parsed({"--cases=train_step,quantize,train_step"}).cases, (strings{"train_step", "quantize"}));
    EXPECT_EQ(parsed({"--types=float,float"}).types, strings{"float"});
    EXPECT_EQ(parsed({"--codes=one,zipf,one,one"}).codes, (strings{"one", "zipf"}));
}

TEST(BenchOptions, ABadShapeGetsOneLine) {
    const std::string wants = "; wants N,K,D: whole numbers from 1, K below 2^31, N*D and K*D at most 2^40";
    for (const std::string shape : {"1,2", "1,2,3,4", "0,1,1", "1,-1,1", "1,1,x", "1e3,2,3", " 1,2,3", "1,2147483648,1",
                                    "99999999999999999999,1,1", "1099511627776,1,2", "1,1099511,1099511627776"})
        EXPECT_EQ(refusal("--shape=" + shape), "--shape: got '" + shape + "'" + wants);
    EXPECT_EQ(refusal("--shape="), "--shape: wants a value, as in --shape=...");
    EXPECT_EQ(refusal("--shape=1099511627776,1,1"), "(taken)");
}

TEST(BenchOptions, OtherMistakes) {
    EXPECT_EQ(refusal("--shapes=small,huge"), "--shapes: got 'huge'; wants small, models, large, scaling");
    EXPECT_EQ(refusal("--cases=encode"), "--cases: got 'encode'; wants quantize, accumulate, ema_update, train_step");
    EXPECT_EQ(refusal("--types=double"), "--types: got 'double'; wants float, half, bfloat16");
    EXPECT_EQ(refusal("--codes=one,"), "--codes: got ''; wants uniform, zipf, one");
    EXPECT_EQ(refusal("--data=normal,hard"), "--data: got 'normal,hard'; wants normal or hard, one of them");
    EXPECT_EQ(refusal("--data=soft"), "--data: got 'soft'; wants normal or hard, one of them");
    for (const std::string seconds : {"0", "-1", "nan", "1x", "61"})
        EXPECT_EQ(refusal("--time=" + seconds), "--time: got '" + seconds + "'; wants seconds, above 0 and at most 60");
    EXPECT_EQ(refusal("--budget=-3"), "--budget: got '-3'; wants seconds, above 0 and at most 1000000");
    EXPECT_EQ(refusal("--hot"), "unknown argument '--hot'; see --help");
    EXPECT_EQ(refusal("64,40,8"), "unknown argument '64,40,8'; see --help");
}

TEST(BenchOptions, ValuesArrive) {
    const std::vector<std::string> flags{
        "--data=hard", "--no-peers", "--cold", "--time=0.5", "--budget=12", "--benchmark_filter=cuvq", "--v=1"};
    const options o = parsed(flags);
    EXPECT_EQ(o.data, data_kind::hard);
    EXPECT_FALSE(o.peers);
    EXPECT_TRUE(o.cold);
    EXPECT_EQ(o.seconds, 0.5);
    EXPECT_EQ(o.budget, 12);
    ASSERT_EQ(o.google.size(), 3u);
    EXPECT_STREQ(o.google[1], "--benchmark_filter=cuvq");
    EXPECT_STREQ(o.google[2], "--v=1");
    EXPECT_TRUE(parsed({"--help", "--nonsense"}).help);
}

TEST(BenchOptions, HelpFitsAnEightyColumnTerminalAndNamesEveryFlag) {
    const std::string help = help_text();
    std::istringstream lines(help);
    for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 80u) << line;
    for (const char* flag : {"--shapes=", "--shape=", "--cases=", "--types=", "--codes=", "--data=", "--no-peers",
                             "--time=", "--cold", "--budget=", "--benchmark_"})
        EXPECT_NE(help.find(flag), std::string::npos) << flag;
}

}  // namespace
}  // namespace cuvq::bench
