// Squares of 4 x 4 bytes with AVX-512: as with AVX2, four squares or sixteen tokens by one instruction. Bytes are signed
// times unsigned there: inputs have 128 added, and 128 times the sum of the weights is taken off again.

#include <cstdint>
#include <cstring>

#include "sparse.h"

#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 9))

#include "sparse_avx512.h"

namespace sparse {
namespace {

constexpr int64_t FLOCK = 16;  // words of a mask whose inputs are put side by side at a time

ALWAYS __m512i minus_128() { return _mm512_set1_epi8(char(-128)); }

// Sums of four rows, which lie four times in the lanes
ALWAYS void rows_of(__m512i lanes, int32_t* out) {
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
    const __m128i one = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
    _mm_storeu_si128((__m128i*)out, one);
}

// Inputs of T tokens, 4 bytes for each kept square; returns how many squares
template <int T>
ALWAYS int64_t keep(const uint64_t* mask, int64_t words, const uint8_t* x, int64_t padded, float (*out)[FLOCK * WORD + 64]) {
    int64_t n = 0;
    for (int64_t part = 0; part < 4 * words; ++part) {
        const uint32_t bits = uint32_t(mask[part / 4] >> (16 * (part % 4))) & 0xffff;
        for (int t = 0; t < T; ++t) {
            const __m512 all = _mm512_loadu_ps((const float*)(x + t * padded + 64 * part));
            _mm512_storeu_ps(out[t] + n, _mm512_maskz_compress_ps(__mmask16(bits), all));
        }
        n += kept(bits);
    }
    return n;
}

// Four rows times T tokens
template <int T>
ALWAYS void rows(const Matrix& m, const Inputs& in, int64_t group, int64_t b, int32_t (*out)[SIDE]) {
    float inputs[T][FLOCK * WORD + 64];  // 4 bytes each; no numbers
    const __m512i repeated = _mm512_load_si512(o.repeated[0]);
    const uint64_t* mask = m.mask + group * m.words;
    const uint8_t *values = (const uint8_t*)m.values + m.offsets[group], *x = in.shifted + b * in.padded;
    __m512i total[T], weights = _mm512_setzero_si512();
    for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_si512();
    for (int64_t word = 0, stop; word < m.words; word = stop) {
        stop = word + FLOCK < m.words ? word + FLOCK : m.words;
        const int64_t n = keep<T>(mask + word, stop - word, x + word * SPAN, in.padded, inputs);
        for (int64_t i = 0; i < n; i += 4) {
            _mm_prefetch((const char*)values + 16 * i + 2048, _MM_HINT_T1);
            const __m512i w = _mm512_maskz_loadu_epi8(lowest((n - i) * 16), values + 16 * i);
            add_dots(weights, minus_128(), w);
            for (int t = 0; t < T; ++t) {
                const __m512i some = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(inputs[t] + i)));
                add_dots(total[t], _mm512_permutexvar_epi32(repeated, some), w);
            }
        }
        values += 16 * n;
    }
    for (int t = 0; t < T; ++t) rows_of(_mm512_sub_epi32(total[t], weights), out[t]);
}

// 128 times the sums of a group's four rows
ALWAYS void weigh(const Matrix& m, int64_t group, int32_t* out) {
    const uint8_t* values = (const uint8_t*)m.values + m.offsets[group];
    __m512i weights = _mm512_setzero_si512();
    for (int64_t left = m.offsets[group + 1] - m.offsets[group]; left > 0; left -= 64, values += 64)
        add_dots(weights, minus_128(), _mm512_maskz_loadu_epi8(lowest(left), values));
    rows_of(weights, out);
}

// Four rows times V tiles of tokens
template <int V>
ALWAYS void tokens(const Matrix& m, const Tiled& in, int64_t group, int64_t tile, int32_t* out) {
    const uint64_t* mask = m.mask + group * m.words;
    const uint8_t *values = (const uint8_t*)m.values + m.offsets[group], *x = in.x + tile * TILE_BYTES;
    __m512i total[SIDE][V];
    for (int r = 0; r < SIDE; ++r)
        for (int v = 0; v < V; ++v) total[r][v] = _mm512_setzero_si512();
    for (int64_t word = 0; word < m.words; ++word)
        for (int quarter = 0; quarter < 4; ++quarter, x += in.tiles * TILE_BYTES)
            for (uint32_t bits = mask[word] >> (16 * quarter) & 0xffff; bits; bits &= bits - 1, values += 16) {
                const uint8_t* at = x + 64 * __builtin_ctz(bits);
                __m512i some[V];
                for (int v = 0; v < V; ++v)
                    some[v] = _mm512_add_epi8(_mm512_loadu_si512(at + v * TILE_BYTES), minus_128());
                for (int r = 0; r < SIDE; ++r) {
                    int32_t four;
                    std::memcpy(&four, values + SIDE * r, 4);
                    const __m512i w = _mm512_set1_epi32(four);
                    for (int v = 0; v < V; ++v) add_dots(total[r][v], some[v], w);
                }
            }
    int32_t weights[SIDE];
    weigh(m, group, weights);
    for (int r = 0; r < SIDE; ++r)
        for (int v = 0; v < V; ++v)
            _mm512_storeu_si512(out + r * TWO + v * TILE, _mm512_sub_epi32(total[r][v], _mm512_set1_epi32(weights[r])));
}

}  // namespace

void few_squares_avx512(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    static const bool written = write_orders();
    (void)written;
    for (int64_t group = first; group < last; ++group)
        for (int64_t b = 0; b < in.batch;) {
            int32_t sums[4][SIDE];
            const int tokens = in.batch - b >= 4 ? 4 : in.batch - b >= 2 ? 2 : 1;
            if (tokens == 4) rows<4>(m, in, group, b, sums);
            if (tokens == 2) rows<2>(m, in, group, b, sums);
            if (tokens == 1) rows<1>(m, in, group, b, sums);
            for (int t = 0; t < tokens; ++t, ++b)
                for (int64_t r = 0, row = group * SIDE; r < SIDE && row < m.rows; ++r, ++row)
                    y[b * m.rows + row] = float(sums[t][r]) * m.scale[row] * in.factor[b] + (bias ? bias[row] : 0.0f);
        }
}

void squares_avx512(const Matrix& m, const Tiled& in, int64_t tile, int32_t* sums, int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group, sums += SIDE * TWO) {
        if (tile + 1 < in.tiles) {
            tokens<2>(m, in, group, tile, sums);
        } else {
            tokens<1>(m, in, group, tile, sums);
        }
    }
}

}  // namespace sparse

AVX512_END

#endif
