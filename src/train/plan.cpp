#include "train/plan.h"

#include <algorithm>

#include "base/check.h"
#include "base/counted.h"
#include "ops/ops.h"
#include "optim/adamw.h"
#include "parallel/pipeline_schedule.h"
#include "train/progress.h"

namespace trireme {

namespace {

// ZeRO: what of weights, gradients and optimizer state a copy of the model keeps.
void share_out(Plan& plan, const Config& config, const ModelConfig& m, uint64_t weight_size, int num_ranks) {
  const auto zero = config.parallel.zero;
  const int64_t all = num_ranks / (config.parallel.tensor * config.parallel.pipeline);
  const auto copies = static_cast<uint64_t>(std::max<int64_t>(1, config.parallel.shard_within > 0 ? config.parallel.shard_within : all));
  if (zero >= 1) plan.optimizer_bytes /= copies;
  const auto outside = static_cast<uint64_t>(m.vocab_size * m.hidden_size * (m.tie_embeddings ? 1 : 2) + m.hidden_size) * weight_size;
  const auto block = plan.weight_bytes > outside && m.num_layers > 0 ? (plan.weight_bytes - outside) / static_cast<uint64_t>(m.num_layers) : 0;
  if (zero >= 2) {  // a part, and three whole buckets: one that fills and two on their way
    const uint64_t whole = plan.gradient_bytes, limit = static_cast<uint64_t>(config.comm.bucket_mb * (1 << 20));
    const uint64_t bucket = std::max(std::min(limit, std::max<uint64_t>(64 << 10, whole / 8)),
                                     config.lora.rank > 0 || !config.lora.path.empty() ? 0 : outside / weight_size * 4);
    const bool adds_up = config.train.accumulation > 1 && config.parallel.reduce == "step";  // micro-batches add up in whole buckets
    plan.gradient_bytes = whole / copies + (adds_up ? whole : std::min(whole, 3 * bucket));
  }
  if (zero == 3) {  // a part, and whole: what is outside of the blocks, a block at work and the next
    plan.weight_bytes = plan.weight_bytes / copies + outside + std::min(plan.weight_bytes - std::min(plan.weight_bytes, outside), 2 * block);
  }
}

}  // namespace

Plan make_plan(const Config& config, const ModelConfig& m, at::ScalarType dtype, int64_t trainable, int64_t row_tokens,
               double mean_row_tokens, int64_t rows_per_epoch, int64_t rows_per_step, int64_t steps,
               int num_ranks, const HeldParameters& held) {
  Plan plan;
  uint64_t bytes = c10::elementSize(dtype), wide = std::max<uint64_t>(bytes, 4);
  plan.parameters = m.num_parameters();
  plan.trainable = trainable;
  bool adapters = config.lora.rank > 0 || !config.lora.path.empty();
  const bool cut = held.all > 0;
  const auto held_trained = static_cast<uint64_t>(cut ? held.trained : trainable);
  plan.weight_bytes = static_cast<uint64_t>(cut ? held.all : plan.parameters + (adapters ? trainable : 0)) * bytes;
  plan.gradient_bytes = held_trained * wide;
  plan.optimizer_bytes = held_trained * AdamW::state_bytes_per_element(dtype);
  share_out(plan, config, m, bytes, num_ranks);
  // Kept for backward, a token and layer: block input, two norms, q, k, v, attention output, gate, up and their product.
  auto tokens = static_cast<uint64_t>(config.train.micro_batch_size * row_tokens);
  auto c = static_cast<uint64_t>(m.hidden_size), f = static_cast<uint64_t>(m.intermediate_size);
  // Over tensor ranks each has its share, but two times a layer the rows of all of them, to multiply its part of a matrix with.
  const auto t = static_cast<uint64_t>(config.parallel.tensor);
  const uint64_t all_rows = t > 1 ? 2 * c : 0;
  auto heads = static_cast<uint64_t>((2 * m.num_heads + 2 * m.num_kv_heads) * m.head_dim);
  uint64_t layer = (5 * c + 2 * heads + 3 * f) / t + all_rows;
  // Beside them, a layer at work: more than one where what is kept leaves holes in the heap that are too small for it.
  auto layers = static_cast<uint64_t>(m.num_layers);
  if (config.parallel.pipeline > 1) {  // of the micro-batches that a stage has on their way, chunks of layers
    const PipelineSchedule schedule = make_pipeline_schedule(parse_pipeline_kind(config.parallel.schedule), static_cast<int>(config.parallel.pipeline),
                                                             static_cast<int>(config.parallel.virtual_stages), static_cast<int>(config.train.accumulation));
    const auto chunks = static_cast<uint64_t>(schedule.num_chunks());
    const std::vector<int> in_flight = simulate(schedule, {}).peak_in_flight;
    layers = (layers + chunks - 1) / chunks * static_cast<uint64_t>(*std::max_element(in_flight.begin(), in_flight.end()));
  }
  uint64_t kept = layer * layers + layer;
  if (config.train.recompute == "selective") kept = std::min(kept, ((2 * c + heads + 2 * f) / t + all_rows) * layers + 3 * layer);
  if (config.train.recompute == "full") kept = std::min(kept, c / t * layers + 3 * layer);
  // The loss: a chunk of logits (twice, where 16-bit products arrange it anew), and of a trained head the sum of its gradient,
  // beside it first a chunk's part and then the copy that backward passes on.
  auto vocabulary = static_cast<uint64_t>(m.vocab_size) / t;
  const auto chunk = static_cast<uint64_t>(cross_entropy_chunk_rows(m.vocab_size, dtype, !adapters));
  uint64_t loss = std::min(tokens, chunk) * vocabulary * wide + (adapters ? 0 : vocabulary * c * (wide + bytes));
  plan.activation_bytes = tokens * (kept + all_rows / 2) * bytes + loss;
  if (config.checkpoint.async)  // what is saved is shared out evenly among the ranks
    plan.checkpoint_bytes = static_cast<uint64_t>(trainable) * (bytes + AdamW::state_bytes_per_element(dtype)) / static_cast<uint64_t>(num_ranks);
  plan.base_bytes = 300ull << 20;
  plan.rows_per_step = rows_per_step;
  plan.rows_per_epoch = rows_per_epoch;
  plan.steps = steps;
  plan.tokens_per_step = static_cast<int64_t>(static_cast<double>(rows_per_step) * mean_row_tokens);
  return plan;
}

std::string Plan::text() const {
  auto b = [](uint64_t n) { return bytes_text(static_cast<double>(n)); };
  return str("plan: ", count_text(static_cast<double>(parameters)), " parameters, ", count_text(static_cast<double>(trainable)),
             " trained; ", counted(steps, "step"), " of ", counted(rows_per_step, "row"), " (about ", counted(tokens_per_step, "token"), "), ",
             counted(rows_per_epoch, "row"), " an epoch (",
             counted((rows_per_epoch + rows_per_step - 1) / std::max<int64_t>(rows_per_step, 1), "step"),
             ")\nplan: memory of a rank: weights ", b(weight_bytes), ", gradients ", b(gradient_bytes), ", optimizer ",
             b(optimizer_bytes), ", activations at most ", b(activation_bytes),
             checkpoint_bytes > 0 ? ", copy for a checkpoint " + b(checkpoint_bytes) : "", ", program ", b(base_bytes), ": ", b(total_bytes()));
}

void check_memory(const Plan& plan, int num_local_ranks, uint64_t free_bytes) {
  double needed = static_cast<double>(plan.total_bytes()) * num_local_ranks;
  auto there = static_cast<double>(free_bytes);
  if (needed <= there) return;
  throw ConfigError(str("the run needs about ", bytes_text(needed), " of memory (", counted(num_local_ranks, "rank"), " of ",
                        bytes_text(static_cast<double>(plan.total_bytes())), ", of which activations ",
                        bytes_text(static_cast<double>(plan.activation_bytes)), "), but this host has ", bytes_text(there),
                        " free: lower train.micro_batch_size or data.max_length, set train.recompute=full, "
                        "lora.rank or train.dtype=bfloat16, ",
                        plan.checkpoint_bytes > 0 ? "set checkpoint.async=false, " : "", "or start fewer ranks"));
}

}  // namespace trireme
