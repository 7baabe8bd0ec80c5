/* AVX2, FMA and F16C: 8 floats, and 32 codes as bytes. Included inside an unnamed namespace. */

struct Avx2 {
    static constexpr int LANES = 8, MANY_ROWS = 3, MANY_TOKENS = 4;
    using V = __m256;
    using Bytes = __m256i; /* 32 codes in their order */
    using I = __m256i;     /* LANES whole sums */
    struct Words {         /* 32 codes in their order */
        __m256i v[2];
    };
    static constexpr bool HAS_SPLIT = true;
    struct Split { /* 32 codes: 0, 2, ..., 30 and 1, 3, ..., 31, for bytes in a register come apart so at less cost */
        __m256i even, odd;
    };

    static V zero() { return _mm256_setzero_ps(); }
    static V all(float x) { return _mm256_set1_ps(x); }
    static V load(const float *p) { return _mm256_loadu_ps(p); }
    static void store(float *p, V v) { _mm256_storeu_ps(p, v); }
    static V add(V a, V b) { return _mm256_add_ps(a, b); }
    static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
    static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
    static V div(V a, V b) { return _mm256_div_ps(a, b); }
    static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static V at_most(V x, V limit) { return _mm256_min_ps(limit, x); } /* NaN stays NaN */
    static V at_least(V x, V limit) { return _mm256_max_ps(limit, x); }
    static V absolute(V x) { return _mm256_andnot_ps(all(-0.0f), x); }
    static V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static V power_of_two(V n) { /* of whole numbers from -126 to 127 */
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
    }
    static float sum(V v) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    /* The sums of four vectors. */
    static void sums(const V (&v)[4], float *to) {
        const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
    }
    static void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

    static V load(const BFloat16 *p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
    }
    static V load(const Float16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
    static V load(const int8_t *p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
    }
    /* E4M3 as half floats, 256 times too small. */
    static __m128i half_of_fp8(__m128i wide) {
        const __m128i magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
        const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
        const __m128i nan = _mm_srli_epi16(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), 1);
        return _mm_or_si128(_mm_or_si128(sign, nan), _mm_slli_epi16(magnitude, 7));
    }
    static V load(const Float8 *p) {
        return _mm256_cvtph_ps(half_of_fp8(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)p))));
    }
    static float value(const Float16 *p) { return _cvtsh_ss(p->bits); }
    static void store_first(float *to, const Float16 *p, int count) {
        for (int i = 0; i < count; ++i) to[i] = value(p + i);
    }

    static V to_float(__m256i v) { return _mm256_cvtepi32_ps(v); }
    static void nibbles(const uint8_t *p, V (&v)[4]) {
        for (int i = 0; i < 2; ++i) {
            const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * i)));
            v[i] = to_float(_mm256_and_si256(both, _mm256_set1_epi32(15)));
            v[i + 2] = to_float(_mm256_srli_epi32(both, 4));
        }
    }
    static void widen(Bytes b, V (&v)[4]) { /* of codes from -128 to 127 */
        const __m128i low = _mm256_castsi256_si128(b), high = _mm256_extracti128_si256(b, 1);
        v[0] = to_float(_mm256_cvtepi8_epi32(low));
        v[1] = to_float(_mm256_cvtepi8_epi32(_mm_srli_si128(low, 8)));
        v[2] = to_float(_mm256_cvtepi8_epi32(high));
        v[3] = to_float(_mm256_cvtepi8_epi32(_mm_srli_si128(high, 8)));
    }

    static Bytes bytes2(const uint8_t *p) {
        int64_t word;
        memcpy(&word, p, 8);
        const __m256i spread = _mm256_srlv_epi64(_mm256_set1_epi64x(word), _mm256_setr_epi64x(0, 2, 4, 6));
        return _mm256_and_si256(spread, _mm256_set1_epi8(3));
    }
    static __m256i is_set(const uint8_t *p) { /* all bits of a byte where its bit is set */
        int32_t word;
        memcpy(&word, p, 4);
        const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit_of = _mm256_set1_epi64x((int64_t)0x8040201008040201);
        const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(word), byte_of);
        return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
    }
    static Bytes bytes3(const uint8_t *p) {
        return _mm256_or_si256(bytes2(p), _mm256_and_si256(is_set(p + 8), _mm256_set1_epi8(4)));
    }
    static Bytes bytes_sign(const uint8_t *p) { /* 1 or -1 */
        return _mm256_sub_epi8(_mm256_set1_epi8(-1), _mm256_add_epi8(is_set(p), is_set(p)));
    }
    /* E2M1, doubled. */
    static Bytes bytes_mxfp4(const uint8_t *p) {
        const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
        const __m128i both = _mm_loadu_si128((const __m128i *)p), mask = _mm_set1_epi8(15);
        const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(both, mask));
        const __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), mask));
        return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    }

    /* Of GGML's blocks: bytes as they are, of which each half is a plane, bits spread out, fields at another place. */
    static Bytes bytes_at(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
    static Bytes pairs(const uint8_t *p) {
        const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
        return _mm256_and_si256(_mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15));
    }
    static Bytes bits(const uint8_t *p, int value) { return _mm256_and_si256(is_set(p), _mm256_set1_epi8((char)value)); }
    static Bytes no_bits(const uint8_t *p, int value) { /* the value where a bit is not set */
        return _mm256_andnot_si256(is_set(p), _mm256_set1_epi8((char)value));
    }
    static Bytes moved(Bytes b, int left, int mask) {
        if (left > 0) b = _mm256_slli_epi16(b, left);
        if (left < 0) b = _mm256_srli_epi16(b, -left);
        return _mm256_and_si256(b, _mm256_set1_epi8((char)mask));
    }
    static Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
    static Bytes minus(Bytes b, int value) { return _mm256_sub_epi8(b, _mm256_set1_epi8((char)value)); }
    static Bytes look_up(const int8_t (&table)[16], Bytes b) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), b);
    }
    /* The low or the high halves of 32 bytes. */
    static void nibbles(const uint8_t *p, bool is_high, V (&v)[4]) {
        for (int i = 0; i < 4; ++i) {
            const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * i)));
            v[i] = to_float(is_high ? _mm256_srli_epi32(both, 4) : _mm256_and_si256(both, _mm256_set1_epi32(15)));
        }
    }
    static Words words4(const uint8_t *p, bool is_high) {
        Words words;
        for (int i = 0; i < 2; ++i) {
            const __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p + i));
            words.v[i] = is_high ? _mm256_srli_epi16(both, 4) : _mm256_and_si256(both, _mm256_set1_epi16(15));
        }
        return words;
    }
    static Split split(Bytes b) {
        return {_mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), _mm256_srai_epi16(b, 8)};
    }
    static Split split_unsigned(Bytes b) {
        return {_mm256_and_si256(b, _mm256_set1_epi16(255)), _mm256_srli_epi16(b, 8)};
    }
    /* Codes from -63 to 63, each 1 / SMALL_UNIT times as large: none is moved down, and a sum of 32 products still fits. */
    static constexpr float SMALL_UNIT = 1 / 256.0f;
    static Split split_small(Bytes b) {
        return {_mm256_slli_epi16(b, 8), _mm256_and_si256(b, _mm256_set1_epi16((int16_t)0xff00))};
    }
    /* 32 rounded activations in that order. */
    static void split_words(const int16_t *from, int16_t *to) {
        __m256i even[2], odd[2];
        for (int i = 0; i < 2; ++i) {
            const __m256i both = _mm256_loadu_si256((const __m256i *)from + i);
            even[i] = _mm256_srai_epi32(_mm256_slli_epi32(both, 16), 16), odd[i] = _mm256_srai_epi32(both, 16);
        }
        _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(_mm256_packs_epi32(even[0], even[1]), 0xd8));
        _mm256_storeu_si256((__m256i *)to + 1, _mm256_permute4x64_epi64(_mm256_packs_epi32(odd[0], odd[1]), 0xd8));
    }
    /* One number for the first half of the lanes, another for the rest. */
    static V two(float first, float second) { return _mm256_blend_ps(all(first), all(second), 0xf0); }
    /* Four halves of as many blocks, times a number. */
    template <int BYTES> static void four_halves(const uint8_t *p, float unit, float *to) {
        uint16_t bits[4];
        for (int i = 0; i < 4; ++i) memcpy(bits + i, p + i * BYTES, 2);
        __m128i halves = _mm_insert_epi16(_mm_setzero_si128(), bits[0], 0);
        halves = _mm_insert_epi16(halves, bits[1], 1), halves = _mm_insert_epi16(halves, bits[2], 2);
        const __m128 four = _mm_cvtph_ps(_mm_insert_epi16(halves, bits[3], 3));
        _mm_storeu_ps(to, unit == 1 ? four : _mm_mul_ps(four, _mm_set1_ps(unit)));
        if (unit != 1) in_memory(to); /* GCC would multiply each by itself */
    }
    /* Loads that spread one of four floats are then cheaper than GCC's shuffles, which spare a load. */
    static void in_memory(float *p) { __asm__("" : "+m"(*(float(*)[4])p)); }

    static Bytes bytes_one() { return _mm256_set1_epi8(1); }

    static Words words(Bytes b) {
        return {{_mm256_cvtepi8_epi16(_mm256_castsi256_si128(b)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(b, 1))}};
    }
    static Words words8(const uint8_t *p) {
        return {{_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)),
                 _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p + 1))}};
    }
    static Words words4(const uint8_t *p) {
        const __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
        return {{_mm256_and_si256(both, _mm256_set1_epi16(15)), _mm256_srli_epi16(both, 4)}};
    }
    static I none() { return _mm256_setzero_si256(); }
    /* Adds 32 products: lane l those of 2l, 2l + 1, 2l + 16, 2l + 17. */
    static I dot(I sum, const Words &w, const int16_t *x) {
        const __m256i low = _mm256_madd_epi16(w.v[0], _mm256_loadu_si256((const __m256i *)x));
        const __m256i high = _mm256_madd_epi16(w.v[1], _mm256_loadu_si256((const __m256i *)x + 1));
        return _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
    }
    /* The same of codes and activations that are split: lane l those of 4l to 4l + 3. */
    static I dot(I sum, const Split &w, const int16_t *x) {
        const __m256i even = _mm256_madd_epi16(w.even, _mm256_loadu_si256((const __m256i *)x));
        const __m256i odd = _mm256_madd_epi16(w.odd, _mm256_loadu_si256((const __m256i *)x + 1));
        return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
    }
    /* Whole floats to int16. */
    static void store_words(int16_t *p, V v) {
        const __m256i wide = _mm256_cvtps_epi32(v);
        _mm_storeu_si128((__m128i *)p, _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
    }
    /* A row's exponents by code, as the two bytes of a bfloat16 have them. */
    struct Exponents {
        __m256i high, low;
    };
    static Exponents exponents(int top) {
        const __m128i code = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m128i most = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0);
        const __m128i found = _mm_and_si128(_mm_subs_epu8(_mm_set1_epi8((char)top), code), most); /* 15 says 0 */
        const __m128i high = _mm_and_si128(_mm_srli_epi16(found, 1), _mm_set1_epi8(0x7f));
        const __m128i low = _mm_slli_epi16(_mm_and_si128(found, _mm_set1_epi8(1)), 7);
        return {_mm256_broadcastsi128_si256(high), _mm256_broadcastsi128_si256(low)};
    }
    /* Sets bits in a lane; in none where there is no such lane. */
    static V put(V v, int lane, uint32_t bits) {
        const __m256i here = _mm256_cmpeq_epi32(_mm256_set1_epi32(lane), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        return _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_and_si256(here, _mm256_set1_epi32((int)bits))));
    }
    static void lossless(const uint8_t *p, const Exponents &table, V (&v)[8]) {
        const __m256i sign = _mm256_set1_epi8((char)0x80), upper = _mm256_set1_epi32((int)0xffff0000);
        const __m256i both = _mm256_loadu_si256((const __m256i *)(p + 64));
        for (int i = 0; i < 2; ++i) { /* of which values 0 to 7 of every 16 come, then 8 to 15 */
            const __m256i rests = _mm256_loadu_si256((const __m256i *)(p + 32 * i));
            const __m256i codes = _mm256_and_si256(i ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
            const __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(table.high, codes), _mm256_and_si256(rests, sign));
            const __m256i low = _mm256_or_si256(_mm256_shuffle_epi8(table.low, codes), _mm256_andnot_si256(sign, rests));
            const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
            v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(first, 16));
            v[2 + i] = _mm256_castsi256_ps(_mm256_and_si256(first, upper));
            v[4 + i] = _mm256_castsi256_ps(_mm256_slli_epi32(second, 16));
            v[6 + i] = _mm256_castsi256_ps(_mm256_and_si256(second, upper));
        }
    }
    static void store(Float16 *p, V v) {
        _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    static void store(BFloat16 *p, V v) {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i wide = _mm256_srli_epi32(_mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), nan), 16);
        const __m128i low = _mm256_castsi256_si128(wide), high = _mm256_extracti128_si256(wide, 1);
        _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(low, high));
    }
};
