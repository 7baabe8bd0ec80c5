/* Routed experts, linears and norms on the CPU: the C ABI that kernels/cpu/ops.py calls by ctypes, and the
 * division of work among threads.
 *
 * The arithmetic is in _cpu_kernels.h, compiled for several instruction sets. Pieces of work are whole outputs, so which
 * thread takes which never shows in a result. Knows nothing of Python, torch or where records come from.
 */
#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif
#include <stdlib.h>

#include "_cpu.h"
#include "_cpu_threads.h"
#include "_experts.h"

using namespace moeflow;

namespace {

const Arithmetic *arithmetic = nullptr;

constexpr int64_t ROWS_OF_ROUND = 2048; /* (token, expert) pairs at a time: bounds the memory */
constexpr int64_t SERIAL_VALUES = 1 << 14; /* weights times tokens, under which waking threads takes longer */

/* The calling thread's memory between calls. */
class Workspace {
  public:
    ~Workspace() { free(data_); }
    char *get(int64_t num_bytes) {
        if (num_bytes > size_) {
            free(data_);
            size_ = (num_bytes + 4095) / 4096 * 4096;
            data_ = (char *)aligned_alloc(64, size_);
            if (!data_) size_ = 0;
        }
        return data_;
    }

  private:
    char *data_ = nullptr;
    int64_t size_ = 0;
};
thread_local Workspace workspace;

int64_t align(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#if defined(__x86_64__) && defined(__GNUC__)
/* Asks the processor itself, and the system whether it keeps the registers: zig's run-time library answers
 * __builtin_cpu_supports with no, whatever the processor has. */
bool supported_x86(bool is_avx512) {
    unsigned int a, b, c, d, leaf7_b, leaf7_c, kept;
    const unsigned int first = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & first) != first) return false;
    if (!__get_cpuid_count(7, 0, &a, &leaf7_b, &leaf7_c, &d) || !(leaf7_b & bit_AVX2)) return false;
    __asm__("xgetbv" : "=a"(kept), "=d"(d) : "c"(0));
    if (!is_avx512) return (kept & 0x06) == 0x06; /* XMM, YMM */
    const unsigned int wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return (kept & 0xe6) == 0xe6 && (leaf7_b & wide) == wide && (leaf7_c & bit_AVX512VNNI); /* and masks, ZMM */
}
#endif

bool supported(const char *name) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (!strcmp(name, "avx2")) return supported_x86(false);
    if (!strcmp(name, "avx512")) return supported_x86(true);
#endif
    return !strcmp(name, "portable");
}

/* What a matrix asks of the rows it is multiplied with. */
void ask(const Matrix &m, bool is_rounded, Rows &rows) {
    const bool has_zeros = m.format == UINT4 || m.format == UINT3 || m.format == UINT2;
    if (has_zeros) rows.sums[m.group_size / 64] = 0;
    switch (m.format) { /* blocks with minima */
    case BLOCKS_Q4_1: case BLOCKS_Q5_1: rows.sums[0] = 0; break;
    case BLOCKS_Q2_K: rows.sums[WHOLE_SUMS] = 0; break;
    case BLOCKS_Q4_K: case BLOCKS_Q5_K: rows.sums[WHOLE_SUMS + 1] = 0;
    }
    if (!is_rounded || m.format <= FLOAT16 || m.format == FP8 || m.format == LOSSLESS) return;
    rows.is_rounded = true;
    switch (m.format) { /* blocks that are bytes in registers first */
    case BLOCKS_Q4_0: case BLOCKS_Q5_0: case BLOCKS_Q2_K: case BLOCKS_Q3_K: case BLOCKS_Q5_K: case BLOCKS_Q6_K:
    case BLOCKS_IQ4_NL: case BLOCKS_IQ4_XS: case BLOCKS_MXFP4: rows.is_split = arithmetic->has_split;
    }
}
Rows no_rows(int num_features) {
    Rows rows{};
    rows.num_features = num_features;
    rows.padded = (int32_t)align(num_features, 128);
    for (int64_t &sums : rows.sums) sums = -1;
    return rows;
}
/* Lays a row out; returns whether there is anything to prepare in it. */
bool lay_out(Rows &rows) {
    rows.stride = 4 * rows.padded;
    bool is_asked = rows.is_rounded;
    for (int slot = 0; slot < NUM_SUMS; ++slot) {
        if (rows.sums[slot] < 0) continue;
        is_asked = true;
        rows.sums[slot] = rows.stride;
        if (slot >= WHOLE_SUMS) rows.stride += 4 * SUMS_OF_256 * align(rows.padded, 256) / 256;
        else rows.stride += 4 * arithmetic->lanes * (rows.padded / GROUP_OF_SUMS[slot]);
    }
    if (rows.is_rounded) {
        rows.codes = rows.stride, rows.split = rows.codes + 2 * rows.padded;
        rows.deltas = rows.is_split ? rows.split + 2 * rows.padded : rows.split;
        rows.stride = rows.deltas + 4 * (rows.padded / 128);
    }
    /* Rows a power of two apart would meet in the same cache sets. */
    rows.stride = align(rows.stride, 128) + 64;
    return is_asked;
}

int64_t bytes_of(int format) { return format == FLOAT32 ? 4 : 2; }
void fill(const Rows &rows, int64_t row, const void *from, int format) {
    arithmetic->convert(from, format, rows.num_features, (float *)(rows.data + row * rows.stride), rows.padded);
}
void clear_padding(const Rows &rows, int64_t row) {
    float *values = (float *)(rows.data + row * rows.stride);
    memset(values + rows.num_features, 0, sizeof(float) * (rows.padded - rows.num_features));
}

/* Long pieces read memory best, but every thread is to have several. */
int rows_at_once(int num_rows, int num_threads) {
    return num_rows >= 2 * num_threads * ROWS_AT_ONCE ? ROWS_AT_ONCE : LEAST_ROWS_AT_ONCE;
}

/* How one call's experts are laid out. */
struct Plan {
    Rows input, hidden;
    bool prepares_input, prepares_hidden;
    int first_at_once, down_at_once;
    int64_t first_pieces, down_pieces; /* of a segment */
    int num_outputs;

    Plan(const Expert *const *experts, int num_experts, bool is_rounded, int num_threads) {
        const Expert &any = *experts[0];
        input = no_rows(any.first.in_features), hidden = no_rows(any.down.in_features);
        bool first_columns = true, down_columns = true;
        for (int e = 0; e < num_experts; ++e) {
            ask(experts[e]->first, is_rounded, input), ask(experts[e]->down, is_rounded, hidden);
            first_columns &= experts[e]->first.is_transposed != 0;
            down_columns &= experts[e]->down.is_transposed != 0;
        }
        prepares_input = lay_out(input), prepares_hidden = lay_out(hidden);
        num_outputs = any.down.num_rows;
        first_at_once = first_columns ? COLUMNS_AT_ONCE : rows_at_once(hidden.num_features, num_threads);
        down_at_once = down_columns ? COLUMNS_AT_ONCE : rows_at_once(num_outputs, num_threads);
        first_pieces = (hidden.num_features + first_at_once - 1) / first_at_once;
        down_pieces = (num_outputs + down_at_once - 1) / down_at_once;
    }
    int threads(int wanted, int64_t num_rows) const {
        return num_rows * input.num_features * hidden.num_features < SERIAL_VALUES ? 1 : wanted;
    }
};

int least(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

/* What the entries return; failure() in ops.py puts it into words. */
enum Status { DONE = LAYER_DONE, NO_MEMORY = LAYER_NO_MEMORY, NO_FIT = LAYER_NO_FIT };

constexpr int64_t MOST_COUNT = INT32_MAX; /* of tokens and features: ints count them further in */

bool is_count(int64_t count) { return count >= 0 && count <= MOST_COUNT; }
bool is_width(int activation_bits) { return activation_bits == 0 || activation_bits == 16; }

/* Whether a matrix lies in memory: without a record its offsets are addresses. */
bool is_there(const Matrix &m, const char *record) { return record || (m.codes && m.scale && m.zero && m.bias); }

/* Whether every expert lies in memory, takes and gives rows of so many features, and has as many between as the first. */
bool fit(const Expert *const *experts, const char *const *records, int num_experts, int64_t num_features) {
    for (int e = 0; e < num_experts; ++e) {
        const Expert *expert = experts[e];
        if (!expert || !records[e] || expert->first.in_features != num_features ||
            expert->down.num_rows != num_features || expert->down.in_features != experts[0]->down.in_features)
            return false;
    }
    return true;
}
/* Whether starts rise within the rows, and every row names a token and a place that are there. */
bool fit_rows(const int64_t *starts, int num_experts, const int64_t *tokens, const int64_t *places, int64_t num_rows,
              int64_t num_tokens, int64_t num_places) {
    if (starts[0] < 0 || starts[num_experts] > num_rows) return false;
    for (int e = 0; e < num_experts; ++e)
        if (starts[e] > starts[e + 1]) return false;
    for (int64_t i = 0; i < num_rows; ++i)
        if (tokens[i] < 0 || tokens[i] >= num_tokens || places[i] < 0 || places[i] >= num_places) return false;
    return true;
}

} // namespace

const Arithmetic &moeflow::chosen_arithmetic() { return *arithmetic; }

/* Chooses the best instruction set from `wanted` down; returns its name. */
EXPORTED const char *moeflow_cpu_use(const char *wanted) {
    bool is_reached = false;
    const Arithmetic *const candidates[] = {AVX512, AVX2, PORTABLE};
    for (const Arithmetic *candidate : candidates) {
        if (!candidate) continue;
        is_reached |= !*wanted || !strcmp(candidate->name, wanted);
        if (is_reached && supported(candidate->name)) return (arithmetic = candidate)->name;
    }
    return (arithmetic = PORTABLE)->name;
}

EXPORTED void moeflow_cpu_openmp(void *parallel, void *thread_num) {
    openmp.parallel = (decltype(openmp.parallel))parallel;
    openmp.thread_num = (decltype(openmp.thread_num))thread_num;
}

/* Writes each expert's outputs for its tokens [num_entries] to their places. hidden_states: [num_tokens, num_features],
 * outputs: [num_places, num_features]. */
EXPORTED int moeflow_cpu_experts(const Expert *const *experts, const char *const *records, const int64_t *starts,
                                 int num_experts, const int64_t *tokens, const int64_t *places, int64_t num_entries,
                                 const char *hidden_states, int format, int64_t num_tokens, int64_t num_features,
                                 float *outputs, int64_t num_places, int activation_bits, int num_threads) {
    if (!is_width(activation_bits) || !fit(experts, records, num_experts, num_features) ||
        !fit_rows(starts, num_experts, tokens, places, num_entries, num_tokens, num_places))
        return NO_FIT;
    const int64_t num_used = starts[num_experts];
    if (!num_used) return DONE;
    if (!hidden_states || !outputs) return NO_FIT;
    Plan plan(experts, num_experts, activation_bits == 16, num_threads);
    const int64_t num_rows = least(num_used, ROWS_OF_ROUND);
    int64_t num_segments = 0;
    for (int e = 0; e < num_experts; ++e)
        num_segments += (starts[e + 1] - starts[e] + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
    const int64_t segments_bytes = align(num_segments * (int64_t)sizeof(Segment), 64);
    char *memory = workspace.get(segments_bytes + num_rows * (plan.input.stride + plan.hidden.stride) +
                                 num_threads * SCRATCH_BYTES);
    if (!memory) return NO_MEMORY;
    Segment *segments = (Segment *)memory;
    plan.input.data = memory + segments_bytes;
    plan.hidden.data = plan.input.data + num_rows * plan.input.stride;
    char *scratch = plan.hidden.data + num_rows * plan.hidden.stride;

    num_segments = 0;
    for (int e = 0; e < num_experts; ++e)
        for (int64_t from = starts[e]; from < starts[e + 1]; from += TOKENS_AT_ONCE) {
            const int count = least(TOKENS_AT_ONCE, starts[e + 1] - from), total = (int)(starts[e + 1] - starts[e]);
            segments[num_segments++] = {experts[e], records[e], tokens + from, places + from, count, total, 0, 0};
        }
    in_parallel(plan.threads(num_threads, num_used), [&](Team &team) {
        const auto own = [&](int thread) { return scratch + thread * SCRATCH_BYTES; };
        for (int64_t begin = 0, end = begin; begin < num_segments; begin = end) {
            int64_t rows = 0;
            for (; end < num_segments && rows + segments[end].count <= num_rows; ++end) rows += segments[end].count;
            team.share(end - begin, [&](int64_t i, int) {
                Segment &segment = segments[begin + i];
                int64_t row = 0;
                for (int64_t before = begin; before < begin + i; ++before) row += segments[before].count;
                segment.input_row = segment.hidden_row = row;
                for (int t = 0; t < segment.count; ++t) {
                    const int64_t offset = segment.tokens[t] * plan.input.num_features * bytes_of(format);
                    fill(plan.input, row + t, hidden_states + offset, format);
                    if (plan.prepares_input) arithmetic->prepare(plan.input, row + t);
                    clear_padding(plan.hidden, row + t);
                }
            });
            team.share((end - begin) * plan.first_pieces, [&](int64_t i, int thread) {
                const int first = (int)(i % plan.first_pieces) * plan.first_at_once;
                arithmetic->hidden(segments[begin + i / plan.first_pieces], plan.input, plan.hidden, first,
                                   least(plan.first_at_once, plan.hidden.num_features - first), own(thread));
            });
            if (plan.prepares_hidden)
                team.share(rows, [&](int64_t row, int) { arithmetic->prepare(plan.hidden, row); });
            team.share((end - begin) * plan.down_pieces, [&](int64_t i, int thread) {
                const int first = (int)(i % plan.down_pieces) * plan.down_at_once;
                arithmetic->down(segments[begin + i / plan.down_pieces], plan.hidden, outputs, plan.num_outputs,
                                 first, least(plan.down_at_once, plan.num_outputs - first), own(thread));
            });
        }
    });
    return DONE;
}

/* One token through its experts, summed by weight: the same bits as moeflow_cpu_experts and moeflow_cpu_combine. */
EXPORTED int moeflow_cpu_token(const Expert *const *experts, const char *const *records, int num_experts,
                               const void *hidden_states, int64_t num_features, const void *weights,
                               int weights_format, void *out, int format, int activation_bits, int num_threads) {
    if (num_experts < 1 || num_experts > TOKEN_EXPERTS || !hidden_states || !weights || !out ||
        !is_width(activation_bits) || !fit(experts, records, num_experts, num_features))
        return NO_FIT;
    Plan plan(experts, num_experts, activation_bits == 16, num_threads);
    char *memory = workspace.get(plan.input.stride + num_experts * plan.hidden.stride + num_threads * SCRATCH_BYTES);
    if (!memory) return NO_MEMORY;
    plan.input.data = memory;
    plan.hidden.data = memory + plan.input.stride;
    char *scratch = plan.hidden.data + num_experts * plan.hidden.stride;
    fill(plan.input, 0, hidden_states, format);
    if (plan.prepares_input) arithmetic->prepare(plan.input, 0);
    float factors[TOKEN_EXPERTS];
    arithmetic->convert(weights, weights_format, num_experts, factors, num_experts);
    Segment segments[TOKEN_EXPERTS];
    for (int e = 0; e < num_experts; ++e) {
        segments[e] = {experts[e], records[e], nullptr, nullptr, 1, 1, 0, e};
        clear_padding(plan.hidden, e);
    }
    in_parallel(plan.threads(num_threads, num_experts), [&](Team &team) {
        const auto own = [&](int thread) { return scratch + thread * SCRATCH_BYTES; };
        team.share(num_experts * plan.first_pieces, [&](int64_t i, int thread) {
            const int first = (int)(i % plan.first_pieces) * plan.first_at_once;
            arithmetic->hidden(segments[i / plan.first_pieces], plan.input, plan.hidden, first,
                               least(plan.first_at_once, plan.hidden.num_features - first), own(thread));
        });
        if (plan.prepares_hidden)
            team.share(num_experts, [&](int64_t e, int) { arithmetic->prepare(plan.hidden, e); });
        team.share(plan.down_pieces, [&](int64_t i, int thread) {
            const int first = (int)i * plan.down_at_once;
            arithmetic->down_token(segments, num_experts, factors, plan.hidden, out, format, first,
                                   least(plan.down_at_once, plan.num_outputs - first), own(thread));
        });
    });
    return DONE;
}

/* Sums float32 outputs [T * K, H] by router weight [T, K], in the order of K, and rounds once; K is 1 or more. */
EXPORTED int moeflow_cpu_combine(const float *outputs, const void *weights, int weights_format, int64_t num_tokens,
                                 int64_t top_k, int64_t num_features, char *out, int format, int num_threads) {
    if (!is_count(num_tokens) || !is_count(top_k) || !is_count(num_features)) return NO_FIT;
    if (num_tokens * num_features == 0) return DONE;
    if (top_k < 1 || num_tokens * top_k > MOST_COUNT || !outputs || !weights || !out) return NO_FIT;
    float *factors = (float *)workspace.get(sizeof(float) * num_tokens * top_k);
    if (!factors) return NO_MEMORY;
    const int num_pairs = (int)(num_tokens * top_k);
    arithmetic->convert(weights, weights_format, num_pairs, factors, num_pairs);
    in_parallel(num_tokens * num_features < SERIAL_VALUES ? 1 : num_threads, [&](Team &team) {
        team.share(num_tokens, [&](int64_t t, int) {
            arithmetic->combine(outputs + t * top_k * num_features, factors + t * top_k, (int)top_k, (int)num_features,
                                out + t * num_features * bytes_of(format), format);
        });
    });
    return DONE;
}

/* A whole layer: x [T, H] to out [T, H] by index [T, K] and weights [T, K]. records: [num_experts], null where an expert
 * is not in memory. asked: [num_experts], the experts asked for, of one token in the order of K, else by number;
 * num_asked: how many. */
EXPORTED int moeflow_cpu_layer(const Expert *const *kernels, const char *const *records, int64_t num_experts,
                               const int64_t *index, const void *weights, int weights_format,
                               const char *hidden_states, int format, int64_t num_tokens, int64_t top_k,
                               int64_t num_features, char *out, int64_t *asked, int64_t *num_asked,
                               int activation_bits, int num_threads) {
    if (!is_count(num_tokens) || !is_count(top_k) || !is_count(num_features) || !is_count(num_experts) ||
        num_tokens * top_k > MOST_COUNT || !num_tokens || !top_k || !num_features || !kernels || !records || !index ||
        !weights || !hidden_states || !out || !asked || !num_asked)
        return NO_FIT;
    const LayerCall call{kernels, records, num_experts, index, weights, weights_format, hidden_states, format,
                         num_tokens, top_k, num_features, out, activation_bits, num_threads};
    const LayerStatus status = run_layer(call);
    if (status != LAYER_DONE) return status;
    *num_asked = (int64_t)layer_memory.asked.size();
    memcpy(asked, layer_memory.asked.data(), sizeof(int64_t) * layer_memory.asked.size());
    return DONE;
}

/* Of each matrix [N, K]: out [T, N] = x [T, K] times the matrix, plus its bias. All have as many in features. */
EXPORTED int moeflow_cpu_linears(const Matrix *matrices, int num_matrices, const char *record, const char *x, int format,
                                 int64_t stride_bytes, int64_t num_tokens, void *const *outs, int activation_bits,
                                 int num_threads) {
    if (!is_count(num_tokens) || !is_width(activation_bits) || num_matrices < 1 || num_matrices > LINEARS_AT_ONCE)
        return NO_FIT;
    if (!num_tokens) return DONE;
    if (!matrices || !x || !outs) return NO_FIT;
    Rows input = no_rows(matrices[0].in_features);
    int64_t num_values = 0, begins[LINEARS_AT_ONCE + 1] = {};
    int at_once[LINEARS_AT_ONCE];
    for (int m = 0; m < num_matrices; ++m) num_values += num_tokens * matrices[m].num_rows * matrices[m].in_features;
    for (int m = 0; m < num_matrices; ++m) {
        const Matrix &matrix = matrices[m];
        if (!outs[m] || !is_there(matrix, record) || matrix.in_features != input.num_features) return NO_FIT;
        ask(matrix, activation_bits == 16, input);
        at_once[m] = matrix.is_transposed ? COLUMNS_AT_ONCE : rows_at_once(matrix.num_rows, num_threads);
        begins[m + 1] = begins[m] + (matrix.num_rows + at_once[m] - 1) / at_once[m];
    }
    const bool prepares = lay_out(input);
    char *memory = workspace.get(num_tokens * input.stride + num_threads * SCRATCH_BYTES);
    if (!memory) return NO_MEMORY;
    input.data = memory;
    char *scratch = memory + num_tokens * input.stride;
    for (int t = 0; t < num_tokens; ++t) {
        fill(input, t, x + t * stride_bytes, format);
        if (prepares) arithmetic->prepare(input, t);
    }
    in_parallel(num_values < SERIAL_VALUES ? 1 : num_threads, [&](Team &team) {
        team.share(begins[num_matrices], [&](int64_t i, int thread) {
            int m = 0;
            while (i >= begins[m + 1]) ++m;
            const int first = (int)(i - begins[m]) * at_once[m];
            arithmetic->linear(matrices[m], record, input, (int)num_tokens, outs[m], format, first,
                               least(at_once[m], matrices[m].num_rows - first), scratch + thread * SCRATCH_BYTES);
        });
    });
    return DONE;
}

/* out [T, N] = x [T, K] times a matrix [N, K], plus its bias. */
EXPORTED int moeflow_cpu_linear(const Matrix *matrix, const char *record, const char *x, int format,
                                int64_t stride_bytes, int64_t num_tokens, void *out, int activation_bits,
                                int num_threads) {
    return moeflow_cpu_linears(matrix, 1, record, x, format, stride_bytes, num_tokens, &out, activation_bits,
                               num_threads);
}

/* Rows of a matrix [N, K] in GGML's blocks to out [count, K]; -1: there is no such row. */
EXPORTED int moeflow_cpu_block_rows(const Matrix *matrix, const int64_t *ids, int64_t count, char *out, int format) {
    constexpr int AT_ONCE = 2048;
    const Matrix &m = *matrix;
    if (m.format < BLOCKS_Q8_0 || m.format >= NUM_FORMATS || !is_count(count)) return NO_FIT;
    if (count && (!m.codes || !ids || !out)) return NO_FIT;
    for (int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || ids[i] >= m.num_rows) return -1;
        for (int k = 0; k < m.in_features; k += AT_ONCE) {
            float values[AT_ONCE];
            const int now = least(AT_ONCE, m.in_features - k);
            arithmetic->unpack(m, nullptr, ids[i], k, now, values);
            arithmetic->store(values, out + (i * m.in_features + k) * bytes_of(format), now, format);
        }
    }
    return DONE;
}

/* transformers' RMSNorm of rows [T, H]; sum_lanes: floats in the vectors that torch's sums use here. */
EXPORTED int moeflow_cpu_rms_norm(const char *x, int64_t stride_bytes, const void *weight, float eps,
                                  int64_t num_tokens, int64_t num_features, char *out, int format, int sum_lanes) {
    if (!is_count(num_tokens) || !is_count(num_features)) return NO_FIT;
    if (!num_tokens) return DONE;
    if (!num_features || !x || !weight || !out) return NO_FIT;
    char *scratch = workspace.get(sizeof(float) * 3 * align(num_features, 16));
    if (!scratch) return NO_MEMORY;
    for (int64_t t = 0; t < num_tokens; ++t)
        arithmetic->rms_norm(x + t * stride_bytes, weight, eps, (int)num_features,
                             out + t * num_features * bytes_of(format), format, sum_lanes, scratch);
    return DONE;
}

/* Reads a block of memory and gives the exclusive or of its words: how fast that goes is what no kernel can beat. Four
 * streams with prefetch, for one stream leaves a core waiting for a third of the time and more. */
EXPORTED uint64_t moeflow_cpu_read(const char *block, int64_t num_bytes, int num_threads) {
    typedef uint64_t Words __attribute__((vector_size(16)));
    constexpr int64_t STREAM = 1 << 18, PIECE = 4 * STREAM, AHEAD = 1024;
    std::atomic<uint64_t> all{0};
    in_parallel(num_threads, [&](Team &team) {
        team.share(num_bytes / PIECE, [&](int64_t i, int) {
            Words a = {}, b = {}, c = {}, d = {}, words;
            for (int64_t at = i * PIECE; at < i * PIECE + STREAM; at += 64)
                for (const char *from = block + at, *end = from + PIECE; from < end; from += STREAM) {
                    const auto read = [&](int offset) { return memcpy(&words, from + offset, sizeof words), words; };
                    __builtin_prefetch(from + AHEAD);
                    a ^= read(0), b ^= read(16), c ^= read(32), d ^= read(48);
                }
            a ^= b ^ c ^ d;
            all ^= a[0] ^ a[1];
        });
    });
    return all;
}
