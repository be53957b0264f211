#include "comm/progress.h"

#include <chrono>
#include <condition_variable>
#include <thread>

#include "comm/operation.h"
#include "comm/process.h"

namespace trireme {

namespace {

constexpr std::chrono::microseconds kPollInterval{100};
constexpr std::chrono::microseconds kWaitInterval{20};
constexpr int kSpins = 50;  // before the first of these

class Engine {
 public:
  // Never destroyed: the thread sleeps on it until the process ends.
  static Engine& get() {
    static Engine* engine = new Engine;
    return *engine;
  }

  void add(std::shared_ptr<CommOperation> operation) {
    // Posting a message may copy one that has arrived already: the thread's business where there is one.
    if (!thread_wanted_ && operation->try_advance()) return;
    {
      std::lock_guard lock(mutex_);
      in_flight_.push_back(std::move(operation));
      num_in_flight_ = static_cast<int>(in_flight_.size());
      if (!started_ && thread_wanted_) {
        std::thread([this] { run(); }).detach();
        started_ = true;
      }
    }
    if (thread_wanted_) wake_.notify_one();
  }

  // In the background: gives the core away between operations, so that a rank that wakes up computes at once.
  void advance(bool in_background = false) {
    if (num_in_flight_.load(std::memory_order_acquire) == 0) return;
    std::vector<std::shared_ptr<CommOperation>> operations;
    {
      std::lock_guard lock(mutex_);
      operations = in_flight_;
    }
    bool any_done = false;
    for (const auto& operation : operations) {
      any_done |= operation->try_advance();
      if (in_background) std::this_thread::yield();
    }
    if (!any_done) return;
    std::lock_guard lock(mutex_);
    std::erase_if(in_flight_, [](const auto& operation) { return operation->done(); });
    num_in_flight_ = static_cast<int>(in_flight_.size());
  }

  bool test(CommOperation& operation) {
    if (operation.done()) return true;
    if (thread_wanted_) return false;
    advance();
    return operation.done();
  }

  void wait(CommOperation& operation) {
    auto released = [&] { return operation.try_advance() || operation.released(); };
    if (released()) return;
    // With more ranks than cores giving a core away for a moment is not enough: the kernel comes back to a thread that yields
    // before it lets one run that has just woken up.
    static const bool sleeps = mpi_yields_when_idle();
    ++num_waiting_;
    for (int i = 0; !released(); ++i) {
      advance();
      if (sleeps && i >= kSpins) std::this_thread::sleep_for(kWaitInterval);
    }
    --num_waiting_;
  }

  void set_thread(bool on) { thread_wanted_ = on; }

 private:
  void run() {
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return !in_flight_.empty() && thread_wanted_; });
      }
      if (num_waiting_ == 0) advance(true);
      std::this_thread::sleep_for(kPollInterval);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::shared_ptr<CommOperation>> in_flight_;
  std::atomic<int> num_in_flight_ = 0, num_waiting_ = 0;
  std::atomic<bool> thread_wanted_ = true;
  bool started_ = false;
};

}  // namespace

void set_progress_thread(bool on) { Engine::get().set_thread(on); }
void engine_add(std::shared_ptr<CommOperation> operation) { Engine::get().add(std::move(operation)); }
bool engine_test(CommOperation& operation) { return Engine::get().test(operation); }
void engine_wait(CommOperation& operation) { Engine::get().wait(operation); }
void engine_advance() { Engine::get().advance(); }

}  // namespace trireme
