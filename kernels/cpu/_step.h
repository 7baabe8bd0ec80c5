/* A step program in memory: instructions of 64-bit words over tensors at fixed addresses. In the order of step/program.py
 * and kernels/cpu/step.py. */
#ifndef MOEFLOW_STEP_H
#define MOEFLOW_STEP_H

#include <stdint.h>

namespace moeflow {

/* In the order of KINDS in step/program.py. */
enum StepKind { STEP_LINEAR, STEP_RMS_NORM, STEP_EXPERTS, STEP_ATTEND, STEP_POINTWISE, STEP_SOFTMAX, STEP_TOP_K,
                STEP_REDUCE, STEP_GATHER, STEP_ROWS, STEP_SCATTER, STEP_ATTEND_LATENT, STEP_ADD_NORM, STEP_ROPE, STEP_TORCH,
                NUM_STEP_KINDS };
/* In the order of POINTWISE in step/program.py. */
enum PointwiseOp { POINT_COPY, POINT_ADD, POINT_SUB, POINT_MUL, POINT_DIV, POINT_MAX, POINT_MIN, POINT_POW, POINT_NEG,
                   POINT_ABS, POINT_SQRT, POINT_RSQRT, POINT_RECIPROCAL, POINT_EXP, POINT_LOG, POINT_SIN, POINT_COS,
                   POINT_TANH, POINT_SIGMOID, POINT_SILU, POINT_GELU, POINT_GELU_TANH, POINT_RELU, POINT_SOFTPLUS,
                   POINT_EQ, POINT_NE, POINT_LT, POINT_LE, POINT_GT, POINT_GE, POINT_AND, POINT_OR, POINT_NOT,
                   POINT_WHERE };
enum ReduceOp { REDUCE_SUM, REDUCE_MEAN, REDUCE_MAX, REDUCE_MIN };
/* Dtypes of tensors: the three of activations, then those of numbers of tokens and of masks. */
enum StepDtype { STEP_FLOAT32, STEP_BFLOAT16, STEP_FLOAT16, STEP_INT64, STEP_BOOL };

constexpr int MAX_DIMS = 6;

/* A tensor; strides in elements. */
struct Tensor {
    char *data;
    int64_t dtype, dims, sizes[MAX_DIMS], strides[MAX_DIMS];
};

struct Instruction {
    int64_t kind, num_tensors;
    int64_t whole[6];
    double real[2];
    Tensor tensors[]; /* the output first, then inputs, then further outputs */
};

/* Where the experts of one layer lie; the addresses are null for those that are not resident. */
struct StepLayer {
    const void *const *kernels;
    const char *const *addresses;
    int64_t num_experts, activation_bits;
};

/* How keys and values are kept: as they are, or as records (_step_kept.h). In the order of kv_format.py. */
enum KeptFormat { KEPT_AS_GIVEN, KEPT_INT8, KEPT_INT4 };
constexpr int KEPT_GROUP = 32, KEPT_GROUPS = 16; /* channels of a scale, and scales of a head at most */

inline int kept_groups(int features) { return (features + KEPT_GROUP - 1) / KEPT_GROUP; }
inline int code_bytes(int features, int bits) { return features * bits / 8; }
inline int64_t record_bytes(int features, int bits) { return code_bytes(features, bits) + 2 * kept_groups(features); }
/* Bits of a value's code; keys have 8 in every format. */
inline int value_bits(int format) { return format == KEPT_INT4 ? 4 : 8; }

/* Keys and values of one sequence in one layer: [heads, capacity, features], or records of features. */
struct KeptPositions {
    char *keys, *values;
    int64_t capacity;
};

/* What changes from step to step. */
struct StepState {
    const StepLayer *layers;       /* [MoE layers] */
    const KeptPositions *kept;     /* [attention layers, rows] */
    const int64_t *lengths;        /* [rows], positions kept before this step */
    const int64_t *firsts;         /* [rows], the first position that is not padding */
    int64_t num_rows, num_live;    /* of the program, and how many of them are sequences */
    int64_t num_threads;
    double *seconds;               /* [NUM_STEP_KINDS], or null */
    int64_t *is_done;              /* set to 1 behind the last instruction */
    int64_t kept_format;           /* of what `kept` says */
};

} // namespace moeflow

#endif
