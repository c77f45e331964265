// One block of the columns that SparseGPT eliminates: each makes up for what the columns before it have lost.
//
// Products and sums are rounded one by one and columns follow each other in order, so the bytes are those of the torch
// path in secateur/recover/update.py, for any number of threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "api.h"

namespace {

constexpr int64_t TILE = 64;  // outputs whose columns stay in the nearest cache; a vector register holds 8

// Rows of `target`, `keep`, `gained` and `lost` are columns of the weight, `out` numbers each; `across[j * columns + k]`
// is the factor's entry (k, j), its last one the diagonal.
WIDE void eliminate(
    const float* target, const float* keep, const float* across, float* gained, float* lost, int64_t columns,
    int64_t out, int64_t first, int64_t width, float* near
) {
    for (int64_t j = 0; j < columns; ++j) {
        const float* factor = across + j * columns;
        const int64_t at = j * out + first;
        float sum[TILE] = {0}, aim[TILE] = {0}, kept[TILE] = {0};
        std::memcpy(sum, gained + at, width * sizeof(float));
        std::memcpy(aim, target + at, width * sizeof(float));
        std::memcpy(kept, keep + at, width * sizeof(float));
        for (int64_t k = 0; k < j; ++k) {
            const float* before = near + k * TILE;
            for (int64_t i = 0; i < TILE; ++i) sum[i] += factor[k] * before[i];
        }
        float* now = near + j * TILE;
        for (int64_t i = 0; i < TILE; ++i) now[i] = aim[i] - (aim[i] + sum[i] / factor[j]) * kept[i];
        std::memcpy(gained + at, sum, width * sizeof(float));
        std::memcpy(lost + at, now, width * sizeof(float));
    }
}

}  // namespace

// Eliminate `columns` columns: `gained` grows by what the columns of this block lose, `lost` is written. Rows of `factor`
// lie `stride` apart.
API int64_t secateur_eliminate(
    const float* target, const float* keep, const float* factor, int64_t stride, float* gained, float* lost,
    int64_t columns, int64_t out, int32_t threads
) {
    std::vector<float> across(columns * columns);
    for (int64_t k = 0; k < columns; ++k)
        for (int64_t j = k; j < columns; ++j) across[j * columns + k] = factor[k * stride + j];
    int64_t tiles = (out + TILE - 1) / TILE;
    std::atomic<int64_t> next{0};
    auto run = [&] {
        std::vector<float> near(columns * TILE);
        for (int64_t tile; (tile = next.fetch_add(1)) < tiles;) {
            int64_t first = tile * TILE;
            eliminate(
                target, keep, across.data(), gained, lost, columns, out, first, std::min(TILE, out - first), near.data()
            );
        }
    };
    std::vector<std::thread> others;
    for (int64_t thread = 1; thread < std::min<int64_t>(threads, tiles); ++thread) others.emplace_back(run);
    run();
    for (auto& other : others) other.join();
    return 0;
}
