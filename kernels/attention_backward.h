// What the kernels of attention backward share.
#pragma once

#include "kernels/attention_rows.h"

namespace trireme::kernels::TRIREME_ARCH::attention {

struct BackwardParams {
  Plan plan;
  ConstHeads q, k, v, o, grad_o;
  Heads grad_q, grad_k, grad_v;
  const float* lse;  // [H, T]
  float* delta;      // [H, T]
  float* sums;       // [T, H, D] in the order of place_of_column; null: grad_q is QuerySide's
};

// In `sums` the columns of a row lie so that a lane's 4 results of 16 columns are neighbours: column 16 b + 8 e + 2 t +
// f is at place 16 b + 4 t + 2 e + f.
ARCH_FN int place_of_column(int c) { return c / 16 * 16 + c % 8 / 2 * 4 + c % 16 / 8 * 2 + c % 2; }

// The base-2 exponent to subtract, so that p = 2^(score - it): a query that is not there, or sees nothing, gets p = 0.
ARCH_FN float exponent(float lse) { return lse == -kInfinity ? kInfinity : lse * kLog2E; }

// KeySide and, where sums is null, QuerySide of attention_backward.cu, of calls that is_for_hopper.
void add_gradients_on_hopper(const AttentionShape& shape, const BackwardParams& params, Stream stream);

}  // namespace trireme::kernels::TRIREME_ARCH::attention
