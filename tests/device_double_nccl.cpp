// NCCL of the double of a device (device_double.cpp): calls return at once, and are carried out in their stream's order, each when all
// its ranks have come to it; advance_nccl_of_double() moves them on. nccl_double.h is the stricter one, without computation.
#include "device_double.h"

#include <mpi.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>

#include "base/check.h"
#include "comm/nccl_api.h"

struct trireme::NcclOpaque {
  int number = 0, rank = 0, creator = 0;
  std::vector<int> world_ranks;  // by rank, once it is known
  std::vector<int> joining;      // of the creator: who has come, until all have
  std::vector<MPI_Request> requests;
  bool is_joined = false;
  int num_calls = 0;
};

namespace trireme {
namespace {

constexpr int kTagsPerComm = 1000, kTagJoin = kTagsPerComm - 1, kTagTable = kTagsPerComm - 2, kNumTags = kTagsPerComm - 2;

// Not a copy of it, which all ranks would have to make at once. Nobody else sends here.
MPI_Comm world() { return MPI_COMM_WORLD; }
int world_rank() {
  int rank = 0;
  MPI_Comm_rank(world(), &rank);
  return rank;
}

struct Id {
  int number, creator;
};

int get_unique_id(NcclUniqueId* id) {
  static std::atomic<int> count = 0;
  Id mine{1 + count++, 0};
  if (int started = 0; MPI_Initialized(&started), started) MPI_Comm_rank(MPI_COMM_WORLD, &mine.creator);
  mine.number = mine.number * 64 + mine.creator;
  std::memcpy(id->bytes, &mine, sizeof mine);
  return kNcclSuccess;
}

bool all_done(std::vector<MPI_Request>& requests) {
  if (requests.empty()) return true;  // of one rank alone, for which MPI need not have begun
  int done = 0;
  MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE);
  if (done) requests.clear();
  return done;
}

// The ranks tell the id's creator who they are, who tells all of them.
int comm_init(NcclHandle* handle, int size, NcclUniqueId given, int rank, NcclConfig*) {
  Id id;
  std::memcpy(&id, given.bytes, sizeof id);
  *handle = new NcclOpaque{id.number, rank, id.creator, std::vector<int>(static_cast<size_t>(size), -1), {}, {}, size == 1};
  if (size == 1) return kNcclSuccess;
  const int tag = id.number * kTagsPerComm, me = world_rank();
  (*handle)->world_ranks[static_cast<size_t>(rank)] = me;
  if (me == id.creator) {
    (*handle)->joining = {rank};
  } else {
    MPI_Isend(&(*handle)->rank, 1, MPI_INT, id.creator, tag + kTagJoin, world(), &(*handle)->requests.emplace_back());
    MPI_Irecv((*handle)->world_ranks.data(), size, MPI_INT, id.creator, tag + kTagTable, world(), &(*handle)->requests.emplace_back());
  }
  return kNcclSuccess;
}

bool joined(NcclHandle comm) {
  static std::mutex mutex;  // several operations ask at once
  std::lock_guard lock(mutex);
  if (comm->is_joined) return true;
  const int size = static_cast<int>(comm->world_ranks.size()), tag = comm->number * kTagsPerComm;
  if (comm->creator == world_rank() && static_cast<int>(comm->joining.size()) < size) {
    int there = 0;
    MPI_Status status;
    while (MPI_Iprobe(MPI_ANY_SOURCE, tag + kTagJoin, world(), &there, &status), there) {
      MPI_Recv(&comm->joining.emplace_back(), 1, MPI_INT, status.MPI_SOURCE, tag + kTagJoin, world(), MPI_STATUS_IGNORE);
      comm->world_ranks[static_cast<size_t>(comm->joining.back())] = status.MPI_SOURCE;
    }
    if (static_cast<int>(comm->joining.size()) < size) return false;
    for (int peer : comm->world_ranks)
      if (peer != comm->creator) MPI_Isend(comm->world_ranks.data(), size, MPI_INT, peer, tag + kTagTable, world(), &comm->requests.emplace_back());
  }
  return comm->is_joined = all_done(comm->requests);
}

CommType type_of(int type) {
  static const std::map<int, CommType> types{{0, CommType::kInt8},    {1, CommType::kUint8},   {2, CommType::kInt32},   {4, CommType::kInt64},   {6, CommType::kFloat16},
                                             {7, CommType::kFloat32}, {8, CommType::kFloat64}, {9, CommType::kBfloat16}};
  return types.at(type);
}

// --- calls -------------------------------------------------------------------------------------------------------------

struct Call {
  std::function<void(Call&)> begin, finish;  // `finish`: when all requests are done
  std::string sent;                          // copied as it begins: the device's memory is closed in between
  std::vector<std::string> received;
  std::vector<MPI_Request> requests;
  bool has_begun = false;
  std::shared_ptr<bool> done = std::make_shared<bool>(false);
};

struct Calls {
  std::mutex mutex;
  std::map<c10::StreamId, std::deque<Call>> of_stream;
};
Calls& calls() {
  static Calls* calls = new Calls;
  return *calls;
}

int put(void* stream, Call call) {
  std::lock_guard lock(calls().mutex);
  calls().of_stream[reinterpret_cast<c10::StreamId>(stream)].push_back(std::move(call));
  return kNcclSuccess;
}

// What each rank gives to this one: rank p the p-th part of what it sends, or all of it.
Call exchange(NcclHandle comm, const void* input, size_t bytes, bool parts, std::function<void(const std::vector<std::string>&)> finish) {
  const int tag = comm->number * kTagsPerComm + comm->num_calls++ % kNumTags;
  Call made;
  made.begin = [=](Call& call) {
    const size_t size = comm->world_ranks.size();
    call.sent.assign(static_cast<const char*>(input), parts ? size * bytes : bytes);
    call.received.assign(size, std::string(bytes, 0));
    call.received[static_cast<size_t>(comm->rank)] = call.sent.substr(parts ? static_cast<size_t>(comm->rank) * bytes : 0, bytes);
    for (size_t p = 0; p < size; ++p) {
      if (p == static_cast<size_t>(comm->rank)) continue;
      const char* mine = call.sent.data() + (parts ? p * bytes : 0);
      MPI_Isend(mine, static_cast<int>(bytes), MPI_BYTE, comm->world_ranks[p], tag, world(), &call.requests.emplace_back());
      MPI_Irecv(call.received[p].data(), static_cast<int>(bytes), MPI_BYTE, comm->world_ranks[p], tag, world(), &call.requests.emplace_back());
    }
  };
  made.finish = [finish = std::move(finish)](Call& call) { finish(call.received); };
  return made;
}

int reduce(NcclHandle comm, const void* input, void* output, size_t count, int type, int op, bool parts, void* stream) {
  return put(stream, exchange(comm, input, count * static_cast<size_t>(comm_type_bytes(type_of(type))), parts, [=](const std::vector<std::string>& received) {
               std::vector<const void*> all;
               for (const std::string& from : received) all.push_back(from.data());
               reduce_parts(type_of(type), op == 0 ? ReduceOp::kSum : op == 2 ? ReduceOp::kMax : ReduceOp::kMin, all, output, static_cast<int64_t>(count));
             }));
}

int all_gather(const void* input, void* output, size_t count, int type, NcclHandle comm, void* stream) {
  return put(stream, exchange(comm, input, count * static_cast<size_t>(comm_type_bytes(type_of(type))), false, [=](const std::vector<std::string>& received) {
               std::string all;
               for (const std::string& from : received) all += from;
               std::memcpy(output, all.data(), all.size());
             }));
}

int broadcast(const void* input, void* output, size_t count, int type, int root, NcclHandle comm, void* stream) {
  return put(stream, exchange(comm, input, count * static_cast<size_t>(comm_type_bytes(type_of(type))), false, [=](const std::vector<std::string>& received) {
               const std::string& from = received[static_cast<size_t>(root)];
               std::memcpy(output, from.data(), from.size());
             }));
}

// Messages of a pair are numbered apart from what all ranks do.
int send(const void* input, size_t count, int type, int peer, NcclHandle comm, void* stream) {
  const size_t bytes = count * static_cast<size_t>(comm_type_bytes(type_of(type)));
  Call made;
  made.begin = [=](Call& call) {
    call.sent.assign(static_cast<const char*>(input), bytes);
    MPI_Isend(call.sent.data(), static_cast<int>(bytes), MPI_BYTE, comm->world_ranks[static_cast<size_t>(peer)], comm->number * kTagsPerComm, world(), &call.requests.emplace_back());
  };
  made.finish = [](Call&) {};
  return put(stream, std::move(made));
}

int receive(void* output, size_t count, int type, int peer, NcclHandle comm, void* stream) {
  const size_t bytes = count * static_cast<size_t>(comm_type_bytes(type_of(type)));
  Call made;
  made.begin = [=](Call& call) {
    call.received.assign(1, std::string(bytes, 0));
    MPI_Irecv(call.received[0].data(), static_cast<int>(bytes), MPI_BYTE, comm->world_ranks[static_cast<size_t>(peer)], comm->number * kTagsPerComm, world(), &call.requests.emplace_back());
  };
  made.finish = [=](Call& call) { std::memcpy(output, call.received[0].data(), bytes); };
  return put(stream, std::move(made));
}

}  // namespace

std::shared_ptr<bool> last_call_in(c10::StreamId stream) {
  std::lock_guard lock(calls().mutex);
  const auto found = calls().of_stream.find(stream);
  return found == calls().of_stream.end() || found->second.empty() ? nullptr : found->second.back().done;
}

void advance_nccl_of_double() {
  std::lock_guard lock(calls().mutex);
  for (auto& [stream, waiting] : calls().of_stream)
    while (!waiting.empty()) {
      Call& call = waiting.front();
      const auto open_and = [&](const auto& part) {
        const OpenDevice open;
        part(call);
      };
      if (!call.has_begun) open_and(call.begin), call.has_begun = true;
      if (!all_done(call.requests)) break;
      open_and(call.finish);
      *call.done = true;
      waiting.pop_front();
    }
}

void install_nccl_of_double() {
  static NcclApi api{};
  api.get_version = [](int* version) { return *version = 22809, 0; };
  api.get_error_string = [](int) { return "error"; };
  api.get_last_error = [](NcclHandle) { return ""; };
  api.get_unique_id = get_unique_id;
  api.comm_init_rank_config = comm_init;
  api.comm_get_async_error = [](NcclHandle comm, int* result) { return *result = joined(comm) ? kNcclSuccess : kNcclInProgress, 0; };
  api.comm_finalize = [](NcclHandle) { return 0; };
  api.comm_destroy = [](NcclHandle) { return 0; };  // it may have messages under way
  api.comm_abort = [](NcclHandle) { return 0; };
  api.all_reduce = [](const void* in, void* out, size_t n, int type, int op, NcclHandle comm, void* stream) { return reduce(comm, in, out, n, type, op, false, stream); };
  api.reduce_scatter = [](const void* in, void* out, size_t n, int type, int op, NcclHandle comm, void* stream) { return reduce(comm, in, out, n, type, op, true, stream); };
  api.all_gather = all_gather;
  api.broadcast = broadcast;
  api.send = send;
  api.receive = receive;
  api.group_start = [] { return 0; };
  api.group_end = [] { return 0; };
  api.device_type = c10::DeviceType::PrivateUse1;
  api.device_uuid = [](int device) { return uuids_of_double().at(static_cast<size_t>(device)); };
  set_nccl_api(&api);
}

}  // namespace trireme
