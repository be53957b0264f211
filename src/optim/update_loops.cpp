#include "optim/update_loops.h"

#include "base/check.h"

#define TRIREME_LOOPS "optim/update_loops.inc"
#include "ops/vector_targets.h"

namespace trireme {

template <typename T>
const UpdateLoops<T>& update_loops(int level) {
  if (level < 0) level = vector_level();
  TRIREME_CHECK(level <= vector_level(), "level ", level);
  return level == 2 ? level2::kUpdateLoops<T> : level == 1 ? level1::kUpdateLoops<T> : level0::kUpdateLoops<T>;
}

template const UpdateLoops<float>& update_loops<float>(int);
template const UpdateLoops<double>& update_loops<double>(int);
template const UpdateLoops<c10::BFloat16>& update_loops<c10::BFloat16>(int);
template const UpdateLoops<c10::Half>& update_loops<c10::Half>(int);

}  // namespace trireme
