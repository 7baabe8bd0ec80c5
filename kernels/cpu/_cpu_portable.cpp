/* The arithmetic for any processor. */
#include "_cpu.h"

namespace moeflow {
namespace {
#include "_cpu_portable.h"
#include "_cpu_kernels.h"

const Arithmetic TABLE = arithmetic<Portable>("portable");

} // namespace

extern const Arithmetic *const PORTABLE = &TABLE;

} // namespace moeflow
