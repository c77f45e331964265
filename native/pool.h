// A pool of threads for kernels of well under a millisecond.

#pragma once

#include <cstdint>

// Call work(context, chunk) for every chunk below `chunks`, on `threads` threads, the caller among them. Threads are
// started when they are first needed, wait a moment actively and then sleep; a thread that wakes up late is not waited
// for. After a fork the child starts its own. Where two callers meet, the second works alone.
void pool_run(int64_t chunks, int threads, void (*work)(void*, int64_t), void* context);

// The same of anything that can be called with a chunk
template <class Work>
static inline void in_parallel(int64_t chunks, int threads, Work work) {
    pool_run(chunks, threads, [](void* context, int64_t chunk) { (*static_cast<Work*>(context))(chunk); }, &work);
}
