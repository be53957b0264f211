#include "comm/watch_channel.h"

#include <mpi.h>

#include <array>
#include <chrono>
#include <list>
#include <thread>

#include "base/check.h"
#include "comm/process.h"
#include "comm/verdict.h"

namespace trireme {

struct WatchChannel::Impl {
  struct Received {  // a long message is there before its text is
    Message message;
    MPI_Request request = MPI_REQUEST_NULL;
    bool whole() {
      int done = 0;
      return MPI_Test(&request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && done;
    }
  };
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
  std::list<Received> arriving;
  Sent beat;
  MPI_Request closing = MPI_REQUEST_NULL;
  bool is_closing = false;
};

namespace {

using Name = std::array<char, 64>;

struct Meeting {
  std::vector<Name> hosts;
  MPI_Comm comm = MPI_COMM_NULL;
};

// Host names of all ranks, at rank 0 and from there, and a communicator for them. Nothing blocks, so that a rank that does not
// come can be told.
std::unique_ptr<Meeting> meet(double patience_s) {
  using Clock = std::chrono::steady_clock;
  int rank = 0, size = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  auto meeting = std::make_unique<Meeting>();
  std::vector<Name>& hosts = meeting->hosts;
  hosts.resize(static_cast<size_t>(size));
  host_name().copy(hosts[static_cast<size_t>(rank)].data(), sizeof(Name) - 1);
  const auto begin = Clock::now();
  // All of these have ended within so many seconds? If not the meeting stays in memory: MPI may still write there.
  auto wait = [&](std::vector<MPI_Request>& requests, double seconds) {
    for (;;) {
      bool all = true;
      for (MPI_Request& request : requests) {
        int done = 0;
        if (MPI_Test(&request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS) throw SystemError("MPI_Test failed");
        all &= done != 0;
      }
      if (all) return true;
      if (std::chrono::duration<double>(Clock::now() - begin).count() > seconds) return static_cast<void>(meeting.release()), false;
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  };
  std::vector<MPI_Request> requests(static_cast<size_t>(rank == 0 ? size : 1), MPI_REQUEST_NULL);
  if (rank > 0) MPI_Isend(&hosts[static_cast<size_t>(rank)], sizeof(Name), MPI_BYTE, 0, 0, MPI_COMM_WORLD, requests.data());
  else
    for (size_t r = 1; r < hosts.size(); ++r) MPI_Irecv(&hosts[r], sizeof(Name), MPI_BYTE, static_cast<int>(r), 0, MPI_COMM_WORLD, &requests[r]);
  if (rank == 0 && !wait(requests, patience_s)) {
    std::vector<int> missing;
    for (int r = 1; r < size; ++r)
      if (requests[static_cast<size_t>(r)] != MPI_REQUEST_NULL) missing.push_back(r);
    throw SystemError(str(ranks_text(missing), " of ", size, missing.size() == 1 ? " has" : " have", " not come to the start of the program ", patience_s,
                          " s after rank 0 on ", host_name(), ": stopped or gone. All ranks are ended"));
  }
  requests.resize(requests.size() + 2);
  MPI_Ibcast(hosts.data(), size * static_cast<int>(sizeof(Name)), MPI_BYTE, 0, MPI_COMM_WORLD, &requests[requests.size() - 2]);
  MPI_Comm_idup(MPI_COMM_WORLD, &meeting->comm, &requests.back());
  // Rank 0, if it lives, knows who is missing and tells it first, unless it came later than this one by as much again.
  if (!wait(requests, 2 * patience_s))
    throw SystemError(str("rank ", rank, " on ", host_name(), " has waited ", 2 * patience_s,
                          " s for rank 0 to say that all ranks have come to the start of the program: rank 0 is stopped or gone. All ranks are ended"));
  return meeting;
}

}  // namespace

WatchChannel::WatchChannel(double patience_s) : impl_(std::make_unique<Impl>()) {
  const auto meeting = meet(patience_s);
  impl_->comm = meeting->comm;
  for (const Name& name : meeting->hosts) impl_->hosts.emplace_back(name.data());
  MPI_Comm_set_errhandler(impl_->comm, MPI_ERRORS_RETURN);
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
  int found = 1;
  for (;;) {
    MPI_Message handle;
    MPI_Status status;
    if (MPI_Improbe(MPI_ANY_SOURCE, MPI_ANY_TAG, impl_->comm, &found, &handle, &status) != MPI_SUCCESS || !found) break;
    int num_bytes = 0;
    MPI_Get_count(&status, MPI_BYTE, &num_bytes);
    Impl::Received& next = impl_->arriving.emplace_back();
    next.message = {status.MPI_SOURCE, static_cast<Kind>(status.MPI_TAG), std::string(static_cast<size_t>(num_bytes), '\0')};
    MPI_Imrecv(next.message.text.data(), num_bytes, MPI_BYTE, &handle, &next.request);
  }
  for (auto next = impl_->arriving.begin(); next != impl_->arriving.end(); ++next) {
    if (!next->whole()) continue;
    Message message = std::move(next->message);
    impl_->arriving.erase(next);
    return message;
  }
  return std::nullopt;
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
