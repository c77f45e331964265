// What the units for AVX-512 share: the instructions they may use, and how packed values are expanded.
//
// Included by a unit after <cstdint>, <cstring> and sparse.h; it opens a region of compiler options, which AVX512_END closes.
// With SECATEUR_EMULATED_AVX512 the instructions are plain C++ (tests/native): for tests where no machine has them.

#pragma once

#include <immintrin.h>

#if defined(SECATEUR_EMULATED_AVX512)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#include "avx512_emulated.h"
#elif defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target( \
        "avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni" \
    ))), \
    apply_to = function \
)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")
#endif

#if defined(__clang__) && !defined(SECATEUR_EMULATED_AVX512)
#define AVX512_END _Pragma("clang attribute pop")
#else
#define AVX512_END _Pragma("GCC pop_options")
#endif

#define ALWAYS inline __attribute__((always_inline))

namespace sparse {
namespace {

struct Orders {
    alignas(64) uint8_t counted[64];     // 0, 1, 2, ...
    alignas(64) uint8_t spread[64];      // every 8 bytes: the 5 that hold the next 8 codes of 4 bits
    alignas(64) uint8_t nibbles[2][64];  // every 8 bytes: where those codes start, from an even place and from an odd one
    alignas(64) uint8_t turned[2][64];   // blocks of 4 and 16 rows: 4 columns of a row side by side
    alignas(64) int32_t repeated[2][16]; // blocks of 4 and 16 rows: which 4 inputs (or which 1) a lane meets
};

Orders o;

bool write_orders() {
    for (int i = 0; i < 64; ++i) {
        o.counted[i] = uint8_t(i);
        o.spread[i] = uint8_t(i / 8 * 4 + (i % 8 < 5 ? i % 8 : 0));
        for (int odd = 0; odd < 2; ++odd) o.nibbles[odd][i] = uint8_t((i % 8 + odd) * 4);
        o.turned[0][i] = uint8_t(i / 16 * 16 + i % 4 * 4 + i / 4 % 4);
        o.turned[1][i] = uint8_t(i % 4 * 16 + i / 4);
    }
    for (int i = 0; i < 16; ++i) o.repeated[0][i] = i / 4, o.repeated[1][i] = 0;
    return true;
}

ALWAYS int kept(uint64_t bits) { return int(_mm_popcnt_u64(bits)); }

// The lowest n of 64 bits; all for more
ALWAYS uint64_t lowest(int64_t n) { return n < 64 ? (uint64_t(1) << n) - 1 : ~uint64_t(0); }

// 64 codes of 4 bits from any place of a stream, looked up in a codebook that is there four times: a place counts by its
// lowest 6 bits. Uses 33 bytes, reads 64 or those of a mask.
ALWAYS __m512i codes(const uint8_t* values, int64_t at, __m512i codebook, uint64_t bytes = ~uint64_t(0)) {
    const __m512i found = _mm512_maskz_loadu_epi8(bytes, values + (at >> 1));
    const __m512i raw = _mm512_permutexvar_epi8(_mm512_load_si512(o.spread), found);
    const __m512i from = _mm512_load_si512(o.nibbles[at & 1]);
    return _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(from, raw), codebook);
}

// Four products of unsigned bytes of a and signed ones of b are added to each 32 bits of the sum. The compilers' own function
// copies its sum before and after.
ALWAYS void add_dots(__m512i& sum, __m512i a, __m512i b) {
#if defined(SECATEUR_EMULATED_AVX512)
    sum = _mm512_dpbusd_epi32(sum, a, b);
#else
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
#endif
}

ALWAYS __m512i codebook_of(const Matrix& m) {
    return m.codebook ? _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)m.codebook)) : _mm512_setzero_si512();
}

// The next bytes of a stream, put where bits are
template <int KIND>
ALWAYS __m512i expand_bytes(const uint8_t* values, int64_t& at, uint64_t bits, __m512i codebook) {
    const __m512i packed = KIND == I4 ? codes(values, at, codebook) : _mm512_loadu_si512(values + at);
    at += kept(bits);
    return _mm512_maskz_expand_epi8(bits, packed);
}

// Words that share a scale: see `_wrong_scale` in secateur/deploy/sparse/store.py
ALWAYS int64_t words_of_scale(const Matrix& m) { return m.scales == 1 ? m.words : m.columns / m.scales / WORD; }

}  // namespace
}  // namespace sparse
