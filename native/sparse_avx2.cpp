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

#include "processor.h"
#include "sparse_avx2.h"

namespace sparse {
namespace {

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

constexpr int64_t AHEAD = 16;  // words of 4-bit codes that are decoded at a time

// 4-bit codes from a whole byte on, looked up in the codebook; writes up to 31 more than asked for
ALWAYS void decode_codes(const uint8_t* codes, int64_t count, __m128i codebook, int8_t* out) {
    const __m128i fifteen = _mm_set1_epi8(15);
    for (int64_t i = 0; i < count; i += 32) {
        const __m128i both = _mm_loadu_si128((const __m128i*)(codes + i / 2));
        const __m128i even = _mm_shuffle_epi8(codebook, _mm_and_si128(both, fifteen));
        const __m128i odd = _mm_shuffle_epi8(codebook, _mm_and_si128(_mm_srli_epi16(both, 4), fifteen));
        _mm_storeu_si128((__m128i*)(out + i), _mm_unpacklo_epi8(even, odd));
        _mm_storeu_si128((__m128i*)(out + i + 16), _mm_unpackhi_epi8(even, odd));
    }
}

// sums of signed bytes times signed bytes, both in [-127, 127], four at a time
ALWAYS __m256i dot_bytes(__m256i sum, __m256i w, const int8_t* at, const int8_t* magnitudes) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)at);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i*)magnitudes), _mm256_sign_epi8(w, x));
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
    constexpr int64_t ODD = KIND == BF16 ? 16 : 8;  // where the second half of 16 columns lies
    __m256 total[B][2];
    for (int b = 0; b < B; ++b) total[b][0] = total[b][1] = _mm256_setzero_ps();
    for (int64_t word = 0; word < number; ++word) {
        if (!mask[word]) continue;
        const char* next = KIND == F32 ? (const char*)words + 1024 : (const char*)halves + 512;
        _mm_prefetch(next, _MM_HINT_T0);
        if (KIND == F32) _mm_prefetch(next + 64, _MM_HINT_T0);
        const uint8_t* bits = (const uint8_t*)(mask + word);  // x86 puts the lowest byte first
        const float* at = x + word * WORD;
        _Pragma("GCC unroll 4") for (int part = 0; part < 4; at += KIND == BF16 ? (part % 2 ? 24 : 8) : 16, ++part) {
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
                total[b][1] = _mm256_fmadd_ps(w[1], _mm256_loadu_ps(at + ODD + b * padded), total[b][1]);
            }
        }
    }
    for (int b = 0; b < B; ++b) out[b] = sum(_mm256_add_ps(total[b][0], total[b][1]));
}

// The values of a row as signed bytes, word after word: int8 as they lie, int4 decoded a few words ahead.
template <int KIND>
struct Bytes {
    const uint64_t* mask;
    const int8_t* at;
    int64_t code, words;
    const uint8_t* codes;
    __m128i codebook;
    alignas(32) int8_t room[AHEAD * WORD + 64];

    ALWAYS void start(const Matrix& m, int64_t row) {
        mask = m.mask ? m.mask + row * m.words : nullptr, words = m.words;
        at = (const int8_t*)m.values + m.offsets[row];
        if (KIND == I4) {
            codes = (const uint8_t*)m.values, code = m.offsets[row];
            codebook = _mm_loadu_si128((const __m128i*)m.codebook);
        }
    }

    ALWAYS void reach(int64_t word) {
        if (KIND == I8) {
            _mm_prefetch((const char*)at + 1024, _MM_HINT_T0);
        } else if (word % AHEAD == 0) {
            int64_t count = 0;
            for (int64_t i = word; i < word + AHEAD && i < words; ++i) count += __builtin_popcountll(mask[i]);
            decode_codes(codes + (code >> 1), count + (code & 1), codebook, room);
            at = room + (code & 1), code += count;
        }
    }
};

// One row, expanded in registers. Whole words share a scale: see `_wrong_scale` in secateur/deploy/sparse/store.py.
template <int KIND, int B, bool WHOLE>
ALWAYS void row_in_integers(const Matrix& m, const Inputs& in, int64_t row, float* out) {
    Bytes<KIND> bytes;
    bytes.start(m, row);
    const uint64_t* mask = bytes.mask;
    const int8_t* at = bytes.at;
    const int8_t *inputs = in.integers, *magnitudes = in.magnitudes;
    const int64_t padded = in.padded, words = m.words;
    const int64_t reach = m.scales == 1 ? m.words : m.columns / m.scales / WORD;
    __m256 all[B];
    for (int b = 0; b < B; ++b) all[b] = _mm256_setzero_ps();
    for (int64_t word = 0, scale = 0; word < words; ++scale) {
        __m256i total[B];
        for (int b = 0; b < B; ++b) total[b] = _mm256_setzero_si256();
        const int64_t stop = word + reach < words ? word + reach : words;
        for (; word < stop; ++word) {
            if (KIND == I4 && word % AHEAD == 0) bytes.reach(word), at = bytes.at;
            if (KIND == I8 && !WHOLE) _mm_prefetch((const char*)at + 1024, _MM_HINT_T0);
            const uint8_t* bits = (const uint8_t*)(mask + word);  // x86 puts the lowest byte first
            for (int part = 0; part < 2; ++part) {
                const int64_t x = word * WORD + 32 * part;
                const __m256i w = WHOLE ? _mm256_loadu_si256((const __m256i*)(at + x)) : expand_bytes(at, bits + 4 * part);
                for (int b = 0; b < B; ++b)
                    total[b] = dot_bytes(total[b], w, inputs + b * padded + x, magnitudes + b * padded + x);
            }
        }
        const __m256 factor = _mm256_broadcast_ss(m.scale + row * m.scales + scale);
        for (int b = 0; b < B && m.scales == 1; ++b) out[b] = float(sum(total[b])) * m.scale[row];
        for (int b = 0; b < B; ++b) all[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[b]), factor, all[b]);
    }
    for (int b = 0; b < B; ++b) out[b] = (m.scales == 1 ? out[b] : sum(all[b])) * in.factor[b];
}

constexpr int64_t DEEP = 4096;  // columns of a panel: four rows of bytes in the nearest cache

// Four rows of bytes times T tokens over `words` words; `ahead` bytes further on lie the next four
template <int T>
ALWAYS void four_rows(
    const int8_t* const* w, int64_t ahead, const int8_t* x, int64_t padded, int64_t words, int64_t reach,
    const float* const* scale, float (*out)[4]
) {
    __m256 all[4][T];
    for (int r = 0; r < 4; ++r)
        for (int t = 0; t < T; ++t) all[r][t] = _mm256_setzero_ps();
    for (int64_t word = 0, number = 0; word < words; ++number) {
        __m256i total[4][T];
        for (int r = 0; r < 4; ++r)
            for (int t = 0; t < T; ++t) total[r][t] = _mm256_setzero_si256();
        const int64_t stop = word + reach < words ? word + reach : words;
        for (; word < stop; ++word) {
            if (ahead)
                for (int r = 0; r < 4; ++r) _mm_prefetch((const char*)w[r] + word * WORD + ahead, _MM_HINT_T0);
            for (int64_t at = word * WORD; at < word * WORD + WORD; at += 32) {
                __m256i values[T], magnitudes[T];
                for (int t = 0; t < T; ++t) {
                    values[t] = _mm256_loadu_si256((const __m256i*)(x + t * padded + at));
                    magnitudes[t] = _mm256_abs_epi8(values[t]);
                }
                for (int r = 0; r < 4; ++r) {
                    const __m256i row = _mm256_loadu_si256((const __m256i*)(w[r] + at));
                    for (int t = 0; t < T; ++t) {
                        const __m256i pairs = _mm256_maddubs_epi16(magnitudes[t], _mm256_sign_epi8(row, values[t]));
                        total[r][t] = _mm256_add_epi32(total[r][t], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                    }
                }
            }
        }
        for (int r = 0; r < 4; ++r) {
            const __m256 factor = _mm256_broadcast_ss(scale[r] + number);
            for (int t = 0; t < T; ++t) {
                if (words <= reach) out[t][r] = float(sum(total[r][t])) * *scale[r];
                all[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[r][t]), factor, all[r][t]);
            }
        }
    }
    if (words <= reach) return;
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < 4; ++r) out[t][r] = sum(all[r][t]);
}

// Any number of tokens: four rows at a time are expanded into the nearest cache, or lie there as they are (DENSE)
template <int KIND, bool WHOLE>
void panels(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    alignas(64) int8_t room[4][DEEP + 64];
    Bytes<KIND> bytes[4];
    const int64_t reach = m.scales == 1 ? m.words : m.columns / m.scales / WORD;
    for (int64_t row = first; row < last; row += 4) {
        const int rows = int(last - row < 4 ? last - row : 4);
        const int8_t* w[4];
        const float* scale[4];
        if (!WHOLE)
            for (int r = 0; r < rows; ++r) bytes[r].start(m, row + r);
        // as deep as the nearest cache holds, and no further than whole scales, or than one
        const int64_t step = WHOLE ? m.words : reach < DEEP / WORD ? DEEP / WORD / reach * reach : DEEP / WORD;
        for (int64_t word = 0, stop; word < m.words; word = stop) {
            stop = word + step < m.words ? word + step : m.words;
            if (reach > step && stop > (word / reach + 1) * reach) stop = (word / reach + 1) * reach;
            for (int r = 0; r < 4; ++r) {
                const int64_t here = row + (r < rows ? r : 0);
                scale[r] = m.scale + here * m.scales + word / reach;
                w[r] = WHOLE ? (const int8_t*)m.values + m.offsets[here] : room[r < rows ? r : 0];
                if (WHOLE || r >= rows) continue;
                for (int64_t i = word; i < stop; ++i) {
                    bytes[r].reach(i);
                    const uint8_t* bits = (const uint8_t*)(bytes[r].mask + i);
                    __m256i* out = (__m256i*)(room[r] + (i - word) * WORD);
                    _mm256_store_si256(out, expand_bytes(bytes[r].at, bits));
                    _mm256_store_si256(out + 1, expand_bytes(bytes[r].at, bits + 4));
                }
            }
            const int64_t ahead = WHOLE && in.batch <= FEW ? 4 * m.columns : 0;
            for (int64_t b = 0; b < in.batch; b += 2) {
                float out[2][4];
                const int8_t* x = in.integers + b * in.padded + word * WORD;
                const int tokens = b + 1 < in.batch ? 2 : 1;
                if (tokens == 2) {
                    four_rows<2>(w, ahead, x, in.padded, stop - word, reach, scale, out);
                } else {
                    four_rows<1>(w, ahead, x, in.padded, stop - word, reach, scale, out);
                }
                for (int t = 0; t < tokens; ++t)
                    for (int r = 0; r < rows; ++r) {
                        float* to = y + (b + t) * m.rows + row + r;
                        const float before = word ? *to : bias ? bias[row + r] : 0.0f;
                        *to = out[t][r] * in.factor[b + t] + before;
                    }
            }
        }
    }
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
            uint64_t raw;
            std::memcpy(&raw, (const uint8_t*)m.values + ((at + i) >> 1), 8);
            const uint64_t spread = _pdep_u64(raw >> (4 * (at & 1)), 0x0f0f0f0f0f0f0f0full);
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
    uint8_t listed[WORD + 16], first[WORD];
    float room[SPAN * 16 + 16];
    const uint8_t* columns;
    const float* values;
    int n;
};

ALWAYS void stretch(const Matrix& m, int64_t group, int64_t number, int64_t at, Stretch& s) {
    if (m.form == INDEX) {
        s.n = m.counts[group * m.words + number];
        s.columns = m.index + at;
    } else if (m.form == SEMI) {
        s.n = columns_of_word(m, group, at, s.first, s.listed), s.columns = s.listed;
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
    if (m.block > 1) {  // whole words share a scale
        const int64_t place = m.scales == 1 ? 0 : number * WORD / (m.columns / m.scales);
        float factor[16];
        for (int r = 0; r < 16; ++r) {
            const int64_t row = group * m.block + r % m.block;
            factor[r] = row < m.rows ? m.scale[row * m.scales + place] : 0.0f;
        }
        for (int64_t i = 0; i < count; i += 8)
            _mm256_storeu_ps(s.room + i, _mm256_mul_ps(_mm256_loadu_ps(s.room + i), _mm256_loadu_ps(factor + i % 16)));
    } else if (m.scales == 1) {
        const __m256 scale = _mm256_set1_ps(m.scale[group]);
        for (int64_t i = 0; i < count; i += 8)
            _mm256_storeu_ps(s.room + i, _mm256_mul_ps(_mm256_loadu_ps(s.room + i), scale));
    } else {
        const int64_t width = m.columns / m.scales, start = number * (m.form == INDEX ? SPAN : WORD);
        for (int64_t i = 0; i < count; ++i) s.room[i] *= m.scale[group * m.scales + (start + s.columns[i]) / width];
    }
}

ALWAYS __m256i in_both(__m128i a) { return _mm256_broadcastsi128_si256(a); }

// Bytes in which four columns of a row lie side by side: of 8 units of 4 rows, or of 4 units of 16
template <int KIND, int BLOCK>
ALWAYS void turn(const uint8_t* w, __m256i codebook, __m256i* out) {
    const __m256i fours = in_both(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i fifteen = _mm256_set1_epi8(15);
    if (KIND == I8 && BLOCK == 4) {
        out[0] = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)w), fours);
    } else if (KIND == I4 && BLOCK == 4) {  // rows 0 and 2 in one half, each twice, rows 1 and 3 in the other
        const __m256i order = in_both(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
        const __m256i raw = in_both(_mm_loadu_si128((const __m128i*)w));
        const __m256i codes = _mm256_srlv_epi32(raw, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        out[0] = _mm256_shuffle_epi8(_mm256_shuffle_epi8(codebook, _mm256_and_si256(codes, fifteen)), order);
    } else if (KIND == I4) {  // even rows, then odd ones
        const __m256i raw = _mm256_permutevar8x32_epi32(
            _mm256_loadu_si256((const __m256i*)w), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)
        );
        const __m256i even = _mm256_and_si256(raw, fifteen), odd = _mm256_and_si256(_mm256_srli_epi16(raw, 4), fifteen);
        out[0] = _mm256_shuffle_epi8(_mm256_shuffle_epi8(codebook, even), fours);
        out[1] = _mm256_shuffle_epi8(_mm256_shuffle_epi8(codebook, odd), fours);
    } else {  // rows 0-3 and 8-11, then 4-7 and 12-15
        const __m256i order = in_both(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
        __m256i pair[2];
        for (int i = 0; i < 2; ++i) {
            const __m256i two = _mm256_loadu_si256((const __m256i*)(w + 32 * i));
            pair[i] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(two, 0xd8), order);
        }
        out[0] = _mm256_unpacklo_epi16(pair[0], pair[1]);
        out[1] = _mm256_unpackhi_epi16(pair[0], pair[1]);
    }
}

// Sums in the lanes of `turn`, as rows of the block
template <int KIND, int BLOCK>
ALWAYS void rows_of(const __m256i* lanes, __m128i* out) {
    const __m128i low = _mm256_castsi256_si128(lanes[0]), high = _mm256_extracti128_si256(lanes[0], 1);
    if (BLOCK == 4) {
        out[0] = KIND == I8 ? _mm_add_epi32(low, high) : _mm_shuffle_epi32(_mm_hadd_epi32(low, high), 0xd8);
        return;
    }
    __m256i two[2] = {lanes[0], lanes[BLOCK == 16]};
    if (KIND == I4) {
        two[0] = _mm256_unpacklo_epi32(lanes[0], lanes[BLOCK == 16]);
        two[1] = _mm256_unpackhi_epi32(lanes[0], lanes[BLOCK == 16]);
    }
    for (int i = 0; i < BLOCK / 8; ++i) {
        out[i] = _mm256_castsi256_si128(two[i]);
        out[2 + i] = _mm256_extracti128_si256(two[i], 1);
    }
}

// Four inputs for each row, as `turn` lays them
template <int KIND, int BLOCK>
ALWAYS __m256i inputs_of(const int8_t* kept) {
    int64_t eight;
    std::memcpy(&eight, kept, 8);
    if (BLOCK == 16) return _mm256_set1_epi32(int32_t(eight));
    if (KIND == I4) return _mm256_set1_epi64x(eight);
    const __m256i where = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_cvtsi64_si128(eight)), where);
}

template <int KIND, int BLOCK, int T>
ALWAYS void blocks_in_integers(const Matrix& m, const Inputs& in, int64_t group, int64_t b, float (*out)[16]) {
    constexpr int VECTORS = BLOCK == 4 ? 1 : 2, UNITS = BLOCK == 4 ? 8 : 4, PER = KIND == I4 ? 2 : 1;  // values a byte
    int8_t kept[T][FLOCK * WORD + 64];
    const uint64_t* mask = m.mask + group * m.words;
    const int64_t words = m.words, reach = m.scales == 1 ? m.words : m.columns / m.scales / WORD;
    const int64_t rows = m.rows - group * BLOCK;
    const __m256i codebook = KIND == I4 ? in_both(_mm_loadu_si128((const __m128i*)m.codebook)) : _mm256_setzero_si256();
    const uint8_t* stream = (const uint8_t*)m.values + m.offsets[group] / PER;
    __m128 all[T][BLOCK / 4];
    for (int k = 0; k < T; ++k)
        for (int i = 0; i < BLOCK / 4; ++i) all[k][i] = _mm_setzero_ps();
    for (int64_t word = 0, scale = 0; word < words; ++scale) {
        __m256i total[T][VECTORS];
        for (int k = 0; k < T; ++k)
            for (int v = 0; v < VECTORS; ++v) total[k][v] = _mm256_setzero_si256();
        const int64_t end = word + reach < words ? word + reach : words;
        for (int64_t stop; word < end; word = stop) {
            stop = word + FLOCK < end ? word + FLOCK : end;
            const int8_t* x = in.integers + b * in.padded + word * WORD;
            const int64_t n = keep<int8_t, T>(mask + word, stop - word, x, in.padded, kept);
            for (int64_t i = 0; i < n; i += UNITS) {
                const uint8_t* w = stream + i * (BLOCK / PER);
                _mm_prefetch((const char*)w + 2048, _MM_HINT_T0);
                __m256i turned[VECTORS];
                turn<KIND, BLOCK>(w, codebook, turned);
                for (int k = 0; k < T; ++k) {
                    const __m256i some = inputs_of<KIND, BLOCK>(kept[k] + i), magnitudes = _mm256_abs_epi8(some);
                    for (int v = 0; v < VECTORS; ++v) {
                        const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(turned[v], some));
                        total[k][v] = _mm256_add_epi32(total[k][v], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                    }
                }
            }
            stream += n * (BLOCK / PER);
        }
        __m128 factor[BLOCK / 4];
        for (int i = 0; i < BLOCK / 4; ++i) {
            const float* at[4];
            for (int r = 0; r < 4; ++r)  // rows behind the last one have no scale, and their sums are not used
                at[r] = m.scale + (group * BLOCK + (4 * i + r < rows ? 4 * i + r : 0)) * m.scales + scale;
            factor[i] = _mm_setr_ps(*at[0], *at[1], *at[2], *at[3]);
        }
        for (int k = 0; k < T; ++k) {
            __m128i found[BLOCK / 4];
            rows_of<KIND, BLOCK>(total[k], found);
            for (int i = 0; i < BLOCK / 4; ++i)
                all[k][i] = _mm_add_ps(all[k][i], _mm_mul_ps(_mm_cvtepi32_ps(found[i]), factor[i]));
        }
    }
    for (int k = 0; k < T; ++k)
        for (int i = 0; i < BLOCK / 4; ++i)
            _mm_storeu_ps(out[k] + 4 * i, _mm_mul_ps(all[k][i], _mm_set1_ps(in.factor[b + k])));
}

template <int KIND, int BLOCK, int T>
ALWAYS void blocks_in_float(const Matrix& m, const Inputs& in, int64_t group, int64_t b, float (*out)[16]) {
    constexpr int SIZE = KIND == F32 ? 4 : 2, UNITS = BLOCK == 4 ? 8 : 4;  // that are multiplied side by side
    float kept[T][FLOCK * WORD + 64];
    const uint64_t* mask = m.mask + group * m.words;
    const char* w = (const char*)m.values + m.offsets[group] * SIZE;
    __m256 total[T][4];
    for (int k = 0; k < T; ++k)
        for (int v = 0; v < 4; ++v) total[k][v] = _mm256_setzero_ps();
    for (int64_t word = 0, stop; word < m.words; word = stop) {
        stop = word + FLOCK < m.words ? word + FLOCK : m.words;
        const float* x = in.plain + b * in.padded + word * WORD;
        const int64_t n = keep<float, T>(mask + word, stop - word, x, in.padded, kept);
        const int64_t whole = n / UNITS * UNITS;
        for (int64_t i = 0; i < whole; i += UNITS)
            for (int v = 0; v < UNITS * BLOCK / 8; ++v, w += 8 * SIZE) {
                if (v % 2 == 0) _mm_prefetch(w + 2048, _MM_HINT_T0);
                const __m256 some = eight<KIND>(w);
                for (int k = 0; k < T; ++k) {
                    const float* x = kept[k] + i + v * 8 / BLOCK;
                    __m256 value = _mm256_set1_ps(*x);
                    if (BLOCK == 4) value = _mm256_blend_ps(value, _mm256_set1_ps(x[1]), 0xf0);
                    total[k][v % 4] = _mm256_fmadd_ps(some, value, total[k][v % 4]);
                }
            }
        // the rest in halves: what comes next may be no numbers, and zero times those is none
        for (int64_t i = whole; i < n; ++i)
            for (int v = 0; v < BLOCK / 4; ++v, w += 4 * SIZE) {
                const __m256 some = _mm256_blend_ps(_mm256_setzero_ps(), eight<KIND>(w), 0x0f);
                const __m256 four = v % 2 ? _mm256_permute2f128_ps(some, some, 0x08) : some;
                for (int k = 0; k < T; ++k)
                    total[k][v / 2] = _mm256_fmadd_ps(four, _mm256_set1_ps(kept[k][i]), total[k][v / 2]);
            }
    }
    for (int k = 0; k < T; ++k) {
        const __m256 one = _mm256_add_ps(total[k][0], total[k][2]), two = _mm256_add_ps(total[k][1], total[k][3]);
        if (BLOCK == 4) {
            const __m256 both = _mm256_add_ps(one, two);
            _mm_storeu_ps(out[k], _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
        } else {
            _mm256_storeu_ps(out[k], one), _mm256_storeu_ps(out[k] + 8, two);
        }
    }
}

template <int KIND, int BLOCK, int T>
ALWAYS void blocks(const Matrix& m, const Inputs& in, int64_t group, int64_t b, float (*out)[16]) {
    if (KIND == I8 || KIND == I4) {
        blocks_in_integers<KIND, BLOCK, T>(m, in, group, b, out);
    } else {
        blocks_in_float<KIND, BLOCK, T>(m, in, group, b, out);
    }
}

template <int KIND, int BLOCK>
void few_blocks(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group)
        for (int64_t b = 0; b < in.batch;) {
            float out[2][16];
            const int tokens = in.batch - b >= 2 ? 2 : 1;
            if (tokens == 2) blocks<KIND, BLOCK, 2>(m, in, group, b, out);
            if (tokens == 1) blocks<KIND, BLOCK, 1>(m, in, group, b, out);
            for (int k = 0; k < tokens; ++k, ++b)
                for (int64_t r = 0, row = group * BLOCK; r < BLOCK && row < m.rows; ++r, ++row)
                    y[b * m.rows + row] = out[k][r] + (bias ? bias[row] : 0.0f);
        }
}

// The index form, one row at a time: columns as 16 bits over the whole of up to FLAT columns, so that no short loop ends in
// every span, and inputs gathered.
constexpr int64_t FLAT = 16384;

void few_gathered(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    uint16_t columns[FLAT + 16];
    alignas(32) float room[FLAT + 16];
    const int64_t size = m.offsets[m.groups], width = m.columns / m.scales;
    const int shift = width & (width - 1) ? -1 : __builtin_ctzll(uint64_t(width));
    for (int64_t row = first; row < last; ++row) {
        int64_t at = m.offsets[row];
        float total[FEW] = {0};
        for (int64_t span = 0; span < m.words; span += FLAT / SPAN) {
            const int64_t stop = span + FLAT / SPAN < m.words ? span + FLAT / SPAN : m.words;
            int64_t n = 0;
            for (int64_t i = span; i < stop; ++i) {
                const int count = m.counts[row * m.words + i];
                const __m256i base = _mm256_set1_epi16(int16_t((i - span) * SPAN));
                int k = 0;
                // whole vectors, the last over what comes next, except where nothing comes next
                for (; k < count && at + n + k + 16 <= size; k += 16) {
                    const __m128i some = _mm_loadu_si128((const __m128i*)(m.index + at + n + k));
                    _mm256_storeu_si256((__m256i*)(columns + n + k), _mm256_add_epi16(base, _mm256_cvtepu8_epi16(some)));
                }
                for (; k < count; ++k) columns[n + k] = uint16_t((i - span) * SPAN + m.index[at + n + k]);
                n += count;
            }
            const float* values = (const float*)m.values + at;
            if (m.kind != F32) widen(m, at, n, room), values = room;
            if (m.scales > 1) {
                const float* scale = m.scale + row * m.scales;
                int64_t i = 0;
                for (; shift >= 0 && i + 8 <= n; i += 8) {
                    const __m128i some = _mm_loadu_si128((const __m128i*)(columns + i));
                    const __m256i column = _mm256_add_epi32(
                        _mm256_cvtepu16_epi32(some), _mm256_set1_epi32(int32_t(span * SPAN))
                    );
                    const __m256 found = _mm256_i32gather_ps(scale, _mm256_srl_epi32(column, _mm_cvtsi32_si128(shift)), 4);
                    _mm256_storeu_ps(room + i, _mm256_mul_ps(_mm256_loadu_ps(room + i), found));
                }
                for (; i < n; ++i) room[i] *= scale[(span * SPAN + columns[i]) / width];
            }
            for (int64_t b = 0; b < in.batch; ++b) {
                const float* x = in.plain + b * in.padded + span * SPAN;
                __m256 one = _mm256_setzero_ps(), two = _mm256_setzero_ps();
                int64_t i = 0;
                for (; i + 16 <= n; i += 16) {
                    const __m256i where = _mm256_loadu_si256((const __m256i*)(columns + i));
                    const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(where));
                    const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(where, 1));
                    one = _mm256_fmadd_ps(_mm256_loadu_ps(values + i), _mm256_i32gather_ps(x, low, 4), one);
                    two = _mm256_fmadd_ps(_mm256_loadu_ps(values + i + 8), _mm256_i32gather_ps(x, high, 4), two);
                }
                float rest = 0;
                for (; i < n; ++i) rest += values[i] * x[columns[i]];
                total[b] += sum(_mm256_add_ps(one, two)) + rest;
            }
            at += n;
        }
        const float factor = m.scale && m.scales == 1 ? m.scale[row] : 1.0f;
        for (int64_t b = 0; b < in.batch; ++b) y[b * m.rows + row] = total[b] * factor + (bias ? bias[row] : 0.0f);
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

template <int KIND, bool WHOLE = false>
Few few_for(int64_t batch) {
    if (batch == 1) return few_rows<KIND, 1, WHOLE>;
    if (batch == 2) return few_rows<KIND, 2, WHOLE>;
    if (batch == 3) return few_rows<KIND, 3, WHOLE>;
    return few_rows<KIND, 4, WHOLE>;
}

template <int KIND>
Few few_of(const Matrix& m, int64_t batch) {
    if (m.block > 1) return m.block == 4 ? few_blocks<KIND, 4> : few_blocks<KIND, 16>;
    return (KIND == I8 || KIND == I4) && batch > FEW ? panels<KIND, false> : few_for<KIND>(batch);
}

void few(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    Few function = few_gathered;
    if (m.form == DENSE) {
        // long rows are read four at a time, or fetching starts anew too often
        function = in.batch > FEW || m.columns >= 2048 ? panels<I8, true> : few_for<I8, true>(in.batch);
    } else if (m.form == BITMASK) {
        if (m.kind == F32) function = few_of<F32>(m, in.batch);
        if (m.kind == BF16) function = few_of<BF16>(m, in.batch);
        if (m.kind == F16) function = few_of<F16>(m, in.batch);
        if (m.kind == I8) function = few_of<I8>(m, in.batch);
        if (m.kind == I4) function = few_of<I4>(m, in.batch);
    }
    if (m.form == SQUARES) function = few_squares_avx2;
    if (m.form == SEMI) function = few_semi_avx2;
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

// V vectors of tokens out of `lanes`
template <int V>
ALWAYS void lanes_of_block(const Stretch& s, int block, const float* x, int lanes, float* y) {
    for (int from = 0; from < block; from += 4, y += 4 * lanes) {
        __m256 total[4][V];
        for (int r = 0; r < 4; ++r)
            for (int v = 0; v < V; ++v) total[r][v] = _mm256_loadu_ps(y + r * lanes + 8 * v);
        for (int i = 0; i < s.n; ++i) {
            const float *w = s.values + i * block + from, *at = x + int64_t(s.columns[i]) * lanes;
            __m256 value[V];
            for (int v = 0; v < V; ++v) value[v] = _mm256_loadu_ps(at + 8 * v);
            for (int r = 0; r < 4; ++r) {
                const __m256 one = _mm256_broadcast_ss(w + r);
                for (int v = 0; v < V; ++v) total[r][v] = _mm256_fmadd_ps(one, value[v], total[r][v]);
            }
        }
        for (int r = 0; r < 4; ++r)
            for (int v = 0; v < V; ++v) _mm256_storeu_ps(y + r * lanes + 8 * v, total[r][v]);
    }
}

void many(const Matrix& m, const float* x, int lanes, float* y, int64_t first, int64_t last) {
    Stretch s;
    if (m.form == SEMI) units_of_word(m, s.first);
    int64_t at[PANEL];
    for (int64_t group = first; group < last; ++group) at[group - first] = m.offsets[group];
    const int64_t width = m.form == INDEX ? SPAN : WORD;
    for (int64_t number = 0; number < m.words; ++number) {
        const float* here = x + number * width * lanes;
        for (int64_t group = first; group < last; ++group) {
            stretch(m, group, number, at[group - first], s);
            at[group - first] += int64_t(s.n) * m.block;
            fetch_next(m, group, number, at[group - first], int64_t(s.n) * m.block);
            float* out = y + (group - first) * m.block * lanes;
            if (m.block > 1) {
                if (lanes == 8) lanes_of_block<1>(s, m.block, here, lanes, out);
                for (int lane = 0; lane + 16 <= lanes; lane += 16)  // as many as registers hold
                    lanes_of_block<2>(s, m.block, here + lane, lanes, out + lane);
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

const Kernels table = {few, many, nullptr, squares_avx2, 64};

}  // namespace

AVX2_END

const Kernels* avx2_kernels() {
    static const bool here = has_avx2() && fill();
    return here ? &table : nullptr;
}

}  // namespace sparse

#endif
