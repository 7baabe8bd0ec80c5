/* The arithmetic, once for every instruction set: S is one of them (_cpu_avx2.h).
 *
 * An output is one sum over k in float32, in lanes: lane l adds the products l, l + LANES, ... in rising k, and the
 * lanes are added last. Nothing else enters, so its bits do not depend on which rows, tokens or threads share the work.
 * In coded formats the lanes of one group are summed first, then scaled. Many tokens of coded formats are multiplied
 * with values unpacked to float32 instead; floats come out the same either way.
 *
 * Included inside an unnamed namespace: nothing here may be merged with another instruction set's.
 */

#define UNROLL _Pragma("GCC unroll 8")
/* Up to so many tokens of a matrix its values are unpacked in registers, anew for every four tokens. */
constexpr int FEW_OF_FLOATS = 8, FEW_OF_CODES = 8;
/* How far ahead rows are prefetched: floats, blocks of codes, scales and zeros. */
constexpr int64_t AHEAD_BYTES = 1024, AHEAD_BLOCKS = 64, AHEAD_GRID_BYTES = 128;

/* Activations that are rounded to int16 with one scale; a power of two, for a group never has two then. */
constexpr int ROUNDED_TOGETHER = 128;
constexpr float ROUNDED_MOST = 32767;

inline int sums_slot(int group_size) { return group_size / 64; } /* of 32, 64 and 128: 0, 1 and 2 */

template <class T> inline T least(T a, T b) { return a < b ? a : b; }
inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

#include "_cpu_formats.h"
#include "_cpu_few_tokens.h"
#include "_cpu_many_tokens.h"
#include "_cpu_lossless.h"
#include "_cpu_ggml.h"
#include "_cpu_activations.h"
#include "_cpu_step.h"
#include "_cpu_step_kept.h"
#include "_cpu_step_latent.h"

/* ---- Transposed floats [K, N]: each lane is an output, one chain over k ---- */

template <class S, class E, int T>
inline void columns(const E *w, int num_rows, int in_features, int count, const float *const *x, float *y, int stride) {
    using V = typename S::V;
    for (int t = 0; t < T; ++t) memset(y + t * stride, 0, sizeof(float) * round_up(count, S::LANES));
    for (int k = 0; k < in_features; k += 4) {
        const int depth = least(4, in_features - k);
        const E *from = w + (int64_t)k * num_rows;
        for (int c = 0; c < count; c += S::LANES) {
            const bool is_whole = c + S::LANES <= count;
            V sums[T];
            UNROLL for (int t = 0; t < T; ++t) sums[t] = S::load(y + t * stride + c);
            for (int i = 0; i < depth; ++i) {
                const E *p = from + (int64_t)i * num_rows + c;
                const V v = is_whole ? S::load(p) : load_part<S>(p, count - c);
                UNROLL for (int t = 0; t < T; ++t) sums[t] = S::fma(v, S::all(x[t][k + i]), sums[t]);
            }
            UNROLL for (int t = 0; t < T; ++t) S::store(y + t * stride + c, sums[t]);
        }
    }
}

/* ---- A product of any matrix, with its bias: y[t * stride + r] ---- */

template <class S, class E>
inline void product_of_floats(const Matrix &m, const char *record, int first, int count, const Rows &input,
                              const float *const *x, int num_tokens, bool is_many, float *y, int stride,
                              float *scratch) {
    if (m.is_transposed) {
        const E *w = (const E *)(record + m.codes) + first;
        int t = 0;
        for (; t + 4 <= num_tokens; t += 4)
            columns<S, E, 4>(w, m.num_rows, m.in_features, count, x + t, y + t * stride, stride);
        for (; t < num_tokens; ++t)
            columns<S, E, 1>(w, m.num_rows, m.in_features, count, x + t, y + t * stride, stride);
    } else if (is_many)
        many_tokens<S, FloatUnpack<S, E>>(m, record, first, count, x, num_tokens, y, stride, scratch);
    else few_tokens<FloatTile<S, E>>(m, record, first, count, input, x, num_tokens, y, stride);
}

template <class S, template <class> class F>
inline void product_of_codes(const Matrix &m, const char *record, int first, int count, const Rows &input,
                             const float *const *x, int num_tokens, bool is_many, float *y, int stride,
                             float *scratch) {
    if (is_many)
        return many_tokens<S, CodeUnpack<S, F<S>>>(m, record, first, count, x, num_tokens, y, stride, scratch);
    if constexpr (F<S>::IS_INTEGER)
        if (input.is_rounded)
            return few_tokens<CodeTile<S, F<S>, true>>(m, record, first, count, input, x, num_tokens, y, stride);
    few_tokens<CodeTile<S, F<S>, false>>(m, record, first, count, input, x, num_tokens, y, stride);
}

template <class S, template <class> class F>
inline void product_of_blocks(const Matrix &m, const char *record, int first, int count, const Rows &input,
                              const float *const *x, int num_tokens, bool is_many, float *y, int stride,
                              float *scratch) {
    if (is_many) many_tokens<S, BlockUnpack<S, F<S>>>(m, record, first, count, x, num_tokens, y, stride, scratch);
    else if (input.is_rounded)
        few_tokens<BlockTile<S, F<S>, true>>(m, record, first, count, input, x, num_tokens, y, stride);
    else few_tokens<BlockTile<S, F<S>, false>>(m, record, first, count, input, x, num_tokens, y, stride);
}

template <class S>
__attribute__((noinline)) void product(const Matrix &m, const char *record, int first, int count, const Rows &input,
                    const float *const *x, int num_tokens, int total, float *y, int stride, float *scratch) {
    const bool is_many = total > (m.format <= FLOAT16 || m.format == LOSSLESS ? FEW_OF_FLOATS : FEW_OF_CODES);
#define ARGUMENTS m, record, first, count, input, x, num_tokens, is_many, y, stride, scratch
    switch (m.format) {
    case FLOAT32: product_of_floats<S, float>(ARGUMENTS); break;
    case BFLOAT16: product_of_floats<S, BFloat16>(ARGUMENTS); break;
    case FLOAT16: product_of_floats<S, Float16>(ARGUMENTS); break;
    case INT8: product_of_codes<S, Int8>(ARGUMENTS); break;
    case UINT4: product_of_codes<S, Uint4>(ARGUMENTS); break;
    case UINT3: product_of_codes<S, Uint3>(ARGUMENTS); break;
    case UINT2: product_of_codes<S, Uint2>(ARGUMENTS); break;
    case SIGN1: product_of_codes<S, Sign1>(ARGUMENTS); break;
    case MXFP4: product_of_codes<S, Mxfp4>(ARGUMENTS); break;
    case FP8: product_of_codes<S, Fp8>(ARGUMENTS); break;
    case LOSSLESS:
        if (is_many) many_tokens<S, LosslessUnpack<S>>(m, record, first, count, x, num_tokens, y, stride, scratch);
        else few_tokens<LosslessTile<S>>(m, record, first, count, input, x, num_tokens, y, stride);
        break;
    case BLOCKS_Q8_0: product_of_blocks<S, Q8_0>(ARGUMENTS); break;
    case BLOCKS_Q4_0: product_of_blocks<S, Q4_0>(ARGUMENTS); break;
    case BLOCKS_Q4_1: product_of_blocks<S, Q4_1>(ARGUMENTS); break;
    case BLOCKS_Q5_0: product_of_blocks<S, Q5_0>(ARGUMENTS); break;
    case BLOCKS_Q5_1: product_of_blocks<S, Q5_1>(ARGUMENTS); break;
    case BLOCKS_Q2_K: product_of_blocks<S, Q2K>(ARGUMENTS); break;
    case BLOCKS_Q3_K: product_of_blocks<S, Q3K>(ARGUMENTS); break;
    case BLOCKS_Q4_K: product_of_blocks<S, Q4K>(ARGUMENTS); break;
    case BLOCKS_Q5_K: product_of_blocks<S, Q5K>(ARGUMENTS); break;
    case BLOCKS_Q6_K: product_of_blocks<S, Q6K>(ARGUMENTS); break;
    case BLOCKS_IQ4_NL: product_of_blocks<S, Iq4Nl>(ARGUMENTS); break;
    case BLOCKS_IQ4_XS: product_of_blocks<S, Iq4Xs>(ARGUMENTS); break;
    case BLOCKS_MXFP4: product_of_blocks<S, GgmlMxfp4>(ARGUMENTS); break;
    }
#undef ARGUMENTS
    if (m.bias < 0) return;
    float bias[COLUMNS_AT_ONCE * 2];
    const int bytes = m.bias_format == FLOAT32 ? 4 : 2;
    load_row<S>(record + m.bias + (int64_t)first * bytes, m.bias_format, count, bias);
    for (int t = 0; t < num_tokens; ++t)
        for (int r = 0; r < count; ++r) y[t * stride + r] += bias[r];
}

/* ---- The steps of _cpu.cpp ---- */

inline const float *row_of(const Rows &rows, int64_t row) { return (const float *)(rows.data + row * rows.stride); }

template <class S> struct Steps {
    static void convert(const void *from, int format, int count, float *to, int padded) {
        load_row<S>(from, format, count, to);
        memset(to + count, 0, sizeof(float) * (padded - count));
    }

    /* In lanes, as tile_codes adds them. */
    static void sum_groups(const float *x, int padded, int group_size, float *sums) {
        for (int k = 0; k < padded; k += group_size, sums += S::LANES) {
            auto sum = S::load(x + k);
            for (int i = S::LANES; i < group_size; i += S::LANES) sum = S::add(sum, S::load(x + k + i));
            S::store(sums, sum);
        }
    }
    static void prepare(const Rows &rows, int64_t row) {
        char *data = rows.data + row * rows.stride;
        float *x = (float *)data;
        if (rows.is_rounded) round_row(x, rows.padded, (int16_t *)(data + rows.codes), (float *)(data + rows.deltas));
        if (rows.is_split)
            for (int k = 0; k < rows.padded; k += 32)
                S::split_words((const int16_t *)(data + rows.codes) + k, (int16_t *)(data + rows.split) + k);
        for (int slot = 0; slot < NUM_SUMS; ++slot) {
            if (rows.sums[slot] < 0) continue;
            float *sums = (float *)(data + rows.sums[slot]);
            if (slot >= WHOLE_SUMS) sum_wholly(rows, data, GROUP_OF_SUMS[slot], sums);
            else if (!rows.is_rounded) sum_groups(x, rows.padded, GROUP_OF_SUMS[slot], sums);
            else sum_rounded((const int16_t *)(data + rows.codes), (const float *)(data + rows.deltas), rows.padded,
                             GROUP_OF_SUMS[slot], sums);
        }
    }
    static void round_row(const float *x, int padded, int16_t *codes, float *deltas) {
        using V = typename S::V;
        constexpr int together = ROUNDED_TOGETHER;
        for (int k = 0; k < padded; k += together) {
            V highest = S::zero(), nothing = S::zero();
            for (int i = 0; i < together; i += S::LANES) {
                const V v = S::load(x + k + i);
                highest = S::at_least(S::absolute(v), highest);
                nothing = S::fma(v, S::zero(), nothing); /* NaN where a value is NaN or infinite */
            }
            float lanes[S::LANES], delta = 0;
            S::store(lanes, highest);
            for (const float lane : lanes) delta = lane > delta ? lane : delta;
            delta /= ROUNDED_MOST;
            deltas[k / together] = delta + S::sum(nothing);
            const V inverse = S::all(delta > 1e-38f && delta < 1e38f ? 1 / delta : 0), most = S::all(ROUNDED_MOST);
            for (int i = 0; i < together; i += S::LANES) {
                V v = S::mul(S::load(x + k + i), inverse);
                v = S::at_least(S::at_most(v, most), S::sub(S::zero(), most));
                S::store_words(codes + k + i, S::round(v));
            }
        }
    }
    static void sum_rounded(const int16_t *codes, const float *deltas, int padded, int group_size, float *sums) {
        const auto ones = S::words(S::bytes_one());
        for (int k = 0; k < padded; k += group_size, sums += S::LANES) {
            auto sum = S::none();
            for (int i = 0; i < group_size; i += 32) sum = S::dot(sum, ones, codes + k + i);
            S::store(sums, S::mul(S::to_float(sum), S::all(deltas[k / ROUNDED_TOGETHER])));
        }
    }
    /* Each group to one float. */
    static void sum_wholly(const Rows &rows, const char *data, int group_size, float *sums) {
        const float *x = (const float *)data, *deltas = (const float *)(data + rows.deltas);
        const int16_t *codes = (const int16_t *)(data + rows.codes);
        for (int k = 0; k < rows.num_features; k += 256, sums += SUMS_OF_256)
            for (int i = 0; i < SUMS_OF_256; ++i) {
                const int from = k + i * group_size;
                if (from >= rows.num_features || i * group_size >= 256) sums[i] = 0;
                else if (rows.is_rounded) {
                    int32_t sum = 0;
                    for (int j = 0; j < group_size; ++j) sum += codes[from + j];
                    sums[i] = (float)sum * deltas[from / ROUNDED_TOGETHER];
                } else {
                    auto sum = S::load(x + from);
                    for (int j = S::LANES; j < group_size; j += S::LANES) sum = S::add(sum, S::load(x + from + j));
                    sums[i] = S::sum(sum);
                }
            }
    }

    static void hidden(const Segment &segment, const Rows &input, const Rows &hidden, int first, int count,
                       char *scratch) {
        const Expert &expert = *segment.expert;
        const Activation &activation = expert.activation;
        const int num_tokens = segment.count, stride = 2 * round_up(count, 16), half = stride / 2;
        const float *x[TOKENS_AT_ONCE];
        for (int t = 0; t < num_tokens; ++t) x[t] = row_of(input, segment.input_row + t);
        float *y = (float *)scratch, *rest = y + TOKENS_AT_ONCE * stride;
        const auto run = [&](int row, int num_rows, float *to) {
            product<S>(expert.first, segment.record, row, num_rows, input, x, num_tokens, segment.total, to,
                          stride, rest);
        };
        if (activation.gate == INTERLEAVED) {
            run(2 * first, count, y); /* in halves, for a product takes no more rows at once */
            run(2 * first + count, count, y + count);
            for (int t = 0; t < num_tokens; ++t) {
                float pairs[2 * COLUMNS_AT_ONCE];
                memcpy(pairs, y + t * stride, sizeof(float) * 2 * count);
                for (int r = 0; r < count; ++r)
                    y[t * stride + r] = pairs[2 * r], y[t * stride + half + r] = pairs[2 * r + 1];
            }
        } else {
            run(first, count, y);
            if (activation.gate == CONCATENATED) run(hidden.num_features + first, count, y + half);
        }
        for (int t = 0; t < num_tokens; ++t) {
            const float *gate = y + t * stride, *up = gate + half;
            float *to = (float *)(hidden.data + (segment.hidden_row + t) * hidden.stride) + first;
            for (int r = 0; r < count; r += S::LANES)
                if (const int num = least(S::LANES, count - r); num == S::LANES)
                    S::store(to + r, activate<S>(activation, S::load(gate + r), S::load(up + r)));
                else {
                    const auto g = load_part<S>(gate + r, num), u = load_part<S>(up + r, num);
                    store_part<S>(to + r, activate<S>(activation, g, u), num);
                }
        }
    }

    static void down(const Segment &segment, const Rows &hidden, float *outputs, int64_t out_stride, int first,
                     int count, char *scratch) {
        const int stride = round_up(count, 16);
        const float *x[TOKENS_AT_ONCE];
        for (int t = 0; t < segment.count; ++t) x[t] = row_of(hidden, segment.hidden_row + t);
        float *y = (float *)scratch;
        product<S>(segment.expert->down, segment.record, first, count, hidden, x, segment.count, segment.total, y,
                      stride, y + TOKENS_AT_ONCE * stride);
        for (int t = 0; t < segment.count; ++t)
            memcpy(outputs + segment.places[t] * out_stride + first, y + t * stride, sizeof(float) * count);
    }

    static void down_token(const Segment *segments, int num_experts, const float *weights, const Rows &hidden,
                           void *out, int format, int first, int count, char *scratch) {
        const int stride = round_up(count, 16);
        float *y = (float *)scratch, *total = y + num_experts * stride;
        for (int e = 0; e < num_experts; ++e) {
            const float *x = row_of(hidden, segments[e].hidden_row);
            product<S>(segments[e].expert->down, segments[e].record, first, count, hidden, &x, 1, 1,
                          y + e * stride, stride, total);
        }
        weigh(y, stride, weights, num_experts, count, total);
        store_row<S>(total, out, first, count, format);
    }
    static void weigh(const float *y, int64_t stride, const float *weights, int top_k, int count, float *total) {
        for (int r = 0; r < count; ++r) total[r] = weights[0] * y[r];
        for (int e = 1; e < top_k; ++e)
            for (int r = 0; r < count; ++r) total[r] += weights[e] * y[e * stride + r];
    }
    static void combine(const float *outputs, const float *weights, int top_k, int num_features, void *out,
                        int format) {
        float total[256];
        for (int first = 0; first < num_features; first += 256) {
            const int count = least(256, num_features - first);
            weigh(outputs + first, num_features, weights, top_k, count, total);
            store_row<S>(total, out, first, count, format);
        }
    }

    static void linear(const Matrix &m, const char *record, const Rows &input, int num_tokens, void *out, int format,
                       int first, int count, char *scratch) {
        const int stride = round_up(count, 16);
        float *y = (float *)scratch;
        for (int t = 0; t < num_tokens; t += TOKENS_AT_ONCE) {
            const int now = least(TOKENS_AT_ONCE, num_tokens - t);
            const float *x[TOKENS_AT_ONCE];
            for (int i = 0; i < now; ++i) x[i] = row_of(input, t + i);
            product<S>(m, record, first, count, input, x, now, num_tokens, y, stride,
                          y + TOKENS_AT_ONCE * stride);
            for (int i = 0; i < now; ++i)
                store_row<S>(y + i * stride, out, (int64_t)(t + i) * m.num_rows + first, count, format);
        }
    }

    static void unpack(const Matrix &m, const char *record, int64_t row, int k, int count, float *to) {
        switch (m.format) {
        case BLOCKS_Q8_0: BlockUnpack<S, Q8_0<S>>::run(m, record, row, k, count, to); break;
        case BLOCKS_Q4_0: BlockUnpack<S, Q4_0<S>>::run(m, record, row, k, count, to); break;
        case BLOCKS_Q4_1: BlockUnpack<S, Q4_1<S>>::run(m, record, row, k, count, to); break;
        case BLOCKS_Q5_0: BlockUnpack<S, Q5_0<S>>::run(m, record, row, k, count, to); break;
        case BLOCKS_Q5_1: BlockUnpack<S, Q5_1<S>>::run(m, record, row, k, count, to); break;
        case BLOCKS_Q2_K: BlockUnpack<S, Q2K<S>>::run(m, record, row, k, count, to); break;
        case BLOCKS_Q3_K: BlockUnpack<S, Q3K<S>>::run(m, record, row, k, count, to); break;
        case BLOCKS_Q4_K: BlockUnpack<S, Q4K<S>>::run(m, record, row, k, count, to); break;
        case BLOCKS_Q5_K: BlockUnpack<S, Q5K<S>>::run(m, record, row, k, count, to); break;
        case BLOCKS_Q6_K: BlockUnpack<S, Q6K<S>>::run(m, record, row, k, count, to); break;
        case BLOCKS_IQ4_NL: BlockUnpack<S, Iq4Nl<S>>::run(m, record, row, k, count, to); break;
        case BLOCKS_IQ4_XS: BlockUnpack<S, Iq4Xs<S>>::run(m, record, row, k, count, to); break;
        case BLOCKS_MXFP4: BlockUnpack<S, GgmlMxfp4<S>>::run(m, record, row, k, count, to); break;
        }
    }

    /* torch's order of a sum along a row, in vectors of sum_lanes: four chains, each cascaded every 2^power steps. */
    static void add_row(const float *x, int lanes, int count, float *total) {
        float chains[4][4][16] = {}; /* level, chain, lane */
        const int steps = count / 4;
        int power = 0;
        while ((1 << power) < steps) ++power;
        power = power / 4 > 4 ? power / 4 : 4;
        int i = 0;
        const int length = 1 << power, mask = length - 1;
        for (; i + length <= steps;) {
            for (int j = 0; j < length; ++j, ++i)
                for (int c = 0; c < 4; ++c)
                    for (int l = 0; l < lanes; ++l) chains[0][c][l] += x[(i * 4 + c) * lanes + l];
            for (int level = 1; level < 4; ++level) {
                for (int c = 0; c < 4; ++c)
                    for (int l = 0; l < lanes; ++l)
                        chains[level][c][l] += chains[level - 1][c][l], chains[level - 1][c][l] = 0;
                if (i & (mask << (level * power))) break;
            }
        }
        for (; i < steps; ++i)
            for (int c = 0; c < 4; ++c)
                for (int l = 0; l < lanes; ++l) chains[0][c][l] += x[(i * 4 + c) * lanes + l];
        for (int level = 1; level < 4; ++level)
            for (int c = 0; c < 4; ++c)
                for (int l = 0; l < lanes; ++l) chains[0][c][l] += chains[level][c][l];
        for (int n = steps * 4; n < count; ++n)
            for (int l = 0; l < lanes; ++l) chains[0][0][l] += x[n * lanes + l];
        for (int c = 1; c < 4; ++c)
            for (int l = 0; l < lanes; ++l) chains[0][0][l] += chains[0][c][l];
        memcpy(total, chains[0][0], sizeof(float) * lanes);
    }
    static void rms_norm(const void *x, const void *weight, float eps, int count, void *out, int format,
                         int sum_lanes, char *scratch) {
        float *values = (float *)scratch, *squares = values + round_up(count, 16), *scales = squares + round_up(count, 16);
        load_row<S>(x, format, count, values);
        load_row<S>(weight, format, count, scales);
        for (int i = 0; i < count; ++i) squares[i] = values[i] * values[i];
        float lanes[16], total = 0;
        const int whole = count / sum_lanes;
        add_row(squares, sum_lanes, whole, lanes);
        for (int i = whole * sum_lanes; i < count; ++i) total += squares[i];
        for (int l = 0; l < sum_lanes; ++l) total += lanes[l];
        const float factor = 1 / sqrtf(total / count + eps);
        for (int i = 0; i < count; ++i) values[i] *= factor;
        if (format != FLOAT32) { /* rounded, then multiplied, then rounded */
            store_row<S>(values, squares, 0, count, format);
            load_row<S>(squares, format, count, values);
        }
        for (int i = 0; i < count; ++i) values[i] *= scales[i];
        store_row<S>(values, out, 0, count, format);
    }
};

template <class S> constexpr Arithmetic arithmetic(const char *name) {
    using A = Steps<S>;
    return {name, S::LANES, S::HAS_SPLIT, A::convert, A::prepare, A::hidden, A::down, A::down_token, A::combine,
            A::linear, A::unpack, A::rms_norm, StepArithmetic<S>::store, StepArithmetic<S>::pointwise, attend_any<S>,
            LatentArithmetic<S>::attend_any, LatentArithmetic<S>::absorb_any, LatentArithmetic<S>::expand_any};
}
