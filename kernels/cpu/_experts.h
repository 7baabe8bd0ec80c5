/* One layer's routed experts as one call: tokens grouped by expert, the experts, and their sums by router weight. For
 * Python by _cpu.cpp, for step programs by _step.cpp.
 *
 * Knows tables of kernels and addresses. Knows nothing of how experts came there.
 */
#ifndef MOEFLOW_EXPERTS_H
#define MOEFLOW_EXPERTS_H

#include <memory>
#include <new>
#include <vector>

#include "_cpu.h"

namespace moeflow {

struct LayerCall {
    const Expert *const *kernels; /* [num_experts] */
    const char *const *records;   /* [num_experts], null where an expert is not in memory */
    int64_t num_experts;
    const int64_t *index;         /* [num_tokens, top_k]; num_experts or more means none */
    const void *weights;          /* [num_tokens, top_k] */
    int weights_format;
    const char *hidden_states;    /* [num_tokens, num_features] */
    int format;
    int64_t num_tokens, top_k, num_features;
    char *out; /* [num_tokens, num_features] */
    int activation_bits, num_threads;
};

enum LayerStatus { LAYER_DONE, LAYER_NO_MEMORY, LAYER_NO_FIT, LAYER_MISSING };

/* The calling thread's memory between calls. */
class LayerMemory {
  public:
    std::vector<int64_t> next, tokens, places, starts;
    std::vector<int64_t> asked; /* the experts of the last call: of one token in the order of K, else by number */
    std::vector<const Expert *> kernels;
    std::vector<const char *> records;

    float *outputs(int64_t num_floats) {
        if (num_floats > size_) outputs_.reset(), outputs_.reset(new float[num_floats]), size_ = num_floats;
        return outputs_.get();
    }
    void release() {
        if (size_ > KEPT_FLOATS) outputs_.reset(), size_ = 0;
    }

  private:
    static constexpr int64_t KEPT_FLOATS = 1 << 22; /* more is given back after the call */
    std::unique_ptr<float[]> outputs_;
    int64_t size_ = 0;
};
inline thread_local LayerMemory layer_memory;

/* Lists what a call asks for, with the number of pairs of each expert in `next`; whether all of it is in memory. */
inline LayerStatus list_experts(const LayerCall &call, LayerMemory &m) {
    const int64_t num_places = call.num_tokens * call.top_k;
    m.next.assign(call.num_experts, 0), m.asked.clear();
    bool is_missing = false;
    for (int64_t i = 0; i < num_places; ++i) {
        const int64_t expert = call.index[i];
        if (expert < 0) return LAYER_MISSING;
        if (expert >= call.num_experts || m.next[expert]++) continue;
        is_missing |= !call.records[expert];
        m.asked.push_back(expert);
    }
    if (is_missing) return LAYER_MISSING;
    if (call.num_tokens == 1) return LAYER_DONE;
    m.asked.clear();
    for (int64_t expert = 0; expert < call.num_experts; ++expert)
        if (m.next[expert]) m.asked.push_back(expert);
    return LAYER_DONE;
}

inline LayerStatus run_grouped(const LayerCall &call, LayerMemory &m) {
    const int64_t num_places = call.num_tokens * call.top_k, num_features = call.num_features;
    const int num_asked = (int)m.asked.size();
    int64_t num_pairs = 0;
    m.starts.clear();
    for (const int64_t expert : m.asked) {
        const int64_t count = m.next[expert];
        m.starts.push_back(num_pairs), m.next[expert] = num_pairs, num_pairs += count;
    }
    m.starts.push_back(num_pairs);
    m.tokens.resize(num_pairs), m.places.resize(num_pairs);
    float *outputs = m.outputs(num_places * num_features);
    for (int64_t i = 0; i < num_places; ++i) {
        const int64_t expert = call.index[i];
        if (expert >= call.num_experts) {
            memset(outputs + i * num_features, 0, sizeof(float) * num_features);
            continue;
        }
        const int64_t at = m.next[expert]++;
        m.tokens[at] = i / call.top_k, m.places[at] = i;
    }
    int failed = 0;
    if (num_asked)
        failed = moeflow_cpu_experts(m.kernels.data(), m.records.data(), m.starts.data(), num_asked, m.tokens.data(),
                                     m.places.data(), num_pairs, call.hidden_states, call.format, call.num_tokens,
                                     num_features, outputs, num_places, call.activation_bits, call.num_threads);
    if (!failed)
        failed = moeflow_cpu_combine(outputs, call.weights, call.weights_format, call.num_tokens, call.top_k,
                                     num_features, call.out, call.format, call.num_threads);
    m.release();
    return (LayerStatus)failed;
}

/* Runs a layer where all that it asks for is in memory. Leaves the experts asked for in layer_memory.asked. */
inline LayerStatus run_layer(const LayerCall &call) {
    LayerMemory &m = layer_memory;
    try {
        const LayerStatus listed = list_experts(call, m);
        if (listed != LAYER_DONE) return listed;
        m.kernels.clear(), m.records.clear();
        for (const int64_t expert : m.asked)
            m.kernels.push_back(call.kernels[expert]), m.records.push_back(call.records[expert]);
        const int64_t num_asked = (int64_t)m.asked.size();
        if (call.num_tokens == 1 && num_asked == call.top_k && num_asked <= TOKEN_EXPERTS)
            return (LayerStatus)moeflow_cpu_token(m.kernels.data(), m.records.data(), (int)num_asked,
                                                  call.hidden_states, call.num_features, call.weights,
                                                  call.weights_format, call.out, call.format, call.activation_bits,
                                                  call.num_threads);
        return run_grouped(call, m);
    } catch (const std::exception &) { /* of the vectors: no memory, or a length that cannot be */
        return LAYER_NO_MEMORY;
    }
}

} // namespace moeflow

#endif
