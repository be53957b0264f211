// NCCL of the double of a device (device_double.cpp): each call is done when it returns. For runs whose ranks call in the same
// order, which pipelines do not; nccl_double.h is the strict and late one, without computation.
#include "device_double.h"

#include <mpi.h>

#include <cstring>
#include <map>
#include <memory>

#include "base/check.h"
#include "comm/nccl_api.h"

struct trireme::NcclOpaque {
  int number = 0, rank = 0;
  std::vector<int> world_ranks;
  int num_calls = 0;
};

namespace trireme {
namespace {

constexpr int kCallsPerGroup = 1000, kInvalidArgument = 4;

MPI_Comm world() {
  static const MPI_Comm world = [] {
    MPI_Comm copy;
    MPI_Comm_dup(MPI_COMM_WORLD, &copy);
    return copy;
  }();
  return world;
}

struct Id {
  int number, creator;
};

int get_unique_id(NcclUniqueId* id) {
  static int count = 0;
  Id mine{1 + count++, 0};
  if (int started = 0; MPI_Initialized(&started), started) MPI_Comm_rank(MPI_COMM_WORLD, &mine.creator);
  mine.number = mine.number * 64 + mine.creator;
  std::memcpy(id->bytes, &mine, sizeof mine);
  return kNcclSuccess;
}

// The ranks tell the id's creator where they are, who tells all of them.
int comm_init(NcclHandle* handle, int size, NcclUniqueId given, int rank, NcclConfig*) {
  Id id;
  std::memcpy(&id, given.bytes, sizeof id);
  *handle = new NcclOpaque{id.number, rank, std::vector<int>(static_cast<size_t>(size)), 1};
  if (size == 1) return kNcclSuccess;
  const int tag = id.number * kCallsPerGroup;
  MPI_Request request;
  MPI_Isend(&rank, 1, MPI_INT, id.creator, tag, world(), &request);
  std::vector<int>& all = (*handle)->world_ranks;
  int me = 0;
  MPI_Comm_rank(world(), &me);
  if (id.creator == me) {
    for (int i = 0; i < size; ++i) {
      int joining = 0;
      MPI_Status status;
      MPI_Recv(&joining, 1, MPI_INT, MPI_ANY_SOURCE, tag, world(), &status);
      all[static_cast<size_t>(joining)] = status.MPI_SOURCE;
    }
    const std::vector<int> table = all;
    for (int peer : table)
      if (peer != me) MPI_Send(table.data(), size, MPI_INT, peer, tag + 1, world());
  } else {
    MPI_Recv(all.data(), size, MPI_INT, id.creator, tag + 1, world(), MPI_STATUS_IGNORE);
  }
  MPI_Wait(&request, MPI_STATUS_IGNORE);
  (*handle)->num_calls = 2;
  return kNcclSuccess;
}

CommType type_of(int type) {
  static const std::map<int, CommType> types{{1, CommType::kUint8},   {2, CommType::kInt32},   {4, CommType::kInt64},   {6, CommType::kFloat16},
                                             {7, CommType::kFloat32}, {8, CommType::kFloat64}, {9, CommType::kBfloat16}};
  return types.at(type);
}

// What each rank gives to this one: rank p the p-th part of what it sends, or all of it.
std::vector<std::string> exchange(NcclHandle comm, const void* input, size_t bytes, bool parts) {
  const int size = static_cast<int>(comm->world_ranks.size()), tag = comm->number * kCallsPerGroup + comm->num_calls++ % kCallsPerGroup;
  std::vector<std::string> received(static_cast<size_t>(size), std::string(bytes, 0));
  std::vector<MPI_Request> requests;
  for (int p = 0; p < size; ++p) {
    const char* mine = static_cast<const char*>(input) + (parts ? static_cast<size_t>(p) * bytes : 0);
    if (p == comm->rank) {
      received[static_cast<size_t>(p)].assign(mine, bytes);
      continue;
    }
    const int peer = comm->world_ranks[static_cast<size_t>(p)];
    MPI_Isend(mine, static_cast<int>(bytes), MPI_BYTE, peer, tag, world(), &requests.emplace_back());
    MPI_Irecv(received[static_cast<size_t>(p)].data(), static_cast<int>(bytes), MPI_BYTE, peer, tag, world(), &requests.emplace_back());
  }
  if (size > 1) MPI_Waitall(static_cast<int>(requests.size()), requests.data(), MPI_STATUSES_IGNORE);
  return received;
}

void reduce(NcclHandle comm, const void* input, void* output, size_t count, int type, int op, bool parts) {
  const OpenDevice open;
  const std::vector<std::string> received = exchange(comm, input, count * static_cast<size_t>(comm_type_bytes(type_of(type))), parts);
  std::vector<const void*> all;
  for (const std::string& from : received) all.push_back(from.data());
  reduce_parts(type_of(type), op == 0 ? ReduceOp::kSum : op == 2 ? ReduceOp::kMax : ReduceOp::kMin, all, output, static_cast<int64_t>(count));
}

}  // namespace

void install_nccl_of_double() {
  static NcclApi api{};
  api.get_version = [](int* version) { return *version = 22809, 0; };
  api.get_error_string = [](int) { return "error"; };
  api.get_last_error = [](NcclHandle) { return ""; };
  api.get_unique_id = get_unique_id;
  api.comm_init_rank_config = comm_init;
  api.comm_get_async_error = [](NcclHandle, int* result) { return *result = kNcclSuccess, 0; };
  api.comm_finalize = [](NcclHandle) { return 0; };
  api.comm_destroy = [](NcclHandle comm) { return delete comm, 0; };
  api.comm_abort = [](NcclHandle comm) { return delete comm, 0; };
  api.all_reduce = [](const void* in, void* out, size_t n, int type, int op, NcclHandle comm, void*) { return reduce(comm, in, out, n, type, op, false), 0; };
  api.reduce_scatter = [](const void* in, void* out, size_t n, int type, int op, NcclHandle comm, void*) { return reduce(comm, in, out, n, type, op, true), 0; };
  api.all_gather = [](const void* in, void* out, size_t n, int type, NcclHandle comm, void*) {
    const OpenDevice open;
    const std::string all = [&] {
      std::string joined;
      for (const std::string& from : exchange(comm, in, n * static_cast<size_t>(comm_type_bytes(type_of(type))), false)) joined += from;
      return joined;
    }();
    std::memcpy(out, all.data(), all.size());
    return 0;
  };
  api.broadcast = [](const void* in, void* out, size_t n, int type, int root, NcclHandle comm, void*) {
    const OpenDevice open;
    const std::string from = exchange(comm, in, n * static_cast<size_t>(comm_type_bytes(type_of(type))), false)[static_cast<size_t>(root)];
    std::memcpy(out, from.data(), from.size());
    return 0;
  };
  api.send = [](const void*, size_t, int, int, NcclHandle, void*) { return kInvalidArgument; };
  api.receive = [](void*, size_t, int, int, NcclHandle, void*) { return kInvalidArgument; };
  api.group_start = [] { return 0; };
  api.group_end = [] { return 0; };
  api.device_type = c10::DeviceType::PrivateUse1;
  api.device_uuid = [](int device) { return std::string(16, static_cast<char>(device)); };
  set_nccl_api(&api);
}

}  // namespace trireme
