// Ends the job when an operation between ranks takes too long (a rank that was stopped or hangs is otherwise waited for
// without end), and says whose fault it is. One thread a process looks ten times a second:
//   - Each rank tells rank 0 every second what it is in (rank 0 tells rank 1). Two ranks that do different things as the
//     same operation of a group are seen there, long before the deadline.
//   - A rank whose operation is late tells rank 0. That asks all ranks for their last 256 operations; each writes them into
//     FOLDER/rank-N.txt and answers, also one that is stuck. Rank 0 says in one sentence who is to blame (comm/verdict.h)
//     and ends all ranks with status 1. Where rank 0 does not do so, rank 1 does, then rank 2, ...
// These messages go through an MPI communicator of their own and nobody waits for them.
#pragma once

#include <string>

#include "comm/flight_recorder.h"

namespace trireme {

// What Process sets when MPI has started, and the default of comm.timeout_s: long enough for a rank that reads a large model
// from a slow disk while its peers wait.
inline constexpr double kCommTimeout_s = 1800;

// From now on an operation that is in flight for more than timeout_s is late. 0: none is. Not for operations that wait by
// design: switch it off around them.
void set_comm_timeout(double timeout_s);

// While it lives, no timeout: on the ranks that wait while rank 0 tokenises or waits for a user. With a factor, a timeout so many
// times as long: for writing to a slow disk.
class CommTimeoutPause {
 public:
  explicit CommTimeoutPause(bool pauses = true, double factor = 0);  // pauses false: does nothing
  ~CommTimeoutPause();
  CommTimeoutPause(const CommTimeoutPause&) = delete;
  CommTimeoutPause& operator=(const CommTimeoutPause&) = delete;

 private:
  double timeout_s_ = 0;
  bool pauses_;
};

// Where the last operations are written, RUN/flight; until it is set, nowhere. It is made when it is needed.
void set_flight_folder(const std::string& folder);

// By Process, on all ranks: the watchdogs talk to each other from here on, to the end. Without it each speaks for itself.
void open_watch_channel();
void close_watch_channel();  // waits for all ranks, watched; nothing where it is not open

}  // namespace trireme
