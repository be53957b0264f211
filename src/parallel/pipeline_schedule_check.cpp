// What a schedule promises, found by playing it.
#include <algorithm>

#include "base/check.h"
#include "parallel/pipeline_schedule.h"

namespace trireme {
namespace {

// Forward, then input gradient, then weight gradient (or both at once), once each on every chunk.
std::string check_order(const PipelineSchedule& s) {
  enum State { kNothing, kForwarded, kInputDone, kDone };
  std::vector<int> states(static_cast<size_t>(s.num_chunks() * s.micro_batches), kNothing);
  auto wanted = [](ActionKind kind) {
    return kind == ActionKind::kForward ? kNothing : kind == ActionKind::kBackwardWeight ? kInputDone : kForwarded;
  };
  if (static_cast<int>(s.actions.size()) != s.stages)
    return str("actions of ", s.actions.size(), " stages instead of ", s.stages);
  for (int stage = 0; stage < s.stages; ++stage)
    for (const Action& a : s.actions[static_cast<size_t>(stage)]) {
      if (a.chunk < 0 || a.chunk >= s.num_chunks() || a.micro_batch < 0 || a.micro_batch >= s.micro_batches ||
          s.stage_of(a.chunk) != stage)
        return str(action_text(a), " does not belong to stage ", stage);
      int& state = states[static_cast<size_t>(a.chunk * s.micro_batches + a.micro_batch)];
      if (state != wanted(a.kind)) return str(action_text(a), " comes twice or in the wrong order on stage ", stage);
      state = a.kind == ActionKind::kForward ? kForwarded : a.kind == ActionKind::kBackwardInput ? kInputDone : kDone;
    }
  for (size_t i = 0; i < states.size(); ++i)
    if (states[i] != (s.trains ? kDone : kForwarded))
      return str("micro-batch ", static_cast<int>(i) % s.micro_batches, " is not finished on chunk ",
                 static_cast<int>(i) / s.micro_batches);
  return "";
}

// Plays sends that block until the receiver has posted its receive.
std::string check_progress(const PipelineSchedule& s) {
  struct Channel {                   // what comes to a chunk in one direction
    std::vector<int> micro_batches;  // in the order of the receives
    size_t num_consumed = 0;
    bool delivered = false;  // the one that is posted
  };
  struct Stage {
    size_t action = 0;
    bool acted = false;  // has done the action and sends its result
  };
  std::vector<Stage> stages(static_cast<size_t>(s.stages));
  std::vector<Channel> channels(static_cast<size_t>(2 * s.num_chunks()));
  auto channel = [&](const Action& a) -> Channel& {
    return channels[static_cast<size_t>(2 * a.chunk + (a.kind == ActionKind::kForward ? 0 : 1))];
  };
  for (const auto& actions : s.actions)
    for (const Action& a : actions)
      if (s.source(a) >= 0) channel(a).micro_batches.push_back(a.micro_batch);

  auto moves = [&](size_t i) {
    Stage& stage = stages[i];
    if (stage.action == s.actions[i].size()) return false;
    const Action& a = s.actions[i][stage.action];
    if (!stage.acted) {
      if (s.source(a) >= 0) {
        Channel& c = channel(a);
        if (!c.delivered) return false;
        c.delivered = false;
        ++c.num_consumed;
      }
      stage.acted = true;
      return true;
    }
    if (Action waiting; s.consumer(a, &waiting)) {
      Channel& c = channel(waiting);
      if (c.delivered || c.micro_batches.at(c.num_consumed) != a.micro_batch) return false;
      c.delivered = true;
    }
    stage.acted = false;
    ++stage.action;
    return true;
  };
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i = 0; i < stages.size(); ++i)
      while (moves(i)) moved = true;
  }
  for (size_t i = 0; i < stages.size(); ++i)
    if (stages[i].action < s.actions[i].size())
      return str("stage ", i, " waits for ever ", stages[i].acted ? "to send after " : "for the input of ",
                 action_text(s.actions[i][stages[i].action]));
  return "";
}

}  // namespace

std::string check_schedule(const PipelineSchedule& schedule) {
  const std::string wrong = check_order(schedule);
  return wrong.empty() ? check_progress(schedule) : wrong;
}

double Simulation::bubble() const {
  double sum = 0;
  for (double b : busy) sum += b;
  return seconds > 0 ? 1 - sum / (seconds * static_cast<double>(busy.size())) : 0;
}

Simulation simulate(const PipelineSchedule& s, const ActionCosts& costs) {
  const size_t stages = s.actions.size();
  Simulation out{0, std::vector<double>(stages), std::vector<double>(stages), std::vector<double>(stages),
                 std::vector<int>(stages)};
  std::vector<size_t> next(stages);
  std::vector<int> in_flight(stages);
  // When the output (0) or the gradient (1) of a chunk's micro-batch was ready; negative: not yet.
  std::vector<double> ready[2];
  for (auto& r : ready) r.assign(static_cast<size_t>(s.num_chunks() * s.micro_batches), -1);
  auto at = [&](int chunk, int micro_batch) { return static_cast<size_t>(chunk * s.micro_batches + micro_batch); };
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i = 0; i < stages; ++i)
      while (next[i] < s.actions[i].size()) {
        const Action& a = s.actions[i][next[i]];
        const bool forward = a.kind == ActionKind::kForward, weight = a.kind == ActionKind::kBackwardWeight;
        const int from = a.chunk + (forward ? -1 : 1);
        double begin = out.end[i];
        if (!weight && from >= 0 && from < s.num_chunks()) {
          const double input = ready[forward ? 0 : 1][at(from, a.micro_batch)];
          if (input < 0) break;
          begin = std::max(begin, input + (s.source(a) >= 0 ? costs.transfer : 0));
        }
        const double seconds = forward                                ? costs.forward
                               : weight                               ? costs.backward_weight
                               : a.kind == ActionKind::kBackwardInput ? costs.backward_input
                                                                      : costs.backward_input + costs.backward_weight;
        if (next[i] == 0) out.begin[i] = begin;
        out.end[i] = begin + seconds;
        out.busy[i] += seconds;
        if (!weight) ready[forward ? 0 : 1][at(a.chunk, a.micro_batch)] = out.end[i];
        in_flight[i] += forward ? 1 : a.kind == ActionKind::kBackwardInput ? 0 : -1;
        out.peak_in_flight[i] = std::max(out.peak_in_flight[i], in_flight[i]);
        ++next[i];
        moved = true;
      }
  }
  for (size_t i = 0; i < stages; ++i) {
    TRIREME_CHECK(next[i] == s.actions[i].size(), "stage ", i, " never does ", action_text(s.actions[i][next[i]]));
    out.seconds = std::max(out.seconds, out.end[i]);
  }
  return out;
}

}  // namespace trireme
