#include "comm/watchdog.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "comm/operation.h"
#include "comm/process.h"
#include "comm/verdict.h"
#include "comm/watch_channel.h"

namespace trireme {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kTick{100}, kTickAtEnd{1};
constexpr milliseconds kBeat{1000};
constexpr milliseconds kWriteTime{2000}, kLastWords{10000};
constexpr double kMeetingTime_s = 120;  // ranks leave MPI_Init together
constexpr size_t kNumTold = 1;  // of finished operations, in a heartbeat

double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

struct Settings {
  std::mutex mutex;
  std::condition_variable wake;
  double timeout_s = 0;
  std::string folder;
  bool thread_started = false, closes = false, closed = false;
  std::unique_ptr<WatchChannel> channel;
};

Settings& settings() {
  static Settings* settings = new Settings;  // never destroyed: the watchdog's thread looks at it
  return *settings;
}

class Watchdog {
 public:
  // Under the mutex of the settings, but for what may take long.
  void tick(Settings& s) {
    const auto slept = Clock::now() - std::exchange(last_tick_, Clock::now());
    if (slept > std::chrono::seconds(1)) forgive_flights(seconds(slept));  // this process was stopped itself
    if (s.channel) listen(s);
    if (!judging_) look_for_late(s);
    if (judging_) judge(s);
    if (!s.channel || !s.closes || judging_) return;
    s.closed = s.channel->close();
    if (!s.closed) return;
    s.channel.reset();
    s.wake.notify_all();
  }

 private:
  struct Late {
    int rank;
    Flight flight;
  };

  void listen(Settings& s) {
    while (auto message = s.channel->receive()) {
      try {
        switch (message->kind) {
          case WatchChannel::kHeartbeat:
            heard_[message->from] = {report_of(message->text), Clock::now()};
            break;
          case WatchChannel::kLate:
            if (!judging_) begin_judging(s, Late{message->from, report_of(message->text).flights.at(0)});
            break;
          case WatchChannel::kTell:
            write(s);
            s.channel->post(message->from, WatchChannel::kReport, to_text(my_report(kNumFlights, true)));
            break;
          case WatchChannel::kReport:
            reports_[message->from] = report_of(message->text);
            break;
        }
      } catch (const std::exception&) {  // no report: that rank stays silent
      }
    }
    if (Clock::now() - last_beat_ < kBeat) return;
    last_beat_ = Clock::now();
    const RankReport mine = my_report(kNumTold, false);
    if (!s.closes) s.channel->beat(log_rank() == 0 ? 1 : 0, to_text(mine));
    if (log_rank() != 0 || judging_) return;
    Testimony known{s.channel->hosts(), {{0, mine}}, last_words()};
    if (mismatch(known).empty()) return;
    const auto open = std::find_if(mine.flights.begin(), mine.flights.end(), [](const Flight& f) { return !f.done; });
    begin_judging(s, open == mine.flights.end() ? std::optional<Late>() : Late{0, *open});
  }

  void look_for_late(Settings& s) {
    if (s.timeout_s <= 0) return;
    for (Flight& f : flights(0, false)) {
      if (!f.waits || f.seconds < s.timeout_s) continue;
      for (Flight& same : flights(0, true))
        if (same.name() == f.name() && same.waits) {
          f = same;
          break;
        }
      write(s);
      if (!s.channel || candidate_ == log_rank()) return begin_judging(s, Late{log_rank(), f});
      if (Clock::now() < candidate_until_) return;
      if (candidate_until_ != Clock::time_point() && ++candidate_ == log_rank()) return;  // next time
      candidate_until_ = Clock::now() + 2 * patience(s);
      return s.channel->post(candidate_, WatchChannel::kLate, to_text({log_rank(), {f}}));
    }
  }

  // How long a rank that lives may take to answer.
  static milliseconds patience(const Settings& s) {
    return std::clamp(milliseconds(static_cast<int64_t>(std::min(s.timeout_s, 1e6) * 100)), milliseconds(3000), milliseconds(10000));
  }

  void begin_judging(Settings& s, std::optional<Late> late) {
    judging_ = true;
    late_ = std::move(late);
    until_ = Clock::now() + patience(s);
    if (!s.channel) return;
    for (int rank = 0; rank < static_cast<int>(s.channel->hosts().size()); ++rank)
      if (rank != log_rank()) s.channel->post(rank, WatchChannel::kTell, "");
    write(s);
  }

  void judge(Settings& s) {
    const std::vector<std::string> hosts = s.channel ? s.channel->hosts() : std::vector{host_name()};
    if (Clock::now() < until_ && reports_.size() + 1 < hosts.size()) return;
    reports_[log_rank()] = my_report(kNumFlights, true);
    // A disk that hangs, perhaps what this is all about, holds up the log too: the job ends all the same.
    std::thread([] {
      std::this_thread::sleep_for(kLastWords);
      ::_exit(kExitFailure);
    }).detach();
    const Testimony known{hosts, reports_, last_words()};
    std::string sentence = late_ ? culprit(known, late_->rank, late_->flight) : mismatch(known);
    if (late_ && s.timeout_s > 0 && late_->flight.seconds >= s.timeout_s) sentence += str(", more than comm.timeout_s=", s.timeout_s);
    const std::string tail = dump_flight_recorder(16);
    if (s.folder.empty() && !tail.empty()) log_warn("the last operations of this rank:\n" + tail.substr(0, tail.size() - 1));  // first: the sentence is to be seen at the end
    if (!s.folder.empty()) sentence += str("; what each rank did is in ", s.folder);
    log_message(LogLevel::kError, sentence + ". All ranks are ended; a training run goes on from its last checkpoint, if it has one, when the same command is run again");
    if (auto operation = late_ ? late_->flight.operation.lock() : nullptr) {
      std::thread([operation] { operation->abort(); }).detach();  // may itself hang where a device does
      std::this_thread::sleep_for(milliseconds(500));
    }
    Process::abort(kExitFailure);
  }

  // Once. A disk may hang too, perhaps because of it this rank does: it is not waited for long.
  void write(const Settings& s) {
    if (s.folder.empty() || std::exchange(written_, true)) return;
    auto done = std::make_shared<std::promise<void>>();
    auto written = done->get_future();
    std::thread([done, folder = s.folder] {
      try {
        write_flights(folder);
      } catch (const std::exception& error) {
        log_warn(error.what());
      }
      done->set_value();
    }).detach();
    written.wait_for(kWriteTime);
  }

  std::map<int, Testimony::LastWord> last_words() const {
    std::map<int, Testimony::LastWord> words;
    for (const auto& [rank, heard] : heard_) words[rank] = {heard.report, seconds(Clock::now() - heard.when)};
    return words;
  }

  struct Heard {
    RankReport report;
    Clock::time_point when;
  };
  Clock::time_point last_tick_ = Clock::now(), last_beat_, until_, candidate_until_;
  std::map<int, Heard> heard_;
  std::map<int, RankReport> reports_;
  std::optional<Late> late_;
  int candidate_ = 0;  // who is to judge
  bool judging_ = false, written_ = false;
};

void start_thread(Settings& s) {
  if (std::exchange(s.thread_started, true)) return;
  std::thread([&s] {
    Watchdog watchdog;
    for (std::unique_lock lock(s.mutex);;) {
      watchdog.tick(s);
      s.wake.wait_for(lock, s.closes && !s.closed ? kTickAtEnd : kTick);
    }
  }).detach();
}

}  // namespace

void set_comm_timeout(double timeout_s) {
  Settings& s = settings();
  std::lock_guard lock(s.mutex);
  s.timeout_s = timeout_s;
  if (timeout_s > 0) start_thread(s);
}

CommTimeoutPause::CommTimeoutPause(bool pauses, double factor) : pauses_(pauses) {
  if (!pauses_) return;
  Settings& s = settings();
  std::lock_guard lock(s.mutex);
  timeout_s_ = std::exchange(s.timeout_s, factor * s.timeout_s);
}

CommTimeoutPause::~CommTimeoutPause() {
  if (pauses_) set_comm_timeout(timeout_s_);
}

void set_flight_folder(const std::string& folder) {
  std::lock_guard lock(settings().mutex);
  settings().folder = folder;
}

void open_watch_channel() {
  auto channel = std::make_unique<WatchChannel>(kMeetingTime_s);
  Settings& s = settings();
  std::lock_guard lock(s.mutex);
  s.channel = std::move(channel);
  start_thread(s);
}

void close_watch_channel() {
  Settings& s = settings();
  std::unique_lock lock(s.mutex);
  if (!s.channel) return;
  const FlightScope end(job_group(), {kJobEnd, 0, next_job_operation()});
  s.closes = true;
  s.wake.notify_all();
  s.wake.wait(lock, [&] { return s.closed; });
}

}  // namespace trireme
