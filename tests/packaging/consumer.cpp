// A user's program: quantizes four points and checks their codes.
#include <cstdint>
#include <cstdio>
#include <vector>

#include <cuvq/reference/quantize.hpp>

int main() {
    const std::vector<float> points = {0.1f, 0.2f, 3.9f, 0.0f, 0.0f, 4.1f, 2.0f, 0.0f};
    const std::vector<float> codebook = {0.0f, 0.0f, 4.0f, 0.0f, 0.0f, 4.0f};
    std::vector<std::int32_t> codes(4);

    cuvq::reference::quantize(cuvq::matrix_view<const float, 2>(points.data(), 4),
                              cuvq::matrix_view<const float, 2>(codebook.data(), 3),
                              cuvq::vector_view<std::int32_t>(codes.data(), 4));

    // The last point is as near to row 0 as to row 1: the lowest index wins.
    const std::vector<std::int32_t> expected = {0, 1, 2, 0};
    for (std::size_t i = 0; i < codes.size(); ++i) std::printf("code of point %zu: %d\n", i, codes[i]);
    return codes == expected ? 0 : 1;
}
