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
};
inline OpenMP openmp;

/* The threads of one call. The caller's thread runs the call and offers pieces of work; the others help where they are
 * awake. Nothing waits for a thread that has no piece in hand, so one that the system keeps from its core costs only its
 * help. Between pieces helpers stay awake: instructions of a step follow each other by microseconds. */
class Team {
  public:
    explicit Team(int size) : size_(size) {}

    /* Runs piece(i, thread number) for 0 to count - 1, each once, in any thread; returns when all are done. */
    template <class Piece> void share(int64_t count, const Piece &piece) {
        if (size_ == 1 || count < 2) {
            for (int64_t i = 0; i < count; ++i) piece(i, 0);
            return;
        }
        done_.store(0, std::memory_order_relaxed);
        count_.store(count, std::memory_order_relaxed);
        piece_.store(&piece, std::memory_order_relaxed);
        run_.store([](const void *data, int64_t i, int thread) { (*(const Piece *)data)(i, thread); },
                   std::memory_order_relaxed);
        offer_.store(++round_ << COUNT_BITS | (uint64_t)count, std::memory_order_release);
        int64_t own = 0;
        while (take(0)) ++own;
        for (int spins = 0; done_.load(std::memory_order_acquire) != count - own;) wait(spins);
    }
    /* Runs pieces until the call is over. */
    void help(int thread) {
        for (int spins = 0; !is_over_.load(std::memory_order_acquire);)
            if (take(thread)) done_.fetch_add(1, std::memory_order_release), spins = 0;
            else wait(spins);
    }
    void finish() { is_over_.store(true, std::memory_order_release); }

    /* The call that this thread runs, so that calls within it take its threads. */
    static Team *&current() {
        static thread_local Team *team = nullptr;
        return team;
    }

  private:
    static constexpr int COUNT_BITS = 32;

    /* Takes a piece where one is left. What is read of an offer holds if the offer is still there when the piece is
     * taken: the caller writes the next only when no piece of this one is left. */
    bool take(int thread) {
        uint64_t offer = offer_.load(std::memory_order_acquire);
        while (const int64_t left = (int64_t)(offer & ((1ull << COUNT_BITS) - 1))) {
            const auto run = run_.load(std::memory_order_relaxed);
            const void *piece = piece_.load(std::memory_order_relaxed);
            const int64_t count = count_.load(std::memory_order_relaxed);
            if (offer_.compare_exchange_weak(offer, offer - 1, std::memory_order_acq_rel, std::memory_order_acquire))
                return run(piece, count - left, thread), true;
        }
        return false;
    }
    static void wait(int &spins) {
        if (++spins > 1 << 12) sched_yield(); /* the thread waited for may want this core */
        else pause();
    }
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    alignas(64) std::atomic<uint64_t> offer_{0}; /* number of the offer, and pieces left of it */
    std::atomic<int64_t> count_{0};
    std::atomic<const void *> piece_{nullptr};
    std::atomic<void (*)(const void *, int64_t, int)> run_{nullptr};
    alignas(64) std::atomic<int64_t> done_{0}; /* pieces, by helpers */
    alignas(64) std::atomic<bool> is_over_{false};
    uint64_t round_ = 0;
    const int size_;
};

/* Runs body(team), whose pieces up to num_threads threads share; within another call they are the threads of that one. */
template <class Body> void in_parallel(int num_threads, const Body &body) {
    Team alone(1);
    if (num_threads <= 1 || !openmp.parallel) return body(alone);
    if (Team::current()) return body(*Team::current());
    struct Call {
        const Body &body;
        Team team;
    } call{body, Team(num_threads)};
    const auto run = [](void *data) {
        Call &call = *(Call *)data;
        if (const int thread = openmp.thread_num()) return call.team.help(thread);
        Team::current() = &call.team;
        call.body(call.team);
        Team::current() = nullptr;
        call.team.finish();
    };
    openmp.parallel(run, &call, (unsigned)num_threads, 0);
}

} // namespace moeflow

#endif
