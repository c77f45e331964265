// Exact selection over float32 scores: counting passes, and masks of the smallest with ties by index.
//
// Plain C functions over raw pointers, called through ctypes: no Python or torch headers, so one library serves
// every Python and torch. Every count is an integer and every chunk of work is fixed by the data alone, so the answer
// is the same for any number of threads, and the same as that of the torch path in secateur/core/select.py.
//
// Scores are read as they stand, or as the magnitudes of weights, which then need no copy. NaN never comes in: scores
// are checked before.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "api.h"

#define ALWAYS inline __attribute__((always_inline))  // so that a copy for AVX2 holds all of its loop

namespace {

constexpr int64_t CHUNK = 1 << 16;  // elements that one thread takes at a time
constexpr int64_t SAMPLE = 1 << 15;  // elements that bracket the cut of a long row
constexpr int64_t BLOCK = 16;       // elements that are looked at together
constexpr int64_t NEAR = 1 << 11;   // elements that stay in the nearest cache
constexpr int64_t LANES = 8;        // of a vector; compilers split it where the machine has shorter ones

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef int64_t Longs __attribute__((vector_size(LANES * 4)));

// Call work(thread, chunk) for every chunk; threads take the next chunk when they are free.
template <class Work>
void in_parallel(int64_t chunks, int threads, Work work) {
    int used = static_cast<int>(std::min<int64_t>(std::max(threads, 1), chunks));
    if (used <= 1) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) work(0, chunk);
        return;
    }
    std::atomic<int64_t> next{0};
    auto run = [&](int thread) {
        for (int64_t chunk; (chunk = next.fetch_add(1)) < chunks;) work(thread, chunk);
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < used; ++thread) others.emplace_back(run, thread);
    run(0);
    for (auto& other : others) other.join();
}

inline int64_t chunks_of(int64_t size) { return (size + CHUNK - 1) / CHUNK; }

// How many are below a, and `within` [a, b]. Those within are written to `inside`, which has room for `most` of them and
// BLOCK more; where there are more than `most` (ties, mostly) the rest is only counted.
template <bool ABSOLUTE>
ALWAYS int64_t collect(
    const float* x, int64_t size, float a, float b, float* inside, int64_t most, int64_t* collected, int64_t* within
) {
    int64_t below = 0, both = 0, n = 0, i = 0;
    while (i + BLOCK <= size) {
        Ints under = {0}, upto = {0};  // a comparison of vectors gives -1 where it holds
        const int64_t stop = std::min(size - BLOCK, i + NEAR);
        for (; i <= stop; i += BLOCK) {
            Longs hits = {0};
            for (int64_t j = i; j < i + BLOCK; j += LANES) {
                Floats y;
                std::memcpy(&y, x + j, sizeof y);
                if (ABSOLUTE) y = (Floats)((Ints)y & 0x7fffffff);
                Ints here = y < a, there = ~here & (y <= b);
                under += here;
                upto += there;
                hits |= (Longs)there;
            }
            if (n > most || !(hits[0] | hits[1] | hits[2] | hits[3])) continue;
            for (int64_t j = i; j < i + BLOCK; ++j) {
                float value = ABSOLUTE ? std::fabs(x[j]) : x[j];
                inside[n] = value;
                n += (value >= a) & (value <= b);
            }
        }
        for (int k = 0; k < LANES; ++k) below -= under[k], both -= upto[k];
    }
    for (; i < size; ++i) {
        float value = ABSOLUTE ? std::fabs(x[i]) : x[i];
        bool here = (value >= a) & (value <= b);
        below += value < a;
        both += here;
        if (n > most) continue;
        inside[n] = value;
        n += here;
    }
    *collected = n;
    *within = both;
    return below;
}

// Mark those below the cut (with `flip` all others). Returns how many lie below, and how many equal it.
template <bool ABSOLUTE>
ALWAYS int64_t mark(const float* x, int64_t size, float cut, bool flip, uint8_t* marked, int64_t* equal) {
    int64_t below = 0, same = 0, i = 0;
    while (i + LANES <= size) {
        Ints under = {0}, at = {0};
        const int64_t start = i, stop = std::min(size - LANES, i + NEAR);
        for (; i <= stop; i += LANES) {
            Floats y;
            std::memcpy(&y, x + i, sizeof y);
            if (ABSOLUTE) y = (Floats)((Ints)y & 0x7fffffff);
            under += y < cut;
            at += y == cut;
        }
        // a plain loop: compilers pack the comparisons into bytes better than by hand
        if (flip)
            for (int64_t j = start; j < i; ++j) marked[j] = (ABSOLUTE ? std::fabs(x[j]) : x[j]) >= cut;
        else
            for (int64_t j = start; j < i; ++j) marked[j] = (ABSOLUTE ? std::fabs(x[j]) : x[j]) < cut;
        for (int k = 0; k < LANES; ++k) below -= under[k], same -= at[k];
    }
    for (; i < size; ++i) {
        float value = ABSOLUTE ? std::fabs(x[i]) : x[i];
        bool under = value < cut;
        below += under;
        marked[i] = under != flip;
        same += value == cut;
    }
    *equal = same;
    return below;
}

WIDE int64_t collect_plain(
    const float* x, int64_t size, float a, float b, float* inside, int64_t most, int64_t* collected, int64_t* within
) {
    return collect<false>(x, size, a, b, inside, most, collected, within);
}
WIDE int64_t collect_magnitudes(
    const float* x, int64_t size, float a, float b, float* inside, int64_t most, int64_t* collected, int64_t* within
) {
    return collect<true>(x, size, a, b, inside, most, collected, within);
}
WIDE int64_t mark_plain(const float* x, int64_t size, float cut, bool flip, uint8_t* marked, int64_t* equal) {
    return mark<false>(x, size, cut, flip, marked, equal);
}
WIDE int64_t mark_magnitudes(const float* x, int64_t size, float cut, bool flip, uint8_t* marked, int64_t* equal) {
    return mark<true>(x, size, cut, flip, marked, equal);
}

// Mark all up to the cut (with `flip` all others): where every tie of a chunk is marked.
WIDE void mark_upto(const float* x, int64_t size, bool absolute, float cut, bool flip, uint8_t* marked) {
    if (absolute)
        for (int64_t i = 0; i < size; ++i) marked[i] = (std::fabs(x[i]) <= cut) != flip;
    else
        for (int64_t i = 0; i < size; ++i) marked[i] = (x[i] <= cut) != flip;
}

// Words of four bytes become zero where nothing is kept; `kept` holds 0 or 1.
WIDE void zero_words(int32_t* words, const uint8_t* kept, int64_t size) {
    for (int64_t i = 0; i < size; ++i) words[i] &= -int32_t(kept[i]);
}

// A row of moderate length: the count-th smallest by selection on a copy.
void mark_row(
    const float* x, int64_t size, bool absolute, int64_t count, uint8_t* marked, std::vector<float>& copy
) {
    if (count <= 0 || count >= size) {
        std::memset(marked, count > 0, size);
        return;
    }
    copy.assign(x, x + size);
    if (absolute)
        for (float& value : copy) value = std::fabs(value);
    std::nth_element(copy.begin(), copy.begin() + (count - 1), copy.end());
    float value = copy[count - 1];
    for (int64_t i = 0; i < size; ++i) {
        bool less = (absolute ? std::fabs(x[i]) : x[i]) < value;
        marked[i] = less;
        count -= less;
    }
    for (int64_t i = 0; count > 0; ++i)
        if ((absolute ? std::fabs(x[i]) : x[i]) == value) {
            marked[i] = 1;
            --count;
        }
}

// A group of N:M: the rank of each element by comparing it with every other.
template <int M>
void mark_groups(const float* x, int64_t groups, bool absolute, const int64_t* counts, uint8_t* marked) {
    for (int64_t g = 0; g < groups; ++g, x += M, marked += M) {
        float y[M];
        for (int i = 0; i < M; ++i) y[i] = absolute ? std::fabs(x[i]) : x[i];
        for (int i = 0; i < M; ++i) {
            int rank = 0;
            for (int j = 0; j < M; ++j) rank += j < i ? y[j] <= y[i] : y[j] < y[i];
            marked[i] = rank < counts[g];
        }
    }
}

struct Found {
    int64_t below = 0, within = 0;
    std::vector<float> inside;  // all that are within, unless there are more than `most`
};

// For every chunk what `collect` finds.
std::vector<Found> between(
    const float* x, int64_t size, bool absolute, float a, float b, int64_t most, int threads
) {
    std::vector<Found> parts(chunks_of(size));
    in_parallel(parts.size(), threads, [&](int, int64_t chunk) {
        static thread_local std::vector<float> room(CHUNK + BLOCK);
        int64_t start = chunk * CHUNK, length = std::min(CHUNK, size - start), n = 0;
        Found& part = parts[chunk];
        auto take = absolute ? collect_magnitudes : collect_plain;
        part.below = take(x + start, length, a, b, room.data(), most, &n, &part.within);
        part.inside.assign(room.begin(), room.begin() + n);
    });
    return parts;
}

// Mark those below the cut and as many ties, in order, as make `count` marks. False where no number of ties does.
bool mark_by_cut(
    const float* x, int64_t size, bool absolute, float cut, int64_t count, bool flip, uint8_t* marked, int threads
) {
    std::vector<int64_t> below(chunks_of(size)), equal(below.size());
    in_parallel(below.size(), threads, [&](int, int64_t chunk) {
        int64_t start = chunk * CHUNK, length = std::min(CHUNK, size - start);
        auto take = absolute ? mark_magnitudes : mark_plain;
        below[chunk] = take(x + start, length, cut, flip, marked + start, &equal[chunk]);
    });
    int64_t ties = count, all = 0;
    for (size_t chunk = 0; chunk < below.size(); ++chunk) ties -= below[chunk], all += equal[chunk];
    if (ties < 0 || ties > all) return false;
    for (size_t chunk = 0; ties > 0; ++chunk) {
        int64_t start = chunk * CHUNK, stop = std::min(size, start + CHUNK);
        if (equal[chunk] <= ties) {
            if (equal[chunk]) mark_upto(x + start, stop - start, absolute, cut, flip, marked + start);
            ties -= equal[chunk];
            continue;
        }
        for (int64_t i = start; ties > 0; ++i)
            if ((absolute ? std::fabs(x[i]) : x[i]) == cut) {
                marked[i] = !flip;
                --ties;
            }
    }
    return true;
}

// Values that very probably enclose the count-th smallest of a long row, by a sample.
void bracket(const float* x, int64_t size, bool absolute, int64_t count, float* a, float* b) {
    int64_t wanted = std::min(SAMPLE, std::max<int64_t>(1024, size / 64));
    int64_t stride = std::max<int64_t>(1, size / wanted) | 1, taken = (size + stride - 1) / stride;
    std::vector<float> sample(taken);
    for (int64_t i = 0; i < taken; ++i) sample[i] = absolute ? std::fabs(x[i * stride]) : x[i * stride];
    double at = double(count) / size * taken, spare = 1.5 * std::sqrt(double(taken)) + 5;
    if (at - spare > 0) {
        auto place = sample.begin() + int64_t(at - spare);
        std::nth_element(sample.begin(), place, sample.end());
        *a = *place;
    }
    if (at + spare < taken) {
        auto place = sample.begin() + int64_t(at + spare);
        std::nth_element(sample.begin(), place, sample.end());
        *b = *place;
    }
}

// The count-th smallest of a long row: a sample brackets it, one pass counts what lies below the bracket and collects
// what lies inside; the collected few are ranked. A bracket that misses is widened to everything.
float cut_of(const float* x, int64_t size, bool absolute, int64_t count, int threads) {
    float infinity = std::numeric_limits<float>::infinity(), a = -infinity, b = infinity;
    bracket(x, size, absolute, count, &a, &b);
    std::vector<float> ranked;
    int64_t below = 0;
    auto take = [&](float low, float high) {
        ranked.clear();
        below = 0;
        for (const Found& part : between(x, size, absolute, low, high, CHUNK, threads)) {
            below += part.below;
            ranked.insert(ranked.end(), part.inside.begin(), part.inside.end());
        }
    };
    take(a, b);
    if (count <= below || count > below + int64_t(ranked.size())) take(-infinity, infinity);
    auto place = ranked.begin() + (count - below - 1);
    std::nth_element(ranked.begin(), place, ranked.end());
    return *place;
}

// One long row. A guess of its cut that is right saves finding it; NaN is no guess.
void mark_long(
    const float* x, int64_t size, bool absolute, int64_t count, float guess, bool flip, uint8_t* marked, int threads
) {
    if (count <= 0 || count >= size) {
        std::memset(marked, (count > 0) != flip, size);
        return;
    }
    if (guess == guess && mark_by_cut(x, size, absolute, guess, count, flip, marked, threads)) return;
    mark_by_cut(x, size, absolute, cut_of(x, size, absolute, count, threads), count, flip, marked, threads);
}

}  // namespace

// How many scores are below a, and how many in [a, b] (the result). Those are written to `inside`, in order, if there are
// no more than `room` and no chunk holds more than `most`; `collected` says how many were.
API int64_t secateur_between(
    const float* x, int64_t size, int32_t absolute, float a, float b, float* inside, int64_t room, int64_t most,
    int64_t* below, int64_t* collected, int32_t threads
) {
    int64_t count = 0, n = 0;
    *below = 0;
    for (const Found& part : between(x, size, absolute, a, b, most, threads)) {
        *below += part.below;
        count += part.within;
        for (float value : part.inside)
            if (n < room) inside[n++] = value;
    }
    *collected = n;
    return count;
}

// Mark the counts[r] smallest scores of every row, ties by index. `guess` is what may be the cut of long rows; NaN is
// no guess. With `flip` the marks are the other way round.
API int64_t secateur_smallest(
    const float* x, int64_t rows, int64_t units, int32_t absolute, const int64_t* counts, float guess,
    int32_t flip, uint8_t* marked, int32_t threads
) {
    if (units > (1 << 18) || (rows == 1 && units > 4096)) {
        for (int64_t r = 0; r < rows; ++r)
            mark_long(x + r * units, units, absolute, counts[r], guess, flip, marked + r * units, threads);
        return 0;
    }
    int64_t step = std::max<int64_t>(1, CHUNK / std::max<int64_t>(units, 1)), chunks = (rows + step - 1) / step;
    std::vector<std::vector<float>> copies(std::max(threads, 1));
    in_parallel(chunks, threads, [&](int thread, int64_t chunk) {
        int64_t first = chunk * step, last = std::min(rows, first + step);
        const float* from = x + first * units;
        uint8_t* to = marked + first * units;
        if (units == 2) mark_groups<2>(from, last - first, absolute, counts + first, to);
        else if (units == 4) mark_groups<4>(from, last - first, absolute, counts + first, to);
        else if (units == 8) mark_groups<8>(from, last - first, absolute, counts + first, to);
        else if (units == 16) mark_groups<16>(from, last - first, absolute, counts + first, to);
        else
            for (int64_t r = first; r < last; ++r)
                mark_row(x + r * units, units, absolute, counts[r], marked + r * units, copies[thread]);
        if (flip)
            for (int64_t i = 0; i < (last - first) * units; ++i) to[i] ^= 1;
    });
    return 0;
}

// Words of four bytes become zero where `kept` holds 0 and stay where it holds 1.
API int64_t secateur_zero(int32_t* words, int64_t size, const uint8_t* kept, int32_t threads) {
    in_parallel(chunks_of(size), threads, [&](int, int64_t chunk) {
        int64_t start = chunk * CHUNK;
        zero_words(words + start, kept + start, std::min(CHUNK, size - start));
    });
    return 0;
}

// What the library speaks: raised whenever a function above changes its arguments.
API int32_t secateur_abi(void) { return 11; }
