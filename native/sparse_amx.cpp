// The kernels for AMX (Sapphire Rapids and later): 5 tokens and more against int8, int4 and bfloat16.
//
// A tile register holds 16 rows of 64 bytes. Sixteen rows of weights are made dense, 64 bytes of a row by one expanding
// instruction, and lie in the nearest cache as a tile wants them; one instruction multiplies them with 64 bytes of 16 tokens.
// Products are exact, sums are whole numbers of 32 bits or float32. Other batches and kinds are left to AVX-512.
//
// With SECATEUR_EMULATED_AVX512 the instructions are plain C++ (tests/native): for tests where no machine has them.

#include <cstdint>
#include <cstring>

#include "sparse.h"

#if defined(SECATEUR_NO_AMX) || !defined(__x86_64__) || !defined(__linux__) || !(defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)

namespace sparse {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace sparse

#else

#include <sys/syscall.h>
#include <unistd.h>

#include "processor.h"
#include "sparse_avx512.h"

#if defined(SECATEUR_EMULATED_AVX512)
#include "amx_emulated.h"
#else
// Not the compiler's own names: those do not say that memory is read, so stores before them may come after. The assembler
// knows these instructions whatever the compiler may use.
#define TILE_CONFIGURE(at) asm volatile("ldtilecfg (%0)" : : "r"(at) : "memory")
#define TILE_RELEASE() asm volatile("tilerelease" : : : "memory")
#define TILE_ZERO(c) asm volatile("tilezero %%tmm" #c : :)
#define TILE_LOAD(c, at) asm volatile("tileloadd (%0,%1,1), %%tmm" #c : : "r"(at), "r"(int64_t(64)) : "memory")
#define TILE_STORE(c, at) asm volatile("tilestored %%tmm" #c ", (%0,%1,1)" : : "r"(at), "r"(int64_t(64)) : "memory")
#define TILE_DOT_BYTES(c, a, b) asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#define TILE_DOT_BF16(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#endif

namespace sparse {
namespace {

constexpr int64_t NEAR = 4;  // words whose tiles are made before they are met

struct Configuration {
    uint8_t palette = 1, start = 0, nothing[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <int KIND>
constexpr int64_t tiles_of_word() {
    return KIND == BF16 ? 2 : 1;
}

// Sixteen rows, some of which may be behind the last
struct Rows {
    int64_t first;
    int count;
    int64_t at[TILE];  // in their streams, of which a block has one
    const char *ahead, *end;  // of what the next sixteen take
    int64_t step;             // of that, for each word

    Rows(const Matrix& m, int64_t row) : first(row), count(int(m.rows - row < TILE ? m.rows - row : TILE)) {
        const int64_t group = row / m.block, each = TILE / m.block, next = group + each < m.groups ? group + each : m.groups;
        const int64_t last = next + each < m.groups ? next + each : m.groups;
        for (int64_t g = group; g < next; ++g) at[g - group] = m.offsets[g];
        const auto place = [&](int64_t of) {
            const int64_t n = m.offsets[of];
            return (const char*)m.values + (m.kind == BF16 ? 2 * n : m.kind == I4 ? n / 2 : n);
        };
        ahead = place(next), end = place(last);
        step = (end - ahead) / m.words + 1;
    }

    ALWAYS void fetch() {
        const char* stop = ahead + step < end ? ahead + step : end;
        for (; ahead < stop; ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
    }
};

// The words word..word+count-1 of sixteen rows made dense, a tile for every 64 bytes of a row
template <int KIND>
ALWAYS void make_dense(const Matrix& m, Rows& rows, int64_t word, int64_t count, __m512i codebook, uint8_t* room) {
    constexpr int64_t EACH = tiles_of_word<KIND>() * TILE_BYTES;
    const uint8_t* values = (const uint8_t*)m.values;
    for (int r = 0; r < TILE; ++r) {
        uint8_t* out = room + r * 64;
        if (r >= rows.count) {
            for (int64_t i = 0; i < count * EACH; i += TILE_BYTES) _mm512_storeu_si512(out + i, _mm512_setzero_si512());
            continue;
        }
        int64_t at = rows.at[r];
        const uint64_t* mask = m.form == DENSE ? nullptr : m.mask + (rows.first + r) * m.words + word;
        for (int64_t i = 0; i < count; ++i, out += EACH) {
            if (m.form == DENSE) {  // inputs behind the last column are zero
                _mm512_storeu_si512(out, _mm512_loadu_si512(values + at));
                at += WORD;
            } else if (KIND == BF16) {
                const uint32_t low = uint32_t(mask[i]), high = uint32_t(mask[i] >> 32);
                const int64_t middle = at + kept(low);
                _mm512_storeu_si512(out, _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(values + 2 * at)));
                _mm512_storeu_si512(
                    out + TILE_BYTES, _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(values + 2 * middle))
                );
                at = middle + kept(high);
            } else {
                _mm512_storeu_si512(out, expand_bytes<KIND>(values, at, mask[i], codebook));
            }
        }
        rows.at[r] = at;
    }
}

struct Turns {
    alignas(64) uint8_t rows[2][64];   // units of 4 rows, of one byte and of two: those of a row side by side
    alignas(64) int32_t fours[2][16];  // units of 16 rows: 4 rows of each side by side
};

Turns turns;

bool write_turns() {
    for (int r = 0; r < 4; ++r) {
        for (int c = 0; c < 16; ++c) turns.rows[0][r * 16 + c] = uint8_t(c * 4 + r);
        for (int c = 0; c < 8; ++c)
            for (int h = 0; h < 2; ++h) turns.rows[1][(r * 8 + c) * 2 + h] = uint8_t((c * 4 + r) * 2 + h);
        for (int c = 0; c < 4; ++c) turns.fours[0][r * 4 + c] = c * 4 + r;
        for (int c = 0; c < 2; ++c)
            for (int h = 0; h < 2; ++h) turns.fours[1][r * 4 + c * 2 + h] = c * 8 + r * 2 + h;
    }
    return true;
}

// Quarter j of vector i becomes quarter i of vector j
ALWAYS void swap_quarters(__m512i* z) {
    const __m512i a = _mm512_shuffle_i32x4(z[0], z[1], 0x44), b = _mm512_shuffle_i32x4(z[0], z[1], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(z[2], z[3], 0x44), d = _mm512_shuffle_i32x4(z[2], z[3], 0xee);
    z[0] = _mm512_shuffle_i32x4(a, c, 0x88), z[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    z[2] = _mm512_shuffle_i32x4(b, d, 0x88), z[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// 64 bytes of the stream from a place on, of which `left` belong to the word
template <int KIND>
ALWAYS __m512i piece(const uint8_t* values, int64_t at, int64_t left, __m512i codebook) {
    if (left <= 0) return _mm512_setzero_si512();
    if (KIND == I4) return codes(values, at, codebook, lowest((left + 3) / 2));
    return _mm512_maskz_loadu_epi8(lowest(left), values + at * (KIND == BF16 ? 2 : 1));
}

// Units of 4 rows, side by side, as 4 rows of 64 bytes
template <int KIND>
ALWAYS void spread(__m512i* z, uint64_t bits, uint8_t* out) {
    const __m512i order = _mm512_load_si512(turns.rows[KIND == BF16]);
    for (int q = 0; q < 4; ++q) z[q] = _mm512_permutexvar_epi8(order, z[q]);
    swap_quarters(z);
    for (int r = 0; r < 4; ++r)
        _mm512_storeu_si512(
            out + r * 64,
            KIND == BF16 ? _mm512_maskz_expand_epi16(__mmask32(bits), z[r]) : _mm512_maskz_expand_epi8(bits, z[r])
        );
}

// The same of blocks of 4 or 16 rows
template <int KIND, int BLOCK>
ALWAYS void make_blocks_dense(
    const Matrix& m, Rows& rows, int64_t word, int64_t count, __m512i codebook, uint8_t* room
) {
    constexpr int64_t PARTS = tiles_of_word<KIND>(), EACH = 64 / (KIND == BF16 ? 2 : 1);  // elements of a vector
    const uint8_t* values = (const uint8_t*)m.values;
    const __m512i fours = _mm512_load_si512(turns.fours[KIND == BF16]);
    for (int g = 0; g < TILE / BLOCK; ++g) {
        uint8_t* out = room + g * BLOCK * 64;
        if (g * BLOCK >= rows.count) {
            for (int64_t i = 0; i < count * PARTS; ++i) std::memset(out + i * TILE_BYTES, 0, BLOCK * 64);
            continue;
        }
        const uint64_t* mask = m.mask + (rows.first / BLOCK + g) * m.words + word;
        for (int64_t i = 0; i < count * PARTS; ++i, out += TILE_BYTES) {
            const uint64_t bits = KIND == BF16 ? uint32_t(mask[i / 2] >> (i % 2 * 32)) : mask[i];
            const int64_t size = kept(bits) * BLOCK, at = rows.at[g], bytes = size * (64 / EACH);
            __m512i z[BLOCK / 4][4];
            for (int b = 0; b < BLOCK / 4; ++b) {
                __m512i w[4];
                for (int q = 0; q < 4; ++q) {
                    const int64_t number = 4 * b + q;
                    w[q] = piece<KIND>(values, at + number * EACH, bytes - number * 64, codebook);
                    if (BLOCK == 16) w[q] = _mm512_permutexvar_epi32(fours, w[q]);
                }
                if (BLOCK == 16) swap_quarters(w);
                for (int q = 0; q < 4; ++q) z[BLOCK == 16 ? q : 0][BLOCK == 16 ? b : q] = w[q];
            }
            for (int b = 0; b < BLOCK / 4; ++b) spread<KIND>(z[b], bits, out + b * 4 * 64);
            rows.at[g] += size;
        }
    }
}

// Tiles of weights times as many of T times 16 tokens, added to what the first T registers hold; `count` lie side by side
template <int KIND, int T>
ALWAYS void add_products(const uint8_t* w, const uint8_t* x, int64_t tiles, int64_t count) {
#define TILE_DOT(c, a, b) \
    if (KIND == BF16) { \
        TILE_DOT_BF16(c, a, b); \
    } else { \
        TILE_DOT_BYTES(c, a, b); \
    }
    for (int64_t i = 0; i < tiles; ++i, w += TILE_BYTES, x += count * TILE_BYTES) {
        TILE_LOAD(4, w);
        TILE_LOAD(5, x);
        TILE_DOT(0, 4, 5);
        if (T > 1) {
            TILE_LOAD(6, x + TILE_BYTES);
            TILE_DOT(1, 4, 6);
        }
        if (T > 2) {
            TILE_LOAD(7, x + 2 * TILE_BYTES);
            TILE_DOT(2, 4, 7);
        }
        if (T > 3) {
            TILE_LOAD(5, x + 3 * TILE_BYTES);
            TILE_DOT(3, 4, 5);
        }
    }
#undef TILE_DOT
}

ALWAYS void clear() {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
}

template <int T>
ALWAYS void take(uint8_t (*sums)[TILE_BYTES]) {
    TILE_STORE(0, sums[0]);
    if (T > 1) TILE_STORE(1, sums[1]);
    if (T > 2) TILE_STORE(2, sums[2]);
    if (T > 3) TILE_STORE(3, sums[3]);
}

// Sums of one scale, a row of tokens behind another, times it and added to what there is
template <int T>
ALWAYS void scale_up(const Matrix& m, const Rows& rows, int64_t scale, uint8_t (*sums)[TILE_BYTES], float (*all)[TILE * TILE]) {
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < rows.count; ++r) {
            const __m512 whole = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums[t] + r * 64));
            const __m512 factor = _mm512_set1_ps(m.scale[(rows.first + r) * m.scales + scale]);
            float* to = all[t] + r * TILE;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_mul_ps(whole, factor)));
        }
}

// Results of 16 tokens by rows to results by tokens
ALWAYS void put(
    const Matrix& m, const Rows& rows, const float* sums, const float* factor, int64_t tokens, const float* bias, float* y
) {
    float offset[TILE] = {};
    if (bias) std::memcpy(offset, bias + rows.first, rows.count * sizeof(float));
    alignas(64) int32_t places[TILE];
    for (int r = 0; r < TILE; ++r) places[r] = r * int(TILE);
    const __m512i every = _mm512_load_si512(places);
    const __mmask16 there = __mmask16(lowest(rows.count));
    for (int64_t t = 0; t < tokens; ++t) {
        __m512 value = _mm512_i32gather_ps(every, sums + t, 4);
        if (factor) value = _mm512_mul_ps(value, _mm512_set1_ps(factor[t]));
        _mm512_mask_storeu_ps(y + t * m.rows + rows.first, there, _mm512_add_ps(value, _mm512_loadu_ps(offset)));
    }
}

// Sixteen rows times T tiles of tokens; the first to come makes the weights dense, in `room` where others follow
template <int KIND, int T>
ALWAYS void sixteen_rows(
    const Matrix& m, const Tiled& in, Rows& rows, int64_t tile, const float* bias, float* y, uint8_t* room
) {
    constexpr int64_t EACH = tiles_of_word<KIND>();
    alignas(64) uint8_t sums[T][TILE_BYTES];
    alignas(64) float all[T][TILE * TILE];
    const int64_t reach = KIND == BF16 ? m.words : words_of_scale(m);
    const bool keep = in.tiles > 4, made = tile > 0;
    const __m512i codebook = codebook_of(m);
    if (KIND != BF16) std::memset(all, 0, sizeof(all));
    for (int64_t word = 0, scale = 0; word < m.words; ++scale) {
        const int64_t end = word + reach < m.words ? word + reach : m.words;
        clear();
        for (int64_t stop; word < end; word = stop) {
            stop = word + NEAR < end ? word + NEAR : end;
            uint8_t* here = room + (keep ? word * EACH * TILE_BYTES : 0);
            if (!made) {
                if (m.block == 1) make_dense<KIND>(m, rows, word, stop - word, codebook, here);
                if (m.block == 4) make_blocks_dense<KIND, 4>(m, rows, word, stop - word, codebook, here);
                if (m.block == 16) make_blocks_dense<KIND, 16>(m, rows, word, stop - word, codebook, here);
                for (int64_t i = word; i < stop; ++i) rows.fetch();
            }
            add_products<KIND, T>(here, in.x + (word * EACH * in.tiles + tile) * TILE_BYTES, (stop - word) * EACH, in.tiles);
        }
        take<T>(sums);
        if (KIND != BF16) scale_up<T>(m, rows, scale, sums, all);
    }
    for (int t = 0; t < T; ++t) {
        const int64_t token = (tile + t) * TILE, left = in.batch - token;
        const float* found = KIND == BF16 ? (const float*)sums[t] : all[t];
        put(m, rows, found, in.factor ? in.factor + token : nullptr, left < TILE ? left : TILE, bias, y + token * m.rows);
    }
}

template <int KIND>
void tiled_of(const Matrix& m, const Tiled& in, const float* bias, float* y, uint8_t* room, int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) {
        Rows rows(m, group * TILE);
        for (int64_t tile = 0; tile < in.tiles;) {
            const int64_t left = in.tiles - tile;
            const int tiles = int(left < 4 ? left : 4);
            if (tiles == 4) sixteen_rows<KIND, 4>(m, in, rows, tile, bias, y, room);
            if (tiles == 3) sixteen_rows<KIND, 3>(m, in, rows, tile, bias, y, room);
            if (tiles == 2) sixteen_rows<KIND, 2>(m, in, rows, tile, bias, y, room);
            if (tiles == 1) sixteen_rows<KIND, 1>(m, in, rows, tile, bias, y, room);
            tile += tiles;
        }
    }
}

void tiled(const Matrix& m, const Tiled& in, const float* bias, float* y, uint8_t* room, int64_t first, int64_t last) {
    const Configuration configuration;
    TILE_CONFIGURE(&configuration);
    if (m.kind == BF16) {
        tiled_of<BF16>(m, in, bias, y, room, first, last);
    } else if (m.kind == I8) {
        tiled_of<I8>(m, in, bias, y, room, first, last);
    } else {
        tiled_of<I4>(m, in, bias, y, room, first, last);
    }
    TILE_RELEASE();
}

}  // namespace

AVX512_END

#if defined(SECATEUR_EMULATED_AVX512)
static bool runs_here() { return true; }
#else
// The operating system has to be asked for the registers
static bool runs_here() {
    constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return has_amx() && syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}
#endif

const Kernels* amx_kernels() {
    static Kernels table;
    static const bool here = [] {
        const Kernels* wide = avx512_kernels();
        if (!wide || !runs_here() || !write_orders() || !write_turns()) return false;
        table = {wide->few, wide->many, tiled, wide->squares, wide->lanes};
        return true;
    }();
    return here ? &table : nullptr;
}

}  // namespace sparse

#endif
