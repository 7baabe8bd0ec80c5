/* The arithmetic for AVX-512 with VNNI. */
#include "_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* One set of compiler flags serves all sources, so each asks for its own instructions; what they need from the standard
 * library is included above, in the common set. */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

namespace moeflow {
namespace {
#include "_cpu_avx2.h"
#include "_cpu_avx512.h"
#include "_cpu_kernels.h"

const Arithmetic TABLE = arithmetic<Avx512>("avx512");

} // namespace

extern const Arithmetic *const AVX512 = &TABLE;

} // namespace moeflow

#ifdef __clang__
#pragma clang attribute pop
#endif
#else
extern const moeflow::Arithmetic *const moeflow::AVX512 = nullptr;
#endif
