#include "comm/watchdog.h"

#include <array>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/trace.h"
#include "comm/operation.h"
#include "comm/process.h"

namespace trireme {

namespace {

using Clock = std::chrono::steady_clock;

struct Entry {
  uint64_t sequence = 0;  // from 1; 0: never used
  const char* op = "";
  std::array<char, 24> group{};
  int64_t num_bytes = 0;
  Clock::time_point begin, end;
  bool done = false;
  std::weak_ptr<CommOperation> operation;
};

constexpr size_t kNumEntries = 256;

struct Recorder {
  std::mutex mutex;
  std::array<Entry, kNumEntries> entries;
  uint64_t last = 0;
  double timeout_s = 0;
  bool thread_started = false;
};

Recorder& recorder() {
  static Recorder* recorder = new Recorder;  // never destroyed: the watchdog's thread looks at it
  return *recorder;
}

double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

std::string line(const Entry& e, Clock::time_point now) {
  char text[160];
  std::snprintf(text, sizeof text, "#%llu %s of group %s, %lld bytes, %s %.3f s",
                static_cast<unsigned long long>(e.sequence), e.op, e.group.data(), static_cast<long long>(e.num_bytes),
                e.done ? "took" : "in flight for", seconds((e.done ? e.end : now) - e.begin));
  return text;
}

std::string dump(const Recorder& r, size_t num_last) {
  std::string text;
  const uint64_t first = r.last > num_last ? r.last - num_last + 1 : 1;
  for (uint64_t s = first; s <= r.last; ++s)
    if (r.entries[s % kNumEntries].sequence == s) text += line(r.entries[s % kNumEntries], Clock::now()) + "\n";
  return text;
}

std::string dump_tail() {
  std::lock_guard lock(recorder().mutex);
  std::string text = dump(recorder(), 16);
  return text.substr(0, text.size() - 1);  // the log ends the line
}

void watch() {
  for (auto last = Clock::now();;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    const auto slept = Clock::now() - std::exchange(last, Clock::now());
    std::string message;
    std::shared_ptr<CommOperation> operation;
    {
      Recorder& r = recorder();
      std::lock_guard lock(r.mutex);
      if (r.timeout_s <= 0) continue;
      const auto now = Clock::now();
      for (Entry& e : r.entries) {
        if (slept > std::chrono::seconds(1) && !e.done) e.begin += slept;  // this process was stopped itself
        if (e.sequence == 0 || e.done || seconds(now - e.begin) < r.timeout_s) continue;
        message = str("rank ", log_rank(), " on ", host_name(), ": ", line(e, now),
                      ", more than comm.timeout_s=", r.timeout_s);
        operation = e.operation.lock();
        break;
      }
    }
    if (message.empty()) continue;
    std::string peers;
    if (operation)
      for (int rank : operation->awaited()) peers += str(peers.empty() ? ": it waits for rank " : ", ", rank);
    log_warn("the last collectives:\n" + dump_tail());  // first: the sentence is to be seen at the end
    log_message(LogLevel::kError, str(message, peers, peers.empty() ? ": a peer" : ", which",
                                      " is gone, stopped or does something else. All ranks are ended; a training run goes on "
                                      "from its last checkpoint when the same command is run again"));
    if (operation) {
      std::thread([operation] { operation->abort(); }).detach();  // may itself hang where a device does
      std::this_thread::sleep_for(std::chrono::milliseconds(500));
    }
    Process::abort(kExitFailure);
  }
}

}  // namespace

std::string dump_flight_recorder() {
  Recorder& r = recorder();
  std::lock_guard lock(r.mutex);
  return dump(r, kNumEntries);
}

void set_comm_timeout(double timeout_s) {
  Recorder& r = recorder();
  std::lock_guard lock(r.mutex);
  r.timeout_s = timeout_s;
  if (timeout_s > 0 && !r.thread_started) {
    std::thread(watch).detach();
    r.thread_started = true;
  }
}

CommTimeoutPause::CommTimeoutPause(bool pauses) : pauses_(pauses) {
  if (!pauses_) return;
  Recorder& r = recorder();
  std::lock_guard lock(r.mutex);
  timeout_s_ = std::exchange(r.timeout_s, 0);
}

CommTimeoutPause::~CommTimeoutPause() {
  if (pauses_) set_comm_timeout(timeout_s_);
}

uint64_t flight_begin(const std::string& group, const char* op, int64_t num_bytes) {
  Recorder& r = recorder();
  std::lock_guard lock(r.mutex);
  Entry& e = r.entries[++r.last % kNumEntries];
  e = Entry{r.last, op, {}, num_bytes, Clock::now(), {}, false, {}};
  std::snprintf(e.group.data(), e.group.size(), "%s", group.c_str());
  return r.last;
}

void flight_has(uint64_t sequence, const std::shared_ptr<CommOperation>& operation) {
  Recorder& r = recorder();
  std::lock_guard lock(r.mutex);
  if (r.entries[sequence % kNumEntries].sequence == sequence) r.entries[sequence % kNumEntries].operation = operation;
}

void flight_end(uint64_t sequence) {
  Recorder& r = recorder();
  std::lock_guard lock(r.mutex);
  Entry& e = r.entries[sequence % kNumEntries];
  if (e.sequence != sequence) return;  // overwritten since
  e.end = Clock::now();
  e.done = true;
  trace_collective(e.op, e.group.data(), e.num_bytes, e.begin, e.end);
}

}  // namespace trireme
