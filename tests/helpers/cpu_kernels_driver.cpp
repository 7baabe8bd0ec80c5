/* Runs every format over odd shapes in memory of exactly the right size, for a build with sanitizers.
 * MOEFLOW_SANITIZE=1 pytest tests/kernels/test_cpu_sanitizers.py builds and runs it. */
#include <stdio.h>
#include <stdlib.h>

#include <initializer_list>
#include <vector>

#include "_cpu.h"

using namespace moeflow;

extern "C" {
const char *moeflow_cpu_use(const char *);
int moeflow_cpu_experts(const Expert *const *, const char *const *, const int64_t *, int, const int64_t *,
                        const int64_t *, int64_t, const char *, int, int64_t, int64_t, float *, int64_t, int, int);
int moeflow_cpu_token(const Expert *const *, const char *const *, int, const void *, int64_t, const void *, int, void *,
                      int, int, int);
int moeflow_cpu_linear(const Matrix *, const char *, const char *, int, int64_t, int64_t, void *, int, int);
int moeflow_cpu_rms_norm(const char *, int64_t, const void *, float, int64_t, int64_t, char *, int, int);
}

static const int BITS[BLOCKS_Q8_0] = {32, 16, 16, 8, 4, 3, 2, 1, 4, 8, 12};
/* Values and bytes of a block, from BLOCKS_Q8_0 on. */
static const int BLOCKS[NUM_FORMATS - BLOCKS_Q8_0][2] = {{32, 34},   {32, 18},   {32, 20},   {32, 22},   {32, 24},
                                                         {256, 84},  {256, 110}, {256, 144}, {256, 176}, {256, 210},
                                                         {32, 18},   {256, 136}, {32, 17}};

/* The values of a block of GGML's, of which rows are multiples; 1 for other formats. */
static int block_of(int format) { return format < BLOCKS_Q8_0 ? 1 : BLOCKS[format - BLOCKS_Q8_0][0]; }
static int multiple(int n, int of) { return (n + of - 1) / of * of; }

/* Appends a matrix's tensors to a record. */
static Matrix add(std::vector<unsigned char> &record, int format, int rows, int columns, int group, bool transposed) {
    const bool is_float = format <= FLOAT16, has_zeros = format >= UINT4 && format <= UINT2;
    const bool is_lossless = format == LOSSLESS, is_blocks = format >= BLOCKS_Q8_0;
    const int block = format == FP8 ? 128 : format == MXFP4 ? 32 : group;
    const int unit = is_lossless ? 64 : block > 32 ? block : 32;
    const int padded = is_float || is_blocks ? columns : multiple(columns, unit);
    const auto place = [&](size_t num_bytes) {
        const int64_t start = (int64_t)((record.size() + 3) / 4 * 4);
        record.resize(start + num_bytes);
        for (size_t i = 0; i < num_bytes; ++i) record[start + i] = (unsigned char)(rand() % 56); /* small and finite */
        return start;
    };
    Matrix m{};
    m.scale = m.zero = -1;
    if (is_blocks) m.codes = place((size_t)rows * columns / block_of(format) * BLOCKS[format - BLOCKS_Q8_0][1]);
    else m.codes = place((size_t)rows * padded * BITS[format] / 8);
    const int groups = is_float ? 0 : padded / (block ? block : padded);
    if (is_lossless) m.scale = place((size_t)rows * 2), m.num_escapes = 0;
    else if (!is_float && !is_blocks)
        m.scale = format == FP8     ? place((size_t)(rows + 127) / 128 * groups * 4)
                  : format == MXFP4 ? place((size_t)rows * groups)
                                    : place((size_t)rows * groups * 2);
    if (has_zeros) m.zero = place((size_t)rows * groups * 2);
    m.bias = place((size_t)rows * 2), m.bias_format = BFLOAT16;
    m.format = format, m.num_rows = rows, m.in_features = columns, m.padded = padded;
    m.group_size = is_float ? padded : block ? block : padded;
    m.is_transposed = is_float && transposed;
    return m;
}

/* Attends to positions in records, keys and values each in memory of exactly the right size. */
static void attend(int format, int key_features, int value_features, int heads, int positions) {
    const int value_width = value_bits(format);
    const auto random = [](size_t num_bytes) {
        char *memory = (char *)malloc(num_bytes);
        for (size_t i = 0; i < num_bytes; ++i) memory[i] = (char)(rand() % 56); /* small and finite */
        return memory;
    };
    char *keys = random(positions * record_bytes(key_features, 8));
    char *values = random(positions * record_bytes(value_features, value_width));
    const int rounded = kept_groups(key_features) * KEPT_GROUP;
    int16_t *queries = (int16_t *)random(sizeof(int16_t) * heads * rounded);
    const std::vector<float> deltas(heads, 1e-6f);
    float *out = (float *)malloc(sizeof(float) * heads * (value_features + 2));
    const HeadGroup group{keys, values, nullptr, key_features, value_features, heads, BFLOAT16, 1, 0, format, queries,
                          deltas.data()};
    chosen_arithmetic().attend(group, 0, positions, out);
    free(keys), free(values), free(queries), free(out);
}

int main() {
    for (const char *name : {"avx512", "avx2", "portable"}) {
        if (strcmp(moeflow_cpu_use(name), name)) continue;
        for (const int format : {KEPT_INT8, KEPT_INT4})
            for (const int features : {16, 32, 48, 64, 128, 512})
                for (int heads = 1; heads < 10; ++heads)
                    for (const int positions : {1, 3, 64, 65, 512}) attend(format, features, 528 - features, heads, positions);
        for (int format = 0; format < NUM_FORMATS; ++format)
            for (const int wanted : {1, 31, 64, 77, 200, 530})
                for (const int tokens : {1, 3, 9, 101})
                    for (int variant = 0; variant < 4; ++variant) {
                        const int features = multiple(wanted, block_of(format));
                        const int inner = multiple(features * 2 / 3 + 1, block_of(format)), gate = variant % 3, group = 32 << variant % 3;
                        std::vector<unsigned char> bytes;
                        Expert expert{};
                        const int size = format == INT8 && variant == 3 ? 0 : group;
                        expert.first = add(bytes, format, gate ? 2 * inner : inner, features, size, variant & 1);
                        expert.down = add(bytes, format, features, inner, size, variant & 1);
                        expert.activation = {variant, gate, 1, 7, 7, 7, 1, 0};
                        char *record = (char *)malloc(bytes.size()); /* exact, so that a read too far is seen */
                        memcpy(record, bytes.data(), bytes.size());
                        std::vector<float> x((size_t)tokens * features, 0.5f), out((size_t)tokens * features);
                        std::vector<int64_t> rows(tokens);
                        for (int t = 0; t < tokens; ++t) rows[t] = t;
                        const Expert *experts[] = {&expert, &expert};
                        const char *records[] = {record, record};
                        const int64_t starts[] = {0, 0, tokens};
                        const float weights[] = {0.5f, 0.5f};
                        for (const int rounded : {0, 16}) {
                            int failed = moeflow_cpu_experts(experts, records, starts, 2, rows.data(), rows.data(),
                                                             tokens, (const char *)x.data(), FLOAT32, tokens, features,
                                                             out.data(), tokens, rounded, 2);
                            failed |= moeflow_cpu_token(experts, records, 2, x.data(), features, weights, FLOAT32,
                                                        out.data(), FLOAT32, rounded, 2);
                            std::vector<float> wide((size_t)tokens * expert.first.num_rows);
                            failed |= moeflow_cpu_linear(&expert.first, record, (const char *)x.data(), FLOAT32,
                                                         4 * features, tokens, wide.data(), rounded, 2);
                            failed |= moeflow_cpu_rms_norm((const char *)x.data(), 4 * features, x.data(), 1e-6f, 1,
                                                           features, (char *)out.data(), FLOAT32, 8);
                            if (failed) return 1;
                        }
                        free(record);
                    }
        printf("%s clean\n", name);
    }
    return 0;
}
