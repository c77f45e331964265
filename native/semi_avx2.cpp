// SEMI with AVX2: as many weights of every 4 or 16 columns as of every other. Nothing is expanded: indices that fill whole
// vectors pick the inputs, in halves of 16 bytes that a byte shuffle reaches, or of 4 numbers, and the stream meets them
// in order. Where a value comes from does not depend on those before it, so nothing waits for a count of bits. Dense codes of 4
// bits are the case without indices.

#include <cstdint>
#include <cstring>

#include "sparse.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include "sparse_avx2.h"

namespace sparse {
namespace {

// Signed bytes times signed bytes, both in [-127, 127], four at a time
ALWAYS __m256i dots(__m256i w, __m256i magnitudes, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, w));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// The bytes that `where` picks, KEPT of every 16 of x; bytes of the result in turn from each of 16 / KEPT vectors
template <int KEPT>
ALWAYS __m256i pick(const int8_t* x, __m256i where) {
    constexpr int FROM = CHUNK / KEPT;
    if (KEPT == CHUNK) return _mm256_loadu_si256((const __m256i*)x);
    __m256i v[FROM];
    for (int i = 0; i < FROM; ++i) v[i] = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)(x + VECTOR * i)), where);
    if (KEPT == 8) return _mm256_blend_epi32(v[0], v[1 % FROM], 0xcc);
    if (KEPT == 2)
        for (int i = 0; i < FROM / 2; ++i) v[i] = _mm256_blend_epi16(v[2 * i], v[2 * i + 1], 0xaa);
    return _mm256_blend_epi32(
        _mm256_blend_epi32(v[0], v[1 % FROM], 0x22), _mm256_blend_epi32(v[2 % FROM], v[3 % FROM], 0x88), 0xcc
    );
}

// The numbers that `where` picks, 2 or 1 of every 4
template <int KEPT>
ALWAYS __m256 pick_of_four(const float* x, __m256i where) {
    constexpr int FROM = CHUNK / KEPT;
    __m256 v[FROM];
    for (int i = 0; i < FROM; ++i) v[i] = _mm256_permutevar_ps(_mm256_loadu_ps(x + 8 * i), where);
    if (KEPT == 8) return _mm256_blend_ps(v[0], v[1], 0xcc);
    return _mm256_blend_ps(_mm256_blend_ps(v[0], v[1], 0x22), _mm256_blend_ps(v[2 % FROM], v[3 % FROM], 0x88), 0xcc);
}

// 8 of every 16
ALWAYS __m256 pick_8_of_sixteen(const float* x, __m256i where) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(where, 28));
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), where);
    return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 8), where), upper);
}

// 4 or 2 of every 16, from `quarters`: two bits of an index say which of four, which a permutation within halves reaches, two
// which four. (Permutations of whole vectors take twice as long, gathers too.)
template <int KEPT>
ALWAYS __m256 pick_of_sixteen(const float* x, __m256i where) {
    if (KEPT == 8) return pick_8_of_sixteen(x, where);
    const __m256 lower = _mm256_castsi256_ps(_mm256_slli_epi32(where, 29)), upper = _mm256_castsi256_ps(_mm256_slli_epi32(where, 28));
    __m256 found[2];
    for (int i = 0; i < (KEPT == 2 ? 2 : 1); ++i) {  // chunks of a half
        __m256 v[4];
        for (int q = 0; q < 4; ++q) v[q] = _mm256_permutevar_ps(_mm256_loadu_ps(x + 8 * (4 * i + q)), where);
        found[i] = _mm256_blendv_ps(_mm256_blendv_ps(v[0], v[1], lower), _mm256_blendv_ps(v[2], v[3], lower), upper);
    }
    return KEPT == 2 ? _mm256_blend_ps(found[0], found[1], 0xcc) : found[0];
}

// Scales of a vector's lanes of sums, 4 products each: one, or 2 or 4 that every half shares out
ALWAYS __m256 lanes_of_scale(const float* scale, int64_t number) {
    if (number == 4) return _mm256_broadcast_ps((const __m128*)scale);
    if (number == 2) return _mm256_setr_ps(scale[0], scale[0], scale[1], scale[1], scale[0], scale[0], scale[1], scale[1]);
    return _mm256_set1_ps(*scale);
}

// What all rows of a matrix share: divisions take longer than a short row
struct Shape {
    int64_t vectors, indices;  // of a row; bytes
    int64_t shared, lasts;     // scales of a vector, vectors of a scale (0: there is one of all)

    explicit Shape(const Matrix& m) : vectors(vectors_of(m)), indices(m.kept < CHUNK ? indices_of(m) : 0) {
        const int64_t reach = CHUNK * VECTOR / m.kept, width = m.columns / m.scales;
        shared = width < reach ? reach / width : 1, lasts = m.scales == 1 ? 0 : width < reach ? 1 : width / reach;
    }
};

// A row of integers times T tokens, vector by vector
template <int KIND, int KEPT, int BITS, int T>
struct Integers {
    static constexpr bool INDEXED = KEPT < CHUNK;
    static constexpr int FILLED = INDEXED ? 8 / BITS : 8;
    static constexpr int64_t REACH = CHUNK * VECTOR / KEPT;

    const int8_t *values, *x;
    const float* scale;
    int64_t padded, shared, lasts, used = 0;  // vectors of the scale
    __m256i codebook, where, codes, total[T][2];
    __m256 all[T];

    ALWAYS Integers(const Matrix& m, const Shape& shape, const Inputs& in, int64_t row, int64_t b) {
        values = (const int8_t*)m.values + (KIND == I4 ? m.offsets[row] / 2 : m.offsets[row]);
        x = in.integers + b * in.padded, padded = in.padded;
        scale = m.scale + row * m.scales;
        shared = shape.shared, lasts = shape.lasts;
        if (KIND == I4) codebook = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)m.codebook));
        for (int t = 0; t < T; ++t)
            total[t][0] = total[t][1] = _mm256_setzero_si256(), all[t] = _mm256_setzero_ps();
    }

    // The next vector, number `i` of those that fill their indices
    ALWAYS void step(int i) {
        const __m256i low = _mm256_set1_epi8(BITS == 2 ? 3 : 15), fifteen = _mm256_set1_epi8(15);
        const __m256i four = KEPT == 8 ? _mm256_set1_epi64x(0x0c0c080804040000) : _mm256_set1_epi32(0x0c080400);
        __m256i w;
        if (i % 2 == 0) _mm_prefetch((const char*)values + 1024, _MM_HINT_T0);
        if (KIND == I8) {
            w = _mm256_loadu_si256((const __m256i*)values), values += VECTOR;
        } else {
            if (i % 2 == 0) codes = _mm256_loadu_si256((const __m256i*)values), values += VECTOR;
            const __m256i half = i % 2 ? _mm256_srli_epi16(codes, 4) : codes;
            w = _mm256_shuffle_epi8(codebook, _mm256_and_si256(half, fifteen));
        }
        __m256i picked = INDEXED ? _mm256_and_si256(where, low) : low;
        if (BITS == 2) picked = _mm256_or_si256(picked, four);
        if (INDEXED) where = _mm256_srli_epi16(where, BITS);
        const __m256i magnitudes = _mm256_abs_epi8(w);
        for (int t = 0; t < T; ++t) {
            const __m256i sums = dots(w, magnitudes, pick<KEPT>(x + t * padded, picked));
            total[t][i % 2] = _mm256_add_epi32(total[t][i % 2], sums);
        }
        x += REACH;
        if (KIND == I4 && ++used == lasts) next_scale();
    }

    // Sums of a scale are whole numbers until it ends
    ALWAYS void next_scale() {
        const __m256 factor = lanes_of_scale(scale, shared);
        for (int t = 0; t < T; ++t) {
            all[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(total[t][0], total[t][1])), factor, all[t]);
            total[t][0] = total[t][1] = _mm256_setzero_si256();
        }
        scale += shared, used = 0;
    }

    ALWAYS void result(const Inputs& in, int64_t b, float* out) const {
        for (int t = 0; t < T; ++t) {
            const __m256i both = _mm256_add_epi32(total[t][0], total[t][1]);
            out[t] = (KIND == I8 || !lasts ? float(sum(both)) * *scale : sum(all[t])) * in.factor[b + t];
        }
    }
};

// The same of numbers
template <int KIND, int KEPT, int BITS, int T>
struct Numbers {
    static constexpr bool INDEXED = true;
    static constexpr int FILLED = 32 / BITS;
    static constexpr int64_t SIZE = KIND == F32 ? 4 : 2;

    const char* values;
    const float* x;
    int64_t padded;
    __m256i where;
    __m256 total[T][2];

    ALWAYS Numbers(const Matrix& m, const Shape&, const Inputs& in, int64_t row, int64_t b) {
        values = (const char*)m.values + m.offsets[row] * SIZE;
        x = (BITS == 4 && KEPT < 8 ? in.quarters : in.plain) + b * in.padded, padded = in.padded;
        for (int t = 0; t < T; ++t) total[t][0] = total[t][1] = _mm256_setzero_ps();
    }

    ALWAYS void step(int i) {
        if (i % (8 / SIZE) == 0) _mm_prefetch(values + 1024, _MM_HINT_T0);
        const __m256 w = eight<KIND>(values);
        for (int t = 0; t < T; ++t) {
            const float* at = x + t * padded;
            const __m256 some = BITS == 2 ? pick_of_four<KEPT>(at, where) : pick_of_sixteen<KEPT>(at, where);
            total[t][i % 2] = _mm256_fmadd_ps(w, some, total[t][i % 2]);
        }
        where = _mm256_srli_epi32(where, BITS);
        values += 8 * SIZE, x += CHUNK * 8 / KEPT;
    }

    ALWAYS void result(const Inputs&, int64_t, float* out) const {
        for (int t = 0; t < T; ++t) out[t] = sum(_mm256_add_ps(total[t][0], total[t][1]));
    }
};

template <class Row>
ALWAYS void multiply_row(const Matrix& m, const Shape& shape, const Inputs& in, int64_t row, int64_t b, float* out) {
    Row made(m, shape, in, row, b);
    const uint8_t* index = m.index + row * shape.indices;
    const int64_t vectors = shape.vectors, whole = vectors / Row::FILLED * Row::FILLED;
    for (int64_t start = 0; start < vectors; start += Row::FILLED) {
        if (Row::INDEXED) {
            made.where = _mm256_loadu_si256((const __m256i*)index), index += VECTOR;
            _mm_prefetch((const char*)index + 512, _MM_HINT_T0);
        }
        if (start < whole) {
            _Pragma("GCC unroll 16") for (int i = 0; i < Row::FILLED; ++i) made.step(i);
        } else {
            for (int64_t i = start; i < vectors; i += 2) {
                made.step(0);
                if (i + 1 < vectors) made.step(1);
            }
        }
    }
    made.result(in, b, out);
}

template <bool, class A, class>
struct Either {
    using type = A;
};
template <class A, class B>
struct Either<false, A, B> {
    using type = B;
};
template <int KIND, int KEPT, int BITS, int T>
using Row = typename Either<KIND == I8 || KIND == I4, Integers<KIND, KEPT, BITS, T>, Numbers<KIND, KEPT, BITS, T>>::type;

template <int KIND, int KEPT, int BITS>
void rows(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    const Shape shape(m);
    for (int64_t b = 0; b < in.batch;) {
        const int tokens = in.batch - b >= 2 ? 2 : 1;
        for (int64_t row = first; row < last; ++row) {
            float out[2];
            if (tokens == 2) multiply_row<Row<KIND, KEPT, BITS, 2>>(m, shape, in, row, b, out);
            if (tokens == 1) multiply_row<Row<KIND, KEPT, BITS, 1>>(m, shape, in, row, b, out);
            for (int t = 0; t < tokens; ++t) y[(b + t) * m.rows + row] = out[t] + (bias ? bias[row] : 0.0f);
        }
        b += tokens;
    }
}

template <int KIND>
void of_kind(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    if (m.bits == 2 && m.kept == 8) return rows<KIND, 8, 2>(m, in, bias, y, first, last);
    if (m.bits == 2) return rows<KIND, 4, 2>(m, in, bias, y, first, last);
    if (m.kept == 8) return rows<KIND, 8, 4>(m, in, bias, y, first, last);
    if (m.kept == 4) return rows<KIND, 4, 4>(m, in, bias, y, first, last);
    rows<KIND, 2, 4>(m, in, bias, y, first, last);
}

}  // namespace

void few_semi_avx2(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    if (m.kind == F32) of_kind<F32>(m, in, bias, y, first, last);
    if (m.kind == BF16) of_kind<BF16>(m, in, bias, y, first, last);
    if (m.kind == F16) of_kind<F16>(m, in, bias, y, first, last);
    if (m.kind == I8) of_kind<I8>(m, in, bias, y, first, last);
    if (m.kind == I4 && m.kept == CHUNK) return rows<I4, CHUNK, 4>(m, in, bias, y, first, last);
    if (m.kind == I4) of_kind<I4>(m, in, bias, y, first, last);
}

}  // namespace sparse

AVX2_END

#endif
