/* Runs a step program: a decode step of a model as instructions over fixed addresses, in one call until an expert is
 * missing or an instruction is torch's.
 *
 * Matrices, norms and experts are the kernels of _cpu.cpp. Knows nothing of Python, torch or models.
 */
#include <math.h>
#include <time.h>

#include <vector>

#include "_cpu.h"
#include "_cpu_threads.h"
#include "_experts.h"

using namespace moeflow;

namespace {

constexpr int64_t DONE = -1, FAILED = -2; /* FAILED - i: instruction i */
constexpr int64_t NO_MEMORY = INT64_MIN;
constexpr int BLOCK = 512;                /* values that are computed at a time */
constexpr int64_t POSITIONS_AT_ONCE = 512; /* of a piece of attention: the same for any number of threads */
constexpr int64_t SERIAL_POSITIONS = 1 << 14; /* times features, under which waking threads takes longer */
constexpr int SUM_LANES = 8;

int64_t width(int64_t dtype) {
    constexpr int64_t WIDTHS[] = {4, 2, 2, 8, 1};
    return WIDTHS[dtype];
}
bool is_float(int64_t dtype) { return dtype <= STEP_FLOAT16; }

void load(const Tensor &t, int64_t offset, int64_t stride, int n, float *to) {
    const char *from = t.data + offset * width(t.dtype);
    if (is_float(t.dtype)) {
        const Arithmetic &arithmetic = chosen_arithmetic();
        if (stride == 1) return arithmetic.convert(from, (int)t.dtype, n, to, n);
        const int64_t step = stride * width(t.dtype);
        if (stride == 0) {
            arithmetic.convert(from, (int)t.dtype, 1, to, 1);
            for (int i = 1; i < n; ++i) to[i] = to[0];
        } else
            for (int i = 0; i < n; ++i) arithmetic.convert(from + i * step, (int)t.dtype, 1, to + i, 1);
    } else if (t.dtype == STEP_INT64)
        for (int i = 0; i < n; ++i) to[i] = (float)((const int64_t *)from)[i * stride];
    else
        for (int i = 0; i < n; ++i) to[i] = (float)((const uint8_t *)from)[i * stride];
}
void store(const Tensor &t, int64_t offset, int64_t stride, int n, const float *from) {
    char *to = t.data + offset * width(t.dtype);
    if (is_float(t.dtype)) {
        const Arithmetic &arithmetic = chosen_arithmetic();
        if (stride == 1) return arithmetic.store(from, to, n, (int)t.dtype);
        for (int i = 0; i < n; ++i) arithmetic.store(from + i, to + i * stride * width(t.dtype), 1, (int)t.dtype);
    } else if (t.dtype == STEP_INT64)
        for (int i = 0; i < n; ++i) ((int64_t *)to)[i * stride] = (int64_t)from[i];
    else
        for (int i = 0; i < n; ++i) ((uint8_t *)to)[i * stride] = from[i] != 0;
}
void copy_exactly(const Tensor &out, int64_t to, int64_t to_stride, const Tensor &in, int64_t from,
                  int64_t from_stride, int64_t n) {
    const int64_t bytes = width(out.dtype);
    char *target = out.data + to * bytes;
    const char *source = in.data + from * bytes;
    if (to_stride == 1 && from_stride == 1) memcpy(target, source, n * bytes);
    else
        for (int64_t i = 0; i < n; ++i) memcpy(target + i * to_stride * bytes, source + i * from_stride * bytes, bytes);
}

/* Calls run(offsets of each tensor) for every row along the last dimension; all have the sizes of the first. */
template <class Run> void for_each_row(const Tensor *tensors, int count, const Run &run) {
    const Tensor &out = tensors[0];
    int64_t at[MAX_DIMS] = {}, offsets[4] = {}, rows = 1;
    for (int d = 0; d + 1 < out.dims; ++d) rows *= out.sizes[d];
    for (int64_t row = 0; row < rows; ++row) {
        run(offsets);
        for (int d = (int)out.dims - 2; d >= 0; --d) {
            for (int i = 0; i < count; ++i) offsets[i] += tensors[i].strides[d];
            if (++at[d] < out.sizes[d]) break;
            for (int i = 0; i < count; ++i) offsets[i] -= tensors[i].strides[d] * out.sizes[d];
            at[d] = 0;
        }
    }
}

/* whole: op, what b is (0 nothing, 1 a tensor, 2 a number behind, 3 a number before); real: the number, b's factor. */
void pointwise(const Instruction &it) {
    const Tensor *t = it.tensors, &out = t[0];
    const int op = (int)it.whole[0], second = (int)it.whole[1], count = (int)it.num_tensors, last = (int)out.dims - 1;
    const int64_t n = out.sizes[last];
    const auto stride = [&](int i) { return t[i].strides[last]; };
    const Arithmetic &arithmetic = chosen_arithmetic();
    for_each_row(t, count, [&](const int64_t *offsets) {
        if (op == POINT_COPY && t[1].dtype == out.dtype)
            return copy_exactly(out, offsets[0], stride(0), t[1], offsets[1], stride(1), n);
        float a[BLOCK], b[BLOCK], c[BLOCK];
        for (int64_t from = 0; from < n; from += BLOCK) {
            const int now = (int)(n - from < BLOCK ? n - from : BLOCK);
            const auto read = [&](int i, float *to) { load(t[i], offsets[i] + from * stride(i), stride(i), now, to); };
            read(1, a);
            float *result = a;
            if (op == POINT_WHERE) {
                read(2, b), read(3, c);
                for (int i = 0; i < now; ++i) a[i] = a[i] != 0 ? b[i] : c[i];
            } else {
                if (second == 1) read(2, b);
                else if (second)
                    for (int i = 0; i < now; ++i) b[i] = (float)it.real[0];
                if (it.real[1] != 1)
                    for (int i = 0; i < now; ++i) b[i] *= (float)it.real[1];
                if (second == 3) arithmetic.pointwise(op, now, b, a), result = b;
                else arithmetic.pointwise(op, now, a, b);
            }
            store(out, offsets[0] + from * stride(0), stride(0), now, result);
        }
    });
}

/* ---- Rows of contiguous tensors ---- */

struct RowsOf {
    int64_t count, length;
    explicit RowsOf(const Tensor &t) : count(1), length(t.sizes[t.dims - 1]) {
        for (int d = 0; d + 1 < t.dims; ++d) count *= t.sizes[d];
    }
};

thread_local std::vector<float> row_memory;
float *memory_of(int64_t num_floats) {
    if ((int64_t)row_memory.size() < num_floats) row_memory.resize(num_floats);
    return row_memory.data();
}

void softmax(const Instruction &it) {
    const Tensor &out = it.tensors[0], &in = it.tensors[1];
    const RowsOf rows(in);
    float *x = memory_of(rows.length);
    for (int64_t r = 0; r < rows.count; ++r) {
        load(in, r * rows.length, 1, (int)rows.length, x);
        float most = -INFINITY, total = 0;
        for (int64_t i = 0; i < rows.length; ++i) most = x[i] > most ? x[i] : most;
        for (int64_t i = 0; i < rows.length; ++i) total += x[i] = expf(x[i] - most);
        for (int64_t i = 0; i < rows.length; ++i) x[i] /= total;
        store(out, r * rows.length, 1, (int)rows.length, x);
    }
}

/* Values in falling order and where they were; of equal ones the first is first. */
void top_k(const Instruction &it) {
    constexpr float TAKEN = -INFINITY; /* what a mask has put there may still be chosen, once */
    const Tensor &out = it.tensors[0], &in = it.tensors[1], &index = it.tensors[2];
    const RowsOf rows(in), chosen(out);
    float *x = memory_of(rows.length + chosen.length), *best = x + rows.length;
    for (int64_t r = 0; r < rows.count; ++r) {
        int64_t *at = (int64_t *)index.data + r * chosen.length;
        const auto is_taken = [&](int64_t i, int64_t k) {
            for (int64_t j = 0; j < k; ++j)
                if (at[j] == i) return true;
            return false;
        };
        load(in, r * rows.length, 1, (int)rows.length, x);
        for (int64_t k = 0; k < chosen.length; ++k) {
            int64_t most = -1;
            for (int64_t i = 0; i < rows.length; ++i)
                if ((most < 0 || x[i] > x[most]) && !(x[i] == TAKEN && is_taken(i, k))) most = i;
            at[k] = most, best[k] = x[most], x[most] = TAKEN;
        }
        store(out, r * chosen.length, 1, (int)chosen.length, best);
    }
}

void reduce(const Instruction &it) {
    const Tensor &out = it.tensors[0], &in = it.tensors[1];
    const RowsOf rows(in);
    float *x = memory_of(rows.length);
    for (int64_t r = 0; r < rows.count; ++r) {
        load(in, r * rows.length, 1, (int)rows.length, x);
        float total = it.whole[0] <= REDUCE_MEAN ? 0 : x[0];
        for (int64_t i = 0; i < rows.length; ++i)
            switch (it.whole[0]) {
            case REDUCE_MAX: total = x[i] > total ? x[i] : total; break;
            case REDUCE_MIN: total = x[i] < total ? x[i] : total; break;
            default: total += x[i];
            }
        if (it.whole[0] == REDUCE_MEAN) total /= (float)rows.length;
        store(out, r, 1, 1, &total);
    }
}

/* out[r, j] = in[r, index[r, j]] */
bool gather(const Instruction &it) {
    const Tensor &out = it.tensors[0], &in = it.tensors[1], &index = it.tensors[2];
    const RowsOf rows(in), chosen(out);
    for (int64_t r = 0; r < chosen.count; ++r)
        for (int64_t j = 0; j < chosen.length; ++j) {
            const int64_t at = ((const int64_t *)index.data)[r * chosen.length + j];
            if (at < 0 || at >= rows.length) return false;
            copy_exactly(out, r * chosen.length + j, 1, in, r * rows.length + at, 1, 1);
        }
    return true;
}

/* out[r, index[r, j]] = values[r, j]; the values may be one number */
bool scatter(const Instruction &it) {
    const Tensor &out = it.tensors[0], &index = it.tensors[1], &values = it.tensors[2];
    const RowsOf rows(out), chosen(index);
    const int64_t step = values.strides[values.dims - 1] ? 1 : 0;
    for (int64_t r = 0; r < chosen.count; ++r)
        for (int64_t j = 0; j < chosen.length; ++j) {
            const int64_t at = ((const int64_t *)index.data)[r * chosen.length + j];
            if (at < 0 || at >= rows.length) return false;
            copy_exactly(out, r * rows.length + at, 1, values, (r * chosen.length + j) * step, 1, 1);
        }
    return true;
}

/* A matrix [num_rows, features] in GGML's blocks, where an instruction names their format. */
Matrix blocks_of(const Tensor &table, int format, int64_t features) {
    Matrix m{};
    m.codes = (int64_t)table.data, m.scale = m.zero = m.bias = -1, m.format = format;
    m.num_rows = (int32_t)table.sizes[0], m.in_features = m.padded = (int32_t)features;
    return m;
}

/* out[i] = table[ids[i]], whole rows. whole: the format of blocks. tensors: out, ids, and the table: its floats, its
 * blocks, or codes, tops and escapes. */
bool rows_of_table(const Instruction &it) {
    const Tensor &out = it.tensors[0], &ids = it.tensors[1], &table = it.tensors[2];
    const RowsOf rows(out);
    if (it.whole[0]) {
        const Matrix m = blocks_of(table, (int)it.whole[0], rows.length);
        return !moeflow_cpu_block_rows(&m, (const int64_t *)ids.data, rows.count, (char *)out.data, (int)out.dtype);
    }
    if (it.num_tensors == 5)
        return !moeflow_lossless_rows((const uint8_t *)table.data, (const uint16_t *)it.tensors[3].data,
                                      (const uint8_t *)it.tensors[4].data, it.tensors[4].sizes[0] / 5, table.sizes[0],
                                      rows.length, (const int64_t *)ids.data, rows.count, (uint16_t *)out.data);
    for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t at = ((const int64_t *)ids.data)[r];
        if (at < 0 || at >= table.sizes[0]) return false;
        copy_exactly(out, r * rows.length, 1, table, at * rows.length, 1, rows.length);
    }
    return true;
}

/* ---- Matrices and experts ---- */

/* whole: matrices; tensors that each has: its floats or blocks, or codes, tops and escapes; and the formats of blocks,
 * a byte each. Activations of half precision are rounded where they meet blocks, as blocks.py does. tensors: an out, x, the matrices,
 * part by part, their biases if there are any, and the further outs. */
bool linear(const Instruction &it, const StepState &state) {
    const Tensor &x = it.tensors[1];
    const RowsOf rows(x);
    const int count = (int)it.whole[0], parts = (int)it.whole[1];
    const bool has_bias = it.num_tensors > (parts + 1) * count + 1;
    Matrix matrices[LINEARS_AT_ONCE] = {};
    void *outs[LINEARS_AT_ONCE];
    if (count < 1 || count > LINEARS_AT_ONCE) return false;
    for (int i = 0; i < count; ++i) {
        const Tensor &weight = it.tensors[2 + i];
        Matrix &m = matrices[i] = blocks_of(weight, (int)(it.whole[2] >> 8 * i & 255), rows.length);
        if (!it.whole[2]) m.format = (int32_t)weight.dtype, m.group_size = m.padded;
        if (has_bias) {
            const Tensor &bias = it.tensors[2 + parts * count + i];
            m.bias = (int64_t)bias.data, m.bias_format = (int32_t)bias.dtype;
        }
        if (parts == 3) {
            const Tensor &escapes = it.tensors[2 + 2 * count + i];
            m.format = LOSSLESS;
            m.scale = (int64_t)it.tensors[2 + count + i].data, m.zero = (int64_t)escapes.data;
            m.group_size = m.padded = (int32_t)((rows.length + 63) / 64 * 64);
            m.num_escapes = (int32_t)(escapes.sizes[0] / 5);
        }
        outs[i] = it.tensors[i ? it.num_tensors - count + i : 0].data;
    }
    const bool is_of_rows = x.sizes[0] == state.num_rows;
    const int activation_bits = it.whole[2] && x.dtype != STEP_FLOAT32 ? 16 : 0;
    return !moeflow_cpu_linears(matrices, count, nullptr, x.data, (int)x.dtype, rows.length * width(x.dtype),
                                is_of_rows ? rows.count / state.num_rows * state.num_live : rows.count, outs,
                                activation_bits, (int)state.num_threads);
}

bool norm_of(const Tensor &out, const Tensor &x, const Tensor &weight, double eps) {
    const RowsOf rows(x);
    return !moeflow_cpu_rms_norm(x.data, rows.length * width(x.dtype), weight.data, (float)eps, rows.count,
                                 rows.length, out.data, (int)x.dtype, SUM_LANES);
}
bool rms_norm(const Instruction &it) { return norm_of(it.tensors[0], it.tensors[1], it.tensors[2], it.real[0]); }

/* a + b, and its norm. tensors: sum, a, b, weight, norm; all are contiguous and of one dtype. */
bool add_norm(const Instruction &it) {
    const Tensor &sum = it.tensors[0];
    const Arithmetic &arithmetic = chosen_arithmetic();
    const RowsOf rows(sum);
    float a[BLOCK], b[BLOCK];
    for (int64_t from = 0, n = rows.count * rows.length; from < n; from += BLOCK) {
        const int now = (int)(n - from < BLOCK ? n - from : BLOCK);
        load(it.tensors[1], from, 1, now, a), load(it.tensors[2], from, 1, now, b);
        arithmetic.pointwise(POINT_ADD, now, a, b);
        store(sum, from, 1, now, a);
    }
    return norm_of(it.tensors[4], sum, it.tensors[3], it.real[0]);
}

/* Turns the two halves of each head: x * cos + (-second half, first half) * sin, each product rounded as torch does.
 * tensors: out, x, cos, sin, all of one dtype, and at most BLOCK features a head. */
void rope(const Instruction &it) {
    const Tensor *t = it.tensors;
    const Arithmetic &arithmetic = chosen_arithmetic();
    const int last = (int)t->dims - 1, n = (int)t->sizes[last], half = n / 2, dtype = (int)t->dtype;
    const auto round = [&](float *values) {
        char rounded[BLOCK * sizeof(float)];
        if (dtype == STEP_FLOAT32) return;
        arithmetic.store(values, rounded, n, dtype);
        arithmetic.convert(rounded, dtype, n, values, n);
    };
    for_each_row(t, 4, [&](const int64_t *offsets) {
        float x[BLOCK], turned[BLOCK], factors[BLOCK];
        load(t[1], offsets[1], t[1].strides[last], n, x);
        for (int i = 0; i < half; ++i) turned[i] = -x[half + i], turned[half + i] = x[i];
        load(t[2], offsets[2], t[2].strides[last], n, factors);
        arithmetic.pointwise(POINT_MUL, n, x, factors), round(x);
        load(t[3], offsets[3], t[3].strides[last], n, factors);
        arithmetic.pointwise(POINT_MUL, n, turned, factors), round(turned);
        arithmetic.pointwise(POINT_ADD, n, x, turned);
        store(t[0], offsets[0], t[0].strides[last], n, x);
    });
}

enum Outcome { RAN, MISSED, BROKEN };

Outcome experts(const Instruction &it, const StepState &state) {
    const Tensor &out = it.tensors[0], &x = it.tensors[1], &index = it.tensors[2], &weights = it.tensors[3];
    const StepLayer &layer = state.layers[it.whole[0]];
    const int64_t top = index.sizes[1], *chosen = (const int64_t *)index.data;
    if (!layer.addresses) return MISSED;
    for (int64_t i = 0; i < state.num_live * top; ++i)
        if (chosen[i] < 0 || chosen[i] >= layer.num_experts) return MISSED;
    const LayerCall call{(const Expert *const *)layer.kernels, layer.addresses, layer.num_experts, chosen,
                         weights.data, (int)weights.dtype, x.data, (int)x.dtype, state.num_live, top, x.sizes[1],
                         out.data, (int)layer.activation_bits, (int)state.num_threads};
    switch (run_layer(call)) {
    case LAYER_DONE: return RAN;
    case LAYER_MISSING: return MISSED;
    default: return BROKEN;
    }
}

#include "_step_kept.h"

/* ---- Attention of one new position a sequence ----
 * whole: number among the layers that keep positions, window, chunk (0: none); real: scale, soft cap (0: none).
 * tensors: out [rows, 1, heads, V], queries [rows, heads, 1, D], keys [rows, groups, 1, D], values, and sinks [heads]. */

thread_local std::vector<float> attention_memory;

void attend(const Instruction &it, const StepState &state) {
    const Tensor &out = it.tensors[0], &q = it.tensors[1], &k = it.tensors[2], &v = it.tensors[3];
    const Tensor *sinks = it.num_tensors > 4 ? &it.tensors[4] : nullptr;
    const Arithmetic &arithmetic = chosen_arithmetic();
    const int64_t rows = state.num_live, heads = q.sizes[1], features = q.sizes[3], groups = k.sizes[1];
    const int64_t out_features = v.sizes[3], queries = heads / groups, bytes = width(k.dtype);
    const int format = (int)state.kept_format;
    const int64_t key_bytes = format ? record_bytes((int)features, 8) : features * bytes;
    const int64_t value_bytes = format ? record_bytes((int)out_features, value_bits(format)) : out_features * bytes;
    const int64_t window = it.whole[1], chunk = it.whole[2], stride = out_features + 2;
    const KeptPositions *kept = state.kept + it.whole[0] * state.num_rows;

    struct Piece {
        int64_t row, group, first, count;
    };
    std::vector<Piece> pieces;
    int64_t positions = 0;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t now = state.lengths[row], length = now + 1;
        int64_t first = state.firsts[row];
        if (window && length - window > first) first = length - window;
        if (chunk && now / chunk * chunk > first) first = now / chunk * chunk;
        for (int64_t group = 0; group < groups; ++group) {
            const KeptPositions &to = kept[row];
            const auto keep = [&](char *memory, const Tensor &t, int64_t count, int64_t kept_bytes, int bits) {
                Tensor target = t;
                target.data = memory + (group * to.capacity + now) * kept_bytes;
                const int64_t from = row * t.strides[0] + group * t.strides[1];
                if (!format) return copy_exactly(target, 0, 1, t, from, t.strides[3], count);
                float *x = memory_of(count);
                load(t, from, t.strides[3], (int)count, x);
                encode(x, (int)count, bits, (uint8_t *)target.data);
            };
            keep(to.keys, k, features, key_bytes, 8), keep(to.values, v, out_features, value_bytes, value_bits(format));
            for (int64_t from = first / POSITIONS_AT_ONCE * POSITIONS_AT_ONCE; from < length; from += POSITIONS_AT_ONCE) {
                const int64_t begin = from > first ? from : first;
                const int64_t end = from + POSITIONS_AT_ONCE < length ? from + POSITIONS_AT_ONCE : length;
                pieces.push_back({row, group, begin, end - begin});
            }
        }
        positions += length - first;
    }
    const int64_t query_floats = rows * heads * features;
    const int64_t needed = query_floats + (int64_t)pieces.size() * queries * stride + out_features;
    if ((int64_t)attention_memory.size() < needed) attention_memory.resize(needed + needed / 2);
    float *query = attention_memory.data(), *partial = query + query_floats;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t h = 0; h < heads; ++h)
            load(q, row * q.strides[0] + h * q.strides[1], q.strides[3], (int)features,
                 query + (row * heads + h) * features);
    const int64_t query_stride = kept_groups((int)features) * KEPT_GROUP;
    if (format) round_queries(query, rows * heads, (int)features);
    const int16_t *rounded = rounded_queries.data(); /* of this thread, which others read */
    const float *deltas = query_deltas.data();
    const bool is_small = positions * heads * features < SERIAL_POSITIONS;
    in_parallel(is_small ? 1 : (int)state.num_threads, [&](Team &team) {
        team.share((int64_t)pieces.size(), [&](int64_t i, int) {
            const Piece &piece = pieces[i];
            const KeptPositions &at = kept[piece.row];
            const int64_t head = piece.row * heads + piece.group * queries;
            const HeadGroup group{at.keys + piece.group * at.capacity * key_bytes,
                                  at.values + piece.group * at.capacity * value_bytes,
                                  query + head * features,
                                  features,
                                  out_features,
                                  (int)queries,
                                  (int)k.dtype,
                                  (float)it.real[0],
                                  (float)it.real[1],
                                  format,
                                  rounded + head * query_stride,
                                  deltas + head};
            arithmetic.attend(group, piece.first, piece.count, partial + i * queries * stride);
        });
    });
    float *result = partial + (int64_t)pieces.size() * queries * stride;
    size_t i = 0;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t group = 0; group < groups; ++group) {
            size_t end = i;
            while (end < pieces.size() && pieces[end].row == row && pieces[end].group == group) ++end;
            for (int64_t h = 0; h < queries; ++h) {
                const int64_t head = group * queries + h;
                float most = -INFINITY, total = 0, sink = 0;
                if (sinks) load(*sinks, head * sinks->strides[0], 1, 1, &sink), most = sink;
                for (size_t p = i; p < end; ++p) {
                    const float *from = partial + (p * queries + h) * stride;
                    most = from[0] > most ? from[0] : most;
                }
                if (sinks) total = expf(sink - most);
                for (int64_t f = 0; f < out_features; ++f) result[f] = 0;
                for (size_t p = i; p < end; ++p) {
                    const float *from = partial + (p * queries + h) * stride, factor = expf(from[0] - most);
                    total += factor * from[1];
                    for (int64_t f = 0; f < out_features; ++f) result[f] += factor * from[2 + f];
                }
                for (int64_t f = 0; f < out_features; ++f) result[f] /= total;
                store(out, (row * heads + head) * out_features, 1, (int)out_features, result);
            }
            i = end;
        }
}

#include "_step_latent.h"

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int64_t run(const Instruction *const *instructions, int64_t count, int64_t first, const StepState *state) {
    double begin = state->seconds ? now() : 0;
    for (int64_t i = first; i < count; ++i) {
        const Instruction &it = *instructions[i];
        bool ran = true;
        switch (it.kind) {
        case STEP_LINEAR: ran = linear(it, *state); break;
        case STEP_RMS_NORM: ran = rms_norm(it); break;
        case STEP_ADD_NORM: ran = add_norm(it); break;
        case STEP_ROPE: rope(it); break;
        case STEP_EXPERTS:
            switch (experts(it, *state)) {
            case MISSED: return i;
            case BROKEN: return FAILED - i;
            case RAN: break;
            }
            break;
        case STEP_ATTEND: attend(it, *state); break;
        case STEP_ATTEND_LATENT: attend_latent(it, *state); break;
        case STEP_POINTWISE: pointwise(it); break;
        case STEP_SOFTMAX: softmax(it); break;
        case STEP_TOP_K: top_k(it); break;
        case STEP_REDUCE: reduce(it); break;
        case STEP_GATHER: ran = gather(it); break;
        case STEP_SCATTER: ran = scatter(it); break;
        case STEP_ROWS: ran = rows_of_table(it); break;
        default: return i;
        }
        if (!ran) return FAILED - i;
        if (state->seconds) {
            const double end = now();
            state->seconds[it.kind] += end - begin;
            begin = end;
        }
    }
    *state->is_done = 1;
    return DONE;
}

} // namespace

/* Runs instructions from `first` on, all with the same threads. Returns -1 where all are done, the number of the one that
 * the caller must run, or -2 - i where instruction i failed: an index out of its table; or the least number where there
 * is no memory. */
EXPORTED int64_t moeflow_step_run(const Instruction *const *instructions, int64_t count, int64_t first,
                                  const StepState *state) {
    int64_t reached = DONE;
    in_parallel((int)state->num_threads, [&](Team &) {
        try {
            reached = run(instructions, count, first, state);
        } catch (const std::exception &) { /* of the vectors: no memory */
            reached = NO_MEMORY;
        }
    });
    return reached;
}
