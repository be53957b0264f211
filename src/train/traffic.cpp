#include "train/traffic.h"

#include <algorithm>
#include <numeric>

#include "base/counted.h"
#include "base/check.h"
#include "tasks/task.h"
#include "train/progress.h"

namespace trireme {
namespace {

bool trained(const at::Tensor& t) { return t.defined() && t.requires_grad(); }
bool trained(const Linear& l) { return trained(l.weight_OI) || trained(l.bias_O) || l.lora; }

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

// ZeRO 3: what is outside of the blocks once a step. A block before its forward and again before its backward, but the last
// one stays in between; and the first one from its first backward on where nothing asks for the gradient of its input.
void add_gathered_blocks(Traffic& t, const MeshModel& model, const Config& config, const RankModel& rank, int64_t micro_batches) {
  int64_t first = model.config().num_layers, last = -1;
  bool embedding_trained = false;
  for (const Parameter& p : rank.parameters) {
    if (const int64_t block = block_of(p.name); block >= 0) first = std::min(first, block), last = std::max(last, block);
    else embedding_trained |= p.name == "model.embed_tokens.weight" && p.value.requires_grad();
  }
  for (const bool of_trained : {true, false})
    for (const Bucket& bucket : model.buckets(rank, config, of_trained)) {
      if (MeshModel::shared_out(rank.group_sizes[bucket.group], config, model.mesh()).first == 1) continue;
      int64_t times = bucket.unit < 0 ? 1 : bucket.unit == last ? micro_batches : 2 * micro_batches;
      if (bucket.unit == first && !embedding_trained) times = first == last ? 1 : 2;
      t.weights += times * bucket.num_elements * static_cast<int64_t>(c10::elementSize(model.dtype()));
    }
}

// Tensor parallelism: of each gather of rows in forward the scatter in backward, and the reverse, each of the whole [T, C].
// Backward comes as far as something before it is trained.
int64_t row_exchanges(const Transformer& chunk, bool hidden_has_gradient, Recompute mode) {
  auto keeps = [](const Linear& l) { return trained(l.weight_OI) || l.lora; };  // and under selective recomputation gathers again
  int64_t times = 0;
  bool gradient = hidden_has_gradient;
  auto pass = [&](int64_t forwards) { times += forwards + (gradient ? 1 : 0); };
  if (chunk.has_embedding()) {
    for (const Parameter& p : chunk.parameters()) gradient |= p.name == "model.embed_tokens.weight" && p.value.requires_grad();
    pass(1);
  }
  const int64_t forwards = mode == Recompute::kFull ? 2 : 1;
  const bool again = mode == Recompute::kSelective;
  for (const Block& b : const_cast<Transformer&>(chunk).blocks()) {
    gradient |= trained(b.input_norm.weight_C);
    pass(forwards + (again && (keeps(b.q) || keeps(b.k) || keeps(b.v)) ? 1 : 0));  // all rows for q, k and v
    gradient |= trained(b.q) || trained(b.k) || trained(b.v) || trained(b.o) || trained(b.q_norm.weight_C) || trained(b.k_norm.weight_C);
    pass(forwards);  // behind o
    gradient |= trained(b.post_attention_norm.weight_C);
    pass(forwards + (again && (keeps(b.gate) || keeps(b.up)) ? 1 : 0));  // for gate and up
    gradient |= trained(b.gate) || trained(b.up) || trained(b.down);
    pass(forwards);  // behind down
  }
  if (chunk.has_head()) pass(1);
  return times;
}

}  // namespace

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
  const int64_t all_rows = std::accumulate(rows.begin(), rows.end(), int64_t{0});

  add_gradients(t, model, config, rank, config.parallel.reduce == "micro_batch" ? count : 1);
  if (config.parallel.zero == 3) add_gathered_blocks(t, model, config, rank, count);
  if (mesh.num_tensor() > 1)
    for (const auto& chunk : rank.chunks) {
      t.tensor += row_exchanges(*chunk, !chunk->has_embedding(), parse_recompute(config.train.recompute)) * all_rows * row_bytes;
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
