// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The image of a codebook that the tensor-core searches read, for tests that launch them by themselves.
#pragma once

#include <cstdint>

#include <cuvq/dispatch/quantize.cuh>

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
    /// By the kernel that `quantize` would take or, if `wide`, by the one for any number of dimensions.
    explicit device_image(const matrix_ref<const C>& codebook, bool wide = false)
        : layout_(dispatch::image_layout(codebook.columns)),
          centre_(codebook.columns),
          scale_(2),
          bounds_(device::image_ref::parts(codebook.rows)),
          rows_(device::image_ref::tiles(codebook.rows) * device::image_tile * layout_.row_bytes()) {
        const kernel::codebook_image image{centre_.data(), scale_.data(), bounds_.data(), rows_.data()};
        if (wide) {
            layout_.steps = static_cast<int>((codebook.columns + 2) / 16 + 1);
            dispatch::prepare_wide(codebook, image, layout_, nullptr);
        } else {
            dispatch::prepare(codebook, image, nullptr);
        }
        check(cudaDeviceSynchronize());
    }
    device::image_ref ref() const { return {centre_.data(), scale_.data(), bounds_.data(), rows_.data(), layout_}; }

private:
    arch::slab_layout layout_;
    device_array<float> centre_, scale_;
    device_array<device::score_bounds> bounds_;
    device_array<char> rows_;
};

}  // namespace cuvq::test
