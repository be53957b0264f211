// What the ranks were doing: a ring of the last collectives of this process (flight recorder), and a thread that ends
// the job when one takes too long (a rank that was stopped or hangs is otherwise waited for without end).
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace trireme {

class CommOperation;

// The last 256 collectives of this process, oldest first, one line each: sequence number, group, operation, bytes,
// state, age and duration. Any thread.
std::string dump_flight_recorder();

// What Process sets when MPI has started, and the default of comm.timeout_s: long enough for a rank that reads a large model
// from a slow disk while its peers wait.
inline constexpr double kCommTimeout_s = 1800;

// From now on an operation that is in flight for more than timeout_s prints rank, host, group, operation, sequence
// number, bytes, time and the ranks it waits for with the recorder's tail on stderr and ends all ranks with status 1. 0 switches it off. The
// thread runs only while a timeout is set. Not for operations that wait by design: switch it off around them.
void set_comm_timeout(double timeout_s);

// No timeout while it lives: around what may last as long as it wants, such as saving to a slow disk, or on the ranks that
// wait while rank 0 tokenises.
class CommTimeoutPause {
 public:
  explicit CommTimeoutPause(bool pauses = true);  // false: does nothing
  ~CommTimeoutPause();
  CommTimeoutPause(const CommTimeoutPause&) = delete;
  CommTimeoutPause& operator=(const CommTimeoutPause&) = delete;

 private:
  double timeout_s_ = 0;
  bool pauses_;
};

// Used by Communicator: the entry of an operation in the ring.
uint64_t flight_begin(const std::string& group, const char* op, int64_t num_bytes);  // returns its sequence number
void flight_has(uint64_t sequence, const std::shared_ptr<CommOperation>& operation);  // to ask whom it waits for
void flight_end(uint64_t sequence);

}  // namespace trireme
