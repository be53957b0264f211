// Compiles one file of loops for several instruction sets into one program, which chooses when it runs. A .cpp defines
// TRIREME_LOOPS as the file to include and includes this once; the loops then exist in the namespaces
// level0 (the compiler's default), level1 (AVX2, FMA, F16C) and level2 (AVX-512 F/BW/DQ/VL).
// Not target_clones: GCC 12 cannot clone templates, and its clones are not inlined into one another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "base/tensor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace trireme {

// The best level of this processor: 0, 1 or 2.
inline int vector_level() {
#if defined(__x86_64__)
  static const int level = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) return 0;
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? 2 : 1;
  }();
  return level;
#else
  return 0;
#endif
}

}  // namespace trireme

// Vectors are passed between inlined functions only. GCC warns at the end of the file, so this is not popped.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC push_options
#pragma GCC optimize("O3", "fp-contract=fast", "no-math-errno")
namespace trireme {
namespace level0 {
#define TRIREME_VECTOR_LEVEL 0
#include "ops/vector_types.inc"
#include TRIREME_LOOPS
}  // namespace level0
}  // namespace trireme
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
namespace trireme {
namespace level1 {
#undef TRIREME_VECTOR_LEVEL
#define TRIREME_VECTOR_LEVEL 1
#include "ops/vector_types.inc"
#include TRIREME_LOOPS
}  // namespace level1
}  // namespace trireme
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace trireme {
namespace level2 {
#undef TRIREME_VECTOR_LEVEL
#define TRIREME_VECTOR_LEVEL 2  // a pragma does not define __AVX512F__ in GCC 12
#include "ops/vector_types.inc"
#include TRIREME_LOOPS
}  // namespace level2
}  // namespace trireme
#else
namespace trireme {
namespace level1 {
using namespace level0;
}
namespace level2 {
using namespace level0;
}
}  // namespace trireme
#endif
#pragma GCC pop_options
