/* Records in which keys and values are kept: of each head of each position, its codes, then a float16 scale for each
 * group of 32 channels, the last of which may have 16. Keys have codes of 8 bits, values of 8 or 4. Of 4, the first half
 * of a group lies in the low halves of bytes, the second in the high ones, each plus 8. The same bits as
 * moeflow/engine/kv_cache/kv_format.py.
 *
 * Included by _step.cpp, inside its unnamed namespace. */

/* Turns into the nearest whole number, of two the even one; for numbers under 2^22. */
float whole(float x) { return (x + 12582912.0f) - 12582912.0f; }
float between(float x, float least, float most) { return x > most ? most : x < least ? least : x; }
/* The number that is the largest in size, the first of equal ones; NaN where there is one. */
float largest(const float *x, int count) {
    float found = x[0];
    for (int i = 1; i < count; ++i)
        if (fabsf(x[i]) > fabsf(found) || x[i] != x[i]) found = x[i];
    return found;
}

/* Writes the record of one head. */
void encode(const float *x, int features, int bits, uint8_t *record) {
    const Arithmetic &arithmetic = chosen_arithmetic();
    const float end = bits == 8 ? 127.0f : -8.0f, most = bits == 8 ? 127.0f : 7.0f, least = bits == 8 ? -most : -8.0f;
    const float share = (float)(1.0 / end);
    uint8_t *scales = record + code_bytes(features, bits);
    for (int from = 0; from < features; from += KEPT_GROUP, scales += 2) {
        const int count = features - from < KEPT_GROUP ? features - from : KEPT_GROUP;
        float scale = largest(x + from, count) * share;
        arithmetic.store(&scale, scales, 1, FLOAT16);
        arithmetic.convert(scales, FLOAT16, 1, &scale, 1);
        int8_t codes[KEPT_GROUP] = {};
        if (scale != 0 && fabsf(scale) < INFINITY) {
            const float inverse = 1 / scale;
            for (int i = 0; i < count; ++i) codes[i] = (int8_t)whole(between(x[from + i] * inverse, least, most));
        }
        if (bits == 8) memcpy(record + from, codes, count);
        else
            for (int i = 0; i < count / 2; ++i)
                record[from / 2 + i] = (uint8_t)((codes[i] + 8) | (codes[count / 2 + i] + 8) << 4);
    }
}

/* Rounds a query to int16 with one scale, and fills it up with zeros; returns the scale. */
float round_query(const float *x, int features, int16_t *codes) {
    constexpr float MOST = 32767;
    const float highest = fabsf(largest(x, features));
    const float delta = highest / MOST, inverse = delta > 1e-38f && delta < 1e38f ? 1 / delta : 0;
    memset(codes, 0, sizeof(int16_t) * kept_groups(features) * KEPT_GROUP);
    if (inverse > 0)
        for (int i = 0; i < features; ++i) codes[i] = (int16_t)whole(between(x[i] * inverse, -MOST, MOST));
    return inverse > 0 || highest == 0 ? delta : NAN;
}

thread_local std::vector<int16_t> rounded_queries;
thread_local std::vector<float> query_deltas;

void round_queries(const float *queries, int64_t count, int features) {
    const int64_t stride = kept_groups(features) * KEPT_GROUP;
    rounded_queries.resize(count * stride), query_deltas.resize(count);
    for (int64_t i = 0; i < count; ++i)
        query_deltas[i] = round_query(queries + i * features, features, rounded_queries.data() + i * stride);
}
