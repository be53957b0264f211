// A group of ranks and its collectives on contiguous tensors: of the CPU over MPI, of a CUDA device over NCCL (one device
// a rank and group). Value-like: copies share one group. A group of one is a real group. Collectives are called by every rank of the group in the same order with tensors of the same dtype and
// size (all of them; a non-blocking one counts where it starts).
//
//   dtypes  all operations   float32, float64, bfloat16, float16, int64, int32, uint8 (bytes; they add modulo 256)
//   sizes   any number of elements, 0 included; more than 2^31 - 1 go in pieces
//   bits    kSum adds in the order of the ranks, ((r0 + r1) + r2) + ..., in fp32 for bfloat16 and float16 (rounded once
//           at the end). So all ranks get the same bits, an all-reduce has the bits of the reduce-scatter, and a result
//           depends neither on the message's size nor on how tensors were joined into buckets. Max and min are exact; a
//           NaN on any rank gives NaN. On devices NCCL chooses the order by size, algorithm and layout of the machine and
//           rounds 16-bit sums at each step; all ranks get the same bits, NCCL_ALGO=Ring with NCCL_PROTO=Simple repeats
//           them on the same ranks, and max and min may lose a NaN
//   errors  TRIREME_CHECK: wrong dtype, shape, device, layout, rank; SystemError: MPI or NCCL reports a failure (named
//           with the operation). After one of NCCL's every further call of this process throws it: tensors may be wrong.
//           ConfigError: ranks share a device without comm.share_device
//
// Device tensors: an operation begins after what the caller's current stream holds, and wait() (or the end of a blocking
// call) orders what that stream gets next after it; the host does not wait for the device, but for the peers' hosts to
// have come so far. test() is true when the device is done. barrier() and the small things below are between hosts.
//
// Non-blocking operations move on in a background thread that looks every 0.1 ms while something is in flight
// (comm/progress.h), in wait() of any Work and, where that thread is switched off, in test(). They may be completed in
// any order.
//
// Threads: one thread a Communicator at a time. Different Communicators may be used from different threads.
//
// Algorithm of reductions (measured against MPI_Iallreduce in benchmarks/results): pieces of 4 MiB; each is exchanged
// so that every rank holds one part of it from all ranks, joined there in rank order, and gathered. Moves 2 (n-1)/n of
// the bytes, as a ring does. Small tensors are sent to everybody and joined by each.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/tensor.h"
#include "comm/reduce_parts.h"

namespace trireme {

class CommOperation;

// A collective in flight. The tensors given to it are kept alive and must not be touched before wait() returns or
// test() is true (device tensors after wait(): in the stream that was current there). Move-only. Forgetting one (an exception passes by) leaves it to finish in the background, with its
// tensors: a destructor that waits would wait for ever where a peer has failed.
class Work {
 public:
  Work() = default;  // done
  Work(Work&&) noexcept = default;
  Work& operator=(Work&&) noexcept = default;

  bool test();  // true when it is done
  void wait();

 private:
  friend class Communicator;
  explicit Work(std::shared_ptr<CommOperation> operation) : operation_(std::move(operation)) {}
  std::shared_ptr<CommOperation> operation_;
};

// What a Communicator has done so far.
struct CommStatistics {
  struct Line {
    std::string op;           // "all_reduce", ...
    int64_t num_calls = 0;
    int64_t num_bytes = 0;    // of this rank's payload (all_reduce: the tensor once; all_gather: the output)
    double seconds = 0;       // in this rank's calls: start, test and wait
  };
  std::vector<Line> lines;    // sorted by op
  int64_t bytes_reduced = 0;  // payload of all_reduce and reduce_scatter
};

class Communicator {
 public:
  Communicator() = default;       // no group: only valid() may be called
  static Communicator world();    // MPI must run (Process)
  static Communicator self();     // a group of one

  bool valid() const { return impl_ != nullptr; }
  int rank() const;
  int size() const;

  // Ranks that give the same color form a group, ordered by (key, rank here). A negative color: no group (an invalid
  // Communicator). Collective. The name is for messages.
  Communicator split(int color, int key, const std::string& name) const;

  // Blocking. The tensors are contiguous.
  void all_reduce(at::Tensor tensor, ReduceOp op = ReduceOp::kSum) const;                                   // in place
  void reduce_scatter(at::Tensor output, const at::Tensor& input,
                      ReduceOp op = ReduceOp::kSum) const;  // input: size() x output elements; rank r gets part r
  void all_gather(at::Tensor output, const at::Tensor& input)
      const;  // output: size() x input elements; input may be its own part of output
  void broadcast(at::Tensor tensor, int root) const;
  void all_to_all(at::Tensor output, const at::Tensor& input) const;  // both size() equal parts; part p goes to rank p
  void send(const at::Tensor& tensor, int to, int tag = 0) const;
  void receive(at::Tensor tensor, int from, int tag = 0) const;       // exactly the size sent
  void barrier() const;

  // The same, non-blocking.
  [[nodiscard]] Work start_all_reduce(at::Tensor tensor, ReduceOp op = ReduceOp::kSum) const;
  [[nodiscard]] Work start_reduce_scatter(at::Tensor output, const at::Tensor& input,
                                          ReduceOp op = ReduceOp::kSum) const;
  [[nodiscard]] Work start_all_gather(at::Tensor output, const at::Tensor& input) const;
  [[nodiscard]] Work start_broadcast(at::Tensor tensor, int root) const;
  [[nodiscard]] Work start_all_to_all(at::Tensor output, const at::Tensor& input) const;
  [[nodiscard]] Work start_send(const at::Tensor& tensor, int to, int tag = 0) const;
  [[nodiscard]] Work start_receive(at::Tensor tensor, int from, int tag = 0) const;
  [[nodiscard]] Work start_barrier() const;

  // Agreement and small things.
  int agree(int status) const;                                        // the maximum over the ranks
  int64_t sum(int64_t value) const;
  double sum(double value) const;
  double max(double value) const;
  std::string broadcast_bytes(std::string bytes, int root = 0) const;  // what root gave, on every rank
  std::vector<std::string> gather_bytes(std::string_view bytes) const;  // by rank, on rank 0; elsewhere empty

  CommStatistics statistics() const;
  void reset_statistics() const;

 private:
  struct Impl;
  explicit Communicator(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

// Whether several ranks may use one CUDA device (comm.share_device; off). Before the first CUDA tensor.
void set_share_device(bool share);

}  // namespace trireme
