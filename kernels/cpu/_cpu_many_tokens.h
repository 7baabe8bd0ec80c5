/* Products for many tokens: blocks of the matrix as floats, then R rows by T tokens in registers. Included by
 * _cpu_kernels.h. */

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
