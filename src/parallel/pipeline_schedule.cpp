#include "parallel/pipeline_schedule.h"

#include <algorithm>
#include <array>

#include "base/check.h"

namespace trireme {
namespace {

constexpr std::array kNames = {"gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"};

// The k-th forward (or backward) of a stage: groups of p micro-batches go through all its chunks before the next group.
Action nth(const PipelineSchedule& s, int stage, int k, ActionKind kind) {
  const int p = s.stages, v = s.virtual_stages, round = k / p % v;
  const int local = kind == ActionKind::kForward ? round : v - 1 - round;
  return {kind, v == 1 ? k : k / (p * v) * p + k % p, stage + local * p};
}

// `warm_up` forwards, then forward and backward in turn, then the backwards that are left. Where backward is split, the
// weight gradient comes `delay` backwards late.
std::vector<Action> in_turn(const PipelineSchedule& s, int stage, int warm_up, bool split, int delay) {
  const int total = s.micro_batches * s.virtual_stages;
  std::vector<Action> out;
  for (int k = 0; k < std::min(warm_up, total); ++k) out.push_back(nth(s, stage, k, ActionKind::kForward));
  for (int k = 0; k < total; ++k) {
    if (k + warm_up < total) out.push_back(nth(s, stage, k + warm_up, ActionKind::kForward));
    out.push_back(nth(s, stage, k, split ? ActionKind::kBackwardInput : ActionKind::kBackward));
    if (split && k >= delay) out.push_back(nth(s, stage, k - delay, ActionKind::kBackwardWeight));
  }
  for (int k = std::max(0, total - delay); split && k < total; ++k)
    out.push_back(nth(s, stage, k, ActionKind::kBackwardWeight));
  return out;
}

// Chunk `down` goes from the first stage to the last, chunk `up` back. In the steady state every stage repeats F B W of
// the one and F B W of the other; weight gradients are kept only for the end, where a stage would wait.
std::vector<Action> v_shape(const PipelineSchedule& s, int stage) {
  const int p = s.stages, down = stage, up = 2 * p - 1 - stage;
  const int m = std::max(s.micro_batches, 2 * p - 1);  // a shorter step is a longer one with actions left out
  std::vector<Action> out;
  int done[3][2] = {};  // forwards, input gradients, weight gradients of down and up
  auto act = [&](ActionKind kind, int chunk) {
    const int row = kind == ActionKind::kForward ? 0 : kind == ActionKind::kBackwardInput ? 1 : 2;
    const int micro_batch = done[row][chunk == up]++;
    if (micro_batch < s.micro_batches) out.push_back({kind, micro_batch, chunk});
  };
  auto forward = [&](int chunk) { act(ActionKind::kForward, chunk); };
  auto input = [&](int chunk) { act(ActionKind::kBackwardInput, chunk); };
  auto weight = [&](int chunk) { act(ActionKind::kBackwardWeight, chunk); };

  for (int i = 0; i < 2 * (p - stage) - 1; ++i) forward(down);  // until the first micro-batch has come back up
  for (int i = 0; i < stage; ++i) forward(up), forward(down);
  for (int i = 0; i < p - stage; ++i) forward(up), input(up), weight(up);  // until its gradient has
  while (done[0][1] < m) {
    if (done[0][0] < m) forward(down);
    input(down), weight(down);
    forward(up), input(up), weight(up);
  }
  for (int i = 0; i < stage; ++i) input(down), input(up);
  for (int i = 0; i < p - stage; ++i) input(down), weight(down);
  while (done[2][1] < m) weight(up);
  while (done[2][0] < m) weight(down);
  return out;
}

}  // namespace

PipelineKind parse_pipeline_kind(const std::string& name) {
  for (size_t i = 0; i < kNames.size(); ++i)
    if (name == kNames[i]) return static_cast<PipelineKind>(i);
  throw ConfigError("parallel.schedule=" + name + ": must be gpipe, 1f1b, interleaved, zb-h1 or zb-v");
}

const char* pipeline_kind_name(PipelineKind kind) { return kNames.at(static_cast<size_t>(kind)); }

const char* action_name(ActionKind kind) {
  static constexpr std::array names = {"forward", "backward", "backward_input", "backward_weight"};
  return names.at(static_cast<size_t>(kind));
}

std::string action_text(const Action& a) {
  return str(action_name(a.kind), " of micro-batch ", a.micro_batch, " on chunk ", a.chunk);
}

int PipelineSchedule::stage_of(int chunk) const {
  return kind == PipelineKind::kZbV && chunk >= stages ? num_chunks() - 1 - chunk : chunk % stages;
}

std::vector<int> PipelineSchedule::chunks_of(int stage) const {
  std::vector<int> out;
  for (int c = 0; c < num_chunks(); ++c)
    if (stage_of(c) == stage) out.push_back(c);
  return out;
}

int PipelineSchedule::source(const Action& a) const {
  if (a.kind == ActionKind::kBackwardWeight) return -1;
  const int from = a.chunk + (a.kind == ActionKind::kForward ? -1 : 1);
  return from < 0 || from == num_chunks() || stage_of(from) == stage_of(a.chunk) ? -1 : stage_of(from);
}

bool PipelineSchedule::consumer(const Action& a, Action* waiting) const {
  *waiting = a;
  waiting->chunk += a.kind == ActionKind::kForward ? 1 : -1;
  return a.kind != ActionKind::kBackwardWeight && waiting->chunk >= 0 && waiting->chunk < num_chunks() &&
         stage_of(waiting->chunk) != stage_of(a.chunk);
}

PipelineSchedule make_pipeline_schedule(PipelineKind kind, int stages, int virtual_stages, int micro_batches) {
  TRIREME_CHECK(stages >= 1 && virtual_stages >= 0 && micro_batches >= 1, stages, " ", virtual_stages, " ",
                micro_batches);
  const bool v_shaped = kind == PipelineKind::kZbV, interleaved = kind == PipelineKind::kInterleaved;
  if (virtual_stages == 0) virtual_stages = v_shaped || interleaved ? 2 : 1;
  if (v_shaped && virtual_stages != 2)
    throw ConfigError(str("parallel.virtual_stages=", virtual_stages,
                          " with parallel.schedule=zb-v: a V has exactly 2 chunks a rank; leave the key out or set 2"));
  if (!v_shaped && !interleaved && virtual_stages != 1)
    throw ConfigError(
        str("parallel.virtual_stages=", virtual_stages, " with parallel.schedule=", pipeline_kind_name(kind),
            ": this schedule has 1 chunk a rank; set parallel.schedule=interleaved, or leave the key out"));
  if (interleaved && virtual_stages > 1 && micro_batches % stages != 0)
    throw ConfigError(str("train.accumulation=", micro_batches, " with parallel.schedule=interleaved on ", stages,
                          " pipeline ranks: micro-batches go round in groups of ", stages, "; set train.accumulation=",
                          (micro_batches + stages - 1) / stages * stages, ", or another parallel.schedule"));
  PipelineSchedule s{kind, stages, virtual_stages, micro_batches, true, {}};
  for (int stage = 0; stage < stages; ++stage) {
    const int behind = stages - 1 - stage;
    if (v_shaped)
      s.actions.push_back(v_shape(s, stage));
    else if (kind == PipelineKind::kGpipe)
      s.actions.push_back(in_turn(s, stage, micro_batches, false, 0));
    else if (interleaved && virtual_stages > 1)
      s.actions.push_back(in_turn(s, stage, 2 * behind + (virtual_stages - 1) * stages, false, 0));
    else  // one delayed weight gradient for each forward that this stage has started less than the first one
      s.actions.push_back(in_turn(s, stage, behind, kind == PipelineKind::kZbH1, stage));
  }
  return s;
}

PipelineSchedule make_forward_schedule(PipelineKind kind, int stages, int virtual_stages, int micro_batches) {
  const int rounded = (micro_batches + stages - 1) / stages * stages;  // as interleaved needs
  PipelineSchedule s = make_pipeline_schedule(kind, stages, virtual_stages, rounded);
  s.micro_batches = micro_batches;
  s.trains = false;
  for (auto& actions : s.actions)
    std::erase_if(actions,
                  [&](const Action& a) { return a.kind != ActionKind::kForward || a.micro_batch >= micro_batches; });
  return s;
}

std::vector<LayerRange> split_layers(int64_t num_layers, int64_t num_chunks, double embedding_cost, double head_cost) {
  TRIREME_CHECK(num_chunks >= 1 && embedding_cost >= 0 && head_cost >= 0, num_chunks);
  if (num_layers < num_chunks)
    throw ConfigError(str("parallel.pipeline x parallel.virtual_stages = ", num_chunks,
                          " chunks, but the model has only ", num_layers, " layers: at most ", num_layers,
                          " chunks, of one layer or more, fit; lower parallel.pipeline (interleaved and zb-v have 2 chunks a rank, unless told otherwise)"));
  std::vector<int64_t> sizes(static_cast<size_t>(num_chunks), 1);
  std::vector<double> costs(sizes.size(), 1.0);
  costs.front() += embedding_cost;
  costs.back() += head_cost;
  for (int64_t left = num_layers - num_chunks; left > 0; --left) {  // to the cheapest; of equals the one behind, which
    const auto cheapest = std::min_element(costs.rbegin(), costs.rend());  // keeps fewer activations
    *cheapest += 1;
    ++sizes[static_cast<size_t>(costs.rend() - cheapest - 1)];
  }
  std::vector<LayerRange> out;
  for (int64_t begin = 0; int64_t size : sizes) {
    out.push_back({begin, begin + size});
    begin += size;
  }
  return out;
}

}  // namespace trireme
