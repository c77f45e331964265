// Squares of 4 x 4 bytes with AVX2: a row's four columns lie side by side, as products of bytes are added, so nothing is
// expanded or turned. For a few tokens rows lie in the lanes, for more of them tokens.

#include <cstdint>
#include <cstring>

#include "sparse.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include "sparse_avx2.h"

namespace sparse {
namespace {

// Signed bytes times signed bytes, both in [-127, 127], four at a time
ALWAYS __m256i add_dots(__m256i sum, __m256i w, __m256i x, __m256i magnitudes) {
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(w, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Four rows times T tokens: the inputs of kept squares, 4 bytes each, are put side by side
template <int T>
ALWAYS void rows(const Matrix& m, const Inputs& in, int64_t group, int64_t b, int32_t (*out)[SIDE]) {
    float kept[T][FLOCK * WORD + 64];  // 4 bytes each; no numbers
    const __m256i twice = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const uint64_t* mask = m.mask + group * m.words;
    const int8_t* values = (const int8_t*)m.values + m.offsets[group];
    __m256i total[T][2];
    for (int k = 0; k < T; ++k) total[k][0] = total[k][1] = _mm256_setzero_si256();
    for (int64_t word = 0, stop; word < m.words; word = stop) {
        stop = word + FLOCK < m.words ? word + FLOCK : m.words;
        const float* x = (const float*)(in.integers + b * in.padded + word * SPAN);
        const int64_t n = keep<float, T>(mask + word, stop - word, x, in.padded / SIDE, kept);
        for (int64_t i = 0; i < n; i += 4) {  // behind the last square inputs are zero
            _mm_prefetch((const char*)values + 16 * i + 2048, _MM_HINT_T0);
            for (int half = 0; half < 2; ++half) {
                const __m256i w = _mm256_loadu_si256((const __m256i*)(values + 16 * i + 32 * half));
                for (int k = 0; k < T; ++k) {
                    int64_t two;
                    std::memcpy(&two, kept[k] + i + 2 * half, 8);
                    const __m256i some = _mm256_permutevar8x32_epi32(_mm256_set1_epi64x(two), twice);
                    total[k][half] = add_dots(total[k][half], w, some, _mm256_abs_epi8(some));
                }
            }
        }
        values += 16 * n;
    }
    for (int k = 0; k < T; ++k) {
        const __m256i both = _mm256_add_epi32(total[k][0], total[k][1]);
        const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
        _mm_storeu_si128((__m128i*)out[k], sums);
    }
}

// Four rows times the first 8 V tokens of a tile. In 16 bits, which take fewer instructions for a product, it was slower: inputs
// are twice as long and weights have to be widened.
template <int V>
ALWAYS void tokens(const Matrix& m, const Tiled& in, int64_t group, int64_t tile, int32_t* out) {
    const uint64_t* mask = m.mask + group * m.words;
    const int8_t* values = (const int8_t*)m.values + m.offsets[group];
    const uint8_t* x = in.x + tile * TILE_BYTES;
    __m256i total[SIDE][V];
    for (int r = 0; r < SIDE; ++r)
        for (int v = 0; v < V; ++v) total[r][v] = _mm256_setzero_si256();
    for (int64_t word = 0; word < m.words; ++word)
        for (int quarter = 0; quarter < 4; ++quarter, x += in.tiles * TILE_BYTES)
            for (uint32_t bits = mask[word] >> (16 * quarter) & 0xffff; bits; bits &= bits - 1, values += 16) {
                const uint8_t* at = x + 64 * __builtin_ctz(bits);
                __m256i some[V], magnitudes[V];
                for (int v = 0; v < V; ++v) {
                    some[v] = _mm256_loadu_si256((const __m256i*)(at + 32 * v));
                    magnitudes[v] = _mm256_abs_epi8(some[v]);
                }
                for (int r = 0; r < SIDE; ++r) {
                    int32_t four;
                    std::memcpy(&four, values + SIDE * r, 4);
                    const __m256i w = _mm256_set1_epi32(four);
                    for (int v = 0; v < V; ++v) total[r][v] = add_dots(total[r][v], w, some[v], magnitudes[v]);
                }
            }
    for (int r = 0; r < SIDE; ++r)
        for (int v = 0; v < V; ++v) _mm256_storeu_si256((__m256i*)(out + r * TWO + 8 * v), total[r][v]);
}

}  // namespace

void few_squares_avx2(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    static const bool filled = fill();
    (void)filled;
    for (int64_t group = first; group < last; ++group)
        for (int64_t b = 0; b < in.batch;) {
            int32_t sums[2][SIDE];
            const int tokens = in.batch - b >= 2 ? 2 : 1;
            if (tokens == 2) rows<2>(m, in, group, b, sums);
            if (tokens == 1) rows<1>(m, in, group, b, sums);
            for (int k = 0; k < tokens; ++k, ++b)
                for (int64_t r = 0, row = group * SIDE; r < SIDE && row < m.rows; ++r, ++row)
                    y[b * m.rows + row] = float(sums[k][r]) * m.scale[row] * in.factor[b] + (bias ? bias[row] : 0.0f);
        }
}

void squares_avx2(const Matrix& m, const Tiled& in, int64_t tile, int32_t* sums, int64_t first, int64_t last) {
    for (const int64_t end = tile + 2 < in.tiles ? tile + 2 : in.tiles; tile < end; ++tile, sums += TILE)
        for (int64_t group = first; group < last; ++group) {
            int32_t* out = sums + (group - first) * SIDE * TWO;
            if (in.batch - tile * TILE > TILE / 2) {
                tokens<2>(m, in, group, tile, out);
            } else {
                tokens<1>(m, in, group, tile, out);
            }
        }
}

}  // namespace sparse

AVX2_END

#endif
