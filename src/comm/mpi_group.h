// The MPI calls that Communicator stands on: bytes between the ranks of one group. No mpi.h here: it stays in .cpp
// files. Every call is checked; SystemError names the operation and MPI's reason.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/check.h"

namespace trireme {

class MpiGroup;

// A message of another size than was expected.
struct SizeError : SystemError {
  using SystemError::SystemError;
};

// Messages in flight. Their memory belongs to MPI until test() is true.
class MpiRequests {
 public:
  explicit MpiRequests(std::shared_ptr<MpiGroup> group);
  ~MpiRequests();
  MpiRequests(const MpiRequests&) = delete;
  MpiRequests& operator=(const MpiRequests&) = delete;

  // Messages between two ranks with the same tag arrive in the order they were sent. Messages of more than a GiB go in
  // pieces, which the other side's equal size makes match. A size of 0 sends nothing.
  void send(const void* data, int64_t num_bytes, int peer, int tag);
  void receive(void* data, int64_t num_bytes, int peer, int tag);  // SizeError where another size arrives
  bool test();  // true when all are complete; then they are forgotten

  // Ranks of the world that have not sent or taken a message.
  std::vector<int> awaited() const;

 private:
  struct Impl;
  [[noreturn]] void refuse_size(size_t i, const std::string& received) const;
  std::shared_ptr<MpiGroup> group_;
  std::unique_ptr<Impl> impl_;
};

// A lone process starts MPI (0.3 s) only when it sends a message to itself: without MPI, world() and self() are groups
// of one all the same.
class MpiGroup {
 public:
  // Tags that a group has: kLaneUser for send and receive, kLaneCollective for Communicator's own exchanges, the others
  // for what the ends of a send between devices agree on. They never meet.
  enum Lane { kLaneUser, kLaneCollective, kLaneReady, kLaneGo };
  static constexpr int kNumTags = 1 << 21;  // a lane; 2^23 in all, the fewest that an Open MPI has (over UCX)

  static std::shared_ptr<MpiGroup> world();
  static std::shared_ptr<MpiGroup> self();
  ~MpiGroup();  // frees the MPI communicator, unless MPI has ended
  std::shared_ptr<MpiGroup> split(int color, int key);  // null where color < 0

  int rank() const { return rank_; }
  int size() const { return size_; }
  int tag(Lane lane, int64_t number) const {
    return lane * kNumTags + static_cast<int>(number % kNumTags);
  }
  // Of the group's collective `number`, where 0 <= kind < kNumKinds says what it does: ranks that do different things there
  // do not take each other's messages.
  int collective_tag(int64_t number, int kind) const {
    return tag(kLaneCollective, number % (kNumTags / kNumKinds) * kNumKinds + kind);
  }
  static constexpr int kNumKinds = 128;

  const std::vector<int>& world_ranks() const { return world_ranks_; }  // by rank here

 private:
  friend class MpiRequests;
  struct Handle;
  MpiGroup(std::unique_ptr<Handle> handle, bool has_mpi);
  Handle& handle();
  std::unique_ptr<Handle> handle_;
  int rank_ = 0, size_ = 1;
  std::vector<int> world_ranks_{0};
};

// MPI has been finalized, or a lone Process has ended: the program is about to.
bool mpi_ended();

}  // namespace trireme
