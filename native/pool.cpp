// A pool of threads that join a call by a gate: (ticket of the call, closed?, threads inside) in one atomic word.

#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include <pthread.h>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() {}
#endif

namespace {

constexpr uint64_t CLOSED = 1u << 31;
constexpr int SPINS = 500;  // some 10 microseconds

struct Pool {
    std::mutex use, sleep;
    std::condition_variable wake;
    std::atomic<uint64_t> gate{CLOSED};
    std::atomic<int64_t> next{0};
    int64_t chunks = 0;
    void (*work)(void*, int64_t) = nullptr;
    void* context = nullptr;
    int wanted = 0, started = 0;

    void take() {
        for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) work(context, chunk);
    }

    // Wait for a ticket other than `seen`; returns it.
    uint64_t wait(uint64_t seen) {
        for (int i = 0; i < SPINS; ++i) {
            uint64_t now = gate.load(std::memory_order_acquire) >> 32;
            if (now != seen) return now;
            relax();
        }
        std::unique_lock<std::mutex> lock(sleep);
        wake.wait(lock, [&] { return gate.load() >> 32 != seen; });
        return gate.load() >> 32;
    }

    // Enter the call of this ticket unless it is over, work, and leave.
    void join(uint64_t ticket, int number) {
        uint64_t now = gate.load();
        do {
            if (now >> 32 != ticket || (now & CLOSED)) return;
        } while (!gate.compare_exchange_weak(now, now + 1));
        if (number < wanted) take();
        gate.fetch_sub(1);
    }

    void serve(int number, uint64_t seen) {
        for (;;) join(seen = wait(seen), number);
    }

    void run(int64_t count, int threads, void (*function)(void*, int64_t), void* with) {
        const uint64_t ticket = (gate.load() >> 32) + 1;
        work = function, context = with, chunks = count, wanted = threads - 1;
        next.store(0);
        for (; started < wanted; ++started) std::thread(&Pool::serve, this, started, ticket - 1).detach();
        {
            std::lock_guard<std::mutex> lock(sleep);
            gate.store(ticket << 32);
        }
        wake.notify_all();
        take();
        gate.fetch_or(CLOSED);
        while (gate.load() & ~CLOSED & 0xffffffffu) relax();
    }
};

std::atomic<Pool*> shared{nullptr};

Pool* pool() {
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { shared.store(nullptr); }); });
    Pool* found = shared.load();
    if (found) return found;
    Pool* made = new Pool;  // never freed: its threads outlive everything
    if (shared.compare_exchange_strong(found, made)) return made;
    delete made;
    return found;
}

}  // namespace

void pool_run(int64_t chunks, int threads, void (*work)(void*, int64_t), void* context) {
    if (threads > chunks) threads = static_cast<int>(chunks);
    if (threads > 1) {
        Pool* found = pool();
        std::unique_lock<std::mutex> lock(found->use, std::try_to_lock);
        if (lock.owns_lock()) {
            try {
                found->run(chunks, threads, work, context);
                return;
            } catch (...) {  // no further thread can be started; nothing was begun
            }
        }
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work(context, chunk);
}
