// How an activation lies over the ranks of one mesh axis, as a type: values that lie differently cannot be mixed without
// the operation that converts one into the other, and each operation exists for the one conversion that is right.
//
//   forward                              backward (the gradient of a value lies as its transpose:
//   all_gather      Shard<0> -> Replicate  Partial -> Shard<0>: reduce_scatter     Shard of Shard, Partial of Replicate,
//   reduce_scatter  Partial  -> Shard<0>   Shard<0> -> Replicate: all_gather       Replicate of Partial)
//
// Faults that this shuts out (reference: sharding-type checks found several in a well-tested code base): a sum over ranks
// that was left out, done twice, or scaled by their number.
//
// What a type cannot see, that a value said to be Replicate is the same on all ranks, or that all have parts of one shape, is
// looked at in debug builds (preset debug) at every seam.
#pragma once

#include "base/tensor.h"
#include "comm/mesh.h"
#include "ops/row_exchange.h"

namespace trireme {

struct Replicate {};                // every rank has the whole; its gradient is Partial
template <int kDim> struct Shard {};  // rank r has the r-th part along the dim; so has its gradient
struct Partial {};                  // the value is the sum over the ranks; its gradient is Replicate

// The ranks of one axis of the mesh.
template <MeshAxis kAxis>
struct Along {
  Communicator ranks;
};
using TensorAxis = Along<MeshAxis::kTensor>;

template <typename Placement, MeshAxis kAxis = MeshAxis::kTensor>
struct Placed {
  at::Tensor local;
};

// Whether products go on while rows travel (ops/row_exchange.h). Over NCCL they do; over MPI where the ranks are on several
// hosts. Within a host MPI's messages are copies that the ranks' own cores make: nothing is won (benchmarks/comm_overlap.cpp).
struct RowOverlap {
  bool over_mpi = false;
  int64_t least_rows = 64;  // of a rank, that are multiplied by themselves; fewer wait for the others
  int64_t num_pieces = 2;   // of a product that is summed, at most

  bool applies(int64_t rows, bool on_device) const { return (on_device || over_mpi) && rows >= least_rows; }
};

// As above on tensors whose placement the caller vouches for: differentiable, collective. Sums are in the order of the ranks,
// 16-bit values added in fp32. Under SelectiveRecompute gathered rows are not kept for backward but gathered again there, as by
// Megatron under sequence parallelism (Korthikanti et al. 2022, section 4.2.2). Dim 0 of what is scattered is a multiple of the ranks.
ArrivingRows gather_rows(const at::Tensor& part, const Communicator& ranks, const RowOverlap& overlap = {});
at::Tensor scatter_sum(const at::Tensor& partial, const Communicator& ranks);
// scatter_sum() as the end of a product, and its transpose in backward. Not differentiable by itself.
std::shared_ptr<const RowSum> sum_of_products(const Communicator& ranks, const RowOverlap& overlap = {});

template <MeshAxis kAxis>
Placed<Replicate, kAxis> all_gather(const Placed<Shard<0>, kAxis>& x, const Along<kAxis>& axis) {
  return {gather_rows(x.local, axis.ranks).wait()};
}
// The same for products, which take it while it is under way.
template <MeshAxis kAxis>
ArrivingRows start_all_gather(const Placed<Shard<0>, kAxis>& x, const Along<kAxis>& axis, const RowOverlap& overlap) {
  return gather_rows(x.local, axis.ranks, overlap);
}
template <MeshAxis kAxis>
Placed<Shard<0>, kAxis> reduce_scatter(const Placed<Partial, kAxis>& x, const Along<kAxis>& axis) {
  return {scatter_sum(x.local, axis.ranks)};
}

#ifdef TRIREME_DEBUG
inline constexpr bool kChecksPlacements = true;
#else
inline constexpr bool kChecksPlacements = false;
#endif

// InternalError on every rank where one has another dtype or shape; `same_values`: or other bits. `what` is named. Collective.
void check_placement(const at::Tensor& local, bool same_values, const Communicator& ranks, const char* what);

}  // namespace trireme
