// The AMX instructions of native/sparse_amx.cpp in plain C++, after Intel's descriptions of them: for machines that have
// none. Registers are those of the calling thread; they may be used between TILE_CONFIGURE and TILE_RELEASE alone.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

struct Register {
    uint8_t row[16][64];
};

static thread_local Register registers[8];
static thread_local bool configured;

// All eight registers of 16 rows of 64 bytes: nothing else is asked for
static inline void configure(const void* at) {
    if (configured) __builtin_trap();  // somebody did not release them
    const uint8_t* from = (const uint8_t*)at;
    uint16_t bytes[16];
    std::memcpy(bytes, from + 16, 32);
    if (from[0] != 1 || from[1] != 0) __builtin_trap();
    for (int i = 2; i < 16; ++i)
        if (from[i]) __builtin_trap();
    for (int i = 0; i < 16; ++i)
        if (bytes[i] != (i < 8 ? 64 : 0) || from[48 + i] != (i < 8 ? 16 : 0)) __builtin_trap();
    std::memset(registers, 0, sizeof(registers));
    configured = true;
}

static inline Register& tile(int number) {
    if (!configured) __builtin_trap();
    return registers[number];
}

static inline float from_bf16(const uint8_t* at) {
    uint16_t high;
    std::memcpy(&high, at, 2);
    const uint32_t bits = (high & 0x7f80 ? uint32_t(high) : uint32_t(high & 0x8000)) << 16;  // the smallest count as zero
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline void dot_bytes(int c, int a, int b) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            int32_t sum;
            std::memcpy(&sum, tile(c).row[m] + 4 * n, 4);
            for (int k = 0; k < 64; ++k) sum += int32_t(int8_t(tile(a).row[m][k])) * int8_t(tile(b).row[k / 4][4 * n + k % 4]);
            std::memcpy(tile(c).row[m] + 4 * n, &sum, 4);
        }
}

// Even and odd products have sums of their own, which are added to each other and then to what there is
static inline void dot_bf16(int c, int a, int b) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float sum, two[2] = {0, 0};
            std::memcpy(&sum, tile(c).row[m] + 4 * n, 4);
            for (int k = 0; k < 32; ++k)
                two[k % 2] = std::fma(
                    from_bf16(tile(a).row[m] + 2 * k), from_bf16(tile(b).row[k / 2] + 4 * n + k % 2 * 2), two[k % 2]
                );
            sum += two[0] + two[1];
            std::memcpy(tile(c).row[m] + 4 * n, &sum, 4);
        }
}

}  // namespace emulated

// clang-format off
#define TILE_CONFIGURE(at) emulated::configure(at)
#define TILE_RELEASE() emulated::configured = false
#define TILE_ZERO(c) std::memset(&emulated::tile(c), 0, 1024)
#define TILE_LOAD(c, at) std::memcpy(&emulated::tile(c), at, 1024)
#define TILE_STORE(c, at) std::memcpy(at, &emulated::tile(c), 1024)
#define TILE_DOT_BYTES(c, a, b) emulated::dot_bytes(c, a, b)
#define TILE_DOT_BF16(c, a, b) emulated::dot_bf16(c, a, b)
// clang-format on
