// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/error.hpp>

#include <gtest/gtest.h>

#include "support/host.hpp"

namespace cuvq::test {
namespace {

TEST(ErrorTest, TextNamesFunctionArgumentWhatItGotAndWhatItWants) {
    EXPECT_EQ(detail::argument_text("quantize", "x", "3 columns", "4"), "cuvq::quantize: x: got 3 columns; wants 4");
}

TEST(ErrorTest, BadArgumentThrowsInvalidArgumentWithThatText) {
    EXPECT_EQ(refusal([] { detail::bad_argument("lookup", "codes", "a null pointer", "5 elements"); }),
              "cuvq::lookup: codes: got a null pointer; wants 5 elements");
}

}  // namespace
}  // namespace cuvq::test
