#include "base/tensor.h"

#include "train/agreement.h"

#include "base/error_text.h"

namespace trireme {

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
  int worst = comm.agree(status);
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
