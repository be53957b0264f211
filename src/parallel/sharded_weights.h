// Weights in flat buckets, of whose equal parts each rank updates its own (ZeRO, see data_parallel.h).
//   zero 1, 2  every rank has all trained weights; after an update it gets the other parts (all-gather, in the weights' dtype)
//   zero 3     a rank keeps only its parts, of frozen weights too, but for what stays in host memory (Parameter::on_host). A block's weights are gathered before it is used, in
//              forward and in backward, while the block before it computes, and freed after use; what is outside of the
//              blocks stays from the first forward of a step to release_all().
// A leaf stays the same leaf: its memory becomes a view of a bucket.
#pragma once

#include <map>

#include "model/transformer.h"
#include "parallel/data_parallel.h"

namespace trireme {

class ShardedWeights : public BlockWeights {
 public:
  // `parameters` of the model, `holders` of these; the trained ones are cut as the reducer's gradients. Collective.
  // `fill` (zero 3): the leaves have no memory yet; it is asked once, for the slices of them that this rank keeps.
  // `overlap` (zero 3): a block is gathered while the one before it computes.
  ShardedWeights(const std::vector<Parameter>& parameters, const Holders& holders, const GradientReducer& reducer, int zero,
                 int64_t bucket_bytes, const WeightFill& fill = {}, bool overlap = true);

  // Where the optimizer works: this rank's part of bucket `b` of the reducer's layout. The same memory for ever.
  at::Tensor part(size_t b) const { return flats_[b].part; }
  // After the optimizer has changed the parts: brings them to all ranks, or (zero 3) drops what was gathered. Collective.
  void updated();

  // Zero 3, else nothing to do. Collective over the ranks that have the block; so is their order.
  // Asks for what is outside of the blocks, without waiting: a tied embedding is of the first and the last stage of a pipeline,
  // and the last one acquires it only after the first has computed.
  void prefetch();
  void acquire(int64_t block, bool backward) override;
  void release(int64_t block, bool backward) override;
  void acquire_all();  // the whole model
  // The values of this parameter, with its block's, until another block is asked for: to read the model one part at a time.
  void hold(const std::string& name);
  void release_all();  // waits for what is on its way, and drops everything, whoever has acquired it

  int64_t bytes_held() const;      // of weights in buckets, now
  int64_t bytes_gathered() const;  // since the start, by groups of more than one rank
  std::map<int64_t, int64_t> elements() const;  // zero 3: of each block (-1: outside), padded

 private:
  struct Flat {
    Communicator group;
    at::Tensor whole, part;
  };
  struct Unit {
    std::vector<size_t> flats;
    int num_uses = 0;
    bool there = false;          // its memory is; complete once `work` is done
    std::vector<Work> work;
  };

  void add(const Bucket& bucket, const std::vector<Parameter>& parameters, std::vector<Parameter>* unfilled);
  void start(Unit& unit);
  void wait(Unit& unit);
  void drop(Unit& unit);

  int zero_;
  bool overlap_;
  std::vector<Communicator> groups_;
  std::vector<Flat> flats_;  // the reducer's layout, then the frozen weights
  std::vector<Unit> units_;  // [0]: outside of blocks, [1 + i]: block i; empty ones for blocks of other pipeline stages
  int64_t first_ = 0, last_ = 0;  // blocks that this rank has
  size_t held_ = 0;               // unit of hold(); 0: none that would be dropped
};

}  // namespace trireme
