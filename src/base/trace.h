// Where the time of a rank goes. Spans of its main thread are added up by kind, always: a span costs two readings of the
// clock. On request spans and collectives are also written as a trace that Chrome and Perfetto show (Chrome's trace event
// format, complete events).
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>

namespace trireme {

enum class TimeKind { kOther, kCompute, kWait, kBubble, kData, kOptimizer, kCheckpoint, kEvaluation };
const char* time_kind_name(TimeKind kind);  // other, compute, wait, bubble, data, optimizer, checkpoint, evaluation

struct SpanArgs {  // what is negative or null is left out
  const char* group = nullptr;  // of ranks
  int64_t num_bytes = -1;
  int micro_batch = -1, chunk = -1;
};

// From its construction to its end the thread does this. Spans nest: time counts for the innermost one, but all within a
// bubble, a checkpoint or an evaluation counts for that. Strings live as long as the span. Any thread; only the time of the
// one that called start_time_spent() is added up.
class Span {
 public:
  explicit Span(TimeKind kind, const char* name, const SpanArgs& args = {});
  ~Span();
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

 private:
  TimeKind kind_;
  const char* name_;
  SpanArgs args_;
  std::chrono::steady_clock::time_point begin_{};
  int64_t* outer_ = nullptr;  // what the time before counted for; null where this span is not added up
};

// Begins anew, with the calling thread as the main one; it counts as `other` outside of spans.
void start_time_spent();
// Seconds since then by name of the kind, waits as "wait/" and the group. Their sum is the time since the start. Main thread.
std::map<std::string, double> time_spent();

// One file a process, whole after every flush, so that whatever ends the process leaves valid JSON: for each span of the main
// thread and for each collective {"ph":"X","pid":rank,"tid":track,"cat":kind or "communication","name","ts","dur" in
// microseconds since `zero`,"args":{"step", "group", "bytes", "micro_batch", "chunk"}}. Track 0 is the main thread; every group
// has tracks of its own, so many that its collectives do not overlap on one; so have the spans of other threads.
// In memory is what came since the last flush, which the main thread does at kTraceBuffer by itself. At kMaxTraceBytes, or where
// the file cannot be written, the recording ends, with a warning.
inline constexpr int64_t kMaxTraceBytes = int64_t{256} << 20;
inline constexpr size_t kTraceBuffer = size_t{4} << 20;
void open_trace(const std::string& path, int rank, const std::string& host);  // SystemError: it exists, cannot be written
void start_trace(std::chrono::steady_clock::time_point zero);                 // records what begins from then on
void set_trace_step(int64_t step);  // of what ends from now on
void flush_trace();                 // nothing without a trace
void close_trace();                 // the same, for the last time
// A collective that has ended, any thread; costs nothing without a trace.
void trace_collective(const char* op, const char* group, int64_t num_bytes, std::chrono::steady_clock::time_point begin,
                      std::chrono::steady_clock::time_point end);

}  // namespace trireme
