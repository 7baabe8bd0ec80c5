/* Attention of one query over positions kept in int8 or int4 (_step_kept.h), read where they lie. The query heads that
 * share a head of keys and values share the loading of its codes. Included by _cpu_kernels.h. */

template <class S> struct KeptInt8 : Int8<S> {
    static constexpr int BITS = 8, OFFSET = 0; /* what its bits say minus the code */
};
template <class S> struct KeptInt4 : Uint4<S> {
    static constexpr int BITS = 4, OFFSET = 8;
};

/* F: what values are kept in; keys have 8 bits. */
template <class S, class F> struct KeptArithmetic {
    using V = typename S::V;
    using Step = StepArithmetic<S>;
    using K = KeptInt8<S>;
    static constexpr int AT_ONCE = 64, VECTORS = KEPT_GROUP / S::LANES;
    /* Heads that share codes as floats: their sums stay in registers, but halves of bytes take longer to turn again. */
    static constexpr int SUMMED_HEADS = F::OFFSET ? 4 : VECTORS < 8 ? 8 / VECTORS : 1;

    /* Records of one head of keys or values. */
    template <class R> struct Records {
        const uint8_t *data;
        int features, groups, codes;
        int64_t bytes;

        Records(const char *first, int64_t num_features, int64_t position)
            : features((int)num_features), groups(kept_groups(features)), codes(code_bytes(features, R::BITS)),
              bytes(record_bytes(features, R::BITS)) {
            data = (const uint8_t *)first + position * bytes;
        }
        float scale(int64_t position, int group) const {
            return S::value((const Float16 *)(data + position * bytes + codes) + group);
        }
        bool is_half(int group) const { return group * KEPT_GROUP + KEPT_GROUP > features; }
        const uint8_t *group(int64_t position, int group) const {
            return data + position * bytes + group * R::BLOCK_BYTES;
        }
        /* The 16 codes of a group that has no more, as those of a whole one. */
        void widen(int64_t position, int group, uint8_t *to) const {
            const uint8_t *from = this->group(position, group);
            constexpr int HALF = R::BLOCK_BYTES / 2;
            if (R::OFFSET)
                for (int i = 0; i < HALF; ++i) to[i] = from[i] & 15, to[HALF + i] = from[i] >> 4;
            else memcpy(to, from, HALF), memset(to + HALF, 0, HALF);
        }
    };

    /* scores[h * AT_ONCE + t] = the product of H rounded queries, a stride apart, with position t. */
    template <int H>
    static void score(const Records<K> &keys, int64_t from, int count, const int16_t *queries, int stride, float *scores) {
        const int whole = keys.features / KEPT_GROUP;
        for (int t = 0; t < count; ++t) {
            V sums[H];
            UNROLL for (int h = 0; h < H; ++h) sums[h] = S::zero();
            for (int g = 0; g < whole; ++g)
                add(sums, keys.group(from + t, g), keys.scale(from + t, g), queries + 32 * g, stride);
            if (whole < keys.groups) {
                uint8_t codes[32];
                keys.widen(from + t, whole, codes);
                add(sums, codes, keys.scale(from + t, whole), queries + 32 * whole, stride);
            }
            if constexpr (H == 4) {
                float four[4];
                S::sums(sums, four);
                for (int h = 0; h < H; ++h) scores[h * AT_ONCE + t] = four[h];
            } else
                for (int h = 0; h < H; ++h) scores[h * AT_ONCE + t] = S::sum(sums[h]);
        }
    }
    template <int H>
    static void add(V (&sums)[H], const uint8_t *codes, float scale, const int16_t *queries, int stride) {
        const auto words = K::words(codes);
        const V unit = S::all(scale);
        UNROLL for (int h = 0; h < H; ++h)
            sums[h] = S::fma(S::to_float(S::dot(S::none(), words, queries + h * stride)), unit, sums[h]);
    }

    /* The sums of H heads, a stride apart, += weights[h * AT_ONCE + t] times the values of a group of each position. */
    template <int H>
    static void accumulate(const Records<F> &values, int64_t from, int count, int g, const float *weights, float *sums,
                           int64_t stride) {
        const bool is_half = values.is_half(g);
        float part[H][KEPT_GROUP] = {}; /* of half a group, in as many lanes as a whole one */
        V total[H][VECTORS];
        for (int h = 0; h < H; ++h) {
            const float *at = sums + h * stride + g * KEPT_GROUP;
            if (is_half) memcpy(part[h], at, sizeof(float) * KEPT_GROUP / 2), at = part[h];
            V taken = S::zero();
            if (F::OFFSET) {
                for (int t = 0; t < AT_ONCE; t += S::LANES) taken = S::add(taken, S::load(weights + h * AT_ONCE + t));
                taken = S::all(S::sum(taken) * -F::OFFSET);
            }
            UNROLL for (int i = 0; i < VECTORS; ++i) total[h][i] = S::add(S::load(at + i * S::LANES), taken);
        }
        for (int t = 0; t < count; ++t) {
            V codes[VECTORS];
            if (is_half) {
                uint8_t wide[32];
                values.widen(from + t, g, wide);
                F::floats(wide, codes);
            } else F::floats(values.group(from + t, g), codes);
            UNROLL for (int h = 0; h < H; ++h) {
                const V weight = S::all(weights[h * AT_ONCE + t]);
                UNROLL for (int i = 0; i < VECTORS; ++i) total[h][i] = S::fma(weight, codes[i], total[h][i]);
            }
        }
        for (int h = 0; h < H; ++h) {
            float *at = is_half ? part[h] : sums + h * stride + g * KEPT_GROUP;
            UNROLL for (int i = 0; i < VECTORS; ++i) S::store(at + i * S::LANES, total[h][i]);
            if (is_half) memcpy(sums + h * stride + g * KEPT_GROUP, at, sizeof(float) * KEPT_GROUP / 2);
        }
    }

    template <int H>
    static void attend(const HeadGroup &group, const Records<K> &keys, const Records<F> &values, const float *value_scales,
                       int64_t from, int count, int head, float *out) {
        const int stride = values.features + 2, query_stride = keys.groups * KEPT_GROUP;
        float scores[H * AT_ONCE] = {}, weights[H * AT_ONCE] = {};
        score<H>(keys, from, count, group.rounded + head * query_stride, query_stride, scores);
        for (int h = 0; h < H; ++h) {
            float *most = out + (head + h) * stride, *own = scores + h * AT_ONCE;
            const float unit = group.deltas[head + h] * group.scale;
            float highest = *most;
            for (int t = 0; t < count; ++t) {
                own[t] *= unit;
                if (group.soft_cap != 0) own[t] = group.soft_cap * tanhf(own[t] / group.soft_cap);
                highest = own[t] > highest ? own[t] : highest;
            }
            Step::weigh(own, count, AT_ONCE, highest, most, values.features);
        }
        for (int g = 0; g < values.groups; ++g) {
            const float *scales = value_scales + g * AT_ONCE;
            for (int h = 0; h < H; ++h)
                for (int t = 0; t < AT_ONCE; t += S::LANES)
                    S::store(weights + h * AT_ONCE + t, S::mul(S::load(scores + h * AT_ONCE + t), S::load(scales + t)));
            float *sums = out + head * stride + 2;
            constexpr int FEW = H < SUMMED_HEADS ? H : SUMMED_HEADS;
            for (int h = 0; h + FEW <= H; h += FEW)
                accumulate<FEW>(values, from, count, g, weights + h * AT_ONCE, sums + h * stride, stride);
            if constexpr (H % FEW)
                accumulate<H % FEW>(values, from, count, g, weights + (H - H % FEW) * AT_ONCE,
                                    sums + (H - H % FEW) * stride, stride);
        }
    }

    static void run(const HeadGroup &group, int64_t first, int64_t count, float *out) {
        const Records<K> keys(group.keys, group.key_features, first);
        const Records<F> values(group.values, group.value_features, first);
        Step::begin(out, group.num_queries, values.features);
        float scales[KEPT_GROUPS * AT_ONCE] = {};
        for (int64_t from = 0; from < count; from += AT_ONCE) {
            const int now = (int)(count - from < AT_ONCE ? count - from : AT_ONCE);
            for (int g = 0; g < values.groups; ++g)
                for (int t = 0; t < now; ++t) scales[g * AT_ONCE + t] = values.scale(from + t, g);
            int head = 0;
            for (; head + 4 <= group.num_queries; head += 4) attend<4>(group, keys, values, scales, from, now, head, out);
            switch (group.num_queries - head) {
            case 3: attend<3>(group, keys, values, scales, from, now, head, out); break;
            case 2: attend<2>(group, keys, values, scales, from, now, head, out); break;
            case 1: attend<1>(group, keys, values, scales, from, now, head, out); break;
            }
        }
    }
};

template <class S> void attend_any(const HeadGroup &group, int64_t first, int64_t count, float *out) {
    using Step = StepArithmetic<S>;
    if (group.format == KEPT_INT8) KeptArithmetic<S, KeptInt8<S>>::run(group, first, count, out);
    else if (group.format == KEPT_INT4) KeptArithmetic<S, KeptInt4<S>>::run(group, first, count, out);
    else if (group.dtype == FLOAT32) Step::template attend<float>(group, first, count, out);
    else if (group.dtype == BFLOAT16) Step::template attend<BFloat16>(group, first, count, out);
    else Step::template attend<Float16>(group, first, count, out);
}
