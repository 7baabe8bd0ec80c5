/* Inner loop of moeflow/replay/demand.py: one demand-only eviction policy over recorded routing.
 *
 * moeflow/replay/demand_loop.py is the same loop in Python and describes each policy; every decision here must agree
 * with it to the last tie. Plain C99 with a C ABI, called through ctypes; knows nothing of Python.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

#define NEVER INT32_MAX

enum { LRU, LFU, LFRU, STATIC, POPULARITY, BELADY, RANDOM };

typedef struct {
    int policy, num_slots, used, num_fixed;
    int64_t layers, num_keys, clock, event_begin; /* a slot touched at event_begin or later serves the present event */
    uint64_t random;
    int32_t *slot_of, *expert_count, *passes; /* [layers * experts], the same, [layers] */
    int32_t *key_of, *layer_of, *last_pass, *next_row, *count; /* [num_slots] each */
    int64_t *last_touch;                                       /* [num_slots] */
} Cache;

static uint64_t next_random(Cache *cache) {
    uint64_t z = (cache->random += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* The lowest score is evicted. Inlined with a constant policy, so that each scan below is a loop of its own. */
static inline double score(const Cache *cache, int policy, int slot) {
    switch (policy) {
    case LFU: /* then the lowest layer and expert number */
        return (double)cache->count[slot] * (double)cache->num_keys + (double)cache->key_of[slot];
    case POPULARITY:
        return cache->count[slot];
    case LFRU: {
        double age = cache->passes[cache->layer_of[slot]] - cache->last_pass[slot];
        return cache->count[slot] / (age + 1.0) - 1e-12 * (double)cache->last_touch[slot];
    }
    case STATIC:
        return slot < cache->num_fixed ? 1e300 : (double)cache->last_touch[slot];
    case BELADY:
        return -((double)cache->next_row[slot] * (double)cache->layers + (double)cache->layer_of[slot]);
    default:
        return (double)cache->last_touch[slot];
    }
}

static inline int scan(const Cache *cache, int policy) {
    int victim = -1;
    double lowest = 0;
    for (int slot = 0; slot < cache->used; slot++) {
        if (cache->last_touch[slot] >= cache->event_begin) continue;
        double value = score(cache, policy, slot);
        if (victim < 0 || value < lowest ||
            (value == lowest && cache->last_touch[slot] < cache->last_touch[victim])) {
            victim = slot;
            lowest = value;
        }
    }
    return victim;
}

static int find_victim(Cache *cache) {
    int slot;
    switch (cache->policy) {
    case LRU: return scan(cache, LRU);
    case LFU: return scan(cache, LFU);
    case LFRU: return scan(cache, LFRU);
    case STATIC: return scan(cache, STATIC);
    case POPULARITY: return scan(cache, POPULARITY);
    case BELADY: return scan(cache, BELADY);
    default:
        do slot = (int)(next_random(cache) % (uint64_t)cache->used);
        while (cache->last_touch[slot] >= cache->event_begin);
        return slot;
    }
}

/* One layer of one token; returns the hits and adds the experts demanded to *accesses. */
static int64_t run_event(Cache *cache, int64_t layer, int num_experts, const uint16_t *experts, int top_k,
                         const int32_t *next_rows, int64_t *accesses) {
    int64_t hits = 0;
    cache->event_begin = cache->clock + 1;
    cache->passes[layer]++;
    for (int k = 0; k < top_k; k++) { /* all hits first: this event does not evict experts resident now */
        if (experts[k] >= num_experts) continue;
        int64_t key = layer * num_experts + experts[k];
        int32_t slot = cache->slot_of[key];
        cache->clock++;
        if (cache->policy != POPULARITY) cache->expert_count[key]++;
        ++*accesses;
        if (slot < 0) continue;
        hits++;
        cache->last_touch[slot] = cache->clock;
        cache->last_pass[slot] = cache->passes[layer];
        cache->count[slot] = cache->expert_count[key];
        if (next_rows) cache->next_row[slot] = next_rows[k];
    }
    int64_t touch = cache->event_begin - 1;
    for (int k = 0; k < top_k; k++) {
        if (experts[k] >= num_experts) continue;
        int64_t key = layer * num_experts + experts[k];
        touch++;
        if (cache->slot_of[key] >= 0) continue;
        int slot = cache->used < cache->num_slots ? cache->used++ : find_victim(cache);
        if (cache->key_of[slot] >= 0) cache->slot_of[cache->key_of[slot]] = -1;
        cache->slot_of[key] = slot;
        cache->key_of[slot] = (int32_t)key;
        cache->layer_of[slot] = (int32_t)layer;
        cache->last_touch[slot] = touch;
        cache->last_pass[slot] = cache->passes[layer];
        cache->count[slot] = cache->expert_count[key];
        if (next_rows) cache->next_row[slot] = next_rows[k];
    }
    return hits;
}

static void empty(Cache *cache) {
    cache->used = 0;
    cache->clock = 0;
    memset(cache->slot_of, 0xff, sizeof(int32_t) * cache->num_keys);
    memset(cache->key_of, 0xff, sizeof(int32_t) * cache->num_slots);
    memset(cache->passes, 0, sizeof(int32_t) * cache->layers);
    if (cache->policy != POPULARITY) memset(cache->expert_count, 0, sizeof(int32_t) * cache->num_keys);
}

/* Finds, from the last row to the first, the next row that demands the same expert as each access does. */
static void find_next_rows(const uint16_t *experts, int64_t begin, int64_t end, int64_t layers, int top_k,
                           int num_experts, int32_t *next, int32_t *seen) {
    for (int64_t key = 0; key < layers * num_experts; key++) seen[key] = NEVER;
    for (int64_t row = end - 1; row >= begin; row--)
        for (int64_t place = row * layers * top_k; place < (row + 1) * layers * top_k; place++) {
            if (experts[place] >= num_experts) continue;
            int64_t key = place / top_k % layers * num_experts + experts[place];
            next[place] = seen[key];
            seen[key] = (int32_t)row;
        }
}

/* experts: [rows, layers, top_k], distinct within an event, num_experts or more for none; starts: [num_sequences + 1];
 * hits, accesses: [layers], added to. Returns 0, or 1 where memory was refused. */
EXPORTED int moeflow_replay(const uint16_t *experts, int64_t layers, int top_k, int num_experts, const int64_t *starts,
                            int64_t num_sequences, int num_slots, int policy, int warm, int num_fixed, uint64_t seed,
                            int64_t *hits, int64_t *accesses) {
    int64_t num_keys = layers * num_experts, first = starts[0], last = starts[num_sequences];
    Cache cache = {.policy = policy, .num_slots = num_slots, .num_fixed = num_fixed, .layers = layers,
                   .num_keys = num_keys, .random = seed};
    size_t num_ints = 3 * (size_t)num_keys + layers + 5 * (size_t)num_slots;
    int32_t *ints = calloc(num_ints, sizeof *ints), *next = NULL, *seen = ints;
    cache.last_touch = calloc(num_slots, sizeof *cache.last_touch);
    if (policy == BELADY) next = malloc(sizeof *next * (size_t)(last * layers * top_k + 1));
    int failed = !ints || !cache.last_touch || (policy == BELADY && !next);
    if (!failed) {
        cache.slot_of = seen + num_keys;
        cache.expert_count = cache.slot_of + num_keys;
        cache.passes = cache.expert_count + num_keys;
        cache.key_of = cache.passes + layers;
        cache.layer_of = cache.key_of + num_slots;
        cache.last_pass = cache.layer_of + num_slots;
        cache.next_row = cache.last_pass + num_slots;
        cache.count = cache.next_row + num_slots;
        empty(&cache);
        if (policy == POPULARITY)
            for (int64_t place = first * layers * top_k; place < last * layers * top_k; place++)
                if (experts[place] < num_experts)
                    cache.expert_count[place / top_k % layers * num_experts + experts[place]]++;
        if (next && warm) find_next_rows(experts, first, last, layers, top_k, num_experts, next, seen);
    }
    for (int64_t sequence = 0; !failed && sequence < num_sequences; sequence++) {
        int64_t begin = starts[sequence], end = starts[sequence + 1];
        if (!warm) {
            empty(&cache);
            if (next) find_next_rows(experts, begin, end, layers, top_k, num_experts, next, seen);
        }
        for (int64_t row = begin; row < end; row++)
            for (int64_t layer = 0; layer < layers; layer++) {
                int64_t place = (row * layers + layer) * top_k;
                hits[layer] += run_event(&cache, layer, num_experts, experts + place, top_k, next ? next + place : NULL,
                                         accesses + layer);
            }
    }
    free(ints);
    free(cache.last_touch);
    free(next);
    return failed;
}

/* Windows links an extension module only with this symbol; no code imports the module. */
EXPORTED void *PyInit__replay(void) { return NULL; }
