// Weights rounded to integers: of several scales for a group, the one that errs least. Called from Python.
//
// Every element is divided, rounded, multiplied and squared in float32 as torch does it; sums are float64, so that their order
// does not decide between scales.

#include <algorithm>
#include <cstdint>

#include "api.h"
#include "pool.h"

namespace {

constexpr int64_t LANES = 16;  // sums side by side

// To the nearest whole number, halves to the even one: adding 1.5 * 2^23 leaves no bits behind the point
inline float rounded(float x, float largest) {
    const float whole = (x + 12582912.0f) - 12582912.0f;
    return std::min(std::max(whole, -largest), largest);
}

inline float square_of_error(float w, float scale, float largest) {
    const float off = rounded(w / scale, largest) * scale - w;
    return off * off;
}

WIDE double error(const float* w, int64_t size, float scale, float largest) {
    double sums[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += double(square_of_error(w[i + lane], scale, largest));
    double all = 0;
    for (; i < size; ++i) all += double(square_of_error(w[i], scale, largest));
    for (double each : sums) all += each;
    return all;
}

WIDE void round_all(const float* w, int64_t size, float scale, float largest, int8_t* out) {
    for (int64_t i = 0; i < size; ++i) out[i] = int8_t(int32_t(rounded(w[i] / scale, largest)));
}

}  // namespace

// `groups` runs of `size` weights; `tried` holds `count` scales of each, of which `chosen` gets the one that errs least, the
// first of equals; `integers` what the weights are then.
API int64_t secateur_grid(
    const float* weights, int64_t groups, int64_t size, const float* tried, int64_t count, float largest, float* chosen,
    int8_t* integers, int32_t threads
) {
    constexpr int64_t AT_ONCE = 1 << 14;  // weights that a thread takes at a time
    const int64_t step = std::max<int64_t>(1, AT_ONCE / std::max<int64_t>(size, 1));
    in_parallel((groups + step - 1) / step, threads, [&](int64_t chunk) {
        for (int64_t group = chunk * step; group < std::min(groups, (chunk + 1) * step); ++group) {
            const float *w = weights + group * size, *scales = tried + group * count;
            double least = 0;
            for (int64_t i = 0; i < count; ++i) {
                const double found = error(w, size, scales[i], largest);
                if (i == 0 || found < least) least = found, chosen[group] = scales[i];
            }
            round_all(w, size, chosen[group], largest, integers + group * size);
        }
    });
    return 0;
}
