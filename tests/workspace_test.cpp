// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#include <cuvq/workspace.hpp>

#include <string>
#include <type_traits>

#include <gtest/gtest.h>

#include <cuvq/detail/check_params.hpp>

#include "support/host.hpp"

namespace cuvq::test {
namespace {

static_assert(std::is_trivially_copyable_v<workspace>);
static_assert(std::is_trivially_copyable_v<shape>);
static_assert(workspace::alignment == 256);

struct WorkspaceTest : testing::Test {
    alignas(256) unsigned char block[512];
    static std::string refused(void* data, std::size_t bytes, std::size_t needed) {
        return refusal([&] { detail::check_workspace("quantize", {data, bytes}, needed); });
    }
};

TEST_F(WorkspaceTest, IsEmptyByDefault) {
    EXPECT_EQ(workspace{}.data, nullptr);
    EXPECT_EQ(workspace{}.bytes, 0u);
}

TEST_F(WorkspaceTest, OneOfTheNeededSizeOrLargerIsTaken) {
    EXPECT_EQ(refused(block, 512, 512), "(no error)");
    EXPECT_EQ(refused(block, 512, 100), "(no error)");
    EXPECT_EQ(refused(block, 0, 0), "(no error)");
}

TEST_F(WorkspaceTest, NullPointerIsRefused) {
    EXPECT_EQ(refused(nullptr, 512, 512),
              "cuvq::quantize: workspace: got a null pointer; wants a device pointer, or workspace{}");
}

TEST_F(WorkspaceTest, MisalignedPointerIsRefused) {
    EXPECT_EQ(refused(block + 128, 384, 384),
              "cuvq::quantize: workspace: got a misaligned pointer; wants 256-byte alignment");
}

TEST_F(WorkspaceTest, TooFewBytesAreRefused) {
    EXPECT_EQ(refused(block, 511, 512), "cuvq::quantize: workspace: got 511 bytes; wants at least 512");
}

std::string refused_shape(const shape& s) {
    return refusal([&] { detail::check_shape("quantize_workspace_bytes", s); });
}

TEST(ShapeTest, NoVectorsAreTaken) { EXPECT_EQ(refused_shape({0, 1, 1}), "(no error)"); }

TEST(ShapeTest, CountsOutOfRangeAreRefused) {
    EXPECT_EQ(refused_shape({-1, 1, 1}), "cuvq::quantize_workspace_bytes: shape.vectors: got -1; wants at least 0");
    EXPECT_EQ(refused_shape({1, 0, 1}), "cuvq::quantize_workspace_bytes: shape.codes: got 0; wants at least 1");
    EXPECT_EQ(refused_shape({1, 1, 0}), "cuvq::quantize_workspace_bytes: shape.dimensions: got 0; wants at least 1");
    EXPECT_EQ(
        refused_shape({4, std::int64_t{1} << 40, std::int64_t{1} << 30}),
        "cuvq::quantize_workspace_bytes: shape: got 1099511627776 x 1073741824 elements of the codebook; wants at "
        "most 2^52");
    EXPECT_EQ(refused_shape({std::int64_t{1} << 53, 1, 1}),
              "cuvq::quantize_workspace_bytes: shape: got 9007199254740992 x 1 elements of x; wants at most 2^52");
    EXPECT_EQ(refused_shape({}), "cuvq::quantize_workspace_bytes: shape.codes: got 0; wants at least 1");
}

}  // namespace
}  // namespace cuvq::test
