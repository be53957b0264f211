// The threads of a block are fibers, which run one at a time, each until it waits. Who is next is random but not fair: each
// block has warps that lag behind and others that run ahead as far as they can (Burckhardt et al. 2010, "A randomized scheduler
// with probabilistic guarantees of finding bugs"), for a fair order hides that a barrier is missing.
#include <boost/context/fiber.hpp>
#include <boost/context/protected_fixedsize_stack.hpp>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kernels/arch.h"

namespace trireme::kernels::emulated {
namespace {

namespace context = boost::context;

constexpr int kNumBarriers = 16;
constexpr size_t kStackBytes = 256 << 10;  // of which a thread touches what it needs
constexpr unsigned char kPoison = 0xff;    // a NaN of every kind of number
constexpr int kAlignment = 1024;           // of shared memory
constexpr int kCandidates = 8;             // of those who could run, of whom the first in priority does

// Steele et al. 2014, SplitMix64: a third of the time of a run went into std::mt19937_64.
class Random {
 public:
  using result_type = uint64_t;
  explicit Random(uint64_t seed) : state_(seed) {}
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t{0}; }
  uint64_t operator()() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }
  size_t below(size_t n) { return ((*this)() >> 32) * n >> 32; }

 private:
  uint64_t state_;
};

uint64_t next_seed = 1;

struct {
  const char* op = nullptr;
  int number = 0;
  bool done = false;
} omission;

// Stacks are kept: making one costs two system calls.
class Stacks {
 public:
  context::stack_context allocate() {
    if (free_.empty()) return source_.allocate();
    const context::stack_context stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void deallocate(const context::stack_context& stack) { free_.push_back(stack); }

 private:
  context::protected_fixedsize_stack source_{kStackBytes};
  std::vector<context::stack_context> free_;
};
Stacks& stacks() {
  static Stacks* stacks = new Stacks;
  return *stacks;
}
struct StackAllocator {
  context::stack_context allocate() { return stacks().allocate(); }
  void deallocate(context::stack_context& stack) { stacks().deallocate(stack); }
};

// AddressSanitizer wants to know on which stack it is, or takes exceptions there for faults. While one lives, another stack is in use.
#ifdef __SANITIZE_ADDRESS__
class StackSwitch {
 public:
  StackSwitch(const void* bottom, size_t size) { __sanitizer_start_switch_fiber(&mine_, bottom, size); }
  ~StackSwitch() { __sanitizer_finish_switch_fiber(mine_, nullptr, nullptr); }
  static void arrive() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size); }
  static void leave() { __sanitizer_start_switch_fiber(nullptr, scheduler_bottom, scheduler_size); }
  static inline const void* scheduler_bottom = nullptr;
  static inline size_t scheduler_size = 0;

 private:
  void* mine_ = nullptr;
};
#else
struct StackSwitch {
  StackSwitch(const void*, size_t) {}
  ~StackSwitch() {}  // so that one is never unused
  static void arrive() {}
  static void leave() {}
  static constexpr const void* scheduler_bottom = nullptr;
  static constexpr size_t scheduler_size = 0;
};
#endif

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Thread {
  int index = 0;
  uint64_t priority = 0;
  context::stack_context stack;
  context::fiber here, back;       // where it goes on; where it goes when it waits
  bool begun = false, ended = false;
  std::string waits;               // what for
  int num_calls = 0;               // of the op that one call is left out of
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;

  StackSwitch enter() const { return {static_cast<const char*>(stack.sp) - stack.size, stack.size}; }
  ~Thread() {
    if (!begun || ended) return;
    const StackSwitch unwinds = enter();
    here = {};
  }
};

struct Barrier {
  int num_threads = 0;  // that it is for, while some have come
  int num_here = 0;
  std::vector<Thread*> waiting;
};

struct Warp {
  const char* op = nullptr;
  void* slots[32] = {};
  std::vector<Thread*> waiting;
};

struct Blocked {
  Thread* thread;
  const std::function<bool()>* ready;
};

struct Block {
  std::unique_ptr<arch::Extension> extension;
  arch::Index3 index, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kNumBarriers];
  std::vector<char> memory;
  char* shared = nullptr;
  int shared_bytes = 0;
  std::vector<Thread*> ready;
  std::vector<Blocked> blocked;
  Random random{0};
  std::exception_ptr error;
};

Block* block = nullptr;
Thread* thread = nullptr;

[[noreturn]] void fault(const std::string& what) {
  throw Fault("block (" + std::to_string(block->index.x) + ", " + std::to_string(block->index.y) + ", " + std::to_string(block->index.z) + "), thread " +
              std::to_string(thread->index) + ": " + what);
}

void wait(std::string what) {
  Thread* me = thread;
  me->waits = std::move(what);
  {
    const StackSwitch to_scheduler(StackSwitch::scheduler_bottom, StackSwitch::scheduler_size);
    me->back = std::move(me->back).resume();
  }
  thread = me;
  me->waits.clear();
}

void wake(std::vector<Thread*>& waiting) {
  block->ready.insert(block->ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

// Others first.
void yield() {
  block->ready.push_back(thread);
  wait("its turn");
}

// Those whose condition has come true may go on; looked at now and then while others can run.
bool somebody_can_run() {
  if (!block->blocked.empty() && (block->ready.empty() || block->random() % 8 == 0))
    std::erase_if(block->blocked, [](const Blocked& b) {
      if (!(*b.ready)()) return false;
      block->ready.push_back(b.thread);
      return true;
    });
  return !block->ready.empty();
}

void run_block(const std::function<void()>& body) {
  for (Thread& t : block->threads) {
    t.stack = stacks().allocate();
    t.here = context::fiber(std::allocator_arg, context::preallocated(t.stack.sp, t.stack.size, t.stack), StackAllocator(), [&t, &body](context::fiber&& back) {
      StackSwitch::arrive();
      t.begun = true;
      t.back = std::move(back);
      thread = &t;
      try {
        body();
        if (!t.uncommitted.empty() || !t.groups.empty()) fault("has ended with copies under way that nobody waited for");
        if (block->extension) block->extension->thread_ends();
      } catch (const context::detail::forced_unwind&) {
        StackSwitch::leave();
        throw;
      } catch (...) {
        if (!block->error) block->error = std::current_exception();
      }
      t.ended = true;
      StackSwitch::leave();
      return std::move(t.back);
    });
    block->ready.push_back(&t);
  }
  while (!block->error && somebody_can_run()) {
    size_t pick = block->random.below(block->ready.size());
    for (int i = 1; i < kCandidates; ++i)
      if (const size_t other = block->random.below(block->ready.size()); block->ready[other]->priority > block->ready[pick]->priority) pick = other;
    std::swap(block->ready[pick], block->ready.back());
    thread = block->ready.back();
    block->ready.pop_back();
    Thread* running = thread;
    const StackSwitch to_thread = running->enter();
    running->here = std::move(running->here).resume();
  }
  if (block->error) std::rethrow_exception(block->error);
  for (Thread& t : block->threads)
    if (!t.ended) {
      thread = &t;
      fault("waits for ever in " + t.waits);
    }
}

// Adds lines of its threads, bytes of shared memory and name, once for each such launch, to the file TRIREME_LAUNCHES: what a launch
// asks of a multiprocessor besides registers (benchmarks/occupancy.py). `body` is a lambda in arch::launch<Kernel>.
void note_launch(int num_threads, int shared_bytes, const std::function<void()>& body) {
  static const char* const file = std::getenv("TRIREME_LAUNCHES");
  static std::set<std::string> noted;
  if (!file) return;
  const std::unique_ptr<char, decltype(&std::free)> name(abi::__cxa_demangle(body.target_type().name(), nullptr, nullptr, nullptr), std::free);
  const std::string line = std::to_string(num_threads) + " " + std::to_string(shared_bytes) + " " + (name ? name.get() : "?") + "\n";
  if (noted.insert(line).second) std::ofstream(file, std::ios::app) << line;
}

}  // namespace

void set_seed(uint64_t seed) { next_seed = seed; }
void leave_out(const char* op, int number) { omission = {op, number, false}; }
bool was_left_out() { return omission.done; }

namespace arch {

void run_grid(const Index3& grid, int num_threads, int shared_bytes, const std::function<void()>& body) {
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535 || num_threads < 32 || num_threads > 1024 || num_threads % 32 != 0)
    throw Fault("a launch of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) + " blocks of " +
                std::to_string(num_threads) + " threads");
  note_launch(num_threads, shared_bytes, body);
  std::vector<Index3> order;
  for (int z = 0; z < grid.z; ++z)
    for (int y = 0; y < grid.y; ++y)
      for (int x = 0; x < grid.x; ++x) order.push_back({x, y, z});
  Random random(next_seed++);
  std::shuffle(order.begin(), order.end(), random);
  for (const Index3& index : order) {
    Block b;
    b.index = index, b.grid = grid, b.random = Random(random());
    b.threads = std::vector<Thread>(static_cast<size_t>(num_threads));
    b.warps.resize(static_cast<size_t>(num_threads / 32));
    uint64_t of_warp = 0;
    for (int t = 0; t < num_threads; ++t) {
      if (t % 32 == 0) of_warp = b.random();
      b.threads[static_cast<size_t>(t)].index = t;
      b.threads[static_cast<size_t>(t)].priority = of_warp + b.random() % 32;
    }
    b.memory.assign(static_cast<size_t>(shared_bytes + kAlignment), static_cast<char>(kPoison));
    b.shared = b.memory.data() + (kAlignment - reinterpret_cast<uintptr_t>(b.memory.data()) % kAlignment) % kAlignment;
    b.shared_bytes = shared_bytes;
    block = &b;
    run_block(body);
  }
  block = nullptr;
}

bool left_out(const char* op) {
  if (!omission.op || std::strcmp(omission.op, op) != 0 || thread->num_calls++ != omission.number) return false;
  return omission.done = true;
}

int thread_index() { return thread->index; }
Index3 block_index() { return block->index; }
Index3 grid_size() { return block->grid; }

void come(int id, int num_threads, bool waits) {
  if (id < 0 || id >= kNumBarriers || num_threads % 32 != 0) fault("barrier " + std::to_string(id) + " of " + std::to_string(num_threads) + " threads");
  Barrier& barrier = block->barriers[id];
  if (barrier.num_here == 0) barrier.num_threads = num_threads;
  if (barrier.num_threads != num_threads)
    fault("comes to barrier " + std::to_string(id) + " as one of " + std::to_string(num_threads) + " threads, where others wait as of " + std::to_string(barrier.num_threads));
  if (waits) barrier.waiting.push_back(thread);
  if (++barrier.num_here == num_threads) {
    barrier.num_here = 0;
    wake(barrier.waiting);
  }
  if (waits) wait("barrier " + std::to_string(id));
}
void sync_named(int id, int num_threads) {
  if (!left_out("barrier")) come(id, num_threads, true);
}
void wait_for_turn(int id, int num_threads) { come(id, num_threads, true); }
void give_turn(int id, int num_threads) { come(id, num_threads, false); }
void sync_threads() { sync_named(0, static_cast<int>(block->threads.size())); }

void meet(const char* op, void* mine, void (*act)(Lanes lanes)) {
  Warp& warp = block->warps[static_cast<size_t>(thread->index / 32)];
  if (warp.waiting.empty()) warp.op = op;
  if (std::strcmp(warp.op, op) != 0) fault(std::string("comes to ") + op + ", where other lanes of its warp wait in " + warp.op);
  warp.slots[thread->index % 32] = mine;
  warp.waiting.push_back(thread);
  if (warp.waiting.size() == 32) {
    act(warp.slots);
    wake(warp.waiting);
  }
  wait(op);
}

char* shared_bytes(int offset, int count) {
  if (offset < 0 || count < 0 || offset > block->shared_bytes - count)
    fault("bytes " + std::to_string(offset) + " .. " + std::to_string(offset + count) + " of the " + std::to_string(block->shared_bytes) + " of shared memory");
  return block->shared + offset;
}

void check_index(int i, int size) {
  if (i < 0 || i >= size) fault("element " + std::to_string(i) + " of " + std::to_string(size) + " in shared memory");
}

void check_aligned(const void* p, size_t alignment, const char* op) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fault(std::string(op) + " at an address that is no multiple of " + std::to_string(alignment));
}

void check_shared(const void* p, size_t count, size_t alignment, const char* op) {
  const char* begin = static_cast<const char*>(p);
  if (begin < block->shared || begin + count > block->shared + block->shared_bytes) fault(std::string(op) + " outside of shared memory");
  check_aligned(p, alignment, op);
}
void check_global(const void* p, const char* op) {
  if (p >= block->shared && p < block->shared + block->shared_bytes) fault(std::string(op) + " to shared memory");
}
void check_shared(const void* p, size_t count, const char* op) { check_shared(p, count, 16, op); }

std::unique_ptr<Extension>& extension() { return block->extension; }
int shared_size() { return block->shared_bytes; }
void fault(const std::string& what) { emulated::fault(what); }
void block_until(const char* what, const std::function<bool()>& ready) {
  block->blocked.push_back({thread, &ready});
  wait(what);
}
void others_first() { yield(); }

void copy_async(void* to, const void* from, bool valid) {
  check_shared(to, 16, "copy_async");
  if (valid) check_aligned(from, 16, "copy_async");
  std::memset(to, kPoison, 16);
  thread->uncommitted.push_back({to, from, valid});
}

void copy_async_commit() { thread->groups.push_back(std::exchange(thread->uncommitted, {})); }

void wait_for_copies(int num_groups_left) {
  if (left_out("copy_async_wait")) return;
  yield();
  while (static_cast<int>(thread->groups.size()) > num_groups_left) {
    for (const Copy& c : thread->groups.front()) {
      if (c.valid) std::memcpy(c.to, c.from, 16);
      else std::memset(c.to, 0, 16);
    }
    thread->groups.pop_front();
  }
}

}  // namespace arch
}  // namespace trireme::kernels::emulated
