// Gradients are gathered in flat buckets and summed over all ranks that hold a slice (parallel/holders.h) while backward
// goes on.
//
// Every trained leaf owns a slice of a flat gradient buffer (fp32; fp64 for fp64 weights), in buckets that follow the
// parameters from last to first, the order in which backward produces gradients. A hook adds each .grad into its slice
// and releases it. Sums over micro-batches are therefore in fp32 whatever the dtype of the weights.
//
// A bucket's reduction starts during the last micro-batch's backward, when every contribution of this backward has
// arrived. How many a leaf gets is not knowable from the graph (nested backward of recomputation fires the hook once a
// use; a weight gradient can be delayed), so the first backward counts them without overlap, and the next ones expect
// as many. A contribution beyond that, to a bucket already sent, is kept aside and reduced in finish(): the sum is
// linear, so the result is right in every case, and the new number is learnt. Fewer than expected: the bucket starts in
// finish(). The number of bytes can so depend on the order of arrival, the bits only if a contribution was late. A hook
// that fires without a gradient (a Function that returned none) counts for nothing. A group's buckets always start in the
// same order on all its ranks (last parameters first), whatever order hooks fire in and whatever else its ranks hold.
//
// In a pipeline micro-batches and chunks take turns, and weight gradients come in actions of their own: there contributions
// are counted over the step (before_all_backwards()), and a bucket starts when its leaves have had as many as in the step
// before. Of a stage's chunks the last layers' are done first by every schedule, as the buckets' order wants it.
//
// ZeRO (Rajbhandari et al. 2020): a bucket has as many equal parts as its group has ranks, and rank r keeps the sum of
// part r alone (reduce-scatter). The sum's bits are those of plain data parallelism.
//   zero 0  every rank has all sums (all-reduce)
//   zero 1  the buffers stay, the sums are taken in place: optimizer state can be sharded
//   zero 2+ only the parts stay. A bucket exists from the first contribution to the end of its reduction, of which at most
//           two of a group are under way. Micro-batches but the last still add up in whole buckets, because their sum must
//           come before the sum over ranks for the same bits; `every_backward` reduces after each micro-batch instead, with
//           the memory of one, other last bits and that many times the bytes. While two are under way backward waits with a
//           third; in a pipeline, where a peer may wait for what comes out of this backward, the third waits instead.
//
// Hybrid (`num_replicas` R): the ranks of a group are R runs of neighbours, such as those of one host, and only these share
// out: parts are summed over a run (reduce-scatter), then over the runs (all-reduce). With R > 1 runs of more than one rank
// this order of additions has other last bits than the plain one.
//
//   GradientReducer reducer(parameters, find_holders(parameters, comms));
//   reducer.begin_step();
//   for each micro-batch i:  reducer.before_backward(i + 1 == num_micro_batches);  (loss_sum).backward();
//   reducer.finish();                        // parts hold the SUM over micro-batches and ranks
//   reducer.scale(1.0 / global_count);       // the one place where the loss's count enters
//   optimizer.step(reducer.parts());
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "parallel/buckets.h"

namespace trireme {

struct GradientSlice {
  std::string name;
  at::Tensor weight;    // the leaf
  at::Tensor gradient;  // view into the flat buffer, of the weight's shape, fp32 or fp64
  ShardSpec shard;
};

// Elements [begin, end) of a leaf (row-major), whose sum of gradients this rank keeps: without ZeRO all of them.
struct GradientPart {
  std::string name;
  at::Tensor weight;  // the leaf
  ShardSpec shard;    // of the leaf
  int64_t begin = 0, end = 0;
  at::Tensor gradient;              // flat [end - begin], fp32 or fp64
  size_t bucket = 0;                // of layout()
  int64_t offset = 0;               // of `begin`: in this rank's part of the bucket, without ZeRO in the bucket
  bool is_first = true;             // of the ranks that keep the same elements
};

struct DeviceNorm;
struct ClipBy;

struct GradientReducerOptions {
  int64_t bucket_bytes = 8 << 20;  // at most; an eighth of all gradients where that is less, but not below 64 KiB
  bool overlap = true;  // false: everything is reduced in finish(); the bits are the same
  int zero = 0;         // 0 .. 3; 3 as 2, in buckets that hold parameters of one block
  bool every_backward = false;  // with zero 2 and 3
  // With zero 1 to 3: one of this many equal runs of a group's ranks keeps everything once.
  int num_replicas = 1;
  int64_t align = 1;  // elements of a parameter that no rank's part cuts
};

class GradientReducer {
 public:
  // Takes the parameters that require gradients; a tensor that appears twice (tied) is taken once, under its first
  // name. `holders` are of these parameters.
  GradientReducer(const std::vector<Parameter>& parameters, const Holders& holders,
                  const GradientReducerOptions& options = {});
  // Every rank of `data` holds all parameters. Collective: TRIREME_CHECK on a rank whose parameters differ from rank 0's.
  GradientReducer(const std::vector<Parameter>& parameters, const Communicator& data,
                  const GradientReducerOptions& options = {});
  ~GradientReducer();  // removes the hooks
  GradientReducer(const GradientReducer&) = delete;
  GradientReducer& operator=(const GradientReducer&) = delete;

  void begin_step();
  void before_backward(bool is_last_of_step);
  // Once a step, instead: all its backwards follow, in any order of micro-batches and parts of the model. Not with every_backward.
  void before_all_backwards();
  // A gradient that does not come through the leaf's .grad, such as a weight gradient that was delayed: part of the
  // present backward (or of them all), until the next before_backward() or finish(). Any thread.
  void contribute(const at::Tensor& weight, const at::Tensor& gradient);
  // Waits for all buckets. Parameters without a gradient have zeros. After it the parts hold the sum over micro-batches
  // and ranks, with the same bits on every rank that keeps them.
  // `any_rank(late)`: whether `late` is true on any rank (collective), for a caller whose small sums can carry it; without
  // it the ranks agree by themselves.
  void finish(const std::function<bool(bool late)>& any_rank = {});
  // Multiplies all gradients. The only place of Trireme where a gradient is divided by the number of learnt tokens.
  void scale(double factor);

  const std::vector<GradientPart>& parts() const;  // order of the parameters given
  // The leaves, in the order given, with whole gradients: collective with ZeRO, whose ranks then hold everything once.
  std::vector<GradientSlice> gathered() const;
  // The same without communication; with ZeRO a gradient holds no sums, or is undefined.
  const std::vector<GradientSlice>& slices() const;
  const std::vector<Bucket>& layout() const;  // `parameters` are numbers of slices()
  const std::vector<Communicator>& groups() const;  // of Holders::groups the ranks that share out: Bucket::group counts these
  // Sum of the squares of all gradients of all ranks, every slice once, in fp64: the same bits on every rank, with any
  // cut into buckets and any `zero`. Without communication where every rank has everything, else collective.
  double squared_norm() const;
  // The same of gradients on a device, and the factor that clips them, where both stay and nobody waits for them; the bits are
  // those of the cut.
  void measure(DeviceNorm& norm, const ClipBy& by) const;
  int64_t bytes_reduced() const;  // a step: payload of the reductions of the last finish()
  int64_t bytes_exchanged() const;  // since the start, as the Communicators counted: reductions by groups of more than one rank
  int64_t bytes_held() const;     // of gradient buffers, now
  int64_t num_late_contributions() const;  // since the start: those reduced as a difference

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace trireme
