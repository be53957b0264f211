#include "train/traffic.h"

#include <algorithm>
#include <map>

#include "base/counted.h"
#include "base/check.h"
#include "tasks/task.h"
#include "train/progress.h"

namespace trireme {
namespace {

// Sums over the ranks, and what they bring to each: of buckets over all that hold the same.
void add_gradients(Traffic& t, const MeshModel& model, const Config& config, const RankModel& rank, int64_t passes) {
  for (const Bucket& bucket : model.buckets(rank, config, true)) {
    const auto [size, replicas] = MeshModel::shared_out(rank.group_sizes[bucket.group], config, model.mesh());
    const auto wide = static_cast<int64_t>(c10::elementSize(gradient_type(model.dtype())));
    if (size > 1) t.gradients += passes * bucket.num_elements * wide;
    if (config.parallel.zero > 0 && replicas > 1) t.gradients += passes * bucket.num_elements / size * wide;  // a rank's part, over the replicas
    if ((config.parallel.zero == 1 || config.parallel.zero == 2) && size > 1)
      t.weights += bucket.num_elements * static_cast<int64_t>(c10::elementSize(model.dtype()));
  }
}

bool embedding_trained(const Transformer& chunk) {
  for (const Parameter& p : chunk.parameters())
    if (p.name == "model.embed_tokens.weight") return chunk.has_embedding() && p.value.requires_grad();
  return false;
}

bool any_trained(const Block& b) {
  return trained(b.q) || trained(b.k) || trained(b.v) || trained(b.o) || trained(b.gate) || trained(b.up) || trained(b.down) ||
         trained(b.input_norm.weight_C) || trained(b.post_attention_norm.weight_C) || trained(b.q_norm.weight_C) || trained(b.k_norm.weight_C);
}

// Tensor parallelism: of each gather of rows in forward the scatter in backward, and the reverse, each of the whole [T, C].
// Backward comes as far as something before it is trained.
// `pieced`: the MLP's rows go through it piece by piece.
int64_t row_exchanges(const Transformer& chunk, bool hidden_has_gradient, Recompute mode, bool pieced) {
  int64_t times = 0;
  bool gradient = hidden_has_gradient;
  auto pass = [&](int64_t forwards) { times += forwards + (gradient ? 1 : 0); };
  gradient |= embedding_trained(chunk);
  if (chunk.has_embedding()) pass(1);
  const int64_t forwards = mode == Recompute::kFull ? 2 : 1;
  const bool again = mode == Recompute::kSelective;  // gathers what was not kept
  for (const Block& b : const_cast<Transformer&>(chunk).blocks()) {
    gradient |= trained(b.input_norm.weight_C);
    pass(forwards + (again && (keeps_input(b.q) || keeps_input(b.k) || keeps_input(b.v)) ? 1 : 0));  // all rows for q, k and v
    gradient |= trained(b.q) || trained(b.k) || trained(b.v) || trained(b.o) || trained(b.q_norm.weight_C) || trained(b.k_norm.weight_C);
    pass(forwards);  // behind o
    gradient |= trained(b.post_attention_norm.weight_C);
    pass(forwards + (again && (pieced || keeps_input(b.gate) || keeps_input(b.up)) ? 1 : 0));  // for gate and up
    gradient |= trained(b.gate) || trained(b.up) || trained(b.down);
    pass(b.down.lora && b.down.lora->magnitude_O.defined() && !pieced ? forwards : 1);  // behind down: what is computed again for backward ends before
  }
  if (chunk.has_head()) pass(1);
  return times;
}

}  // namespace

Gathers gathered_blocks(const MeshModel& model, const Config& config, const MeshCoords& coords, int64_t num_batches) {
  const RankModel& rank = model.at(coords.pipeline, coords.tensor);
  struct Unit {
    int64_t bytes = 0, exchanged = 0, uses = 0;
    bool there = false;
  };
  std::map<int64_t, Unit> units;  // by block; -1: outside of them
  for (const bool of_trained : {true, false})
    for (const Bucket& bucket : model.buckets(rank, config, of_trained)) {
      const int64_t bytes = bucket.num_elements * static_cast<int64_t>(bucket.options.dtype().itemsize());
      units[bucket.unit].bytes += bytes;
      if (MeshModel::shared_out(rank.group_sizes[bucket.group], config, model.mesh()).first > 1) units[bucket.unit].exchanged += bytes;
    }
  const int64_t last = units.rbegin()->first, first = units.upper_bound(-1) == units.end() ? 0 : units.upper_bound(-1)->first;
  Gathers out;
  int64_t live = 0;
  auto start = [&](int64_t block) {
    Unit& unit = units[block];
    if (std::exchange(unit.there, true)) return;
    out.bytes_exchanged += unit.exchanged;
    out.peak_bytes = std::max(out.peak_bytes, live += unit.bytes);
  };
  auto acquire = [&](int64_t block, bool backward) {
    start(block);
    ++units[block].uses;
    const int64_t next = block < 0 ? first : backward ? block - 1 : block + 1;
    if (config.comm.overlap && next >= first && next <= last) start(next);
  };
  auto release = [&](int64_t block, bool backward) {
    Unit& unit = units[block];
    if (--unit.uses > 0 || (!backward && block == last)) return;
    live -= unit.bytes;
    unit.there = false;
  };
  const bool pipeline = model.mesh().num_pipeline() > 1;
  std::vector<Action> actions;
  if (pipeline) actions = schedule_of(config, num_batches).actions[static_cast<size_t>(coords.pipeline)];
  for (int i = 0; !pipeline && i < num_batches; ++i) actions.insert(actions.end(), {{ActionKind::kForward, i, 0}, {ActionKind::kBackward, i, 0}});
  const std::vector<int> numbers = stages_of(config, model.config()).shape.chunks_of(coords.pipeline);
  for (const Action& a : actions) {
    Transformer& chunk = *rank.chunks[static_cast<size_t>(std::find(numbers.begin(), numbers.end(), a.chunk) - numbers.begin())];
    const std::vector<Block>& blocks = chunk.blocks();
    if (a.kind == ActionKind::kForward) {
      acquire(-1, false);
      for (const Block& b : blocks) acquire(b.index, false), release(b.index, false);
    } else if (a.kind != ActionKind::kBackwardWeight) {
      std::vector<bool> asked = {!chunk.has_embedding() || embedding_trained(chunk)};  // for the gradient of each block's input, and of the output
      for (const Block& b : blocks) asked.push_back(asked.back() || any_trained(b));
      for (size_t i = blocks.size() + 1; i-- > 0;) {
        if (!asked[i]) continue;
        if (i < blocks.size()) release(blocks[i].index, true);
        if (i > 0) acquire(blocks[i - 1].index, true);
      }
    }
  }
  return out;
}

std::string Traffic::text() const {
  std::string out;
  for (const auto& [name, bytes] : {std::pair("gradients ", gradients), {"weights ", weights}, {"tensor ", tensor}, {"pipeline ", pipeline}, {"other ", other}})
    if (bytes > 0) out += str(out.empty() ? "" : ", ", name, bytes < 10'000 ? counted(bytes, "byte") : bytes_text(static_cast<double>(bytes)));
  return out.empty() ? "nothing" : out;
}

Traffic step_traffic(const MeshModel& model, const Config& config, const MeshCoords& coords, const std::vector<MicroBatch>& batches) {
  Traffic t;
  const Mesh& mesh = model.mesh();
  if (mesh.num_ranks() == 1) return t;
  const RankModel& rank = model.at(coords.pipeline, coords.tensor);
  const auto count = static_cast<int64_t>(batches.size());
  const auto wide = static_cast<int64_t>(c10::elementSize(model.dtype()));
  const int64_t row_bytes = model.config().hidden_size * wide;
  std::vector<int64_t> rows;  // of each micro-batch, filled up
  for (const MicroBatch& batch : batches) {
    const int64_t multiple = row_multiple(at::kCPU, model.dtype(), mesh.num_tensor());
    rows.push_back((batch.tokens + multiple - 1) / multiple * multiple);
  }

  add_gradients(t, model, config, rank, config.parallel.reduce == "micro_batch" ? count : 1);
  if (config.parallel.zero == 3) t.weights = gathered_blocks(model, config, coords, count).bytes_exchanged;
  if (mesh.num_tensor() > 1)
    for (const auto& chunk : rank.chunks) {
      for (const int64_t count : rows)
        t.tensor += row_exchanges(*chunk, !chunk->has_embedding(), parse_recompute(config.train.recompute), config.train.mlp_tokens > 0 && config.train.mlp_tokens < count) * count * row_bytes;
      if (!chunk->has_head()) continue;
      const int64_t of_a_row = std::max<int64_t>(wide, 4) + 8 + 2 * 8;  // maximum, its place, sum and the target's logit
      for (const MicroBatch& batch : batches) t.tensor += batch.learnt * of_a_row;
    }
  if (mesh.num_pipeline() > 1) {
    Action waiting{};
    const PipelineSchedule schedule = schedule_of(config, count);
    for (const Action& a : schedule.actions[static_cast<size_t>(coords.pipeline)])
      if (schedule.consumer(a, &waiting)) t.pipeline += rows[static_cast<size_t>(a.micro_batch)] / mesh.num_tensor() * row_bytes;
  }
  t.other = 6 * 8;  // Worker::run
  const bool everywhere = rank.group_sizes.size() == 1 && rank.group_sizes[0] == mesh.num_ranks();
  if (config.parallel.zero > 0 || !everywhere) t.other += 8 + 3 * 8;  // GradientReducer::squared_norm
  return t;
}

}  // namespace trireme
