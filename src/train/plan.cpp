#include "train/plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "base/counted.h"
#include "data/loader.h"
#include "ops/attention_device.h"
#include "ops/device.h"
#include "optim/optimizer.h"
#include "train/progress.h"

namespace trireme {
namespace {

std::string b(uint64_t n) { return bytes_text(static_cast<double>(n)); }

std::string parts_text(const Plan& plan, const Footprint& f) {
  return str("weights ", b(f.weights), ", gradients ", b(f.gradients), ", optimizer ", b(f.optimizer),
             plan.offload ? " in host memory" : plan.away_bytes(f) > 0 ? str(" of which ", b(plan.away_bytes(f)), " may be in host memory") : "", ", activations at most ", b(f.activations), f.in_evaluation ? " (of an evaluation)" : "",
             ", buffers ", b(f.buffers));
}

}  // namespace

const Footprint& Plan::largest() const {
  return std::max_element(stages.begin(), stages.end(), [](const Stage& x, const Stage& y) { return x.memory.total() < y.memory.total(); })->memory;
}

uint64_t Plan::away_bytes(const Footprint& memory) const {
  return !of_device() ? 0 : offload ? memory.optimizer : paged ? memory.optimizer - memory.pages : 0;
}

uint64_t Plan::needed_bytes() const {
  if (!of_device()) return host_bytes();
  uint64_t most = 0;
  for (const Stage& stage : stages) most = std::max(most, stage.memory.total() - away_bytes(stage.memory));
  return most + kernels::kMatMulWorkspace;
}

uint64_t Plan::host_bytes() const {
  uint64_t most = 0;
  for (const Stage& stage : stages) most = std::max(most, of_device() ? away_bytes(stage.memory) + stage.memory.away + stage.memory.embedding : stage.memory.total());
  return most + checkpoint_bytes + base_bytes;
}

Plan make_plan(const Config& config, const ModelConfig& model, at::ScalarType dtype, const Mesh& mesh, const PlannedData& data) {
  const MeshModel cut(config, model, dtype, mesh);
  Plan plan;
  plan.parameters = model.num_parameters();
  plan.trainable = cut.num_trained();
  plan.mesh = mesh, plan.data = data, plan.offload = config.optim.offload, plan.paged = config.optim.paged;
  const int64_t most = config.train.micro_batch_size * data.longest_row;
  const auto mean = static_cast<int64_t>(std::llround(static_cast<double>(config.train.micro_batch_size) * data.mean_row));
  const std::vector<MicroBatch> batches(static_cast<size_t>(data.accumulation), {mean, mean});
  EvalBatches evaluation;
  if (data.longest_eval_row > 0) {
    const int64_t known = data.eval_tokens > 0 ? data.eval_tokens : std::numeric_limits<int64_t>::max(), share = known / mesh.num_data();
    evaluation.tokens = config.eval.micro_batch_size > 0 ? std::min(known, config.eval.micro_batch_size * data.longest_eval_row)
                                                         : std::max(data.longest_eval_row, std::min(share, kEvalTokens));  // as EvalLoader
    evaluation.tokens_of_copy = data.eval_tokens / mesh.num_data();
  }
  for (int stage = 0; stage < mesh.num_pipeline(); ++stage) {
    const MeshCoords coords{stage, 0, mesh.num_tensor() - 1};  // uneven parts: the last has the most
    plan.stages.push_back({step_footprint(cut, config, coords, {most, most}, data.accumulation, evaluation, data.device), step_traffic(cut, config, coords, batches)});
  }
  if (!plan.of_device()) plan.base_bytes += 3 * plan.largest().block;  // resident memory was up to three blocks above the tensors (tests/run_memory_test.py)
  if (config.checkpoint.async)  // what is saved is shared out evenly among the ranks
    plan.checkpoint_bytes = (static_cast<uint64_t>(plan.trainable) * c10::elementSize(dtype) + cut.state_bytes(optimizer_options(config, dtype))) /
                            static_cast<uint64_t>(mesh.num_ranks());
  if (mesh.num_pipeline() > 1) {
    const PipelineSchedule schedule = schedule_of(config, data.accumulation);
    plan.schedule = pipeline_kind_name(schedule.kind);
    plan.bubble = simulate(schedule, {}).bubble();
  }
  return plan;
}

std::string Plan::text() const {
  std::string out = str("plan: ", count_text(static_cast<double>(parameters)), " parameters, ", count_text(static_cast<double>(trainable)), " trained; ",
                        data.steps > 0 ? counted(data.steps, "step") : "steps", " of ", counted(data.rows_per_step, "row"), " (about ",
                        counted(static_cast<int64_t>(static_cast<double>(data.rows_per_step) * data.mean_row), "token"), ")");
  if (data.rows_per_epoch > 0)
    out += str(", ", counted(data.rows_per_epoch, "row"), " an epoch (",
               counted((data.rows_per_epoch + data.rows_per_step - 1) / std::max<int64_t>(data.rows_per_step, 1), "step"), ")");
  const std::string copy = checkpoint_bytes > 0 ? "copy for a checkpoint " + b(checkpoint_bytes) + ", " : "", rest = str(copy, "program ", b(base_bytes), ": ", b(host_bytes()));
  uint64_t embedding = 0;  // of the stage that has it
  for (const Stage& stage : stages) embedding = std::max(embedding, stage.memory.embedding);
  if (of_device())
    out += str("\nplan: memory of a rank's device: ", parts_text(*this, largest()), ", workspace of products ", b(kernels::kMatMulWorkspace), ": ", b(needed_bytes()),
               "; in host memory: ", largest().away > 0 ? "activations " + b(largest().away) + ", " : "", embedding > 0 ? "embedding " + b(embedding) + ", " : "", rest);
  else
    out += str("\nplan: memory of a rank: ", parts_text(*this, largest()), ", ", rest);
  if (mesh.num_ranks() == 1) return out;
  for (size_t s = 0; s < stages.size() && stages.size() > 1; ++s)
    out += str("\nplan: stage ", s, " of the pipeline: ", parts_text(*this, stages[s].memory), ": ", b(stages[s].memory.total()));
  out += str("\nplan: ", mesh.text());
  for (size_t s = 0; s < stages.size(); ++s)
    if (s == 0 || stages[s].traffic != stages[s - 1].traffic)
      out += str("; ", stages.size() > 1 ? str("stage ", s, ": ") : "", "a rank exchanges in a step ", stages[s].traffic.text());
  if (!schedule.empty())
    out += str("\nplan: the pipeline idles ", std::round(bubble * 1000) / 10, " % of the time (", schedule, ", ", counted(mesh.num_pipeline(), "stage"), ", ",
               data.accumulation, data.accumulation == 1 ? " micro-batch" : " micro-batches", "), where all stages cost the same");
  return out;
}

void check_memory(const Plan& plan, int num_local_ranks, uint64_t free_bytes) {
  double needed = static_cast<double>(plan.host_bytes()) * num_local_ranks;
  if (!plan.of_device() && num_local_ranks == plan.mesh.num_ranks())  // every stage is here, and not all are as large as the largest
    for (const auto& stage : plan.stages)
      needed -= static_cast<double>(plan.largest().total() - stage.memory.total()) * num_local_ranks / static_cast<double>(plan.stages.size());
  auto there = static_cast<double>(free_bytes);
  if (needed <= there) return;
  if (plan.of_device())
    throw ConfigError(str("the run needs about ", bytes_text(needed), " of host memory (", counted(num_local_ranks, "rank"), " of ", b(plan.host_bytes()), "), but this host has ",
                          bytes_text(there), " free: ", plan.checkpoint_bytes > 0 ? "set checkpoint.async=false, " : "", plan.offload ? "optim.offload=false, " : plan.paged ? "optim.paged=false, " : "",
                          plan.largest().away > 0 ? "train.offload_activations=false, " : "", "or start fewer ranks"));
  throw ConfigError(str("the run needs about ", bytes_text(needed), " of memory (", counted(num_local_ranks, "rank"), plan.stages.size() > 1 ? " of at most " : " of ",
                        b(plan.host_bytes()), ", of which activations ",
                        bytes_text(static_cast<double>(plan.largest().activations)), "), but this host has ", bytes_text(there),
                        " free: lower ", plan.largest().in_evaluation ? "eval" : "train", ".micro_batch_size or data.max_length, set train.recompute=full, "
                        "lora.rank or train.dtype=bfloat16, ",
                        plan.checkpoint_bytes > 0 ? "set checkpoint.async=false, " : "", "or start fewer ranks"));
}

void check_device_memory(const Plan& plan, uint64_t free_bytes) {
  if (plan.needed_bytes() <= free_bytes) return;
  throw ConfigError(str("a rank needs about ", b(plan.needed_bytes()), " of its device's memory (", parts_text(plan, plan.largest()), "), which has ", b(free_bytes),
                        " free: lower ", plan.largest().in_evaluation ? "eval" : "train", ".micro_batch_size or data.max_length, set train.recompute=full",
                        plan.largest().away > 0 ? "" : " (with train.offload_activations=true)", ", lora.rank, ", plan.offload ? "" : plan.paged ? "optim.offload=true in place of optim.paged=true, " : "optim.paged=true, optim.offload=true, ",
                        "train.dtype=bfloat16 or parallel.zero, or take more devices"));
}

std::string fit_text(const Plan& plan, const Config& config, const ModelConfig& model, at::ScalarType dtype, std::optional<uint64_t> room_bytes) {
  const std::string needs = str("plan: a rank needs ", b(plan.needed_bytes()), plan.of_device() ? " of its device" : "");
  if (plan.of_device() && !has_attention_kernels(dtype, model.head_dim)) return needs + " and whole matrices of attention's scores, which are not in this plan: whether it fits is not known";
  if (!room_bytes) return needs + "; there is none here: set plan.memory_gb to a device's memory to see whether it fits";
  const uint64_t bytes = *room_bytes;
  const std::string room = str(needs, " and has ", b(bytes), ": ");
  if (plan.needed_bytes() <= bytes) return room + "it fits";
  // Each change alone, then together with those before it.
  struct Change {
    const char* text;
    std::function<bool(Config&)> make;  // false: it is so already
  };
  auto set = [](auto& value, auto wanted) { return std::exchange(value, wanted) != wanted; };
  const bool copies = plan.mesh.num_data() > 1;
  const bool adapts = config.lora.rank > 0 || !config.lora.path.empty();
  const std::vector<Change> changes = {
      {"quant.base=nf4", [&](Config& c) { return adapts && model.stored.empty() && c.quant.base == "none" && dtype != at::kDouble && set(c.quant.base, "nf4"); }},
      {"train.recompute=selective", [&](Config& c) { return c.train.recompute == "none" && set(c.train.recompute, "selective"); }},
      {"parallel.zero=1", [&](Config& c) { return copies && c.parallel.zero < 1 && set(c.parallel.zero, 1); }},
      {"parallel.zero=2", [&](Config& c) { return copies && c.parallel.zero < 2 && set(c.parallel.zero, 2); }},
      {"parallel.zero=3", [&](Config& c) { return copies && c.parallel.zero < 3 && set(c.parallel.zero, 3); }},
      {"model.embedding=host", [&](Config& c) { return plan.of_device() && adapts && !model.tie_embeddings && set(c.model.embedding, "host"); }},
      {"optim.kind=adamw8bit", [&](Config& c) { return c.optim.kind == "adamw" && dtype != at::kDouble && set(c.optim.kind, "adamw8bit"); }},
      {"optim.masters=false", [&](Config& c) { return dtype == at::kBFloat16 && set(c.optim.masters, false); }},
      {"optim.paged=true", [&](Config& c) { return plan.of_device() && !c.optim.offload && set(c.optim.paged, true); }},
      {"optim.offload=true", [&](Config& c) { return plan.of_device() && !c.optim.paged && c.optim.kind != "adafactor" && set(c.optim.offload, true); }},
      {"train.recompute=full", [&](Config& c) { return set(c.train.recompute, "full"); }},
      {"train.mlp_tokens=1024", [&](Config& c) { return c.train.mlp_tokens == 0 && set(c.train.mlp_tokens, 1024); }},
      {"train.offload_activations=true", [&](Config& c) { return plan.of_device() && c.train.recompute == "full" && set(c.train.offload_activations, true); }},
      {"eval.micro_batch_size=1", [&](Config& c) { return plan.largest().in_evaluation && set(c.eval.micro_batch_size, 1); }},
      {"train.micro_batch_size=1", [&](Config& c) { return set(c.train.micro_batch_size, 1); }}};
  std::vector<std::string> fitting;
  auto try_it = [&](const Config& changed, const std::string& text) {
    Plan other;
    try {
      other = make_plan(changed, model, dtype, plan.mesh, plan.data);
    } catch (const ConfigError&) {  // this mesh cannot have it so
      return false;
    }
    if (other.needed_bytes() <= bytes) fitting.push_back(str(text, " (", b(other.needed_bytes()), ")"));
    return other.needed_bytes() <= bytes;
  };
  for (const Change& change : changes)
    if (Config alone = config; change.make(alone)) try_it(alone, change.text);
  if (fitting.empty()) {
    Config together = config;
    std::vector<std::string> names;
    for (const Change& change : changes) {
      if (!change.make(together)) continue;
      std::erase_if(names, [&](const std::string& name) { return name.starts_with(std::string(change.text).substr(0, std::string(change.text).find('='))); });
      names.push_back(change.text);
      if (try_it(together, joined(names, " "))) break;
    }
  }
  return room + "it does not fit; " + (fitting.empty() ? "no recomputation, ZeRO stage or smaller micro-batch is enough: use more ranks along "
                                                         "parallel.tensor or parallel.pipeline, a shorter data.max_length, or lora.rank"
                                                       : "it would with " + joined(fitting, ", or with "));
}

std::string longest_row_text(const Plan& plan, const Config& config, const ModelConfig& model, at::ScalarType dtype, uint64_t room_bytes) {
  constexpr int64_t kStep = 64;
  const auto fits = [&](int64_t row) {
    PlannedData data = plan.data;
    data.longest_row = row, data.mean_row = static_cast<double>(row);
    if (data.longest_eval_row > 0) data.longest_eval_row = row;
    return make_plan(config, model, dtype, plan.mesh, data).needed_bytes() <= room_bytes;
  };
  int64_t below = 0, above = model.max_positions / kStep + 1;  // rows of `below` steps fit, of `above` do not or are too long
  while (above - below > 1) (fits((below + above) / 2 * kStep) ? below : above) = (below + above) / 2;
  if (below == 0) return str("plan: not even rows of ", kStep, " tokens fit into ", b(room_bytes));
  return str("plan: rows of up to ", below * kStep, " tokens fit into ", b(room_bytes), (below + 1) * kStep > model.max_positions ? ", the model's max_position_embeddings" : "", " (data.max_length, with train.micro_batch_size=",
             config.train.micro_batch_size, ")");
}

}  // namespace trireme
