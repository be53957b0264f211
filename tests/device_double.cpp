// A test double of an accelerator, linked into the whole program in the place of CUDA (target trireme_double), so that its
// runs go their way through a device on any machine: tensors of device type PrivateUse1, whose operations are ATen's for the CPU
// and whose kernels are the emulated ones. It is as closed as a real one:
//   - its memory can be touched by its operations, kernels and copies alone: anybody else's access is a segmentation fault
//   - what is copied to the host without waiting is garbage there until the host waits for an event behind it
//   - memory has an end: TRIREME_DOUBLE_BYTES
//   - paged memory is on it page by page: brought ahead of use, or by a fault of whoever touches what is not there; where it is full those
//     leave that came first, for other memory too
//   - a step graph launches what was recorded, with the numbers and addresses of then, and nothing of the host runs again; while one is
//     recorded nobody may wait for the device or touch memory of the host
//   - there is one of it, or those that the variable TRIREME_DOUBLE_DEVICES names, a letter each: "AB"; "A B" lets the first rank of the
//     host see A, the second B
// and at the end of the process it writes who waited for it, as JSON, into the file TRIREME_DOUBLE_COUNTS.
#include "device_double.h"

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <csignal>
#include <sys/mman.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>

#include "base/check.h"
#include "base/json.h"
#include "kernels/kernels.h"
#include "launch/cuda_device.h"
#include "ops/paged_memory.h"
#include "ops/step_graph.h"
#include "train/device.h"

namespace trireme {
namespace {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
c10::Device here(kType, 0);  // of this rank

// --- memory ------------------------------------------------------------------------------------------------------------

// Memory whose pages are here or away. A page is open while it is here and an OpenDevice lives; else touching it is a fault, which brings
// it here while one lives. Blocks are given once.
class Pages {
 public:
  static constexpr size_t kBytes = size_t{256} << 20, kPage = 4096;
  Pages() : base_(static_cast<char*>(::mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))), since_(kBytes / kPage, 0) {
    TRIREME_CHECK(base_ != MAP_FAILED);
  }
  void* allocate(size_t num_bytes) {
    std::lock_guard lock(mutex_);
    if (end_ == 0) handle_faults();
    const size_t begin = end_;
    end_ += (num_bytes + kPage - 1) / kPage;
    TRIREME_CHECK(end_ * kPage <= kBytes, "the double's addresses of paged memory are used up");
    char* const data = base_ + begin * kPage;
    ::mprotect(data, num_bytes, PROT_READ | PROT_WRITE);
    std::memset(data, 0xff, num_bytes);  // NaN
    ::mprotect(data, num_bytes, PROT_NONE);
    sizes_[data] = num_bytes;
    return data;
  }
  void free(void* data) {
    std::lock_guard lock(mutex_);
    for_pages(data, sizes_.at(data), [&](size_t page) { leave(page); });
    sizes_.erase(data);
  }
  void open(bool is_open) {
    std::lock_guard lock(mutex_);
    is_open_ = is_open;
    if (!is_open && end_ > 0) ::mprotect(base_, end_ * kPage, PROT_NONE);
    for (size_t page = 0, begin = 0; is_open && page < end_; begin = ++page) {
      while (page < end_ && since_[page] > 0) ++page;
      if (page > begin) ::mprotect(base_ + begin * kPage, (page - begin) * kPage, PROT_READ | PROT_WRITE);
    }
  }
  // Of what is here, so that `others` and `more` bytes fit into the limit; as much as there is.
  void make_room(size_t others, size_t more) {
    std::lock_guard lock(mutex_);
    leave_for(others + more);
  }
  void prefetch(const void* data, size_t num_bytes) {
    std::lock_guard lock(mutex_);
    for_pages(data, num_bytes, [&](size_t page) { num_prefetched += since_[page] == 0, bring(page); });
  }
  // False: not a page that may be here now.
  bool touch(const void* data) {
    std::lock_guard lock(mutex_);
    const auto at = static_cast<size_t>(static_cast<const char*>(data) - base_);
    if (data < base_ || at >= end_ * kPage || !is_open_) return false;
    num_faults += in_kernel > 0;
    bring(at / kPage);
    return true;
  }
  size_t here() const { return num_here_ * kPage; }

  std::atomic<size_t> limit = SIZE_MAX, others = 0;  // of the device, and what other memory takes of it
  std::atomic<int> in_kernel = 0;
  int64_t num_prefetched = 0, num_faults = 0, num_left = 0;  // pages; faults of kernels

 private:
  template <typename F>
  void for_pages(const void* data, size_t num_bytes, const F& f) {
    const auto begin = static_cast<size_t>(static_cast<const char*>(data) - base_);
    for (size_t page = begin / kPage; page * kPage < begin + num_bytes; ++page) f(page);
  }
  void bring(size_t page) {
    if (since_[page] == 0) leave_for(others + kPage), ++num_here_;
    since_[page] = ++time_;
    if (is_open_) ::mprotect(base_ + page * kPage, kPage, PROT_READ | PROT_WRITE);
  }
  void leave(size_t page) {
    if (since_[page] == 0) return;
    since_[page] = 0, --num_here_;
    ::mprotect(base_ + page * kPage, kPage, PROT_NONE);
  }
  void leave_for(size_t bytes) {
    for (; num_here_ > 0 && here() + bytes > limit; ++num_left) {
      size_t oldest = end_;
      for (size_t page = 0; page < end_; ++page)
        if (since_[page] > 0 && (oldest == end_ || since_[page] < since_[oldest])) oldest = page;
      leave(oldest);
    }
  }
  static void handle_faults();

  char* base_;
  std::mutex mutex_;
  std::vector<uint64_t> since_;  // when a page came; 0: away
  std::map<void*, size_t> sizes_;
  uint64_t time_ = 0;
  size_t end_ = 0, num_here_ = 0;
  bool is_open_ = false;
};
Pages& pages() {
  static auto* pages = new Pages;
  return *pages;
}

struct sigaction other_faults;
void Pages::handle_faults() {
  struct sigaction action {};
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  action.sa_sigaction = [](int number, siginfo_t* info, void* context) {
    if (pages().touch(info->si_addr)) return;
    if (other_faults.sa_flags & SA_SIGINFO) return other_faults.sa_sigaction(number, info, context);
    ::sigaction(number, &other_faults, nullptr);  // and it faults again
  };
  TRIREME_CHECK(::sigaction(SIGSEGV, &action, &other_faults) == 0);
}

// One range of addresses; blocks are given first fit. Closed but where an Open lives.
class Memory {
 public:
  static constexpr size_t kBytes = size_t{2} << 30, kAlignment = 256, kPoison = 1 << 20;
  Memory() : base_(static_cast<char*>(::mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    TRIREME_CHECK(base_ != MAP_FAILED);
    free_[0] = kBytes;
  }
  void open() {
    std::lock_guard lock(mutex_);
    if (num_open_++ == 0) ::mprotect(base_, high_, PROT_READ | PROT_WRITE), pages().open(true);
  }
  void close() {
    std::lock_guard lock(mutex_);
    if (--num_open_ == 0) ::mprotect(base_, high_, PROT_NONE), pages().open(false);
  }
  // While one is given, blocks are of it: given again within it alone, until it is released.
  using Pool = std::map<size_t, bool>;  // whether a block is in use, by offset
  void set_pool(Pool* pool) {
    std::lock_guard lock(mutex_);
    if ((pool_ = pool)) pools_.push_back(pool);
  }
  void release(Pool* pool) {
    std::lock_guard lock(mutex_);
    std::erase(pools_, pool);
    for (const auto& [at, used] : *pool)
      if (!used) give_back(at);
  }
  // All that is in memory now; `restore` leaves what came later as it is.
  std::string contents() {
    open();
    std::string out(base_, high_);
    close();
    return out;
  }
  void restore(const std::string& contents) {
    open();
    std::memcpy(base_, contents.data(), contents.size());
    close();
  }
  void* allocate(size_t num_bytes) {
    std::lock_guard lock(mutex_);
    const size_t size = std::max((num_bytes + kAlignment - 1) / kAlignment * kAlignment, kAlignment);
    if (pool_)
      for (auto& [at, used] : *pool_)
        if (!used && sizes_.at(at) == size) {
          used = true;
          return base_ + at;
        }
    pages().make_room(used_, size);
    TORCH_CHECK_WITH(OutOfMemoryError, static_cast<int64_t>(used_ + size) <= limit, "the double is out of memory: asked for ", num_bytes, " bytes");
    auto place = free_.begin();
    while (place != free_.end() && place->second < size) ++place;
    TRIREME_CHECK(place != free_.end(), "the double's addresses are used up");
    const auto [at, room] = *place;
    free_.erase(place);
    if (room > size) free_[at + size] = room - size;
    if (at + size > high_) {
      high_ = (at + size + 4095) / 4096 * 4096;
      if (num_open_ > 0) ::mprotect(base_, high_, PROT_READ | PROT_WRITE);
    }
    used_ += size, peak_ = std::max(peak_, used_), pages().others = used_;
    sizes_[at] = size;
    ::mprotect(base_, high_, PROT_READ | PROT_WRITE);
    std::memset(base_ + at, 0xff, std::min(size, kPoison));  // NaN
    if (num_open_ == 0) ::mprotect(base_, high_, PROT_NONE);
    if (pool_) (*pool_)[at] = true;
    return base_ + at;
  }
  void free(void* data) {
    std::lock_guard lock(mutex_);
    const auto at = static_cast<size_t>(static_cast<char*>(data) - base_);
    for (Pool* pool : pools_)
      if (const auto block = pool->find(at); block != pool->end()) {
        block->second = false;
        return;
      }
    give_back(at);
  }
  int64_t limit = kBytes;
  size_t peak() const { return peak_; }
  size_t used() const { return used_; }
  void reset_peak() { peak_ = used_; }

 private:
  void give_back(size_t at) {
    size_t size = sizes_.at(at);
    used_ -= size, pages().others = used_;
    sizes_.erase(at);
    auto [place, added] = free_.emplace(at, size);
    if (auto next = std::next(place); next != free_.end() && at + place->second == next->first) place->second += next->second, free_.erase(next);
    if (place != free_.begin())
      if (auto before = std::prev(place); before->first + before->second == at) before->second += place->second, free_.erase(place);
  }

  char* base_;
  std::mutex mutex_;
  int num_open_ = 0;
  size_t high_ = 0, used_ = 0, peak_ = 0;
  std::map<size_t, size_t> free_, sizes_;  // by offset
  Pool* pool_ = nullptr;
  std::vector<Pool*> pools_;
};
Memory& memory() {
  static auto* memory = new Memory;  // tensors may outlive everything
  return *memory;
}

struct Allocator final : c10::DeviceAllocator {
  static void release(void* data) { memory().free(data); }
  c10::DataPtr allocate(size_t num_bytes) override {
    void* data = num_bytes ? memory().allocate(num_bytes) : nullptr;
    return {data, data, data ? release : [](void*) {}, here};
  }
  void copy_data(void* to, const void* from, size_t num_bytes) const override {
    const OpenDevice open;
    std::memcpy(to, from, num_bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0].current = static_cast<int64_t>(memory().used());
    stats.allocated_bytes[0].peak = static_cast<int64_t>(memory().peak());
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { memory().reset_peak(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    const char* said = std::getenv("TRIREME_DOUBLE_SAYS_FREE");  // as if others took the rest later
    return {said ? std::strtoull(said, nullptr, 10) : static_cast<size_t>(memory().limit) - memory().used() - pages().here(), static_cast<size_t>(memory().limit)};
  }
};

// --- time --------------------------------------------------------------------------------------------------------------

struct Counts {
  int64_t blocking = 0;  // values that the host has read at once, or copies that it has waited for
  int64_t events = 0;    // that the host has waited for
  int64_t kernels = 0;   // launched
  int64_t graphs = 0, replays = 0;
  std::map<std::string, int64_t> operations;  // of ATen, by name
  ~Counts() {
    if (const char* file = std::getenv("TRIREME_DOUBLE_COUNTS"))
      std::ofstream(file) << dump_json({{"blocking", blocking}, {"events", events}, {"kernels", kernels}, {"graphs", graphs}, {"replays", replays}, {"operations", operations}, {"peak_bytes", memory().peak()},
                                        {"pages_prefetched", pages().num_prefetched}, {"pages_left", pages().num_left}, {"page_faults", pages().num_faults}});
  }
};
Counts counts;

// What a graph will launch, while one is recorded.
std::vector<std::function<void()>>* recording = nullptr;
void not_recorded(const char* what) { TRIREME_CHECK(!recording, what, " while a step is recorded"); }

// Copies to the host that nobody has waited for, in order.
struct Late {
  at::Tensor to;  // lives until then, as pinned memory does
  std::string bytes;
};
std::deque<Late> late;
int64_t num_put = 0, num_done = 0;
std::mutex late_mutex;

void deliver(int64_t position) {
  std::lock_guard lock(late_mutex);
  for (; num_done < position; ++num_done, late.pop_front()) std::memcpy(late.front().to.data_ptr(), late.front().bytes.data(), late.front().bytes.size());
}

thread_local c10::StreamId current = 0;  // all streams are one but for NCCL's calls: numbers tell them apart

// Behind so many late copies, and NCCL's calls in a stream. A stream that waits for these is the host that waits, as it computes at once.
struct Event {
  bool reached() const {
    advance_nccl_of_double();
    return !call || *call;
  }
  void wait() const {
    while (!reached()) std::this_thread::yield();
  }
  int64_t num_copies;
  std::shared_ptr<bool> call;
};

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return here; }
  c10::Device getDevice() const override { return here; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::UNSAFE, here, current); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override {
    static std::atomic<c10::StreamId> next = 0;
    return c10::Stream(c10::Stream::UNSAFE, here, 1 + next++ % 32);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override { return c10::Stream(c10::Stream::UNSAFE, here, std::exchange(current, stream.id())); }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return reinterpret_cast<void*>(stream.id()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 8; }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new Event;
    *static_cast<Event*>(*event) = {num_put, last_call_in(stream.id())};
  }
  void block(void* event, const c10::Stream&) const override { static_cast<Event*>(event)->wait(); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  bool queryEvent(void* event) const override {
    if (!static_cast<Event*>(event)->reached()) return false;
    deliver(static_cast<Event*>(event)->num_copies);
    return true;
  }
  void synchronizeEvent(void* event) const override {
    not_recorded("the host waits for an event");
    ++counts.events;
    static_cast<Event*>(event)->wait();
    deliver(static_cast<Event*>(event)->num_copies);
  }
  void synchronizeStream(const c10::Stream&) const override {
    not_recorded("the host waits for a stream");
    ++counts.blocking;
    deliver(num_put);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    not_recorded("the host waits for the device");
    ++counts.blocking;
    deliver(num_put);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 8; }
  c10::DeviceIndex getCurrentDevice() const override { return here.index(); }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return here.index(); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return here.index(); }
};

// --- operations --------------------------------------------------------------------------------------------------------

// The whole storage of a tensor of the device as the CPU's, and in it the same place: valid while it is open.
at::Tensor on_host(const at::Tensor& x) {
  if (!x.defined() || x.device().type() != kType) return x;
  const int64_t size = static_cast<int64_t>(x.storage().nbytes() / x.element_size());
  const at::Tensor all = at::from_blob(const_cast<void*>(x.storage().data()), {size}, at::TensorOptions(x.scalar_type()));
  return all.as_strided(x.sizes(), x.strides(), x.storage_offset());
}

// The same memory, which is somebody else's to keep.
at::Tensor borrowed(const at::Tensor& x) {
  if (!x.defined() || x.is_cpu()) return x;
  void* data = const_cast<void*>(x.storage().data());
  c10::Storage storage(c10::Storage::use_byte_size_t(), x.storage().nbytes(), c10::DataPtr(data, data, [](void*) {}, here), nullptr, false);
  at::Tensor out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), x.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return out;
}
c10::IValue borrowed(const c10::IValue& value) {
  if (value.isTensor()) return borrowed(value.toTensor());
  if (!value.isTensorList()) return value;
  std::vector<at::Tensor> list;
  for (const at::Tensor& x : value.toTensorVector()) list.push_back(borrowed(x));
  return list;
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
                         std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, c10::GetAllocator(kType), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}
at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, c10::GetAllocator(kType), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (from.is_cpu() || to.is_cpu()) not_recorded("a copy from or to the host");
  if (recording) recording->push_back([from = borrowed(from), to = borrowed(to)] { copy_from(from, to, true); });
  const OpenDevice open;
  at::NoGradGuard no_grad;
  if (!to.is_cpu()) {
    deliver(num_put);  // a stream has an order
    on_host(to).copy_(on_host(from));
    return to;
  }
  if (!non_blocking) {
    ++counts.blocking;
    deliver(num_put);
    at::Tensor(to).copy_(on_host(from));
    return to;
  }
  TRIREME_CHECK(to.is_contiguous(), "a copy without waiting into a host tensor with gaps");
  const at::Tensor values = on_host(from).to(to.scalar_type()).contiguous();
  std::lock_guard lock(late_mutex);
  late.push_back({to, {static_cast<const char*>(values.data_ptr()), values.nbytes()}});
  std::memset(to.data_ptr(), 0xff, to.nbytes());
  ++num_put;
  return to;
}

at::Scalar local_scalar(const at::Tensor& x) {
  not_recorded("the host reads a value");
  ++counts.blocking;
  const OpenDevice open;
  deliver(num_put);
  return on_host(x).item();
}

// Any other operation, by ATen's for the CPU on the same memory.
void run_by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  ++counts.operations[op.schema().name()];
  const OpenDevice open;
  const auto& schema = op.schema();
  const size_t num_arguments = schema.arguments().size(), first = stack->size() - num_arguments;
  std::vector<c10::IValue> given(stack->begin() + static_cast<std::ptrdiff_t>(first), stack->end());
  std::vector<at::Tensor> tensors;  // of the device
  auto host = [&](const at::Tensor& x) {
    if (x.defined() && !x.is_cpu()) tensors.push_back(x);
    else if (x.defined() && !x.unsafeGetTensorImpl()->is_wrapped_number()) not_recorded("an operation with a tensor of the host");
    return x.defined() && x.numel() == 0 ? at::empty(x.sizes(), x.scalar_type()) : on_host(x);  // an output may be given its size
  };
  for (size_t i = 0; i < num_arguments; ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (value.isTensor()) value = host(value.toTensor());
    else if (value.isDevice()) value = c10::IValue(at::Device(at::kCPU));
    else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& x : value.toTensorVector()) list.push_back(host(x));
      value = c10::IValue(std::move(list));
    } else if (value.isList() && value.toList().elementType()->isSubtypeOf(*c10::OptionalType::ofTensor())) {
      c10::List<std::optional<at::Tensor>> list;
      for (const c10::IValue& x : value.toListRef()) list.push_back(x.isNone() ? std::nullopt : std::optional(host(x.toTensor())));
      value = c10::IValue(std::move(list));
    }
  }
  const torch::jit::Stack kept(stack->end() - static_cast<std::ptrdiff_t>(num_arguments), stack->end());  // results may be references to them
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  auto device = [&](const at::Tensor& x, const c10::AliasInfo* alias) {
    if (!x.defined()) return x;
    for (size_t i = 0; alias && alias->isWrite() && i < num_arguments; ++i)  // one of the arguments, written to
      if (const auto* of = schema.arguments()[i].alias_info(); of && *of == *alias && given[i].isTensor()) {
        const at::Tensor& output = given[i].toTensor();
        if (output.numel() == 0 && x.numel() > 0) {
          const at::Tensor sized = at::empty_strided(x.sizes(), x.strides(), output.options());
          on_host(sized).copy_(x);
          output.unsafeGetTensorImpl()->shallow_copy_from(sized.getIntrusivePtr());
        }
        return output;
      }
    for (const at::Tensor& of : tensors)
      if (x.storage().data() == of.storage().data() && x.storage().data()) return of.as_strided(x.sizes(), x.strides(), x.storage_offset());
    at::Tensor moved = at::empty_strided(x.sizes(), x.strides(), x.options().device(here));
    on_host(moved).copy_(x);
    return moved;
  };
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    c10::IValue& value = (*stack)[stack->size() - schema.returns().size() + i];
    if (value.isTensor()) value = device(value.toTensor(), schema.returns()[i].alias_info());
    else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& x : value.toTensorVector()) list.push_back(device(x, nullptr));
      value = c10::IValue(std::move(list));
    }
  }
}

void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  if (!recording) return run_by_cpu(op, stack);
  const auto size = [&](size_t n) { return stack->end() - static_cast<std::ptrdiff_t>(n); };
  torch::jit::Stack given;
  for (auto value = size(op.schema().arguments().size()); value != stack->end(); ++value) given.push_back(borrowed(*value));
  run_by_cpu(op, stack);
  torch::jit::Stack made;
  for (auto value = size(op.schema().returns().size()); value != stack->end(); ++value) made.push_back(borrowed(*value));
  recording->push_back([op, given, made] {
    torch::jit::Stack again = given;
    run_by_cpu(op, &again);
    for (size_t i = 0; i < made.size(); ++i) {
      TRIREME_CHECK(made[i].isTensor(), op.schema().name(), " has a result that is not recorded");
      const at::Tensor from = again[i].toTensor(), to = made[i].toTensor();
      if (from.storage().data() != to.storage().data()) copy_from(from, to, true);
    }
  });
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", static_cast<at::Tensor (*)(const at::Tensor&, at::IntArrayRef)>(at::native::view));
  library.impl("_copy_from", copy_from);
  library.impl("_local_scalar_dense", local_scalar);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<by_cpu>()); }

// --- kernels -----------------------------------------------------------------------------------------------------------

// All entries of the table have the same shape: a reference to a struct, and a stream.
using Kernel = void (*)(const void*, kernels::Stream);
constexpr size_t kNumKernels = sizeof(kernels::Kernels) / sizeof(Kernel);
static_assert(sizeof(kernels::Kernels) % sizeof(Kernel) == 0);
Kernel emulated[kNumKernels], opened[kNumKernels];

size_t num_call_bytes[kNumKernels];  // of its struct; 0: not of those that a step is made of

template <typename Call>
void set_call_bytes(void (*const& entry)(const Call&, kernels::Stream)) {
  const auto* table = reinterpret_cast<const char*>(&kernels::emulated_kernels());
  num_call_bytes[static_cast<size_t>(reinterpret_cast<const char*>(&entry) - table) / sizeof(Kernel)] = sizeof(Call);
}

void run_kernel(size_t index, const void* call) {
  const OpenDevice open;
  ++counts.kernels;
  ++pages().in_kernel;
  emulated[index](call, nullptr);
  --pages().in_kernel;
}

template <size_t kIndex>
void run_opened(const void* call, kernels::Stream) {
  if (recording) {
    TRIREME_CHECK(num_call_bytes[kIndex] > 0, "kernel ", kIndex, " is not known to be part of a step that is recorded");
    std::vector<std::max_align_t> bytes(num_call_bytes[kIndex] / sizeof(std::max_align_t) + 1);
    std::memcpy(bytes.data(), call, num_call_bytes[kIndex]);
    recording->push_back([bytes] { run_kernel(kIndex, bytes.data()); });
  }
  run_kernel(kIndex, call);
}

// --- step graphs -------------------------------------------------------------------------------------------------------

class RecordedStep final : public StepGraph {
 public:
  ~RecordedStep() override { memory().release(&pool_); }
  // The step is done, to know its results' shapes, and undone.
  void record(const std::function<void()>& step) override {
    ++counts.graphs;
    const std::string before = memory().contents();
    memory().set_pool(&pool_);
    recording = &work_;
    const auto end = [&] {
      recording = nullptr;
      memory().set_pool(nullptr);
      memory().restore(before);
    };
    try {
      step();
    } catch (...) {
      end();
      throw;
    }
    end();
  }
  void replay() override {
    ++counts.replays;
    for (const auto& launch : work_) launch();
  }

 private:
  Memory::Pool pool_;
  std::vector<std::function<void()>> work_;
};

}  // namespace

std::vector<std::string> uuids_of_double() {
  const char *const devices = std::getenv("TRIREME_DOUBLE_DEVICES"), *const local_rank = std::getenv("OMPI_COMM_WORLD_LOCAL_RANK");
  std::istringstream all(devices ? devices : "A");
  std::string names;
  for (int i = local_rank ? std::atoi(local_rank) : 0; all >> names && i > 0; --i) continue;  // the last one's for all that come after
  std::vector<std::string> uuids;
  for (char name : names) uuids.emplace_back(16, name);
  return uuids;
}

OpenDevice::OpenDevice() { memory().open(); }
OpenDevice::~OpenDevice() { memory().close(); }

void offer_cuda() {
  static Allocator allocator;
  c10::SetAllocator(kType, &allocator);
  c10::register_privateuse1_backend("double");
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  if (const char* bytes = std::getenv("TRIREME_DOUBLE_BYTES")) memory().limit = std::atoll(bytes), pages().limit = static_cast<size_t>(memory().limit);
  std::memcpy(emulated, &kernels::emulated_kernels(), sizeof emulated);
  [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    ((opened[kIndex] = emulated[kIndex] ? run_opened<kIndex> : nullptr), ...);
  }(std::make_index_sequence<kNumKernels>());
  static kernels::Kernels table;
  std::memcpy(static_cast<void*>(&table), opened, sizeof opened);
  install_nccl_of_double();
  const kernels::Kernels& k = kernels::emulated_kernels();
  set_call_bytes(k.decode_attention), set_call_bytes(k.rms_norm_forward), set_call_bytes(k.rope), set_call_bytes(k.glu_forward), set_call_bytes(k.embedding);
  set_call_bytes(k.matmul), set_call_bytes(k.convert), set_call_bytes(k.to_float8), set_call_bytes(k.dequantize_4), set_call_bytes(k.lora_up), set_call_bytes(k.lora_down);
  set_paged_memory(kType, {[](size_t num_bytes, at::Device) { return pages().allocate(num_bytes); }, [](void* data) { pages().free(data); },
                           [](const void* data, size_t num_bytes, at::Device, kernels::Stream) { pages().prefetch(data, num_bytes); }});
  set_step_graphs(kType, [](at::Device) -> std::unique_ptr<StepGraph> { return std::make_unique<RecordedStep>(); });
  set_device_kind({.type = kType, .name = "cuda", .find = [] { return DeviceKind::Found{uuids_of_double(), ""}; }, .load = [](int index) { here = c10::Device(kType, static_cast<c10::DeviceIndex>(index)); },
                   .capability = [](int) { const char* given = std::getenv("TRIREME_DOUBLE_CAPABILITY"); return given ? std::atoi(given) : 90; }, .kernels = &table});
}

}  // namespace trireme
