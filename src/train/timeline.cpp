#include "base/tensor.h"

#include "train/timeline.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>

#include "base/json.h"
#include "base/trace.h"
#include "comm/process.h"
#include "train/agreement.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using Nanoseconds = std::chrono::nanoseconds;

constexpr int kNumPings = 8;

int64_t now() { return std::chrono::duration_cast<Nanoseconds>(Clock::now().time_since_epoch()).count(); }

// Rank 0's present time, on the clock of each rank. The shortest of some round trips tells a difference of clocks best, to
// half its length.
Clock::time_point common_zero(const Communicator& world) {
  at::Tensor message = at::zeros({1}, at::kLong);
  int64_t& value = *message.data_ptr<int64_t>();
  const int64_t zero = now();
  if (world.rank() > 0) {
    for (int i = 0; i < kNumPings; ++i) {
      world.receive(message, 0);
      value = now();
      world.send(message, 0);
    }
    world.receive(message, 0);
    return Clock::time_point(Nanoseconds(value));
  }
  for (int rank = 1; rank < world.size(); ++rank) {
    int64_t shortest = INT64_MAX, difference = 0;
    for (int i = 0; i < kNumPings; ++i) {
      const int64_t begin = now();
      world.send(message, rank);
      world.receive(message, rank);
      const int64_t end = now();
      if (end - begin >= shortest) continue;
      shortest = end - begin;
      difference = value - (begin + shortest / 2);
    }
    value = zero + difference;
    world.send(message, rank);
  }
  return Clock::time_point(Nanoseconds(zero));
}

// A reader asks what is waited for: gradients are summed in several kinds of groups.
std::string reader_name(const std::string& counter) {
  static const std::map<std::string, std::string> kNames = {
      {"wait/gradients", "gradients"}, {"wait/data", "gradients"}, {"wait/holders", "gradients"}, {"wait/shards", "gradients"},
      {"wait/replicas", "gradients"},  {"wait/weights", "weights"}, {"wait/tensor", "tensor"},    {"checkpoint", "checkpoints"}};
  auto found = kNames.find(counter);
  return found != kNames.end() ? found->second : counter.starts_with("wait/") ? "other ranks" : counter;
}

double compute_share(const std::map<std::string, double>& seconds) {
  double all = 0;
  for (const auto& [name, s] : seconds) all += s;
  auto compute = seconds.find("compute");
  return compute == seconds.end() || all <= 0 ? 0 : compute->second / all;
}

}  // namespace

void open_run_trace(const std::string& run_dir, const Communicator& world) {
  const std::string folder = run_dir + "/trace";
  auto file = [&](int number) { return str(folder, "/rank-", world.rank(), number > 1 ? str(".", number) : "", ".json"); };
  agree_on(world, [&] {
    if (world.rank() != 0) return;
    std::error_code error;
    fs::create_directories(folder, error);
    if (error) throw SystemError(str("cannot create ", folder, ": ", error.message(), "; log.trace=false does without it"));
  });
  int free = 1;
  for (std::error_code error; fs::exists(file(free), error);) ++free;
  free = static_cast<int>(world.max(free));  // the files of a run have one number
  agree_on(world, [&] { open_trace(file(free), world.rank(), host_name()); });
  start_trace(common_zero(world));
}

std::string time_shares_text(const std::map<std::string, double>& seconds) {
  struct Share {
    bool communication;
    double exact;
    int64_t tenths;
  };
  std::map<std::string, Share> shares;
  double all = 0;
  for (const auto& [counter, s] : seconds) {
    shares[reader_name(counter)].exact += s;
    shares[reader_name(counter)].communication = counter.starts_with("wait/");
    all += s;
  }
  int64_t missing = 1000;  // tenths of a percent: rounded down, and the rest given to those who lost most
  std::vector<Share*> losers;
  for (auto& [name, share] : shares) {
    share.exact *= 1000 / std::max(all, 1e-12);
    share.tenths = static_cast<int64_t>(share.exact);
    missing -= share.tenths;
    losers.push_back(&share);
  }
  std::stable_sort(losers.begin(), losers.end(), [](const Share* a, const Share* b) {
    return a->exact - std::floor(a->exact) > b->exact - std::floor(b->exact);
  });
  for (Share* share : losers) share->tenths += missing-- > 0;
  auto percent = [](int64_t tenths) { return str(tenths / 10, ".", tenths % 10, " %"); };
  int64_t communication = 0;
  std::string groups, text;
  for (const auto& [name, share] : shares) {
    if (!share.communication || share.tenths == 0) continue;
    communication += share.tenths;
    groups += str(groups.empty() ? "" : ", ", name, " ", percent(share.tenths));
  }
  auto add = [&](const std::string& what) { text += (text.empty() ? "" : ", ") + what; };
  for (const char* name : {"compute", "communication", "bubble", "data", "optimizer", "checkpoints", "evaluation", "other"}) {
    if (name == std::string("communication")) {
      if (communication > 0) add(str("communication not hidden ", percent(communication), " (", groups, ")"));
    } else if (auto found = shares.find(name); found != shares.end() && found->second.tenths > 0) {
      add(str(name, " ", percent(found->second.tenths)));
    }
  }
  return text;
}

std::vector<std::string> time_lines(const Communicator& world) {
  std::vector<std::map<std::string, double>> ranks;
  for (const std::string& text : world.gather_bytes(dump_json(Json(time_spent()))))
    ranks.push_back(parse_json(text, "times of a rank").get<std::map<std::string, double>>());
  if (ranks.empty()) return {};
  std::map<std::string, double> total;
  size_t least = 0;
  for (size_t r = 0; r < ranks.size(); ++r) {
    for (const auto& [name, s] : ranks[r]) total[name] += s;
    if (compute_share(ranks[r]) < compute_share(ranks[least])) least = r;
  }
  std::vector<std::string> lines = {"time: " + time_shares_text(total)};
  if (ranks.size() > 1) lines.push_back(str("time of rank ", least, ", which computed least: ", time_shares_text(ranks[least])));
  return lines;
}

}  // namespace trireme
