// The AVX-512 instructions of native/sparse_avx512.cpp and sparse_amx.cpp in plain C++, after Intel's descriptions of them: for machines
// that have none. Included inside that file, with AVX2 and F16C switched on.

#pragma once

#include <cmath>
#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"

#define EMULATED static inline __attribute__((always_inline))

namespace emulated {

template <class T>
struct Lanes {
    static constexpr int COUNT = 64 / sizeof(T);
    T at[COUNT];
};

template <class T, class V>
EMULATED Lanes<T> lanes(const V& vector) {
    static_assert(sizeof(V) == 64, "512 bits");
    Lanes<T> found;
    std::memcpy(found.at, &vector, 64);
    return found;
}

template <class V, class T>
EMULATED V vector(const Lanes<T>& from) {
    V found;
    std::memcpy(&found, from.at, 64);
    return found;
}

template <class V, class T, class Make>
EMULATED V made(Make make) {
    Lanes<T> found;
    for (int i = 0; i < Lanes<T>::COUNT; ++i) found.at[i] = T(make(i));
    return vector<V>(found);
}

// Active lanes take the next elements of `a`, the others are zero
template <class T, class V>
EMULATED V expand(uint64_t mask, V a) {
    const Lanes<T> from = lanes<T>(a);
    int next = 0;
    return made<V, T>([&](int i) { return mask >> i & 1 ? from.at[next++] : T(0); });
}

// Active elements of `a` side by side, zeros behind
template <class T, class V>
EMULATED V compress(uint64_t mask, V a) {
    const Lanes<T> from = lanes<T>(a);
    Lanes<T> found;
    int next = 0;
    for (int i = 0; i < Lanes<T>::COUNT; ++i)
        if (mask >> i & 1) found.at[next++] = from.at[i];
    for (; next < Lanes<T>::COUNT; ++next) found.at[next] = T(0);
    return vector<V>(found);
}

// Only elements of the mask are read
template <class T, class V>
EMULATED V masked_load(uint64_t mask, const void* at) {
    return made<V, T>([&](int i) {
        T value = T(0);
        if (mask >> i & 1) std::memcpy(&value, (const char*)at + i * sizeof(T), sizeof(T));
        return value;
    });
}

template <class V>
EMULATED V load(const void* at) {
    V found;
    std::memcpy(&found, at, 64);
    return found;
}

template <class V>
EMULATED V aligned_load(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 64) __builtin_trap();
    return load<V>(at);
}

template <class V>
EMULATED void store(void* at, V a) {
    std::memcpy(at, &a, 64);
}

template <class V>
EMULATED void aligned_store(void* at, V a) {
    if (reinterpret_cast<uintptr_t>(at) % 64) __builtin_trap();
    store(at, a);
}

EMULATED __m512i add_bytes(__m512i a, __m512i b) {
    const Lanes<uint8_t> x = lanes<uint8_t>(a), y = lanes<uint8_t>(b);
    return made<__m512i, uint8_t>([&](int i) { return x.at[i] + y.at[i]; });
}

EMULATED __m512i add_integers(__m512i a, __m512i b) {
    const Lanes<uint32_t> x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
    return made<__m512i, uint32_t>([&](int i) { return x.at[i] + y.at[i]; });
}

EMULATED __m512i subtract_integers(__m512i a, __m512i b) {
    const Lanes<uint32_t> x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
    return made<__m512i, uint32_t>([&](int i) { return x.at[i] - y.at[i]; });
}

EMULATED __m512i both(__m512i a, __m512i b) {
    const Lanes<uint64_t> x = lanes<uint64_t>(a), y = lanes<uint64_t>(b);
    return made<__m512i, uint64_t>([&](int i) { return x.at[i] & y.at[i]; });
}

EMULATED __m512i shift_left(__m512i a, unsigned count) {
    const Lanes<uint32_t> x = lanes<uint32_t>(a);
    return made<__m512i, uint32_t>([&](int i) { return count > 31 ? 0 : x.at[i] << count; });
}

// Four products of unsigned bytes of a and signed ones of b are added to each 32 bits, without saturation
EMULATED __m512i dot_bytes(__m512i sum, __m512i a, __m512i b) {
    const Lanes<uint32_t> s = lanes<uint32_t>(sum);
    const Lanes<uint8_t> x = lanes<uint8_t>(a);
    const Lanes<int8_t> y = lanes<int8_t>(b);
    return made<__m512i, uint32_t>([&](int i) {
        int32_t four = 0;
        for (int k = 0; k < 4; ++k) four += int32_t(x.at[4 * i + k]) * y.at[4 * i + k];
        return s.at[i] + uint32_t(four);
    });
}

// Elements of a by the lowest bits of the index
template <class T, class V>
EMULATED V permute(__m512i index, V a) {
    const Lanes<T> from = lanes<T>(a);
    const Lanes<uint8_t> places = lanes<uint8_t>(index);  // the lowest byte of each element is enough
    return made<V, T>([&](int i) { return from.at[places.at[i * sizeof(T)] % Lanes<T>::COUNT]; });
}

// Every byte of the result: 8 bits of the 64 of b, from the bit on that the control names, round its end
EMULATED __m512i multishift(__m512i control, __m512i b) {
    const Lanes<uint8_t> from = lanes<uint8_t>(control);
    const Lanes<uint64_t> x = lanes<uint64_t>(b);
    return made<__m512i, uint8_t>([&](int i) {
        const int shift = from.at[i] & 63;
        const uint64_t value = x.at[i / 8];
        return shift ? value >> shift | value << (64 - shift) : value;
    });
}

EMULATED __m512i keep_bytes(uint64_t mask, __m512i a) {
    const Lanes<uint8_t> x = lanes<uint8_t>(a);
    return made<__m512i, uint8_t>([&](int i) { return mask >> i & 1 ? x.at[i] : 0; });
}

EMULATED __m512 multiply_add(__m512 a, __m512 b, __m512 c) {
    const Lanes<float> x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c);
    return made<__m512, float>([&](int i) { return __builtin_fmaf(x.at[i], y.at[i], z.at[i]); });
}

EMULATED __m512 add(__m512 a, __m512 b) {
    const Lanes<float> x = lanes<float>(a), y = lanes<float>(b);
    return made<__m512, float>([&](int i) { return x.at[i] + y.at[i]; });
}

EMULATED __m512 multiply(__m512 a, __m512 b) {
    const Lanes<float> x = lanes<float>(a), y = lanes<float>(b);
    return made<__m512, float>([&](int i) { return x.at[i] * y.at[i]; });
}

EMULATED __m512 to_float(__m512i a) {
    const Lanes<int32_t> x = lanes<int32_t>(a);
    return made<__m512, float>([&](int i) { return float(x.at[i]); });
}

// Halves, quarters, ... are added, as the sequence of instructions does
template <class T, class V>
EMULATED T sum(V a) {
    Lanes<T> x = lanes<T>(a);
    for (int half = Lanes<T>::COUNT / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) x.at[i] = x.at[i] + x.at[i + half];
    return x.at[0];
}

// 16 bytes or halves as 32 bits
template <class From, class To, class V>
EMULATED __m512i widen(V from) {
    From x[16];
    std::memcpy(x, &from, sizeof(x));
    return made<__m512i, To>([&](int i) { return x[i]; });
}

// Two quarters of a, then two of b; two bits choose each
EMULATED __m512i quarters(__m512i a, __m512i b, int which) {
    __m512i found;
    for (int i = 0; i < 4; ++i)
        std::memcpy((char*)&found + 16 * i, (const char*)(i < 2 ? &a : &b) + 16 * (which >> (2 * i) & 3), 16);
    return found;
}

EMULATED __m512i repeat_quarter(__m128i a) {
    __m512i found;
    for (int i = 0; i < 4; ++i) std::memcpy((char*)&found + 16 * i, &a, 16);
    return found;
}

EMULATED __m256i half(__m512i a, int which) {
    __m256i found;
    std::memcpy(&found, (const char*)&a + 32 * which, 32);
    return found;
}

// halves to singles are an instruction of F16C, for 8 at a time
EMULATED __m512 from_halves(__m256i a) {
    __m512 found;
    for (int i = 0; i < 2; ++i) {
        __m128i eight;
        std::memcpy(&eight, (const char*)&a + 16 * i, 16);
        const __m256 wide = _mm256_cvtph_ps(eight);
        std::memcpy((char*)&found + 32 * i, &wide, 32);
    }
    return found;
}

// Elements `scale` bytes times an index away
EMULATED __m512 gather(__m512i index, const void* at, int scale) {
    const Lanes<int32_t> places = lanes<int32_t>(index);
    return made<__m512, float>([&](int i) {
        float value;
        std::memcpy(&value, (const char*)at + int64_t(places.at[i]) * scale, 4);
        return value;
    });
}

// Only elements of the mask are written
EMULATED void masked_store(void* at, uint64_t mask, __m512 a) {
    const Lanes<float> x = lanes<float>(a);
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) std::memcpy((char*)at + 4 * i, &x.at[i], 4);
}

template <class V, class T>
EMULATED V all(T value) {
    return made<V, T>([&](int) { return value; });
}

template <class To, class From>
EMULATED To same_bits(From a) {
    To found;
    std::memcpy(&found, &a, 64);
    return found;
}

}  // namespace emulated

// clang-format off: what headers define as macros where nothing is optimized
#undef _mm512_extracti64x4_epi64
#undef _mm512_i32gather_ps
#undef _mm512_shuffle_i32x4
#undef _mm512_slli_epi32
#define _mm512_add_epi32(a, b) emulated::add_integers(a, b)
#define _mm512_add_epi8(a, b) emulated::add_bytes(a, b)
#define _mm512_add_ps(a, b) emulated::add(a, b)
#define _mm512_and_si512(a, b) emulated::both(a, b)
#define _mm512_broadcast_i32x4(a) emulated::repeat_quarter(a)
#define _mm512_castsi512_ps(a) emulated::same_bits<__m512>(a)
#define _mm512_castsi512_si256(a) emulated::half(a, 0)
#define _mm512_cvtepi32_ps(a) emulated::to_float(a)
#define _mm512_cvtepi8_epi32(a) emulated::widen<int8_t, int32_t>(a)
#define _mm512_cvtepu16_epi32(a) emulated::widen<uint16_t, uint32_t>(a)
#define _mm512_cvtph_ps(a) emulated::from_halves(a)
#define _mm512_dpbusd_epi32(s, a, b) emulated::dot_bytes(s, a, b)
#define _mm512_extracti64x4_epi64(a, which) emulated::half(a, which)
#define _mm512_fmadd_ps(a, b, c) emulated::multiply_add(a, b, c)
#define _mm512_i32gather_ps(index, at, scale) emulated::gather(index, at, scale)
#define _mm512_load_si512(at) emulated::aligned_load<__m512i>(at)
#define _mm512_loadu_ps(at) emulated::load<__m512>(at)
#define _mm512_loadu_si512(at) emulated::load<__m512i>(at)
#define _mm512_mask_storeu_ps(at, k, a) emulated::masked_store(at, k, a)
#define _mm512_maskz_compress_epi8(k, a) emulated::compress<uint8_t>(k, a)
#define _mm512_maskz_compress_ps(k, a) emulated::compress<float>(k, a)
#define _mm512_maskz_expand_epi16(k, a) emulated::expand<uint16_t>(k, a)
#define _mm512_maskz_expand_epi8(k, a) emulated::expand<uint8_t>(k, a)
#define _mm512_maskz_expand_ps(k, a) emulated::expand<float>(k, a)
#define _mm512_maskz_loadu_epi16(k, at) emulated::masked_load<uint16_t, __m512i>(k, at)
#define _mm512_maskz_loadu_epi8(k, at) emulated::masked_load<uint8_t, __m512i>(k, at)
#define _mm512_maskz_loadu_ps(k, at) emulated::masked_load<float, __m512>(k, at)
#define _mm512_maskz_mov_epi8(k, a) emulated::keep_bytes(k, a)
#define _mm512_mul_ps(a, b) emulated::multiply(a, b)
#define _mm512_multishift_epi64_epi8(control, a) emulated::multishift(control, a)
#define _mm512_permutexvar_epi32(index, a) emulated::permute<uint32_t>(index, a)
#define _mm512_permutexvar_epi8(index, a) emulated::permute<uint8_t>(index, a)
#define _mm512_permutexvar_ps(index, a) emulated::permute<float>(index, a)
#define _mm512_reduce_add_epi32(a) int32_t(emulated::sum<uint32_t>(a))
#define _mm512_reduce_add_ps(a) emulated::sum<float>(a)
#define _mm512_set1_epi32(value) emulated::all<__m512i, int32_t>(value)
#define _mm512_set1_epi8(value) emulated::all<__m512i, char>(value)
#define _mm512_set1_ps(value) emulated::all<__m512, float>(value)
#define _mm512_setzero_ps() emulated::all<__m512, float>(0)
#define _mm512_setzero_si512() emulated::all<__m512i, int32_t>(0)
#define _mm512_shuffle_i32x4(a, b, which) emulated::quarters(a, b, which)
#define _mm512_slli_epi32(a, count) emulated::shift_left(a, count)
#define _mm512_store_si512(at, a) emulated::aligned_store(at, a)
#define _mm512_storeu_ps(at, a) emulated::store(at, a)
#define _mm512_storeu_si512(at, a) emulated::store(at, a)
#define _mm512_sub_epi32(a, b) emulated::subtract_integers(a, b)
// clang-format on
