#include "comm/flight_recorder.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <numeric>

#include "base/check.h"
#include "base/log.h"
#include "base/trace.h"
#include "comm/operation.h"
#include "comm/process.h"

namespace trireme {

namespace {

using Clock = std::chrono::steady_clock;

struct Entry {
  uint64_t flight = 0;  // from 1; 0: never used
  FlightGroupPtr group;
  FlightCall call{""};
  Clock::time_point begin, end, wait_begin;
  bool done = false, waits = false;
  std::weak_ptr<CommOperation> operation;
};

struct Recorder {
  std::mutex mutex;
  std::array<Entry, kNumFlights> entries;
  std::map<uint64_t, Entry> overtaken;  // in flight still, when the ring came round to their places
  uint64_t last = 0;
  FlightGroupPtr job = std::make_shared<FlightGroup>(FlightGroup{"job", "world", {0}});
  int64_t num_job_operations = 0;
};

Recorder& recorder() {
  static Recorder* recorder = new Recorder;  // never destroyed: the watchdog's thread looks at it
  return *recorder;
}

double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

Flight copy_of(const Entry& e, Clock::time_point now, bool whom) {
  Flight f;
  f.op = e.call.op, f.detail = e.call.detail;
  f.group_id = e.group->id, f.group = e.group->name;
  f.num_bytes = e.call.num_bytes, f.number = e.call.number, f.peer = e.call.peer;
  f.age_s = seconds(now - e.begin), f.seconds = seconds((e.done ? e.end : now) - e.begin);
  f.done = e.done;
  f.waits = f.peer < 0 || e.waits;
  if (!f.done && f.peer >= 0) f.seconds = e.waits ? seconds(now - e.wait_begin) : 0;
  f.operation = e.operation;
  if (f.done || !whom) return f;
  if (f.peer >= 0) f.awaited = {f.peer};
  else
    for (int rank : e.group->ranks)
      if (rank != log_rank()) f.awaited.push_back(rank);
  return f;
}

}  // namespace

FlightGroupPtr job_group() {
  std::lock_guard lock(recorder().mutex);
  return recorder().job;
}

void set_job_size(int num_ranks) {
  std::vector<int> ranks(static_cast<size_t>(num_ranks));
  std::iota(ranks.begin(), ranks.end(), 0);
  std::lock_guard lock(recorder().mutex);
  recorder().job = std::make_shared<FlightGroup>(FlightGroup{"job", "world", std::move(ranks)});
}

int64_t next_job_operation() {
  std::lock_guard lock(recorder().mutex);
  return ++recorder().num_job_operations;
}

uint64_t flight_begin(const FlightGroupPtr& group, const FlightCall& call) {
  Recorder& r = recorder();
  std::lock_guard lock(r.mutex);
  Entry& e = r.entries[++r.last % kNumFlights];
  if (e.flight > 0 && !e.done) r.overtaken.emplace(e.flight, std::move(e));
  e = Entry{r.last, group, call, Clock::now(), {}, {}, false, false, {}};
  return r.last;
}

void flight_has(uint64_t flight, const std::shared_ptr<CommOperation>& operation) {
  Recorder& r = recorder();
  std::lock_guard lock(r.mutex);
  if (r.entries[flight % kNumFlights].flight == flight) r.entries[flight % kNumFlights].operation = operation;
}

void flight_waits(uint64_t flight) {
  Recorder& r = recorder();
  std::lock_guard lock(r.mutex);
  auto wait = [](Entry& e) { e.waits = true, e.wait_begin = Clock::now(); };
  if (Entry& e = r.entries[flight % kNumFlights]; flight > 0 && e.flight == flight) return wait(e);
  if (auto found = r.overtaken.find(flight); found != r.overtaken.end()) wait(found->second);
}

void flight_end(uint64_t flight) {
  if (flight == 0) return;  // of no entry
  Recorder& r = recorder();
  std::lock_guard lock(r.mutex);
  auto end = [](Entry& e) {
    e.end = Clock::now();
    e.done = true;
    trace_collective(e.call.op, e.group->name.c_str(), e.call.num_bytes, e.begin, e.end);
  };
  if (Entry& e = r.entries[flight % kNumFlights]; e.flight == flight) return end(e);
  if (auto node = r.overtaken.extract(flight)) end(node.mapped());
}

std::string flight_name(uint64_t flight) {
  Recorder& r = recorder();
  std::lock_guard lock(r.mutex);
  const Entry& e = r.entries[flight % kNumFlights];
  return e.flight == flight && flight > 0 ? copy_of(e, Clock::now(), false).name() : "";
}

void forgive_flights(double seconds) {
  Recorder& r = recorder();
  const auto time = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  std::lock_guard lock(r.mutex);
  auto forgive = [time, now = Clock::now()](Entry& e) { e.begin = std::min(e.begin + time, now), e.wait_begin = std::min(e.wait_begin + time, now); };
  for (Entry& e : r.entries)
    if (!e.done) forgive(e);
  for (auto& [flight, e] : r.overtaken) forgive(e);
}

std::vector<Flight> flights(size_t num_last, bool whom) {
  std::vector<Flight> all;
  {
    Recorder& r = recorder();
    std::lock_guard lock(r.mutex);
    const auto now = Clock::now();
    for (const auto& [flight, e] : r.overtaken) all.push_back(copy_of(e, now, whom));
    for (uint64_t f = r.last > kNumFlights ? r.last - kNumFlights + 1 : 1; f <= r.last; ++f) {
      const Entry& e = r.entries[f % kNumFlights];
      if (e.flight == f && (!e.done || f + num_last > r.last)) all.push_back(copy_of(e, now, whom));
    }
  }
  for (Flight& f : all)  // without the recorder's lock: an operation that ends takes it, holding its own
    if (auto operation = f.done || !whom ? nullptr : f.operation.lock()) {
      try {
        if (std::vector<int> awaited = operation->awaited(); !awaited.empty()) f.awaited = std::move(awaited);
      } catch (const std::exception&) {  // MPI has failed: who waits for the operation will say it
      }
    }
  return all;
}

std::string Flight::name() const {
  std::string text = op;
  if (number > 0) text += str(" #", number);
  if (peer >= 0) text += str(" with rank ", peer);
  text += str(" of group ", group, ", ", num_bytes, " bytes");
  return detail.empty() ? text : str(text, " (", detail, ")");
}

std::string Flight::text() const {
  if (!done && !waits) return name() + ", posted";
  char took[64];
  std::snprintf(took, sizeof took, ", %s %.3f s", done ? "took" : "in flight for", seconds);
  return name() + took;
}

RankReport my_report(size_t num_last, bool whom) { return {log_rank(), flights(num_last, whom)}; }

std::string to_text(const RankReport& report) {
  Json all = Json::array();
  for (const Flight& f : report.flights)
    all.push_back(Json::array({f.op, f.detail, f.group_id, f.group, f.num_bytes, f.number, f.peer, f.age_s, f.seconds, f.done, f.awaited, f.waits}));
  return dump_json(Json::array({report.rank, all}));
}

RankReport report_of(const std::string& text) {
  const Json json = parse_json(text, "a rank's report");
  RankReport report{json.at(0).get<int>(), {}};
  for (const Json& j : json.at(1)) {
    Flight f;
    f.op = j.at(0), f.detail = j.at(1), f.group_id = j.at(2), f.group = j.at(3);
    f.num_bytes = j.at(4), f.number = j.at(5), f.peer = j.at(6), f.age_s = j.at(7), f.seconds = j.at(8), f.done = j.at(9);
    f.awaited = j.at(10).get<std::vector<int>>(), f.waits = j.at(11);
    report.flights.push_back(std::move(f));
  }
  return report;
}

std::string dump_flight_recorder(size_t num_last) {
  std::string text;
  for (const Flight& f : flights(num_last, false)) text += f.text() + "\n";
  return text;
}

void write_flights(const std::string& folder) {
  using std::chrono::system_clock;
  const auto now = system_clock::now();
  auto time_of_day = [&](double age_s) {
    const auto then = now - std::chrono::duration_cast<system_clock::duration>(std::chrono::duration<double>(age_s));
    const std::time_t whole = system_clock::to_time_t(std::chrono::floor<std::chrono::seconds>(then));
    std::tm parts{};
    ::gmtime_r(&whole, &parts);
    char text[40], all[64];
    std::strftime(text, sizeof text, "%F %T", &parts);
    std::snprintf(all, sizeof all, "%s.%06lld", text,
                  static_cast<long long>(std::chrono::duration_cast<std::chrono::microseconds>(then.time_since_epoch()).count() % 1000000));
    return std::string(all);
  };
  std::string text = str("rank ", log_rank(), " on ", host_name(), ", ", time_of_day(0), " UTC: its last operations with other ranks, oldest first\n");
  for (const Flight& f : flights(kNumFlights, false)) text += str(time_of_day(f.age_s), "  ", f.text(), "\n");
  std::error_code error;
  std::filesystem::create_directories(folder, error);  // a failure shows in the next line
  const std::string path = str(folder, "/rank-", log_rank(), ".txt");
  std::ofstream file(path);  // not synced: this process is about to be ended, and a busy disk would take longer than that
  if (!file.write(text.data(), static_cast<std::streamsize>(text.size())).flush()) throw SystemError(str("cannot write ", path, ": ", errno_text()));
}

}  // namespace trireme
