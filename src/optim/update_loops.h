// The vector loops under the optimizer: serial functions over flat ranges.
#pragma once

#include "kernels/kernels.h"
#include "ops/loops.h"

namespace trireme {

struct UpdateStep {  // as kernels::Update has them
  double lr, weight_decay, beta1, beta2, epsilon, grad_scale;
  double correction1, correction2;
};

// Of weights that are rounded at random (kernels::Update): Philox's key and high counter, and the first element's place.
struct RandomRounding {
  uint64_t key, counter;
  int64_t place;
};

constexpr int kSquareLevels = 3;

template <typename T>
struct UpdateLoops {
  using A = typename ComputeType<T>::type;
  // master may be null: then the weight itself is the master, of type A, or of bf16 with `rounding`, which is null otherwise.
  // m and v: null where the rule has none.
  void (*update[kernels::kUpdateRules])(int64_t count, T* weight, A* master, const A* grad, A* m, A* v, const UpdateStep& step, const RandomRounding* rounding);
  double (*largest)(int64_t count, const T* x);  // magnitude; infinity or NaN where one is among the values
  // Sums of the squares' parts, see SquareSum in clip.h.
  void (*square_sums)(int64_t count, const T* x, const double* shifts, double* sums);
};

template <typename T>
const UpdateLoops<T>& update_loops(int level = -1);  // as loops() in ops/loops.h

}  // namespace trireme
