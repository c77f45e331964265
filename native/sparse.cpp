// Sparse products: what Python calls. Checks, inputs made ready, work shared out.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "api.h"
#include "pool.h"
#include "sparse.h"

using namespace sparse;

namespace {

const Kernels* kernels(int level) {
    const Kernels* found = level == 3   ? amx_kernels()
                           : level == 2 ? avx512_kernels()
                           : level == 1 ? avx2_kernels()
                                        : nullptr;
    return found ? found : scalar_kernels();
}

WIDE bool finite(const float* x, int64_t size) {
    uint32_t worst = 0;
    for (int64_t i = 0; i < size; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        worst |= uint32_t((bits & 0x7f800000) == 0x7f800000);
    }
    return !worst;
}

// Buffers of one call; kept by the calling thread from call to call.
struct Room {
    std::vector<float> plain, paired, packed;
    std::vector<int8_t> integers, magnitudes;
    std::vector<uint8_t> shifted, tiles;
    std::vector<uint16_t> halves;
    std::vector<float> factor;

    // What a rare large batch needed is given back: to fetch it again costs little beside its product
    void give_back() {
        constexpr size_t MOST = size_t(1) << 25;
        const size_t held = (plain.capacity() + paired.capacity() + packed.capacity()) * sizeof(float) + integers.capacity() +
                            magnitudes.capacity() + shifted.capacity() + tiles.capacity() + halves.capacity() * 2;
        if (held > MOST) *this = Room();
    }
};

// Room for elements from a whole cache line on: a vector across two of them takes twice as long
template <class T>
T* in_lines(std::vector<T>& held, int64_t size) {
    held.resize(size + 64 / sizeof(T));
    return held.data() + (64 - reinterpret_cast<uintptr_t>(held.data()) % 64) % 64 / sizeof(T);
}

WIDE void to_integers(const float* x, int64_t columns, int8_t* out, float* factor) {
    float most[16] = {}, largest = 0;  // side by side, so that comparisons do not wait for each other
    int64_t start = 0;
    for (; start + 16 <= columns; start += 16)
        for (int i = 0; i < 16; ++i) most[i] = std::fabs(x[start + i]) > most[i] ? std::fabs(x[start + i]) : most[i];
    for (; start < columns; ++start) largest = std::max(largest, std::fabs(x[start]));
    for (float each : most) largest = std::max(largest, each);
    *factor = largest / 127;
    const float inverse = largest > 1e-30f ? 127 / largest : 0;
    for (int64_t c = 0; c < columns; ++c) {
        // adding 1.5 * 2^23 rounds to the nearest whole number, which is then in the low bits
        const float shifted = x[c] * inverse + 12582912.0f;
        int32_t bits;
        std::memcpy(&bits, &shifted, 4);
        out[c] = int8_t(bits);
    }
}

WIDE void without_signs(const int8_t* x, int64_t size, int8_t* out) {
    for (int64_t i = 0; i < size; ++i) out[i] = int8_t(x[i] < 0 ? -x[i] : x[i]);
}

Inputs ready(const Matrix& m, const float* x, int64_t batch, bool shifted, Room& room) {
    Inputs in{};
    in.batch = batch, in.padded = (m.columns + SPAN - 1) / SPAN * SPAN;
    if (in_integers(m)) {
        int8_t* integers = in_lines(room.integers, batch * in.padded);
        room.factor.resize(batch);
        for (int64_t b = 0; b < batch; ++b) {
            int8_t* row = integers + b * in.padded;
            to_integers(x + b * m.columns, m.columns, row, room.factor.data() + b);
            std::memset(row + m.columns, 0, in.padded - m.columns);
        }
        in.integers = integers, in.factor = room.factor.data();
        if (m.form == SEMI) return in;
        if (shifted) {
            uint8_t* above = in_lines(room.shifted, batch * in.padded);
            for (int64_t i = 0; i < batch * in.padded; ++i) above[i] = uint8_t(integers[i] + 128);
            in.shifted = above;
        } else if (batch <= FEW) {
            int8_t* magnitudes = in_lines(room.magnitudes, batch * in.padded);
            without_signs(integers, batch * in.padded, magnitudes);
            in.magnitudes = magnitudes;
        }
        return in;
    }
    float* plain = in_lines(room.plain, batch * in.padded);
    for (int64_t b = 0; b < batch; ++b) {
        float* row = plain + b * in.padded;
        std::memcpy(row, x + b * m.columns, m.columns * sizeof(float));
        std::fill(row + m.columns, row + in.padded, 0.0f);
    }
    in.plain = plain;
    if (m.form == SEMI && m.bits == 4 && m.kept < 8) {
        float* quarters = in_lines(room.paired, batch * in.padded);
        for (int64_t i = 0; i < in.padded; i += 4) {
            const int64_t from = column_of_quarter(m, i);
            for (int64_t b = 0; b < batch; ++b) std::memcpy(quarters + b * in.padded + i, plain + b * in.padded + from, 16);
        }
        in.quarters = quarters;
    }
    if (m.kind == BF16 && m.block == 1 && m.form == BITMASK) {
        float* paired = in_lines(room.paired, batch * in.padded);
        for (int64_t start = 0; start < batch * in.padded; start += 32)
            for (int i = 0; i < 16; ++i) {
                paired[start + i] = in.plain[start + 2 * i];
                paired[start + 16 + i] = in.plain[start + 2 * i + 1];
            }
        in.paired = paired;
    }
    return in;
}

// SEMI: whether a vector lies in a scale, or holds 2 or 4 whole ones
bool whole_scales(const Matrix& m) {
    if (m.block != 1) return false;
    if (m.scales == 1 || m.kind < I8) return true;
    if (m.kind == I8) return false;
    const int64_t reach = CHUNK * VECTOR / m.kept, width = m.columns / m.scales;
    return m.columns % reach == 0 && (width % reach == 0 || reach == 2 * width || reach == 4 * width);
}

// Whether float32 numbers are bfloat16 ones, as inputs of a model in that type are
bool in_bf16(const float* x, int64_t size) {
    uint32_t rest = 0;
    for (int64_t i = 0; i < size; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        rest |= bits & 0xffff;
    }
    return !rest;
}

// Whether the table has a way through tile registers for this product
bool by_tiles(const Kernels* table, const Matrix& m, const float* x, int64_t batch) {
    if (!table->tiled || batch <= FEW || m.form == INDEX || m.form >= SQUARES) return false;
    return in_integers(m) || (m.kind == BF16 && in_bf16(x, batch * m.columns));
}

Tiled ready_for_tiles(const Matrix& m, const float* x, int64_t batch, Room& room) {
    const int64_t size = m.kind == BF16 ? 2 : 1;
    const int64_t bytes = m.words * WORD * (m.form == SQUARES ? SIDE : size);  // of a padded row
    Tiled in{batch, (batch + TILE - 1) / TILE, nullptr, nullptr};
    const char* rows;
    if (size == 1) {
        room.integers.assign(batch * bytes, 0), room.factor.resize(batch);
        for (int64_t b = 0; b < batch; ++b)
            to_integers(x + b * m.columns, m.columns, room.integers.data() + b * bytes, room.factor.data() + b);
        rows = reinterpret_cast<const char*>(room.integers.data()), in.factor = room.factor.data();
    } else {
        room.halves.assign(batch * bytes / 2, 0);
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t c = 0; c < m.columns; ++c) {
                uint32_t bits;
                std::memcpy(&bits, x + b * m.columns + c, 4);
                room.halves[b * bytes / 2 + c] = uint16_t(bits >> 16);
            }
        rows = reinterpret_cast<const char*>(room.halves.data());
    }
    uint8_t* tiles = in_lines(room.tiles, bytes / 64 * in.tiles * TILE_BYTES);
    std::memset(tiles, 0, bytes / 64 * in.tiles * TILE_BYTES);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < bytes; i += 4) {
            uint8_t* tile = tiles + (i / 64 * in.tiles + b / TILE) * TILE_BYTES;
            std::memcpy(tile + i % 64 / 4 * 64 + b % TILE * 4, rows + b * bytes + i, 4);
        }
    in.x = tiles;
    return in;
}

// x[token][column] to packed[column][lane]; lanes without a token are zero.
void pack(const float* x, int64_t tokens, int64_t columns, int lanes, float* packed, int threads) {
    constexpr int64_t STEP = 64;
    in_parallel((columns + STEP - 1) / STEP, threads, [&](int64_t chunk) {
        const int64_t first = chunk * STEP, last = std::min(columns, first + STEP);
        if (tokens < lanes) std::memset(packed + first * lanes, 0, (last - first) * lanes * sizeof(float));
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t c = first; c < last; ++c) packed[c * lanes + t] = x[t * columns + c];
    });
}

int lanes_for(int64_t tokens, int most) {
    int lanes = 8;
    while (lanes < tokens && lanes < most) lanes *= 2;
    return lanes;
}

void multiply_many(
    const Kernels* table, const Matrix& m, const float* x, int64_t batch, const float* bias, float* y, int threads,
    Room& room
) {
    const int lanes = lanes_for(batch, m.block > 1 ? table->lanes : 64);
    const int64_t tiles = (batch + lanes - 1) / lanes, each = (m.columns + SPAN - 1) / SPAN * SPAN * lanes;
    float* packed = in_lines(room.packed, tiles * each);
    for (int64_t tile = 0; tile < tiles; ++tile)
        pack(
            x + tile * lanes * m.columns, std::min<int64_t>(lanes, batch - tile * lanes), m.columns, lanes,
            packed + tile * each, threads
        );
    if (m.form == SEMI)  // a value that only fills a vector is zero, and may stand behind the last column
        for (int64_t tile = 0; tile < tiles; ++tile)
            std::fill(packed + tile * each + m.columns * lanes, packed + (tile + 1) * each, 0.0f);
    const int64_t panel = std::max<int64_t>(1, PANEL / m.block), panels = (m.groups + panel - 1) / panel;
    in_parallel(panels * tiles, threads, [&](int64_t chunk) {
        alignas(64) float local[PANEL * 64];
        const int64_t tile = chunk % tiles, first = chunk / tiles * panel, last = std::min(m.groups, first + panel);
        std::memset(local, 0, (last - first) * m.block * lanes * sizeof(float));
        table->many(m, packed + tile * each, lanes, local, first, last);
        const int64_t from = first * m.block, to = std::min(m.rows, last * m.block);
        for (int64_t t = 0, token = tile * lanes; t < lanes && token < batch; ++t, ++token)
            for (int64_t row = from; row < to; ++row)
                y[token * m.rows + row] = local[(row - from) * lanes + t] + (bias ? bias[row] : 0.0f);
    });
}

void multiply_tiled(
    const Kernels* table, const Matrix& m, const float* x, int64_t batch, const float* bias, float* y, int threads,
    Room& room
) {
    const Tiled in = ready_for_tiles(m, x, batch, room);
    const int64_t groups = (m.rows + TILE - 1) / TILE, step = std::max<int64_t>(1, std::min<int64_t>(8, groups / (4 * threads)));
    in_parallel((groups + step - 1) / step, threads, [&](int64_t chunk) {
        thread_local std::vector<uint8_t> dense;
        dense.resize((m.words + FEW) * 2 * TILE_BYTES + 64);
        uint8_t* aligned = dense.data() + (64 - reinterpret_cast<uintptr_t>(dense.data()) % 64) % 64;
        table->tiled(m, in, bias, y, aligned, chunk * step, std::min(groups, (chunk + 1) * step));
    });
}

void multiply_squares(
    const Kernels* table, const Matrix& m, const float* x, int64_t batch, const float* bias, float* y, int threads,
    Room& room
) {
    const Tiled in = ready_for_tiles(m, x, batch, room);
    constexpr int64_t MOST = 16;  // groups whose sums stay in the nearest cache
    const int64_t step = std::max<int64_t>(1, std::min<int64_t>(MOST, m.groups / (4 * threads)));
    in_parallel((m.groups + step - 1) / step, threads, [&](int64_t chunk) {
        alignas(64) int32_t sums[MOST * SIDE * TWO];
        const int64_t first = chunk * step, last = std::min(m.groups, first + step);
        const int64_t from = first * SIDE, to = std::min(m.rows, last * SIDE);
        for (int64_t tile = 0; tile < in.tiles; tile += 2) {
            table->squares(m, in, tile, sums, first, last);
            const int64_t token = tile * TILE, stop = std::min(batch, token + TWO);
            for (int64_t b = token; b < stop; ++b)
                for (int64_t row = from; row < to; ++row)
                    y[b * m.rows + row] = float(sums[(row - from) * TWO + b - token]) * m.scale[row] * in.factor[b] +
                                          (bias ? bias[row] : 0.0f);
        }
    });
}

void multiply(
    const Kernels* table, const Matrix& m, const float* x, int64_t batch, const float* bias, float* y, int64_t way, int threads,
    bool shifted, Room& room
) {
    const bool squares = m.form == SQUARES, semi = m.form == SEMI;
    if (way == 0 && by_tiles(table, m, x, batch)) return multiply_tiled(table, m, x, batch, bias, y, threads, room);
    if (squares && batch > FEW && table->squares) return multiply_squares(table, m, x, batch, bias, y, threads, room);
    if (semi ? way == 1 && m.kind < I8 : !squares && (way == 1 || (batch > FEW && !in_integers(m))))
        return multiply_many(table, m, x, batch, bias, y, threads, room);
    const Inputs in = ready(m, x, batch, shifted, room);
    const int64_t step = std::max<int64_t>(1, std::min<int64_t>(64, m.groups / (4 * threads) + 1));
    in_parallel((m.groups + step - 1) / step, threads, [&](int64_t chunk) {
        table->few(m, in, bias, y, chunk * step, std::min(m.groups, (chunk + 1) * step));
    });
}

}  // namespace

// The best kernels of this library that run here: 3 for AMX, 2 for AVX-512, 1 for AVX2, 0 for plain ones.
API int64_t secateur_sparse_level() { return amx_kernels() ? 3 : avx512_kernels() ? 2 : avx2_kernels() ? 1 : 0; }

// y = x w^T + bias. `way` 0: straight from the stream, at most FEW tokens unless they become integers or meet tile registers;
// 1: tokens in the lanes, which is what is done with more tokens in way 0 too; SQUARES have one way, and so
// do SEMI's integers. `level` as above.
// Returns 0; 1, with nothing done, where x holds NaN or Inf and the way would not carry them to every row; 2 for a form that
// does not go with its kind; 3 where memory is short.
API int64_t secateur_sparse_multiply(const void* const* pointers, const int64_t* numbers) {
    Matrix m{};
    m.form = int32_t(numbers[0]), m.kind = int32_t(numbers[1]), m.block = int32_t(numbers[2]);
    if (m.form >= SEMI) {
        constexpr int32_t PATTERNS[][2] = {{8, 2}, {4, 2}, {8, 4}, {4, 4}, {2, 4}};  // 2:4, 1:4, 8:16, 4:16, 2:16
        if (m.form >= SEMI + 5) return 2;
        m.kept = PATTERNS[m.form - SEMI][0], m.bits = PATTERNS[m.form - SEMI][1], m.form = SEMI;
    }
    m.rows = numbers[3], m.columns = numbers[4], m.scales = numbers[5];
    const int64_t batch = numbers[6], way = numbers[7];
    const int threads = int(numbers[8]), level = int(numbers[9]);
    if (m.form == DENSE && m.kind == I4) m.form = SEMI, m.kept = CHUNK, m.bits = 4;
    m.groups = (m.rows + m.block - 1) / m.block;
    m.words = m.form == INDEX || m.form == SQUARES ? (m.columns + SPAN - 1) / SPAN : (m.columns + WORD - 1) / WORD;
    m.mask = static_cast<const uint64_t*>(pointers[0]);
    m.counts = static_cast<const uint16_t*>(pointers[1]);
    m.index = static_cast<const uint8_t*>(pointers[2]);
    m.values = pointers[3];
    m.offsets = static_cast<const int64_t*>(pointers[4]);
    m.scale = static_cast<const float*>(pointers[5]);
    m.codebook = static_cast<const int8_t*>(pointers[6]);
    const float* x = static_cast<const float*>(pointers[7]);
    const float* bias = static_cast<const float*>(pointers[8]);
    float* y = static_cast<float*>(const_cast<void*>(pointers[9]));
    if (m.form == DENSE && (m.kind != I8 || m.block != 1)) return 2;
    if (m.form == SQUARES && (m.kind != I8 || m.block != SIDE || m.scales != 1)) return 2;
    if (m.form == SEMI && !whole_scales(m)) return 2;
    if (!finite(x, batch * m.columns)) return 1;
    thread_local Room room;
    try {
        multiply(kernels(level), m, x, batch, bias, y, way, threads, level >= 2, room);
        room.give_back();
    } catch (const std::bad_alloc&) {
        room = Room();
        return 3;
    }
    return 0;
}
