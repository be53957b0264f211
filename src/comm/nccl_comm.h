// One NCCL communicator with a stream of its own. Operations carry numbers 0, 1, 2, ... and enter the stream in that
// order. No call waits: what is not yet possible is tried again. Any thread. A failure of NCCL aborts the communicator,
// so that what its kernels hold up goes on, and is thrown by whatever is asked of it from then on: a SystemError that
// names operation, group, rank, host and NCCL's own words. Internal to comm/.
#pragma once

#include <c10/core/Stream.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <string>

#include "comm/nccl_api.h"

namespace trireme {

class NcclComm {
 public:
  NcclComm(std::string group, int size, int rank, c10::Device device);
  ~NcclComm();  // frees nothing of NCCL's: close() does
  NcclComm(const NcclComm&) = delete;
  NcclComm& operator=(const NcclComm&) = delete;

  using Calls = std::function<int(NcclHandle comm, void* stream)>;  // the first result that is no success, or success

  void begin(const NcclUniqueId& id);  // creates it, in the background; once, later calls do nothing
  bool has_turn(int64_t number);       // all before it are in the stream
  bool ready(const char* op);          // it exists
  void submit(const char* op, const Calls& calls);  // as one NCCL group, into the stream; by whoever has the turn
  bool settled(const char* op);        // the calls have reached the stream; then pass_turn()
  void pass_turn();
  bool is_oldest(int64_t number);      // all before it are complete
  void check(const char* op);          // throws what NCCL has noticed in the background
  void complete();                     // the oldest one is
  // Aborts; nothing where that has been done already. `spread`: nothing else of this process may go on either.
  void give_up(std::exception_ptr reason, bool spread = true);

  const c10::Stream& stream() const { return stream_; }
  const std::string& group() const { return group_; }

  // At the end, in three rounds over all communicators of a group, so that no rank waits for one that waits for it.
  bool idle();               // nothing is in the stream, or it was given up
  void begin_close();
  bool closed();             // true when NCCL has freed it

 private:
  void throw_if_failed() const;
  [[noreturn]] void fail(const char* op, int result);  // locked
  bool poll(const char* op);              // locked

  const std::string group_;
  const int size_, rank_;
  c10::Stream stream_;
  std::mutex mutex_;
  NcclHandle handle_ = nullptr;
  bool begun_ = false, ready_ = false;
  int64_t turn_ = 0, num_complete_ = 0;
  std::exception_ptr failure_;
};

// Throws where a communicator of this process has been given up: data may be wrong, no rank may go on with it.
void throw_if_nccl_failed();
void forget_nccl_failure();  // for tests

// A refused call.
void check_nccl(int result, const char* function);

}  // namespace trireme
