// What the units for AVX2 share: the instructions they may use, and tables that stand for those it lacks.
//
// Included by a unit after <cstdint>, <cstring> and sparse.h; it opens a region of compiler options, which AVX2_END closes.

#pragma once

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

#if defined(__clang__)
#define AVX2_END _Pragma("clang attribute pop")
#else
#define AVX2_END _Pragma("GCC pop_options")
#endif

#define ALWAYS inline __attribute__((always_inline))

namespace sparse {
namespace {

struct Tables {
    alignas(64) int32_t words[256][8];   // lane -> position in the stream; the sign marks lanes that are kept
    alignas(64) uint8_t halves[256][16]; // control of a byte shuffle for 8 elements of 2 bytes
    alignas(64) uint64_t low[256];       // the same for 8 elements of 1 byte, in the lower and upper half of 16
    alignas(64) uint64_t high[256];
    alignas(64) uint64_t columns[256];   // bytes: the set bits in order
    alignas(64) uint64_t behind[256];    // those and 8
};

Tables t;

bool fill() {
    for (int mask = 0; mask < 256; ++mask) {
        int n = 0;
        uint8_t low[8], high[8], columns[8] = {0};
        for (int bit = 0; bit < 8; ++bit) {
            const bool kept = mask >> bit & 1;
            t.words[mask][bit] = kept ? int32_t(0x80000000u | uint32_t(n)) : 0;
            t.halves[mask][2 * bit] = kept ? uint8_t(2 * n) : 0x80;
            t.halves[mask][2 * bit + 1] = kept ? uint8_t(2 * n + 1) : 0x80;
            low[bit] = kept ? uint8_t(n) : 0x80;
            high[bit] = kept ? uint8_t(n + 8) : 0x80;
            if (kept) columns[n++] = uint8_t(bit);
        }
        std::memcpy(&t.low[mask], low, 8);
        std::memcpy(&t.high[mask], high, 8);
        std::memcpy(&t.columns[mask], columns, 8);
        t.behind[mask] = t.columns[mask] + 0x0808080808080808ull;
    }
    return true;
}

ALWAYS float sum(__m256 a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

ALWAYS int32_t sum(__m256i a) {
    __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}

// 8 values of the stream
template <int KIND>
ALWAYS __m256 eight(const char* at) {
    if (KIND == F32) return _mm256_loadu_ps((const float*)at);
    const __m128i raw = _mm_loadu_si128((const __m128i*)at);
    if (KIND == F16) return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

// 8 bytes from each of two addresses, which need no alignment
ALWAYS __m128i two_eights(const void* a, const void* b) {
    int64_t high;
    std::memcpy(&high, b, 8);
    return _mm_insert_epi64(_mm_loadl_epi64((const __m128i*)a), high, 1);
}

// Blocks of 4 or 16 rows: the inputs that the mask keeps are put side by side, once for all rows of a block, and the
// stream meets them as if nothing were left out. FLOCK words at a time.
constexpr int64_t FLOCK = 16;

// Kept inputs of T tokens in order, zeros behind the last; returns how many
template <class X, int T>
ALWAYS int64_t keep(const uint64_t* mask, int64_t words, const X* x, int64_t padded, X (*out)[FLOCK * WORD + 64]) {
    int64_t n = 0;
    for (int64_t i = 0; i < 4 * words; ++i, x += 16) {
        const uint32_t bits = uint32_t(mask[i / 4] >> (16 * (i % 4))) & 0xffff;
        const int low = bits & 255, high = bits >> 8, first = __builtin_popcount(unsigned(low));
        for (int k = 0; k < T; ++k) {
            const X* from = x + k * padded;
            if (sizeof(X) == 1) {
                const __m128i where = two_eights(t.columns + low, t.behind + high);
                const __m128i kept = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)from), where);
                _mm_storel_epi64((__m128i*)(out[k] + n), kept);
                _mm_storel_epi64((__m128i*)(out[k] + n + first), _mm_unpackhi_epi64(kept, kept));
            } else {
                for (int half = 0; half < 2; ++half) {
                    const void* columns = t.columns + (half ? high : low);
                    const __m256i where = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)columns));
                    const __m256 all = _mm256_loadu_ps((const float*)from + 8 * half);
                    float* to = (float*)out[k] + n + (half ? first : 0);
                    _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(all, where));
                }
            }
        }
        n += __builtin_popcount(bits);
    }
    for (int k = 0; k < T; ++k) std::memset(out[k] + n, 0, 16 * sizeof(X));
    return n;
}

}  // namespace
}  // namespace sparse
