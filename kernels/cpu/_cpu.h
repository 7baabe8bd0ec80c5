/* The interface between _cpu.cpp (C ABI, dispatch, threads) and the arithmetic of each instruction set. */
#ifndef MOEFLOW_CPU_H
#define MOEFLOW_CPU_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "_step.h"

#ifdef _WIN32
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C" __attribute__((visibility("default")))
#endif

namespace moeflow {

/* In the order of _FORMATS in structs.py. */
enum Format {
    FLOAT32, BFLOAT16, FLOAT16, INT8, UINT4, UINT3, UINT2, SIGN1, MXFP4, FP8, LOSSLESS, /* and GGML's blocks: */
    BLOCKS_Q8_0, BLOCKS_Q4_0, BLOCKS_Q4_1, BLOCKS_Q5_0, BLOCKS_Q5_1, BLOCKS_Q2_K, BLOCKS_Q3_K,
    BLOCKS_Q4_K, BLOCKS_Q5_K, BLOCKS_Q6_K, BLOCKS_IQ4_NL, BLOCKS_IQ4_XS, BLOCKS_MXFP4,
    NUM_FORMATS
};
/* In the order of _KINDS in structs.py. */
enum Kind { SILU, GELU, GELU_TANH, RELU, RELU2 };
enum Gate { NO_GATE, CONCATENATED, INTERLEAVED };

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
struct Float8 {
    uint8_t bits; /* E4M3 */
};

/* A matrix [num_rows, in_features] inside a record; offsets in bytes from the record's start, -1: not there. */
struct Matrix {
    int64_t codes, scale, zero, bias;
    int32_t format, bias_format;
    int32_t num_rows, in_features;
    int32_t group_size; /* a whole row: the padded in features */
    int32_t padded;
    int32_t is_transposed; /* [in_features, num_rows], floats only */
    int32_t num_escapes;   /* of a lossless matrix, whose `scale` are its tops, and whose `zero` are its escapes */
};

/* activation(gate, up) = min(act(min(gate, gate_limit)), activated_limit) * (clamp(up, up_limit) + up_offset) */
struct Activation {
    int32_t kind, gate;
    float alpha, gate_limit, activated_limit, up_limit, up_offset;
    int32_t reserved;
};

struct Expert {
    Matrix first, down;
    Activation activation;
};

/* Rows of activations as the kernels read them: float32, padded with zeros to a multiple of 128; then, where a format
 * asks for it, sums over every group and the values rounded to int16 in blocks of 128, and these once more as an
 * instruction set splits bytes into words. Offsets in bytes within a row. */
constexpr int NUM_SUMS = 5, GROUP_OF_SUMS[NUM_SUMS] = {32, 64, 128, 16, 32};
/* From here on each sum is one float, and those of 256 values have room for 16, with zeros where they are fewer. */
constexpr int WHOLE_SUMS = 3, SUMS_OF_256 = 16;
struct Rows {
    char *data;
    int64_t stride;
    int64_t sums[NUM_SUMS]; /* of groups as GROUP_OF_SUMS has them; -1: no format needs them */
    int64_t codes, split, deltas;
    int32_t num_features, padded;
    bool is_rounded; /* whether codes and deltas are there, and sums are theirs */
    bool is_split;   /* whether the codes are there in a second order, too */
};

/* The tokens one expert computes in one go: at most TOKENS_AT_ONCE. */
struct Segment {
    const Expert *expert;
    const char *record;
    const int64_t *tokens; /* [count], rows of the hidden states */
    const int64_t *places; /* [count], rows of the outputs */
    int32_t count;
    int32_t total;             /* tokens the expert has in this call: with many, weights are unpacked first */
    int64_t input_row, hidden_row; /* of its first token */
};

/* Bytes of scratch a thread needs. */
constexpr int64_t SCRATCH_BYTES = 640 << 10;
/* One piece of work: out features, fewer where there are many threads to share them, and of a transposed matrix. */
constexpr int ROWS_AT_ONCE = 96, LEAST_ROWS_AT_ONCE = 24, COLUMNS_AT_ONCE = 192;
constexpr int TOKENS_AT_ONCE = 96;                      /* of a segment */
constexpr int TOKEN_EXPERTS = 64;                       /* of down_token */
constexpr int LINEARS_AT_ONCE = 8;                      /* matrices of one call */

/* The query heads of one sequence that share a head of keys and values. */
struct HeadGroup {
    const char *keys, *values; /* [positions, features] */
    const float *queries;      /* [num_queries, key_features] */
    int64_t key_features, value_features;
    int num_queries, dtype;
    float scale, soft_cap; /* no cap: 0 */
    int format;            /* KeptFormat; where it is one of records, queries are rounded to int16 with a scale each: */
    const int16_t *rounded; /* [num_queries, key_features up to a multiple of KEPT_GROUP] */
    const float *deltas;    /* [num_queries] */
};

/* The query heads of one sequence that share latents; see _step_latent.h. */
struct LatentHeads {
    const char *latents, *turned; /* [positions, features] */
    const float *queries;         /* [num_queries, features + turned_features] */
    int64_t features, turned_features;
    int num_queries, dtype;
    float scale;
};

/* One instruction set's arithmetic. */
struct Arithmetic {
    const char *name;
    int lanes; /* of a sum over a group */
    bool has_split; /* whether codes in a second order are of use */
    /* Converts one row of activations to float32, padded. */
    void (*convert)(const void *from, int format, int count, float *to, int padded);
    /* Fills in what follows the float32 values. */
    void (*prepare)(const Rows &rows, int64_t row);
    /* Rows first to first + count of the hidden activations of a segment. */
    void (*hidden)(const Segment &segment, const Rows &input, const Rows &hidden, int first, int count, char *scratch);
    /* The same of the outputs, [places, out_stride]. */
    void (*down)(const Segment &segment, const Rows &hidden, float *outputs, int64_t out_stride, int first, int count,
                 char *scratch);
    /* Sums one token's rows first to first + count over its experts, [num_experts] segments of one token each. */
    void (*down_token)(const Segment *segments, int num_experts, const float *weights, const Rows &hidden, void *out,
                       int format, int first, int count, char *scratch);
    void (*combine)(const float *outputs, const float *weights, int top_k, int num_features, void *out, int format);
    void (*linear)(const Matrix &matrix, const char *record, const Rows &input, int num_tokens, void *out, int format,
                   int first, int count, char *scratch);
    /* Values k to k + count of a row of GGML's blocks as floats: k and count are multiples of a block. */
    void (*unpack)(const Matrix &matrix, const char *record, int64_t row, int k, int count, float *to);
    void (*rms_norm)(const void *x, const void *weight, float eps, int count, void *out, int format,
                     int sum_lanes, char *scratch);
    /* Of a step: rounding; a = op(a, b) elementwise; and positions first to first + count of a head group's attention, as
     * [num_queries] times the highest score, the sum of weights, and the weighted sum of values. */
    void (*store)(const float *from, void *to, int count, int format);
    void (*pointwise)(int op, int64_t n, float *a, const float *b);
    void (*attend)(const HeadGroup &group, int64_t first, int64_t count, float *out);
    /* Likewise of latents, with the products of a query with rows of a matrix, and of rows with a latent. */
    void (*attend_latent)(const LatentHeads &heads, int64_t first, int64_t count, float *out);
    void (*absorb)(const float *query, const char *rows, int dtype, int count, int features, float *out);
    void (*expand)(const float *latent, const char *rows, int dtype, int count, int features, float *out);
};

/* Of the C ABI in _cpu.cpp, for _step.cpp. */
extern "C" {
int moeflow_cpu_experts(const Expert *const *experts, const char *const *records, const int64_t *starts,
                        int num_experts, const int64_t *tokens, const int64_t *places, int64_t num_entries,
                        const char *hidden_states, int format, int64_t num_tokens, int64_t num_features,
                        float *outputs, int64_t num_places, int activation_bits, int num_threads);
int moeflow_cpu_token(const Expert *const *experts, const char *const *records, int num_experts,
                      const void *hidden_states, int64_t num_features, const void *weights, int weights_format,
                      void *out, int format, int activation_bits, int num_threads);
int moeflow_cpu_combine(const float *outputs, const void *weights, int weights_format, int64_t num_tokens,
                        int64_t top_k, int64_t num_features, char *out, int format, int num_threads);
int moeflow_cpu_linears(const Matrix *matrices, int num_matrices, const char *record, const char *x, int format,
                        int64_t stride_bytes, int64_t num_tokens, void *const *outs, int activation_bits,
                        int num_threads);
int moeflow_cpu_block_rows(const Matrix *matrix, const int64_t *ids, int64_t count, char *out, int format);
int moeflow_lossless_rows(const uint8_t *codes, const uint16_t *tops, const uint8_t *escapes, int64_t room,
                          int64_t num_rows, int64_t in_features, const int64_t *ids, int64_t count, uint16_t *out);
int moeflow_cpu_rms_norm(const char *x, int64_t stride_bytes, const void *weight, float eps, int64_t num_tokens,
                         int64_t num_features, char *out, int format, int sum_lanes);
}

/* Null where the compiler's target has none of it. */
extern const Arithmetic *const AVX512, *const AVX2, *const PORTABLE;
/* The one in use. */
const Arithmetic &chosen_arithmetic();

} // namespace moeflow

#endif
