/* The inner loop of moeflow/engine/regrouping/oracles/best_split.py: all splits of tokens into two halves, but those that cannot be better.
 *
 * Tokens are put into one half or the other in the order given. A pair that both halves activate stays so, whatever comes:
 * their number, which only grows, is what the best split has least of. Plain C99 with a C ABI, called through ctypes;
 * knows nothing of Python.
 */
#include <stdint.h>

#include "../_bits.h"

/* Bit sets of W words over all (layer, expert) pairs. */
typedef struct {
    int64_t tokens, words, half; /* most tokens in a half */
    const uint64_t *routes;      /* [T, W] */
    const uint64_t *rest;        /* [T + 1, W]: what the tokens from t on activate together */
    uint64_t *any;               /* [T + 1, 2, W]: what each half activates before token t */
    int8_t *side, *tried, *best; /* [T] */
    int64_t *filled;             /* [T + 1]: tokens in the second half before token t */
    int64_t *both;               /* [T, 2]: pairs of both halves once token t is in the first or the second */
    int64_t fewest;              /* pairs of both halves in the best split so far; only better ones are taken */
} State;

/* Pairs of both halves if all tokens from t on go to one. */
static inline int64_t both_if_rest(const State *s, int64_t t, int to) {
    int64_t W = s->words, n = 0;
    const uint64_t *own = s->any + (2 * t + to) * W, *other = s->any + (2 * t + !to) * W, *rest = s->rest + t * W;
    for (int64_t w = 0; w < W; w++) n += ONES(other[w] & (own[w] | rest[w]));
    return n;
}

static inline int64_t both_if_token(const State *s, int64_t t, int to) {
    int64_t W = s->words, n = 0;
    const uint64_t *own = s->any + (2 * t + to) * W, *other = s->any + (2 * t + !to) * W, *route = s->routes + t * W;
    for (int64_t w = 0; w < W; w++) n += ONES(other[w] & (own[w] | route[w]));
    return n;
}

/* Search depth first for at most `most` steps; returns the steps taken, or -1 where they did not suffice. */
EXPORTED CLONES int64_t moeflow_split(State *s, int64_t most) {
    int64_t W = s->words, T = s->tokens, steps = 0, t = 0;
    s->filled[0] = 0;
    s->tried[0] = 0;
    while (t >= 0) {
        if (++steps > most) return -1;
        int64_t second = s->filled[t], first = t - second;
        if (first == s->half || second == s->half || t == T) {
            int to = first == s->half;
            int64_t both = both_if_rest(s, t, to);
            if (both < s->fewest) {
                s->fewest = both;
                for (int64_t i = 0; i < T; i++) s->best[i] = i < t ? s->side[i] : (int8_t)to;
            }
            t--;
            continue;
        }
        /* The side that costs less is tried first; the first token's side is only a name. */
        int64_t *both = s->both + 2 * t;
        if (s->tried[t] == 0) both[0] = both_if_token(s, t, 0), both[1] = both_if_token(s, t, 1);
        int cheap = both[1] < both[0], to = -1;
        while (to < 0 && s->tried[t] < (t == 0 ? 1 : 2)) {
            int side = s->tried[t]++ ? !cheap : cheap;
            if (both[side] < s->fewest) to = side;
        }
        if (to < 0) {
            t--;
            continue;
        }
        const uint64_t *before = s->any + 2 * t * W, *route = s->routes + t * W;
        uint64_t *after = s->any + 2 * (t + 1) * W;
        for (int64_t w = 0; w < W; w++) {
            after[w] = before[w] | (to == 0 ? route[w] : 0);
            after[W + w] = before[W + w] | (to == 1 ? route[w] : 0);
        }
        s->side[t] = (int8_t)to;
        s->filled[t + 1] = second + to;
        s->tried[++t] = 0;
    }
    return steps;
}
