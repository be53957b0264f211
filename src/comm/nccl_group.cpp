#include "comm/nccl_group.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "base/check.h"
#include "base/log.h"
#include "comm/process.h"

namespace trireme {

namespace {

constexpr std::chrono::seconds kCloseTime{10};  // that a peer may take to free its half

c10::Stream current_stream(c10::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }

// What each rank says of itself before the group's communicator is made.
struct Introduction {
  char device_uuid[16] = {};
  NcclUniqueId id{};  // rank 0's counts
};

struct Ready {  // receiver to sender
  int64_t num_bytes;
};

class NcclSend;

struct Go {  // sender to receiver
  int64_t num_bytes, number;  // number -1: the sizes differ
  NcclUniqueId id;
  NcclSend* self;             // where a rank sends to itself
};

}  // namespace

struct NcclLink {
  std::shared_ptr<NcclComm> comm;
  std::vector<Introduction> all;
  Introduction mine;
  std::shared_ptr<CommOperation> exchange;
  int64_t num_operations = 0;

  // By the first collective.
  bool introduced() {
    if (!exchange) return true;
    if (!exchange->try_advance()) return false;
    exchange->rethrow();
    exchange.reset();
    std::vector<std::string> uuids;
    for (const Introduction& rank : all) uuids.emplace_back(rank.device_uuid, sizeof rank.device_uuid);
    if (const std::string problem = shared_device_problem(uuids, comm->group(), shares_device()); !problem.empty())
      throw ConfigError(problem);
    comm->begin(all[0].id);
    return true;
  }
};

struct NcclChannel {
  NcclChannel(const std::string& group, int size, int rank, c10::Device device) : comm(group, size, rank, device) {}
  NcclComm comm;
  std::mutex mutex;
  NcclUniqueId id{};            // of the sender
  int64_t num_operations = 0;   // of the sender
};

namespace {

// Waits for its turn and for what the caller's stream holds, enters the communicator's stream, is released, completes.
class NcclOperation : public CommOperation {
 public:
  NcclOperation(std::shared_ptr<MpiGroup> group, std::shared_ptr<NcclComm> comm, const char* op)
      : CommOperation(std::move(group)), comm_(std::move(comm)), op_(op), begin_(comm_->stream().device_type()),
        end_(std::make_shared<c10::Event>(comm_->stream().device_type())) {
    begin_.record(current_stream(comm_->stream().device()));
  }
  void join_stream() override { end_->block(current_stream(comm_->stream().device())); }
  void abort() override {
    comm_->give_up(std::make_exception_ptr(SystemError(str(
        op_, " of group ", comm_->group(), " on rank ", log_rank(), ", host ", host_name(), " took more than comm.timeout_s"))));
  }

 protected:
  bool advance() final {
    const c10::DeviceGuard guard(comm_->stream().device());
    try {
      if (step()) return true;
    } catch (...) {
      if (number_ >= 0) comm_->give_up(std::current_exception());  // else nothing has reached NCCL
      throw;
    }
    std::this_thread::yield();  // it is the device's turn
    return false;
  }
  virtual bool step() {
    if (!released()) {
      if (!prepare() || !comm_->has_turn(number_) || !comm_->ready(op_)) return false;
      if (!submitted_) {
        begin_.block(comm_->stream());
        submit();
        submitted_ = true;
      }
      if (!comm_->settled(op_)) return false;
      end_->record(comm_->stream());
      comm_->pass_turn();
      on_release();
      release();
    }
    if (!comm_->is_oldest(number_)) return false;
    if (!end_->query()) {
      comm_->check(op_);
      return false;
    }
    comm_->complete();
    return true;
  }
  virtual bool prepare() = 0;  // true when it has its number
  virtual void submit() = 0;
  virtual void on_release() {}

  const std::shared_ptr<NcclComm> comm_;
  const char* const op_;
  c10::Event begin_;
  std::shared_ptr<c10::Event> end_;
  int64_t number_ = -1;
  bool submitted_ = false;
};

class NcclCollective : public NcclOperation {
 public:
  NcclCollective(std::shared_ptr<MpiGroup> group, std::shared_ptr<NcclLink> link, const char* op, NcclComm::Calls calls)
      : NcclOperation(std::move(group), link->comm, op), link_(std::move(link)), calls_(std::move(calls)) {
    number_ = link_->num_operations++;
  }

 protected:
  bool prepare() override { return comm_->has_turn(number_) && link_->introduced(); }
  void submit() override { comm_->submit(op_, calls_); }

 private:
  std::shared_ptr<NcclLink> link_;
  NcclComm::Calls calls_;
};

[[noreturn]] void refuse(const char* what, int64_t sent, int64_t expected) {
  throw SystemError(str("rank ", log_rank(), " ", what, " where ", sent, " bytes are sent and ", expected,
                        " are expected; the ranks do not do the same operations"));
}

class NcclMessage : public NcclOperation {
 public:
  NcclMessage(std::shared_ptr<MpiGroup> group, std::shared_ptr<NcclChannel> channel, const char* op, int64_t num_bytes,
              int peer, int tag)
      : NcclOperation(group, std::shared_ptr<NcclComm>(channel, &channel->comm), op), group_(std::move(group)),
        channel_(std::move(channel)), num_bytes_(num_bytes), peer_(peer), tag_(tag) {}

 protected:
  bool to_self() const { return peer_ == group_->rank(); }
  int ready_tag() const { return group_->tag(MpiGroup::kLaneReady, tag_); }
  int go_tag() const { return group_->tag(MpiGroup::kLaneGo, tag_); }

  const std::shared_ptr<MpiGroup> group_;
  const std::shared_ptr<NcclChannel> channel_;
  const int64_t num_bytes_;
  const int peer_, tag_;
  Ready ready_{};
  Go go_{};
};

class NcclSend : public NcclMessage {
 public:
  NcclSend(std::shared_ptr<MpiGroup> group, std::shared_ptr<NcclChannel> channel, const void* data, int64_t num_bytes,
           int peer, int tag)
      : NcclMessage(std::move(group), std::move(channel), "send", num_bytes, peer, tag), data_(data) {
    requests_.receive(&ready_, sizeof ready_, peer, ready_tag());
  }
  const void* data() const { return data_; }
  const c10::Event& begin() const { return begin_; }
  // By the receiver, on the same rank: the event after which the data have been taken.
  void taken(std::shared_ptr<c10::Event> end) {
    end_ = std::move(end);
    taken_.store(true, std::memory_order_release);
  }

 protected:
  bool step() override {
    if (!to_self()) return NcclOperation::step();
    if (!released()) {
      if (!prepare() || !taken_.load(std::memory_order_acquire)) return false;
      release();
    }
    return end_->query();
  }
  bool prepare() override {
    if (agreed_) return true;
    if (!requests_.test()) return false;
    if (!answered_) {
      std::lock_guard lock(channel_->mutex);
      go_ = {num_bytes_, -1, {}, this};
      if (ready_.num_bytes == num_bytes_) {
        if (channel_->num_operations == 0) check_nccl(nccl_api().get_unique_id(&channel_->id), "ncclGetUniqueId");
        go_.number = channel_->num_operations++;
        go_.id = channel_->id;
      }
      requests_.send(&go_, sizeof go_, peer_, go_tag());
      answered_ = true;
      if (!requests_.test()) return false;
    }
    if (go_.number < 0) refuse("cannot send", num_bytes_, ready_.num_bytes);
    if (!to_self()) number_ = go_.number, channel_->comm.begin(go_.id);
    return agreed_ = true;
  }
  void submit() override {
    comm_->submit(op_, [&](NcclHandle comm, void* stream) {
      return nccl_api().send(data_, static_cast<size_t>(num_bytes_), nccl_type(CommType::kUint8), 1, comm, stream);
    });
  }

 private:
  const void* data_;
  bool answered_ = false, agreed_ = false;
  std::atomic<bool> taken_ = false;
};

class NcclReceive : public NcclMessage {
 public:
  NcclReceive(std::shared_ptr<MpiGroup> group, std::shared_ptr<NcclChannel> channel, void* data, int64_t num_bytes,
              int peer, int tag)
      : NcclMessage(std::move(group), std::move(channel), "receive", num_bytes, peer, tag), data_(data) {
    ready_ = {num_bytes};
    requests_.send(&ready_, sizeof ready_, peer, ready_tag());
    requests_.receive(&go_, sizeof go_, peer, go_tag());
  }

 protected:
  bool prepare() override {
    if (number_ >= 0) return true;
    if (!requests_.test()) return false;
    if (go_.number < 0) refuse("cannot receive", go_.num_bytes, num_bytes_);
    number_ = go_.number;
    channel_->comm.begin(go_.id);
    if (to_self()) go_.self->begin().block(comm_->stream());
    return true;
  }
  void submit() override {
    const size_t count = static_cast<size_t>(num_bytes_);
    const int type = nccl_type(CommType::kUint8);
    comm_->submit(op_, [&](NcclHandle comm, void* stream) {
      const int sent = to_self() ? nccl_api().send(go_.self->data(), count, type, 0, comm, stream) : kNcclSuccess;
      return sent ? sent : nccl_api().receive(data_, count, type, 0, comm, stream);
    });
  }
  void on_release() override {
    if (to_self()) go_.self->taken(end_);
  }

 private:
  void* data_;
};

class Nothing : public CommOperation {  // done as it is made
 public:
  using CommOperation::CommOperation;

 protected:
  bool advance() override { return true; }
};

}  // namespace

NcclGroup::NcclGroup(std::string name, std::shared_ptr<MpiGroup> mpi, c10::Device device)
    : name_(std::move(name)), mpi_(std::move(mpi)), device_(device) {
  prepare_shared_device(log_rank());
}

NcclGroup::~NcclGroup() {
  std::vector<NcclComm*> comms;
  if (link_) comms.push_back(link_->comm.get());
  for (auto& [peer, channel] : channels_) comms.push_back(&channel->comm);
  if (mpi_ended()) return;
  const c10::DeviceGuard guard(device_);
  const auto reason = [&](const char* what) { return std::make_exception_ptr(SystemError(str("group ", name_, what))); };
  for (NcclComm* comm : comms) {
    if (std::uncaught_exceptions() > 0 && !comm->idle()) comm->give_up(reason(" is left by an exception"), false);
    while (!comm->idle()) engine_advance();
    comm->begin_close();
  }
  const auto deadline = std::chrono::steady_clock::now() + kCloseTime;
  for (NcclComm* comm : comms)
    while (!comm->closed()) {
      if (std::chrono::steady_clock::now() > deadline)
        comm->give_up(reason(" is not closed by a peer"), false);
      std::this_thread::yield();
    }
}

void NcclGroup::connect(const Exchange& e) {
  auto link = std::make_shared<NcclLink>();
  link->comm = std::make_shared<NcclComm>(name_, mpi_->size(), mpi_->rank(), device_);
  const std::string uuid = nccl_api().device_uuid(device_.index());
  std::memcpy(link->mine.device_uuid, uuid.data(), std::min(uuid.size(), sizeof link->mine.device_uuid));
  if (mpi_->rank() == 0) check_nccl(nccl_api().get_unique_id(&link->mine.id), "ncclGetUniqueId");
  link->all.resize(static_cast<size_t>(mpi_->size()));
  link->exchange = make_all_gather(e, link->all.data(), &link->mine, sizeof link->mine);
  link_ = std::move(link);
}

std::shared_ptr<CommOperation> NcclGroup::collective(const char* op, int64_t size, NcclComm::Calls calls) {
  if (size == 0) return std::make_shared<Nothing>(mpi_);
  return std::make_shared<NcclCollective>(mpi_, link_, op, std::move(calls));
}

std::shared_ptr<CommOperation> NcclGroup::all_reduce(CommType type, ReduceOp op, void* data, int64_t n) {
  return collective("all_reduce", n, [=](NcclHandle comm, void* stream) {
    return nccl_api().all_reduce(data, data, static_cast<size_t>(n), nccl_type(type), nccl_op(op), comm, stream);
  });
}

std::shared_ptr<CommOperation> NcclGroup::reduce_scatter(CommType type, ReduceOp op, void* output, const void* input,
                                                         int64_t n) {
  return collective("reduce_scatter", n, [=](NcclHandle comm, void* stream) {
    return nccl_api().reduce_scatter(input, output, static_cast<size_t>(n), nccl_type(type), nccl_op(op), comm, stream);
  });
}

std::shared_ptr<CommOperation> NcclGroup::all_gather(void* output, const void* input, int64_t num_part_bytes) {
  return collective("all_gather", num_part_bytes, [=](NcclHandle comm, void* stream) {
    return nccl_api().all_gather(input, output, static_cast<size_t>(num_part_bytes), nccl_type(CommType::kUint8), comm,
                                 stream);
  });
}

std::shared_ptr<CommOperation> NcclGroup::all_to_all(void* output, const void* input, int64_t num_part_bytes) {
  const int num_ranks = mpi_->size();
  return collective("all_to_all", num_part_bytes, [=](NcclHandle comm, void* stream) {
    const size_t count = static_cast<size_t>(num_part_bytes);
    const int type = nccl_type(CommType::kUint8);
    int result = kNcclSuccess;
    for (int peer = 0; peer < num_ranks && result == kNcclSuccess; ++peer) {
      const char* part = static_cast<const char*>(input) + peer * num_part_bytes;
      char* place = static_cast<char*>(output) + peer * num_part_bytes;
      result = nccl_api().send(part, count, type, peer, comm, stream);
      if (result == kNcclSuccess) result = nccl_api().receive(place, count, type, peer, comm, stream);
    }
    return result;
  });
}

std::shared_ptr<CommOperation> NcclGroup::broadcast(void* data, int64_t num_bytes, int root) {
  return collective("broadcast", num_bytes, [=](NcclHandle comm, void* stream) {
    return nccl_api().broadcast(data, data, static_cast<size_t>(num_bytes), nccl_type(CommType::kUint8), root, comm,
                                stream);
  });
}

std::shared_ptr<NcclChannel> NcclGroup::channel(int peer, bool outgoing) {
  const bool self = peer == mpi_->rank();
  std::shared_ptr<NcclChannel>& channel = channels_[{peer, outgoing && !self}];
  if (!channel) channel = std::make_shared<NcclChannel>(name_, self ? 1 : 2, outgoing || self ? 0 : 1, device_);
  return channel;
}

std::shared_ptr<CommOperation> NcclGroup::send(const void* data, int64_t num_bytes, int to, int tag) {
  if (num_bytes == 0) return std::make_shared<Nothing>(mpi_);
  return std::make_shared<NcclSend>(mpi_, channel(to, true), data, num_bytes, to, tag);
}

std::shared_ptr<CommOperation> NcclGroup::receive(void* data, int64_t num_bytes, int from, int tag) {
  if (num_bytes == 0) return std::make_shared<Nothing>(mpi_);
  return std::make_shared<NcclReceive>(mpi_, channel(from, false), data, num_bytes, from, tag);
}

}  // namespace trireme
