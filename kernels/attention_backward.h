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
  int num_keys, num_key_heads, num_parts;  // S, K, and attention_backward_parts
  float* part_sums;  // [2, parts, S, K, D]: of grad_k, not scaled, and grad_v; null: one part
};

// A part of the query heads of a key head. All of it follows from the first head.
struct KeyHeadPart {
  int key_head, part, first_head, num_heads;
  ARCH_FN static int first_head_of(const BackwardParams& p, int index) { return index / p.num_parts * p.plan.group + index % p.num_parts * kHeads; }
  ARCH_FN KeyHeadPart(const BackwardParams& p, int first_head)
      : key_head(first_head / p.plan.group), part(first_head % p.plan.group / kHeads), first_head(first_head), num_heads(smaller(kHeads, p.plan.group - part * kHeads)) {}

  // A warp's results of 16 keys, of which there are `count`, from row `row` and column `column` on: of grad_k (0) or grad_v (1).
  template <int D, int kN>
  ARCH_FN void write_sums(const BackwardParams& p, int which, int row, int count, int column, const float (&x)[kN][4]) const {
    ARCH_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = 8 * half + arch::lane_index() / 4;
      if (r >= count) continue;
      float* to = p.part_sums + (((int64_t{which} * p.num_parts + part) * p.num_keys + row + r) * p.num_key_heads + key_head) * D + column + 2 * (arch::lane_index() % 4);
      ARCH_UNROLL
      for (int n = 0; n < kN; ++n) arch::store(to + 8 * n, Several<float, 2>{{x[n][2 * half], x[n][2 * half + 1]}});
    }
  }

 private:
  static constexpr int kHeads = kAttentionHeadsOfPart;
};

// In `sums` the columns of a row lie so that a lane's 4 results of 16 columns are neighbours: column 16 b + 8 e + 2 t +
// f is at place 16 b + 4 t + 2 e + f.
ARCH_FN int place_of_column(int c) { return c / 16 * 16 + c % 8 / 2 * 4 + c % 16 / 8 * 2 + c % 2; }

// The base-2 exponent to subtract, so that p = 2^(score - it): a query that is not there, or sees nothing, gets p = 0.
ARCH_FN float exponent(float lse) { return lse == -kInfinity ? kInfinity : lse * kLog2E; }

// KeySide and, where sums is null, QuerySide of attention_backward.cu, of calls that is_for_hopper.
void add_gradients_on_hopper(const AttentionShape& shape, const BackwardParams& params, Stream stream);

}  // namespace trireme::kernels::TRIREME_ARCH::attention
