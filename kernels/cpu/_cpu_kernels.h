/* The arithmetic, once for every instruction set: S is one of them (_cpu_avx2.h).
 *
 * An output is one sum over k in float32, in lanes: lane l adds the products l, l + LANES, ... in rising k, and the
 * lanes are added last. Nothing else enters, so its bits do not depend on which rows, tokens or threads share the work.
 * In coded formats the lanes of one group are summed first, then scaled. Many tokens of coded formats are multiplied
 * with values unpacked to float32 instead; floats come out the same either way.
 *
 * Included inside an unnamed namespace: nothing here may be merged with another instruction set's.
 */

#define UNROLL _Pragma("GCC unroll 8")
/* Up to so many tokens of a matrix its values are unpacked in registers, anew for every four tokens. */
constexpr int FEW_OF_FLOATS = 8, FEW_OF_CODES = 8;
constexpr int64_t AHEAD_BYTES = 1024; /* of the prefetch of a row of weights */

/* Activations that are rounded to int16 with one scale; a power of two, for a group never has two then. */
constexpr int ROUNDED_TOGETHER = 128;
constexpr float ROUNDED_MOST = 32767;

inline int sums_slot(int group_size) { return group_size / 64; } /* of 32, 64 and 128: 0, 1 and 2 */

template <class T> inline T least(T a, T b) { return a < b ? a : b; }
inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

/* ---- Loads and stores of fewer than LANES values ---- */

template <class S, class T> inline typename S::V load_part(const T *p, int count) {
    T whole[S::LANES] = {};
    memcpy(whole, p, count * sizeof(T));
    return S::load(whole);
}
template <class S, class T> inline void store_part(T *p, typename S::V v, int count) {
    T whole[S::LANES];
    S::store(whole, v);
    memcpy(p, whole, count * sizeof(T));
}
template <class S, class T> inline void store_values(const float *from, T *to, int count) {
    int i = 0;
    for (; i + S::LANES <= count; i += S::LANES) S::store(to + i, S::load(from + i));
    if (i < count) store_part<S>(to + i, load_part<S>(from + i, count - i), count - i);
}
template <class S> inline void store_row(const float *from, void *to, int64_t offset, int count, int format) {
    if (format == FLOAT32) memcpy((float *)to + offset, from, count * sizeof(float));
    else if (format == BFLOAT16) store_values<S>(from, (BFloat16 *)to + offset, count);
    else store_values<S>(from, (Float16 *)to + offset, count);
}
template <class S, class T> inline void load_values(const T *from, float *to, int count) {
    int i = 0;
    for (; i + S::LANES <= count; i += S::LANES) S::store(to + i, S::load(from + i));
    if (i < count) store_part<S>(to + i, load_part<S>(from + i, count - i), count - i);
}
template <class S> inline void load_row(const void *from, int format, int count, float *to) {
    if (format == FLOAT32) memcpy(to, from, count * sizeof(float));
    else if (format == BFLOAT16) load_values<S>((const BFloat16 *)from, to, count);
    else load_values<S>((const Float16 *)from, to, count);
}

/* ---- Formats of codes: a block is 32 of them ---- */

template <int BITS, bool HAS_ZEROS_, int SCALE_BYTES_ = 2> struct Coded {
    static constexpr int BLOCK_BYTES = 4 * BITS, SCALE_BYTES = SCALE_BYTES_;
    static constexpr bool HAS_ZEROS = HAS_ZEROS_, IS_INTEGER = true;
};
/* Formats whose codes are met as bytes. */
#define CODED_BYTES(NAME, BITS, HAS_ZEROS, SCALE_BYTES, BYTES)                                                         \
    template <class S> struct NAME : Coded<BITS, HAS_ZEROS, SCALE_BYTES> {                                             \
        static void floats(const uint8_t *p, typename S::V (&v)[32 / S::LANES]) { S::widen(S::BYTES(p), v); }          \
        static auto words(const uint8_t *p) { return S::words(S::BYTES(p)); }                                          \
    };
CODED_BYTES(Uint3, 3, true, 2, bytes3)
CODED_BYTES(Uint2, 2, true, 2, bytes2)
CODED_BYTES(Sign1, 1, false, 2, bytes_sign)
CODED_BYTES(Mxfp4, 4, false, 1, bytes_mxfp4)
#undef CODED_BYTES
template <class S> struct Int8 : Coded<8, false> {
    static auto words(const uint8_t *p) { return S::words8(p); }
    static void floats(const uint8_t *p, typename S::V (&v)[32 / S::LANES]) {
        UNROLL for (int i = 0; i < 32 / S::LANES; ++i) v[i] = S::load((const int8_t *)p + i * S::LANES);
    }
};
template <class S> struct Uint4 : Coded<4, true> {
    static auto words(const uint8_t *p) { return S::words4(p); }
    static void floats(const uint8_t *p, typename S::V (&v)[32 / S::LANES]) { S::nibbles(p, v); }
};
template <class S> struct Fp8 : Coded<8, false, 4> {
    static constexpr bool IS_INTEGER = false;
    static void floats(const uint8_t *p, typename S::V (&v)[32 / S::LANES]) {
        UNROLL for (int i = 0; i < 32 / S::LANES; ++i) v[i] = S::load((const Float8 *)p + i * S::LANES);
    }
};

/* Where one row of codes lies. */
template <class S, class F> struct Line {
    const uint8_t *codes, *scale;
    const Float16 *zero;

    void set(const Matrix &m, const char *record, int64_t row) {
        const int64_t groups = m.padded / m.group_size;
        codes = (const uint8_t *)record + m.codes + row * (m.padded / 32 * F::BLOCK_BYTES);
        const int64_t scale_row = F::SCALE_BYTES == 4 ? row / 128 : row; /* FP8: blocks of 128 x 128 */
        scale = (const uint8_t *)record + m.scale + scale_row * groups * F::SCALE_BYTES;
        zero = (const Float16 *)(record + m.zero) + row * groups;
    }
    /* One group's scale, of which the codes' own unit is part: E2M1 is doubled, E4M3 256 times too small. */
    float scale_of(int group) const {
        float value;
        if constexpr (F::SCALE_BYTES == 2) return S::value((const Float16 *)scale + group);
        if constexpr (F::SCALE_BYTES == 4) {
            memcpy(&value, scale + 4 * group, 4);
            return value * 256;
        }
        const uint32_t exponent = scale[group];
        const uint32_t bits = exponent == 255 ? 0x7fc00000u : exponent ? exponent << 23 : 0x400000u;
        memcpy(&value, &bits, 4);
        return value * 0.5f;
    }
    /* The scales and zeros of up to LANES groups from this one. */
    void grid(int group, int count, float *scales, float *zeros) const {
        if constexpr (F::SCALE_BYTES == 2) halves((const Float16 *)scale + group, count, scales);
        else
            for (int i = 0; i < count; ++i) scales[i] = scale_of(group + i);
        if constexpr (F::HAS_ZEROS) halves(zero + group, count, zeros);
    }
    static void halves(const Float16 *p, int count, float *to) {
        if (count == S::LANES) S::store(to, S::load(p));
        else
            for (int i = 0; i < count; ++i) to[i] = S::value(p + i);
    }
    /* The values of one block of a row of so many, before zero and scale. */
    void floats(int block, int in_features, typename S::V (&v)[32 / S::LANES]) const {
        F::floats(codes + block * F::BLOCK_BYTES, v);
        if constexpr (!F::IS_INTEGER) /* padding may be NaN, which zeros do not cancel */
            if (const int count = in_features - 32 * block; count < 32) {
                float whole[32];
                UNROLL for (int i = 0; i < 32 / S::LANES; ++i) S::store(whole + i * S::LANES, v[i]);
                for (int i = count; i < 32; ++i) whole[i] = 0;
                UNROLL for (int i = 0; i < 32 / S::LANES; ++i) v[i] = S::load(whole + i * S::LANES);
            }
    }
};

/* ---- Few tokens: R rows of the matrix by T tokens, y[t * stride + r] ---- */

/* Rows of a matrix that are read side by side, row + r * step, so that each of the R is a stream of its own through
 * memory: `row` is the nth of a stretch of `step` rows, and beyond the R stretches come R others. */
struct Side {
    int row, step, nth;
};
/* Where to prefetch, from the start of each such row. */
template <int R> inline int64_t ahead_of(const Side &side, int64_t at, int64_t row_bytes) {
    const int64_t length = side.step * row_bytes, ahead = AHEAD_BYTES < length ? AHEAD_BYTES : length;
    return at + ahead + (side.nth * row_bytes + at + ahead < length ? 0 : (R - 1) * length);
}

template <class S, class E, int R, int T>
__attribute__((noinline)) void tile_floats(const Matrix &m, const char *record, const Side &side, const float *const *x,
                                           float *y, int stride) {
    using V = typename S::V;
    const int k_end = m.in_features, k_whole = k_end / S::LANES * S::LANES;
    const E *w[R];
    V sums[R][T];
    UNROLL for (int r = 0; r < R; ++r) {
        w[r] = (const E *)(record + m.codes) + (int64_t)(side.row + r * side.step) * k_end;
        UNROLL for (int t = 0; t < T; ++t) sums[r][t] = S::zero();
    }
    constexpr int line = 64 / (int)sizeof(E);
    int k = 0;
    for (; k + line <= k_whole; k += line) {
        const int64_t ahead = ahead_of<R>(side, k * (int64_t)sizeof(E), k_end * (int64_t)sizeof(E));
        UNROLL for (int r = 0; r < R; ++r) S::prefetch((const char *)w[r] + ahead);
        UNROLL for (int i = 0; i < line; i += S::LANES) {
            V v[R];
            UNROLL for (int r = 0; r < R; ++r) v[r] = S::load(w[r] + k + i);
            UNROLL for (int t = 0; t < T; ++t) {
                const V value = S::load(x[t] + k + i);
                UNROLL for (int r = 0; r < R; ++r) sums[r][t] = S::fma(v[r], value, sums[r][t]);
            }
        }
    }
    for (; k < k_end; k += S::LANES)
        UNROLL for (int r = 0; r < R; ++r) {
            const V v = k < k_whole ? S::load(w[r] + k) : load_part<S>(w[r] + k, k_end - k);
            UNROLL for (int t = 0; t < T; ++t) sums[r][t] = S::fma(v, S::load(x[t] + k), sums[r][t]);
        }
    UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int r = 0; r < R; ++r) y[t * stride + r * side.step] = S::sum(sums[r][t]);
}

/* The same of codes: one group's products are summed, then scaled. A zero point is taken off every lane by the sum of
 * that lane's own activations, so that nothing large cancels. Rounded activations meet the codes as integers. */
template <class S, class F, bool IS_ROUNDED, int R, int T>
__attribute__((noinline)) void tile_codes(const Matrix &m, const char *record, const Side &side, const Rows &input,
                                          const float *const *x, float *y, int stride) {
    using V = typename S::V;
    constexpr int line = F::BLOCK_BYTES == 32 ? 1 : F::BLOCK_BYTES == 16 ? 3 : 7; /* blocks of one prefetch, less 1 */
    const int num_blocks = (m.in_features + 31) / 32, group_blocks = m.group_size / 32;
    const int num_groups = (num_blocks + group_blocks - 1) / group_blocks;
    const int64_t row_bytes = m.padded / 32 * F::BLOCK_BYTES;
    const int64_t sums_at = F::HAS_ZEROS ? input.sums[sums_slot(m.group_size)] / 4 : 0;
    const int64_t deltas_at = input.deltas / 4;
    Line<S, F> lines[R];
    V sums[R][T];
    float scales[R][S::LANES], zeros[R][S::LANES];
    UNROLL for (int r = 0; r < R; ++r) {
        lines[r].set(m, record, side.row + r * side.step);
        UNROLL for (int t = 0; t < T; ++t) sums[r][t] = S::zero();
    }
    for (int group = 0, block = 0; group < num_groups; ++group) {
        const int at = group % S::LANES;
        if (at == 0) UNROLL for (int r = 0; r < R; ++r)
                lines[r].grid(group, least(S::LANES, num_groups - group), scales[r], zeros[r]);
        V inner[R][T];
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int t = 0; t < T; ++t) {
                if constexpr (F::HAS_ZEROS)
                    inner[r][t] = S::mul(S::all(-zeros[r][at]), S::load(x[t] + sums_at + group * S::LANES));
                else inner[r][t] = S::zero();
            }
        const int group_end = least(block + group_blocks, num_blocks);
        if constexpr (IS_ROUNDED) {
            while (block < group_end) { /* as long as the activations' own scale stays the same */
                const int delta = block / (ROUNDED_TOGETHER / 32);
                const int end = least((delta + 1) * (ROUNDED_TOGETHER / 32), group_end);
                typename S::I whole[R][T];
                UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t) whole[r][t] = S::none();
                for (; block < end; ++block) {
                    if ((block & line) == 0) { /* here and not in a function: GCC drops those that only prefetch */
                        const int64_t ahead = ahead_of<R>(side, block * F::BLOCK_BYTES, row_bytes);
                        UNROLL for (int r = 0; r < R; ++r) S::prefetch(lines[r].codes + ahead);
                    }
                    UNROLL for (int r = 0; r < R; ++r) {
                        const auto words = F::words(lines[r].codes + block * F::BLOCK_BYTES);
                        UNROLL for (int t = 0; t < T; ++t) {
                            const auto rounded = (const int16_t *)((const char *)x[t] + input.codes);
                            whole[r][t] = S::dot(whole[r][t], words, rounded + block * 32);
                        }
                    }
                }
                UNROLL for (int t = 0; t < T; ++t) {
                    const V unit = S::all(x[t][deltas_at + delta]);
                    UNROLL for (int r = 0; r < R; ++r)
                        inner[r][t] = S::fma(S::to_float(whole[r][t]), unit, inner[r][t]);
                }
            }
        } else
            for (; block < group_end; ++block) {
                if ((block & line) == 0) {
                    const int64_t ahead = ahead_of<R>(side, block * F::BLOCK_BYTES, row_bytes);
                    UNROLL for (int r = 0; r < R; ++r) S::prefetch(lines[r].codes + ahead);
                }
                UNROLL for (int r = 0; r < R; ++r) {
                    V v[32 / S::LANES];
                    lines[r].floats(block, m.in_features, v);
                    UNROLL for (int t = 0; t < T; ++t)
                        UNROLL for (int i = 0; i < 32 / S::LANES; ++i)
                            inner[r][t] = S::fma(v[i], S::load(x[t] + block * 32 + i * S::LANES), inner[r][t]);
                }
            }
        UNROLL for (int r = 0; r < R; ++r) {
            const V scale = S::all(scales[r][at]);
            UNROLL for (int t = 0; t < T; ++t) sums[r][t] = S::fma(scale, inner[r][t], sums[r][t]);
        }
    }
    UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int r = 0; r < R; ++r) y[t * stride + r * side.step] = S::sum(sums[r][t]);
}

template <class S, class E> struct FloatTile {
    template <int R, int T>
    static void run(const Matrix &m, const char *record, const Side &side, const Rows &, const float *const *x,
                    float *y, int stride) {
        tile_floats<S, E, R, T>(m, record, side, x, y, stride);
    }
};
template <class S, class F, bool IS_ROUNDED> struct CodeTile {
    template <int R, int T>
    static void run(const Matrix &m, const char *record, const Side &side, const Rows &input, const float *const *x,
                    float *y, int stride) {
        tile_codes<S, F, IS_ROUNDED, R, T>(m, record, side, input, x, y, stride);
    }
};

template <class Tile, int R, int T>
inline void few_rows(const Matrix &m, const char *record, int first, int count, const Rows &input,
                     const float *const *x, float *y, int stride) {
    const int step = count / R;
    for (int r = 0; r < step; ++r) Tile::template run<R, T>(m, record, {first + r, step, r}, input, x, y + r, stride);
    if constexpr (R > 1)
        for (int r = step * R; r < count; ++r)
            Tile::template run<1, T>(m, record, {first + r, 1, 0}, input, x, y + r, stride);
}

template <class Tile>
inline void few_tokens(const Matrix &m, const char *record, int first, int count, const Rows &input,
                       const float *const *x, int num_tokens, float *y, int stride) {
    if (num_tokens == 1) return few_rows<Tile, 4, 1>(m, record, first, count, input, x, y, stride);
    for (int r = 0; r < count; r += 2) { /* two rows stay in the nearest cache while all tokens pass */
        const int rows = least(2, count - r);
        for (int t = 0; t < num_tokens; t += 4) {
            float *to = y + t * stride + r;
            switch (num_tokens - t) {
            case 1: few_rows<Tile, 1, 1>(m, record, first + r, rows, input, x + t, to, stride); break;
            case 2: few_rows<Tile, 2, 2>(m, record, first + r, rows, input, x + t, to, stride); break;
            case 3: few_rows<Tile, 1, 3>(m, record, first + r, rows, input, x + t, to, stride); break;
            default: few_rows<Tile, 1, 4>(m, record, first + r, rows, input, x + t, to, stride);
            }
        }
    }
}

/* ---- Many tokens: blocks of the matrix as floats, then R rows by T tokens in registers ---- */

/* Values k to k + count of a row, zero beyond its end; k is a multiple of 128 and count of LANES. */
template <class S, class E> struct FloatUnpack {
    static void run(const Matrix &m, const char *record, int64_t row, int k, int count, float *to) {
        const E *from = (const E *)(record + m.codes) + row * m.in_features + k;
        const int num_values = least(count, m.in_features - k);
        if constexpr (std::is_same<E, float>::value) memcpy(to, from, num_values * sizeof(float));
        else load_values<S>(from, to, num_values);
        for (int i = num_values; i < count; ++i) to[i] = 0;
    }
};
template <class S, class F> struct CodeUnpack {
    static void run(const Matrix &m, const char *record, int64_t row, int k, int count, float *to) {
        using V = typename S::V;
        Line<S, F> line;
        line.set(m, record, row);
        for (int block = k / 32; block * 32 < k + count; ++block, to += 32) {
            const int group = block * 32 / m.group_size;
            const V scale = S::all(line.scale_of(group));
            V v[32 / S::LANES], zero = S::zero();
            if constexpr (F::HAS_ZEROS) zero = S::all(S::value(line.zero + group));
            line.floats(block, m.in_features, v);
            UNROLL for (int i = 0; i < 32 / S::LANES; ++i)
                S::store(to + i * S::LANES, S::mul(F::HAS_ZEROS ? S::sub(v[i], zero) : v[i], scale));
        }
    }
};

constexpr int MANY_K = 512, MANY_OF_BLOCK = 24; /* in features and rows of a block */

template <class S, int R, int T>
__attribute__((noinline)) void multiply(const float *w, const float *const *x, int k, int count, float *sums) {
    using V = typename S::V;
    constexpr int L = S::LANES;
    V inner[T][R];
    UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int r = 0; r < R; ++r) inner[t][r] = S::load(sums + (t * MANY_OF_BLOCK + r) * L);
    for (int i = 0; i < count; i += L) {
        V v[R];
        UNROLL for (int r = 0; r < R; ++r) v[r] = S::load(w + r * MANY_K + i);
        UNROLL for (int t = 0; t < T; ++t) {
            const V value = S::load(x[t] + k + i);
            UNROLL for (int r = 0; r < R; ++r) inner[t][r] = S::fma(v[r], value, inner[t][r]);
        }
    }
    UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int r = 0; r < R; ++r) S::store(sums + (t * MANY_OF_BLOCK + r) * L, inner[t][r]);
}

template <class S, int T>
inline void multiply_rows(const float *w, int num_rows, const float *const *x, int k, int count, float *sums) {
    constexpr int R = S::MANY_ROWS;
    int r = 0;
    for (; r + R <= num_rows; r += R) multiply<S, R, T>(w + r * MANY_K, x, k, count, sums + r * S::LANES);
    for (; r < num_rows; ++r) multiply<S, 1, T>(w + r * MANY_K, x, k, count, sums + r * S::LANES);
}

template <class S, class Unpack>
inline void many_tokens_of_block(const Matrix &m, const char *record, int first, int num_rows, const float *const *x,
                                 int num_tokens, float *y, int stride, float *scratch) {
    constexpr int L = S::LANES, T = S::MANY_TOKENS;
    float *block = scratch, *sums = scratch + MANY_OF_BLOCK * MANY_K; /* [tokens, MANY_OF_BLOCK, LANES] */
    memset(sums, 0, sizeof(float) * num_tokens * MANY_OF_BLOCK * L);
    for (int k = 0; k < m.in_features; k += MANY_K) {
        const int count = least(MANY_K, round_up(m.in_features - k, L));
        for (int r = 0; r < num_rows; ++r) Unpack::run(m, record, first + r, k, count, block + r * MANY_K);
        int t = 0;
        for (; t + T <= num_tokens; t += T)
            multiply_rows<S, T>(block, num_rows, x + t, k, count, sums + t * MANY_OF_BLOCK * L);
        for (; t < num_tokens; ++t)
            multiply_rows<S, 1>(block, num_rows, x + t, k, count, sums + t * MANY_OF_BLOCK * L);
    }
    for (int t = 0; t < num_tokens; ++t)
        for (int r = 0; r < num_rows; ++r) y[t * stride + r] = S::sum(S::load(sums + (t * MANY_OF_BLOCK + r) * L));
}

template <class S, class Unpack>
inline void many_tokens(const Matrix &m, const char *record, int first, int num_rows, const float *const *x,
                        int num_tokens, float *y, int stride, float *scratch) {
    for (int r = 0; r < num_rows; r += MANY_OF_BLOCK)
        many_tokens_of_block<S, Unpack>(m, record, first + r, least(MANY_OF_BLOCK, num_rows - r), x, num_tokens,
                                        y + r, stride, scratch);
}

/* ---- Transposed floats [K, N]: each lane is an output, one chain over k ---- */

template <class S, class E, int T>
inline void columns(const E *w, int num_rows, int in_features, int count, const float *const *x, float *y, int stride) {
    using V = typename S::V;
    for (int t = 0; t < T; ++t) memset(y + t * stride, 0, sizeof(float) * round_up(count, S::LANES));
    for (int k = 0; k < in_features; k += 4) {
        const int depth = least(4, in_features - k);
        const E *from = w + (int64_t)k * num_rows;
        for (int c = 0; c < count; c += S::LANES) {
            const bool is_whole = c + S::LANES <= count;
            V sums[T];
            UNROLL for (int t = 0; t < T; ++t) sums[t] = S::load(y + t * stride + c);
            for (int i = 0; i < depth; ++i) {
                const E *p = from + (int64_t)i * num_rows + c;
                const V v = is_whole ? S::load(p) : load_part<S>(p, count - c);
                UNROLL for (int t = 0; t < T; ++t) sums[t] = S::fma(v, S::all(x[t][k + i]), sums[t]);
            }
            UNROLL for (int t = 0; t < T; ++t) S::store(y + t * stride + c, sums[t]);
        }
    }
}

/* ---- A product of any matrix, with its bias: y[t * stride + r] ---- */

template <class S, class E>
inline void product_of_floats(const Matrix &m, const char *record, int first, int count, const Rows &input,
                              const float *const *x, int num_tokens, bool is_many, float *y, int stride,
                              float *scratch) {
    if (m.is_transposed) {
        const E *w = (const E *)(record + m.codes) + first;
        int t = 0;
        for (; t + 4 <= num_tokens; t += 4)
            columns<S, E, 4>(w, m.num_rows, m.in_features, count, x + t, y + t * stride, stride);
        for (; t < num_tokens; ++t)
            columns<S, E, 1>(w, m.num_rows, m.in_features, count, x + t, y + t * stride, stride);
    } else if (is_many)
        many_tokens<S, FloatUnpack<S, E>>(m, record, first, count, x, num_tokens, y, stride, scratch);
    else few_tokens<FloatTile<S, E>>(m, record, first, count, input, x, num_tokens, y, stride);
}

template <class S, template <class> class F>
inline void product_of_codes(const Matrix &m, const char *record, int first, int count, const Rows &input,
                             const float *const *x, int num_tokens, bool is_many, float *y, int stride,
                             float *scratch) {
    if (is_many)
        return many_tokens<S, CodeUnpack<S, F<S>>>(m, record, first, count, x, num_tokens, y, stride, scratch);
    if constexpr (F<S>::IS_INTEGER)
        if (input.is_rounded)
            return few_tokens<CodeTile<S, F<S>, true>>(m, record, first, count, input, x, num_tokens, y, stride);
    few_tokens<CodeTile<S, F<S>, false>>(m, record, first, count, input, x, num_tokens, y, stride);
}

template <class S>
__attribute__((noinline)) void product(const Matrix &m, const char *record, int first, int count, const Rows &input,
                    const float *const *x, int num_tokens, int total, float *y, int stride, float *scratch) {
    const bool is_many = total > (m.format <= FLOAT16 ? FEW_OF_FLOATS : FEW_OF_CODES);
#define ARGUMENTS m, record, first, count, input, x, num_tokens, is_many, y, stride, scratch
    switch (m.format) {
    case FLOAT32: product_of_floats<S, float>(ARGUMENTS); break;
    case BFLOAT16: product_of_floats<S, BFloat16>(ARGUMENTS); break;
    case FLOAT16: product_of_floats<S, Float16>(ARGUMENTS); break;
    case INT8: product_of_codes<S, Int8>(ARGUMENTS); break;
    case UINT4: product_of_codes<S, Uint4>(ARGUMENTS); break;
    case UINT3: product_of_codes<S, Uint3>(ARGUMENTS); break;
    case UINT2: product_of_codes<S, Uint2>(ARGUMENTS); break;
    case SIGN1: product_of_codes<S, Sign1>(ARGUMENTS); break;
    case MXFP4: product_of_codes<S, Mxfp4>(ARGUMENTS); break;
    case FP8: product_of_codes<S, Fp8>(ARGUMENTS); break;
    }
#undef ARGUMENTS
    if (m.bias < 0) return;
    float bias[COLUMNS_AT_ONCE * 2];
    const int bytes = m.bias_format == FLOAT32 ? 4 : 2;
    load_row<S>(record + m.bias + (int64_t)first * bytes, m.bias_format, count, bias);
    for (int t = 0; t < num_tokens; ++t)
        for (int r = 0; r < count; ++r) y[t * stride + r] += bias[r];
}

/* ---- Activations ---- */

template <class S> inline typename S::V exponential(typename S::V x) {
    using V = typename S::V;
    x = S::at_least(S::at_most(x, S::all(88.0f)), S::all(-87.0f));
    const V n = S::round(S::mul(x, S::all(1.44269504f)));
    V f = S::fma(n, S::all(-0.693359375f), x);
    f = S::fma(n, S::all(2.12194440e-4f), f);
    V p = S::all(1.9875691500e-4f);
    constexpr float more[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    for (const float c : more) p = S::fma(p, f, S::all(c));
    p = S::fma(S::mul(f, f), p, S::add(f, S::all(1)));
    return S::mul(p, S::power_of_two(n));
}
template <class S> inline typename S::V sigmoid(typename S::V x) {
    const typename S::V one = S::all(1);
    return S::div(one, S::add(one, exponential<S>(S::sub(S::zero(), x))));
}
/* x Phi(x); Abramowitz and Stegun 7.1.26, off by 1.5e-7 at most. */
template <class S> inline typename S::V gelu(typename S::V x) {
    using V = typename S::V;
    const V z = S::mul(S::absolute(x), S::all(0.70710678f)), one = S::all(1);
    const V t = S::div(one, S::fma(z, S::all(0.3275911f), one));
    V p = S::all(1.061405429f);
    constexpr float more[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
    for (const float c : more) p = S::fma(p, t, S::all(c));
    const V tail = S::mul(S::mul(p, t), exponential<S>(S::sub(S::zero(), S::mul(z, z)))); /* erfc(z) */
    const V positive = S::at_least(x, S::zero());
    return S::sub(positive, S::mul(S::mul(S::absolute(x), S::all(0.5f)), tail));
}

template <class S>
inline typename S::V activate(const Activation &a, typename S::V gate, typename S::V up) {
    using V = typename S::V;
    gate = S::at_most(gate, S::all(a.gate_limit));
    V value;
    switch (a.kind) {
    case SILU: value = S::mul(gate, sigmoid<S>(S::mul(gate, S::all(a.alpha)))); break;
    case GELU: value = gelu<S>(gate); break;
    case GELU_TANH: {
        const V cube = S::mul(S::mul(gate, gate), gate);
        value = S::mul(gate, sigmoid<S>(S::mul(S::fma(cube, S::all(0.044715f), gate), S::all(1.5957691216f))));
        break;
    }
    case RELU: value = S::at_least(gate, S::zero()); break;
    default: value = S::at_least(gate, S::zero()), value = S::mul(value, value);
    }
    if (a.gate == NO_GATE) return value;
    value = S::at_most(value, S::all(a.activated_limit));
    up = S::at_least(S::at_most(up, S::all(a.up_limit)), S::all(-a.up_limit));
    return S::mul(value, S::add(up, S::all(a.up_offset)));
}

/* ---- The steps of _cpu.cpp ---- */

inline const float *row_of(const Rows &rows, int64_t row) { return (const float *)(rows.data + row * rows.stride); }

template <class S> struct Steps {
    static void convert(const void *from, int format, int count, float *to, int padded) {
        load_row<S>(from, format, count, to);
        memset(to + count, 0, sizeof(float) * (padded - count));
    }

    /* In lanes, as tile_codes adds them. */
    static void sum_groups(const float *x, int padded, int group_size, float *sums) {
        for (int k = 0; k < padded; k += group_size, sums += S::LANES) {
            auto sum = S::load(x + k);
            for (int i = S::LANES; i < group_size; i += S::LANES) sum = S::add(sum, S::load(x + k + i));
            S::store(sums, sum);
        }
    }
    static void prepare(const Rows &rows, int64_t row) {
        char *data = rows.data + row * rows.stride;
        float *x = (float *)data;
        if (rows.is_rounded) round_row(x, rows.padded, (int16_t *)(data + rows.codes), (float *)(data + rows.deltas));
        for (int slot = 0; slot < 3; ++slot) {
            if (rows.sums[slot] < 0) continue;
            float *sums = (float *)(data + rows.sums[slot]);
            if (!rows.is_rounded) sum_groups(x, rows.padded, 32 << slot, sums);
            else sum_rounded((const int16_t *)(data + rows.codes), (const float *)(data + rows.deltas), rows.padded,
                             32 << slot, sums);
        }
    }
    static void round_row(const float *x, int padded, int16_t *codes, float *deltas) {
        using V = typename S::V;
        constexpr int together = ROUNDED_TOGETHER;
        for (int k = 0; k < padded; k += together) {
            V highest = S::zero(), nothing = S::zero();
            for (int i = 0; i < together; i += S::LANES) {
                const V v = S::load(x + k + i);
                highest = S::at_least(S::absolute(v), highest);
                nothing = S::fma(v, S::zero(), nothing); /* NaN where a value is NaN or infinite */
            }
            float lanes[S::LANES], delta = 0;
            S::store(lanes, highest);
            for (const float lane : lanes) delta = lane > delta ? lane : delta;
            delta /= ROUNDED_MOST;
            deltas[k / together] = delta + S::sum(nothing);
            const V inverse = S::all(delta > 1e-38f && delta < 1e38f ? 1 / delta : 0), most = S::all(ROUNDED_MOST);
            for (int i = 0; i < together; i += S::LANES) {
                V v = S::mul(S::load(x + k + i), inverse);
                v = S::at_least(S::at_most(v, most), S::sub(S::zero(), most));
                S::store_words(codes + k + i, S::round(v));
            }
        }
    }
    static void sum_rounded(const int16_t *codes, const float *deltas, int padded, int group_size, float *sums) {
        const auto ones = S::words(S::bytes_one());
        for (int k = 0; k < padded; k += group_size, sums += S::LANES) {
            auto sum = S::none();
            for (int i = 0; i < group_size; i += 32) sum = S::dot(sum, ones, codes + k + i);
            S::store(sums, S::mul(S::to_float(sum), S::all(deltas[k / ROUNDED_TOGETHER])));
        }
    }

    static void hidden(const Segment &segment, const Rows &input, const Rows &hidden, int first, int count,
                       char *scratch) {
        const Expert &expert = *segment.expert;
        const Activation &activation = expert.activation;
        const int num_tokens = segment.count, stride = 2 * round_up(count, 16), half = stride / 2;
        const float *x[TOKENS_AT_ONCE];
        for (int t = 0; t < num_tokens; ++t) x[t] = row_of(input, segment.input_row + t);
        float *y = (float *)scratch, *rest = y + TOKENS_AT_ONCE * stride;
        const auto run = [&](int row, int num_rows, float *to) {
            product<S>(expert.first, segment.record, row, num_rows, input, x, num_tokens, segment.total, to,
                          stride, rest);
        };
        if (activation.gate == INTERLEAVED) {
            run(2 * first, count, y); /* in halves, for a product takes no more rows at once */
            run(2 * first + count, count, y + count);
            for (int t = 0; t < num_tokens; ++t) {
                float pairs[2 * COLUMNS_AT_ONCE];
                memcpy(pairs, y + t * stride, sizeof(float) * 2 * count);
                for (int r = 0; r < count; ++r)
                    y[t * stride + r] = pairs[2 * r], y[t * stride + half + r] = pairs[2 * r + 1];
            }
        } else {
            run(first, count, y);
            if (activation.gate == CONCATENATED) run(hidden.num_features + first, count, y + half);
        }
        for (int t = 0; t < num_tokens; ++t) {
            const float *gate = y + t * stride, *up = gate + half;
            float *to = (float *)(hidden.data + (segment.hidden_row + t) * hidden.stride) + first;
            for (int r = 0; r < count; r += S::LANES)
                if (const int num = least(S::LANES, count - r); num == S::LANES)
                    S::store(to + r, activate<S>(activation, S::load(gate + r), S::load(up + r)));
                else {
                    const auto g = load_part<S>(gate + r, num), u = load_part<S>(up + r, num);
                    store_part<S>(to + r, activate<S>(activation, g, u), num);
                }
        }
    }

    static void down(const Segment &segment, const Rows &hidden, float *outputs, int64_t out_stride, int first,
                     int count, char *scratch) {
        const int stride = round_up(count, 16);
        const float *x[TOKENS_AT_ONCE];
        for (int t = 0; t < segment.count; ++t) x[t] = row_of(hidden, segment.hidden_row + t);
        float *y = (float *)scratch;
        product<S>(segment.expert->down, segment.record, first, count, hidden, x, segment.count, segment.total, y,
                      stride, y + TOKENS_AT_ONCE * stride);
        for (int t = 0; t < segment.count; ++t)
            memcpy(outputs + segment.places[t] * out_stride + first, y + t * stride, sizeof(float) * count);
    }

    static void down_token(const Segment *segments, int num_experts, const float *weights, const Rows &hidden,
                           void *out, int format, int first, int count, char *scratch) {
        const int stride = round_up(count, 16);
        float *y = (float *)scratch, *total = y + num_experts * stride;
        for (int e = 0; e < num_experts; ++e) {
            const float *x = row_of(hidden, segments[e].hidden_row);
            product<S>(segments[e].expert->down, segments[e].record, first, count, hidden, &x, 1, 1,
                          y + e * stride, stride, total);
        }
        weigh(y, stride, weights, num_experts, count, total);
        store_row<S>(total, out, first, count, format);
    }
    static void weigh(const float *y, int64_t stride, const float *weights, int top_k, int count, float *total) {
        for (int r = 0; r < count; ++r) total[r] = weights[0] * y[r];
        for (int e = 1; e < top_k; ++e)
            for (int r = 0; r < count; ++r) total[r] += weights[e] * y[e * stride + r];
    }
    static void combine(const float *outputs, const float *weights, int top_k, int num_features, void *out,
                        int format) {
        float total[256];
        for (int first = 0; first < num_features; first += 256) {
            const int count = least(256, num_features - first);
            weigh(outputs + first, num_features, weights, top_k, count, total);
            store_row<S>(total, out, first, count, format);
        }
    }

    static void linear(const Matrix &m, const char *record, const Rows &input, int num_tokens, void *out, int format,
                       int first, int count, char *scratch) {
        const int stride = round_up(count, 16);
        float *y = (float *)scratch;
        for (int t = 0; t < num_tokens; t += TOKENS_AT_ONCE) {
            const int now = least(TOKENS_AT_ONCE, num_tokens - t);
            const float *x[TOKENS_AT_ONCE];
            for (int i = 0; i < now; ++i) x[i] = row_of(input, t + i);
            product<S>(m, record, first, count, input, x, now, num_tokens, y, stride,
                          y + TOKENS_AT_ONCE * stride);
            for (int i = 0; i < now; ++i)
                store_row<S>(y + i * stride, out, (int64_t)(t + i) * m.num_rows + first, count, format);
        }
    }

    /* torch's order of a sum along a row, in vectors of sum_lanes: four chains, each cascaded every 2^power steps. */
    static void add_row(const float *x, int lanes, int count, float *total) {
        float chains[4][4][16] = {}; /* level, chain, lane */
        const int steps = count / 4;
        int power = 0;
        while ((1 << power) < steps) ++power;
        power = power / 4 > 4 ? power / 4 : 4;
        int i = 0;
        const int length = 1 << power, mask = length - 1;
        for (; i + length <= steps;) {
            for (int j = 0; j < length; ++j, ++i)
                for (int c = 0; c < 4; ++c)
                    for (int l = 0; l < lanes; ++l) chains[0][c][l] += x[(i * 4 + c) * lanes + l];
            for (int level = 1; level < 4; ++level) {
                for (int c = 0; c < 4; ++c)
                    for (int l = 0; l < lanes; ++l)
                        chains[level][c][l] += chains[level - 1][c][l], chains[level - 1][c][l] = 0;
                if (i & (mask << (level * power))) break;
            }
        }
        for (; i < steps; ++i)
            for (int c = 0; c < 4; ++c)
                for (int l = 0; l < lanes; ++l) chains[0][c][l] += x[(i * 4 + c) * lanes + l];
        for (int level = 1; level < 4; ++level)
            for (int c = 0; c < 4; ++c)
                for (int l = 0; l < lanes; ++l) chains[0][c][l] += chains[level][c][l];
        for (int n = steps * 4; n < count; ++n)
            for (int l = 0; l < lanes; ++l) chains[0][0][l] += x[n * lanes + l];
        for (int c = 1; c < 4; ++c)
            for (int l = 0; l < lanes; ++l) chains[0][0][l] += chains[0][c][l];
        memcpy(total, chains[0][0], sizeof(float) * lanes);
    }
    static void rms_norm(const void *x, const void *weight, float eps, int count, void *out, int format,
                         int sum_lanes, char *scratch) {
        float *values = (float *)scratch, *squares = values + round_up(count, 16), *scales = squares + round_up(count, 16);
        load_row<S>(x, format, count, values);
        load_row<S>(weight, format, count, scales);
        for (int i = 0; i < count; ++i) squares[i] = values[i] * values[i];
        float lanes[16], total = 0;
        const int whole = count / sum_lanes;
        add_row(squares, sum_lanes, whole, lanes);
        for (int i = whole * sum_lanes; i < count; ++i) total += squares[i];
        for (int l = 0; l < sum_lanes; ++l) total += lanes[l];
        const float factor = 1 / sqrtf(total / count + eps);
        for (int i = 0; i < count; ++i) values[i] *= factor;
        if (format != FLOAT32) { /* rounded, then multiplied, then rounded */
            store_row<S>(values, squares, 0, count, format);
            load_row<S>(squares, format, count, values);
        }
        for (int i = 0; i < count; ++i) values[i] *= scales[i];
        store_row<S>(values, out, 0, count, format);
    }
};

template <class S> constexpr Arithmetic arithmetic(const char *name) {
    using A = Steps<S>;
    return {name, S::LANES, A::convert, A::prepare, A::hidden, A::down, A::down_token, A::combine,
            A::linear, A::rms_norm};
}
