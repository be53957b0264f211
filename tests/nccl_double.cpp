#include "nccl_double.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <mpi.h>

#include <chrono>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "base/check.h"
#include "comm/reduce_parts.h"

struct trireme::NcclOpaque {};

namespace trireme::test {

namespace {

using Clock = std::chrono::steady_clock;

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
constexpr int kInvalidArgument = 4;
constexpr int kTagsPerComm = 1024, kTagJoin = 1022, kTagTable = 1023;  // below: collectives; 0: messages

enum class Kind { kAllReduce, kReduceScatter, kAllGather, kBroadcast, kSend, kReceive };

struct Op {
  Kind kind;
  const void* input;
  void* output;
  size_t count;
  int type, op, peer;
  int64_t num_bytes;
};

struct Comm : NcclOpaque {
  int number = 0, size = 0, rank = 0;
  std::vector<int> world_ranks;
  int state = kNcclInProgress;
  bool aborted = false;
  int64_t num_collectives = 0;
  std::deque<int> order;  // kernels, by number, that have been launched and have not ended
  int finalizing = 0;
};

using Item = std::function<bool()>;  // true when it is done

struct Stream {
  std::deque<Item> items;
  Clock::time_point not_before;
};

struct Event {
  std::shared_ptr<bool> reached;
};

struct Device {
  std::recursive_mutex mutex;
  std::map<c10::StreamId, Stream> streams;
  std::list<Item> jobs;  // of NCCL's own threads
  std::list<Comm> comms;  // for ever: kernels in streams look at them
  std::mt19937 random{7};
  bool paused = false, calls_paused = false;
  MPI_Comm world = MPI_COMM_NULL;
  int world_rank = 0, num_comms = 0, num_kernels = 0, fail_kernel = 0, fail_init = 0, num_streams = 0;
  char uuid = 0;
  NcclCounts counts;
  std::string last_error;

  Clock::time_point later() { return Clock::now() + std::chrono::microseconds(random() % 100); }

  void run() {
    for (;;) {
      bool moved = false;
      {
        std::lock_guard lock(mutex);
        for (auto job = jobs.begin(); job != jobs.end() && !calls_paused;) {
          const bool done = (*job)();
          moved |= done;
          job = done ? jobs.erase(job) : std::next(job);
        }
        for (auto& [id, stream] : streams) {
          if (paused || stream.items.empty() || Clock::now() < stream.not_before || !stream.items.front()()) continue;
          stream.items.pop_front();
          stream.not_before = later();
          moved = true;
        }
      }
      if (!moved) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }
};

Device& device() {
  static Device* device = new Device;  // never destroyed: its thread runs until the process ends
  return *device;
}

thread_local c10::StreamId current_id = 0;

c10::Stream make_stream(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, 0), id); }

void push(c10::StreamId id, Item item) {
  Device& d = device();
  std::lock_guard lock(d.mutex);
  Stream& stream = d.streams[id];
  if (stream.items.empty()) stream.not_before = d.later();
  stream.items.push_back(std::move(item));
}

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(kType, 0); }
  c10::Device getDevice() const override { return c10::Device(kType, 0); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return make_stream(current_id); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override {
    std::lock_guard lock(device().mutex);
    return make_stream(1 + device().num_streams++ % 32);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return make_stream(std::exchange(current_id, stream.id()));
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(static_cast<intptr_t>(stream.id()));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    std::lock_guard lock(device().mutex);
    if (!*event) *event = new Event;
    auto reached = std::make_shared<bool>(false);
    static_cast<Event*>(*event)->reached = reached;
    push(stream.id(), [reached] { return *reached = true; });
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (!event) return;
    std::lock_guard lock(device().mutex);
    push(stream.id(), [reached = static_cast<Event*>(event)->reached] { return *reached; });
  }
  bool queryEvent(void* event) const override {
    std::lock_guard lock(device().mutex);
    return !event || *static_cast<Event*>(event)->reached;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

void synchronize_current_stream() {
  for (;;) {
    {
      std::lock_guard lock(device().mutex);
      if (device().streams[current_id].items.empty()) return;
    }
    std::this_thread::yield();
  }
}

// --- NCCL -------------------------------------------------------------------------------------------------------------

struct Id {
  int number, creator;
};

// One launch: all calls of a group on one communicator.
struct Kernel {
  Comm* comm;
  int number;
  std::vector<Op> ops;
  bool started = false;
  std::vector<MPI_Request> requests;
  std::vector<std::pair<size_t, int64_t>> expected;  // request that receives, bytes
  std::vector<std::vector<char>> received, sent;     // of the collective, by rank

  void send(const void* data, int64_t bytes, int peer, int tag, bool rendezvous) {
    MPI_Request request;
    (rendezvous ? MPI_Issend : MPI_Isend)(data, static_cast<int>(bytes), MPI_BYTE,
                                          comm->world_ranks[static_cast<size_t>(peer)],
                                          comm->number * kTagsPerComm + tag, device().world, &request);
    requests.push_back(request);
  }
  void receive(void* data, int64_t bytes, int peer, int tag) {
    MPI_Request request;
    MPI_Irecv(data, static_cast<int>(bytes), MPI_BYTE, comm->world_ranks[static_cast<size_t>(peer)],
              comm->number * kTagsPerComm + tag, device().world, &request);
    expected.emplace_back(requests.size(), bytes);
    requests.push_back(request);
  }

  void start() {
    for (const Op& op : ops) {
      if (op.kind == Kind::kSend || op.kind == Kind::kReceive) {
        if (op.peer == comm->rank) continue;
        if (op.kind == Kind::kSend)
          send(op.input, op.num_bytes, op.peer, 0, true);
        else
          receive(op.output, op.num_bytes, op.peer, 0);
        continue;
      }
      const int tag = static_cast<int>(1 + comm->num_collectives++ % 1000);
      const size_t n = static_cast<size_t>(comm->size);
      received.resize(n);
      sent.resize(n);
      const auto* input = static_cast<const char*>(op.input);
      for (int p = 0; p < comm->size; ++p) {
        const size_t i = static_cast<size_t>(p);
        const bool from = op.kind != Kind::kBroadcast || p == op.peer;
        const bool to = op.kind != Kind::kBroadcast || comm->rank == op.peer;
        received[i].resize(static_cast<size_t>(op.num_bytes));
        const char* mine = op.kind == Kind::kReduceScatter ? input + p * op.num_bytes : input;
        if (to) sent[i].assign(mine, mine + op.num_bytes);
        if (p == comm->rank) {
          received[i] = sent[i];
          continue;
        }
        if (from) receive(received[i].data(), op.num_bytes, p, tag);
        if (to) send(sent[i].data(), op.num_bytes, p, tag, false);
      }
    }
  }
  void finish() {
    for (const Op& op : ops) {
      auto* output = static_cast<char*>(op.output);
      const size_t bytes = static_cast<size_t>(op.num_bytes);
      switch (op.kind) {
        case Kind::kSend:
          if (op.peer == comm->rank)
            for (const Op& other : ops)
              if (other.kind == Kind::kReceive && other.peer == comm->rank) std::memcpy(other.output, op.input, bytes);
          break;
        case Kind::kReceive: break;
        case Kind::kAllReduce:
        case Kind::kReduceScatter: {
          std::vector<const void*> parts;
          for (size_t p = received.size(); p-- > 0;) parts.push_back(received[p].data());
          static const std::map<int, CommType> types{
              {0, CommType::kInt8},    {1, CommType::kUint8},   {2, CommType::kInt32},   {4, CommType::kInt64},   {6, CommType::kFloat16},
              {7, CommType::kFloat32}, {8, CommType::kFloat64}, {9, CommType::kBfloat16}};
          static const std::map<int, ReduceOp> operations{{0, ReduceOp::kSum}, {2, ReduceOp::kMax}, {3, ReduceOp::kMin}};
          reduce_parts(types.at(op.type), operations.at(op.op), parts, output, static_cast<int64_t>(op.count));
          break;
        }
        case Kind::kAllGather:
          for (size_t p = 0; p < received.size(); ++p) std::memcpy(output + p * bytes, received[p].data(), bytes);
          break;
        case Kind::kBroadcast:
          if (comm->rank != op.peer) std::memcpy(output, received[static_cast<size_t>(op.peer)].data(), bytes);
          break;
      }
    }
  }

  // As an item of a stream.
  bool run() {
    if (comm->aborted) {
      for (MPI_Request& request : requests)
        if (request != MPI_REQUEST_NULL) MPI_Cancel(&request), MPI_Request_free(&request);
      return true;
    }
    if ((comm->state != kNcclSuccess && comm->state != kNcclInProgress) || comm->order.front() != number) return false;
    if (!started) {
      started = true;
      if (const int error = std::exchange(device().fail_kernel, 0)) {
        comm->state = error;
        return false;
      }
      start();
    }
    int done = 0;
    std::vector<MPI_Status> statuses(requests.size());
    MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, statuses.data());
    if (!done) return false;
    for (const auto& [i, bytes] : expected) {
      int count = 0;
      MPI_Get_count(&statuses[i], MPI_BYTE, &count);
      if (count != bytes) {
        comm->state = 3;
        requests.clear();
        return false;
      }
    }
    finish();
    comm->order.pop_front();
    return true;
  }
};

struct Call {
  Comm* comm;
  c10::StreamId stream;
  Op op;
};
thread_local int group_depth = 0;
thread_local std::vector<Call> group_calls;

int refuse(const std::string& why, int result = kNcclInvalidUsage) {
  device().last_error = why;
  return result;
}

// Hands the calls over; the kernels reach their streams when one of NCCL's threads comes to it.
int launch(std::vector<Call> calls) {
  Device& d = device();
  std::lock_guard lock(d.mutex);
  std::map<Comm*, std::shared_ptr<Kernel>> kernels;
  std::map<Comm*, c10::StreamId> streams;
  for (const Call& call : calls) {
    if (call.comm->state != kNcclSuccess) return refuse("the communicator is not ready for another call");
    auto& kernel = kernels[call.comm];
    if (!kernel) kernel = std::make_shared<Kernel>(Kernel{call.comm, d.num_kernels++, {}, false, {}, {}, {}, {}});
    kernel->ops.push_back(call.op);
    streams[call.comm] = call.stream;
  }
  for (const auto& [comm, kernel] : kernels) {
    int64_t to_self = 0;
    size_t num_collectives = 0;
    for (const Op& op : kernel->ops) {
      const bool message = op.kind == Kind::kSend || op.kind == Kind::kReceive;
      if (!message) ++num_collectives;
      if (message && op.peer == comm->rank) to_self += op.kind == Kind::kSend ? op.num_bytes : -op.num_bytes;
    }
    if (to_self != 0) return refuse("a message to oneself without its other end in the group");
    TRIREME_CHECK(num_collectives == 0 || kernel->ops.size() == 1, "the double takes one collective a group");
  }
  for (const auto& [comm, kernel] : kernels) {
    ++d.counts.kernels;
    comm->state = kNcclInProgress;
    const auto due = d.later();
    d.jobs.push_back([=, comm = comm, kernel = kernel, stream = streams[comm], &d] {
      if (Clock::now() < due && !comm->aborted) return false;
      if (comm->aborted) return true;
      comm->order.push_back(kernel->number);
      push(stream, [kernel] { return kernel->run(); });
      if (comm->state == kNcclInProgress) comm->state = kNcclSuccess;  // an error stays
      return true;
    });
  }
  return kNcclInProgress;
}

int call(NcclHandle handle, void* stream, Op op) {
  auto* comm = static_cast<Comm*>(handle);
  if (!comm || op.peer < 0 || op.peer >= comm->size) return refuse("no such rank", kInvalidArgument);
  static const std::map<int, int64_t> sizes{{0, 1}, {1, 1}, {2, 4}, {4, 8}, {6, 2}, {7, 4}, {8, 8}, {9, 2}};
  if (!sizes.contains(op.type)) return refuse("no such type", kInvalidArgument);
  op.num_bytes = static_cast<int64_t>(op.count) * sizes.at(op.type);
  const Call made{comm, static_cast<c10::StreamId>(reinterpret_cast<intptr_t>(stream)), op};
  if (group_depth == 0) return launch({made});
  group_calls.push_back(made);
  return kNcclSuccess;
}

int group_start() { return ++group_depth, kNcclSuccess; }
int group_end() {
  if (group_depth == 0) return refuse("no group has been started");
  if (--group_depth > 0 || group_calls.empty()) return kNcclSuccess;
  return launch(std::exchange(group_calls, {}));
}

int get_unique_id(NcclUniqueId* id) {
  Device& d = device();
  std::lock_guard lock(d.mutex);
  const Id mine{d.num_comms++ % 4096 + 4096 * d.world_rank, d.world_rank};
  std::memcpy(id->bytes, &mine, sizeof mine);
  return kNcclSuccess;
}

// The ranks tell the id's creator where they are, who tells all of them.
struct Join {
  Comm* comm;
  Id id;
  int rank = 0, step = 0;
  std::vector<int> ranks, table;
  std::vector<MPI_Request> requests;

  bool run() {
    if (comm->aborted) return true;
    Device& d = device();
    const int tag = id.number * kTagsPerComm;
    if (step == 0) {
      if (const int error = std::exchange(d.fail_init, 0)) {
        comm->state = error;
        return true;
      }
      const size_t n = static_cast<size_t>(comm->size);
      rank = comm->rank;
      table.resize(n);
      ranks.resize(n);
      requests.resize(2);
      MPI_Isend(&rank, 1, MPI_INT, id.creator, tag + kTagJoin, d.world, &requests[0]);
      MPI_Irecv(table.data(), comm->size, MPI_INT, id.creator, tag + kTagTable, d.world, &requests[1]);
      if (id.creator == d.world_rank)
        for (int& r : ranks) {
          requests.emplace_back();
          MPI_Irecv(&r, 1, MPI_INT, MPI_ANY_SOURCE, tag + kTagJoin, d.world, &requests.back());
        }
      step = id.creator == d.world_rank ? 1 : 2;
    }
    int done = 0;
    if (step == 1) {
      std::vector<MPI_Status> statuses(static_cast<size_t>(comm->size));
      MPI_Testall(comm->size, requests.data() + 2, &done, statuses.data());
      if (!done) return false;
      std::vector<int> all(ranks.size());
      for (size_t i = 0; i < ranks.size(); ++i) all[static_cast<size_t>(ranks[i])] = statuses[i].MPI_SOURCE;
      ranks = all;
      for (int peer : ranks) {
        requests.emplace_back();
        MPI_Isend(ranks.data(), comm->size, MPI_INT, peer, tag + kTagTable, d.world, &requests.back());
      }
      step = 2;
    }
    MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE);
    if (!done) return false;
    comm->world_ranks = table;
    if (comm->state == kNcclInProgress) comm->state = kNcclSuccess;  // an error stays
    return true;
  }
};

int comm_init(NcclHandle* handle, int size, NcclUniqueId id, int rank, NcclConfig* config) {
  Device& d = device();
  if (config->size != sizeof(NcclConfig) || config->magic != 0xcafebeef || config->blocking != 0 || rank >= size)
    return refuse("a wrong configuration", kInvalidArgument);
  std::lock_guard lock(d.mutex);
  Comm* comm = &d.comms.emplace_back();
  auto join = std::make_shared<Join>();
  std::memcpy(&join->id, id.bytes, sizeof join->id);
  join->comm = comm;
  comm->number = join->id.number;
  comm->size = size;
  comm->rank = rank;
  ++d.counts.made;
  *handle = comm;
  d.jobs.push_back([join] { return join->run(); });
  return kNcclInProgress;
}

int get_async_error(NcclHandle handle, int* result) {
  std::lock_guard lock(device().mutex);
  auto* comm = static_cast<Comm*>(handle);
  if (!comm) return kInvalidArgument;
  *result = comm->state;
  if (comm->state != kNcclSuccess && comm->state != kNcclInProgress) device().last_error = "a peer is gone";
  if (comm->finalizing > 0 && --comm->finalizing == 0 && comm->state == kNcclInProgress) comm->state = kNcclSuccess;
  return kNcclSuccess;
}

int finalize(NcclHandle handle) {
  std::lock_guard lock(device().mutex);
  auto* comm = static_cast<Comm*>(handle);
  if (comm->state != kNcclSuccess || !comm->order.empty()) return refuse("it is at work");
  comm->state = kNcclInProgress;
  comm->finalizing = 3;
  return kNcclInProgress;
}

int destroy(NcclHandle handle) {
  std::lock_guard lock(device().mutex);
  if (!static_cast<Comm*>(handle)->order.empty()) return refuse("it is at work");
  static_cast<Comm*>(handle)->aborted = true;
  ++device().counts.destroyed;
  return kNcclSuccess;
}
int abort(NcclHandle handle) {
  std::lock_guard lock(device().mutex);
  static_cast<Comm*>(handle)->aborted = true;
  ++device().counts.aborted;
  return kNcclSuccess;
}

const char* error_string(int result) {
  return result == kNcclRemoteError ? "remote process exited" : result == kNcclInvalidUsage ? "invalid usage" : "error";
}

}  // namespace

void install_nccl_double() {
  Device& d = device();
  MPI_Comm_dup(MPI_COMM_WORLD, &d.world);
  MPI_Comm_rank(d.world, &d.world_rank);
  d.uuid = static_cast<char>(d.world_rank);
  static const c10::impl::DeviceGuardImplRegistrar registrar(kType, new Guard);
  static NcclApi api{};
  api.get_version = [](int* version) { return *version = 22809, 0; };
  api.get_error_string = error_string;
  api.get_last_error = [](NcclHandle) { return device().last_error.c_str(); };
  api.get_unique_id = get_unique_id;
  api.comm_init_rank_config = comm_init;
  api.comm_get_async_error = get_async_error;
  api.comm_finalize = finalize;
  api.comm_destroy = destroy;
  api.comm_abort = abort;
  api.all_reduce = [](const void* in, void* out, size_t n, int type, int op, NcclHandle comm, void* stream) {
    return call(comm, stream, {Kind::kAllReduce, in, out, n, type, op, 0, 0});
  };
  api.reduce_scatter = [](const void* in, void* out, size_t n, int type, int op, NcclHandle comm, void* stream) {
    return call(comm, stream, {Kind::kReduceScatter, in, out, n, type, op, 0, 0});
  };
  api.all_gather = [](const void* in, void* out, size_t n, int type, NcclHandle comm, void* stream) {
    return call(comm, stream, {Kind::kAllGather, in, out, n, type, 0, 0, 0});
  };
  api.broadcast = [](const void* in, void* out, size_t n, int type, int root, NcclHandle comm, void* stream) {
    return call(comm, stream, {Kind::kBroadcast, in, out, n, type, 0, root, 0});
  };
  api.send = [](const void* data, size_t n, int type, int peer, NcclHandle comm, void* stream) {
    return call(comm, stream, {Kind::kSend, data, nullptr, n, type, 0, peer, 0});
  };
  api.receive = [](void* data, size_t n, int type, int peer, NcclHandle comm, void* stream) {
    return call(comm, stream, {Kind::kReceive, nullptr, data, n, type, 0, peer, 0});
  };
  api.group_start = group_start;
  api.group_end = group_end;
  api.device_type = kType;
  api.device_uuid = [](int) { return std::string(16, device().uuid); };
  set_nccl_api(&api);
  std::thread([&d] { d.run(); }).detach();
}

at::Tensor to_device(const at::Tensor& cpu) {
  const size_t bytes = cpu.nbytes();
  auto memory = std::make_shared<std::vector<char>>(bytes + 1, '\xA5');
  auto copy = std::make_shared<at::Tensor>(cpu.clone());
  if (bytes > 0)
    push(current_id, [memory, copy, bytes] { return std::memcpy(memory->data(), copy->const_data_ptr(), bytes), true; });
  const c10::Device where(kType, 0);
  return at::for_blob(memory->data(), cpu.sizes())
      .deleter([memory](void*) {})
      .options(cpu.options().device(where))
      .target_device(where)
      .make_tensor();
}

at::Tensor to_host(const at::Tensor& device) {
  synchronize_current_stream();
  at::Tensor cpu = at::empty(device.sizes(), device.scalar_type());
  if (device.nbytes() > 0) std::memcpy(cpu.data_ptr(), device.data_ptr(), device.nbytes());
  return cpu;
}

at::Tensor device_part(const at::Tensor& device, int64_t begin, int64_t size) {
  return at::for_blob(static_cast<char*>(device.data_ptr()) + begin * device.element_size(), {size})
      .deleter([device](void*) {})
      .options(device.options())
      .target_device(device.device())
      .make_tensor();
}

void pause_device(bool pause) {
  std::lock_guard lock(device().mutex);
  device().paused = pause;
}
void pause_calls(bool pause) {
  std::lock_guard lock(device().mutex);
  device().calls_paused = pause;
}
void set_device_uuid(char first) { device().uuid = first; }
void fail_next_kernel(int result) {
  std::lock_guard lock(device().mutex);
  device().fail_kernel = result;
}
void fail_next_init(int result) {
  std::lock_guard lock(device().mutex);
  device().fail_init = result;
}
c10::Stream new_stream() {
  static c10::StreamId next = 1000;
  return make_stream(++next);
}
c10::Stream exchange_stream(c10::Stream stream) { return make_stream(std::exchange(current_id, stream.id())); }
NcclCounts nccl_counts() {
  std::lock_guard lock(device().mutex);
  return device().counts;
}

}  // namespace trireme::test
