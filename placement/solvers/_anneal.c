/* The inner loop of placement/solvers/anneal.py: random changes of a placement, kept by Metropolis' rule at one temperature.
 *
 * placement/solvers/anneal_loop.py is the same loop in Python and says what each change means; every decision here must agree
 * with it to the last bit. Plain C99 with a C ABI, called through ctypes; knows nothing of Python.
 */
#include <math.h>
#include <stdint.h>

#ifdef _WIN32
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

#define MAX_GPUS 1024

/* Sizes: L layers, E experts, G GPUs, W workloads, C copies a layer, R most copies of an expert. */
typedef struct {
    int64_t layers, experts, gpus, workloads, copies, most_copies;
    int64_t free_slots;     /* slots a layer beyond the copies */
    int64_t may_replicate;  /* whether a copy may become another expert's */
    const int64_t *slots;   /* [G] */
    const double *tokens;   /* [W, L, E] */
    const double *active;   /* [W, L, E, R]: experts expected to be active on each of 1 to R copies */
    const double *arithmetic_s, *reading_s, *link_s; /* [G]: seconds a token, an active expert, a token's transfers */
    const double *weights;  /* [W], of the workloads */
    const double *traffic;  /* [L - 1, E, E], seconds where a transition crosses a link of distance 1; or NULL */
    const double *traffic_back; /* the same, each layer transposed */
    const double *distance; /* [G, G] */
    const double *transitions; /* [W, L - 1, E, E], each layer's shares of 1, where the slowest link counts; or NULL */
    const double *transitions_back; /* the same, each layer transposed */
    const double *crossing_s;  /* [G, G], seconds of a link that all of a layer's transitions cross */
} Problem;

typedef struct {
    int64_t *copy_expert, *copy_gpu; /* [L, C] */
    uint8_t *holds;                  /* [L, E, G] */
    int64_t *num_copies;             /* [L, E] */
    int64_t *used;                   /* [L, G] */
    double *busy_s;                  /* [W, L, G] */
    double *pull_s;                  /* [L, E, G]: traffic's seconds if all of an expert were on a GPU */
    double *inflow, *outflow; /* [W, L, E, G]: shares of transitions to each expert from each GPU, and from it to each */
    double *flow;             /* [W, L - 1, G, G]: shares of transitions */
    double *slowest_s;        /* [W, L - 1]: the slowest link */
    uint64_t random;
} State;

static uint64_t next_random(State *state) {
    uint64_t z = (state->random += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static int64_t below(State *state, int64_t limit) { return (int64_t)((next_random(state) >> 32) * (uint64_t)limit >> 32); }

static double unit(State *state) { return ((double)(next_random(state) >> 11) + 0.5) * 0x1p-53; }

static double copy_seconds(const Problem *p, int64_t w, int64_t l, int64_t e, int64_t copies, int64_t g) {
    int64_t at = (w * p->layers + l) * p->experts + e;
    double tokens = p->tokens[at] / (double)copies;
    double arithmetic = tokens * p->arithmetic_s[g];
    double reading = p->active[at * p->most_copies + copies - 1] * p->reading_s[g];
    return (arithmetic > reading ? arithmetic : reading) + tokens * p->link_s[g];
}

/* Where an expert's copies are before and after: `leaves` and `joins` are GPUs or -1. */
typedef struct {
    int64_t expert, leaves, joins;
} Change;

static void add_seconds(const Problem *p, const State *s, int64_t w, int64_t l, Change c, double *busy) {
    int64_t e = c.expert, before = s->num_copies[l * p->experts + e];
    int64_t after = before - (c.leaves >= 0) + (c.joins >= 0);
    if (before == after) {
        busy[c.leaves] -= copy_seconds(p, w, l, e, before, c.leaves);
        busy[c.joins] += copy_seconds(p, w, l, e, after, c.joins);
        return;
    }
    const uint8_t *holds = s->holds + (l * p->experts + e) * p->gpus;
    for (int64_t g = 0; g < p->gpus; g++) {
        if (holds[g]) busy[g] -= copy_seconds(p, w, l, e, before, g);
        if ((holds[g] && g != c.leaves) || g == c.joins) busy[g] += copy_seconds(p, w, l, e, after, g);
    }
}

/* The change of an expert's shares, [G]. */
static void share_change(const Problem *p, const State *s, int64_t l, Change c, double *shares) {
    int64_t before = s->num_copies[l * p->experts + c.expert];
    int64_t after = before - (c.leaves >= 0) + (c.joins >= 0);
    const uint8_t *holds = s->holds + (l * p->experts + c.expert) * p->gpus;
    for (int64_t g = 0; g < p->gpus; g++) {
        double was = holds[g] ? 1.0 / (double)before : 0.0;
        double is = (holds[g] && g != c.leaves) || g == c.joins ? 1.0 / (double)after : 0.0;
        shares[g] = is - was;
    }
}

static double traffic_change(const Problem *p, const State *s, int64_t l, Change c) {
    const double *pull = s->pull_s + (l * p->experts + c.expert) * p->gpus;
    int64_t before = s->num_copies[l * p->experts + c.expert];
    if (c.leaves >= 0 && c.joins >= 0) return (pull[c.joins] - pull[c.leaves]) / (double)before;
    double shares[MAX_GPUS], sum = 0;
    share_change(p, s, l, c, shares);
    for (int64_t g = 0; g < p->gpus; g++) sum += shares[g] * pull[g];
    return sum;
}

/* The slowest link's seconds after a layer, should two changes (the second may be none) be made beside it. `before`
 * says that they are in the layer after the link, not the one before. */
static double slowest_after(const Problem *p, const State *s, int64_t w, int64_t link, int before, const Change *changes,
                            double shares[2][MAX_GPUS]) {
    int64_t G = p->gpus, l = before ? link + 1 : link, count = changes[1].expert >= 0 ? 2 : 1;
    const double *flow = s->flow + (w * (p->layers - 1) + link) * G * G, *along[2];
    double most = 0;
    for (int64_t k = 0; k < count; k++)
        along[k] = (before ? s->inflow : s->outflow) + ((w * p->layers + l) * p->experts + changes[k].expert) * G;
    for (int64_t a = 0; a < G; a++)
        for (int64_t b = 0; b < G; b++) {
            double share = flow[a * G + b];
            for (int64_t k = 0; k < count; k++)
                share += before ? along[k][a] * shares[k][b] : shares[k][a] * along[k][b];
            share *= p->crossing_s[a * G + b];
            most = share > most ? share : most;
        }
    return most;
}

static double slowest_change(const Problem *p, const State *s, int64_t l, const Change *changes,
                             double shares[2][MAX_GPUS]) {
    double sum = 0;
    for (int64_t w = 0; w < p->workloads; w++) {
        const double *now = s->slowest_s + w * (p->layers - 1);
        double change = 0;
        if (l > 0) change += slowest_after(p, s, w, l - 1, 1, changes, shares) - now[l - 1];
        if (l + 1 < p->layers) change += slowest_after(p, s, w, l, 0, changes, shares) - now[l];
        sum += p->weights[w] * change;
    }
    return sum;
}

static void spread_flow(const Problem *p, State *s, int64_t l, const Change *changes, double shares[2][MAX_GPUS]) {
    int64_t E = p->experts, G = p->gpus, links = p->layers - 1, count = changes[1].expert >= 0 ? 2 : 1;
    for (int64_t w = 0; w < p->workloads; w++) {
        if (l > 0) s->slowest_s[w * links + l - 1] = slowest_after(p, s, w, l - 1, 1, changes, shares);
        if (l < links) s->slowest_s[w * links + l] = slowest_after(p, s, w, l, 0, changes, shares);
        for (int64_t k = 0; k < count; k++) {
            int64_t e = changes[k].expert;
            const double *share = shares[k];
            if (l > 0) {
                const double *in = s->inflow + ((w * p->layers + l) * E + e) * G;
                const double *row = p->transitions_back + ((w * links + l - 1) * E + e) * E;
                double *flow = s->flow + (w * links + l - 1) * G * G;
                double *out = s->outflow + (w * p->layers + l - 1) * E * G;
                for (int64_t a = 0; a < G; a++)
                    for (int64_t b = 0; b < G; b++) flow[a * G + b] += in[a] * share[b];
                for (int64_t j = 0; j < E; j++)
                    for (int64_t g = 0; g < G; g++) out[j * G + g] += row[j] * share[g];
            }
            if (l < links) {
                const double *out = s->outflow + ((w * p->layers + l) * E + e) * G;
                const double *row = p->transitions + ((w * links + l) * E + e) * E;
                double *flow = s->flow + (w * links + l) * G * G;
                double *in = s->inflow + (w * p->layers + l + 1) * E * G;
                for (int64_t a = 0; a < G; a++)
                    for (int64_t b = 0; b < G; b++) flow[a * G + b] += share[a] * out[b];
                for (int64_t j = 0; j < E; j++)
                    for (int64_t g = 0; g < G; g++) in[j * G + g] += row[j] * share[g];
            }
        }
    }
}

static double peak(const double *busy, int64_t gpus) {
    double most = busy[0];
    for (int64_t g = 1; g < gpus; g++) most = busy[g] > most ? busy[g] : most;
    return most;
}

static void spread_traffic(const Problem *p, State *s, int64_t l, Change c) {
    int64_t E = p->experts, G = p->gpus, e = c.expert;
    double shares[MAX_GPUS], reach[MAX_GPUS];
    share_change(p, s, l, c, shares);
    for (int side = 0; side < 2; side++) { /* the layer after, then the layer before */
        int64_t other = side ? l - 1 : l + 1;
        if (other < 0 || other >= p->layers) continue;
        for (int64_t g = 0; g < G; g++) {
            reach[g] = 0;
            for (int64_t from = 0; from < G; from++)
                if (shares[from] != 0) reach[g] += shares[from] * p->distance[side ? g * G + from : from * G + g];
        }
        const double *row = side ? p->traffic_back + ((l - 1) * E + e) * E : p->traffic + (l * E + e) * E;
        double *pull = s->pull_s + other * E * G;
        for (int64_t j = 0; j < E; j++)
            for (int64_t g = 0; g < G; g++) pull[j * G + g] += row[j] * reach[g];
    }
}

static void move_copy(const Problem *p, State *s, int64_t l, Change c) {
    uint8_t *holds = s->holds + (l * p->experts + c.expert) * p->gpus;
    if (c.leaves >= 0) holds[c.leaves] = 0;
    if (c.joins >= 0) holds[c.joins] = 1;
    s->num_copies[l * p->experts + c.expert] += (c.joins >= 0) - (c.leaves >= 0);
}

/* Try `num_proposals` changes at one temperature (seconds). Returns how many were kept. */
EXPORTED int64_t moeflow_anneal(const Problem *p, State *s, int64_t num_proposals, double temperature) {
    int64_t E = p->experts, G = p->gpus, C = p->copies, kept = 0;
    double busy[MAX_GPUS], shares[2][MAX_GPUS];
    for (int64_t n = 0; n < num_proposals; n++) {
        int64_t l = below(s, p->layers), kind = below(s, 4), i = l * C + below(s, C), j = -1;
        int64_t e = s->copy_expert[i], g = s->copy_gpu[i];
        const uint8_t *holds = s->holds + l * E * G;
        Change first = {e, g, -1}, second = {-1, -1, -1};
        if (kind == 0 && p->may_replicate) { /* another expert takes the place of a copy that is not its expert's last */
            second.expert = below(s, E);
            second.joins = g;
            if (s->num_copies[l * E + e] < 2 || holds[second.expert * G + g]) continue;
        } else if (kind == 1 && p->free_slots > 0) { /* a copy moves into a free slot */
            first.joins = below(s, G);
            if (s->used[l * G + first.joins] >= p->slots[first.joins] || holds[e * G + first.joins]) continue;
        } else { /* two copies change places */
            j = l * C + below(s, C);
            second.expert = s->copy_expert[j];
            second.leaves = first.joins = s->copy_gpu[j];
            second.joins = g;
            if (holds[e * G + first.joins] || holds[second.expert * G + g]) continue;
        }
        double delta = 0;
        for (int64_t w = 0; w < p->workloads; w++) {
            const double *now = s->busy_s + (w * p->layers + l) * G;
            for (int64_t k = 0; k < G; k++) busy[k] = now[k];
            add_seconds(p, s, w, l, first, busy);
            if (second.expert >= 0) add_seconds(p, s, w, l, second, busy);
            delta += p->weights[w] * (peak(busy, G) - peak(now, G));
        }
        if (p->traffic) {
            delta += traffic_change(p, s, l, first);
            if (second.expert >= 0) delta += traffic_change(p, s, l, second);
        }
        const Change changes[2] = {first, second};
        if (p->transitions) {
            for (int k = 0; k < 2 && changes[k].expert >= 0; k++) share_change(p, s, l, changes[k], shares[k]);
            delta += slowest_change(p, s, l, changes, shares);
        }
        if (delta > 0 && !(delta < -temperature * log(unit(s)))) continue;
        kept++;
        for (int64_t w = 0; w < p->workloads; w++) {
            double *now = s->busy_s + (w * p->layers + l) * G;
            add_seconds(p, s, w, l, first, now);
            if (second.expert >= 0) add_seconds(p, s, w, l, second, now);
        }
        if (p->traffic) {
            spread_traffic(p, s, l, first);
            if (second.expert >= 0) spread_traffic(p, s, l, second);
        }
        if (p->transitions) spread_flow(p, s, l, changes, shares);
        move_copy(p, s, l, first);
        if (second.expert >= 0) move_copy(p, s, l, second);
        if (j >= 0) {
            s->copy_gpu[i] = first.joins;
            s->copy_gpu[j] = g;
        } else if (second.expert >= 0) {
            s->copy_expert[i] = second.expert;
        } else {
            s->copy_gpu[i] = first.joins;
            s->used[l * G + g]--;
            s->used[l * G + first.joins]++;
        }
    }
    return kept;
}
