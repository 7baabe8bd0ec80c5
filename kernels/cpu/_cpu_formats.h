/* Rows of floats and of codes in registers: loads, stores and what a code stands for. Included by _cpu_kernels.h. */

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
        else S::store_first(to, p, count);
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
