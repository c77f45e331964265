// SEMI made and made dense again: plain C++ for every machine. See sparse.h for how its parts lie.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "api.h"
#include "pool.h"
#include "sparse.h"

using namespace sparse;

namespace {

// Where a value of a unit lies in a row, and its index
struct Place {
    int32_t value, byte;
    int32_t shift;
};

// What Python tells of a row: units of `wide` columns of which `each` are kept; lane l of a vector has its indices in the l-th
// part of 32 bytes, `filled` vectors side by side.
struct Row {
    int64_t columns, stored, wide, each, lanes, filled, bits, bytes;  // `bytes` of its indices
    std::vector<Place> places;                                        // unit after unit

    Row(const int64_t* n, const int32_t* order)
        : columns(n[1]), stored(n[2]), wide(n[3]), each(n[4]), lanes(n[5]), filled(n[6]), bits(n[7]), bytes(n[8]) {
        const int64_t units = (columns + wide - 1) / wide;
        for (int64_t i = 0; i < units * each; ++i) {
            const int64_t vector = order[i] / lanes, bit = vector % filled * bits;
            const int64_t byte = vector / filled * VECTOR + order[i] % lanes * (VECTOR / lanes) + bit / 8;
            places.push_back({order[i], int32_t(byte), int32_t(bit % 8)});
        }
    }
};

template <class T>
bool put(const Row& r, const T* dense, T* values, uint8_t* index, T sign) {
    const Place* places = r.places.data();
    for (int64_t start = 0; start < r.columns; start += r.wide, places += r.each) {
        const int64_t stop = r.columns - start < r.wide ? r.columns - start : r.wide;
        T kept[CHUNK + 1];
        uint8_t columns[CHUNK + 1];
        int64_t n = 0;
        for (int64_t i = 0; i < stop; ++i) {  // no branch: half of them would be foreseen wrongly
            kept[n] = dense[start + i], columns[n] = uint8_t(i);
            n += (kept[n] & T(~sign)) != 0;
        }
        if (n > r.each) return false;
        for (int64_t i = 0; i < n; ++i) {
            uint8_t& byte = index[places[i].byte];
            byte = uint8_t(byte | columns[i] << places[i].shift);
            values[places[i].value] = kept[i];
        }
    }
    return true;
}

// Zeros are written nowhere: those of a unit that keeps fewer have the index of another
template <class T>
void take(const Row& r, const T* values, const uint8_t* index, T* dense) {
    const Place* place = r.places.data();
    const int low = (1 << r.bits) - 1;
    for (int64_t start = 0; start < r.columns; start += r.wide)
        for (int64_t i = 0; i < r.each; ++i, ++place) {
            const int64_t column = start + (index[place->byte] >> place->shift & low);
            const T value = values[place->value];
            if (value && column < r.columns) dense[column] = value;
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
void take_all(const Row& r, int64_t rows, const void* values, const uint8_t* index, void* dense, int threads) {
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
    const Row r(numbers, places);
    const int64_t rows = numbers[0], bytes = numbers[9];
    const bool sign = numbers[10];
    const int threads = int(numbers[11]);
    if (bytes == 4) return put_all<uint32_t>(r, rows, dense, values, index, sign ? 0x80000000u : 0, threads);
    if (bytes == 2) return put_all<uint16_t>(r, rows, dense, values, index, sign ? 0x8000 : 0, threads);
    return put_all<uint8_t>(r, rows, dense, values, index, 0, threads);
}

// The matrix again, without zeros' signs.
API int64_t secateur_semi_rows(
    void* dense, const int32_t* places, const void* values, const uint8_t* index, const int64_t* numbers
) {
    const Row r(numbers, places);
    const int64_t rows = numbers[0], bytes = numbers[9];
    const int threads = int(numbers[11]);
    if (bytes == 4) take_all<uint32_t>(r, rows, values, index, dense, threads);
    if (bytes == 2) take_all<uint16_t>(r, rows, values, index, dense, threads);
    if (bytes == 1) take_all<uint8_t>(r, rows, values, index, dense, threads);
    return 0;
}
