/* AVX-512 (F, BW, DQ, VL, VNNI): 16 floats. */

struct Avx512 {
    static constexpr int LANES = 16, MANY_ROWS = 4, MANY_TOKENS = 6;
    using V = __m512;
    using Bytes = __m256i;
    using I = __m512i;
    using Words = __m512i; /* 32 codes in their order */
    static constexpr bool HAS_SPLIT = false;

    static V zero() { return _mm512_setzero_ps(); }
    static V all(float x) { return _mm512_set1_ps(x); }
    static V load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, V v) { _mm512_storeu_ps(p, v); }
    static V add(V a, V b) { return _mm512_add_ps(a, b); }
    static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
    static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
    static V div(V a, V b) { return _mm512_div_ps(a, b); }
    static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static V at_most(V x, V limit) { return _mm512_min_ps(limit, x); }
    static V at_least(V x, V limit) { return _mm512_max_ps(limit, x); }
    static V absolute(V x) { return _mm512_abs_ps(x); }
    static V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static V power_of_two(V n) {
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
    }
    static float sum(V v) {
        return Avx2::sum(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
    }
    static void sums(const V (&v)[4], float *to) {
        __m256 halves[4];
        for (int i = 0; i < 4; ++i)
            halves[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
        Avx2::sums(halves, to);
    }
    static void prefetch(const void *p) { Avx2::prefetch(p); }

    static V load(const BFloat16 *p) {
        const __m256i half = _mm256_loadu_si256((const __m256i *)p);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static V load(const Float16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
    static V load(const int8_t *p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
    }
    static V load(const Float8 *p) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)p);
        const __m128i low = Avx2::half_of_fp8(_mm_cvtepu8_epi16(bytes));
        const __m128i high = Avx2::half_of_fp8(_mm_cvtepu8_epi16(_mm_srli_si128(bytes, 8)));
        return _mm512_cvtph_ps(_mm256_set_m128i(high, low));
    }
    static float value(const Float16 *p) { return Avx2::value(p); }
    static void store_first(float *to, const Float16 *p, int count) { /* LANES values, zero beyond those of p */
        store(to, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p)));
    }

    static void nibbles(const uint8_t *p, V (&v)[2]) {
        const __m512 floats = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
        v[0] = _mm512_permutexvar_ps(both, floats); /* it looks at four bits of a place */
        v[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), floats);
    }
    static void widen(Bytes b, V (&v)[2]) {
        v[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(b)));
        v[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(b, 1)));
    }
    static V to_float(I v) { return _mm512_cvtepi32_ps(v); }
    static Bytes bytes3(const uint8_t *p) { return Avx2::bytes3(p); }
    static Bytes bytes2(const uint8_t *p) { return Avx2::bytes2(p); }
    static Bytes bytes_sign(const uint8_t *p) { return Avx2::bytes_sign(p); }
    static Bytes bytes_mxfp4(const uint8_t *p) { return Avx2::bytes_mxfp4(p); }
    static Bytes bytes_one() { return Avx2::bytes_one(); }
    static Bytes bytes_at(const uint8_t *p) { return Avx2::bytes_at(p); }
    static Bytes pairs(const uint8_t *p) { return Avx2::pairs(p); }
    static Bytes bits(const uint8_t *p, int value) { return Avx2::bits(p, value); }
    static Bytes no_bits(const uint8_t *p, int value) { return Avx2::no_bits(p, value); }
    static Bytes moved(Bytes b, int left, int mask) { return Avx2::moved(b, left, mask); }
    static Bytes either(Bytes a, Bytes b) { return Avx2::either(a, b); }
    static Bytes minus(Bytes b, int value) { return Avx2::minus(b, value); }
    static Bytes look_up(const int8_t (&table)[16], Bytes b) { return Avx2::look_up(table, b); }
    static void nibbles(const uint8_t *p, bool is_high, V (&v)[2]) {
        const __m512 floats = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int i = 0; i < 2; ++i) {
            const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p + i));
            v[i] = _mm512_permutexvar_ps(is_high ? _mm512_srli_epi32(both, 4) : both, floats);
        }
    }

    static Words words(Bytes b) { return _mm512_cvtepi8_epi16(b); }
    static Words words8(const uint8_t *p) { return words(_mm256_loadu_si256((const __m256i *)p)); }
    static Words words4(const uint8_t *p) {
        const Avx2::Words halves = Avx2::words4(p);
        return _mm512_inserti64x4(_mm512_castsi256_si512(halves.v[0]), halves.v[1], 1);
    }
    static Words words4(const uint8_t *p, bool is_high) {
        const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
        return is_high ? _mm512_srli_epi16(both, 4) : _mm512_and_si512(both, _mm512_set1_epi16(15));
    }
    static Words split(Bytes b) { return words(b); }
    static Words split_unsigned(Bytes b) { return words(b); }
    static constexpr float SMALL_UNIT = 1;
    static Words split_small(Bytes b) { return words(b); }
    static void split_words(const int16_t *, int16_t *) {}
    static V two(float first, float second) { return _mm512_mask_blend_ps((__mmask16)0xff00, all(first), all(second)); }
    template <int BYTES> static void four_halves(const uint8_t *p, float unit, float *to) {
        Avx2::four_halves<BYTES>(p, unit, to);
    }
    static I none() { return _mm512_setzero_si512(); }
    static I dot(I sum, Words w, const int16_t *x) {
        return _mm512_dpwssd_epi32(sum, w, _mm512_loadu_si512((const void *)x));
    }
    static void store_words(int16_t *p, V v) {
        _mm256_storeu_si256((__m256i *)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
    }

    struct Exponents {
        __m512i high, low;
    };
    static Exponents exponents(int top) {
        const Avx2::Exponents half = Avx2::exponents(top);
        return {_mm512_broadcast_i64x4(half.high), _mm512_broadcast_i64x4(half.low)};
    }
    static V put(V v, int lane, uint32_t bits) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_set1_epi32(lane), lanes);
        const __m512i old = _mm512_castps_si512(v);
        return _mm512_castsi512_ps(_mm512_mask_or_epi32(old, here, old, _mm512_set1_epi32((int)bits)));
    }
    static void lossless(const uint8_t *p, const Exponents &table, V (&v)[4]) {
        const __m512i sign = _mm512_set1_epi8((char)0x80), upper = _mm512_set1_epi32((int)0xffff0000);
        const __m256i both = _mm256_loadu_si256((const __m256i *)(p + 64));
        const __m512i rests = _mm512_loadu_si512((const void *)p);
        const __m512i spread = _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
        const __m512i codes = _mm512_and_si512(spread, _mm512_set1_epi8(15));
        const __m512i high = _mm512_or_si512(_mm512_shuffle_epi8(table.high, codes), _mm512_and_si512(rests, sign));
        const __m512i low = _mm512_or_si512(_mm512_shuffle_epi8(table.low, codes), _mm512_andnot_si512(sign, rests));
        const __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
        v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(first, 16));
        v[1] = _mm512_castsi512_ps(_mm512_and_si512(first, upper));
        v[2] = _mm512_castsi512_ps(_mm512_slli_epi32(second, 16));
        v[3] = _mm512_castsi512_ps(_mm512_and_si512(second, upper));
    }

    static void store(Float16 *p, V v) {
        _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    static void store(BFloat16 *p, V v) {
        Avx2::store(p, _mm512_castps512_ps256(v));
        Avx2::store(p + 8, _mm512_extractf32x8_ps(v, 1));
    }
};
