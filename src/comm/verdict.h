// Who is to blame when ranks wait in vain: pure functions of what the ranks report.
#pragma once

#include <map>
#include <string>

#include "comm/flight_recorder.h"

namespace trireme {

std::string ranks_text(const std::vector<int>& ranks);  // "rank 3", "ranks 0, 3"; of many the first eight

// What is known of the ranks of a job, by rank.
struct Testimony {
  std::vector<std::string> hosts{""};   // by rank
  std::map<int, RankReport> reports;     // of those that answer
  struct LastWord {
    RankReport report;
    double age_s = 0;
  };
  std::map<int, LastWord> last_words;    // what others said of themselves earlier
};

// Ranks that do different things as the same operation of a group: "rank 2 on HOST is in all_gather #17 of ..., where
// ranks 0, 1 are in ...". Empty where there are none. Two such ranks are wrong however long they have waited.
std::string mismatch(const Testimony& known);

// Why `late` of rank `rank` does not end, in this order: ranks that do not answer; a mismatch; a rank that has not come,
// found by following from each rank to those it waits for; ranks that wait for one another; else those it waits for.
std::string culprit(const Testimony& known, int rank, const Flight& late);

}  // namespace trireme
