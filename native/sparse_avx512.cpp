// The kernels for AVX-512 with VBMI2 and VNNI: Ice Lake, Zen 4 and later.
//
// One instruction expands packed values, one compresses the inputs that a mask keeps, one adds products of bytes. Bytes are
// signed times unsigned there: inputs come with 128 added, and 128 times the sum of the weights is taken off again, lane
// by lane, so that sums stay exact. What has no better way here (8 tokens, the index form) is left to AVX2.

#include <cstdint>
#include <cstring>

#include "sparse.h"

#if !defined(__x86_64__) || !(defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 9))

namespace sparse {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace sparse

#else

#include "processor.h"
#include "sparse_avx512.h"

namespace sparse {
namespace {

const Kernels* narrow;  // those of AVX2

// Into the second cache, well ahead: of what was tried (none; the first cache, 1 KB ahead; this) it came nearest to what memory gives
ALWAYS void fetch(const void* values) { _mm_prefetch((const char*)values + 2048, _MM_HINT_T1); }
ALWAYS void fetch_mask(const uint64_t* mask, int64_t word) {
    if (word % 8 == 0) _mm_prefetch((const char*)(mask + word) + 1024, _MM_HINT_T1);
}

// 16 values of the stream as float32, those of the mask
template <int KIND>
ALWAYS __m512 sixteen(const char* at, uint32_t mask) {
    if (KIND == F32) return _mm512_maskz_loadu_ps(__mmask16(mask), (const float*)at);
    const __m256i raw = _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(__mmask32(mask & 0xffff), at));
    if (KIND == F16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// Integer sums of B tokens, each with 128 times the sum of the weights in it
template <int B>
struct Sums {
    __m512i total[B], weights;

    ALWAYS void start() {
        weights = _mm512_setzero_si512();
        for (int b = 0; b < B; ++b) total[b] = _mm512_setzero_si512();
    }
    ALWAYS void weigh(__m512i w) { add_dots(weights, _mm512_set1_epi8(char(-128)), w); }
    ALWAYS void add(__m512i w, const uint8_t* x, int64_t padded) {
        weigh(w);
        for (int b = 0; b < B; ++b) add_dots(total[b], _mm512_loadu_si512(x + b * padded), w);
    }
    ALWAYS __m512i lanes(int b) const { return _mm512_sub_epi32(total[b], weights); }
};

template <int KIND, int B>
ALWAYS void row_in_float(const Matrix& m, const Inputs& in, int64_t row, float* out) {
    constexpr int SIZE = KIND == F32 ? 4 : 2;
    const uint64_t* mask = m.mask + row * m.words;
    const char* values = (const char*)m.values + m.offsets[row] * SIZE;
    const float* x = KIND == BF16 ? in.paired : in.plain;
    const int64_t padded = in.padded, words = m.words;
    __m512 total[B][4];
    for (int b = 0; b < B; ++b)
        for (int part = 0; part < 4; ++part) total[b][part] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; ++word) {
        const uint64_t bits = mask[word];
        if (!bits) continue;
        fetch(values);
        if (KIND == F32) fetch(values + 64);
        fetch_mask(mask, word);
        const float* at = x + word * WORD;
        __m512 w[4];
        if (KIND == F32) {
            for (int part = 0; part < 4; ++part) {
                const char* from = values + 4 * kept(bits & lowest(16 * part));
                w[part] = _mm512_maskz_expand_ps(__mmask16(bits >> (16 * part)), _mm512_loadu_ps(from));
            }
        } else {
            for (int half = 0; half < 2; ++half) {
                const char* from = values + 2 * kept(bits & lowest(32 * half));
                const __m512i both = _mm512_maskz_expand_epi16(__mmask32(bits >> (32 * half)), _mm512_loadu_si512(from));
                if (KIND == BF16) {
                    w[2 * half] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
                    w[2 * half + 1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int32_t(0xffff0000u))));
                } else {
                    w[2 * half] = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
                    w[2 * half + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
                }
            }
        }
        values += SIZE * kept(bits);
        for (int b = 0; b < B; ++b)
            for (int part = 0; part < 4; ++part)
                total[b][part] = _mm512_fmadd_ps(w[part], _mm512_loadu_ps(at + b * padded + 16 * part), total[b][part]);
    }
    for (int b = 0; b < B; ++b)
        out[b] = _mm512_reduce_add_ps(
            _mm512_add_ps(_mm512_add_ps(total[b][0], total[b][1]), _mm512_add_ps(total[b][2], total[b][3]))
        );
}

template <int KIND, int B>
ALWAYS void row_in_integers(const Matrix& m, const Inputs& in, int64_t row, float* out) {
    const uint64_t* mask = m.mask + row * m.words;
    const uint8_t *values = (const uint8_t*)m.values, *x = in.shifted;
    const int64_t padded = in.padded, words = m.words, reach = words_of_scale(m);
    const __m512i codebook = codebook_of(m);
    int64_t at = m.offsets[row];
    __m512 all[B];
    for (int b = 0; b < B; ++b) all[b] = _mm512_setzero_ps();
    for (int64_t word = 0, scale = 0; word < words; ++scale) {
        Sums<B> one, two;  // side by side, so that additions do not wait for each other
        one.start(), two.start();
        const int64_t stop = word + reach < words ? word + reach : words;
        for (; word + 2 <= stop; word += 2) {
            fetch(values + (KIND == I4 ? at >> 1 : at));
            fetch_mask(mask, word);
            one.add(expand_bytes<KIND>(values, at, mask[word], codebook), x + word * WORD, padded);
            two.add(expand_bytes<KIND>(values, at, mask[word + 1], codebook), x + word * WORD + WORD, padded);
        }
        if (word < stop) {
            one.add(expand_bytes<KIND>(values, at, mask[word], codebook), x + word * WORD, padded);
            ++word;
        }
        const float factor = m.scale[row * m.scales + scale];
        for (int b = 0; b < B; ++b) {
            const __m512i lanes = _mm512_add_epi32(one.lanes(b), two.lanes(b));
            if (m.scales == 1)
                out[b] = float(_mm512_reduce_add_epi32(lanes)) * factor;
            else
                all[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lanes), _mm512_set1_ps(factor), all[b]);
        }
    }
    for (int b = 0; b < B; ++b) out[b] = (m.scales == 1 ? out[b] : _mm512_reduce_add_ps(all[b])) * in.factor[b];
}

template <int KIND, int B>
void few_rows(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        float out[B];
        if (KIND == I8 || KIND == I4) {
            row_in_integers<KIND, B>(m, in, row, out);
        } else {
            row_in_float<KIND, B>(m, in, row, out);
        }
        for (int b = 0; b < B; ++b) y[b * m.rows + row] = out[b] + (bias ? bias[row] : 0.0f);
    }
}

constexpr int64_t DEEP = 4096;  // columns of a panel: four rows of bytes in the nearest cache

// Four rows of bytes times T tokens over `words` words; `ahead` bytes further on lie the next four
template <int T>
ALWAYS void four_rows(
    const uint8_t* const* w, int64_t ahead, const uint8_t* x, int64_t padded, int64_t words, int64_t reach,
    const float* const* scale, float (*out)[4]
) {
    __m512 all[4][T];
    for (int r = 0; r < 4; ++r)
        for (int t = 0; t < T; ++t) all[r][t] = _mm512_setzero_ps();
    for (int64_t word = 0, number = 0; word < words; ++number) {
        Sums<T> sums[4];
        for (int r = 0; r < 4; ++r) sums[r].start();
        const int64_t stop = word + reach < words ? word + reach : words;
        for (; word < stop; ++word) {
            if (ahead)
                for (int r = 0; r < 4; ++r) _mm_prefetch((const char*)w[r] + word * WORD + ahead, _MM_HINT_T0);
            for (int r = 0; r < 4; ++r) sums[r].add(_mm512_loadu_si512(w[r] + word * WORD), x + word * WORD, padded);
        }
        for (int r = 0; r < 4; ++r)
            for (int t = 0; t < T; ++t) {
                if (words <= reach)
                    out[t][r] = float(_mm512_reduce_add_epi32(sums[r].lanes(t))) * *scale[r];
                else
                    all[r][t] = _mm512_fmadd_ps(
                        _mm512_cvtepi32_ps(sums[r].lanes(t)), _mm512_set1_ps(scale[r][number]), all[r][t]
                    );
            }
    }
    if (words <= reach) return;
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < 4; ++r) out[t][r] = _mm512_reduce_add_ps(all[r][t]);
}

// Any number of tokens: four rows at a time are expanded into the nearest cache, or lie there as they are (DENSE)
template <int KIND, bool WHOLE>
void panels(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    alignas(64) uint8_t room[4][DEEP + 64];
    int64_t at[4];
    const uint8_t* values = (const uint8_t*)m.values;
    const int64_t reach = words_of_scale(m), ahead = WHOLE && in.batch <= FEW ? 4 * m.columns : 0;
    const __m512i codebook = codebook_of(m);
    for (int64_t row = first; row < last; row += 4) {
        const int rows = int(last - row < 4 ? last - row : 4);
        const uint8_t* w[4];
        const float* scale[4];
        for (int r = 0; r < rows; ++r) at[r] = m.offsets[row + r];
        // as deep as the nearest cache holds, and no further than whole scales, or than one
        const int64_t step = WHOLE ? m.words : reach < DEEP / WORD ? DEEP / WORD / reach * reach : DEEP / WORD;
        for (int64_t word = 0, stop; word < m.words; word = stop) {
            stop = word + step < m.words ? word + step : m.words;
            if (reach > step && stop > (word / reach + 1) * reach) stop = (word / reach + 1) * reach;
            for (int r = 0; r < 4; ++r) {
                const int64_t here = row + (r < rows ? r : 0);
                scale[r] = m.scale + here * m.scales + word / reach;
                w[r] = WHOLE ? values + m.offsets[here] : room[r < rows ? r : 0];
                if (WHOLE || r >= rows) continue;
                const uint64_t* mask = m.mask + here * m.words;
                for (int64_t i = word; i < stop; ++i)
                    _mm512_store_si512(room[r] + (i - word) * WORD, expand_bytes<KIND>(values, at[r], mask[i], codebook));
            }
            for (int64_t b = 0; b < in.batch;) {
                float out[4][4];
                const uint8_t* x = in.shifted + b * in.padded + word * WORD;
                const int tokens = in.batch - b >= 4 ? 4 : in.batch - b >= 2 ? 2 : 1;
                if (tokens == 4) four_rows<4>(w, ahead, x, in.padded, stop - word, reach, scale, out);
                if (tokens == 2) four_rows<2>(w, ahead, x, in.padded, stop - word, reach, scale, out);
                if (tokens == 1) four_rows<1>(w, ahead, x, in.padded, stop - word, reach, scale, out);
                for (int t = 0; t < tokens; ++t, ++b)
                    for (int r = 0; r < rows; ++r) {
                        float* to = y + b * m.rows + row + r;
                        const float before = word ? *to : bias ? bias[row + r] : 0.0f;
                        *to = out[t][r] * in.factor[b] + before;
                    }
            }
        }
    }
}

// Blocks of 4 or 16 rows: the inputs that the mask keeps are put side by side, once for all rows of a block, and the
// stream meets them as if nothing were left out. FLOCK words at a time.
constexpr int64_t FLOCK = 16;

ALWAYS void keep(uint64_t bits, const uint8_t* x, uint8_t* out) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(bits, _mm512_loadu_si512(x)));
}

ALWAYS void keep(uint64_t bits, const float* x, float* out) {
    for (int part = 0; part < 4; ++part) {
        const __m512 some = _mm512_maskz_compress_ps(__mmask16(bits >> (16 * part)), _mm512_loadu_ps(x + 16 * part));
        _mm512_storeu_ps(out + kept(bits & lowest(16 * part)), some);
    }
}

// Kept inputs of T tokens in order, zeros behind the last; returns how many
template <class X, int T>
ALWAYS int64_t keep(const uint64_t* mask, int64_t words, const X* x, int64_t padded, X (*out)[FLOCK * WORD + 64]) {
    int64_t n = 0;
    for (int64_t word = 0; word < words; n += kept(mask[word++]))
        for (int t = 0; t < T; ++t) keep(mask[word], x + t * padded + word * WORD, out[t] + n);
    for (int t = 0; t < T; ++t) std::memset(out[t] + n, 0, 64);
    return n;
}

// Lanes of a vector as rows of a block: of 4 there are four times each
template <int BLOCK>
ALWAYS void rows_of(__m512i lanes, int32_t* out) {
    if (BLOCK == 16) return _mm512_storeu_si512(out, lanes);
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
    const __m128i one = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
    _mm_storeu_si128((__m128i*)out, one);
}

template <int KIND, int BLOCK, int T>
ALWAYS void blocks_in_integers(const Matrix& m, const Inputs& in, int64_t group, int64_t b, float (*out)[16]) {
    constexpr int UNITS = 64 / BLOCK;  // of a vector
    uint8_t inputs[T][FLOCK * WORD + 64];
    const uint64_t* mask = m.mask + group * m.words;
    const uint8_t *values = (const uint8_t*)m.values, *x = in.shifted + b * in.padded;
    const int64_t words = m.words, reach = words_of_scale(m);
    const __m512i codebook = codebook_of(m), turned = _mm512_load_si512(o.turned[BLOCK == 16]);
    const __m512i repeated = _mm512_load_si512(o.repeated[BLOCK == 16]);
    const int64_t rows = m.rows - group * BLOCK;
    int64_t at = m.offsets[group];
    for (int t = 0; t < T; ++t) std::memset(out[t], 0, BLOCK * sizeof(float));
    for (int64_t word = 0, scale = 0; word < words; ++scale) {
        Sums<T> sums;
        sums.start();
        const int64_t end = word + reach < words ? word + reach : words;
        for (int64_t stop; word < end; word = stop) {
            stop = word + FLOCK < end ? word + FLOCK : end;
            const int64_t n = keep<uint8_t, T>(mask + word, stop - word, x + word * WORD, in.padded, inputs);
            for (int64_t i = 0; i < n; i += UNITS, at += 64) {
                const uint64_t here = lowest((n - i) * BLOCK);
                __m512i w;
                if (KIND == I4) {
                    w = _mm512_maskz_mov_epi8(here, codes(values, at, codebook));
                } else {
                    _mm_prefetch((const char*)values + at + 1024, _MM_HINT_T0);
                    w = _mm512_maskz_loadu_epi8(here, values + at);
                }
                w = _mm512_permutexvar_epi8(turned, w);
                sums.weigh(w);
                for (int t = 0; t < T; ++t) {
                    const __m512i some = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(inputs[t] + i)));
                    add_dots(sums.total[t], _mm512_permutexvar_epi32(repeated, some), w);
                }
            }
            if (n % UNITS) at -= 64 - n % UNITS * BLOCK;
        }
        float factor[BLOCK];  // rows behind the last one have none, and no values
        for (int r = 0; r < BLOCK; ++r) factor[r] = m.scale[(group * BLOCK + (r < rows ? r : 0)) * m.scales + scale];
        for (int t = 0; t < T; ++t) {
            int32_t found[16];
            rows_of<BLOCK>(sums.lanes(t), found);
            for (int r = 0; r < BLOCK; ++r) out[t][r] += float(found[r]) * factor[r];
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < BLOCK; ++r) out[t][r] *= in.factor[b + t];
}

template <int KIND, int BLOCK, int T>
ALWAYS void blocks_in_float(const Matrix& m, const Inputs& in, int64_t group, int64_t b, float (*out)[16]) {
    constexpr int SIZE = KIND == F32 ? 4 : 2, UNITS = 16 / BLOCK;
    float inputs[T][FLOCK * WORD + 64];
    const uint64_t* mask = m.mask + group * m.words;
    const char* values = (const char*)m.values + m.offsets[group] * SIZE;
    const __m512i repeated = _mm512_load_si512(o.repeated[BLOCK == 16]);
    __m512 total[T][4];
    for (int t = 0; t < T; ++t)
        for (int part = 0; part < 4; ++part) total[t][part] = _mm512_setzero_ps();
    for (int64_t word = 0, stop; word < m.words; word = stop) {
        stop = word + FLOCK < m.words ? word + FLOCK : m.words;
        const float* x = in.plain + b * in.padded + word * WORD;
        const int64_t n = keep<float, T>(mask + word, stop - word, x, in.padded, inputs);
        for (int64_t i = 0; i < n;) {
            _mm_prefetch(values + 1024, _MM_HINT_T0);
            if (KIND == F32) _mm_prefetch(values + 1024 + 128, _MM_HINT_T0);
            for (int part = 0; part < 4 && i < n; ++part, i += UNITS) {
                // nothing of the next units, which may be no numbers: zero times those is none
                const uint64_t here = lowest((n - i) * BLOCK) & 0xffff;
                const __m512 w = sixteen<KIND>(values, uint32_t(here));
                values += SIZE * kept(here);
                for (int t = 0; t < T; ++t) {
                    __m512 value = _mm512_set1_ps(inputs[t][i]);
                    if (BLOCK == 4) value = _mm512_permutexvar_ps(repeated, _mm512_loadu_ps(inputs[t] + i));
                    total[t][part] = _mm512_fmadd_ps(w, value, total[t][part]);
                }
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        float lanes[16];
        const __m512 low = _mm512_add_ps(total[t][0], total[t][1]), high = _mm512_add_ps(total[t][2], total[t][3]);
        _mm512_storeu_ps(lanes, _mm512_add_ps(low, high));
        for (int r = 0; r < BLOCK; ++r) out[t][r] = lanes[r];
        for (int i = BLOCK; i < 16; ++i) out[t][i % BLOCK] += lanes[i];
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
            float out[4][16];
            const int tokens = in.batch - b >= 4 ? 4 : in.batch - b >= 2 ? 2 : 1;
            if (tokens == 4) blocks<KIND, BLOCK, 4>(m, in, group, b, out);
            if (tokens == 2) blocks<KIND, BLOCK, 2>(m, in, group, b, out);
            if (tokens == 1) blocks<KIND, BLOCK, 1>(m, in, group, b, out);
            for (int t = 0; t < tokens; ++t, ++b)
                for (int64_t r = 0, row = group * BLOCK; r < BLOCK && row < m.rows; ++r, ++row)
                    y[b * m.rows + row] = out[t][r] + (bias ? bias[row] : 0.0f);
        }
}

using Few = void (*)(const Matrix&, const Inputs&, const float*, float*, int64_t, int64_t);

template <int KIND>
Few few_for(const Matrix& m, int64_t batch) {
    if (m.block == 4) return few_blocks<KIND, 4>;
    if (m.block == 16) return few_blocks<KIND, 16>;
    if (batch == 1) return few_rows<KIND, 1>;
    if (batch == 2) return few_rows<KIND, 2>;
    if (batch == 3) return few_rows<KIND, 3>;
    if (batch == 4) return few_rows<KIND, 4>;
    return panels<KIND == I4 ? I4 : I8, false>;
}

void few(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    Few function = narrow->few;
    if (m.form == DENSE) function = panels<I8, true>;
    if (m.form == BITMASK) {
        if (m.kind == F32) function = few_for<F32>(m, in.batch);
        if (m.kind == BF16) function = few_for<BF16>(m, in.batch);
        if (m.kind == F16) function = few_for<F16>(m, in.batch);
        if (m.kind == I8) function = few_for<I8>(m, in.batch);
        if (m.kind == I4) function = few_for<I4>(m, in.batch);
    }
    if (m.form == SQUARES) function = few_squares_avx512;
    if (m.form == SEMI) function = few_semi_avx2;
    function(m, in, bias, y, first, last);
}

// The units of a group in a word or span: their columns, and their values as scaled float32
struct Stretch {
    alignas(64) uint8_t listed[WORD];
    uint8_t first[WORD];
    float room[SPAN * 16 + 64];
    const uint8_t* columns;
    const float* values;
    int n;
};

// n values from a position of the stream as float32, without scale; writes up to 63 more
ALWAYS void widen(const Matrix& m, int64_t at, int64_t n, float* out) {
    const __m512i codebook = codebook_of(m);
    alignas(64) int8_t bytes[64];
    for (int64_t i = 0; i < n; i += 16) {
        if (m.kind == BF16) {
            _mm512_storeu_ps(out + i, sixteen<BF16>((const char*)m.values + 2 * (at + i), 0xffff));
        } else if (m.kind == F16) {
            _mm512_storeu_ps(out + i, sixteen<F16>((const char*)m.values + 2 * (at + i), 0xffff));
        } else {
            const int8_t* from = (const int8_t*)m.values + at + i;
            if (m.kind == I4) {
                if (i % 64 == 0) _mm512_store_si512(bytes, codes((const uint8_t*)m.values, at + i, codebook));
                from = bytes + i % 64;
            }
            const __m128i raw = _mm_loadu_si128((const __m128i*)from);
            _mm512_storeu_ps(out + i, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)));
        }
    }
}

// Values of a stretch times their scales, of which a word has one for each row
ALWAYS void rescale(const Matrix& m, int64_t group, int64_t number, int64_t count, Stretch& s) {
    const int64_t width = m.columns / m.scales;
    if (m.form == INDEX && m.scales > 1) {
        for (int64_t i = 0; i < count; ++i)
            s.room[i] *= m.scale[group * m.scales + (number * SPAN + s.columns[i]) / width];
        return;
    }
    float factor[16];
    for (int i = 0; i < 16; ++i) {
        const int64_t row = group * m.block + i % m.block;
        factor[i] = row < m.rows ? m.scale[row * m.scales + number * WORD / width] : 0.0f;
        if (m.scales == 1 && row < m.rows) factor[i] = m.scale[row];
    }
    const __m512 scale = _mm512_loadu_ps(factor);
    for (int64_t i = 0; i < count; i += 16)
        _mm512_storeu_ps(s.room + i, _mm512_mul_ps(_mm512_loadu_ps(s.room + i), scale));
}

ALWAYS void stretch(const Matrix& m, int64_t group, int64_t number, int64_t at, Stretch& s) {
    s.columns = s.listed;
    if (m.form == INDEX) {
        s.n = m.counts[group * m.words + number];
        s.columns = m.index + at;
    } else if (m.form == SEMI) {
        s.n = columns_of_word(m, group, at, s.first, s.listed);
    } else {
        const uint64_t bits = m.form == DENSE ? lowest(m.columns - number * WORD) : m.mask[group * m.words + number];
        _mm512_store_si512(s.listed, _mm512_maskz_compress_epi8(bits, _mm512_load_si512(o.counted)));
        s.n = kept(bits);
    }
    const int64_t count = int64_t(s.n) * m.block;
    if (m.kind == F32) {
        s.values = (const float*)m.values + at;
    } else {
        widen(m, at, count, s.room);
        s.values = s.room;
    }
    if (m.scale) rescale(m, group, number, count, s);
}

// A row times V vectors of tokens; U sums run side by side so that additions do not wait for each other
template <int V, int U>
ALWAYS void lanes_of_row(const Stretch& s, const float* x, float* y) {
    __m512 total[U][V];
    for (int u = 0; u < U; ++u)
        for (int v = 0; v < V; ++v) total[u][v] = u ? _mm512_setzero_ps() : _mm512_loadu_ps(y + 16 * v);
    int i = 0;
    for (; i + U <= s.n; i += U)
        for (int u = 0; u < U; ++u) {
            const __m512 w = _mm512_set1_ps(s.values[i + u]);
            const float* at = x + int64_t(s.columns[i + u]) * (16 * V);
            for (int v = 0; v < V; ++v) total[u][v] = _mm512_fmadd_ps(w, _mm512_loadu_ps(at + 16 * v), total[u][v]);
        }
    for (; i < s.n; ++i) {
        const __m512 w = _mm512_set1_ps(s.values[i]);
        const float* at = x + int64_t(s.columns[i]) * (16 * V);
        for (int v = 0; v < V; ++v) total[0][v] = _mm512_fmadd_ps(w, _mm512_loadu_ps(at + 16 * v), total[0][v]);
    }
    for (int v = 0; v < V; ++v) {
        for (int u = 1; u < U; ++u) total[0][v] = _mm512_add_ps(total[0][v], total[u][v]);
        _mm512_storeu_ps(y + 16 * v, total[0][v]);
    }
}

// Rows of a block times V vectors of tokens, four rows at a time; U units side by side
template <int V, int U>
ALWAYS void lanes_of_block(const Stretch& s, int block, const float* x, float* y) {
    constexpr int LANES = 16 * V;
    for (int from = 0; from < block; from += 4, y += 4 * LANES) {
        __m512 total[U][4][V];
        for (int r = 0; r < 4; ++r)
            for (int v = 0; v < V; ++v) {
                total[0][r][v] = _mm512_loadu_ps(y + r * LANES + 16 * v);
                if (U > 1) total[U - 1][r][v] = _mm512_setzero_ps();
            }
        const auto add = [&](int i, __m512 (*sums)[V]) __attribute__((always_inline)) {
            const float *w = s.values + int64_t(i) * block + from, *at = x + int64_t(s.columns[i]) * LANES;
            for (int r = 0; r < 4; ++r) {
                const __m512 weight = _mm512_set1_ps(w[r]);
                for (int v = 0; v < V; ++v) sums[r][v] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(at + 16 * v), sums[r][v]);
            }
        };
        int i = 0;
        for (; i + U <= s.n; i += U)
            for (int u = 0; u < U; ++u) add(i + u, total[u]);
        if (i < s.n) add(i, total[0]);
        for (int r = 0; r < 4; ++r)
            for (int v = 0; v < V; ++v) {
                if (U > 1) total[0][r][v] = _mm512_add_ps(total[0][r][v], total[U - 1][r][v]);
                _mm512_storeu_ps(y + r * LANES + 16 * v, total[0][r][v]);
            }
    }
}

void many(const Matrix& m, const float* x, int lanes, float* y, int64_t first, int64_t last) {
    if (lanes == 8) return narrow->many(m, x, lanes, y, first, last);
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
            if (m.block > 1 && lanes == 16) {
                lanes_of_block<1, 2>(s, m.block, here, out);
            } else if (m.block > 1 && lanes == 32) {
                lanes_of_block<2, 1>(s, m.block, here, out);
            } else if (m.block > 1) {
                lanes_of_block<4, 1>(s, m.block, here, out);
            } else if (lanes == 16) {
                lanes_of_row<1, 8>(s, here, out);
            } else if (lanes == 32) {
                lanes_of_row<2, 4>(s, here, out);
            } else {
                lanes_of_row<4, 4>(s, here, out);
            }
        }
    }
}

const Kernels table = {few, many, nullptr, squares_avx512, 64};

}  // namespace

AVX512_END

#if defined(SECATEUR_EMULATED_AVX512)
static bool runs_here() { return true; }
#else
static bool runs_here() { return has_avx512(); }
#endif

const Kernels* avx512_kernels() {
    static const bool here = runs_here() && (narrow = avx2_kernels()) && write_orders();
    return here ? &table : nullptr;
}

}  // namespace sparse

#endif
