/* The arithmetic of a step beside matrices: elementwise operations, and attention of one query over kept positions.
 * Included by _cpu_kernels.h. */

template <class S> struct StepArithmetic {
    using V = typename S::V;

    template <V (*F)(V)> static void each(int64_t n, float *a) {
        int64_t i = 0;
        for (; i + S::LANES <= n; i += S::LANES) S::store(a + i, F(S::load(a + i)));
        if (i < n) store_part<S>(a + i, F(load_part<S>(a + i, (int)(n - i))), (int)(n - i));
    }
    static V silu(V x) { return S::mul(x, sigmoid<S>(x)); }
    template <class F> static void scalar(int64_t n, float *a, const F &f) {
        for (int64_t i = 0; i < n; ++i) a[i] = f(a[i]);
    }
    template <class F> static void pair(int64_t n, float *a, const float *b, const F &f) {
        for (int64_t i = 0; i < n; ++i) a[i] = f(a[i], b[i]);
    }

    static void store(const float *from, void *to, int count, int format) {
        store_row<S>(from, to, 0, count, format);
    }

    /* a = op(a, b) over n floats. */
    static void pointwise(int op, int64_t n, float *a, const float *b) {
        switch (op) {
        case POINT_COPY: break;
        case POINT_ADD: pair(n, a, b, [](float x, float y) { return x + y; }); break;
        case POINT_SUB: pair(n, a, b, [](float x, float y) { return x - y; }); break;
        case POINT_MUL: pair(n, a, b, [](float x, float y) { return x * y; }); break;
        case POINT_DIV: pair(n, a, b, [](float x, float y) { return x / y; }); break;
        case POINT_MAX: pair(n, a, b, [](float x, float y) { return x != x || x > y ? x : y; }); break;
        case POINT_MIN: pair(n, a, b, [](float x, float y) { return x != x || x < y ? x : y; }); break;
        case POINT_POW: pair(n, a, b, [](float x, float y) { return y == 2 ? x * x : powf(x, y); }); break;
        case POINT_NEG: scalar(n, a, [](float x) { return -x; }); break;
        case POINT_ABS: scalar(n, a, [](float x) { return fabsf(x); }); break;
        case POINT_SQRT: scalar(n, a, [](float x) { return sqrtf(x); }); break;
        case POINT_RSQRT: scalar(n, a, [](float x) { return 1 / sqrtf(x); }); break;
        case POINT_RECIPROCAL: scalar(n, a, [](float x) { return 1 / x; }); break;
        case POINT_EXP: scalar(n, a, [](float x) { return expf(x); }); break;
        case POINT_LOG: scalar(n, a, [](float x) { return logf(x); }); break;
        case POINT_SIN: scalar(n, a, [](float x) { return sinf(x); }); break;
        case POINT_COS: scalar(n, a, [](float x) { return cosf(x); }); break;
        case POINT_TANH: scalar(n, a, [](float x) { return tanhf(x); }); break;
        case POINT_SIGMOID: each<sigmoid<S>>(n, a); break;
        case POINT_SILU: each<silu>(n, a); break;
        case POINT_GELU: scalar(n, a, [](float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }); break;
        case POINT_GELU_TANH:
            scalar(n, a, [](float x) {
                return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
            });
            break;
        case POINT_RELU: scalar(n, a, [](float x) { return x < 0 ? 0 : x; }); break;
        case POINT_SOFTPLUS: scalar(n, a, [](float x) { return x > 20 ? x : log1pf(expf(x)); }); break;
        case POINT_EQ: pair(n, a, b, [](float x, float y) { return (float)(x == y); }); break;
        case POINT_NE: pair(n, a, b, [](float x, float y) { return (float)(x != y); }); break;
        case POINT_LT: pair(n, a, b, [](float x, float y) { return (float)(x < y); }); break;
        case POINT_LE: pair(n, a, b, [](float x, float y) { return (float)(x <= y); }); break;
        case POINT_GT: pair(n, a, b, [](float x, float y) { return (float)(x > y); }); break;
        case POINT_GE: pair(n, a, b, [](float x, float y) { return (float)(x >= y); }); break;
        case POINT_AND: pair(n, a, b, [](float x, float y) { return (float)(x != 0 && y != 0); }); break;
        case POINT_OR: pair(n, a, b, [](float x, float y) { return (float)(x != 0 || y != 0); }); break;
        case POINT_NOT: scalar(n, a, [](float x) { return (float)(x == 0); }); break;
        }
    }

    template <class T> static void attend(const HeadGroup &group, int64_t first, int64_t count, float *out) {
        const T *keys = (const T *)group.keys + first * group.key_features;
        const T *values = (const T *)group.values + first * group.value_features;
        const int features = (int)group.key_features, out_features = (int)group.value_features;
        begin(out, group.num_queries, out_features);
        constexpr int AT_ONCE = 64;
        float scores[AT_ONCE] = {};
        for (int64_t from = 0; from < count; from += AT_ONCE) {
            const int now = (int)(count - from < AT_ONCE ? count - from : AT_ONCE);
            for (int h = 0; h < group.num_queries; ++h) {
                float *most = out + h * (out_features + 2);
                const float *query = group.queries + h * features;
                float highest = *most;
                for (int t = 0; t < now; ++t) {
                    float score = dot(query, keys + (from + t) * features, features) * group.scale;
                    if (group.soft_cap != 0) score = group.soft_cap * tanhf(score / group.soft_cap);
                    scores[t] = score;
                    highest = score > highest ? score : highest;
                }
                weigh(scores, now, AT_ONCE, highest, most, out_features);
                accumulate_many(most + 2, scores, values + from * out_features, out_features, now);
            }
        }
    }
    /* Partial results of no positions yet: the highest score, the sum of weights, the weighted sum of values. */
    static void begin(float *out, int num_queries, int features) {
        for (int h = 0; h < num_queries; ++h) {
            float *most = out + h * (features + 2);
            most[0] = -INFINITY, most[1] = 0;
            memset(most + 2, 0, sizeof(float) * features);
        }
    }
    /* Turns scores into weights, zeros behind them, and lets a partial result take their highest and their sum in. */
    static void weigh(float *scores, int count, int room, float highest, float *most, int features) {
        float *total = most + 1, *sum = most + 2;
        if (highest > *most) {
            const float shrink = *most == -INFINITY ? 0 : expf(*most - highest);
            *total *= shrink;
            scale(sum, shrink, features);
            *most = highest;
        }
        for (int t = 0; t < count; t += S::LANES)
            S::store(scores + t, exponential<S>(S::sub(S::load(scores + t), S::all(highest))));
        memset(scores + count, 0, sizeof(float) * (room - count));
        V weights = S::zero();
        for (int t = 0; t < count; t += S::LANES) weights = S::add(weights, S::load(scores + t));
        *total += S::sum(weights);
    }

    template <class T> static float dot(const float *a, const T *b, int n) {
        V x = S::zero(), y = S::zero();
        int i = 0;
        for (; i + 2 * S::LANES <= n; i += 2 * S::LANES) {
            x = S::fma(S::load(a + i), S::load(b + i), x);
            y = S::fma(S::load(a + i + S::LANES), S::load(b + i + S::LANES), y);
        }
        for (; i + S::LANES <= n; i += S::LANES) x = S::fma(S::load(a + i), S::load(b + i), x);
        if (i < n) x = S::fma(load_part<S>(a + i, n - i), load_part<S>(b + i, n - i), x);
        return S::sum(S::add(x, y));
    }
    template <class T> static void accumulate(float *sum, float weight, const T *values, int n) {
        const V w = S::all(weight);
        int i = 0;
        for (; i + S::LANES <= n; i += S::LANES) S::store(sum + i, S::fma(w, S::load(values + i), S::load(sum + i)));
        if (i < n)
            store_part<S>(sum + i, S::fma(w, load_part<S>(values + i, n - i), load_part<S>(sum + i, n - i)), n - i);
    }
    /* sum += weights [count] times rows [count, n], in their order. */
    template <class T> static void accumulate_many(float *sum, const float *weights, const T *rows, int n, int count) {
        constexpr int AT_ONCE = 4;
        int i = 0;
        for (; i + AT_ONCE * S::LANES <= n; i += AT_ONCE * S::LANES) {
            V sums[AT_ONCE];
            UNROLL for (int j = 0; j < AT_ONCE; ++j) sums[j] = S::load(sum + i + j * S::LANES);
            for (int t = 0; t < count; ++t) {
                const V weight = S::all(weights[t]);
                const T *row = rows + (int64_t)t * n + i;
                UNROLL for (int j = 0; j < AT_ONCE; ++j) sums[j] = S::fma(weight, S::load(row + j * S::LANES), sums[j]);
            }
            UNROLL for (int j = 0; j < AT_ONCE; ++j) S::store(sum + i + j * S::LANES, sums[j]);
        }
        if (i < n)
            for (int t = 0; t < count; ++t) accumulate(sum + i, weights[t], rows + (int64_t)t * n + i, n - i);
    }
    static void scale(float *sum, float factor, int n) {
        for (int i = 0; i < n; ++i) sum[i] *= factor;
    }
};
