// SEMI made and made dense again: plain C++ for every machine. See sparse.h for how its parts lie.

#include <atomic>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "pool.h"
#include "sparse.h"

using namespace sparse;

namespace {

// What Python tells of a row: units of `wide` columns of which `each` are kept, at places[unit * each + i] of the row; lane l of a
// vector has its indices in the l-th part of 32 bytes, `filled` vectors side by side.
struct Row {
    int64_t columns, stored, wide, each, lanes, filled, bits, bytes;  // `bytes` of its indices
    const int32_t* places;

    uint8_t* of(uint8_t* index, int64_t place, int* shift) const {
        const int64_t vector = place / lanes, bit = vector % filled * bits;
        *shift = int(bit % 8);
        return index + vector / filled * VECTOR + place % lanes * (VECTOR / lanes) + bit / 8;
    }
};

Row row_of(const int64_t* n, const int32_t* places) {
    return {n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], places};
}

template <class T>
bool put(const Row& r, const T* dense, T* values, uint8_t* index, T sign) {
    const int32_t* places = r.places;
    for (int64_t start = 0; start < r.columns; start += r.wide, places += r.each) {
        const int64_t stop = r.columns - start < r.wide ? r.columns - start : r.wide;
        int64_t n = 0;
        for (int64_t i = 0; i < stop; ++i) {
            const T value = dense[start + i];
            if (!(value & T(~sign))) continue;
            if (n == r.each) return false;
            int shift;
            uint8_t* at = r.of(index, places[n], &shift);
            *at = uint8_t(*at | i << shift);
            values[places[n++]] = value;
        }
    }
    return true;
}

template <class T>
void take(const Row& r, const T* values, uint8_t* index, T* dense) {
    const int32_t* places = r.places;
    for (int64_t start = 0; start < r.columns; start += r.wide)
        for (int64_t i = 0; i < r.each; ++i, ++places) {
            int shift;
            const uint8_t* at = r.of(index, *places, &shift);
            const int64_t column = start + (*at >> shift & ((1 << r.bits) - 1));
            if (values[*places] && column < r.columns) dense[column] = values[*places];
        }
}

template <class Body>
void by_rows(int64_t rows, int threads, Body body) {
    constexpr int64_t STEP = 16;
    in_parallel((rows + STEP - 1) / STEP, threads, [&](int64_t chunk) {
        for (int64_t row = chunk * STEP; row < rows && row < (chunk + 1) * STEP; ++row) body(row);
    });
}

template <class T>
int64_t put_all(const Row& r, int64_t rows, const void* dense, void* values, uint8_t* index, T sign, int threads) {
    std::atomic<int64_t> wrong{0};
    by_rows(rows, threads, [&](int64_t row) {
        const T* from = static_cast<const T*>(dense) + row * r.columns;
        if (!put(r, from, static_cast<T*>(values) + row * r.stored, index + row * r.bytes, sign)) wrong = 1;
    });
    return wrong;
}

template <class T>
void take_all(const Row& r, int64_t rows, const void* values, uint8_t* index, void* dense, int threads) {
    by_rows(rows, threads, [&](int64_t row) {
        T* out = static_cast<T*>(dense) + row * r.columns;
        std::memset(out, 0, r.columns * sizeof(T));
        take(r, static_cast<const T*>(values) + row * r.stored, index + row * r.bytes, out);
    });
}

}  // namespace

// A matrix of elements of 4, 2 or 1 bytes to values and indices, both zeroed; 1 where a unit holds more than is kept.
// numbers: rows, columns, values stored of a row, columns of a unit, values of a unit, lanes, vectors that fill the bits of a lane's
// indices, bits of an index, bytes of a row's indices, bytes of an element, whether it has a sign bit, threads.
API int64_t secateur_semi_pack(const void* dense, const int32_t* places, void* values, uint8_t* index, const int64_t* numbers) {
    const Row r = row_of(numbers, places);
    const int64_t rows = numbers[0], bytes = numbers[9];
    const bool sign = numbers[10];
    const int threads = int(numbers[11]);
    if (bytes == 4) return put_all<uint32_t>(r, rows, dense, values, index, sign ? 0x80000000u : 0, threads);
    if (bytes == 2) return put_all<uint16_t>(r, rows, dense, values, index, sign ? 0x8000 : 0, threads);
    return put_all<uint8_t>(r, rows, dense, values, index, 0, threads);
}

// The matrix again, without zeros' signs.
API int64_t secateur_semi_rows(void* dense, const int32_t* places, const void* values, uint8_t* index, const int64_t* numbers) {
    const Row r = row_of(numbers, places);
    const int64_t rows = numbers[0], bytes = numbers[9];
    const int threads = int(numbers[11]);
    if (bytes == 4) take_all<uint32_t>(r, rows, values, index, dense, threads);
    if (bytes == 2) take_all<uint16_t>(r, rows, values, index, dense, threads);
    if (bytes == 1) take_all<uint8_t>(r, rows, values, index, dense, threads);
    return 0;
}
