#include "comm/verdict.h"

#include <algorithm>
#include <cstdio>
#include <deque>
#include <set>
#include <tuple>
#include <utility>

#include "base/check.h"

namespace trireme {

std::string ranks_text(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (i == 8) return text + str(" and ", ranks.size() - i, " more");
    text += str(i > 0 ? ", " : "", ranks[i]);
  }
  return text;
}

namespace {

std::string in_seconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", seconds);
  return text;
}

std::string on_host(const Testimony& known, int rank) { return str("rank ", rank, " on ", known.hosts[static_cast<size_t>(rank)]); }

std::vector<Flight> open_flights(const RankReport& report) {
  std::vector<Flight> open;
  for (const Flight& f : report.flights)
    if (!f.done && f.waits) open.push_back(f);
  return open;
}

// "in all_reduce #4 of ...", "in no operation since barrier #3 of ... ended, 2.1 s before".
std::string doing(const RankReport& report) {
  if (const auto open = open_flights(report); !open.empty()) return "in " + open[0].name();
  const auto last = std::find_if(report.flights.rbegin(), report.flights.rend(), [](const Flight& f) { return f.done; });
  if (last == report.flights.rend()) return "in no operation so far";
  return str("in no operation since ", last->name(), " ended, ", in_seconds(last->age_s - last->seconds), " before");
}

// To an operation of a group; whether a message has been sent nobody knows.
bool has_come(const Testimony& known, int rank, const Flight& flight) {
  if (flight.number == 0) return false;
  auto it = known.reports.find(rank);
  return it != known.reports.end() && std::any_of(it->second.flights.begin(), it->second.flights.end(), [&](const Flight& f) {
           return f.number > 0 && f.number >= flight.number && f.group_id == flight.group_id;
         });
}

std::string not_come(const Testimony& known, int rank, int waits, const Flight& in, const std::string& is) {
  return str(on_host(known, rank), " has not come to ", in.name(), ", where rank ", waits, " waits for it; it is ", is);
}

// A rank that has ended while another waits for it.
std::string ended(const Testimony& known) {
  for (const auto& [rank, report] : known.reports)
    for (const Flight& f : open_flights(report))
      for (int peer : f.awaited)
        if (auto it = known.reports.find(peer); it != known.reports.end() && f.op != kJobEnd && !has_come(known, peer, f))
          if (const auto open = open_flights(it->second); std::any_of(open.begin(), open.end(), [](const Flight& o) { return o.op == kJobEnd; }))
            return not_come(known, peer, rank, f, "at the end of the program");
  return "";
}

// From the late operation along whoever is waited for: the first rank that is in no operation at all.
std::string absent(const Testimony& known, int rank, const Flight& late) {
  struct Step {
    int waits, rank;  // `waits` waits for `rank` in
    Flight in;
  };
  std::deque<Step> steps;
  std::set<int> seen{rank};
  auto follow = [&](int waits, const Flight& in) {
    for (int peer : in.awaited)
      if (!has_come(known, peer, in) && seen.insert(peer).second) steps.push_back({waits, peer, in});
  };
  for (follow(rank, late); !steps.empty(); steps.pop_front()) {
    const Step step = steps.front();
    auto it = known.reports.find(step.rank);
    if (it == known.reports.end()) continue;
    const auto open = open_flights(it->second);
    for (const Flight& f : open) follow(step.rank, f);
    if (open.empty()) return not_come(known, step.rank, step.waits, step.in, doing(it->second));
  }
  return "";
}

std::string circle(const Testimony& known, int rank, Flight in) {
  std::vector<std::pair<int, std::string>> path;
  for (;;) {
    for (size_t i = 0; i < path.size(); ++i)
      if (path[i].first == rank) {
        std::string text;
        for (; i < path.size(); ++i) text += (text.empty() ? "" : "; ") + path[i].second;
        return "ranks wait for one another: " + text;
      }
    auto next = std::find_if(in.awaited.begin(), in.awaited.end(), [&](int peer) { return !has_come(known, peer, in); });
    if (next == in.awaited.end()) return "";
    path.emplace_back(rank, str("rank ", rank, " for rank ", *next, " in ", in.name()));
    auto it = known.reports.find(*next);
    if (it == known.reports.end()) return "";
    const auto open = open_flights(it->second);
    if (open.empty()) return "";
    rank = *next, in = open[0];
  }
}

}  // namespace

std::string mismatch(const Testimony& known) {
  using Signature = std::tuple<std::string, std::string, int64_t>;
  std::map<std::pair<std::string, int64_t>, std::map<Signature, std::vector<std::pair<int, const Flight*>>>> operations;
  auto take = [&](const RankReport& report) {
    for (const Flight& f : report.flights)
      if (f.number > 0) operations[{f.group_id, f.number}][{f.op, f.detail, f.num_bytes}].emplace_back(report.rank, &f);
  };
  for (const auto& [rank, report] : known.reports) take(report);
  for (const auto& [rank, word] : known.last_words)
    if (!known.reports.contains(rank)) take(word.report);
  for (auto& [operation, kinds] : operations) {
    if (kinds.size() < 2) continue;
    std::vector<std::vector<std::pair<int, const Flight*>>> sides;
    for (auto& [signature, side] : kinds) sides.push_back(side);
    std::sort(sides.begin(), sides.end(), [](const auto& a, const auto& b) {  // the fewest last; of two as many, the higher rank
      return a.size() != b.size() ? a.size() > b.size() : a[0].first < b[0].first;
    });
    std::vector<int> others;
    for (const auto& [rank, flight] : sides[0]) others.push_back(rank);
    const auto& [rank, flight] = sides.back()[0];
    return str(on_host(known, rank), " is in ", flight->name(), ", where ", ranks_text(others), others.size() == 1 ? " is in " : " are in ",
               sides[0][0].second->name(), ": the ranks do not do the same operations");
  }
  return "";
}

std::string culprit(const Testimony& known, int rank, const Flight& late) {
  const std::string waits = str("rank ", rank, " has waited for ", in_seconds(late.seconds), " in ", late.name());
  std::vector<int> silent;
  const int num_ranks = static_cast<int>(known.hosts.size());
  for (int r = 0; r < num_ranks; ++r)
    if (!known.reports.contains(r)) silent.push_back(r);
  if (!silent.empty()) {
    std::string text = on_host(known, silent[0]) + " does not answer: it is stopped or gone";
    if (auto it = known.last_words.find(silent[0]); it != known.last_words.end())
      text += str(" (its last word, ", in_seconds(it->second.age_s), " ago: ", doing(it->second.report), ")");
    silent.erase(silent.begin());
    if (!silent.empty()) text += str(", and so ", silent.size() == 1 ? "does " : "do ", ranks_text(silent));
    return str(text, "; ", waits);
  }
  if (std::string text = mismatch(known); !text.empty()) return text;
  if (std::string text = ended(known); !text.empty()) return text;
  if (std::string text = absent(known, rank, late); !text.empty()) return text;
  if (std::string text = circle(known, rank, late); !text.empty()) return text;
  std::vector<int> missing;
  for (int peer : late.awaited)
    if (!has_come(known, peer, late)) missing.push_back(peer);
  if (missing.empty()) return waits + (num_ranks > 1 ? ", to which all ranks have come: a network or a device does not go on" : "");
  return str(waits, ", for ", ranks_text(missing));
}

}  // namespace trireme
