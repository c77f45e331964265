// Compares emulated instructions with AVX2 and BMI2 ones that do the same to halves or parts of a vector: prints the name of
// each that differs, and returns how many do.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#include "avx512_emulated.h"

namespace {

int wrong;
uint64_t state = 88172645463325252ull;

uint64_t chance() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

struct alignas(64) Wide {
    uint64_t at[8];

    Wide() {
        for (uint64_t& each : at) each = chance();
    }
    __m512i integers() const { return emulated::load<__m512i>(at); }
    __m512 singles() const { return emulated::load<__m512>(at); }
    __m256i half(int which) const { return _mm256_loadu_si256((const __m256i*)at + which); }
    __m256 half_of_singles(int which) const { return _mm256_loadu_ps((const float*)at + 8 * which); }
};

// Numbers of every size, none of them NaN
Wide singles() {
    Wide made;
    for (uint64_t& each : made.at) {
        const float two[2] = {float(int32_t(each)) / 65536.0f, float(int32_t(each >> 32)) * 3.0f};
        std::memcpy(&each, two, 8);
    }
    return made;
}

template <class V>
void same(const char* name, const V& found, const void* expected, int bytes = 64) {
    if (!std::memcmp(&found, expected, bytes)) return;
    ++wrong, std::printf("%s\n", name);
}

template <class V, class Half>
void halves(const char* name, const V& found, Half low, Half high) {
    const Half both[2] = {low, high};
    same(name, found, both);
}

void arithmetic() {
    const Wide a, b, c;
    const Wide x = singles(), y = singles(), z = singles();
#define BOTH(NAME, FOUND, EXPECTED) \
    { \
        int h = 0; \
        const auto low = EXPECTED; \
        h = 1; \
        halves(NAME, FOUND, low, EXPECTED); \
    }
    BOTH("add_epi32", _mm512_add_epi32(a.integers(), b.integers()), _mm256_add_epi32(a.half(h), b.half(h)))
    BOTH("sub_epi32", _mm512_sub_epi32(a.integers(), b.integers()), _mm256_sub_epi32(a.half(h), b.half(h)))
    BOTH("add_epi8", _mm512_add_epi8(a.integers(), b.integers()), _mm256_add_epi8(a.half(h), b.half(h)))
    BOTH("and_si512", _mm512_and_si512(a.integers(), b.integers()), _mm256_and_si256(a.half(h), b.half(h)))
    BOTH("slli_epi32", _mm512_slli_epi32(a.integers(), 16), _mm256_slli_epi32(a.half(h), 16))
    BOTH("cvtepi32_ps", _mm512_cvtepi32_ps(a.integers()), _mm256_cvtepi32_ps(a.half(h)))
    BOTH("add_ps", _mm512_add_ps(x.singles(), y.singles()), _mm256_add_ps(x.half_of_singles(h), y.half_of_singles(h)))
    BOTH("mul_ps", _mm512_mul_ps(x.singles(), y.singles()), _mm256_mul_ps(x.half_of_singles(h), y.half_of_singles(h)))
    BOTH("fmadd_ps", _mm512_fmadd_ps(x.singles(), y.singles(), z.singles()),
         _mm256_fmadd_ps(x.half_of_singles(h), y.half_of_singles(h), z.half_of_singles(h)))
    BOTH("set1_epi8", _mm512_set1_epi8(char(-128)), (void(h), _mm256_set1_epi8(char(-128))))
    BOTH("set1_epi32", _mm512_set1_epi32(77), (void(h), _mm256_set1_epi32(77)))
    const __m128i* quarters = (const __m128i*)a.at;
    BOTH("cvtepi8_epi32", _mm512_cvtepi8_epi32(_mm_loadu_si128(quarters)),
         _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(a.at + h))))
    BOTH("cvtepu16_epi32", _mm512_cvtepu16_epi32(a.half(0)), _mm256_cvtepu16_epi32(_mm_loadu_si128(quarters + h)))
    BOTH("cvtph_ps", _mm512_cvtph_ps(a.half(0)), _mm256_cvtph_ps(_mm_loadu_si128(quarters + h)))
    BOTH("broadcast_i32x4", _mm512_broadcast_i32x4(_mm_loadu_si128(quarters)),
         (void(h), _mm256_broadcastsi128_si256(_mm_loadu_si128(quarters))))
    same("castsi512_si256", _mm512_castsi512_si256(a.integers()), a.at, 32);
    same("extracti64x4_epi64", _mm512_extracti64x4_epi64(a.integers(), 1), a.at + 4, 32);
}

// 16 products of bytes at a time as 16 bits, which cannot overflow there
void dots() {
    const Wide sum, a, b;
    int32_t expected[16];
    for (int i = 0; i < 8; ++i) {
        const __m128i u = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)(a.at + i)));
        const __m128i s = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)(b.at + i)));
        const __m128i pairs = _mm_madd_epi16(u, s);
        const __m128i fours = _mm_hadd_epi32(pairs, pairs);
        const __m128i all = _mm_add_epi32(fours, _mm_loadl_epi64((const __m128i*)(sum.at + i)));
        _mm_storel_epi64((__m128i*)(expected + 2 * i), all);
    }
    same("dpbusd_epi32", _mm512_dpbusd_epi32(sum.integers(), a.integers(), b.integers()), expected);
}

// Deposits and extractions of bits do the same to the bytes of 64
template <class T>
uint64_t spread(uint64_t mask) {
    uint64_t found = 0;
    for (unsigned i = 0; i < 8 / sizeof(T); ++i)
        if (mask >> i & 1) found |= (sizeof(T) == 8 ? ~0ull : (1ull << 8 * sizeof(T)) - 1) << 8 * sizeof(T) * i;
    return found;
}

template <class T, class V>
void moves(const char* name, uint64_t mask, V expanded, V compressed, const Wide& a) {
    constexpr int EACH = 8 / sizeof(T);
    char source[128] = {0}, out[64], packed[128] = {0};
    std::memcpy(source, a.at, 64);
    int from = 0, to = 0;
    for (int i = 0; i < 8; ++i) {
        const uint64_t part = mask >> (EACH * i) & ((1ull << EACH) - 1), bits = spread<T>(part);
        uint64_t next;
        std::memcpy(&next, source + from, 8);
        const uint64_t put = _pdep_u64(next, bits), kept = _pext_u64(a.at[i], bits);
        std::memcpy(out + 8 * i, &put, 8), std::memcpy(packed + to, &kept, 8);
        from += int(_mm_popcnt_u64(part) * sizeof(T)), to += int(_mm_popcnt_u64(part) * sizeof(T));
    }
    same(name, expanded, out), same(name, compressed, packed);
}

void masks() {
    const Wide a;
    for (uint64_t mask : {chance(), chance() & chance(), chance() | chance(), uint64_t(0), ~uint64_t(0)}) {
        const __m512i bytes = _mm512_maskz_expand_epi8(mask, a.integers());
        moves<uint8_t>("expand or compress_epi8", mask, bytes, _mm512_maskz_compress_epi8(mask, a.integers()), a);
        const __m512i halves = _mm512_maskz_expand_epi16(__mmask32(mask), a.integers());
        moves<uint16_t>("expand_epi16", mask & 0xffffffff, halves, emulated::compress<uint16_t>(mask & 0xffffffff, a.integers()), a);
        const __m512 words = _mm512_maskz_expand_ps(__mmask16(mask), a.singles());
        moves<float>("expand or compress_ps", mask & 0xffff, words, _mm512_maskz_compress_ps(__mmask16(mask), a.singles()), a);
        uint64_t bits[8];
        for (int i = 0; i < 8; ++i) bits[i] = a.at[i] & spread<uint8_t>(mask >> (8 * i) & 255);
        same("mov_epi8", _mm512_maskz_mov_epi8(mask, a.integers()), bits);
        same("loadu_epi8", _mm512_maskz_loadu_epi8(mask, a.at), bits);
        for (int i = 0; i < 8; ++i) bits[i] = a.at[i] & spread<uint16_t>(mask >> (4 * i) & 15);
        same("loadu_epi16", _mm512_maskz_loadu_epi16(__mmask32(mask), a.at), bits);
        for (int i = 0; i < 8; ++i) bits[i] = a.at[i] & spread<float>(mask >> (2 * i) & 3);
        same("loadu_ps", _mm512_maskz_loadu_ps(__mmask16(mask), a.at), bits);
        Wide to, wanted = to;
        for (int h = 0; h < 2; ++h) {
            int32_t signs[8];
            for (int i = 0; i < 8; ++i) signs[i] = mask >> (8 * h + i) & 1 ? -1 : 0;
            const __m256i all = _mm256_loadu_si256((const __m256i*)signs);
            _mm256_maskstore_epi32((int*)wanted.at + 8 * h, all, a.half(h));
        }
        _mm512_mask_storeu_ps(to.at, __mmask16(mask), a.singles());
        same("mask_storeu_ps", to.at, wanted.at);
    }
}

void permutations() {
    const Wide index, a;
    char expected[64];
    for (int q = 0; q < 4; ++q) {  // of each 16 bytes, from the quarter that the index names
        const __m128i where = _mm_loadu_si128((const __m128i*)index.at + q);
        __m128i found = _mm_setzero_si128();
        for (int from = 0; from < 4; ++from) {
            const __m128i quarter = _mm_and_si128(where, _mm_set1_epi8(0x30));
            const __m128i here = _mm_cmpeq_epi8(quarter, _mm_set1_epi8(char(16 * from)));
            const __m128i some = _mm_shuffle_epi8(
                _mm_loadu_si128((const __m128i*)a.at + from), _mm_and_si128(where, _mm_set1_epi8(15))
            );
            found = _mm_or_si128(found, _mm_and_si128(here, some));
        }
        std::memcpy(expected + 16 * q, &found, 16);
    }
    same("permutexvar_epi8", _mm512_permutexvar_epi8(index.integers(), a.integers()), expected);
    __m256i parts[2];
    for (int h = 0; h < 2; ++h) {
        const __m256i low = _mm256_permutevar8x32_epi32(a.half(0), index.half(h));
        const __m256i high = _mm256_permutevar8x32_epi32(a.half(1), index.half(h));
        const __m256i second = _mm256_slli_epi32(index.half(h), 28);  // bit 3 to the sign
        parts[h] = _mm256_castps_si256(
            _mm256_blendv_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), _mm256_castsi256_ps(second))
        );
    }
    same("permutexvar_epi32", _mm512_permutexvar_epi32(index.integers(), a.integers()), parts);
    same("permutexvar_ps", _mm512_permutexvar_ps(index.integers(), a.singles()), parts);
    const __m256i a0 = a.half(0), a1 = a.half(1), b0 = index.half(0), b1 = index.half(1);
    parts[0] = _mm256_permute2x128_si256(a0, a1, 0x20), parts[1] = _mm256_permute2x128_si256(b0, b1, 0x20);
    same("shuffle_i32x4 0x88", _mm512_shuffle_i32x4(a.integers(), index.integers(), 0x88), parts);
    parts[0] = _mm256_permute2x128_si256(a0, a1, 0x31), parts[1] = _mm256_permute2x128_si256(b0, b1, 0x31);
    same("shuffle_i32x4 0xdd", _mm512_shuffle_i32x4(a.integers(), index.integers(), 0xdd), parts);
    halves("shuffle_i32x4 0x44", _mm512_shuffle_i32x4(a.integers(), index.integers(), 0x44), a0, b0);
    halves("shuffle_i32x4 0xee", _mm512_shuffle_i32x4(a.integers(), index.integers(), 0xee), a1, b1);
    int32_t places[16];
    float table[64], gathered[16];
    for (int i = 0; i < 64; ++i) table[i] = float(int32_t(chance()));
    for (int i = 0; i < 16; ++i) places[i] = int32_t(chance() % 64);
    for (int h = 0; h < 2; ++h) {
        const __m256i eight = _mm256_loadu_si256((const __m256i*)places + h);
        _mm256_storeu_ps(gathered + 8 * h, _mm256_i32gather_ps(table, eight, 4));
    }
    same("i32gather_ps", _mm512_i32gather_ps(_mm512_loadu_si512(places), table, 4), gathered);
    uint8_t shifted[64];
    for (int i = 0; i < 64; ++i)
        shifted[i] = uint8_t(__rorq(a.at[i / 8], ((const uint8_t*)index.at)[i] & 63));
    same("multishift_epi64_epi8", _mm512_multishift_epi64_epi8(index.integers(), a.integers()), shifted);
}

void sums() {
    const Wide a;
    __m256i four = _mm256_add_epi32(a.half(0), a.half(1));
    four = _mm256_hadd_epi32(four, four), four = _mm256_hadd_epi32(four, four);
    const int32_t expected = int32_t(
        uint32_t(_mm256_extract_epi32(four, 0)) + uint32_t(_mm256_extract_epi32(four, 4))
    );
    same("reduce_add_epi32", _mm512_reduce_add_epi32(a.integers()), &expected, 4);
    float numbers[16], total = 0;
    for (int i = 0; i < 16; ++i) total += numbers[i] = float(int(chance() % 2048));
    same("reduce_add_ps", _mm512_reduce_add_ps(_mm512_loadu_ps(numbers)), &total, 4);
}

}  // namespace

int main() {
    for (int i = 0; i < 1000 && !wrong; ++i) arithmetic(), dots(), masks(), permutations(), sums();
    return wrong;
}
