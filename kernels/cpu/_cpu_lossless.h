/* bfloat16 values in 12 bits, read straight from their codes: the bits of tile_floats and FloatUnpack. The format is
 * specified in quantization/formats.py. Included by _cpu_kernels.h. */

constexpr int LOSSLESS_BLOCK = 64, LOSSLESS_BYTES = 96; /* values and bytes of a block */
constexpr uint32_t NO_ESCAPE = 0xffffffffu;             /* the position of an escape that is none */

inline bool has_escapes(const Matrix &m, const char *record, int64_t row) {
    return ((const uint8_t *)record)[m.scale + 2 * row + 1] & 1;
}

/* The escapes of a matrix from a position on, in their order. Whatever the bytes say, no other memory is read. */
struct Escapes {
    const uint8_t *at, *exponents;
    int left;      /* from `next` on */
    uint32_t next; /* position: row * in_features + column */

    void set(const Matrix &m, const char *record, uint32_t first) {
        at = (const uint8_t *)record + m.zero, exponents = at + 4 * (int64_t)m.num_escapes;
        int low = 0, high = m.num_escapes;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (position(at + 4 * (int64_t)middle) < first) low = middle + 1;
            else high = middle;
        }
        at += 4 * (int64_t)low, exponents += low, left = m.num_escapes - low;
        next = left > 0 ? position(at) : NO_ESCAPE;
    }
    static uint32_t position(const uint8_t *p) {
        uint32_t value;
        memcpy(&value, p, 4);
        return value;
    }
    /* Puts the escapes of a block that begins at a position into its values. */
    void patch(uint32_t first, float *values) {
        for (; next - first < LOSSLESS_BLOCK; at += 4, ++exponents, --left, next = left > 0 ? position(at) : NO_ESCAPE) {
            uint32_t bits;
            memcpy(&bits, values + (next - first), 4);
            bits = (bits & 0x807fffffu) | (uint32_t)*exponents << 23;
            memcpy(values + (next - first), &bits, 4);
        }
    }
};

/* One row. */
template <class S, bool HAS_ESCAPES> struct LosslessLine {
    using V = typename S::V;
    const uint8_t *codes;
    typename S::Exponents exponents;
    Escapes escapes;
    uint32_t position;

    void set(const Matrix &m, const char *record, int64_t row) {
        codes = (const uint8_t *)record + m.codes + row * (m.padded / LOSSLESS_BLOCK * LOSSLESS_BYTES);
        exponents = S::exponents(((const uint8_t *)record)[m.scale + 2 * row]);
        position = (uint32_t)(row * m.in_features);
        if constexpr (HAS_ESCAPES) escapes.set(m, record, position);
    }
    /* The next block's values: blocks are met in their order. */
    void floats(int block, V (&v)[LOSSLESS_BLOCK / S::LANES]) {
        S::lossless(codes + block * LOSSLESS_BYTES, exponents, v);
        if constexpr (HAS_ESCAPES)
            if (const uint32_t first = position + LOSSLESS_BLOCK * block; escapes.next - first < LOSSLESS_BLOCK) {
                float whole[LOSSLESS_BLOCK];
                UNROLL for (int i = 0; i < LOSSLESS_BLOCK / S::LANES; ++i) S::store(whole + i * S::LANES, v[i]);
                escapes.patch(first, whole);
                UNROLL for (int i = 0; i < LOSSLESS_BLOCK / S::LANES; ++i) v[i] = S::load(whole + i * S::LANES);
            }
    }
    /* The same of a row's last, shorter block, zero beyond its end. */
    void floats(int block, int count, float *to) {
        V v[LOSSLESS_BLOCK / S::LANES];
        floats(block, v);
        UNROLL for (int i = 0; i < LOSSLESS_BLOCK / S::LANES; ++i) S::store(to + i * S::LANES, v[i]);
        for (int i = count; i < LOSSLESS_BLOCK; ++i) to[i] = 0;
    }
};

template <class S, bool HAS_ESCAPES, int R, int T>
__attribute__((noinline)) void tile_lossless(const Matrix &m, const char *record, const Side &side,
                                             const float *const *x, float *y, int stride) {
    using V = typename S::V;
    const int num_whole = m.in_features / LOSSLESS_BLOCK;
    const int64_t row_bytes = m.padded / LOSSLESS_BLOCK * LOSSLESS_BYTES;
    LosslessLine<S, HAS_ESCAPES> lines[R];
    V sums[R][T];
    UNROLL for (int r = 0; r < R; ++r) {
        lines[r].set(m, record, side.row + r * side.step);
        UNROLL for (int t = 0; t < T; ++t) sums[r][t] = S::zero();
    }
    for (int block = 0; block < num_whole; ++block) {
        const int64_t ahead = ahead_of<R, 2 * AHEAD_BYTES>(side, block * LOSSLESS_BYTES, row_bytes);
        UNROLL for (int r = 0; r < R; ++r) S::prefetch(lines[r].codes + ahead);
        UNROLL for (int r = 0; r < R; ++r) S::prefetch(lines[r].codes + ahead + 64);
        UNROLL for (int r = 0; r < R; ++r) {
            V v[LOSSLESS_BLOCK / S::LANES];
            lines[r].floats(block, v);
            UNROLL for (int i = 0; i < LOSSLESS_BLOCK / S::LANES; ++i)
                UNROLL for (int t = 0; t < T; ++t)
                    sums[r][t] = S::fma(v[i], S::load(x[t] + block * LOSSLESS_BLOCK + i * S::LANES), sums[r][t]);
        }
    }
    if (const int left = m.in_features - LOSSLESS_BLOCK * num_whole)
        UNROLL for (int r = 0; r < R; ++r) {
            float whole[LOSSLESS_BLOCK];
            lines[r].floats(num_whole, left, whole);
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
        bool any = false;
        UNROLL for (int r = 0; r < R; ++r) any |= has_escapes(m, record, side.row + r * side.step);
        if (any) tile_lossless<S, true, R, T>(m, record, side, x, y, stride);
        else tile_lossless<S, false, R, T>(m, record, side, x, y, stride);
    }
};

template <class S> struct LosslessUnpack {
    static void run(const Matrix &m, const char *record, int64_t row, int k, int count, float *to) {
        LosslessLine<S, true> line;
        line.set(m, record, row);
        line.escapes.set(m, record, line.position + k);
        for (int block = k / LOSSLESS_BLOCK; block * LOSSLESS_BLOCK < k + count; ++block, to += LOSSLESS_BLOCK)
            line.floats(block, least(LOSSLESS_BLOCK, m.in_features - LOSSLESS_BLOCK * block), to);
    }
};
