#include "base/tensor.h"

#include "train/agreement.h"

#include <chrono>
#include <thread>

#include "base/error_text.h"
#include "base/log.h"
#include "comm/process.h"

namespace trireme {

namespace {

// A rank that has failed cannot know whether its peers come here too or wait for it in a collective of the phase.
constexpr std::chrono::seconds kPeersComeWithin{20};

int worst_of(const Communicator& comm, int status, const std::string& message) {
  at::Tensor worst = at::full({1}, status, at::kLong);
  Work work = comm.start_all_reduce(worst, ReduceOp::kMax);
  const auto begin = std::chrono::steady_clock::now();
  while (status != kExitDone && !work.test()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (std::chrono::steady_clock::now() - begin < kPeersComeWithin) continue;
    log_message(LogLevel::kError, message);
    Process::abort(status);
  }
  work.wait();
  return static_cast<int>(worst.item<int64_t>());
}

}  // namespace

void agree_on(const Communicator& comm, const std::function<void()>& phase) {
  int status = kExitDone;
  std::string message;
  try {
    phase();
  } catch (const AgreedError&) {
    throw;  // the ranks have agreed already
  } catch (const Error& error) {
    status = error.status(), message = error.what();
  } catch (const std::exception& error) {
    status = kExitFailure, message = text_of(error);
  }
  const int worst = worst_of(comm, status, message);
  if (worst == kExitDone) return;
  auto messages = comm.gather_bytes(message);
  std::string first;
  for (size_t r = 0; r < messages.size() && first.empty(); ++r) {
    if (messages[r].empty()) continue;
    first = messages[r];
    size_t same = 0;
    for (const auto& m : messages) same += m == first;
    if (r > 0 && same != messages.size()) first = str("[rank ", r, "] ", first);
  }
  throw AgreedError(static_cast<ExitStatus>(worst), comm.broadcast_bytes(first));
}

}  // namespace trireme
