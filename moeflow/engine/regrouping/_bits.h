/* What the C loops over bit sets share: exported functions, builds for two processors, and the number of bits in a word. */
#ifndef MOEFLOW_BITS_H
#define MOEFLOW_BITS_H

#include <stdint.h>

#ifdef _WIN32
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

/* Of two builds of a loop, with and without the instruction that counts bits, the loader takes what the processor has. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CLONES __attribute__((target_clones("popcnt", "default")))
#else
#define CLONES
#endif

#if defined(__GNUC__)
#define ONES(x) __builtin_popcountll(x)
#else
static int ONES(uint64_t x) {
    int n = 0;
    for (; x; x &= x - 1) n++;
    return n;
}
#endif

#endif
