#include "comm/watch_channel.h"

#include <mpi.h>

#include <array>
#include <list>

#include "base/check.h"
#include "comm/process.h"

namespace trireme {

struct WatchChannel::Impl {
  struct Sent {
    std::string text;
    MPI_Request request = MPI_REQUEST_NULL;
    bool taken() {
      int done = 0;
      return MPI_Test(&request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && done;
    }
  };
  MPI_Comm comm = MPI_COMM_NULL;
  std::vector<std::string> hosts;
  std::list<Sent> posted;
  Sent beat;
  MPI_Request closing = MPI_REQUEST_NULL;
  bool is_closing = false;
};

WatchChannel::WatchChannel() : impl_(std::make_unique<Impl>()) {
  if (MPI_Comm_dup(MPI_COMM_WORLD, &impl_->comm) != MPI_SUCCESS) throw SystemError("MPI_Comm_dup failed");
  MPI_Comm_set_errhandler(impl_->comm, MPI_ERRORS_RETURN);
  int size = 1;
  MPI_Comm_size(impl_->comm, &size);
  using Name = std::array<char, 64>;
  Name mine{};
  host_name().copy(mine.data(), mine.size() - 1);
  std::vector<Name> all(static_cast<size_t>(size));
  if (MPI_Allgather(mine.data(), sizeof mine, MPI_BYTE, all.data(), sizeof mine, MPI_BYTE, impl_->comm) != MPI_SUCCESS)
    throw SystemError("MPI_Allgather failed");
  for (const Name& name : all) impl_->hosts.emplace_back(name.data());
}

WatchChannel::~WatchChannel() {
  if (impl_->is_closing) MPI_Comm_free(&impl_->comm);
}

const std::vector<std::string>& WatchChannel::hosts() const { return impl_->hosts; }

void WatchChannel::post(int to, Kind kind, std::string text) {
  impl_->posted.remove_if([](Impl::Sent& sent) { return sent.taken(); });
  Impl::Sent& sent = impl_->posted.emplace_back(std::move(text));
  MPI_Isend(sent.text.data(), static_cast<int>(sent.text.size()), MPI_BYTE, to, kind, impl_->comm, &sent.request);
}

void WatchChannel::beat(int to, const std::string& text) {
  if (!impl_->beat.taken()) return;
  impl_->beat.text = text;
  MPI_Issend(impl_->beat.text.data(), static_cast<int>(text.size()), MPI_BYTE, to, kHeartbeat, impl_->comm, &impl_->beat.request);
}

std::optional<WatchChannel::Message> WatchChannel::receive() {
  int found = 0, num_bytes = 0;
  MPI_Status status;
  if (MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, impl_->comm, &found, &status) != MPI_SUCCESS || !found) return std::nullopt;
  MPI_Get_count(&status, MPI_BYTE, &num_bytes);
  Message message{status.MPI_SOURCE, static_cast<Kind>(status.MPI_TAG), std::string(static_cast<size_t>(num_bytes), '\0')};
  if (MPI_Recv(message.text.data(), num_bytes, MPI_BYTE, status.MPI_SOURCE, status.MPI_TAG, impl_->comm, MPI_STATUS_IGNORE) != MPI_SUCCESS)
    return std::nullopt;
  return message;
}

bool WatchChannel::close() {
  if (!impl_->is_closing) {
    if (!impl_->beat.taken()) return false;
    MPI_Ibarrier(impl_->comm, &impl_->closing);
    impl_->is_closing = true;
  }
  int done = 0;
  return MPI_Test(&impl_->closing, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && done;
}

}  // namespace trireme
