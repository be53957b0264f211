// Data parallelism: gradients are gathered in flat buckets and summed over the data axis while backward goes on.
//
// Every trained leaf owns a slice of a flat gradient buffer (fp32; fp64 for fp64 weights), in buckets that follow the
// parameters from last to first, the order in which backward produces gradients. A hook adds each .grad into its slice
// and releases it. Sums over micro-batches are therefore in fp32 whatever the dtype of the weights.
//
// A bucket's all-reduce starts during the last micro-batch's backward, when every contribution of this backward has
// arrived. How many a leaf gets is not knowable from the graph (nested backward of recomputation fires the hook once a
// use; a weight gradient can be delayed), so the first backward counts them without overlap, and the next ones expect
// as many. A contribution beyond that, to a bucket already sent, is kept aside and reduced in finish(): the sum is
// linear, so the result is right in every case, and the new number is learnt. Fewer than expected: the bucket starts in
// finish(). The number of bytes can so depend on the order of arrival, the bits only if a contribution was late. A hook
// that fires without a gradient (a Function that returned none) counts for nothing. Buckets always start in the same
// order on every rank (last parameters first), whatever order hooks fire in.
//
//   GradientReducer reducer(parameters, comms.data);
//   reducer.begin_step();
//   for each micro-batch i:  reducer.before_backward(i + 1 == num_micro_batches);  (loss_sum).backward();
//   reducer.finish();                        // slices hold the SUM over micro-batches and ranks
//   reducer.scale(1.0 / global_count);       // the one place where the loss's count enters
//   optimizer.step(reducer.slices());
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "base/parameter.h"
#include "comm/communicator.h"

namespace trireme {

struct GradientSlice {
  std::string name;
  at::Tensor weight;    // the leaf
  at::Tensor gradient;  // view into the flat buffer, of the weight's shape, fp32 or fp64
  ShardSpec shard;
};

struct GradientReducerOptions {
  int64_t bucket_bytes = 8 << 20;  // at most; an eighth of all gradients where that is less, but not below 64 KiB
  bool overlap = true;  // false: everything is reduced in finish(); the bits are the same
};

class GradientReducer {
 public:
  // Takes the parameters that require gradients; a tensor that appears twice (tied) is taken once, under its first
  // name. Collective: TRIREME_CHECK on a rank whose parameters differ from rank 0's in name, shape or dtype.
  GradientReducer(const std::vector<Parameter>& parameters, Communicator data,
                  const GradientReducerOptions& options = {});
  ~GradientReducer();  // removes the hooks
  GradientReducer(const GradientReducer&) = delete;
  GradientReducer& operator=(const GradientReducer&) = delete;

  void begin_step();
  void before_backward(bool is_last_of_step);
  // A gradient that does not come through the leaf's .grad, such as a weight gradient that was delayed: part of the
  // present backward, until the next before_backward() or finish(). Any thread.
  void contribute(const at::Tensor& weight, const at::Tensor& gradient);
  // Waits for all buckets. Parameters without a gradient have zeros. After it the slices hold the sum over
  // micro-batches and ranks, with the same bits on every rank.
  // `any_rank(late)`: whether `late` is true on any rank (collective), for a caller whose small sums can carry it; without
  // it the group agrees by itself.
  void finish(const std::function<bool(bool late)>& any_rank = {});
  // Multiplies all gradients. The only place of Trireme where a gradient is divided by the number of learnt tokens.
  void scale(double factor);

  const std::vector<GradientSlice>& slices() const;  // order of the parameters given
  const std::vector<at::Tensor>& buckets() const;    // flat, last parameters
                                                     // first, zero-padded to a multiple of the group's size
  // Sum of the squares of all gradients, in fp64; the same on every rank of the data axis.
  double squared_norm() const;
  int64_t bytes_reduced() const;  // a step: payload of the all-reduces of the last finish()
  int64_t num_late_contributions() const;  // since the start: those reduced as a difference

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Collective. SystemError naming the first parameter whose bits differ from rank 0's.
void check_parameters_equal(const std::vector<Parameter>& parameters, const Communicator& data);

}  // namespace trireme
