#include "base/trace.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/log.h"

namespace trireme {
namespace {

using Clock = std::chrono::steady_clock;

int64_t nanoseconds(Clock::duration d) { return std::chrono::duration_cast<std::chrono::nanoseconds>(d).count(); }

// --- time spent -------------------------------------------------------------------------------------------------------

struct TimeSpent {
  std::map<std::string, int64_t> nanoseconds_by_name;
  int64_t* counting = nullptr;  // an element of the map
  Clock::time_point since;
  bool closed = false;          // spans within the present one count for it

  void count_for(int64_t* next, Clock::time_point now) {
    *counting += nanoseconds(now - since);
    counting = next;
    since = now;
  }
};

thread_local TimeSpent* main_time = nullptr;

bool takes_all(TimeKind kind) {
  return kind == TimeKind::kBubble || kind == TimeKind::kCheckpoint || kind == TimeKind::kEvaluation;
}

// --- trace ------------------------------------------------------------------------------------------------------------

constexpr char kTail[] = "\n]}\n";

class Trace {
 public:
  static Trace& get() {
    static Trace* trace = new Trace;  // never destroyed: threads may still end collectives
    return *trace;
  }
  bool on() const { return on_.load(std::memory_order_relaxed); }

  void open(const std::string& path, int rank, const std::string& host) {
    std::lock_guard file_lock(file_mutex_);
    fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd_ < 0) throw SystemError(str("cannot write the trace ", path, ": ", errno_text()));
    path_ = path, end_ = 0;
    {
      std::lock_guard lock(mutex_);
      rank_ = rank;
      tracks_.clear(), num_tracks_ = 1, num_events_ = 0;
      buffer_ = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
      metadata("process_name", 0, str("\"name\":\"rank ", rank, " on ", host, "\""));
      metadata("process_sort_index", 0, str("\"sort_index\":", rank));
      metadata("thread_name", 0, "\"name\":\"main\"");
    }
    write();
  }
  void start(Clock::time_point zero) {
    std::lock_guard file_lock(file_mutex_);
    std::lock_guard lock(mutex_);
    zero_ = zero;
    on_ = fd_ >= 0;
  }
  void set_step(int64_t step) { step_ = step; }

  void flush() {
    std::lock_guard lock(file_mutex_);
    if (fd_ >= 0) write();
  }
  void close() {
    std::lock_guard lock(file_mutex_);
    on_ = false;
    if (fd_ < 0) return;
    write();
    ::close(std::exchange(fd_, -1));
  }

  // `track` null: the main thread. Whether it is time for a flush.
  bool add(const char* track, const char* category, const char* name, const SpanArgs& args, Clock::time_point begin,
           Clock::time_point end) {
    std::lock_guard lock(mutex_);
    begin = std::min(begin, end);  // the watchdog moves a beginning where the process was stopped
    if (!on() || begin < zero_) return false;
    const int64_t ts = nanoseconds(begin - zero_), length = nanoseconds(end - begin);
    const int tid = track ? track_of(track, ts, ts + length) : 0;
    char text[160];
    std::snprintf(text, sizeof text, "\"pid\":%d,\"tid\":%d,\"ts\":%lld.%03lld,\"dur\":%lld.%03lld,\"cat\":\"", rank_, tid,
                  static_cast<long long>(ts / 1000), static_cast<long long>(ts % 1000), static_cast<long long>(length / 1000),
                  static_cast<long long>(length % 1000));
    std::string event = str("{\"ph\":\"X\",", text, category, "\",\"name\":\"", name, "\",\"args\":{\"step\":", step_.load());
    if (args.group) event += str(",\"group\":\"", args.group, "\"");
    if (args.num_bytes >= 0) event += str(",\"bytes\":", args.num_bytes);
    if (args.micro_batch >= 0) event += str(",\"micro_batch\":", args.micro_batch);
    if (args.chunk >= 0) event += str(",\"chunk\":", args.chunk);
    append(event + "}}");
    return buffer_.size() > kTraceBuffer;
  }

 private:
  struct Track {
    int tid;
    int64_t end;  // of the last event on it
  };

  // Events come in the order of their ends: the first track of the name whose last event ended before this one began.
  int track_of(const std::string& name, int64_t begin, int64_t end) {
    std::vector<Track>& tracks = tracks_[name];
    for (Track& track : tracks)
      if (track.end <= begin) return track.end = end, track.tid;
    tracks.push_back({num_tracks_++, end});
    metadata("thread_name", tracks.back().tid, str("\"name\":\"", name, tracks.size() > 1 ? str(" ", tracks.size()) : "", "\""));
    return tracks.back().tid;
  }

  void metadata(const char* what, int tid, const std::string& args) {
    append(str("{\"ph\":\"M\",\"pid\":", rank_, ",\"tid\":", tid, ",\"name\":\"", what, "\",\"args\":{", args, "}}"));
  }
  void append(const std::string& event) { buffer_ += (num_events_++ > 0 ? ",\n" : "") + event; }

  // Over the tail of the last time, and with a tail again.
  void write() {
    std::string text;
    {
      std::lock_guard lock(mutex_);
      text.swap(buffer_);
    }
    const auto size = static_cast<int64_t>(text.size());
    text += kTail;
    for (size_t done = 0; done < text.size();) {
      const ssize_t n = ::pwrite(fd_, text.data() + done, text.size() - done, end_ + static_cast<off_t>(done));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) {
        const std::string why = errno_text();
        on_ = false;
        if (::ftruncate(fd_, end_) == 0 && end_ > 0) std::ignore = ::pwrite(fd_, kTail, sizeof kTail - 1, end_);
        ::close(std::exchange(fd_, -1));
        return log_warn(str("cannot write the trace ", path_, ": ", why, "; nothing more is recorded"));
      }
      done += static_cast<size_t>(n);
    }
    end_ += size;
    if (end_ < kMaxTraceBytes || !on()) return;
    on_ = false;
    log_warn(str("the trace ", path_, " is full (", kMaxTraceBytes >> 20, " MiB) after step ", step_.load(), "; nothing more is recorded"));
  }

  std::atomic<bool> on_ = false;
  std::atomic<int64_t> step_ = 0;
  std::mutex mutex_;  // of the events: nobody waits for the disk
  int rank_ = 0, num_tracks_ = 1;
  int64_t num_events_ = 0;
  std::string buffer_;
  Clock::time_point zero_;
  std::map<std::string, std::vector<Track>> tracks_;
  std::mutex file_mutex_;  // taken first
  int fd_ = -1;
  off_t end_ = 0;
  std::string path_;
};

}  // namespace

const char* time_kind_name(TimeKind kind) {
  constexpr const char* kNames[] = {"other", "compute", "wait", "bubble", "data", "optimizer", "checkpoint", "evaluation"};
  return kNames[static_cast<size_t>(kind)];
}

Span::Span(TimeKind kind, const char* name, const SpanArgs& args) : kind_(kind), name_(name), args_(args) {
  if (!main_time && !Trace::get().on()) return;
  begin_ = Clock::now();
  if (!main_time || main_time->closed) return;
  const std::string counter = kind == TimeKind::kWait ? str("wait/", args.group ? args.group : "") : time_kind_name(kind);
  outer_ = main_time->counting;
  main_time->count_for(&main_time->nanoseconds_by_name[counter], begin_);
  main_time->closed = takes_all(kind);
}

Span::~Span() {
  if (begin_ == Clock::time_point()) return;
  const Clock::time_point end = Clock::now();
  if (outer_) {
    main_time->count_for(outer_, end);
    main_time->closed = false;
  }
  if (!Trace::get().on()) return;
  const bool full = Trace::get().add(main_time ? nullptr : "other threads", time_kind_name(kind_), name_, args_, begin_, end);
  if (full && main_time) Trace::get().flush();
}

void start_time_spent() {
  static TimeSpent time;
  time = {};
  time.counting = &time.nanoseconds_by_name[time_kind_name(TimeKind::kOther)];
  time.since = Clock::now();
  main_time = &time;
}

std::map<std::string, double> time_spent() {
  TRIREME_CHECK(main_time);
  main_time->count_for(main_time->counting, Clock::now());
  std::map<std::string, double> seconds;
  for (const auto& [name, ns] : main_time->nanoseconds_by_name) seconds[name] = static_cast<double>(ns) * 1e-9;
  return seconds;
}

void open_trace(const std::string& path, int rank, const std::string& host) { Trace::get().open(path, rank, host); }
void start_trace(Clock::time_point zero) { Trace::get().start(zero); }
void set_trace_step(int64_t step) { Trace::get().set_step(step); }
void flush_trace() { Trace::get().flush(); }
void close_trace() { Trace::get().close(); }

void trace_collective(const char* op, const char* group, int64_t num_bytes, Clock::time_point begin, Clock::time_point end) {
  if (Trace::get().on()) Trace::get().add(group, "communication", op, {.group = group, .num_bytes = num_bytes}, begin, end);
}

}  // namespace trireme
