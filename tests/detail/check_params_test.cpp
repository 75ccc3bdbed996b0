// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// Checks that no test of a whole call on the CPU reaches: of what only GPU functions take, and of each by itself. Texts
// of workspaces and shapes are in workspace_test.
#include <cuvq/detail/check_params.hpp>

#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "support/host.hpp"

namespace cuvq::test {
namespace {

struct PreparedErrors : testing::Test {
    alignas(256) unsigned char block[512];
    static std::string refused(void* data, std::size_t bytes) {
        return refusal([&] { detail::check_prepared("quantize", "params.prepared", {data, bytes}, 300); });
    }
};

TEST_F(PreparedErrors, NoneAndOneThatIsLargeEnoughAreTaken) {
    EXPECT_EQ(refused(nullptr, 0), "(no error)");
    EXPECT_EQ(refused(block, 300), "(no error)");
    EXPECT_EQ(refused(block, 512), "(no error)");
}

TEST_F(PreparedErrors, NullMisalignedOrTooSmall) {
    EXPECT_EQ(refused(nullptr, 512),
              "cuvq::quantize: params.prepared: got a null pointer; wants a device pointer, or none at all");
    EXPECT_EQ(refused(block + 128, 300),
              "cuvq::quantize: params.prepared: got a misaligned pointer; wants 256-byte alignment");
    EXPECT_EQ(refused(block, 299), "cuvq::quantize: params.prepared: got 299 bytes; wants at least 300");
}

TEST(InitialErrors, NoSuchEnumerator) {
    const auto refused = [](initial_statistics initial) {
        return refusal([&] { detail::check_initial("f", initial); });
    };
    EXPECT_EQ(refused(initial_statistics::zeros), "(no error)");
    EXPECT_EQ(refused(initial_statistics::one_per_code), "(no error)");
    EXPECT_EQ(refused(static_cast<initial_statistics>(99)),
              "cuvq::f: initial: got no enumerator of initial_statistics; wants one of its enumerators");
}

TEST(OptionalInputs, AreReferencesOrNull) {
    EXPECT_EQ(detail::check_weights("f", {}, 4).data, nullptr);
    const std::vector<float> weights(4);
    EXPECT_EQ(detail::check_weights("f", view(weights), 4).data, weights.data());
    const std::vector<std::int64_t> indices(5);
    ema_params params;
    EXPECT_EQ(detail::check_ema_params("f", params, 5, false).data, nullptr);
    params.replacement_indices = view(indices);
    EXPECT_EQ(detail::check_ema_params("f", params, 5, false).data, indices.data());
}

}  // namespace
}  // namespace cuvq::test
