/* bfloat16 values in 12 bits, read straight from their codes: the bits of tile_floats and FloatUnpack. The format is
 * specified in quantization/formats.py. Included by _cpu_kernels.h. */

constexpr int LOSSLESS_BLOCK = 64, LOSSLESS_BYTES = 96; /* values and bytes of a block */
constexpr uint32_t NO_ESCAPE = 0xffffffffu;             /* the place of an escape that is none */

/* The escapes of a row, in their order. Whatever the bytes say, no other memory is read. */
struct Escapes {
    const uint8_t *at, *exponents;
    int left;                /* from `next` on */
    uint32_t position, next; /* of the row's first value; from there on to an escape, which may be another row's */

    void none() { left = 0, next = NO_ESCAPE; }
    /* Finds a row's first escape from a column on. The search has no branch: it would be guessed wrong. */
    void find(const Matrix &m, const char *record, int64_t row, uint32_t column) {
        const uint8_t *first = (const uint8_t *)record + m.zero;
        position = (uint32_t)(row * m.in_features);
        at = first;
        for (int count = m.num_escapes; count > 0;) {
            const int half = (count + 1) / 2;
            at += stored(at + 4 * (half - 1)) < position + column ? 4 * half : 0;
            count -= half;
        }
        const int64_t found = (at - first) / 4;
        exponents = first + 4 * (int64_t)m.num_escapes + found, left = m.num_escapes - (int)found;
        next = left > 0 ? stored(at) - position : NO_ESCAPE;
    }
    static uint32_t stored(const uint8_t *p) {
        uint32_t value;
        memcpy(&value, p, 4);
        return value;
    }
    /* Puts the escapes of a block that begins at a column into its values, whose exponents are 0 so far. */
    template <class S> void put(uint32_t column, typename S::V (&v)[LOSSLESS_BLOCK / S::LANES]) {
        while (next - column < LOSSLESS_BLOCK) {
            UNROLL for (int i = 0; i < LOSSLESS_BLOCK / S::LANES; ++i)
                v[i] = S::put(v[i], (int)(next - column) - i * S::LANES, (uint32_t)*exponents << 23);
            ++exponents, at += 4;
            next = --left > 0 ? stored(at) - position : NO_ESCAPE;
        }
    }
};

/* The codes of a row. */
template <class S> struct LosslessLine {
    using V = typename S::V;
    const uint8_t *codes;
    typename S::Exponents exponents;

    /* Returns whether the row has escapes. */
    bool set(const Matrix &m, const char *record, int64_t row) {
        const uint8_t *top = (const uint8_t *)record + m.scale + 2 * row;
        codes = (const uint8_t *)record + m.codes + row * (m.padded / LOSSLESS_BLOCK * LOSSLESS_BYTES);
        exponents = S::exponents(top[0]);
        return top[1] & 1;
    }
    void floats(int block, V (&v)[LOSSLESS_BLOCK / S::LANES]) const {
        S::lossless(codes + block * LOSSLESS_BYTES, exponents, v);
    }
    /* A block with its escapes, to memory: zero from `count` on. */
    void floats(int block, int count, Escapes &escapes, float *to) const {
        V v[LOSSLESS_BLOCK / S::LANES];
        floats(block, v);
        escapes.put<S>(LOSSLESS_BLOCK * block, v);
        UNROLL for (int i = 0; i < LOSSLESS_BLOCK / S::LANES; ++i) S::store(to + i * S::LANES, v[i]);
        for (int i = count; i < LOSSLESS_BLOCK; ++i) to[i] = 0;
    }
};

template <class S, int R, int T>
__attribute__((noinline)) void tile_lossless(const Matrix &m, const char *record, const Side &side,
                                             const float *const *x, float *y, int stride) {
    using V = typename S::V;
    const int num_whole = m.in_features / LOSSLESS_BLOCK;
    const int64_t row_bytes = m.padded / LOSSLESS_BLOCK * LOSSLESS_BYTES;
    LosslessLine<S> lines[R];
    Escapes escapes[R];
    V sums[R][T];
    UNROLL for (int r = 0; r < R; ++r) {
        const int64_t row = side.row + r * side.step;
        if (__builtin_expect(lines[r].set(m, record, row), 0)) escapes[r].find(m, record, row, 0);
        else escapes[r].none();
        UNROLL for (int t = 0; t < T; ++t) sums[r][t] = S::zero();
    }
    const auto add = [&](int block, int r, const V(&v)[LOSSLESS_BLOCK / S::LANES]) {
        UNROLL for (int i = 0; i < LOSSLESS_BLOCK / S::LANES; ++i)
            UNROLL for (int t = 0; t < T; ++t)
                sums[r][t] = S::fma(v[i], S::load(x[t] + block * LOSSLESS_BLOCK + i * S::LANES), sums[r][t]);
    };
    for (int block = 0;; ++block) { /* from one block with escapes to the next */
        uint32_t next = NO_ESCAPE;
        UNROLL for (int r = 0; r < R; ++r) next = least(next, escapes[r].next);
        const int end = (int)least((uint32_t)num_whole, next / LOSSLESS_BLOCK);
        for (; block < end; ++block) {
            const int64_t ahead = ahead_of<R, 2 * AHEAD_BYTES>(side, block * LOSSLESS_BYTES, row_bytes);
            UNROLL for (int r = 0; r < R; ++r) S::prefetch(lines[r].codes + ahead);
            UNROLL for (int r = 0; r < R; ++r) S::prefetch(lines[r].codes + ahead + 64);
            UNROLL for (int r = 0; r < R; ++r) {
                V v[LOSSLESS_BLOCK / S::LANES];
                lines[r].floats(block, v);
                add(block, r, v);
            }
        }
        if (block >= num_whole) break;
        UNROLL for (int r = 0; r < R; ++r) {
            V v[LOSSLESS_BLOCK / S::LANES];
            lines[r].floats(block, v);
            escapes[r].template put<S>(LOSSLESS_BLOCK * block, v);
            add(block, r, v);
        }
    }
    if (const int left = m.in_features - LOSSLESS_BLOCK * num_whole)
        UNROLL for (int r = 0; r < R; ++r) {
            float whole[LOSSLESS_BLOCK];
            lines[r].floats(num_whole, left, escapes[r], whole);
            for (int i = 0; i < left; i += S::LANES)
                UNROLL for (int t = 0; t < T; ++t)
                    sums[r][t] = S::fma(S::load(whole + i), S::load(x[t] + num_whole * LOSSLESS_BLOCK + i), sums[r][t]);
        }
    UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int r = 0; r < R; ++r) y[t * stride + r * side.step] = S::sum(sums[r][t]);
}

template <class S> struct LosslessTile {
    template <int R, int T>
    static void run(const Matrix &m, const char *record, const Side &side, const Rows &, const float *const *x,
                    float *y, int stride) {
        tile_lossless<S, R, T>(m, record, side, x, y, stride);
    }
};

template <class S> struct LosslessUnpack {
    static void run(const Matrix &m, const char *record, int64_t row, int k, int count, float *to) {
        LosslessLine<S> line;
        Escapes escapes;
        if (line.set(m, record, row)) escapes.find(m, record, row, k);
        else escapes.none();
        for (int block = k / LOSSLESS_BLOCK; block * LOSSLESS_BLOCK < k + count; ++block, to += LOSSLESS_BLOCK)
            line.floats(block, least(LOSSLESS_BLOCK, m.in_features - LOSSLESS_BLOCK * block), escapes, to);
    }
};
