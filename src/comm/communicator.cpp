#include "comm/communicator.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "base/check.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/trace.h"
#include "comm/flight_recorder.h"
#include "comm/nccl_group.h"

namespace trireme {

namespace {

struct OperationStatistics {
  int64_t num_calls = 0, num_bytes = 0;
  std::shared_ptr<std::atomic<int64_t>> nanoseconds = std::make_shared<std::atomic<int64_t>>(0);
};

// Adds the time of its life to an operation's statistics.
class CallTimer {
 public:
  explicit CallTimer(const std::shared_ptr<std::atomic<int64_t>>& total) : total_(total), begin_(Clock::now()) {}
  ~CallTimer() {
    if (total_) *total_ += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  std::shared_ptr<std::atomic<int64_t>> total_;
  Clock::time_point begin_;
};

CommType comm_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return CommType::kFloat32;
    case at::kDouble: return CommType::kFloat64;
    case at::kBFloat16: return CommType::kBfloat16;
    case at::kHalf: return CommType::kFloat16;
    case at::kLong: return CommType::kInt64;
    case at::kInt: return CommType::kInt32;
    case at::kChar: return CommType::kInt8;
    case at::kByte: return CommType::kUint8;
    default: TRIREME_CHECK(false, "a Communicator has no ", c10::toString(tensor.scalar_type()));
  }
  return CommType::kUint8;
}

void check_tensor(const at::Tensor& tensor) {
  TRIREME_CHECK(tensor.defined());
  TRIREME_CHECK(tensor.is_cpu() || tensor.device().type() == nccl_device_type(), tensor.device().str());
  TRIREME_CHECK(tensor.layout() == at::kStrided && tensor.is_contiguous(), "sizes ", tensor.sizes(), " strides ",
                tensor.strides());
  comm_type(tensor);
}

void check_pair(const at::Tensor& output, const at::Tensor& input) {
  check_tensor(output);
  check_tensor(input);
  TRIREME_CHECK(output.scalar_type() == input.scalar_type(), c10::toString(output.scalar_type()), " ",
                c10::toString(input.scalar_type()));
  TRIREME_CHECK(output.device() == input.device(), output.device().str(), " ", input.device().str());
}

// The caller's time until the operation is done (on a device: in its stream's queue).
void wait_for(CommOperation& operation) {
  Span span(TimeKind::kWait, operation.op.c_str(), {.group = operation.group.c_str(), .num_bytes = operation.num_bytes});
  flight_waits(operation.flight);
  engine_wait(operation);
  operation.join_stream();
}

// For the recorder. The same words on all ranks of an operation.
const char* detail(const at::Tensor& tensor, ReduceOp op = ReduceOp::kSum) {
  static constexpr const char* kWords[][3] = {
      {"float32", "float32, max", "float32, min"}, {"float64", "float64, max", "float64, min"},
      {"bfloat16", "bfloat16, max", "bfloat16, min"}, {"float16", "float16, max", "float16, min"},
      {"int64", "int64, max", "int64, min"}, {"int32", "int32, max", "int32, min"}, {"int8", "int8, max", "int8, min"}, {"uint8", "uint8, max", "uint8, min"}};
  static_assert(std::size(kWords) == static_cast<size_t>(CommType::kUint8) + 1);
  return kWords[static_cast<int>(comm_type(tensor))][static_cast<int>(op)];
}

// Literals for the recorder are few: as many as there are ranks that broadcast a type.
const char* detail_of_broadcast(const at::Tensor& tensor, int root) {
  static std::mutex mutex;
  static auto* words = new std::set<std::string>;  // never destroyed: the watchdog's thread looks at them
  std::lock_guard lock(mutex);
  return words->insert(str(detail(tensor), ", from rank ", root)).first->c_str();
}

// What a collective does, for its tag.
enum CollectiveKind { kAllReduce, kReduceScatter = 3, kAllGather = 6, kAllToAll, kBroadcast, kBarrier, kGather, kConnect, kNumKinds };
constexpr int kNumTypes = 8;
static_assert(kNumKinds * kNumTypes <= MpiGroup::kNumKinds);
int kind_of(CollectiveKind kind, const at::Tensor& tensor, ReduceOp op = ReduceOp::kSum) {
  return (kind + static_cast<int>(op)) * kNumTypes + static_cast<int>(comm_type(tensor));
}

int64_t bytes(const at::Tensor& tensor) { return static_cast<int64_t>(tensor.nbytes()); }

}  // namespace

struct Communicator::Impl {
  std::shared_ptr<MpiGroup> group;
  FlightGroupPtr label;
  int64_t num_collectives = 0;  // the last one's number; with what it does it is the tag by which its messages are known
  std::mutex mutex;
  std::map<std::string, OperationStatistics> statistics;
  std::unique_ptr<NcclGroup> nccl;  // made by the first device tensor

  NcclGroup& device(const at::Tensor& tensor) {
    if (!nccl) nccl = std::make_unique<NcclGroup>(label->name, group, tensor.device());
    TRIREME_CHECK(nccl->device() == tensor.device(), nccl->device().str(), " ", tensor.device().str());
    return *nccl;
  }
  NcclGroup& device_collective(const at::Tensor& tensor) {
    NcclGroup& on_device = device(tensor);
    if (!on_device.connected()) on_device.connect(next(kConnect * kNumTypes));
    return on_device;
  }
  Exchange next(int kind) { return {group, group->collective_tag(++num_collectives, kind)}; }
  Exchange user(int tag) {
    TRIREME_CHECK(tag >= 0 && tag < MpiGroup::kNumTags, tag);
    return {group, group->tag(MpiGroup::kLaneUser, tag)};
  }

  // Counts the call, makes the operation and either completes it or hands it to the engine.
  template <typename Make>
  std::shared_ptr<CommOperation> run(bool blocking, const FlightCall& call, std::vector<at::Tensor> tensors, Make make) {
    throw_if_nccl_failed();
    std::shared_ptr<std::atomic<int64_t>> nanoseconds;
    {
      std::lock_guard lock(mutex);
      OperationStatistics& line = statistics[call.op];
      ++line.num_calls;
      line.num_bytes += call.num_bytes;
      nanoseconds = line.nanoseconds;
    }
    CallTimer timer(nanoseconds);
    const uint64_t flight = flight_begin(label, call);
    std::shared_ptr<CommOperation> operation = make();
    operation->flight = flight;
    operation->op = call.op;
    operation->group = label->name;
    operation->num_bytes = call.num_bytes;
    flight_has(flight, operation);
    operation->nanoseconds = nanoseconds;
    const bool on_device = !tensors.empty() && !tensors[0].is_cpu();
    operation->keep_alive = std::make_shared<std::vector<at::Tensor>>(std::move(tensors));
    if (on_device) operation->try_advance();       // into its stream at once, where it can be
    if (on_device || !blocking) engine_add(operation);  // on a device it goes on after the call
    if (!blocking) return operation;
    wait_for(*operation);
    operation->rethrow();
    return nullptr;
  }

  std::shared_ptr<CommOperation> all_reduce(bool blocking, const at::Tensor& tensor, ReduceOp op) {
    check_tensor(tensor);
    const Exchange e = next(kind_of(kAllReduce, tensor, op));
    return run(blocking, {"all_reduce", bytes(tensor), num_collectives, detail(tensor, op)}, {tensor}, [&] {
      return tensor.is_cpu()
                 ? make_all_reduce(e, comm_type(tensor), op, tensor.data_ptr(), tensor.numel())
                 : device_collective(tensor).all_reduce(comm_type(tensor), op, tensor.data_ptr(), tensor.numel());
    });
  }
  std::shared_ptr<CommOperation> reduce_scatter(bool blocking, const at::Tensor& output, const at::Tensor& input,
                                                ReduceOp op) {
    check_pair(output, input);
    TRIREME_CHECK(input.numel() == output.numel() * group->size(), input.numel(), " ", output.numel(), " ",
                  group->size());
    const Exchange e = next(kind_of(kReduceScatter, input, op));
    return run(blocking, {"reduce_scatter", bytes(input), num_collectives, detail(input, op)}, {output, input}, [&] {
      return input.is_cpu() ? make_reduce_scatter(e, comm_type(input), op, output.data_ptr(), input.data_ptr(),
                                                  output.numel())
                            : device_collective(input).reduce_scatter(comm_type(input), op, output.data_ptr(),
                                                                      input.data_ptr(), output.numel());
    });
  }
  std::shared_ptr<CommOperation> all_gather(bool blocking, const at::Tensor& output, const at::Tensor& input) {
    check_pair(output, input);
    TRIREME_CHECK(output.numel() == input.numel() * group->size(), output.numel(), " ", input.numel(), " ",
                  group->size());
    const Exchange e = next(kind_of(kAllGather, input));
    return run(blocking, {"all_gather", bytes(output), num_collectives, detail(input)}, {output, input}, [&] {
      return input.is_cpu() ? make_all_gather(e, output.data_ptr(), input.data_ptr(), bytes(input))
                            : device_collective(input).all_gather(output.data_ptr(), input.data_ptr(), bytes(input));
    });
  }
  std::shared_ptr<CommOperation> broadcast(bool blocking, const at::Tensor& tensor, int root) {
    check_tensor(tensor);
    check_rank(root);
    const Exchange e = next(kind_of(kBroadcast, tensor));
    return run(blocking, {"broadcast", bytes(tensor), num_collectives, detail_of_broadcast(tensor, world_rank(root))}, {tensor}, [&] {
      return tensor.is_cpu() ? make_broadcast(e, tensor.data_ptr(), bytes(tensor), root)
                             : device_collective(tensor).broadcast(tensor.data_ptr(), bytes(tensor), root);
    });
  }
  std::shared_ptr<CommOperation> all_to_all(bool blocking, const at::Tensor& output, const at::Tensor& input) {
    check_pair(output, input);
    TRIREME_CHECK(output.numel() == input.numel() && input.numel() % group->size() == 0, output.numel(), " ",
                  input.numel(), " ", group->size());
    TRIREME_CHECK(output.numel() == 0 || output.data_ptr() != input.data_ptr());
    const Exchange e = next(kind_of(kAllToAll, input));
    return run(blocking, {"all_to_all", bytes(input), num_collectives, detail(input)}, {output, input}, [&] {
      const int64_t part = bytes(input) / group->size();
      return input.is_cpu() ? make_all_to_all(e, output.data_ptr(), input.data_ptr(), part)
                            : device_collective(input).all_to_all(output.data_ptr(), input.data_ptr(), part);
    });
  }
  std::shared_ptr<CommOperation> send(bool blocking, const at::Tensor& tensor, int to, int tag) {
    check_tensor(tensor);
    check_rank(to);
    const Exchange e = user(tag);
    return run(blocking, {"send", bytes(tensor), 0, detail(tensor), world_rank(to)}, {tensor}, [&] {
      return tensor.is_cpu() ? make_send(e, tensor.data_ptr(), bytes(tensor), to)
                             : device(tensor).send(tensor.data_ptr(), bytes(tensor), to, tag);
    });
  }
  std::shared_ptr<CommOperation> receive(bool blocking, const at::Tensor& tensor, int from, int tag) {
    check_tensor(tensor);
    check_rank(from);
    const Exchange e = user(tag);
    return run(blocking, {"receive", bytes(tensor), 0, detail(tensor), world_rank(from)}, {tensor}, [&] {
      return tensor.is_cpu() ? make_receive(e, tensor.data_ptr(), bytes(tensor), from)
                             : device(tensor).receive(tensor.data_ptr(), bytes(tensor), from, tag);
    });
  }
  std::shared_ptr<CommOperation> barrier(bool blocking) {
    const Exchange e = next(kBarrier * kNumTypes);
    return run(blocking, {"barrier", 0, num_collectives}, {}, [&] { return make_barrier(e); });
  }
  int world_rank(int rank) const { return group->world_ranks()[static_cast<size_t>(rank)]; }
  void check_rank(int rank) const { TRIREME_CHECK(rank >= 0 && rank < group->size(), rank, " of ", group->size()); }
};

// --- Work
// -------------------------------------------------------------------------------------------------------------

bool Work::test() {
  if (!operation_) return true;
  {
    CallTimer timer(operation_->nanoseconds);
    if (!engine_test(*operation_)) return false;
  }
  std::exchange(operation_, nullptr)->rethrow();
  return true;
}

void Work::wait() {
  if (!operation_) return;
  {
    CallTimer timer(operation_->nanoseconds);
    wait_for(*operation_);
  }
  std::exchange(operation_, nullptr)->rethrow();
}

// --- Communicator
// -----------------------------------------------------------------------------------------------------

Communicator::Communicator(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Communicator Communicator::world() {
  auto impl = std::make_shared<Impl>();
  const int64_t number = next_job_operation();
  const FlightScope scope(job_group(), {"make a group", 0, number});
  impl->group = MpiGroup::world();
  impl->label = std::make_shared<FlightGroup>(FlightGroup{str("world ", number), "world", impl->group->world_ranks()});
  return Communicator(std::move(impl));
}

Communicator Communicator::self() {
  auto impl = std::make_shared<Impl>();
  impl->group = MpiGroup::self();
  impl->label = std::make_shared<FlightGroup>(FlightGroup{str("self ", log_rank()), "self", impl->group->world_ranks()});
  return Communicator(std::move(impl));
}

Communicator Communicator::split(int color, int key, const std::string& name) const {
  auto impl = std::make_shared<Impl>();
  const int64_t number = ++impl_->num_collectives;
  const FlightScope scope(impl_->label, {"split", 0, number});
  impl->group = impl_->group->split(color, key);
  if (!impl->group) return Communicator();
  const std::string id = hash_bytes(str(impl_->label->id, " ", number, " ", color)).substr(0, 16);
  impl->label = std::make_shared<FlightGroup>(FlightGroup{id, name, impl->group->world_ranks()});
  return Communicator(std::move(impl));
}

int Communicator::rank() const { return impl_->group->rank(); }
int Communicator::size() const { return impl_->group->size(); }

void Communicator::all_reduce(at::Tensor tensor, ReduceOp op) const { impl_->all_reduce(true, tensor, op); }
void Communicator::reduce_scatter(at::Tensor output, const at::Tensor& input, ReduceOp op) const {
  impl_->reduce_scatter(true, output, input, op);
}
void Communicator::all_gather(at::Tensor output, const at::Tensor& input) const {
  impl_->all_gather(true, output, input);
}
void Communicator::broadcast(at::Tensor tensor, int root) const { impl_->broadcast(true, tensor, root); }
void Communicator::all_to_all(at::Tensor output, const at::Tensor& input) const {
  impl_->all_to_all(true, output, input);
}
void Communicator::send(const at::Tensor& tensor, int to, int tag) const { impl_->send(true, tensor, to, tag); }
void Communicator::receive(at::Tensor tensor, int from, int tag) const { impl_->receive(true, tensor, from, tag); }
void Communicator::barrier() const { impl_->barrier(true); }

Work Communicator::start_all_reduce(at::Tensor tensor, ReduceOp op) const {
  return Work(impl_->all_reduce(false, tensor, op));
}
Work Communicator::start_reduce_scatter(at::Tensor output, const at::Tensor& input, ReduceOp op) const {
  return Work(impl_->reduce_scatter(false, output, input, op));
}
Work Communicator::start_all_gather(at::Tensor output, const at::Tensor& input) const {
  return Work(impl_->all_gather(false, output, input));
}
Work Communicator::start_broadcast(at::Tensor tensor, int root) const {
  return Work(impl_->broadcast(false, tensor, root));
}
Work Communicator::start_all_to_all(at::Tensor output, const at::Tensor& input) const {
  return Work(impl_->all_to_all(false, output, input));
}
Work Communicator::start_send(const at::Tensor& tensor, int to, int tag) const {
  return Work(impl_->send(false, tensor, to, tag));
}
Work Communicator::start_receive(at::Tensor tensor, int from, int tag) const {
  return Work(impl_->receive(false, tensor, from, tag));
}
Work Communicator::start_barrier() const { return Work(impl_->barrier(false)); }

// --- small things
// -----------------------------------------------------------------------------------------------------

int Communicator::agree(int status) const {
  at::Tensor value = at::full({1}, status, at::kInt);
  all_reduce(value, ReduceOp::kMax);
  return *value.const_data_ptr<int32_t>();
}

int64_t Communicator::sum(int64_t value) const {
  at::Tensor tensor = at::full({1}, value, at::kLong);
  all_reduce(tensor);
  return *tensor.const_data_ptr<int64_t>();
}

double Communicator::sum(double value) const {
  at::Tensor tensor = at::full({1}, value, at::kDouble);
  all_reduce(tensor);
  return *tensor.const_data_ptr<double>();
}

double Communicator::max(double value) const {
  at::Tensor tensor = at::full({1}, value, at::kDouble);
  all_reduce(tensor, ReduceOp::kMax);
  return *tensor.const_data_ptr<double>();
}

std::string Communicator::broadcast_bytes(std::string text, int root) const {
  at::Tensor size = at::full({1}, static_cast<int64_t>(text.size()), at::kLong);
  broadcast(size, root);
  text.resize(static_cast<size_t>(*size.const_data_ptr<int64_t>()));
  broadcast(at::from_blob(text.data(), {static_cast<int64_t>(text.size())}, at::kByte), root);
  return text;
}

std::vector<std::string> Communicator::gather_bytes(std::string_view text) const {
  at::Tensor size = at::full({1}, static_cast<int64_t>(text.size()), at::kLong);
  at::Tensor sizes = at::empty({this->size()}, at::kLong);
  all_gather(sizes, size);
  auto run_message = [&](bool sending, void* data, int64_t num_bytes, int peer, const Exchange& e) {
    impl_->run(true, {"gather", num_bytes, 0, "", impl_->world_rank(peer)}, {}, [&] {
      return sending ? make_send(e, data, num_bytes, peer) : make_receive(e, data, num_bytes, peer);
    });
  };
  const Exchange e = impl_->next(kGather * kNumTypes);
  std::vector<std::string> texts;
  if (rank() != 0) {
    run_message(true, const_cast<char*>(text.data()), static_cast<int64_t>(text.size()), 0, e);
    return texts;
  }
  texts.emplace_back(text);
  for (int r = 1; r < this->size(); ++r) {
    texts.emplace_back(static_cast<size_t>(sizes.const_data_ptr<int64_t>()[r]), '\0');
    run_message(false, texts.back().data(), static_cast<int64_t>(texts.back().size()), r, e);
  }
  return texts;
}

CommStatistics Communicator::statistics() const {
  std::lock_guard lock(impl_->mutex);
  CommStatistics all;
  for (const auto& [op, line] : impl_->statistics) {
    all.lines.push_back({op, line.num_calls, line.num_bytes, static_cast<double>(*line.nanoseconds) * 1e-9});
    if (op == "all_reduce" || op == "reduce_scatter") all.bytes_reduced += line.num_bytes;
  }
  return all;
}

void Communicator::reset_statistics() const {
  std::lock_guard lock(impl_->mutex);
  impl_->statistics.clear();
}

}  // namespace trireme
