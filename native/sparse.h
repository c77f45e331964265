// Sparse matrices times dense inputs: what the kernels of all instruction sets share.
//
// One translation unit per instruction set gives one table of functions; sparse.cpp chooses a table at run time. Nothing
// but plain functions and structs appears in those units: a template of the standard library compiled for AVX2 could
// be the copy that the linker keeps for everybody.

#pragma once

#include <cstdint>

namespace sparse {

enum Kind : int32_t { F32, BF16, F16, I8, I4 };
enum Form : int32_t { BITMASK, INDEX, DENSE, SQUARES, SEMI };

constexpr int64_t WORD = 64;    // columns of one mask
constexpr int64_t SPAN = 256;   // columns that an 8-bit index reaches
constexpr int64_t PANEL = 64;   // row groups whose results stay in the nearest cache
constexpr int64_t FEW = 4;      // tokens that are multiplied straight from the stream
constexpr int64_t TILE = 16;    // rows, or tokens, of a tile register
constexpr int64_t TWO = 2 * TILE;
constexpr int64_t TILE_BYTES = 1024;
constexpr int64_t SIDE = 4;     // rows and columns of a square
constexpr int64_t CHUNK = 16;   // columns of which SEMI keeps a fixed number, and bytes of half a vector
constexpr int64_t VECTOR = 32;  // bytes of a vector, in whose lanes SEMI's values lie

// A matrix of `rows` x `columns`. Its units are single weights, or blocks of `block` rows by one column; `groups` is the
// number of block rows. Values lie in order of (group, column, row of the block); those of group g start at element
// offsets[g]. int4: two in a byte, the lower half first, each group from a whole byte on. SQUARES: int8 alone; units are
// blocks of 4 rows by 4 columns, a bit stands for one, and values lie in order of (group, square, row, column).
//
// SEMI: single weights, `kept` of every 16 columns, as many of every 4 with indices of 2 bits; where fewer are, values are
// zero. A vector has 32 lanes, or 8 in the floating-point kinds. Lane l of a row's vector v holds the value at its
// place 32 v + l (or 8 v + l), whose unit of columns `unit_of` tells; its index lies in lane l of the row's indices, 32
// bytes for the vectors that fill their bits, the first vector lowest. int4: lane l of vectors 2 u and 2 u + 1 is byte 32 u + l
// of a row, the first in its lower half. DENSE of int4 is the case of 16 kept, without indices.
struct Matrix {
    int32_t form, kind, block;
    int32_t kept, bits;       // SEMI
    int64_t rows, columns, groups;
    int64_t words;            // of 64 columns (BITMASK) or 256 (INDEX, SQUARES)
    const uint64_t* mask;     // groups x words; bit c of a word is column, or square, 64 * word + c
    const uint16_t* counts;   // INDEX: groups x words, values in each span of 256 columns
    const uint8_t* index;     // INDEX: columns within the span
    const void* values;       // with at least 64 readable bytes behind the last one
    const int64_t* offsets;   // groups + 1
    const float* scale;       // rows x scales, or null
    int64_t scales;           // of a row; each is for columns / scales columns
    const int8_t* codebook;   // I4: 16 entries, the first is 0
};

// Inputs made ready once per call; each buffer is padded with zeros to a whole number of words.
struct Inputs {
    int64_t batch, padded;        // columns with padding
    const float* plain;           // batch x padded
    const float* paired;          // BF16: of every 32 columns the even ones, then the odd ones
    const float* quarters;        // SEMI of numbers, 4 or 2 of every 16: fours of columns as vectors take them, see below
    const int8_t* integers;       // I8, I4: batch x padded, in [-127, 127]
    const int8_t* magnitudes;     // of those, for at most FEW tokens; not for AVX-512
    const uint8_t* shifted;       // those and 128, for AVX-512
    const float* factor;          // batch: what an integer stands for
};

// Inputs as AMX takes them: for every 64 bytes of a row of weights `tiles` tiles of 16 tokens. Row k of a tile holds, token
// by token, the 4 bytes that meet bytes 4k..4k+3 of those 64: 4 columns of int8, 2 of bfloat16.
struct Tiled {
    int64_t batch, tiles;
    const uint8_t* x;
    const float* factor;  // batch: what an integer stands for; null for bfloat16
};

struct Kernels {
    // y[b][row] for the groups first..last-1 of a batch of at most FEW, or of any in_integers
    void (*few)(const Matrix&, const Inputs&, const float* bias, float* y, int64_t first, int64_t last);
    // The same for `lanes` tokens whose inputs are x[column][lane]; lanes is 8, 16, 32 or 64; y[row][lane] is local
    void (*many)(const Matrix&, const float* x, int lanes, float* y, int64_t first, int64_t last);
    // y[b][row] for the rows 16 * first..16 * last-1, or null where there is no such way; `room` holds 16 dense rows
    void (*tiled)(const Matrix&, const Tiled&, const float* bias, float* y, uint8_t* room, int64_t first, int64_t last);
    // SQUARES: sums[row][token] of the groups first..last-1, for the tokens of at most TWO tiles from `tile` on; null where
    // `few` takes any number
    void (*squares)(const Matrix&, const Tiled&, int64_t tile, int32_t* sums, int64_t first, int64_t last);
    int lanes;  // most that `many` takes of blocks: 16, 32 or 64
};

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();  // null where they were not compiled or the machine lacks something
const Kernels* avx512_kernels();
const Kernels* amx_kernels();

// SQUARES, in units of their own
void few_squares_avx2(const Matrix&, const Inputs&, const float* bias, float* y, int64_t first, int64_t last);
void few_squares_avx512(const Matrix&, const Inputs&, const float* bias, float* y, int64_t first, int64_t last);
void squares_avx2(const Matrix&, const Tiled&, int64_t tile, int32_t* sums, int64_t first, int64_t last);
void squares_avx512(const Matrix&, const Tiled&, int64_t tile, int32_t* sums, int64_t first, int64_t last);

void few_semi_avx2(const Matrix&, const Inputs&, const float* bias, float* y, int64_t first, int64_t last);

// SEMI: lanes of a vector, vectors of a row, and bytes of a row's indices
static inline int64_t lanes_of(const Matrix& m) { return m.kind == I8 || m.kind == I4 ? VECTOR : VECTOR / 4; }
static inline int64_t vectors_of(const Matrix& m) {
    const int64_t reach = CHUNK * lanes_of(m) / m.kept;
    return (m.columns + reach - 1) / reach;
}
static inline int64_t indices_of(const Matrix& m) {
    const int64_t filled = 8 * VECTOR / lanes_of(m) / m.bits;
    return (vectors_of(m) + filled - 1) / filled * VECTOR;
}

// Where lane `lane` of a row's vector takes its input: the first column of those that its index chooses among. Halves of a
// vector take turns, chunk by chunk (of 16 bytes, or 4 numbers), so that a shuffle within halves meets inputs as they lie.
static inline int64_t unit_of(const Matrix& m, int64_t vector, int64_t lane) {
    const int64_t lanes = lanes_of(m), wide = m.bits == 2 ? 4 : CHUNK, each = m.kept * wide / CHUNK;  // values of a unit
    const int64_t units = lanes / each, start = vector * units * wide;
    if (lanes < VECTOR && m.bits != 2) return start + lane / each * wide;
    const int64_t half = lanes / 2, chunk = lanes < VECTOR ? 4 : CHUNK, whole = each * chunk / wide;  // values of a chunk
    const int64_t in_half = lane % half;
    return start + (2 * (in_half / whole) + lane / half) * chunk + in_half % whole / each * wide;
}

// SEMI of numbers, 4 or 2 of every 16: the column in place i of `quarters`. The lower half of a vector takes from one chunk of 16
// columns, or two, the upper half from as many that follow; a permutation within halves reaches 4, so those of both halves
// lie side by side.
static inline int64_t column_of_quarter(const Matrix& m, int64_t i) {
    const int64_t reach = CHUNK * 8 / m.kept, each = reach / 2 / CHUNK;  // chunks of a half
    const int64_t vector = i % reach / 8, half = i % 8 / 4;
    return i / reach * reach + (half * each + vector / 4) * CHUNK + vector % 4 * 4 + i % 4;
}

// SEMI of numbers: where the lanes of the vectors that meet 64 columns take their inputs from
static inline void units_of_word(const Matrix& m, uint8_t* first) {
    const int64_t reach = CHUNK * 8 / m.kept;
    for (int64_t i = 0; i < WORD / 2; ++i) first[i] = uint8_t(i / 8 * reach % WORD + unit_of(m, 0, i % 8));
}

// The columns that those vectors take, and how many they are: the ones from position `at` of the stream on, of a row's last
// 64 columns perhaps fewer
static inline __attribute__((always_inline)) int columns_of_word(const Matrix& m, int64_t row, int64_t at, const uint8_t* first, uint8_t* columns) {
    const int64_t filled = 32 / m.bits, stored = m.offsets[row + 1] - m.offsets[row], start = at - m.offsets[row];
    const int n = int(stored - start < m.kept * 4 ? stored - start : m.kept * 4);
    const uint8_t* index = m.index + row * ((stored / 8 + filled - 1) / filled * VECTOR);
    for (int i = 0; i < n; i += 8) {
        const int64_t vector = (start + i) / 8;
        uint32_t chosen[8];
        __builtin_memcpy(chosen, index + vector / filled * VECTOR, VECTOR);
        const int shift = int(vector % filled) * m.bits;
        for (int lane = 0; lane < 8; ++lane)
            columns[i + lane] = uint8_t(first[i + lane] + (chosen[lane] >> shift & ((1u << m.bits) - 1)));
    }
    return n;
}

// Whether inputs straight from the stream are rounded to integers, which serves any number of tokens
static inline bool in_integers(const Matrix& m) { return (m.kind == I8 || m.kind == I4) && m.form != INDEX; }

// A panel reads its rows in turn, more of them than the processor foresees: what a group needs for its next word is fetched
// when it is left, as many values as for this one, from position `at` on. (Always inline: a call of a function that does
// nothing but fetch is left out by compilers.)
static inline __attribute__((always_inline)) void fetch_next(const Matrix& m, int64_t group, int64_t word, int64_t at, int64_t count) {
    const int64_t bits = m.kind == F32 ? 32 : m.kind == I8 ? 8 : m.kind == I4 ? 4 : 16;
    const char* values = static_cast<const char*>(m.values) + at * bits / 8;
    for (int64_t line = 0; line < count * bits / 8 + 64; line += 64) __builtin_prefetch(values + line);
    if (m.form == BITMASK && word % 8 == 7) __builtin_prefetch(m.mask + group * m.words + word + 1);
}

}  // namespace sparse
