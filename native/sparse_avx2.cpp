// The kernels for AVX2, FMA, F16C, BMI2 and POPCNT.
//
// AVX2 has no instruction that expands packed values, so permutations are looked up: 8 bits of a mask name a permutation
// that puts the next values of the stream where they belong, and zeros elsewhere.

#include <cstdint>
#include <cstring>

#include "sparse.h"

#if !defined(__x86_64__) || !(defined(__GNUC__) || defined(__clang__))

namespace sparse {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace sparse

#else

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
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
    alignas(64) uint32_t nibbles[256];   // four bits for every set bit
};

Tables t;

bool fill() {
    for (int mask = 0; mask < 256; ++mask) {
        int n = 0;
        uint8_t low[8], high[8], columns[8] = {0};
        t.nibbles[mask] = 0;
        for (int bit = 0; bit < 8; ++bit) {
            const bool kept = mask >> bit & 1;
            t.words[mask][bit] = kept ? int32_t(0x80000000u | uint32_t(n)) : 0;
            t.halves[mask][2 * bit] = kept ? uint8_t(2 * n) : 0x80;
            t.halves[mask][2 * bit + 1] = kept ? uint8_t(2 * n + 1) : 0x80;
            low[bit] = kept ? uint8_t(n) : 0x80;
            high[bit] = kept ? uint8_t(n + 8) : 0x80;
            if (kept) t.nibbles[mask] |= 15u << (4 * bit), columns[n++] = uint8_t(bit);
        }
        std::memcpy(&t.low[mask], low, 8);
        std::memcpy(&t.high[mask], high, 8);
        std::memcpy(&t.columns[mask], columns, 8);
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

// 8 bytes from each of two addresses, which need no alignment
ALWAYS __m128i two_eights(const void* a, const void* b) {
    int64_t high;
    std::memcpy(&high, b, 8);
    return _mm_insert_epi64(_mm_loadl_epi64((const __m128i*)a), high, 1);
}

ALWAYS __m256i bytes32(const void* a, const void* b, const void* c, const void* d) {
    const __m128i one = two_eights(a, b);
    const __m128i two = two_eights(c, d);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(one), two, 1);
}

// 8 float32 of the stream, put where bits of the mask are
ALWAYS __m256 expand_words(const float* at, int mask) {
    const __m256i where = _mm256_load_si256((const __m256i*)t.words[mask]);
    const __m256 put = _mm256_permutevar8x32_ps(_mm256_loadu_ps(at), where);
    return _mm256_blendv_ps(_mm256_setzero_ps(), put, _mm256_castsi256_ps(where));
}

// 16 elements of two bytes
ALWAYS __m256i expand_halves(const uint16_t*& at, int one, int two) {
    const uint16_t* next = at + __builtin_popcount(one);
    const __m256i from = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)at)), _mm_loadu_si128((const __m128i*)next), 1
    );
    const __m256i where = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_load_si128((const __m128i*)t.halves[one])),
        _mm_load_si128((const __m128i*)t.halves[two]), 1
    );
    at = next + __builtin_popcount(two);
    return _mm256_shuffle_epi8(from, where);
}

// 32 elements of one byte
ALWAYS __m256i expand_bytes(const int8_t*& at, const uint8_t* bits) {
    const int a = bits[0], b = bits[1], c = bits[2], d = bits[3];
    uint32_t all;
    std::memcpy(&all, bits, 4);
    const int8_t *pb = at + __builtin_popcount(a), *pc = at + __builtin_popcount(all & 0xffff);
    const __m256i from = bytes32(at, pb, pc, pc + __builtin_popcount(c));
    at += __builtin_popcount(all);  // one addition from step to step
    return _mm256_shuffle_epi8(from, bytes32(&t.low[a], &t.high[b], &t.low[c], &t.high[d]));
}

// 8 columns of 4-bit codes, each in its place; `at` counts half bytes
ALWAYS uint32_t expand_nibbles(const uint8_t* values, int64_t& at, int mask) {
    uint64_t raw;
    std::memcpy(&raw, values + (at >> 1), 8);
    const int shift = int(at & 1) * 4;
    at += __builtin_popcount(mask);
    return _pdep_u32(uint32_t(raw >> shift), t.nibbles[mask]);
}

// 32 of them, looked up in the codebook
ALWAYS __m256i expand_codes(const uint8_t* values, int64_t& at, const uint8_t* bits, __m256i codebook) {
    uint64_t low = expand_nibbles(values, at, bits[0]);
    low |= uint64_t(expand_nibbles(values, at, bits[1])) << 32;
    uint64_t high = expand_nibbles(values, at, bits[2]);
    high |= uint64_t(expand_nibbles(values, at, bits[3])) << 32;
    const __m128i packed = _mm_set_epi64x(int64_t(high), int64_t(low)), fifteen = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(packed, fifteen), odd = _mm_and_si128(_mm_srli_epi16(packed, 4), fifteen);
    const __m256i codes = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_unpacklo_epi8(even, odd)), _mm_unpackhi_epi8(even, odd), 1
    );
    return _mm256_shuffle_epi8(codebook, codes);
}

// sums of signed bytes times signed bytes, both in [-127, 127], four at a time
ALWAYS __m256i dot_bytes(__m256i sum, __m256i w, const int8_t* at) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)at);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// 16 columns of one group in float: four accumulators' worth a word
template <int KIND, int B>
ALWAYS void row_in_float(const Matrix& m, const Inputs& in, int64_t group, float* out) {
    const uint64_t* mask = m.mask + group * m.words;
    const char* base = (const char*)m.values + m.offsets[group] * (KIND == F32 ? 4 : 2);
    const float* words = (const float*)base;
    const uint16_t* halves = (const uint16_t*)base;
    const float* x = KIND == BF16 ? in.paired : in.plain;
    const int64_t padded = in.padded, number = m.words;
    __m256 total[B][2];
    for (int b = 0; b < B; ++b) total[b][0] = total[b][1] = _mm256_setzero_ps();
    for (int64_t word = 0; word < number; ++word) {
        if (!mask[word]) continue;
        const uint8_t* bits = (const uint8_t*)(mask + word);  // x86 puts the lowest byte first
        const float* at = x + word * WORD;
        for (int part = 0; part < 4; ++part, at += 16) {
            const int one = bits[2 * part], two = bits[2 * part + 1];
            __m256 w[2];
            if (KIND == F32) {
                w[0] = expand_words(words, one);
                words += __builtin_popcount(one);
                w[1] = expand_words(words, two);
                words += __builtin_popcount(two);
            } else {
                const __m256i both = expand_halves(halves, one, two);
                if (KIND == BF16) {
                    w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
                    w[1] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int32_t(0xffff0000u))));
                } else {
                    w[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(both));
                    w[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1));
                }
            }
            for (int b = 0; b < B; ++b) {
                total[b][0] = _mm256_fmadd_ps(w[0], _mm256_loadu_ps(at + b * padded), total[b][0]);
                total[b][1] = _mm256_fmadd_ps(w[1], _mm256_loadu_ps(at + 8 + b * padded), total[b][1]);
            }
        }
    }
    for (int b = 0; b < B; ++b) out[b] = sum(_mm256_add_ps(total[b][0], total[b][1]));
}

// Whole words share a scale: see `serves` in secateur/sparse/kernels.py.
template <int KIND, int B, bool WHOLE>
ALWAYS void row_in_integers(const Matrix& m, const Inputs& in, int64_t row, float* out) {
    const uint64_t* mask = WHOLE ? nullptr : m.mask + row * m.words;
    const int8_t* bytes = (const int8_t*)m.values + m.offsets[row];
    int64_t at = m.offsets[row];
    __m256i codebook = _mm256_setzero_si256();
    if (KIND == I4) codebook = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)m.codebook));
    const int8_t* inputs = in.integers;
    const int64_t padded = in.padded, words = m.words;
    const int64_t reach = m.scales == 1 ? m.words : m.columns / m.scales / WORD;
    for (int b = 0; b < B; ++b) out[b] = 0;
    for (int64_t word = 0, scale = 0; word < words; ++scale) {
        __m256i total[B];
        for (int b = 0; b < B; ++b) total[b] = _mm256_setzero_si256();
        const int64_t stop = word + reach < words ? word + reach : words;
        for (; word < stop; ++word) {
            if (!WHOLE && !mask[word]) continue;
            const uint8_t* bits = WHOLE ? nullptr : (const uint8_t*)(mask + word);
            const int64_t x = word * WORD;
            for (int part = 0; part < 2; ++part) {
                __m256i w;
                if (WHOLE) {
                    w = _mm256_loadu_si256((const __m256i*)(bytes + x + 32 * part));
                } else if (KIND == I8) {
                    w = expand_bytes(bytes, bits + 4 * part);
                } else {
                    w = expand_codes((const uint8_t*)m.values, at, bits + 4 * part, codebook);
                }
                for (int b = 0; b < B; ++b)
                    total[b] = dot_bytes(total[b], w, inputs + b * padded + x + 32 * part);
            }
        }
        for (int b = 0; b < B; ++b) out[b] += float(sum(total[b])) * m.scale[row * m.scales + scale];
    }
    for (int b = 0; b < B; ++b) out[b] *= in.factor[b];
}

// n values from a position of the stream as float32, without scale; writes up to 7 more
ALWAYS void widen(const Matrix& m, int64_t at, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 8) {
        __m256 w;
        if (m.kind == BF16) {
            const __m128i raw = _mm_loadu_si128((const __m128i*)((const uint16_t*)m.values + at + i));
            w = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
        } else if (m.kind == F16) {
            w = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const uint16_t*)m.values + at + i)));
        } else if (m.kind == I8) {
            const __m128i raw = _mm_loadl_epi64((const __m128i*)((const int8_t*)m.values + at + i));
            w = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
        } else {
            int64_t from = at + i;
            const uint64_t spread = _pdep_u64(
                expand_nibbles((const uint8_t*)m.values, from, 255), 0x0f0f0f0f0f0f0f0full
            );
            const __m128i codes = _mm_shuffle_epi8(
                _mm_loadu_si128((const __m128i*)m.codebook), _mm_cvtsi64_si128(int64_t(spread))
            );
            w = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
        }
        _mm256_storeu_ps(out + i, w);
    }
}

// The units of a group in a span: their columns, and their values as float32, scaled by row where that is possible
struct Stretch {
    uint8_t listed[WORD + 16];
    float room[SPAN * 16 + 16];
    const uint8_t* columns;
    const float* values;
    int n;
};

ALWAYS void stretch(const Matrix& m, int64_t group, int64_t number, int64_t at, Stretch& s) {
    if (m.form == INDEX) {
        s.n = m.counts[group * m.words + number];
        s.columns = m.index + at;
    } else if (m.form == DENSE) {
        const int64_t left = m.columns - number * WORD;
        s.n = int(left < WORD ? left : WORD);
        for (int i = 0; i < s.n; ++i) s.listed[i] = uint8_t(i);
        s.columns = s.listed;
    } else {
        uint64_t bits = m.mask[group * m.words + number];
        int n = 0;
        for (uint64_t base = 0; bits; bits >>= 8, base += 0x0808080808080808ull) {
            const uint64_t eight = t.columns[bits & 255] + base;
            std::memcpy(s.listed + n, &eight, 8);
            n += __builtin_popcount(unsigned(bits & 255));
        }
        s.n = n, s.columns = s.listed;
    }
    const int64_t count = int64_t(s.n) * m.block;
    if (m.kind == F32) {
        s.values = (const float*)m.values + at;
    } else {
        widen(m, at, count, s.room);
        s.values = s.room;
    }
    if (!m.scale) return;
    if (m.block > 1) {
        const int64_t width = m.columns / m.scales;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = group * m.block + i % m.block;
            const int64_t column = number * WORD + s.columns[i / m.block];
            if (row < m.rows) s.room[i] *= m.scale[row * m.scales + column / width];
        }
    } else if (m.scales == 1) {
        const __m256 scale = _mm256_set1_ps(m.scale[group]);
        for (int64_t i = 0; i < count; i += 8)
            _mm256_storeu_ps(s.room + i, _mm256_mul_ps(_mm256_loadu_ps(s.room + i), scale));
    } else {
        const int64_t width = m.columns / m.scales, start = number * (m.form == INDEX ? SPAN : WORD);
        for (int64_t i = 0; i < count; ++i) s.room[i] *= m.scale[group * m.scales + (start + s.columns[i]) / width];
    }
}

// Any form, few tokens: one multiplication a value
void few_units(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    Stretch s;
    for (int64_t group = first; group < last; ++group) {
        float total[FEW][16] = {{0}};
        int64_t at = m.offsets[group];
        for (int64_t number = 0; number < m.words; ++number) {
            stretch(m, group, number, at, s);
            at += int64_t(s.n) * m.block;
            for (int64_t b = 0; b < in.batch; ++b) {
                const float* x = in.plain + b * in.padded + number * (m.form == INDEX ? SPAN : WORD);
                if (m.block == 1) {
                    float four[4] = {0, 0, 0, 0};
                    int i = 0;
                    for (; i + 4 <= s.n; i += 4)
                        for (int k = 0; k < 4; ++k) four[k] += s.values[i + k] * x[s.columns[i + k]];
                    for (; i < s.n; ++i) four[0] += s.values[i] * x[s.columns[i]];
                    total[b][0] += (four[0] + four[1]) + (four[2] + four[3]);
                } else if (m.block == 4) {
                    __m128 one = _mm_loadu_ps(total[b]), two = _mm_setzero_ps();
                    int i = 0;
                    for (; i + 2 <= s.n; i += 2) {
                        one = _mm_fmadd_ps(_mm_loadu_ps(s.values + 4 * i), _mm_set1_ps(x[s.columns[i]]), one);
                        two = _mm_fmadd_ps(_mm_loadu_ps(s.values + 4 * i + 4), _mm_set1_ps(x[s.columns[i + 1]]), two);
                    }
                    if (i < s.n) one = _mm_fmadd_ps(_mm_loadu_ps(s.values + 4 * i), _mm_set1_ps(x[s.columns[i]]), one);
                    _mm_storeu_ps(total[b], _mm_add_ps(one, two));
                } else {
                    __m256 one = _mm256_loadu_ps(total[b]), two = _mm256_loadu_ps(total[b] + 8);
                    for (int i = 0; i < s.n; ++i) {
                        const __m256 value = _mm256_set1_ps(x[s.columns[i]]);
                        one = _mm256_fmadd_ps(_mm256_loadu_ps(s.values + 16 * i), value, one);
                        two = _mm256_fmadd_ps(_mm256_loadu_ps(s.values + 16 * i + 8), value, two);
                    }
                    _mm256_storeu_ps(total[b], one), _mm256_storeu_ps(total[b] + 8, two);
                }
            }
        }
        for (int64_t b = 0; b < in.batch; ++b)
            for (int64_t r = 0, row = group * m.block; r < m.block && row < m.rows; ++r, ++row)
                y[b * m.rows + row] = total[b][r] + (bias ? bias[row] : 0.0f);
    }
}

template <int KIND, int B, bool WHOLE>
void few_rows(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        float out[B];
        if (KIND == I8 || KIND == I4) {
            row_in_integers<KIND, B, WHOLE>(m, in, row, out);
        } else {
            row_in_float<KIND, B>(m, in, row, out);
        }
        for (int b = 0; b < B; ++b) y[b * m.rows + row] = out[b] + (bias ? bias[row] : 0.0f);
    }
}

using Few = void (*)(const Matrix&, const Inputs&, const float*, float*, int64_t, int64_t);

template <int KIND, bool WHOLE>
Few few_for(int64_t batch) {
    if (batch == 1) return few_rows<KIND, 1, WHOLE>;
    if (batch == 2) return few_rows<KIND, 2, WHOLE>;
    if (batch == 3) return few_rows<KIND, 3, WHOLE>;
    return few_rows<KIND, 4, WHOLE>;
}

void few(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    Few function = few_units;
    if (m.form == DENSE && m.kind == I8 && m.block == 1) {
        function = few_for<I8, true>(in.batch);
    } else if (m.form == BITMASK && m.block == 1) {
        if (m.kind == F32) function = few_for<F32, false>(in.batch);
        if (m.kind == BF16) function = few_for<BF16, false>(in.batch);
        if (m.kind == F16) function = few_for<F16, false>(in.batch);
        if (m.kind == I8) function = few_for<I8, false>(in.batch);
        if (m.kind == I4) function = few_for<I4, false>(in.batch);
    }
    function(m, in, bias, y, first, last);
}

// Rows of a block times V vectors of tokens; U sums run side by side so that additions do not wait for each other
template <int V, int U>
ALWAYS void lanes_of_row(const Stretch& s, const float* x, float* y) {
    __m256 total[U][V];
    for (int u = 0; u < U; ++u)
        for (int v = 0; v < V; ++v) total[u][v] = u ? _mm256_setzero_ps() : _mm256_loadu_ps(y + 8 * v);
    int i = 0;
    for (; i + U <= s.n; i += U)
        for (int u = 0; u < U; ++u) {
            const __m256 w = _mm256_broadcast_ss(s.values + i + u);
            const float* at = x + int64_t(s.columns[i + u]) * (8 * V);
            for (int v = 0; v < V; ++v) total[u][v] = _mm256_fmadd_ps(w, _mm256_loadu_ps(at + 8 * v), total[u][v]);
        }
    for (; i < s.n; ++i) {
        const __m256 w = _mm256_broadcast_ss(s.values + i);
        const float* at = x + int64_t(s.columns[i]) * (8 * V);
        for (int v = 0; v < V; ++v) total[0][v] = _mm256_fmadd_ps(w, _mm256_loadu_ps(at + 8 * v), total[0][v]);
    }
    for (int v = 0; v < V; ++v) {
        for (int u = 1; u < U; ++u) total[0][v] = _mm256_add_ps(total[0][v], total[u][v]);
        _mm256_storeu_ps(y + 8 * v, total[0][v]);
    }
}

template <int V>
ALWAYS void lanes_of_block(const Stretch& s, int block, const float* x, float* y) {
    for (int from = 0; from < block; from += 4, y += 4 * 8 * V) {
        __m256 total[4][V];
        for (int r = 0; r < 4; ++r)
            for (int v = 0; v < V; ++v) total[r][v] = _mm256_loadu_ps(y + (r * V + v) * 8);
        for (int i = 0; i < s.n; ++i) {
            const float *w = s.values + i * block + from, *at = x + int64_t(s.columns[i]) * (8 * V);
            __m256 value[V];
            for (int v = 0; v < V; ++v) value[v] = _mm256_loadu_ps(at + 8 * v);
            for (int r = 0; r < 4; ++r) {
                const __m256 one = _mm256_broadcast_ss(w + r);
                for (int v = 0; v < V; ++v) total[r][v] = _mm256_fmadd_ps(one, value[v], total[r][v]);
            }
        }
        for (int r = 0; r < 4; ++r)
            for (int v = 0; v < V; ++v) _mm256_storeu_ps(y + (r * V + v) * 8, total[r][v]);
    }
}

void many(const Matrix& m, const float* x, int lanes, float* y, int64_t first, int64_t last) {
    Stretch s;
    int64_t at[PANEL];
    for (int64_t group = first; group < last; ++group) at[group - first] = m.offsets[group];
    const int64_t width = m.form == INDEX ? SPAN : WORD;
    for (int64_t number = 0; number < m.words; ++number) {
        const float* here = x + number * width * lanes;
        for (int64_t group = first; group < last; ++group) {
            stretch(m, group, number, at[group - first], s);
            at[group - first] += int64_t(s.n) * m.block;
            float* out = y + (group - first) * m.block * lanes;
            if (m.block > 1) {
                lanes == 8 ? lanes_of_block<1>(s, m.block, here, out) : lanes_of_block<2>(s, m.block, here, out);
            } else if (lanes == 8) {
                lanes_of_row<1, 8>(s, here, out);
            } else if (lanes == 16) {
                lanes_of_row<2, 4>(s, here, out);
            } else if (lanes == 32) {
                lanes_of_row<4, 2>(s, here, out);
            } else {
                lanes_of_row<8, 1>(s, here, out);
            }
        }
    }
}

const Kernels table = {few, many};

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels* avx2_kernels() {
    static const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
                             __builtin_cpu_supports("f16c") && fill();
    return here ? &table : nullptr;
}

}  // namespace sparse

#endif
