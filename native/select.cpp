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

#define API extern "C" __attribute__((visibility("default")))

// The loops below are plain C++; where the machine has AVX2 a second copy of them, compiled for it, is taken.
#if defined(__x86_64__) && defined(__linux__) && (defined(__GNUC__) && !defined(__clang__))
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif
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

// How many are below a. Values in [a, b], and with MARK their positions, are written to `inside` and `places`, which
// have room for all of them and BLOCK more; with MARK those below a are marked, all others not.
template <bool ABSOLUTE, bool MARK>
ALWAYS int64_t collect(
    const float* x, int64_t size, float a, float b, float* inside, int32_t* places, uint8_t* marked, int64_t* collected
) {
    int64_t below = 0, n = 0, i = 0;
    while (i + BLOCK <= size) {
        Ints under = {0};  // a comparison of vectors gives -1 where it holds
        const int64_t stop = std::min(size - BLOCK, i + NEAR);
        if (MARK)  // a plain loop: compilers pack the comparisons into bytes better than by hand
            for (int64_t j = i; j < stop + BLOCK; ++j) marked[j] = (ABSOLUTE ? std::fabs(x[j]) : x[j]) < a;
        for (; i <= stop; i += BLOCK) {
            Longs hits = {0};
            for (int64_t j = i; j < i + BLOCK; j += LANES) {
                Floats y;
                std::memcpy(&y, x + j, sizeof y);
                if (ABSOLUTE) y = (Floats)((Ints)y & 0x7fffffff);
                Ints here = y < a;
                under += here;
                hits |= (Longs)(~here & (y <= b));
            }
            if (!(hits[0] | hits[1] | hits[2] | hits[3])) continue;
            for (int64_t j = i; j < i + BLOCK; ++j) {
                float value = ABSOLUTE ? std::fabs(x[j]) : x[j];
                inside[n] = value;
                if (MARK) places[n] = int32_t(j);
                n += (value >= a) & (value <= b);
            }
        }
        for (int k = 0; k < LANES; ++k) below -= under[k];
    }
    for (; i < size; ++i) {
        float value = ABSOLUTE ? std::fabs(x[i]) : x[i];
        below += value < a;
        if (MARK) marked[i] = value < a;
        inside[n] = value;
        if (MARK) places[n] = int32_t(i);
        n += (value >= a) & (value <= b);
    }
    *collected = n;
    return below;
}

using Collect = int64_t(const float*, int64_t, float, float, float*, int32_t*, uint8_t*, int64_t*);

#define COLLECT(name, absolute, mark)                                                                          \
    WIDE int64_t name(                                                                                         \
        const float* x, int64_t size, float a, float b, float* inside, int32_t* places, uint8_t* marked,       \
        int64_t* collected                                                                                     \
    ) {                                                                                                        \
        return collect<absolute, mark>(x, size, a, b, inside, places, marked, collected);                      \
    }
COLLECT(count_plain, false, false)
COLLECT(count_magnitudes, true, false)
COLLECT(mark_plain, false, true)
COLLECT(mark_magnitudes, true, true)

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
    int64_t below = 0;
    std::vector<float> inside;
    std::vector<int32_t> places;  // within the chunk
};

// For every chunk what `collect` finds; with `marked`, positions too.
std::vector<Found> between(
    const float* x, int64_t size, bool absolute, float a, float b, uint8_t* marked, int threads
) {
    int64_t chunks = chunks_of(size);
    std::vector<Found> parts(chunks);
    Collect* take = marked ? (absolute ? mark_magnitudes : mark_plain) : (absolute ? count_magnitudes : count_plain);
    in_parallel(chunks, threads, [&](int, int64_t chunk) {
        static thread_local std::vector<float> room(CHUNK + BLOCK);
        static thread_local std::vector<int32_t> places(CHUNK + BLOCK);
        int64_t start = chunk * CHUNK, n = 0;
        uint8_t* to = marked ? marked + start : nullptr;
        Found& part = parts[chunk];
        part.below = take(x + start, std::min(CHUNK, size - start), a, b, room.data(), places.data(), to, &n);
        part.inside.assign(room.begin(), room.begin() + n);
        if (marked) part.places.assign(places.begin(), places.begin() + n);
    });
    return parts;
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

// One long row: a sample brackets its cut, one pass marks what lies below the bracket and collects what lies inside; the
// collected few are ranked and marked, ties in order. A bracket that misses is widened to everything.
void mark_long(const float* x, int64_t size, bool absolute, int64_t count, uint8_t* marked, int threads) {
    if (count <= 0 || count >= size) {
        std::memset(marked, count > 0, size);
        return;
    }
    float infinity = std::numeric_limits<float>::infinity(), a = -infinity, b = infinity;
    bracket(x, size, absolute, count, &a, &b);
    std::vector<Found> parts = between(x, size, absolute, a, b, marked, threads);
    auto total = [&](auto each) {
        int64_t sum = 0;
        for (auto& part : parts) sum += each(part);
        return sum;
    };
    int64_t below = total([](const Found& part) { return part.below; });
    int64_t inside = total([](const Found& part) { return int64_t(part.inside.size()); });
    if (count <= below || count > below + inside) {
        parts = between(x, size, absolute, -infinity, infinity, marked, threads);
        below = 0;
    }
    std::vector<float> ranked;
    for (auto& part : parts) ranked.insert(ranked.end(), part.inside.begin(), part.inside.end());
    auto place = ranked.begin() + (count - below - 1);
    std::nth_element(ranked.begin(), place, ranked.end());
    float value = *place;
    int64_t ties = count - below - std::count_if(ranked.begin(), ranked.end(), [=](float y) { return y < value; });
    for (int64_t chunk = 0; chunk < int64_t(parts.size()); ++chunk)
        for (size_t k = 0; k < parts[chunk].inside.size(); ++k) {
            float here = parts[chunk].inside[k];
            marked[chunk * CHUNK + parts[chunk].places[k]] = here < value || (here == value && --ties >= 0);
        }
}

}  // namespace

// How many scores are below a; those in [a, b] are written to `inside`, up to `room` of them, in order. Returns how many
// there are in [a, b]: more than `room` means that not all of them were written.
API int64_t secateur_between(
    const float* x, int64_t size, int32_t absolute, float a, float b, float* inside, int64_t room, int64_t* below,
    int32_t threads
) {
    int64_t count = 0;
    *below = 0;
    for (const Found& part : between(x, size, absolute, a, b, nullptr, threads)) {
        *below += part.below;
        for (float value : part.inside) {
            if (count < room) inside[count] = value;
            ++count;
        }
    }
    return count;
}

// Mark the counts[r] smallest scores of every row, ties by index.
API int64_t secateur_smallest(
    const float* x, int64_t rows, int64_t units, int32_t absolute, const int64_t* counts, uint8_t* marked,
    int32_t threads
) {
    if (units > (1 << 18) || (rows == 1 && units > 4096)) {
        for (int64_t r = 0; r < rows; ++r) mark_long(x + r * units, units, absolute, counts[r], marked + r * units, threads);
        return 0;
    }
    int64_t step = std::max<int64_t>(1, CHUNK / std::max<int64_t>(units, 1)), chunks = (rows + step - 1) / step;
    std::vector<std::vector<float>> copies(std::max(threads, 1));
    in_parallel(chunks, threads, [&](int thread, int64_t chunk) {
        int64_t first = chunk * step, last = std::min(rows, first + step);
        const float* from = x + first * units;
        uint8_t* to = marked + first * units;
        if (units == 2) return mark_groups<2>(from, last - first, absolute, counts + first, to);
        if (units == 4) return mark_groups<4>(from, last - first, absolute, counts + first, to);
        if (units == 8) return mark_groups<8>(from, last - first, absolute, counts + first, to);
        if (units == 16) return mark_groups<16>(from, last - first, absolute, counts + first, to);
        for (int64_t r = first; r < last; ++r)
            mark_row(x + r * units, units, absolute, counts[r], marked + r * units, copies[thread]);
    });
    return 0;
}

// What the library speaks: raised whenever a function above changes its arguments.
API int32_t secateur_abi(void) { return 3; }
