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
/* One or four halves times a number, of which each follows the other after so many bytes. */
template <class S, int BYTES, int COUNT> inline void halves_at(const uint8_t *p, float unit, float *to) {
    if constexpr (COUNT == 1) to[0] = unit * half_at<S>(p);
    else S::template four_halves<BYTES>(p, unit, to);
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
 * of part i of 4 of a half of a block, `floats` the same as floats, `words` as words, in which 1 is 1 / UNIT: split where
 * IS_SPLIT says so. Codes that have minima are not negative; IS_SMALL says that they lie between -63 and 63. */
template <class S, class F, int VALUES_, int BYTES_, int GROUP_, bool HAS_MINIMA_> struct Blocks {
    static constexpr int VALUES = VALUES_, BYTES = BYTES_, GROUP = GROUP_;
    static constexpr bool HAS_MINIMA = HAS_MINIMA_;
    static constexpr int64_t AHEAD = 2048 * BYTES / VALUES; /* of prefetches */
    static void floats(const uint8_t *p, int half, int i, typename S::V (&v)[PART / S::LANES]) { S::widen(F::bytes(p, half, i), v); }
    static constexpr bool IS_SMALL = false, IS_SPLIT = S::HAS_SPLIT;
    static constexpr float UNIT = 1;
    static auto words(const uint8_t *p, int half, int i) {
        if constexpr (HAS_MINIMA) return S::split_unsigned(F::bytes(p, half, i));
        else if constexpr (F::IS_SMALL) return S::split_small(F::bytes(p, half, i));
        else return S::split(F::bytes(p, half, i));
    }
};
/* Blocks of 32: the `scales` of COUNT blocks that follow one another, times a number, and `minima`, which are added. */
template <class S, class F, int BYTES, bool HAS_MINIMA> struct OneScale : Blocks<S, F, 32, BYTES, 32, HAS_MINIMA> {
    template <int COUNT> static void scales(const uint8_t *p, float unit, float *to) {
        halves_at<S, BYTES, COUNT>(p, unit, to);
    }
    template <int COUNT> static void minima(const uint8_t *p, float *to) { halves_at<S, BYTES, COUNT>(p + 2, 1, to); }
};
template <class S> struct Q4_0 : OneScale<S, Q4_0<S>, 18, false> {
    static constexpr bool IS_SMALL = true;
    static constexpr float UNIT = S::SMALL_UNIT;
    static void floats(const uint8_t *p, int, int, typename S::V (&v)[PART / S::LANES]) {
        S::nibbles(p + 2, v);
        UNROLL for (int i = 0; i < PART / S::LANES; ++i) v[i] = S::sub(v[i], S::all(8));
    }
    static auto bytes(const uint8_t *p, int, int) { return S::minus(S::pairs(p + 2), 8); }
};
template <class S> struct Q4_1 : OneScale<S, Q4_1<S>, 20, true> {
    static constexpr bool IS_SPLIT = false;
    static void floats(const uint8_t *p, int, int, typename S::V (&v)[PART / S::LANES]) { S::nibbles(p + 4, v); }
    static auto words(const uint8_t *p, int, int) { return S::words4(p + 4); }
};
template <class S> struct Q5_0 : OneScale<S, Q5_0<S>, 22, false> {
    static constexpr bool IS_SMALL = true;
    static constexpr float UNIT = S::SMALL_UNIT;
    static auto bytes(const uint8_t *p, int, int) { return S::either(S::pairs(p + 6), S::no_bits(p + 2, 0xf0)); }
};
template <class S> struct Q5_1 : OneScale<S, Q5_1<S>, 24, true> {
    static constexpr bool IS_SPLIT = false; /* its minima meet sums of lanes */
    static auto bytes(const uint8_t *p, int, int) { return S::either(S::pairs(p + 8), S::bits(p + 4, 16)); }
    static auto words(const uint8_t *p, int half, int i) { return S::words(bytes(p, half, i)); }
};
template <class S> struct Q8_0 : OneScale<S, Q8_0<S>, 34, false> {
    static constexpr bool IS_SPLIT = false;
    static void floats(const uint8_t *p, int, int, typename S::V (&v)[PART / S::LANES]) {
        UNROLL for (int i = 0; i < PART / S::LANES; ++i) v[i] = S::load((const int8_t *)p + 2 + i * S::LANES);
    }
    static auto words(const uint8_t *p, int, int) { return S::words8(p + 2); }
};
template <class S> struct Iq4Nl : OneScale<S, Iq4Nl<S>, 18, false> {
    static auto bytes(const uint8_t *p, int, int) { return S::look_up(IQ4, S::pairs(p + 2)); }
};
template <class S> struct GgmlMxfp4 : OneScale<S, GgmlMxfp4<S>, 17, false> {
    static auto bytes(const uint8_t *p, int, int) { return S::look_up(E2M1, S::pairs(p + 1)); }
    template <int COUNT> static void scales(const uint8_t *p, float unit, float *to) {
        for (int i = 0; i < COUNT; ++i) to[i] = unit * e8m0_half(p[17 * i]);
    }
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
    static constexpr bool IS_SMALL = true;
    static constexpr float UNIT = S::SMALL_UNIT;
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
    const uint64_t first = load_word<uint64_t>(p + 4), both = load_word(p + 12); /* four scales and four minima in either */
    const uint64_t low = first & eight(63), high = (first >> 2 & eight(48)) | ((both | both << 28) & eight(15));
    const uint64_t scales = (low & 0xffffffffu) | high << 32, minima = low >> 32 | (high >> 32) << 32;
    memcpy(grid.scales, &scales, 8), memcpy(grid.minima, &minima, 8);
    memset(grid.scales + 8, 0, 8), memset(grid.minima + 8, 0, 8);
    grid.unit = half_at<S>(p), grid.unit_of_minima = -half_at<S>(p + 2);
}
template <class S> struct Q4K : Blocks<S, Q4K<S>, 256, 144, 32, true> {
    static constexpr bool IS_SPLIT = false;
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
    static constexpr bool IS_SMALL = true;
    static constexpr float UNIT = S::SMALL_UNIT;
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

/* Of a block of 256 or of up to STEP_BLOCKS blocks of 32: the scales of its groups as floats, and what is added to their
 * values. Rounded activations meet words. */
template <class S, class F, bool IS_ROUNDED> struct Scales {
    static constexpr bool IS_LARGE = F::VALUES > PART;
    static constexpr int STEP_BLOCKS = IS_LARGE ? 1 : 4, COUNT = IS_LARGE ? F::VALUES / F::GROUP : STEP_BLOCKS;
    static constexpr float UNIT = IS_ROUNDED ? F::UNIT : 1;
    alignas(64) float scales[16], minima[16];

    template <int BLOCKS> void set(const uint8_t *p) {
        if constexpr (IS_LARGE) {
            Grid grid;
            F::grid(p, grid);
            times(grid.scales, grid.unit * UNIT, scales);
            if constexpr (F::HAS_MINIMA) times(grid.minima, grid.unit_of_minima, minima);
        } else {
            F::template scales<BLOCKS>(p, UNIT, scales);
            if constexpr (F::HAS_MINIMA) F::template minima<BLOCKS>(p, minima);
        }
    }
    static void times(const int8_t *from, float unit, float *to) {
        for (int i = 0; i < COUNT; i += S::LANES) S::store(to + i, S::mul(S::load(from + i), S::all(unit)));
    }
};

/* Adds minima of a row, times sums of T tokens' activations: of block i of a step of which the first is `block`. */
template <class S, class F, int T, class By>
inline void add_minima(const By &by, int64_t block, int i, int64_t sums_at, const float *const *x, typename S::V (&sums)[T]) {
    if constexpr (By::IS_LARGE)
        UNROLL for (int k = 0; k < By::COUNT; k += S::LANES) {
            const auto minima = S::load(by.minima + k);
            UNROLL for (int t = 0; t < T; ++t)
                sums[t] = S::fma(minima, S::load(x[t] + sums_at + block * SUMS_OF_256 + k), sums[t]);
        }
    else {
        const auto minimum = S::all(by.minima[i]);
        UNROLL for (int t = 0; t < T; ++t)
            sums[t] = S::fma(minimum, S::load(x[t] + sums_at + (block + i) * S::LANES), sums[t]);
    }
}

/* 128 values of a row, from `k`, and T tokens: one half of a block of 256, or up to four blocks of 32. */
template <class S, class F, bool IS_ROUNDED, int T> struct Meeting {
    using V = typename S::V;
    using By = Scales<S, F, IS_ROUNDED>;
    static constexpr int VECTORS = PART / S::LANES, GROUPS = PART / F::GROUP, OF_GROUP = VECTORS / GROUPS;
    const uint8_t *block;
    int half;
    int64_t k;
    const float *const *x;
    const Rows &input;

    const uint8_t *block_of(int part) const { return By::IS_LARGE ? block : block + part * F::BYTES; }
    void add(int part, const By &by, V (&sums)[T]) const {
        V v[VECTORS];
        F::floats(block_of(part), half, part, v);
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
    /* Rounded activations: whole sums, scaled, of all parts in `inner`, then by the activations' own scale. */
    void add_rounded(int part, bool is_last, const By &by, V (&inner)[T], V (&sums)[T]) const {
        const auto words = F::words(block_of(part), half, part);
        const float *scales = by.scales + (4 * half + part) * GROUPS;
        const V scale = GROUPS == 2 ? S::two(scales[0], scales[1]) : S::all(scales[0]);
        UNROLL for (int t = 0; t < T; ++t) {
            const int64_t codes_at = F::IS_SPLIT ? input.split : input.codes;
            const auto codes = (const int16_t *)((const char *)x[t] + codes_at) + k + part * PART;
            const V whole = S::to_float(S::dot(S::none(), words, codes));
            inner[t] = part ? S::fma(whole, scale, inner[t]) : S::mul(whole, scale);
            if (is_last) sums[t] = S::fma(inner[t], S::all(x[t][input.deltas / 4 + k / ROUNDED_TOGETHER]), sums[t]);
        }
    }
};

template <class S, class F, bool IS_ROUNDED, int R, int T>
__attribute__((noinline)) void tile_blocks(const Matrix &m, const char *record, const Side &side, const Rows &input,
                                           const float *const *x, float *y, int stride) {
    using V = typename S::V;
    using By = Scales<S, F, IS_ROUNDED>;
    constexpr int halves = By::IS_LARGE ? 2 : 1, together = By::IS_LARGE ? 2 : 1; /* parts that often share bytes */
    const int num_blocks = m.in_features / F::VALUES;
    const int64_t row_bytes = (int64_t)num_blocks * F::BYTES;
    constexpr int slot = !By::IS_LARGE ? 0 : F::GROUP == 16 ? WHOLE_SUMS : WHOLE_SUMS + 1;
    const int64_t sums_at = input.sums[slot] / 4;
    const uint8_t *w[R];
    V sums[R][T], inner[R][T];
    By by[R];
    UNROLL for (int r = 0; r < R; ++r) {
        w[r] = (const uint8_t *)record + m.codes + (side.row + r * side.step) * row_bytes;
        UNROLL for (int t = 0; t < T; ++t) sums[r][t] = S::zero();
    }
    const auto step = [&](int block, auto count) {
        constexpr int blocks = decltype(count)::value, parts = By::IS_LARGE ? 4 : blocks;
        const int64_t at = (int64_t)block * F::BYTES, ahead = ahead_of<R, F::AHEAD>(side, at, row_bytes);
        UNROLL for (int line = 0; line < blocks * F::BYTES; line += 64)
            UNROLL for (int r = 0; r < R; ++r) S::prefetch(w[r] + ahead + line);
        UNROLL for (int r = 0; r < R; ++r) {
            by[r].template set<blocks>(w[r] + at);
            if constexpr (F::HAS_MINIMA && By::IS_LARGE) add_minima<S, F, T>(by[r], block, 0, sums_at, x, sums[r]);
        }
        for (int half = 0; half < halves; ++half) {
            const int64_t k = (int64_t)block * F::VALUES + half * 128;
            const auto add = [&](int part, int r) {
                const Meeting<S, F, IS_ROUNDED, T> meeting{w[r] + at, half, k, x, input};
                UNROLL for (int i = part; i < part + together; ++i) {
                    if constexpr (F::HAS_MINIMA && !By::IS_LARGE)
                        add_minima<S, F, T>(by[r], block, i, sums_at, x, sums[r]);
                    if constexpr (IS_ROUNDED) meeting.add_rounded(i, i == parts - 1, by[r], inner[r], sums[r]);
                    else meeting.add(i, by[r], sums[r]);
                }
            };
            if constexpr (S::LANES > 4) {
                UNROLL for (int part = 0; part < parts; part += together)
                    UNROLL for (int r = 0; r < R; ++r) add(part, r);
            } else /* loops of its own within */
                for (int part = 0; part < parts; part += together)
                    for (int r = 0; r < R; ++r) add(part, r);
        }
    };
    int block = 0;
    for (; block + By::STEP_BLOCKS <= num_blocks; block += By::STEP_BLOCKS)
        step(block, std::integral_constant<int, By::STEP_BLOCKS>());
    if constexpr (!By::IS_LARGE)
        for (; block < num_blocks; ++block) step(block, std::integral_constant<int, 1>());
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
        Scales<S, F, false> by;
        for (const float *end = to + count; to < end; p += F::BYTES) {
            by.template set<1>(p);
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
