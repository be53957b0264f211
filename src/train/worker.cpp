#include "base/tensor.h"

#include "train/worker.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/log.h"
#include "base/trace.h"
#include "checkpoint/safetensors.h"
#include "optim/clip.h"
#include "parallel/gather.h"
#include "train/agreement.h"

namespace trireme {

Worker::Worker(const Config& config, Chunks chunks, std::unique_ptr<Task> task, Loader loader, const Schedule& schedule,
               int64_t accumulation, const MeshComms& comms, const WeightFill& fill)
    : config_(config), chunks_(std::move(chunks)), task_(std::move(task)), loader_(std::move(loader)), schedule_(schedule),
      accumulation_(accumulation), comms_(comms), loss_scale_(LossScale::of(chunks_[0]->dtype() == at::kHalf)) {
  for (auto& chunk : chunks_) {
    chunk->set_training(true);
    chunk->set_recompute(parse_recompute(config.train.recompute), config.train.offload_activations);
    chunk->set_mlp_rows(config.train.mlp_tokens);
  }
  GradientReducerOptions options;
  options.bucket_bytes = static_cast<int64_t>(config.comm.bucket_mb * (1 << 20));
  options.overlap = config.comm.overlap;
  options.zero = static_cast<int>(config.parallel.zero);
  options.align = state_block(parse_optimizer_kind(config.optim.kind));
  options.every_backward = config.parallel.reduce == "micro_batch";
  if (config.parallel.shard_within > 0)
    options.num_replicas = comms_.data.size() / static_cast<int>(config.parallel.shard_within);
  const std::vector<Parameter> parameters = this->parameters();
  holders_ = find_holders(parameters, comms_);
  reducer_ = std::make_unique<GradientReducer>(parameters, holders_, options);
  if (options.zero > 0)
    weights_ = std::make_unique<ShardedWeights>(parameters, holders_, *reducer_, options.zero, options.bucket_bytes, fill, options.overlap);
  if (options.zero == 3)
    for (auto& chunk : chunks_) chunk->set_block_weights(weights_.get());
  std::vector<OptimTensor> tensors;
  for (const auto& part : reducer_->parts())
    tensors.push_back({part.name, flat_weight(part), part.gradient, part.weight.dim() >= 2 ? config.optim.weight_decay : 0.0,
                       places_of(part.weight.sizes(), part.shard, part.begin), part.shard.global_shape, part.is_first});
  const OptimizerOptions optimizer = optimizer_options(config, chunks_[0]->dtype());
  optimizer_ = std::make_unique<Optimizer>(std::move(tensors), optimizer, optimizer.kind == OptimizerKind::kAdafactor ? across_ranks() : AcrossRanks{});
}

AcrossRanks Worker::across_ranks() const {
  Json mine = Json::object();
  for (const auto& slice : reducer_->slices()) mine[slice.name] = slice.shard.global_shape;
  Json all = Json::object();
  for (const std::string& text : comms_.world.gather_bytes(mine.dump())) all.update(Json::parse(text));
  AcrossRanks ranks;
  ranks.tensors = Json::parse(comms_.world.broadcast_bytes(all.dump())).get<std::map<std::string, std::vector<int64_t>>>();
  ranks.sum = [world = comms_.world](const at::Tensor& x) { world.all_reduce(x); };
  ranks.device = device();
  return ranks;
}

at::Tensor Worker::flat_weight(const GradientPart& part) const {
  return weights_ ? weights_->part(part.bucket).narrow(0, part.offset, part.end - part.begin) : part.weight.detach().view({-1});
}

void Worker::check_ranks_equal() const {
  if (config_.parallel.zero < 3) check_parameters_equal(parameters(), holders_);
}

void Worker::weights_changed() {
  if (weights_) weights_->updated();
}

void Worker::hold_weight(const std::string& name) {
  if (weights_) weights_->hold(name);
}

void Worker::gather_weights() {
  if (!weights_) return;
  weights_->updated();
  weights_->acquire_all();
}

// This rank's part of the step: its gradients are on their way through the reducer.
Worker::Sums Worker::accumulate(std::vector<ModelInput>& inputs) {
  Sums sums;
  reducer_->begin_step();
  for (int64_t micro = 0; micro < accumulation_; ++micro) {
    inputs.push_back(load(micro, sums));
    TaskResult result = [&] {
      Span span(TimeKind::kCompute, "forward", {.micro_batch = static_cast<int>(micro)});
      return task_->run(*chunks_[0], inputs.back(), loss_scale_.value);
    }();
    Span span(TimeKind::kCompute, "backward", {.micro_batch = static_cast<int>(micro)});
    reducer_->before_backward(micro + 1 == accumulation_);
    WeightGradientQueue waiting;
    const WeightGradientQueue::Sink contribute = [&](const at::Tensor& weight, const at::Tensor& gradient) { reducer_->contribute(weight, gradient); };
    if (result.loss_sum.requires_grad()) {
      DelayWeightGradients delay(comms_.tensor.size() > 1 ? &waiting : nullptr, contribute);
      torch::autograd::backward({result.loss_sum}, {});
    }
    waiting.run(contribute);
    sums.add(result);
  }
  return sums;
}

ModelInput Worker::load(int64_t micro, Sums& sums) const {
  Span span(TimeKind::kData, "load batch", {.micro_batch = static_cast<int>(micro)});
  SequenceBatch batch = loader_.batch(micro);
  sums.tokens += batch.num_tokens();
  return input_of(std::move(batch));
}

ModelInput Worker::input_of(SequenceBatch batch) const {
  ModelInput input = to_model(std::move(batch), *chunks_[0]);
  input.dropout_seed = static_cast<uint64_t>(config_.run.seed);
  return input;
}

bool Worker::has_head() const {
  return std::any_of(chunks_.begin(), chunks_.end(), [](const auto& chunk) { return chunk->has_head(); });
}

std::vector<Parameter> Worker::parameters() const { return parameters_of(chunks_); }

// What each chunk makes of a micro-batch; `last` of the one with the head.
PipelineStep Worker::pipeline_step(const std::vector<ModelInput>& inputs,
                                   const std::function<at::Tensor(Transformer&, const ModelInput&)>& last) {
  PipelineStep step;
  for (const auto& chunk : chunks_)
    step.chunks.push_back({[&inputs, last, model = chunk.get()](int micro_batch, const at::Tensor& hidden) {
                             ModelInput input = inputs[static_cast<size_t>(micro_batch)];
                             input.hidden_TC = hidden;
                             return model->has_head() ? last(*model, input) : model->forward(input);
                           },
                           {}});
  const Transformer& model = *chunks_[0];
  step.hidden_shape = [&inputs, rows = model.seams().row_multiple, width = model.config().hidden_size](int micro_batch) {
    return std::vector<int64_t>{inputs[static_cast<size_t>(micro_batch)].tokens_T.size(0) / rows, width};
  };
  step.fill_waits = comms_.tensor.size() > 1;
  step.hidden_options = at::TensorOptions().dtype(model.dtype()).device(model.device());
  return step;
}

Worker::Sums Worker::accumulate_in_pipeline(std::vector<ModelInput>& inputs) {
  Sums sums;
  for (int64_t micro = 0; micro < accumulation_; ++micro) inputs.push_back(load(micro, sums));
  PipelineStep step = pipeline_step(inputs, [&](Transformer& model, const ModelInput& input) {
    TaskResult result = task_->run(model, input, loss_scale_.value);
    sums.add(result);
    return result.loss_sum;
  });
  for (PipelineChunk& chunk : step.chunks)
    chunk.contribute = [&](const at::Tensor& weight, const at::Tensor& gradient) { reducer_->contribute(weight, gradient); };
  reducer_->begin_step();
  reducer_->before_all_backwards();
  if (weights_) weights_->prefetch();
  run_pipeline(schedule_of(config_, accumulation_), comms_.pipeline, step);
  return sums;
}

std::map<std::string, double> Worker::evaluate_in_pipeline(const std::vector<SequenceBatch>& batches) {
  at::NoGradGuard no_grad;
  TensorSums sums;
  std::vector<ModelInput> inputs;
  for (const auto& batch : batches) inputs.push_back(input_of(batch));
  if (config_.parallel.zero == 3) {
    // Weights come from all copies to all at once: one with fewer batches computes on tokens that count nothing.
    const auto rounds = static_cast<size_t>(comms_.data.max(static_cast<double>(inputs.size())));
    while (inputs.size() < rounds) inputs.push_back(input_of(SequenceBatch::of_nothing()));
    weights_->prefetch();
  }
  for (auto& chunk : chunks_) chunk->set_training(false);
  auto run = [&](Transformer& model, const ModelInput& input) {
    add(sums, task_->run(model, input).sums);
    return at::Tensor();
  };
  if (!inputs.empty())
    run_pipeline(make_forward_schedule(parse_pipeline_kind(config_.parallel.schedule), comms_.pipeline.size(),
                                       static_cast<int>(config_.parallel.virtual_stages), static_cast<int>(inputs.size())),
                 comms_.pipeline, pipeline_step(inputs, run));
  for (auto& chunk : chunks_) chunk->set_training(true);
  return read(sums);
}

void Worker::Sums::add(const TaskResult& result) {
  const at::Tensor& more = result.sums.at("loss");
  loss = loss.defined() ? loss + more : more;
  learnt += result.count;
}

// Of what the host looks at in every step: loss scales, an optimizer of its own, gradients for a file.
bool Worker::reads_late(int64_t step) const {
  return !device().is_cpu() && chunks_[0]->dtype() != at::kHalf && !config_.optim.offload && (step > 1 || config_.train.gradients.empty());
}

// A step's loss and norm on their way to the host, and where its rows are, to compute it again and say where it went wrong.
struct LateNumbers {
  int64_t step;
  DataPosition rows;
  at::Tensor values;  // {loss, norm}, fp64, on the host
  c10::Event arrived;
};

void Worker::update_late(StepResult& out, const Sums& mine, int64_t step) {
  const auto options = at::TensorOptions().dtype(at::kDouble).device(device());
  const double learnt = static_cast<double>(out.learnt);
  const bool counts = comms_.coords.tensor == 0 && has_head() && mine.loss.defined();
  at::Tensor loss = counts ? mine.loss / learnt : at::zeros({}, options);
  comms_.world.all_reduce(loss);
  if (!norm_) norm_.emplace(device());
  reducer_->measure(*norm_, {config_.train.max_grad_norm, 1.0 / (learnt * loss_scale_.value), loss});
  out.learning_rate = schedule_(step);
  optimizer_->step(out.learning_rate, norm_->factor);
  at::Tensor values = at::empty({2}, at::TensorOptions().dtype(at::kDouble).pinned_memory(device().is_cuda()));
  values.copy_(at::stack({loss, norm_->norm.to(at::kDouble)}), /*non_blocking=*/true);
  c10::Event arrived(device().type());
  arrived.record(c10::impl::VirtualGuardImpl(device().type()).getStream(device()));
  out.late.reset(new LateNumbers{step, loader_.state(), std::move(values), std::move(arrived)});
}

void Worker::complete(StepResult& result) {
  if (!result.late) return;
  const std::shared_ptr<LateNumbers> late = std::move(result.late);
  late->arrived.synchronize();
  result.loss = late->values[0].item<double>();
  result.grad_norm = late->values[1].item<double>();
  if (std::isfinite(result.loss) && std::isfinite(result.grad_norm)) return;
  // A later step's gradients have taken the place of this one's, whose weights are still the same.
  loader_.set_state(late->rows);
  std::vector<ModelInput> inputs;
  comms_.pipeline.size() > 1 ? accumulate_in_pipeline(inputs) : accumulate(inputs);
  reducer_->finish([&](bool some) { return comms_.world.max(some ? 1.0 : 0.0) > 0; });
  report_nonfinite(late->step, inputs);
}

StepResult Worker::run(int64_t step, bool stop, bool save_ready) {
  Span span_of_step(TimeKind::kOther, "step");
  StepResult out;
  for (bool again = true; again;) {
    std::vector<ModelInput> inputs;
    const Sums mine = comms_.pipeline.size() > 1 ? accumulate_in_pipeline(inputs) : accumulate(inputs);
    // Small sums of the step: loss, learnt tokens, tokens, ranks that were asked to stop, ranks whose save is not ready, ranks
    // with gradients that came late.
    // The ranks that share a model have the same rows, and those with the head the same loss: one of them counts.
    const double counts = comms_.coords.tensor == 0 && has_head() ? 1.0 : 0.0;
    const bool late = reads_late(step);
    const double loss = late || !mine.loss.defined() ? 0.0 : mine.loss.item<double>();
    at::Tensor small = at::tensor({counts * loss, counts * static_cast<double>(mine.learnt), counts * static_cast<double>(mine.tokens),
                                   stop ? 1.0 : 0.0, save_ready ? 0.0 : 1.0, 0.0}, at::kDouble);
    double* sums = small.data_ptr<double>();
    {
      Span span(TimeKind::kWait, "finish gradients", {.group = "gradients"});
      reducer_->finish([&](bool late) {
        sums[5] = late;
        // Where stages are, they are at their ends at different times.
        Span wait(comms_.pipeline.size() > 1 ? TimeKind::kBubble : TimeKind::kWait, "wait for all ranks", {.group = "world"});
        comms_.world.all_reduce(small);
        return sums[5] > 0;
      });
    }
    out.learnt = static_cast<int64_t>(sums[1]);
    out.tokens = static_cast<int64_t>(sums[2]);
    out.stop = sums[3] > 0;
    out.save_ready = sums[4] == 0;
    if (out.learnt == 0) throw InternalError("a step without a learnt token");
    out.loss_scale = loss_scale_.value;
    if (late) {
      Span span(TimeKind::kOptimizer, "update");
      update_late(out, mine, step);
      break;
    }
    out.loss = sums[0] / sums[1];
    Span span(TimeKind::kOptimizer, "norm of gradients");
    reducer_->scale(1.0 / (sums[1] * loss_scale_.value));
    out.grad_norm = std::sqrt(reducer_->squared_norm());
    again = !std::isfinite(out.grad_norm) && std::isfinite(out.loss) && loss_scale_.lower();  // alike on every rank
    if (again) log_info(str("step ", step, ": a gradient overflowed float16; computing it again with loss scale ", loss_scale_.value));
    else if (!std::isfinite(out.loss) || !std::isfinite(out.grad_norm)) report_nonfinite(step, inputs);
  }
  loss_scale_.count_clean_step();
  out.bytes_reduced = comms_.world.size() > 1 ? reducer_->bytes_reduced() : 0;
  if (!out.late) update(out, step);
  weights_changed();
  loader_.advance();
  return out;
}

void Worker::update(StepResult& out, int64_t step) {
  if (step == 1 && !config_.train.gradients.empty()) write_gradients(config_.train.gradients);
  Span span(TimeKind::kOptimizer, "update");
  out.learning_rate = schedule_(step);
  optimizer_->step(out.learning_rate, clip_scale(out.grad_norm, config_.train.max_grad_norm));
}

Traffic Worker::exchanged() const {
  auto bytes = [](const Communicator& comm, const char* op) {  // "": all
    int64_t sum = 0;
    for (const auto& line : comm.size() > 1 ? comm.statistics().lines : std::vector<CommStatistics::Line>())
      if (*op == 0 || line.op == op) sum += line.num_bytes;
    return sum;
  };
  return {reducer_->bytes_exchanged(), weights_ ? weights_->bytes_gathered() : 0, bytes(comms_.tensor, ""), bytes(comms_.pipeline, "send"),
          bytes(comms_.world, "all_reduce")};
}

void Worker::report_nonfinite(int64_t step, const std::vector<ModelInput>& inputs) {
  gather_weights();
  std::string where;
  for (const auto& input : inputs)
    for (const auto& chunk : chunks_)
      if (std::string found = chunk->first_nonfinite(input); where.empty()) where = found;  // tensor ranks meet in each
  // What is wrong first: of the weights and of the first stage's outputs, as a forward finds them; else of the gradients, as a
  // backward does, from the last stage and the last parameter to the first.
  auto first_of = [&](bool backward) {
    std::vector<std::string> texts = comms_.world.gather_bytes(where);
    std::string first;
    for (int stage = 0; stage < comms_.pipeline.size(); ++stage)
      for (size_t r = 0; r < texts.size() && first.empty(); ++r)
        if (comms_.mesh.coords(static_cast<int>(r)).pipeline == (backward ? comms_.pipeline.size() - 1 - stage : stage)) first = texts[r];
    return comms_.world.broadcast_bytes(first);
  };
  std::string first = first_of(false);
  bool damaged = false;
  for (const auto& p : parameters()) damaged |= first.starts_with(p.name + ":");
  damaged = comms_.world.agree(damaged) != 0;
  if (first.empty()) {
    const auto gradients = reducer_->gathered();
    for (auto slice = gradients.rbegin(); where.empty() && slice != gradients.rend(); ++slice) {
      const int64_t bad = slice->gradient.numel() - at::isfinite(slice->gradient).sum().item<int64_t>();
      if (bad > 0) where = str("the gradient of ", slice->name, ": ", bad, " of ", slice->gradient.numel(), " values are not finite");
    }
    first = first_of(true);
  }
  throw AgreedError(kExitFailure,
                    str("step ", step, ": the loss or its gradient is not finite; it appeared first in ", first.empty() ? "the loss" : first,
                        ". Nothing was updated, and checkpoints are as they were. ",
                        damaged ? "These weights are damaged: take them from their source, or from an earlier checkpoint" : "Lower optim.lr",
                        damaged || config_.train.max_grad_norm > 0 ? "" : ", or set train.max_grad_norm",
                        damaged || chunks_[0]->dtype() != at::kHalf ? "" : ", or take a dtype of wider range (train.dtype=bfloat16 or float32)"));
}

void Worker::write_gradients(const std::string& path) const {
  std::vector<Parameter> gradients;
  for (const auto& slice : reducer_->gathered()) gradients.push_back({slice.name, slice.gradient, slice.shard});
  agree_on(comms_.world, [&] {
    std::vector<TensorSource> tensors = whole_tensors(gradients, comms_.world);
    for (auto& tensor : tensors) tensor.dtype = at::kFloat;
    write_safetensors(path, tensors, {}, comms_.world.rank() == 0);
  });
}

std::vector<NamedTensor> Worker::weights() const {
  std::vector<NamedTensor> out;
  for (const auto& part : reducer_->parts())
    for (auto& piece : rectangles("model/" + part.name, flat_weight(part), part.weight.sizes(), part.shard, part.begin, part.end))
      out.push_back(std::move(piece));
  return out;
}

std::vector<NamedBytes> Worker::held() const {
  std::vector<NamedBytes> out = bytes_of(parameters());
  uint64_t gradients = 0;
  for (const GradientPart& part : reducer_->parts()) gradients += part.gradient.nbytes();
  for (const auto& state : optimizer_->state()) out.emplace_back(str("optimizer/", state.kind, "/", reducer_->parts()[state.tensor].name), state.value.nbytes());
  out.emplace_back("all gradients", gradients);
  return out;
}

std::vector<NamedTensor> Worker::tensors() const {
  std::vector<NamedTensor> out = weights();
  for (const auto& state : optimizer_->state()) {
    const GradientPart& part = reducer_->parts()[state.tensor];
    if (state.is_whole) {
      out.push_back({str("optimizer/", state.kind, "/", part.name), state.value, ShardSpec::whole(state.value)});
      continue;
    }
    for (auto& piece : rectangles(str("optimizer/", state.kind, "/", part.name), state.value, part.weight.sizes(), part.shard,
                                  part.begin, part.end, state.block))
      out.push_back(std::move(piece));
  }
  return out;
}

}  // namespace trireme
