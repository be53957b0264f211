// The last operations of this process between ranks: a ring that the watchdog looks at and that a job which hangs leaves
// behind.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/json.h"

namespace trireme {

class CommOperation;

inline constexpr size_t kNumFlights = 256;

// A group of ranks as messages name it. `id` is the same on all its ranks, and no other group of the job has it.
struct FlightGroup {
  std::string id, name;
  std::vector<int> ranks;  // of the world
};
using FlightGroupPtr = std::shared_ptr<const FlightGroup>;

// What all ranks do together outside any Communicator: the start, the end, Communicator::world(). Called it gives the
// number of the next of its operations.
FlightGroupPtr job_group();
inline constexpr char kJobEnd[] = "end of the program";
void set_job_size(int num_ranks);
int64_t next_job_operation();

// The entry of an operation. Those of a whole group have a number, the same on all its ranks, from 1; a message has the
// rank of the world at its other end. `detail` (data type, reduction) and `op` are literals. Any thread.
struct FlightCall {
  const char* op;
  int64_t num_bytes = 0;
  int64_t number = 0;
  const char* detail = "";
  int peer = -1;
};
uint64_t flight_begin(const FlightGroupPtr& group, const FlightCall& call);
void flight_has(uint64_t flight, const std::shared_ptr<CommOperation>& operation);  // to ask whom it waits for
void flight_waits(uint64_t flight);  // a thread waits for it from now on
void flight_end(uint64_t flight);

std::string flight_name(uint64_t flight);  // as Flight::name(); empty where it is overwritten

class FlightScope {
 public:
  FlightScope(const FlightGroupPtr& group, const FlightCall& call) : flight_(flight_begin(group, call)) {}
  ~FlightScope() { flight_end(flight_); }
  FlightScope(const FlightScope&) = delete;
  FlightScope& operator=(const FlightScope&) = delete;

 private:
  uint64_t flight_;
};

// An entry, copied; goes from rank to rank as JSON.
struct Flight {
  std::string op, detail, group_id, group;
  int64_t num_bytes = 0, number = 0;
  int peer = -1;
  double age_s = 0, seconds = 0;  // since it began; that it took, or takes so far
  bool done = false;
  bool waits = true;              // what is in flight holds somebody up: a message only while a thread waits for it, for it may
                                  // be posted long before; its seconds count from then on
  std::vector<int> awaited;       // of one in flight, where asked for: ranks of the world that it waits for
  std::weak_ptr<CommOperation> operation;

  std::string name() const;       // "all_reduce #17 of group data, 8192 bytes (float32)"
  std::string text() const;       // and what became of it
};
// The last `num_last` entries and, besides, all that are in flight; oldest first. `whom`: fills in whom they wait for (of a
// group that does not know, all others).
std::vector<Flight> flights(size_t num_last, bool whom);
// As it was while this process stood still (stopped by a signal), time did not pass for what was in flight.
void forgive_flights(double seconds);

struct RankReport {
  int rank = 0;
  std::vector<Flight> flights;
};
RankReport my_report(size_t num_last, bool whom);
std::string to_text(const RankReport& report);
RankReport report_of(const std::string& text);  // throws where it is none

// The last 256 operations of this process, oldest first, a line each.
std::string dump_flight_recorder(size_t num_last = kNumFlights);
// The same with the time of day of each, as FOLDER/rank-N.txt. SystemError.
void write_flights(const std::string& folder);

}  // namespace trireme
