/* Any processor: loops over 4 floats that the compiler turns into its own vectors. Included in an unnamed namespace. */

struct Portable {
    static constexpr int LANES = 4, MANY_ROWS = 2, MANY_TOKENS = 4;
    typedef float V __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));
    struct Bytes {
        int8_t v[32];
    };
    using Words = Bytes;
    static constexpr bool HAS_SPLIT = false;

    static V zero() { return V{}; }
    static V all(float x) { return V{x, x, x, x}; }
    static V load(const float *p) {
        V v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(float *p, V v) { memcpy(p, &v, sizeof v); }
    static V add(V a, V b) { return a + b; }
    static V sub(V a, V b) { return a - b; }
    static V mul(V a, V b) { return a * b; }
    static V div(V a, V b) { return a / b; }
    static V fma(V a, V b, V c) {
#ifdef __FP_FAST_FMAF
        for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
        return c;
#else
        return c + a * b;
#endif
    }
    static V at_most(V x, V limit) { /* NaN stays NaN */
        for (int i = 0; i < LANES; ++i) x[i] = x[i] > limit[i] ? limit[i] : x[i];
        return x;
    }
    static V at_least(V x, V limit) {
        for (int i = 0; i < LANES; ++i) x[i] = x[i] < limit[i] ? limit[i] : x[i];
        return x;
    }
    static V absolute(V x) {
        for (int i = 0; i < LANES; ++i) x[i] = __builtin_fabsf(x[i]);
        return x;
    }
    static V round(V x) { /* of numbers under 2^22 */
        const V magic = all(12582912.0f);
        return (x + magic) - magic;
    }
    static V power_of_two(V n) {
        V power;
        for (int i = 0; i < LANES; ++i) power[i] = float_of((uint32_t)((int32_t)n[i] + 127) << 23);
        return power;
    }
    static float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
    static void sums(const V (&v)[4], float *to) {
        for (int i = 0; i < 4; ++i) to[i] = sum(v[i]);
    }
    static void prefetch(const void *p) { __builtin_prefetch(p); }

    static float float_of(uint32_t bits) {
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    static uint32_t bits_of(float value) {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        return bits;
    }
    static float number(BFloat16 x) { return float_of((uint32_t)x.bits << 16); }
    static float number(int8_t x) { return x; }
    static float number(Float16 x) {
        const uint32_t magnitude = x.bits & 0x7fffu, sign = (uint32_t)(x.bits & 0x8000u) << 16;
        const float small = (float)(int32_t)magnitude * 0x1p-24f;
        const float large = float_of((magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u));
        return float_of(bits_of(magnitude < 0x400u ? small : large) | sign);
    }
    static float number(Float8 x) { /* 256 times too small, as the others have it */
        const uint16_t magnitude = x.bits & 0x7f, sign = (uint16_t)((x.bits & 0x80) << 8);
        return number(Float16{(uint16_t)(sign | (magnitude == 0x7f ? 0x7fff : magnitude << 7))});
    }
    template <class T> static V load(const T *p) {
        V v;
        for (int i = 0; i < LANES; ++i) v[i] = number(p[i]);
        return v;
    }
    static float value(const Float16 *p) { return number(*p); }
    static void store_first(float *to, const Float16 *p, int count) {
        for (int i = 0; i < count; ++i) to[i] = value(p + i);
    }

    static void widen(const Bytes &b, V (&v)[8]) {
        for (int i = 0; i < 32; ++i) v[i / LANES][i % LANES] = b.v[i];
    }
    using Exponents = uint32_t; /* the top */
    static Exponents exponents(int top) { return top; }
    static V put(V v, int lane, uint32_t bits) { /* in no lane where there is no such lane */
        if (lane >= 0 && lane < LANES) v[lane] = float_of(bits_of(v[lane]) | bits);
        return v;
    }
    static void lossless(const uint8_t *p, Exponents top, V (&v)[16]) {
        uint8_t codes[64];
        uint16_t halves[64];
        for (int i = 0; i < 32; ++i) codes[i] = p[64 + i] & 15;
        for (int i = 0; i < 32; ++i) codes[32 + i] = p[64 + i] >> 4;
        for (int i = 0; i < 64; ++i) {
            const uint8_t exponent = codes[i] == 15 ? 0 : (uint8_t)(top - codes[i]);
            halves[i] = (uint16_t)((p[i] & 128) << 8 | exponent << 7 | (p[i] & 127));
        }
        for (int i = 0; i < 8; ++i) {
            uint32_t pairs[4];
            float low[4], high[4];
            memcpy(pairs, halves + 8 * i, 16);
            for (int lane = 0; lane < 4; ++lane) {
                low[lane] = float_of(pairs[lane] << 16);
                high[lane] = float_of(pairs[lane] & 0xffff0000u);
            }
            memcpy(&v[i % 2 * 8 + i / 2], low, 16);
            memcpy(&v[i % 2 * 8 + 4 + i / 2], high, 16);
        }
    }
    static void nibbles(const uint8_t *p, V (&v)[8]) { widen(bytes4(p), v); }

    static Bytes bytes8(const uint8_t *p) {
        Bytes b;
        memcpy(b.v, p, 32);
        return b;
    }
    static Bytes bytes4(const uint8_t *p) {
        Bytes b;
        for (int i = 0; i < 16; ++i) b.v[i] = p[i] & 15, b.v[i + 16] = p[i] >> 4;
        return b;
    }
    static Bytes bytes2(const uint8_t *p) {
        Bytes b;
        for (int i = 0; i < 32; ++i) b.v[i] = (p[i % 8] >> (i / 8 * 2)) & 3;
        return b;
    }
    static Bytes bytes3(const uint8_t *p) {
        Bytes b = bytes2(p);
        for (int i = 0; i < 32; ++i) b.v[i] |= ((p[8 + i / 8] >> (i % 8)) & 1) << 2;
        return b;
    }
    static Bytes bytes_sign(const uint8_t *p) {
        Bytes b;
        for (int i = 0; i < 32; ++i) b.v[i] = ((p[i / 8] >> (i % 8)) & 1) * 2 - 1;
        return b;
    }
    static Bytes bytes_mxfp4(const uint8_t *p) {
        static const int8_t table[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
        Bytes b;
        for (int i = 0; i < 16; ++i) b.v[2 * i] = table[p[i] & 15], b.v[2 * i + 1] = table[p[i] >> 4];
        return b;
    }

    static Bytes bytes_at(const uint8_t *p) { return bytes8(p); }
    static Bytes pairs(const uint8_t *p) { return bytes4(p); }
    static Bytes bits(const uint8_t *p, int value) {
        Bytes b;
        for (int i = 0; i < 32; ++i) b.v[i] = (p[i / 8] >> (i % 8)) & 1 ? (int8_t)value : 0;
        return b;
    }
    static Bytes no_bits(const uint8_t *p, int value) {
        Bytes b = bits(p, value);
        for (int i = 0; i < 32; ++i) b.v[i] ^= (int8_t)value;
        return b;
    }
    static Bytes moved(const Bytes &b, int left, int mask) {
        Bytes to;
        for (int i = 0; i < 32; ++i) {
            const uint8_t byte = (uint8_t)b.v[i];
            to.v[i] = (int8_t)((left > 0 ? byte << left : byte >> -left) & mask);
        }
        return to;
    }
    static Bytes either(const Bytes &a, const Bytes &b) {
        Bytes to;
        for (int i = 0; i < 32; ++i) to.v[i] = a.v[i] | b.v[i];
        return to;
    }
    static Bytes minus(const Bytes &b, int value) {
        Bytes to;
        for (int i = 0; i < 32; ++i) to.v[i] = (int8_t)(b.v[i] - value);
        return to;
    }
    static Bytes look_up(const int8_t (&table)[16], const Bytes &b) {
        Bytes to;
        for (int i = 0; i < 32; ++i) to.v[i] = table[b.v[i]];
        return to;
    }
    static void nibbles(const uint8_t *p, bool is_high, V (&v)[8]) {
        widen(moved(bytes_at(p), is_high ? -4 : 0, 15), v);
    }
    static Words words4(const uint8_t *p, bool is_high) { return moved(bytes_at(p), is_high ? -4 : 0, 15); }
    static Words split(const Bytes &b) { return b; }
    static Words split_unsigned(const Bytes &b) { return b; }
    static constexpr float SMALL_UNIT = 1;
    static Words split_small(const Bytes &b) { return b; }
    static void split_words(const int16_t *, int16_t *) {}
    static V two(float first, float second) { return V{first, first, second, second}; }
    template <int BYTES> static void four_halves(const uint8_t *p, float unit, float *to) {
        for (int i = 0; i < 4; ++i) {
            Float16 half;
            memcpy(&half, p + i * BYTES, 2);
            to[i] = unit * value(&half);
        }
    }

    static Bytes bytes_one() {
        Bytes b;
        memset(b.v, 1, 32);
        return b;
    }

    static Words words(const Bytes &b) { return b; }
    static Words words8(const uint8_t *p) { return bytes8(p); }
    static Words words4(const uint8_t *p) { return bytes4(p); }
    static I none() { return I{}; }
    static I dot(I sum, const Words &w, const int16_t *x) {
        for (int i = 0; i < LANES; ++i)
            for (int j = 0; j < 8; ++j) sum[i] += w.v[8 * i + j] * x[8 * i + j];
        return sum;
    }
    static V to_float(I v) { return V{(float)v[0], (float)v[1], (float)v[2], (float)v[3]}; }
    static void store_words(int16_t *p, V v) {
        for (int i = 0; i < LANES; ++i) p[i] = (int16_t)v[i];
    }
    static void store(BFloat16 *p, V v) {
        for (int i = 0; i < LANES; ++i) {
            const uint32_t bits = bits_of(v[i]);
            p[i].bits = v[i] != v[i] ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        }
    }
    static void store(Float16 *p, V v) {
        for (int i = 0; i < LANES; ++i) {
            const uint32_t bits = bits_of(v[i]), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
            uint32_t half;
            if (magnitude > 0x7f800000) half = 0x7e00;
            else if (magnitude >= 0x477ff000) half = 0x7c00; /* rounds to infinity */
            else if (magnitude < 0x38800000)                 /* subnormal: adding 0.5 rounds at 2^-24 */
                half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
            else half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
            p[i].bits = (uint16_t)(half | sign);
        }
    }
};
