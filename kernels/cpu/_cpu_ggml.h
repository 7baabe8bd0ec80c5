/* The block formats of GGML, whose values quantization/ggml_values.py specifies: a block of 32 or 256 codes of a row has
 * its scales and minima with it. Included by _cpu_kernels.h.
 *
 * The products of the codes that share a scale are summed in lanes, then scaled. The minimum of a block of 32 is taken off
 * every lane by the sum of that lane's own activations; of those of a block of 256 each lane takes one or more, by the
 * sums of their groups. Blocks of a row follow one another in one chain.
 */

constexpr int PART = 32; /* values that are unpacked together */

inline float e8m0_half(uint8_t exponent) { /* half of 2^(exponent - 127) */
    const uint32_t bits = exponent < 2 ? 0x200000u << exponent : (uint32_t)(exponent - 1) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
template <class Word = uint32_t> inline Word load_word(const uint8_t *p) {
    Word word;
    memcpy(&word, p, sizeof word);
    return word;
}
/* Of eight bytes in a word: the same byte eight times, and 32 less for bytes below 64. */
constexpr uint64_t eight(uint8_t byte) { return 0x0101010101010101u * byte; }
inline uint64_t less_32(uint64_t bytes) { return ((bytes | eight(128)) - eight(32)) ^ eight(128); }
template <class S> inline float half_at(const uint8_t *p) {
    Float16 half;
    memcpy(&half, p, 2);
    return S::value(&half);
}

/* Codes that E2M1 stands for, doubled, and those of IQ4. */
constexpr int8_t E2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int8_t IQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* Whole scales and minima of the groups of a block, at most 16 of either, and the units that they count. */
struct Grid {
    alignas(16) int8_t scales[16], minima[16];
    float unit, unit_of_minima;
};

/* What every format of blocks says: VALUES and BYTES of a block, GROUP: values that share a scale. `bytes` are the codes
 * of part i of 4 of a half of a block, `floats` the same as floats, `words` as words. */
template <class S, class F, int VALUES_, int BYTES_, int GROUP_, bool HAS_MINIMA_> struct Blocks {
    static constexpr int VALUES = VALUES_, BYTES = BYTES_, GROUP = GROUP_;
    static constexpr bool HAS_MINIMA = HAS_MINIMA_;
    static constexpr int64_t AHEAD = 2048 * BYTES / VALUES; /* of prefetches */
    static void floats(const uint8_t *p, int half, int i, typename S::V (&v)[PART / S::LANES]) { S::widen(F::bytes(p, half, i), v); }
    static auto words(const uint8_t *p, int half, int i) { return S::words(F::bytes(p, half, i)); }
};
/* Blocks of 32: `scale`, and `minimum`, which is added. */
template <class S, class F, int BYTES, bool HAS_MINIMA> using Small = Blocks<S, F, 32, BYTES, 32, HAS_MINIMA>;
/* Of these, codes of four bits. */
template <class S, class F, int BYTES, int AT> struct Nibbles : Small<S, F, BYTES, true> {
    static void floats(const uint8_t *p, int, int, typename S::V (&v)[PART / S::LANES]) { S::nibbles(p + AT, v); }
    static auto words(const uint8_t *p, int, int) { return S::words4(p + AT); }
    static float scale(const uint8_t *p) { return half_at<S>(p); }
};
template <class S> struct Q4_0 : Nibbles<S, Q4_0<S>, 18, 2> {
    static float minimum(const uint8_t *p) { return -8 * half_at<S>(p); }
};
template <class S> struct Q4_1 : Nibbles<S, Q4_1<S>, 20, 4> {
    static float minimum(const uint8_t *p) { return half_at<S>(p + 2); }
};
template <class S> struct Q5_0 : Small<S, Q5_0<S>, 22, false> {
    static auto bytes(const uint8_t *p, int, int) { return S::minus(S::either(S::pairs(p + 6), S::bits(p + 2, 16)), 16); }
    static float scale(const uint8_t *p) { return half_at<S>(p); }
};
template <class S> struct Q5_1 : Small<S, Q5_1<S>, 24, true> {
    static auto bytes(const uint8_t *p, int, int) { return S::either(S::pairs(p + 8), S::bits(p + 4, 16)); }
    static float scale(const uint8_t *p) { return half_at<S>(p); }
    static float minimum(const uint8_t *p) { return half_at<S>(p + 2); }
};
template <class S> struct Q8_0 : Small<S, Q8_0<S>, 34, false> {
    static void floats(const uint8_t *p, int, int, typename S::V (&v)[PART / S::LANES]) {
        UNROLL for (int i = 0; i < PART / S::LANES; ++i) v[i] = S::load((const int8_t *)p + 2 + i * S::LANES);
    }
    static auto words(const uint8_t *p, int, int) { return S::words8(p + 2); }
    static float scale(const uint8_t *p) { return half_at<S>(p); }
};
template <class S> struct Iq4Nl : Small<S, Iq4Nl<S>, 18, false> {
    static auto bytes(const uint8_t *p, int, int) { return S::look_up(IQ4, S::pairs(p + 2)); }
    static float scale(const uint8_t *p) { return half_at<S>(p); }
};
template <class S> struct GgmlMxfp4 : Small<S, GgmlMxfp4<S>, 17, false> {
    static auto bytes(const uint8_t *p, int, int) { return S::look_up(E2M1, S::pairs(p + 1)); }
    static float scale(const uint8_t *p) { return e8m0_half(p[0]); }
};

/* Blocks of 256: `grid`. */
template <class S> struct Q2K : Blocks<S, Q2K<S>, 256, 84, 16, true> {
    static auto bytes(const uint8_t *p, int half, int i) {
        return S::moved(S::bytes_at(p + 16 + 32 * half), -2 * i, 3);
    }
    static void grid(const uint8_t *p, Grid &grid) {
        for (int i = 0; i < 16; i += 8) {
            const uint64_t both = load_word<uint64_t>(p + i), scales = both & eight(15), minima = both >> 4 & eight(15);
            memcpy(grid.scales + i, &scales, 8), memcpy(grid.minima + i, &minima, 8);
        }
        grid.unit = half_at<S>(p + 80), grid.unit_of_minima = -half_at<S>(p + 82);
    }
};
template <class S> struct Q3K : Blocks<S, Q3K<S>, 256, 110, 16, false> {
    static auto bytes(const uint8_t *p, int half, int i) {
        const auto low = S::moved(S::bytes_at(p + 32 + 32 * half), -2 * i, 3);
        const auto bits = S::bytes_at(p);
        return S::minus(S::either(low, half ? S::moved(bits, -2 - i, 4) : S::moved(bits, 2 - i, 4)), 4);
    }
    static void grid(const uint8_t *p, Grid &grid) {
        const uint64_t low = load_word<uint64_t>(p + 96), high = load_word(p + 104);
        for (int i = 0; i < 2; ++i) { /* of eight scales each: nibbles of one word, and pairs of bits of another */
            const uint64_t pairs = (high >> 4 * i | high >> (4 * i + 2) << 32) & eight(3);
            const uint64_t scales = less_32((low >> 4 * i & eight(15)) | pairs << 4);
            memcpy(grid.scales + 8 * i, &scales, 8);
        }
        grid.unit = half_at<S>(p + 108);
    }
};
/* Eight scales and minima of six bits in twelve bytes. */
template <class S> inline void grid_of_six_bits(const uint8_t *p, Grid &grid) {
    const uint32_t low = load_word(p + 4), middle = load_word(p + 8), both = load_word(p + 12);
    const uint32_t six = 0x3f3f3f3fu, four = 0x0f0f0f0fu, two = 0x30303030u;
    const uint64_t scales = (low & six) | (uint64_t)((both & four) | (low >> 2 & two)) << 32;
    const uint64_t minima = (middle & six) | (uint64_t)((both >> 4 & four) | (middle >> 2 & two)) << 32;
    memcpy(grid.scales, &scales, 8), memcpy(grid.minima, &minima, 8);
    memset(grid.scales + 8, 0, 8), memset(grid.minima + 8, 0, 8);
    grid.unit = half_at<S>(p), grid.unit_of_minima = -half_at<S>(p + 2);
}
template <class S> struct Q4K : Blocks<S, Q4K<S>, 256, 144, 32, true> {
    static void floats(const uint8_t *p, int half, int i, typename S::V (&v)[PART / S::LANES]) {
        S::nibbles(p + 16 + 64 * half + i / 2 * 32, i % 2, v);
    }
    static auto words(const uint8_t *p, int half, int i) { return S::words4(p + 16 + 64 * half + i / 2 * 32, i % 2); }
    static void grid(const uint8_t *p, Grid &grid) { grid_of_six_bits<S>(p, grid); }
};
template <class S> struct Q5K : Blocks<S, Q5K<S>, 256, 176, 32, true> {
    static auto bytes(const uint8_t *p, int half, int i) {
        const auto low = S::moved(S::bytes_at(p + 48 + 64 * half + i / 2 * 32), i % 2 ? -4 : 0, 15);
        const auto bits = S::bytes_at(p + 16);
        return S::either(low, half ? S::moved(bits, -i, 16) : S::moved(bits, 4 - i, 16));
    }
    static void grid(const uint8_t *p, Grid &grid) { grid_of_six_bits<S>(p, grid); }
};
template <class S> struct Q6K : Blocks<S, Q6K<S>, 256, 210, 16, false> {
    static auto bytes(const uint8_t *p, int half, int i) {
        const auto low = S::moved(S::bytes_at(p + 64 * half + i % 2 * 32), i / 2 ? -4 : 0, 15);
        return S::minus(S::either(low, S::moved(S::bytes_at(p + 128 + 32 * half), 4 - 2 * i, 48)), 32);
    }
    static void grid(const uint8_t *p, Grid &grid) {
        memcpy(grid.scales, p + 192, 16);
        grid.unit = half_at<S>(p + 208);
    }
};
template <class S> struct Iq4Xs : Blocks<S, Iq4Xs<S>, 256, 136, 32, false> {
    static auto bytes(const uint8_t *p, int half, int i) { return S::look_up(IQ4, S::pairs(p + 8 + 64 * half + 16 * i)); }
    static void grid(const uint8_t *p, Grid &grid) {
        uint64_t low = load_word(p + 4), high = p[2] | (uint64_t)p[3] << 32; /* nibbles and pairs of bits, spread out */
        low = (low | low << 16) & 0x0000ffff0000ffffu, low = (low | low << 8) & 0x00ff00ff00ff00ffu;
        low = (low | low << 4) & eight(15);
        high = (high | high << 12) & 0x000f000f000f000fu, high = (high | high << 6) & eight(3);
        const uint64_t scales = less_32(low | high << 4);
        memcpy(grid.scales, &scales, 8), memset(grid.scales + 8, 0, 8);
        grid.unit = half_at<S>(p);
    }
};

/* The scales of a block's groups as floats, and what is added to their values. */
template <class S, class F> struct Scales {
    static constexpr int COUNT = F::VALUES / F::GROUP;
    alignas(64) float scales[COUNT == 1 ? 1 : 16], minima[COUNT == 1 ? 1 : 16];

    void set(const uint8_t *p) {
        if constexpr (COUNT == 1) {
            scales[0] = F::scale(p);
            if constexpr (F::HAS_MINIMA) minima[0] = F::minimum(p);
        } else {
            Grid grid;
            F::grid(p, grid);
            times(grid.scales, grid.unit, scales);
            if constexpr (F::HAS_MINIMA) times(grid.minima, grid.unit_of_minima, minima);
        }
    }
    static void times(const int8_t *from, float unit, float *to) {
        for (int i = 0; i < COUNT; i += S::LANES) S::store(to + i, S::mul(S::load(from + i), S::all(unit)));
    }
};
/* The same for rounded activations: groups of 16 have whole scales, each twice in a word, and one unit. */
template <class S, class F> struct WholeScales {
    static constexpr int COUNT = F::VALUES / F::GROUP;
    alignas(64) int32_t scales[COUNT];
    alignas(64) float minima[16];
    float unit;

    void set(const uint8_t *p) {
        Grid grid;
        F::grid(p, grid);
        for (int i = 0; i < COUNT; ++i) {
            const uint32_t scale = (uint32_t)grid.scales[i] & 0xffffu;
            scales[i] = (int32_t)(scale << 16 | scale);
        }
        unit = grid.unit;
        if constexpr (F::HAS_MINIMA) Scales<S, F>::times(grid.minima, grid.unit_of_minima, minima);
    }
};

/* Adds the minima of a block of a row, times sums of T tokens' activations. */
template <class S, class F, int T, class By>
inline void add_minima(const By &by, int64_t block, int64_t sums_at, const float *const *x, typename S::V (&sums)[T]) {
    if constexpr (F::VALUES == PART) {
        const auto minimum = S::all(by.minima[0]);
        UNROLL for (int t = 0; t < T; ++t)
            sums[t] = S::fma(minimum, S::load(x[t] + sums_at + block * S::LANES), sums[t]);
    } else
        UNROLL for (int i = 0; i < By::COUNT; i += S::LANES) {
            const auto minima = S::load(by.minima + i);
            UNROLL for (int t = 0; t < T; ++t)
                sums[t] = S::fma(minima, S::load(x[t] + sums_at + block * SUMS_OF_256 + i), sums[t]);
        }
}

/* One half of a block of a row and T tokens, of which values `k` and on meet it; a part is of the half. */
template <class S, class F, int T> struct Meeting {
    using V = typename S::V;
    static constexpr int VECTORS = PART / S::LANES, GROUPS = PART / F::GROUP, OF_GROUP = VECTORS / GROUPS;
    const uint8_t *block;
    int half;
    int64_t k;
    const float *const *x;
    const Rows &input;

    void add(int part, const Scales<S, F> &by, V (&sums)[T]) const {
        V v[VECTORS];
        F::floats(block, half, part, v);
        UNROLL for (int g = 0; g < GROUPS; ++g) {
            const V scale = S::all(by.scales[(4 * half + part) * GROUPS + g]);
            UNROLL for (int t = 0; t < T; ++t) {
                const float *from = x[t] + k + part * PART + g * F::GROUP;
                V inner = S::mul(v[g * OF_GROUP], S::load(from));
                UNROLL for (int i = 1; i < OF_GROUP; ++i)
                    inner = S::fma(v[g * OF_GROUP + i], S::load(from + i * S::LANES), inner);
                sums[t] = S::fma(scale, inner, sums[t]);
            }
        }
    }
    const int16_t *rounded(int t, int part) const {
        return (const int16_t *)((const char *)x[t] + input.codes) + k + part * PART;
    }
    float delta(int t, int part) const { return x[t][input.deltas / 4 + (k + part * PART) / ROUNDED_TOGETHER]; }
    /* Rounded activations and groups of 32: scaled, then by the activations' own scale, of four parts in `inner`. */
    void add_rounded(int part, const Scales<S, F> &by, V (&inner)[T], V (&sums)[T]) const {
        const auto words = F::words(block, half, part);
        constexpr int parts = F::VALUES / PART;
        UNROLL for (int t = 0; t < T; ++t) {
            const V whole = S::to_float(S::dot(S::none(), words, rounded(t, part)));
            if constexpr (parts == 1) sums[t] = S::fma(whole, S::all(by.scales[0] * delta(t, part)), sums[t]);
            else {
                const V scale = S::all(by.scales[4 * half + part]);
                inner[t] = part ? S::fma(whole, scale, inner[t]) : S::mul(whole, scale);
                if (part == 3) sums[t] = S::fma(inner[t], S::all(delta(t, part)), sums[t]);
            }
        }
    }
    /* Rounded activations and groups of 16: scaled as whole numbers, of which two parts fit into 32 bits. */
    void add_rounded_pair(int part, const WholeScales<S, F> &by, V (&sums)[T]) const {
        typename S::I whole[T];
        UNROLL for (int t = 0; t < T; ++t) whole[t] = S::none();
        UNROLL for (int i = part; i < part + 2; ++i) {
            const auto words = S::scaled(F::words(block, half, i), by.scales[8 * half + 2 * i], by.scales[8 * half + 2 * i + 1]);
            UNROLL for (int t = 0; t < T; ++t) whole[t] = S::dot_scaled(whole[t], words, rounded(t, i));
        }
        UNROLL for (int t = 0; t < T; ++t)
            sums[t] = S::fma(S::to_float(whole[t]), S::all(by.unit * delta(t, part)), sums[t]);
    }
};

template <class S, class F, bool IS_ROUNDED, int R, int T>
__attribute__((noinline)) void tile_blocks(const Matrix &m, const char *record, const Side &side, const Rows &input,
                                           const float *const *x, float *y, int stride) {
    using V = typename S::V;
    constexpr bool is_whole = IS_ROUNDED && F::GROUP == 16;
    constexpr int halves = F::VALUES > PART ? 2 : 1, parts = F::VALUES / PART / halves;
    constexpr int together = parts > 1 ? 2 : 1; /* parts that often share bytes */
    const int num_blocks = m.in_features / F::VALUES;
    const int64_t row_bytes = (int64_t)num_blocks * F::BYTES;
    constexpr int slot = F::VALUES == PART ? 0 : F::GROUP == 16 ? WHOLE_SUMS : WHOLE_SUMS + 1;
    const int64_t sums_at = input.sums[slot] / 4;
    const uint8_t *w[R];
    V sums[R][T], inner[R][T];
    typename std::conditional<is_whole, WholeScales<S, F>, Scales<S, F>>::type by[R];
    UNROLL for (int r = 0; r < R; ++r) {
        w[r] = (const uint8_t *)record + m.codes + (side.row + r * side.step) * row_bytes;
        UNROLL for (int t = 0; t < T; ++t) sums[r][t] = S::zero();
    }
    for (int block = 0; block < num_blocks; ++block) {
        const int64_t at = (int64_t)block * F::BYTES, ahead = ahead_of<R, F::AHEAD>(side, at, row_bytes);
        UNROLL for (int line = 0; line < F::BYTES; line += 64)
            UNROLL for (int r = 0; r < R; ++r) S::prefetch(w[r] + ahead + line);
        UNROLL for (int r = 0; r < R; ++r) {
            by[r].set(w[r] + at);
            if constexpr (F::HAS_MINIMA) add_minima<S, F, T>(by[r], block, sums_at, x, sums[r]);
        }
        for (int half = 0; half < halves; ++half) {
            const int64_t k = (int64_t)block * F::VALUES + half * (F::VALUES / 2);
            const auto add = [&](int part, int r) {
                const Meeting<S, F, T> meeting{w[r] + at, half, k, x, input};
                if constexpr (is_whole) meeting.add_rounded_pair(part, by[r], sums[r]);
                else
                    UNROLL for (int i = part; i < part + together; ++i)
                        if constexpr (IS_ROUNDED) meeting.add_rounded(i, by[r], inner[r], sums[r]);
                        else meeting.add(i, by[r], sums[r]);
            };
            if constexpr (S::LANES > 4) {
                UNROLL for (int part = 0; part < parts; part += together)
                    UNROLL for (int r = 0; r < R; ++r) add(part, r);
            } else /* loops of its own within */
                for (int part = 0; part < parts; part += together)
                    for (int r = 0; r < R; ++r) add(part, r);
        }
    }
    UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int r = 0; r < R; ++r) y[t * stride + r * side.step] = S::sum(sums[r][t]);
}

template <class S, class F, bool IS_ROUNDED> struct BlockTile {
    template <int R, int T>
    static void run(const Matrix &m, const char *record, const Side &side, const Rows &input, const float *const *x,
                    float *y, int stride) {
        if constexpr (R == 2) { /* as few functions as serve */
            run<1, T>(m, record, {side.row, 1, 0}, input, x, y, stride);
            run<1, T>(m, record, {side.row + side.step, 1, 0}, input, x, y + side.step, stride);
        } else if constexpr (T == 3) {
            run<R, 2>(m, record, side, input, x, y, stride);
            run<R, 1>(m, record, side, input, x + 2, y + 2 * stride, stride);
        } else tile_blocks<S, F, IS_ROUNDED, R, T>(m, record, side, input, x, y, stride);
    }
};

/* The bits of ggml_values.py, but for the sign of zero. */
template <class S, class F> struct BlockUnpack {
    static void run(const Matrix &m, const char *record, int64_t row, int k, int count, float *to) {
        using V = typename S::V;
        constexpr int vectors = PART / S::LANES, of_group = F::GROUP / S::LANES;
        const uint8_t *p = (const uint8_t *)record + m.codes + (row * m.in_features + k) / F::VALUES * F::BYTES;
        Scales<S, F> by;
        for (const float *end = to + count; to < end; p += F::BYTES) {
            by.set(p);
            for (int part = 0; part < F::VALUES / PART; ++part, to += PART) {
                V v[vectors];
                F::floats(p, part / 4, part % 4, v);
                UNROLL for (int i = 0; i < vectors; ++i) {
                    const int group = part * (PART / F::GROUP) + i / of_group;
                    const V scaled = S::mul(v[i], S::all(by.scales[group]));
                    S::store(to + i * S::LANES, F::HAS_MINIMA ? S::add(scaled, S::all(by.minima[group])) : scaled);
                }
            }
        }
    }
};
