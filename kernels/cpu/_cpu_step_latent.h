/* Latent attention of one query: its heads share one latent a position, of which keys and values are products.
 * Included by _cpu_kernels.h. */

template <class S> struct LatentArithmetic {
    using Step = StepArithmetic<S>;

    /* out = q times a matrix of rows [count, features]: the query as a product with latents. */
    template <class T> static void absorb(const float *q, const T *rows, int count, int features, float *out) {
        memset(out, 0, sizeof(float) * features);
        for (int i = 0; i < count; ++i) Step::accumulate(out, q[i], rows + (int64_t)i * features, features);
    }
    /* out = a matrix of rows [count, features] times a latent. */
    template <class T> static void expand(const float *latent, const T *rows, int count, int features, float *out) {
        for (int i = 0; i < count; ++i) out[i] = Step::dot(latent, rows + (int64_t)i * features, features);
    }
    template <class T> static void attend(const LatentHeads &heads, int64_t first, int64_t count, float *out) {
        constexpr int AT_ONCE = 64;
        const int features = (int)heads.features, turned = (int)heads.turned_features;
        const T *latents = (const T *)heads.latents + first * features;
        const T *rotated = (const T *)heads.turned + first * turned;
        float scores[AT_ONCE];
        for (int h = 0; h < heads.num_queries; ++h) {
            float *most = out + h * (features + 2), *total = most + 1;
            *most = -INFINITY, *total = 0;
            memset(most + 2, 0, sizeof(float) * features);
        }
        for (int64_t from = 0; from < count; from += AT_ONCE) {
            const int now = (int)(count - from < AT_ONCE ? count - from : AT_ONCE);
            for (int h = 0; h < heads.num_queries; ++h) {
                float *most = out + h * (features + 2), *total = most + 1, *sum = most + 2;
                const float *query = heads.queries + h * (features + turned);
                float highest = *most;
                for (int t = 0; t < now; ++t) {
                    const float score = Step::dot(query, latents + (from + t) * features, features) +
                                        Step::dot(query + features, rotated + (from + t) * turned, turned);
                    scores[t] = score * heads.scale;
                    highest = scores[t] > highest ? scores[t] : highest;
                }
                if (highest > *most) {
                    const float shrink = *most == -INFINITY ? 0 : expf(*most - highest);
                    *total *= shrink;
                    Step::scale(sum, shrink, features);
                    *most = highest;
                }
                for (int t = 0; t < now; ++t) {
                    const float weight = expf(scores[t] - highest);
                    *total += weight;
                    Step::accumulate(sum, weight, latents + (from + t) * features, features);
                }
            }
        }
    }

    static void absorb_any(const float *q, const char *rows, int dtype, int count, int features, float *out) {
        if (dtype == FLOAT32) absorb(q, (const float *)rows, count, features, out);
        else if (dtype == BFLOAT16) absorb(q, (const BFloat16 *)rows, count, features, out);
        else absorb(q, (const Float16 *)rows, count, features, out);
    }
    static void expand_any(const float *latent, const char *rows, int dtype, int count, int features, float *out) {
        if (dtype == FLOAT32) expand(latent, (const float *)rows, count, features, out);
        else if (dtype == BFLOAT16) expand(latent, (const BFloat16 *)rows, count, features, out);
        else expand(latent, (const Float16 *)rows, count, features, out);
    }
    static void attend_any(const LatentHeads &heads, int64_t first, int64_t count, float *out) {
        if (heads.dtype == FLOAT32) attend<float>(heads, first, count, out);
        else if (heads.dtype == BFLOAT16) attend<BFloat16>(heads, first, count, out);
        else attend<Float16>(heads, first, count, out);
    }
};
