// How an activation lies over the ranks of one mesh axis, as a type: values that lie differently cannot be mixed without
// the operation that converts one into the other, and each operation exists for the one conversion that is right.
//
//   forward                              backward (the gradient of a value lies as its transpose:
//   all_gather      Shard<0> -> Replicate  Partial -> Shard<0>: reduce_scatter     Shard of Shard, Partial of Replicate,
//   reduce_scatter  Partial  -> Shard<0>   Shard<0> -> Replicate: all_gather       Replicate of Partial)
//
// Faults that this shuts out (reference: sharding-type checks found several in a well-tested code base): a sum over ranks
// that was left out, done twice, or scaled by their number.
#pragma once

#include "base/tensor.h"
#include "comm/communicator.h"

namespace trireme {

struct Replicate {};                // every rank has the whole; its gradient is Partial
template <int kDim> struct Shard {};  // rank r has the r-th of equal parts along the dim; so has its gradient
struct Partial {};                  // the value is the sum over the ranks; its gradient is Replicate

template <typename Placement>
struct Placed {
  at::Tensor local;
};

// Differentiable, collective over `axis`. Sums are in the order of the ranks, 16-bit values added in fp32.
Placed<Replicate> all_gather(const Placed<Shard<0>>& x, const Communicator& axis);
Placed<Shard<0>> reduce_scatter(const Placed<Partial>& x, const Communicator& axis);  // dim 0 a multiple of the ranks

}  // namespace trireme
