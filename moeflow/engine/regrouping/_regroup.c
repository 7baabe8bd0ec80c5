/* The inner loop of moeflow/engine/regrouping/search.py: swaps of two tokens between groups, kept by Metropolis' rule while it cools.
 *
 * moeflow/engine/regrouping/search_loop.py is the same loop in Python and says what a swap changes; every decision here must agree with it
 * to the last bit. Plain C99 with a C ABI, called through ctypes; knows nothing of Python.
 */
#include <math.h>
#include <stdint.h>

#include "_bits.h"

/* Bit sets of W words over all (layer, expert) pairs. */
typedef struct {
    int64_t tokens, words;
    const uint64_t *routes; /* [T, W] */
    int32_t *group;         /* [T] */
    uint64_t *any, *one;    /* [groups, W]: pairs that some token of a group activates, and that just one does */
    uint16_t *count;        /* [groups, 64 W]: how many do */
    int32_t *best;          /* [T]: the groups when fewest were active */
    uint64_t random;
} State;

static uint64_t next_random(State *s) {
    uint64_t z = (s->random += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static int64_t below(State *s, int64_t limit) { return (int64_t)((next_random(s) >> 32) * (uint64_t)limit >> 32); }

static double unit(State *s) { return ((double)(next_random(s) >> 11) + 0.5) * 0x1p-53; }

static inline void move(State *s, int64_t token, int64_t from, int64_t to) {
    int64_t W = s->words;
    for (int64_t w = 0; w < W; w++)
        for (uint64_t left = s->routes[token * W + w]; left; left &= left - 1) {
            uint64_t bit = left & (~left + 1);
            int64_t at = 64 * w + ONES(bit - 1);
            uint16_t fewer = --s->count[from * 64 * W + at], more = ++s->count[to * 64 * W + at];
            uint64_t *any = s->any + w, *one = s->one + w;
            if (fewer == 0) any[from * W] &= ~bit, one[from * W] &= ~bit;
            if (fewer == 1) one[from * W] |= bit;
            if (more == 1) any[to * W] |= bit, one[to * W] |= bit;
            if (more == 2) one[to * W] &= ~bit;
        }
    s->group[token] = (int32_t)to;
}

/* Try `num_swaps`; the temperature starts at `hot` pairs and is multiplied by `cooling` at each. Returns by how many
 * active pairs the best grouping differs from the first. */
EXPORTED CLONES int64_t moeflow_regroup(State *s, int64_t num_swaps, double hot, double cooling) {
    int64_t W = s->words, change = 0, best = 0;
    double temperature = hot;
    for (int64_t n = 0; n < num_swaps; n++, temperature *= cooling) {
        int64_t a = below(s, s->tokens), b = below(s, s->tokens), from = s->group[a], to = s->group[b];
        if (from == to) continue;
        const uint64_t *ra = s->routes + a * W, *rb = s->routes + b * W;
        const uint64_t *any_from = s->any + from * W, *one_from = s->one + from * W;
        const uint64_t *any_to = s->any + to * W, *one_to = s->one + to * W;
        int64_t delta = 0;
        for (int64_t w = 0; w < W; w++) {
            uint64_t leaves = ra[w] & ~rb[w], comes = rb[w] & ~ra[w];
            delta += ONES(comes & ~any_from[w]) + ONES(leaves & ~any_to[w]);
            delta -= ONES(leaves & one_from[w]) + ONES(comes & one_to[w]);
        }
        if (delta > 0 && !((double)delta < -temperature * log(unit(s)))) continue;
        move(s, a, from, to);
        move(s, b, to, from);
        change += delta;
        if (change < best) {
            best = change;
            for (int64_t t = 0; t < s->tokens; t++) s->best[t] = s->group[t];
        }
    }
    return best;
}
