/* Threads: those of the OpenMP that torch has loaded, for a second pool beside it would fight it for the cores. */
#ifndef MOEFLOW_CPU_THREADS_H
#define MOEFLOW_CPU_THREADS_H

#include <sched.h>
#include <stdint.h>

#include <atomic>

namespace moeflow {

/* Addresses in libgomp, set once by kernels/cpu/library.py; without them everything runs in the caller's thread. */
struct OpenMP {
    void (*parallel)(void (*body)(void *), void *data, unsigned num_threads, unsigned flags) = nullptr;
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;
};
inline OpenMP openmp;

/* What the threads of one call share. */
struct Meeting {
    alignas(64) std::atomic<int64_t> next{0}; /* piece of work */
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};
};

/* The threads of one call, as one of them sees them; there may be fewer than it asked for. */
class Team {
  public:
    Team(Meeting &meeting, int size) : meeting_(meeting), size_(size) {}

    /* Shares pieces 0 to count - 1 out, then waits for all: each runs once, in any thread. */
    template <class Piece> void share(int64_t count, const Piece &piece) {
        if (size_ == 1)
            for (int64_t i = 0; i < count; ++i) piece(i);
        else {
            for (int64_t i; (i = meeting_.next.fetch_add(1, std::memory_order_relaxed)) < count;) piece(i);
            meet();
        }
    }

  private:
    void meet() {
        const int round = meeting_.round.load(std::memory_order_acquire);
        if (meeting_.arrived.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            meeting_.next.store(0, std::memory_order_relaxed);
            meeting_.arrived.store(0, std::memory_order_relaxed);
            meeting_.round.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; meeting_.round.load(std::memory_order_acquire) == round;)
            if (++spins > 1 << 12) sched_yield(); /* the thread waited for may want this core */
            else pause();
    }
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    Meeting &meeting_;
    const int size_;
};

/* Runs body(team, thread number) in up to num_threads threads. */
template <class Body> void in_parallel(int num_threads, const Body &body) {
    struct Call {
        const Body &body;
        Meeting meeting;
    } call{body, {}};
    if (num_threads <= 1 || !openmp.parallel) {
        Team team(call.meeting, 1);
        return body(team, 0);
    }
    const auto run = [](void *data) {
        Call &call = *(Call *)data;
        Team team(call.meeting, openmp.num_threads());
        call.body(team, openmp.thread_num());
    };
    openmp.parallel(run, &call, (unsigned)num_threads, 0);
}

} // namespace moeflow

#endif
