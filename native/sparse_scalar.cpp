// The kernels in plain C++, for every machine; also what the others are compared with.

#include <cstring>

#include "sparse.h"

namespace sparse {
namespace {

// float16 to float32, with subnormal numbers, Inf and NaN
float half(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    uint32_t wide;
    if (rest >= 0x7c00) {
        wide = 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        wide = (rest << 13) + ((127 - 15) << 23);
    } else {
        float value = float(rest) * 5.9604644775390625e-8f;  // 2^-24
        std::memcpy(&wide, &value, 4);
    }
    wide |= sign;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// The value at a position of the stream, without its scale.
float value_at(const Matrix& m, int64_t at) {
    float value;
    switch (m.kind) {
        case F32: return static_cast<const float*>(m.values)[at];
        case BF16: {
            const uint32_t bits = uint32_t(static_cast<const uint16_t*>(m.values)[at]) << 16;
            std::memcpy(&value, &bits, 4);
            return value;
        }
        case F16: return half(static_cast<const uint16_t*>(m.values)[at]);
        case I8: return static_cast<const int8_t*>(m.values)[at];
        default: {
            const uint8_t byte = static_cast<const uint8_t*>(m.values)[at >> 1];
            return m.codebook[(at & 1) ? byte >> 4 : byte & 15];
        }
    }
}


// Calls see(column, position of the first value of the block) for every unit of a group; a square is seen as its four
// columns, each with the position of its first row.
template <class See>
void each(const Matrix& m, int64_t group, See see) {
    int64_t at = m.offsets[group];
    if (m.form == DENSE) {
        for (int64_t column = 0; column < m.columns; ++column, at += m.block) see(column, at);
    } else if (m.form == INDEX) {
        for (int64_t span = 0; span < m.words; ++span)
            for (int n = m.counts[group * m.words + span]; n > 0; --n, ++at) see(span * SPAN + m.index[at], at);
    } else if (m.form == SEMI) {
        const int64_t lanes = lanes_of(m), filled = 8 * VECTOR / lanes / m.bits;
        const uint8_t* index = m.index + group * indices_of(m);
        for (int64_t vector = 0; vector < vectors_of(m); ++vector)
            for (int64_t lane = 0; lane < lanes; ++lane) {
                // an index does not lie across bytes; a lane of 4 bytes starts with its lowest
                const int64_t bit = vector % filled * m.bits, first = vector / filled * VECTOR + lane * (VECTOR / lanes);
                const int64_t chosen = m.kept == CHUNK ? lane % CHUNK : index[first + bit / 8] >> bit % 8 & ((1 << m.bits) - 1);
                const int64_t column = unit_of(m, vector, lane) + chosen;
                const int64_t half = vector / 2 * 2 * lanes + 2 * lane + vector % 2;  // int4: vectors two by two
                if (column < m.columns) see(column, at + (m.kind == I4 ? half : vector * lanes + lane));
            }
    } else {
        const int64_t width = m.form == SQUARES ? SIDE : 1;
        for (int64_t word = 0; word < m.words; ++word)
            for (uint64_t bits = m.mask[group * m.words + word]; bits; bits &= bits - 1, at += m.block * width)
                for (int64_t i = 0; i < width; ++i) see((word * WORD + __builtin_ctzll(bits)) * width + i, at + i);
    }
}

float scale_at(const Matrix& m, int64_t row, int64_t column) {
    return m.scale ? m.scale[row * m.scales + column / (m.columns / m.scales)] : 1.0f;
}

// Integers times integers are summed exactly per scale, as the other instruction sets do.
float dot_integers(const Matrix& m, int64_t group, int64_t r, const int8_t* x) {
    int32_t sum = 0;
    int64_t current = 0;
    float total = 0;
    const int64_t width = m.columns / m.scales, row = group * m.block + r, step = m.form == SQUARES ? SIDE : 1;
    each(m, group, [&](int64_t column, int64_t at) {
        if (m.scales > 1 && column / width != current) {
            total += float(sum) * m.scale[row * m.scales + current];
            sum = 0, current = column / width;
        }
        sum += int32_t(value_at(m, at + r * step)) * x[column];
    });
    return total + float(sum) * m.scale[row * m.scales + current];
}

void few(const Matrix& m, const Inputs& in, const float* bias, float* y, int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group)
        for (int64_t b = 0; b < in.batch; ++b)
            for (int64_t r = 0, row = group * m.block; r < m.block && row < m.rows; ++r, ++row) {
                float sum = 0;
                if (in_integers(m)) {
                    sum = dot_integers(m, group, r, in.integers + b * in.padded) * in.factor[b];
                } else {
                    const float* x = in.plain + b * in.padded;
                    each(m, group, [&](int64_t column, int64_t at) {
                        sum += value_at(m, at + r) * scale_at(m, row, column) * x[column];
                    });
                }
                y[b * m.rows + row] = sum + (bias ? bias[row] : 0.0f);
            }
}

void many(const Matrix& m, const float* x, int lanes, float* y, int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) {
        float* out = y + (group - first) * m.block * lanes;
        each(m, group, [&](int64_t column, int64_t at) {
            for (int64_t r = 0; r < m.block && group * m.block + r < m.rows; ++r) {
                const float w = value_at(m, at + r) * scale_at(m, group * m.block + r, column);
                for (int lane = 0; lane < lanes; ++lane) out[r * lanes + lane] += w * x[column * lanes + lane];
            }
        });
    }
}

const Kernels table = {few, many, nullptr, nullptr, 16};

}  // namespace

const Kernels* scalar_kernels() { return &table; }

}  // namespace sparse
