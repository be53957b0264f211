#include "ops/loops.h"

#include <algorithm>
#include <limits>

#include "base/check.h"
#include "base/random.h"

#define TRIREME_LOOPS "ops/loops.inc"
#include "ops/vector_targets.h"

namespace trireme {

template <typename T>
const Loops<T>& loops(int level) {
  if (level < 0) level = vector_level();
  TRIREME_CHECK(level <= vector_level(), "level ", level);
  return level == 2 ? level2::kLoops<T> : level == 1 ? level1::kLoops<T> : level0::kLoops<T>;
}

template const Loops<float>& loops<float>(int);
template const Loops<double>& loops<double>(int);
template const Loops<c10::BFloat16>& loops<c10::BFloat16>(int);
template const Loops<c10::Half>& loops<c10::Half>(int);

}  // namespace trireme
