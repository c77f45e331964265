// Packing: which weights are not zero, those alone, and the matrix again. Called from Python.

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "api.h"
#include "pool.h"
#include "sparse.h"

using namespace sparse;

namespace {

// Bytes are counted and moved by the size of an element alone; a value of zero is one whose bits are zero, apart from
// the sign where there is one.
template <class T>
inline bool is_zero(T value, T sign) {
    return T(value & T(~sign)) == 0;
}

struct Found {
    uint64_t kept, minus;  // bits of the non-zeros of a word, and of the zeros with a sign
};

template <class T>
Found look(const T* row, int64_t n, T sign) {
    Found found{0, 0};
    for (int64_t c = 0; c < n; ++c) {
        const uint64_t kept = !is_zero(row[c], sign);
        found.kept |= kept << c;
        found.minus |= uint64_t(!kept && row[c] != 0) << c;
    }
    return found;
}

#if defined(__SSE2__)
// Bits of the bytes of 16 elements: which are zero in the masked bits
inline uint32_t zeros(const uint8_t* at, __m128i mask) {
    const __m128i x = _mm_and_si128(_mm_loadu_si128((const __m128i*)at), mask);
    return uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(x, _mm_setzero_si128())));
}

inline uint32_t zeros(const uint16_t* at, __m128i mask) {
    const __m128i none = _mm_setzero_si128();
    const __m128i a = _mm_cmpeq_epi16(_mm_and_si128(_mm_loadu_si128((const __m128i*)at), mask), none);
    const __m128i b = _mm_cmpeq_epi16(_mm_and_si128(_mm_loadu_si128((const __m128i*)(at + 8)), mask), none);
    return uint32_t(_mm_movemask_epi8(_mm_packs_epi16(a, b)));
}

inline uint32_t zeros(const uint32_t* at, __m128i mask) {
    __m128i found[4];
    for (int i = 0; i < 4; ++i) {
        const __m128i x = _mm_and_si128(_mm_loadu_si128((const __m128i*)(at + 4 * i)), mask);
        found[i] = _mm_cmpeq_epi32(x, _mm_setzero_si128());
    }
    const __m128i low = _mm_packs_epi32(found[0], found[1]), high = _mm_packs_epi32(found[2], found[3]);
    return uint32_t(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
}

template <class T>
Found look_at_word(const T* row, T sign) {
    const __m128i all = _mm_set1_epi8(-1);
    const __m128i magnitude = sizeof(T) == 1   ? all
                              : sizeof(T) == 2 ? _mm_set1_epi16(int16_t(~sign))
                                               : _mm_set1_epi32(int32_t(~sign));
    Found found{0, 0};
    for (int i = 0; i < 4; ++i) {
        const uint64_t zero = zeros(row + 16 * i, magnitude);
        found.kept |= (~zero & 0xffff) << (16 * i);
        if (sign && zero) found.minus |= (zero & ~uint64_t(zeros(row + 16 * i, all))) << (16 * i);
    }
    return found;
}
#else
template <class T>
Found look_at_word(const T* row, T sign) {
    return look(row, WORD, sign);
}
#endif

// Bits of the non-zeros of a row, and those themselves; returns how many. `negative` (or null) gets the zeros with a sign.
template <class T>
int64_t encode_row(const T* row, int64_t columns, T sign, uint64_t* mask, uint64_t* negative, T* out) {
    int64_t n = 0;
    for (int64_t start = 0; start < columns; start += WORD) {
        const int64_t size = std::min(columns - start, WORD);
        const Found found = size == WORD ? look_at_word(row + start, sign) : look(row + start, size, sign);
        for (uint64_t bits = found.kept; bits; bits &= bits - 1) out[n++] = row[start + __builtin_ctzll(bits)];
        mask[start / WORD] = found.kept;
        if (negative) negative[start / WORD] = found.minus;
    }
    return n;
}

template <class T>
void decode_row(const uint64_t* mask, const uint64_t* negative, int64_t columns, T sign, const T* values, T* row) {
    std::memset(row, 0, columns * sizeof(T));
    for (int64_t start = 0; start < columns; start += WORD) {
        uint64_t bits = mask[start / WORD];
        T* out = row + start;
        if (bits == ~0ull) {
            std::memcpy(out, values, WORD * sizeof(T));
            values += WORD;
        } else {
            for (; bits; bits &= bits - 1) out[__builtin_ctzll(bits)] = *values++;
        }
        if (negative)
            for (uint64_t minus = negative[start / WORD]; minus; minus &= minus - 1) out[__builtin_ctzll(minus)] = sign;
    }
}

constexpr int64_t ROWS = 16;  // that a thread takes at a time, of encoding and decoding

template <class Work>
void by_rows(int64_t rows, int threads, Work work) {
    in_parallel((rows + ROWS - 1) / ROWS, threads, [&](int64_t chunk) {
        for (int64_t row = chunk * ROWS; row < std::min(rows, (chunk + 1) * ROWS); ++row) work(row);
    });
}

template <class T>
void encode(
    const T* dense, int64_t rows, int64_t columns, T sign, uint64_t* mask, uint64_t* negative, T* values,
    const int64_t* offsets, int threads
) {
    const int64_t words = (columns + WORD - 1) / WORD;
    by_rows(rows, threads, [&](int64_t row) {
        std::vector<T> room(columns + 1);
        const int64_t n = encode_row(
            dense + row * columns, columns, sign, mask + row * words, negative ? negative + row * words : nullptr, room.data()
        );
        std::copy_n(room.data(), n, values + offsets[row]);  // not memcpy: `values` may be null where nothing is kept
    });
}

template <class T>
void decode(
    const uint64_t* mask, const uint64_t* negative, const T* values, const int64_t* offsets, int64_t rows,
    int64_t columns, T sign, T* dense, int threads
) {
    const int64_t words = (columns + WORD - 1) / WORD;
    by_rows(rows, threads, [&](int64_t row) {
        decode_row(
            mask + row * words, negative ? negative + row * words : nullptr, columns, sign, values + offsets[row],
            dense + row * columns
        );
    });
}

// A matrix in blocks of `block` rows by `across` columns: their bits, and the values of those that are kept, row after row. A
// block that holds a non-zero is kept whole; behind the last row and column its values are zero.
struct Blocks {
    int64_t rows, columns, block, across, words;

    Blocks(int64_t rows, int64_t columns, int64_t block, int64_t across)
        : rows(rows), columns(columns), block(block), across(across),
          words(((columns + across - 1) / across + WORD - 1) / WORD) {}

    int64_t groups() const { return (rows + block - 1) / block; }
};

// Of 64 bits, whether any of every four is set, as 16
inline uint64_t any_of_four(uint64_t bits) {
    bits |= bits >> 1, bits |= bits >> 2;
    uint64_t found = 0;
    for (int i = 0; i < 16; ++i) found |= (bits >> (4 * i) & 1) << i;
    return found;
}

// Bits of a group's blocks; `minus`, or null, gets for each row of the group the zeros with a sign that are cut. Returns how
// many those are.
template <class T>
int64_t bits_of_blocks(const Blocks& b, const T* dense, int64_t group, T sign, uint64_t* mask, uint64_t* minus) {
    const int64_t first = group * b.block, last = std::min(b.rows, first + b.block), words = (b.columns + WORD - 1) / WORD;
    int64_t count = 0;
    std::fill_n(mask, b.words, 0);
    for (int64_t word = 0; word < words; ++word) {
        const int64_t start = word * WORD, size = std::min(b.columns - start, WORD);
        Found found[16];
        uint64_t kept = 0;
        for (int64_t row = first; row < last; ++row) {
            const T* at = dense + row * b.columns + start;
            found[row - first] = size == WORD ? look_at_word(at, sign) : look(at, size, sign);
            kept |= found[row - first].kept;
        }
        mask[word / b.across] |= b.across == 1 ? kept : any_of_four(kept) << (word % b.across * (WORD / b.across));
        for (int64_t row = first; row < last; ++row) {
            const uint64_t cut = found[row - first].minus & ~kept;
            count += __builtin_popcountll(cut);
            if (minus) minus[(row - first) * words + word] = cut;
        }
    }
    return count;
}

template <class T>
void values_of_blocks(const Blocks& b, const T* dense, int64_t group, const uint64_t* mask, T* out) {
    const int64_t first = group * b.block, last = std::min(b.rows, first + b.block);
    for (int64_t word = 0; word < b.words; ++word)
        for (uint64_t bits = mask[word]; bits; bits &= bits - 1) {
            const int64_t column = (word * WORD + __builtin_ctzll(bits)) * b.across;
            const int64_t size = std::min(b.columns - column, b.across);
            for (int64_t row = first; row < last; ++row)
                for (int64_t i = 0; i < size; ++i) out[(row - first) * b.across + i] = dense[row * b.columns + column + i];
            out += b.block * b.across;
        }
}

// value(i) is the i-th of the group
template <class T, class Value>
void rows_of_blocks(const Blocks& b, const uint64_t* mask, int64_t group, Value value, T* dense) {
    const int64_t first = group * b.block, last = std::min(b.rows, first + b.block);
    std::memset(dense + first * b.columns, 0, (last - first) * b.columns * sizeof(T));
    int64_t at = 0;
    for (int64_t word = 0; word < b.words; ++word)
        for (uint64_t bits = mask[word]; bits; bits &= bits - 1, at += b.block * b.across) {
            const int64_t column = (word * WORD + __builtin_ctzll(bits)) * b.across;
            const int64_t size = std::min(b.columns - column, b.across);
            for (int64_t row = first; row < last; ++row)
                for (int64_t i = 0; i < size; ++i)
                    dense[row * b.columns + column + i] = value(at + (row - first) * b.across + i);
        }
}

template <class T>
void put_signs(const Blocks& b, int64_t group, const uint64_t* negative, T sign, T* dense) {
    const int64_t first = group * b.block, last = std::min(b.rows, first + b.block), words = (b.columns + WORD - 1) / WORD;
    for (int64_t row = first; row < last; ++row)
        for (int64_t word = 0; word < words; ++word)
            for (uint64_t minus = negative[row * words + word]; minus; minus &= minus - 1)
                dense[row * b.columns + word * WORD + __builtin_ctzll(minus)] = sign;
}

// Calls work(a null pointer to the type, its sign's bits) for elements of so many bytes
template <class Work>
auto by_size(int64_t bytes, bool has_sign, Work work) {
    if (bytes == 4) return work(static_cast<uint32_t*>(nullptr), uint32_t(has_sign ? 0x80000000u : 0));
    if (bytes == 2) return work(static_cast<uint16_t*>(nullptr), uint16_t(has_sign ? 0x8000u : 0));
    return work(static_cast<uint8_t*>(nullptr), uint8_t(0));
}

}  // namespace

// How many of every row are not zero; bytes is the size of an element, sign the bits of its sign (0 for integers).
// Returns how many zeros have a sign.
API int64_t secateur_sparse_count(
    const void* dense, int64_t rows, int64_t columns, int32_t bytes, int32_t has_sign, int64_t* counts
) {
    int64_t minus = 0;
    auto count = [&](auto* x, auto sign) {
        for (int64_t row = 0; row < rows; ++row, x += columns) {
            int64_t n = 0;
            for (int64_t start = 0; start < columns; start += WORD) {
                const int64_t size = std::min(columns - start, WORD);
                const Found found = size == WORD ? look_at_word(x + start, sign) : look(x + start, size, sign);
                n += __builtin_popcountll(found.kept), minus += __builtin_popcountll(found.minus);
            }
            counts[row] = n;
        }
    };
    if (bytes == 4) count(static_cast<const uint32_t*>(dense), uint32_t(has_sign ? 0x80000000u : 0));
    if (bytes == 2) count(static_cast<const uint16_t*>(dense), uint16_t(has_sign ? 0x8000u : 0));
    if (bytes == 1) count(static_cast<const uint8_t*>(dense), uint8_t(0));
    return minus;
}

API int64_t secateur_sparse_encode(
    const void* dense, int64_t rows, int64_t columns, int32_t bytes, int32_t has_sign, uint64_t* mask, uint64_t* negative,
    void* values, const int64_t* offsets, int32_t threads
) {
    if (bytes == 4)
        encode<uint32_t>(
            static_cast<const uint32_t*>(dense), rows, columns, has_sign ? 0x80000000u : 0, mask, negative,
            static_cast<uint32_t*>(values), offsets, threads
        );
    else if (bytes == 2)
        encode<uint16_t>(
            static_cast<const uint16_t*>(dense), rows, columns, has_sign ? 0x8000u : 0, mask, negative,
            static_cast<uint16_t*>(values), offsets, threads
        );
    else
        encode<uint8_t>(
            static_cast<const uint8_t*>(dense), rows, columns, 0, mask, nullptr, static_cast<uint8_t*>(values), offsets,
            threads
        );
    return 0;
}

API int64_t secateur_sparse_decode(
    const uint64_t* mask, const uint64_t* negative, const void* values, const int64_t* offsets, int64_t rows,
    int64_t columns, int32_t bytes, void* dense, int32_t threads
) {
    if (bytes == 4)
        decode<uint32_t>(
            mask, negative, static_cast<const uint32_t*>(values), offsets, rows, columns, 0x80000000u,
            static_cast<uint32_t*>(dense), threads
        );
    else if (bytes == 2)
        decode<uint16_t>(
            mask, negative, static_cast<const uint16_t*>(values), offsets, rows, columns, 0x8000u,
            static_cast<uint16_t*>(dense), threads
        );
    else
        decode<uint8_t>(
            mask, nullptr, static_cast<const uint8_t*>(values), offsets, rows, columns, 0, static_cast<uint8_t*>(dense),
            threads
        );
    return 0;
}

// Counts in every 256 columns and the columns in them, of a bitmask. offsets: where every row starts.
API int64_t secateur_sparse_spans(
    const uint64_t* mask, int64_t rows, int64_t columns, const int64_t* offsets, uint16_t* counts, uint8_t* index,
    int32_t threads
) {
    const int64_t words = (columns + WORD - 1) / WORD, spans = (columns + SPAN - 1) / SPAN;
    std::memset(counts, 0, rows * spans * sizeof(uint16_t));
    by_rows(rows, threads, [&](int64_t row) {
        uint8_t* out = index + offsets[row];
        for (int64_t word = 0; word < words; ++word) {
            const uint8_t base = uint8_t(word * WORD % SPAN);
            uint64_t bits = mask[row * words + word];
            counts[row * spans + word * WORD / SPAN] += uint16_t(__builtin_popcountll(bits));
            for (; bits; bits &= bits - 1) *out++ = uint8_t(base + __builtin_ctzll(bits));
        }
    });
    return 0;
}

// The bitmask of counts and columns that were checked.
API int64_t secateur_sparse_bits(
    const uint16_t* counts, const uint8_t* index, int64_t rows, int64_t columns, const int64_t* offsets, uint64_t* mask,
    int32_t threads
) {
    const int64_t words = (columns + WORD - 1) / WORD, spans = (columns + SPAN - 1) / SPAN;
    std::memset(mask, 0, rows * words * sizeof(uint64_t));
    by_rows(rows, threads, [&](int64_t row) {
        const uint8_t* from = index + offsets[row] - offsets[0];
        uint64_t* out = mask + row * words;
        for (int64_t span = 0; span < spans; ++span, out += SPAN / WORD)
            for (int n = counts[row * spans + span]; n > 0; --n, ++from) out[*from / WORD] |= 1ull << (*from % WORD);
    });
    return 0;
}

// Bits and counts of the blocks of a matrix, and with `negative` (or null) the zeros with a sign that are cut: how many those
// are is returned.
API int64_t secateur_sparse_block_bits(
    const void* dense, int64_t rows, int64_t columns, int64_t block, int64_t across, int32_t bytes, int32_t has_sign,
    uint64_t* mask, uint64_t* negative, int64_t* counts, int32_t threads
) {
    const Blocks b(rows, columns, block, across);
    const int64_t words = (columns + WORD - 1) / WORD;
    std::vector<int64_t> minus(b.groups());
    by_size(bytes, has_sign, [&](auto* type, auto sign) {
        by_rows(b.groups(), threads, [&](int64_t group) {
            uint64_t* bits = mask + group * b.words;
            uint64_t* signs = negative ? negative + group * block * words : nullptr;
            minus[group] = bits_of_blocks(b, static_cast<decltype(type)>(const_cast<void*>(dense)), group, sign, bits, signs);
            counts[group] = 0;
            for (int64_t word = 0; word < b.words; ++word) counts[group] += __builtin_popcountll(bits[word]);
        });
    });
    int64_t all = 0;
    for (int64_t each : minus) all += each;
    return all;
}

// The values of kept blocks; offsets: where every block row starts
API int64_t secateur_sparse_block_values(
    const void* dense, int64_t rows, int64_t columns, int64_t block, int64_t across, int32_t bytes, const uint64_t* mask,
    const int64_t* offsets, void* values, int32_t threads
) {
    const Blocks b(rows, columns, block, across);
    by_size(bytes, false, [&](auto* type, auto) {
        using T = decltype(type);
        const int64_t size = offsets[b.groups()];  // `values` may be null where nothing is kept
        if (size && (rows % block || columns % across)) std::memset(values, 0, size * sizeof(*type));
        by_rows(b.groups(), threads, [&](int64_t group) {
            values_of_blocks(
                b, static_cast<T>(const_cast<void*>(dense)), group, mask + group * b.words,
                static_cast<T>(values) + offsets[group]
            );
        });
    });
    return 0;
}

// The matrix again. With a codebook (or null) values are 4-bit codes, two in a byte, and the matrix bytes.
API int64_t secateur_sparse_block_rows(
    const uint64_t* mask, const uint64_t* negative, const void* values, const int64_t* offsets, const int8_t* codebook,
    int64_t rows, int64_t columns, int64_t block, int64_t across, int32_t bytes, void* dense, int32_t threads
) {
    const Blocks b(rows, columns, block, across);
    by_size(bytes, true, [&](auto* type, auto sign) {
        using T = decltype(type);
        by_rows(b.groups(), threads, [&](int64_t group) {
            const int64_t start = offsets[group];
            const uint64_t* bits = mask + group * b.words;
            const uint8_t* codes = static_cast<const uint8_t*>(values);
            if (codebook) {
                const auto code = [&](int64_t i) { return uint8_t(codebook[codes[(start + i) / 2] >> ((start + i) % 2 * 4) & 15]); };
                rows_of_blocks(b, bits, group, code, static_cast<T>(dense));
            } else {
                const auto* at = static_cast<T>(const_cast<void*>(values)) + start;
                rows_of_blocks(b, bits, group, [&](int64_t i) { return at[i]; }, static_cast<T>(dense));
            }
            if (negative) put_signs(b, group, negative, sign, static_cast<T>(dense));
        });
    });
    return 0;
}

// Integers of `groups` block rows, counts[g] each, as 4-bit codes, two in a byte, the lower half first; the codes of a block
// row start at starts[g]. `codes` is zeroed.
API int64_t secateur_sparse_codes(
    const int8_t* values, const int64_t* counts, const int64_t* starts, int64_t groups, uint8_t* codes
) {
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t i = 0, at = starts[group]; i < counts[group]; ++i, ++at)
            codes[at / 2] |= uint8_t((*values++ & 15) << (at % 2 * 4));
    return 0;
}
