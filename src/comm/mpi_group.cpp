#include "comm/mpi_group.h"

#include <mpi.h>

#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "comm/process.h"

namespace trireme {

namespace {

constexpr int64_t kMaxMessageBytes = 1 << 30;  // MPI counts are ints

void check_mpi(int code, const char* operation) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw SystemError(str("MPI failed in ", operation, ": ", text));
}

bool mpi_runs() {
  int initialized = 0, finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized && !finalized;
}

}  // namespace

bool mpi_ended() { return !mpi_runs() && !Process::is_alone(); }

struct MpiGroup::Handle {
  MPI_Comm comm = MPI_COMM_NULL;
};

MpiGroup::MpiGroup(std::unique_ptr<Handle> handle, bool has_mpi) : handle_(std::move(handle)) {
  if (!has_mpi) return;
  check_mpi(MPI_Comm_set_errhandler(handle_->comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  check_mpi(MPI_Comm_rank(handle_->comm, &rank_), "MPI_Comm_rank");
  check_mpi(MPI_Comm_size(handle_->comm, &size_), "MPI_Comm_size");
  std::vector<int> ranks(static_cast<size_t>(size_));
  std::iota(ranks.begin(), ranks.end(), 0);
  world_ranks_.resize(ranks.size());
  MPI_Group world, group;
  MPI_Comm_group(MPI_COMM_WORLD, &world);
  MPI_Comm_group(handle_->comm, &group);
  check_mpi(MPI_Group_translate_ranks(group, size_, ranks.data(), world, world_ranks_.data()), "MPI_Group_translate_ranks");
  MPI_Group_free(&world);
  MPI_Group_free(&group);
}

MpiGroup::~MpiGroup() {
  if (handle_->comm != MPI_COMM_NULL && mpi_runs()) MPI_Comm_free(&handle_->comm);
}

MpiGroup::Handle& MpiGroup::handle() {
  if (handle_->comm == MPI_COMM_NULL) {  // a lone process that talks to itself
    Process::start_mpi();
    check_mpi(MPI_Comm_dup(MPI_COMM_SELF, &handle_->comm), "MPI_Comm_dup");
    check_mpi(MPI_Comm_set_errhandler(handle_->comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  }
  return *handle_;
}

std::shared_ptr<MpiGroup> MpiGroup::world() {
  auto handle = std::make_unique<Handle>();
  const bool has_mpi = mpi_runs();
  TRIREME_CHECK(has_mpi || Process::is_alone(), "a Communicator needs a Process");
  if (has_mpi) check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &handle->comm), "MPI_Comm_dup");
  return std::shared_ptr<MpiGroup>(new MpiGroup(std::move(handle), has_mpi));
}

std::shared_ptr<MpiGroup> MpiGroup::self() {
  auto handle = std::make_unique<Handle>();
  const bool has_mpi = mpi_runs();
  TRIREME_CHECK(has_mpi || Process::is_alone(), "a Communicator needs a Process");
  if (has_mpi) check_mpi(MPI_Comm_dup(MPI_COMM_SELF, &handle->comm), "MPI_Comm_dup");
  return std::shared_ptr<MpiGroup>(new MpiGroup(std::move(handle), has_mpi));
}

std::shared_ptr<MpiGroup> MpiGroup::split(int color, int key) {
  auto part = std::make_unique<Handle>();
  if (handle_->comm == MPI_COMM_NULL) {
    if (color < 0) return nullptr;
    return std::shared_ptr<MpiGroup>(new MpiGroup(std::move(part), false));
  }
  check_mpi(MPI_Comm_split(handle_->comm, color < 0 ? MPI_UNDEFINED : color, key, &part->comm), "MPI_Comm_split");
  if (part->comm == MPI_COMM_NULL) return nullptr;
  return std::shared_ptr<MpiGroup>(new MpiGroup(std::move(part), true));
}

struct MpiRequests::Impl {
  std::vector<MPI_Request> requests;
  std::vector<int> expected_bytes;  // of a receive; -1 for the others
  std::vector<int> peers;           // rank in the group at the other end
};

MpiRequests::MpiRequests(std::shared_ptr<MpiGroup> group) : group_(std::move(group)), impl_(std::make_unique<Impl>()) {}

MpiRequests::~MpiRequests() = default;

void MpiRequests::send(const void* data, int64_t num_bytes, int peer, int tag) {
  for (int64_t done = 0; done < num_bytes; done += kMaxMessageBytes) {
    const int bytes = static_cast<int>(std::min(kMaxMessageBytes, num_bytes - done));
    MPI_Request request;
    check_mpi(
        MPI_Isend(static_cast<const char*>(data) + done, bytes, MPI_BYTE, peer, tag, group_->handle().comm, &request),
        "MPI_Isend");
    impl_->requests.push_back(request);
    impl_->expected_bytes.push_back(-1);
    impl_->peers.push_back(peer);
  }
}

void MpiRequests::receive(void* data, int64_t num_bytes, int peer, int tag) {
  for (int64_t done = 0; done < num_bytes; done += kMaxMessageBytes) {
    const int bytes = static_cast<int>(std::min(kMaxMessageBytes, num_bytes - done));
    MPI_Request request;
    check_mpi(MPI_Irecv(static_cast<char*>(data) + done, bytes, MPI_BYTE, peer, tag, group_->handle().comm, &request),
              "MPI_Irecv");
    impl_->requests.push_back(request);
    impl_->expected_bytes.push_back(bytes);
    impl_->peers.push_back(peer);
  }
}

void MpiRequests::refuse_size(size_t i, const std::string& received) const {
  auto world = [&](int rank) { return group_->world_ranks()[static_cast<size_t>(rank)]; };
  throw SizeError(str("rank ", world(group_->rank_), " received ", received, " bytes from rank ", world(impl_->peers[i]), " where it expected ",
                      impl_->expected_bytes[i], "; the ranks do not do the same operations"));
}

bool MpiRequests::test() {
  if (impl_->requests.empty()) return true;
  int done = 0;
  std::vector<MPI_Status> statuses(impl_->requests.size());
  const int code =
      MPI_Testall(static_cast<int>(impl_->requests.size()), impl_->requests.data(), &done, statuses.data());
  if (code == MPI_ERR_IN_STATUS) {
    for (size_t i = 0; i < statuses.size(); ++i) {
      int kind = MPI_SUCCESS;
      if (statuses[i].MPI_ERROR == MPI_ERR_PENDING) continue;
      MPI_Error_class(statuses[i].MPI_ERROR, &kind);
      if (kind == MPI_ERR_TRUNCATE) refuse_size(i, "more");
      check_mpi(statuses[i].MPI_ERROR, "a message");
    }
  }
  check_mpi(code, "MPI_Testall");
  if (!done) return false;
  for (size_t i = 0; i < statuses.size(); ++i) {
    if (impl_->expected_bytes[i] < 0) continue;
    int bytes = 0;
    check_mpi(MPI_Get_count(&statuses[i], MPI_BYTE, &bytes), "MPI_Get_count");
    if (bytes != impl_->expected_bytes[i]) refuse_size(i, str(bytes));
  }
  impl_->requests.clear();
  impl_->expected_bytes.clear();
  impl_->peers.clear();
  return true;
}

std::vector<int> MpiRequests::awaited() const {
  std::vector<int> ranks;
  for (size_t i = 0; i < impl_->requests.size(); ++i) {
    int done = 0;
    check_mpi(MPI_Request_get_status(impl_->requests[i], &done, MPI_STATUS_IGNORE), "MPI_Request_get_status");
    const int rank = group_->world_ranks()[static_cast<size_t>(impl_->peers[i])];
    if (!done && std::find(ranks.begin(), ranks.end(), rank) == ranks.end()) ranks.push_back(rank);
  }
  return ranks;
}

}  // namespace trireme
