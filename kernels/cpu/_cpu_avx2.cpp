/* The arithmetic for AVX2, FMA and F16C. */
#include "_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* One set of compiler flags serves all sources, so each asks for its own instructions; what they need from the standard
 * library is included above, in the common set. */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace moeflow {
namespace {
#include "_cpu_avx2.h"
#include "_cpu_kernels.h"

const Arithmetic TABLE = arithmetic<Avx2>("avx2");

} // namespace

extern const Arithmetic *const AVX2 = &TABLE;

} // namespace moeflow

#ifdef __clang__
#pragma clang attribute pop
#endif
#else
extern const moeflow::Arithmetic *const moeflow::AVX2 = nullptr;
#endif
