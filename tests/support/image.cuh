// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The image of a codebook that the tensor-core searches read, for tests that launch them by themselves.
#pragma once

#include <cstdint>

#include <cuvq/dispatch/quantize.cuh>
#include <cuvq/prepare.cuh>

#include "support/device.cuh"

namespace cuvq::test {

/// Whether the current device has the tensor cores of the portable search.
inline bool has_mma() {
    int device = 0, major = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    return major >= 8;
}

/// Of tests that need such tensor cores.
class mma_test : public gpu_test {
protected:
    void SetUp() override {
        gpu_test::SetUp();
        if (!IsSkipped() && !has_mma()) GTEST_SKIP() << "no tensor cores of sm_80 or later";
    }
};

/// A codebook's image in device memory.
template <class C>
class device_image {
public:
    /// As `prepare` makes it or, if `wide`, by the kernel for any number of dimensions.
    explicit device_image(const matrix_ref<const C>& codebook, bool wide = false)
        : memory_(static_cast<std::int64_t>(prepared_codebook_bytes(codebook.rows, codebook.columns)) *
                  (wide ? 2 : 1)) {
        const prepared_codebook prepared{memory_.data(), static_cast<std::size_t>(memory_.size())};
        image_ = image_of(prepared, codebook.rows, codebook.columns);
        if (wide) {
            image_.layout.steps = static_cast<int>((codebook.columns + 2) / 16 + 1);
            detail::carver c(memory_.data());
            dispatch::prepare_wide(codebook, dispatch::take_image(c, codebook.rows, codebook.columns), image_.layout,
                                   nullptr);
        } else {
            prepare(strided(codebook.data, codebook.rows, codebook.columns, codebook.stride), prepared);
        }
        check(cudaDeviceSynchronize());
    }
    const device::image_ref& ref() const { return image_; }

private:
    device_array<char> memory_;
    device::image_ref image_;
};

}  // namespace cuvq::test
