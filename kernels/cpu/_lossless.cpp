/* Writes and reads bfloat16 matrices without loss: the C ABI of lossless.py. The format is specified in
 * quantization/formats.py. One thread a call: threads that read experts call it side by side. */
#include "_cpu.h"

using namespace moeflow;

namespace {

constexpr int BLOCK = 64, BLOCK_BYTES = 96, NUM_CODES = 15, ESCAPE = 15;
constexpr uint32_t UNUSED = 0xffffffffu;
constexpr int ROOM_BELOW_TOP = 16; /* a row's top is its largest exponent while at most this part of it escapes */

inline int exponent_of(uint16_t bits) { return bits >> 7 & 255; }
inline uint8_t rest_of(uint16_t bits) { return (uint8_t)((bits >> 8 & 128) | (bits & 127)); }

/* Four bytes, each followed by a zero. */
inline uint64_t spread(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    uint64_t wide = four;
    wide = (wide | wide << 16) & 0x0000ffff0000ffffu;
    return (wide | wide << 8) & 0x00ff00ff00ff00ffu;
}
/* Brings 64 bytes to their places: 16 a + j to 16 (j / 4) + 8 (a / 2) + 2 (j % 4) + a % 2. */
inline void place(const uint8_t *values, uint8_t *to) {
    for (int half = 0; half < 2; ++half)
        for (int quad = 0; quad < 4; ++quad) {
            const uint8_t *p = values + 32 * half + 4 * quad;
            const uint64_t eight = spread(p) | spread(p + 16) << 8;
            memcpy(to + 8 * half + 16 * quad, &eight, 8);
        }
}

/* Whether a value's exponent is none that a code below a top says, and not 0, which code 15 says. */
inline bool is_escape(int top, int exponent) { return (uint16_t)(top - exponent) >= NUM_CODES && exponent; }
/* How many of a row's values are escapes. */
int64_t outside(const uint16_t *w, int64_t count, int top) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) found += is_escape(top, exponent_of(w[i]));
    return found;
}
int top_of(const uint16_t *w, int64_t count) {
    int top = 0;
    for (int64_t i = 0; i < count; ++i) top = exponent_of(w[i]) > top ? exponent_of(w[i]) : top;
    if (outside(w, count, top) * ROOM_BELOW_TOP <= count) return top;
    int64_t counts[256 + NUM_CODES] = {}, reached = 0, most = -1; /* counts[e + NUM_CODES] */
    for (int64_t i = 0; i < count; ++i) ++counts[exponent_of(w[i]) + NUM_CODES];
    counts[NUM_CODES] = 0; /* of exponent 0, which needs no code */
    for (int candidate = 0; candidate < 256; ++candidate) {
        reached += counts[candidate + NUM_CODES] - counts[candidate];
        if (reached >= most) most = reached, top = candidate;
    }
    return top;
}

inline void store32(uint8_t *to, uint32_t value) { memcpy(to, &value, 4); }
inline uint32_t load32(const uint8_t *from) {
    uint32_t value;
    memcpy(&value, from, 4);
    return value;
}

} // namespace

/* Returns the escapes of a matrix [num_rows, in_features]; its parts are written where `codes` is not null and no more
 * escapes are found than there is room for. */
EXPORTED int64_t moeflow_lossless_encode(const uint16_t *weights, int64_t num_rows, int64_t in_features, uint8_t *codes,
                                         uint16_t *tops, uint8_t *escapes, int64_t room) {
    int64_t found = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
        const uint16_t *w = weights + row * in_features;
        const int top = top_of(w, in_features);
        if (!codes) {
            found += outside(w, in_features, top);
            continue;
        }
        const int64_t before = found;
        for (int64_t k = 0; k < in_features; k += BLOCK, codes += BLOCK_BYTES) {
            const int count = (int)(in_features - k < BLOCK ? in_features - k : BLOCK);
            uint8_t rests[BLOCK] = {}, kept[BLOCK] = {}, placed[BLOCK];
            int is_any = 0;
            if (count == BLOCK)
                for (int i = 0; i < BLOCK; ++i) {
                    const uint16_t code = (uint16_t)(top - exponent_of(w[k + i]));
                    is_any |= code >= NUM_CODES;
                    rests[i] = rest_of(w[k + i]), kept[i] = (uint8_t)(code >= NUM_CODES ? ESCAPE : code);
                }
            else
                for (int i = 0; i < count; ++i) {
                    const uint16_t code = (uint16_t)(top - exponent_of(w[k + i]));
                    is_any |= code >= NUM_CODES;
                    rests[i] = rest_of(w[k + i]), kept[i] = (uint8_t)(code >= NUM_CODES ? ESCAPE : code);
                }
            if (is_any)
                for (int i = 0; i < count; ++i) {
                    if (kept[i] != ESCAPE || !exponent_of(w[k + i])) continue;
                    if (found < room) {
                        store32(escapes + 4 * found, (uint32_t)(row * in_features + k + i));
                        escapes[4 * room + found] = (uint8_t)exponent_of(w[k + i]);
                    }
                    ++found;
                }
            place(rests, codes);
            place(kept, placed);
            for (int i = 0; i < 32; ++i) codes[BLOCK + i] = (uint8_t)(placed[i] | placed[32 + i] << 4);
        }
        tops[row] = (uint16_t)(top | (found > before) << 8);
    }
    if (codes)
        for (int64_t i = found; i < room; ++i) store32(escapes + 4 * i, UNUSED), escapes[4 * room + i] = 0;
    return found;
}

/* What a matrix has that no writer writes; 0: nothing. In the order of _FAULTS in lossless.py. */
enum Fault { SOUND, UNSORTED, ELSEWHERE, HIDDEN, NO_TOP, NO_VALUE };

namespace {

/* The escapes of a matrix, from `next` on. */
struct Listed {
    const uint8_t *escapes;
    int64_t room, next, used;

    bool is_at(uint32_t position) const { return next < used && load32(escapes + 4 * next) == position; }
    int take() { return escapes[4 * room + next++]; }
};

/* Looks at a row, whose first escape is next, and writes its values where `weights` is not null. */
Fault decode_row(const uint8_t *codes, int stored_top, uint32_t position, int64_t in_features, Listed &listed,
                 uint16_t *weights) {
    if (stored_top > 511) return NO_TOP;
    const int top = stored_top & 255;
    const int64_t before = listed.next;
    for (int64_t k = 0; k < in_features; k += BLOCK, codes += BLOCK_BYTES) {
        const int count = (int)(in_features - k < BLOCK ? in_features - k : BLOCK);
        uint16_t values[BLOCK];
        uint8_t kept[BLOCK];
        int special = 0;
        for (int i = 0; i < BLOCK; ++i) {
            const int part = i / 16, lane = i % 16, at = lane / 4 * 16 + part / 2 * 8 + lane % 4 * 2 + part % 2;
            kept[i] = (uint8_t)(at < 32 ? codes[BLOCK + at] & 15 : codes[BLOCK + at - 32] >> 4);
            const int exponent = kept[i] == ESCAPE ? 0 : (top - kept[i]) & 255;
            values[i] = (uint16_t)((codes[at] & 128) << 8 | exponent << 7 | (codes[at] & 127));
            special |= (kept[i] == ESCAPE) | (kept[i] > top);
        }
        if (special)
            for (int i = 0; i < count; ++i)
                if (listed.is_at((uint32_t)(position + k + i))) {
                    const int exponent = listed.take();
                    if (kept[i] != ESCAPE || !exponent) return ELSEWHERE;
                    values[i] = (uint16_t)(values[i] | exponent << 7);
                } else if (kept[i] > top && kept[i] != ESCAPE) return NO_VALUE;
        if (weights) memcpy(weights + k, values, 2 * count);
    }
    return (listed.next > before) == (stored_top >> 8 != 0) ? SOUND : HIDDEN;
}

} // namespace

/* Looks at a matrix, and writes its values where `weights` is not null. */
EXPORTED int moeflow_lossless_decode(const uint8_t *codes, const uint16_t *tops, const uint8_t *escapes, int64_t room,
                                     int64_t num_rows, int64_t in_features, uint16_t *weights) {
    Listed listed{escapes, room, 0, 0};
    while (listed.used < room && load32(escapes + 4 * listed.used) != UNUSED) ++listed.used;
    for (int64_t i = listed.used; i < room; ++i)
        if (load32(escapes + 4 * i) != UNUSED) return UNSORTED;
    for (int64_t i = 0; i < listed.used; ++i)
        if (load32(escapes + 4 * i) >= (uint64_t)(num_rows * in_features) ||
            (i && load32(escapes + 4 * i) <= load32(escapes + 4 * i - 4)))
            return UNSORTED;
    const int64_t row_bytes = (in_features + BLOCK - 1) / BLOCK * BLOCK_BYTES;
    for (int64_t row = 0; row < num_rows; ++row) {
        const Fault fault = decode_row(codes + row * row_bytes, tops[row], (uint32_t)(row * in_features), in_features,
                                       listed, weights ? weights + row * in_features : nullptr);
        if (fault) return fault;
    }
    return listed.next == listed.used ? SOUND : ELSEWHERE;
}

/* Writes some rows of a matrix, whose escapes rise. Returns a fault; -1 where there is no such row. */
EXPORTED int moeflow_lossless_rows(const uint8_t *codes, const uint16_t *tops, const uint8_t *escapes, int64_t room,
                                   int64_t num_rows, int64_t in_features, const int64_t *ids, int64_t count,
                                   uint16_t *out) {
    const int64_t row_bytes = (in_features + BLOCK - 1) / BLOCK * BLOCK_BYTES;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = ids[i];
        if (row < 0 || row >= num_rows) return -1;
        const uint32_t position = (uint32_t)(row * in_features);
        Listed listed{escapes, room, 0, room};
        for (int64_t end = room; listed.next < end;) {
            const int64_t middle = (listed.next + end) / 2;
            if (load32(escapes + 4 * middle) < position) listed.next = middle + 1;
            else end = middle;
        }
        const Fault fault =
            decode_row(codes + row * row_bytes, tops[row], position, in_features, listed, out + i * in_features);
        if (fault) return fault;
    }
    return SOUND;
}
