#include "comm/nccl_comm.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>
#include <set>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "comm/process.h"

namespace trireme {

namespace {

struct Failure {
  std::mutex mutex;
  std::exception_ptr reason;
  std::atomic<bool> there = false;
};

Failure& first_failure() {
  static Failure* failure = new Failure;  // never destroyed: the background thread may outlive main()
  return *failure;
}

constexpr int kNumPoolStreams = 32;  // that libtorch has a device and priority

struct StreamsInUse {
  std::mutex mutex;
  std::set<c10::StreamId> ids;
};

StreamsInUse& streams_in_use() {
  static StreamsInUse* streams = new StreamsInUse;
  return *streams;
}

// Two communicators that wait for different peers may not share a stream: libtorch's pool deals its streams out in turn.
c10::Stream own_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  StreamsInUse& used = streams_in_use();
  std::lock_guard lock(used.mutex);
  for (int i = 0; i < kNumPoolStreams; ++i) {
    const c10::Stream stream = guard.getStreamFromGlobalPool(device, /*isHighPriority=*/true);
    if (used.ids.insert(stream.id()).second) return stream;
  }
  throw SystemError(str("more than ", kNumPoolStreams, " NCCL communicators on one device"));
}

std::string last_words(NcclHandle handle) {
  const char* text = handle ? nccl_api().get_last_error(handle) : nullptr;
  return text && *text ? str(" (", text, ")") : "";
}

}  // namespace

void throw_if_nccl_failed() {
  Failure& failure = first_failure();
  if (!failure.there) return;
  std::lock_guard lock(failure.mutex);
  std::rethrow_exception(failure.reason);
}

void forget_nccl_failure() { first_failure().there = false; }

void check_nccl(int result, const char* function) {
  if (result == kNcclSuccess || result == kNcclInProgress) return;
  throw SystemError(str(function, " failed on rank ", log_rank(), ", host ", host_name(), ": ",
                        nccl_api().get_error_string(result), last_words(nullptr)));
}

NcclComm::NcclComm(std::string group, int size, int rank, c10::Device device)
    : group_(std::move(group)), size_(size), rank_(rank), stream_(own_stream(device)) {}

NcclComm::~NcclComm() {
  StreamsInUse& used = streams_in_use();
  std::lock_guard lock(used.mutex);
  used.ids.erase(stream_.id());
}

void NcclComm::throw_if_failed() const {
  if (failure_) std::rethrow_exception(failure_);
}

void NcclComm::begin(const NcclUniqueId& id) {
  std::lock_guard lock(mutex_);
  throw_if_failed();
  if (std::exchange(begun_, true)) return;
  NcclConfig config;
  check_nccl(nccl_api().comm_init_rank_config(&handle_, size_, id, rank_, &config), "ncclCommInitRankConfig");
}

bool NcclComm::has_turn(int64_t number) {
  std::lock_guard lock(mutex_);
  throw_if_failed();
  return turn_ == number;
}

bool NcclComm::ready(const char* op) {
  std::lock_guard lock(mutex_);
  throw_if_failed();
  if (!ready_ && begun_) ready_ = poll(op);
  return ready_;
}

void NcclComm::submit(const char* op, const Calls& calls) {
  std::lock_guard lock(mutex_);
  throw_if_failed();
  poll(op);  // an earlier failure is the reason to tell (here and below), not that NCCL refuses this call
  nccl_api().group_start();
  const int called = calls(handle_, c10::impl::VirtualGuardImpl(stream_.device_type()).getStreamNativeHandle(stream_));
  const int ended = nccl_api().group_end();
  for (const int result : {called, ended}) {
    if (result == kNcclSuccess || result == kNcclInProgress) continue;
    poll(op);
    fail(op, result);
  }
}

bool NcclComm::settled(const char* op) {
  std::lock_guard lock(mutex_);
  throw_if_failed();
  return poll(op);
}

void NcclComm::pass_turn() {
  std::lock_guard lock(mutex_);
  ++turn_;
}

bool NcclComm::is_oldest(int64_t number) {
  std::lock_guard lock(mutex_);
  throw_if_failed();
  return num_complete_ == number;
}

void NcclComm::check(const char* op) {
  std::lock_guard lock(mutex_);
  throw_if_failed();
  poll(op);
}

void NcclComm::complete() {
  std::lock_guard lock(mutex_);
  ++num_complete_;
}

bool NcclComm::poll(const char* op) {
  int state = kNcclSuccess;
  const int result = nccl_api().comm_get_async_error(handle_, &state);
  if (result != kNcclSuccess) fail(op, result);
  if (state != kNcclSuccess && state != kNcclInProgress) fail(op, state);
  return state == kNcclSuccess;
}

void NcclComm::fail(const char* op, int result) {
  throw SystemError(str("NCCL failed in ", op, " of group ", group_, " on rank ", log_rank(), ", host ", host_name(), ": ",
                        nccl_api().get_error_string(result), last_words(handle_)));
}

void NcclComm::give_up(std::exception_ptr reason, bool spread) {
  std::lock_guard lock(mutex_);
  if (failure_) return;
  failure_ = reason;
  if (spread) {
    Failure& first = first_failure();
    std::lock_guard first_lock(first.mutex);
    if (!first.there) first.reason = reason;
    first.there = true;
  }
  if (handle_) nccl_api().comm_abort(std::exchange(handle_, nullptr));
}

bool NcclComm::idle() {
  std::lock_guard lock(mutex_);
  return failure_ || num_complete_ == turn_;
}

void NcclComm::begin_close() {
  std::lock_guard lock(mutex_);
  if (!handle_) return;
  if (ready_)
    nccl_api().comm_finalize(handle_);
  else
    nccl_api().comm_abort(std::exchange(handle_, nullptr));
}

bool NcclComm::closed() {
  std::lock_guard lock(mutex_);
  if (!handle_) return true;
  int state = kNcclSuccess;
  if (nccl_api().comm_get_async_error(handle_, &state) == kNcclSuccess && state == kNcclInProgress) return false;
  if (state == kNcclSuccess)
    nccl_api().comm_destroy(handle_);
  else
    nccl_api().comm_abort(handle_);
  handle_ = nullptr;
  return true;
}

}  // namespace trireme
