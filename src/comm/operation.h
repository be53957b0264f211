// A collective as a small state machine over MpiRequests, and the engine that moves all of them on. Internal to comm/.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/mpi_group.h"
#include "comm/reduce_parts.h"

namespace trireme {

class CommOperation : public std::enable_shared_from_this<CommOperation> {
 public:
  explicit CommOperation(std::shared_ptr<MpiGroup> group) : requests_(std::move(group)) {}
  virtual ~CommOperation() = default;

  // True when done. Any thread; where another thread is at it already: false at once.
  bool try_advance();
  bool done() const { return done_.load(std::memory_order_acquire); }
  // Whether wait() may return: it is done or, on a device, in its stream's queue, where join_stream() orders what follows.
  bool released() const { return done() || released_.load(std::memory_order_acquire); }
  virtual void join_stream() {}  // the caller's current stream waits for it; nothing for CPU tensors. After released()
  virtual void abort() {}        // it is late: ends what hangs in a device. Any thread
  std::vector<int> awaited();  // ranks of the world that it waits for, as far as known. Any thread
  // What went wrong, after done(). A failed operation and its tensors are never freed: MPI may still write there.
  void rethrow();

  uint64_t flight = 0;                     // number in the flight recorder
  std::string op, group;                   // their names
  int64_t num_bytes = 0;
  std::shared_ptr<void> keep_alive;        // tensors
  std::shared_ptr<std::atomic<int64_t>> nanoseconds;  // statistics: time spent in the caller's thread

 protected:
  virtual bool advance() = 0;  // posts what can be posted; true when done
  void release() { released_.store(true, std::memory_order_release); }
  MpiRequests requests_;

 private:
  std::mutex mutex_;
  std::atomic<bool> done_ = false, released_ = false;
  std::exception_ptr error_;
};

// Buffers belong to the caller and outlive the operation. `tag`: one of the group's, the same on all ranks and of no
// other operation in flight. Sizes in elements; reductions: of the whole tensor, or of one rank's part.
struct Exchange {
  std::shared_ptr<MpiGroup> group;
  int tag;
};
std::shared_ptr<CommOperation> make_all_reduce(const Exchange& e, CommType type, ReduceOp op, void* data,
                                               int64_t num_elements);
std::shared_ptr<CommOperation> make_reduce_scatter(const Exchange& e, CommType type, ReduceOp op, void* output,
                                                   const void* input, int64_t num_part_elements);
std::shared_ptr<CommOperation> make_all_gather(const Exchange& e, void* output, const void* input,
                                               int64_t num_part_bytes);
std::shared_ptr<CommOperation> make_all_to_all(const Exchange& e, void* output, const void* input,
                                               int64_t num_part_bytes);
std::shared_ptr<CommOperation> make_broadcast(const Exchange& e, void* data, int64_t num_bytes, int root);
std::shared_ptr<CommOperation> make_barrier(const Exchange& e);
std::shared_ptr<CommOperation> make_send(const Exchange& e, const void* data, int64_t num_bytes, int to);
std::shared_ptr<CommOperation> make_receive(const Exchange& e, void* data, int64_t num_bytes, int from);

// Gives a non-blocking operation to the engine: it moves on in the background thread, and whenever any operation is
// waited for or (without the thread) tested.
void engine_add(std::shared_ptr<CommOperation> operation);
// Done? Moves all operations on once, unless the background thread does that: then the caller's time is for computing.
bool engine_test(CommOperation& operation);
// Until the operation is released, moving all others on as well: a peer may wait for them first.
void engine_wait(CommOperation& operation);
void engine_advance();  // moves all operations on once

}  // namespace trireme
