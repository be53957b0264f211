#include "train/training_run.h"

#include <ATen/Parallel.h>

#include <cmath>

#include "base/log.h"
#include "comm/watchdog.h"
#include "parallel/tensor_parallel.h"
#include "train/agreement.h"
#include "train/memory.h"
#include "train/signals.h"

namespace trireme {
namespace {

// A number of steps as configured: a count, or below 1 a fraction of the run.
int64_t steps_of(double value, int64_t total) {
  if (value <= 0) return 0;
  return value < 1 ? std::max<int64_t>(1, std::llround(value * static_cast<double>(total))) : std::llround(value);
}

// A model is not trained beyond the positions that its config.json promises: nothing would say so afterwards.
void check_positions(const Dataset& data, const ModelConfig& model) {
  int64_t longest = 0;
  for (const Sample& sample : data.samples()) longest = std::max(longest, sample.end - sample.begin);
  if (longest > model.max_positions)
    throw ConfigError(str("the longest sample has ", longest, " tokens, but ", model.source, " has max_position_embeddings ", model.max_positions,
                          ": set data.max_length to at most that, or raise it in config.json if the model shall learn longer texts"));
}

}  // namespace

std::vector<ModelCut> TrainingRun::cuts() const {
  std::vector<ModelCut> all;
  for (int chunk : stages_.shape.chunks_of(comms_.coords.pipeline))
    all.push_back([this, chunk](Transformer& whole) {
      keep_chunk(whole, stages_, chunk);
      apply_tensor_parallel(whole, comms_.tensor);
    });
  return all;
}

void TrainingRun::read_files() {
  if (!only_asks_) device_ = choose_device(config_, world_);
  source_ = find_model(config_);
  check_tensor_parallel(source_.config, mesh_.num_tensor());
  stages_ = stages_of(config_, source_.config);
  tools_.emplace(load_text_tools(config_, source_.tokenizer_folder, &source_.config));
  task_ = make_task(config_.task.kind, {.label_smoothing = config_.train.label_smoothing, .z_loss = config_.train.z_loss});
  larger_is_better_ = task_->larger_is_better(config_.eval.metric);
  dtype_ = train_dtype(config_, source_);
  check_dtype(config_, dtype_, only_asks_ ? planned_device(config_) : device_.type());
  optimizer_options(config_, dtype_);  // refuses what cannot be
  options_ = data_options(config_, *tools_, source_.config.vocab_size);
  options_.check();
  build_model(config_, source_, dtype_, true, device_, true);
}

void TrainingRun::open_folder() {
  agree_on(world_, [&] {
    if (!rank0()) return;
    folder_ = std::make_unique<RunFolder>(config_.run.dir);
    set_log_file(config_.run.dir + "/log.txt");
  });
  agree_on(world_, [&] {
    if (!rank0()) set_log_file(config_.run.dir + "/log.txt");  // their warnings and errors
  });
  set_flight_folder(config_.run.dir + "/flight");
}

void TrainingRun::open_data() {
  std::string files[2];
  CommTimeoutPause pause(!rank0());
  agree_on(world_, [&] {
    if (!rank0()) return;
    Progress progress(true, process_.size() == 1);
    for (Split split : {Split::kTrain, Split::kEval})
      files[split == Split::kEval] = Dataset::prepare(
          options_, split, tools_->tokenizer, tools_->chat ? &*tools_->chat : nullptr, [&](uint64_t done, uint64_t total) {
            if (stop_requested()) throw Error(kExitStopped, "stopped while tokenising; run the same command again");
            if (total > (64 << 20)) progress.show(str("tokenising: ", done >> 20, " of ", total >> 20, " MB"), 1, 1, done == total);
          });
  });
  for (auto& file : files) file = world_.broadcast_bytes(file);
  agree_on(world_, [&] {
    train_data_ = Dataset::open(options_, Split::kTrain, files[0]);
    if (!files[1].empty()) eval_data_ = Dataset::open(options_, Split::kEval, files[1]);
    check_positions(*train_data_, source_.config);
    if (eval_data_) check_positions(*eval_data_, source_.config);
  });
  log_info(str("training data: ", train_data_->counts().text()));
  if (eval_data_) log_info(str("evaluation data: ", eval_data_->counts().text()));
}

void TrainingRun::make_shape() {
  shape_ = {config_.train.micro_batch_size, config_.train.accumulation, comms_.coords.data, mesh_.num_data()};
  Json data = {{"of", str(train_data_->counts().records, " records, ", train_data_->counts().tokens, " tokens of ", joined(config_.data.train, ", "))},
               {"hash", train_data_->fingerprint()}};
  Json identity = run_identity(config_, source_.identity, data);
  if (resumed_) {
    state_ = TrainState::from_json(resumed_->state(), resumed_->folder());
    if (state_.step != resumed_->step())
      throw DataError(str(resumed_->folder(), ": its manifest.json is of step ", resumed_->step(), ", the state in it of step ", state_.step));
    check_identity(state_.identity, identity, resumed_->folder());
    keep_rows();
    keep_threads();
    if (origin_.is_object()) state_.origin = origin_;
  }
  if (mesh_.num_pipeline() > 1)  // with the accumulation as it is now
    check_schedule();
  if (eval_data_) measure_by(config_.eval.metric, eval_data_->fingerprint());
  total_steps_ = config_.train.steps;
  if (total_steps_ == 0)
    total_steps_ = std::max<int64_t>(1, std::llround(std::ceil(config_.train.epochs * static_cast<double>(train_data_->num_rows()) /
                                                               static_cast<double>(shape_.rows_per_step()) - 1e-9)));
  if (total_steps_ < state_.total_steps)
    throw ConfigError(str("cannot go on from ", resumed_->folder(), ": its run has ", state_.total_steps, " steps, this one ",
                          total_steps_, "; train.steps and train.epochs may only grow"));
  if (!config_.train.gradients.empty() && state_.step > 0)
    throw ConfigError(str("train.gradients is set, but the run goes on from step ", state_.step,
                          "; the first step's gradients need another run.dir"));
  schedule_.emplace(parse_schedule_kind(config_.schedule.kind), config_.optim.lr, total_steps_, config_.schedule.warmup_steps,
                    config_.schedule.min_lr);
  eval_every_ = eval_data_ ? steps_of(config_.eval.every, total_steps_) : 0;
  save_every_ = steps_of(config_.checkpoint.every, total_steps_);
  state_.identity = std::move(identity);
  state_.micro_batch_size = config_.train.micro_batch_size;
  state_.accumulation = config_.train.accumulation;
  state_.rows_per_step = shape_.rows_per_step();
  state_.total_steps = total_steps_;
  state_.ranks = process_.size();
  state_.threads = at::get_num_threads();
  state_.vectors = vectors();
}

void TrainingRun::check_schedule() const {
  try {
    schedule_of(config_, shape_.accumulation);
  } catch (const ConfigError& error) {
    if (shape_.accumulation == config_.train.accumulation) throw;
    throw ConfigError(str(error.what(), ". It is ", shape_.accumulation, " because a step of ", resumed_->folder(), " has ", state_.rows_per_step, " rows, which ",
                          shape_.data_size, " copies of the model share out: take fewer copies, or a smaller train.micro_batch_size with as much more of "
                          "train.accumulation"));
  }
}

void TrainingRun::say_plan() {
  int64_t longest = 1, total = 0, rows = train_data_->num_rows();
  for (int64_t r = 0; r < rows; ++r) {
    longest = std::max(longest, train_data_->row_tokens(r));
    total += train_data_->row_tokens(r);
  }
  PlannedData planned{longest, static_cast<double>(total) / static_cast<double>(rows), rows, shape_.rows_per_step(), total_steps_, shape_.accumulation};
  for (int64_t r = 0; eval_data_ && r < eval_data_->num_rows(); ++r) {
    planned.longest_eval_row = std::max(planned.longest_eval_row, eval_data_->row_tokens(r));
    planned.eval_tokens += eval_data_->row_tokens(r);
  }
  planned.device = only_asks_ ? planned_device(config_) : device_.type();
  const Plan plan = make_plan(config_, source_.config, dtype_, mesh_, planned);
  planned_activations_ = plan.largest().activations;
  log_info(plan.text());
  if (planned.device != at::kCPU) say_kernel_gaps(kernel_gaps(config_, source_.config, dtype_, mesh_));
  if (rank0() && rows < shape_.rows_per_step())
    log_warn(str("a step takes ", shape_.rows_per_step(), " rows, but the training data has ", rows,
                 ": each is learnt more than once a step; lower train.accumulation or train.micro_batch_size"));
  if (resumed_) log_info(str("going on from ", resumed_->folder(), ", step ", state_.step, " of ", total_steps_));
  if (only_asks_) return log_info(fit_text(plan, config_, source_.config, dtype_, planned_room(config_, process_.local_size())));
  check_memory(plan, process_.local_size());
  if (plan.of_device()) check_device_memory(plan, free_bytes(device_));
}

void TrainingRun::build() {
  Chunks chunks;
  WeightFill fill;
  std::optional<Loader> loader;
  agree_on_memory([&] {
    loader.emplace(train_data_, shape_, config_.data.shuffle, options_.seed);
    for (const ModelCut& cut : cuts()) {
      chunks.push_back(build_model(config_, source_, dtype_, true, device_, false, cut, config_.parallel.zero == 3 ? &fill : nullptr));
      chunks.back()->share_tied_embedding(*chunks[0]);
    }
  });
  agree_on_memory([&] {
    worker_ = std::make_unique<Worker>(config_, std::move(chunks), std::move(task_), std::move(*loader), *schedule_,
                                       shape_.accumulation, comms_, fill);
  });
  if (!resumed_) return;
  agree_on_memory([&] {
    const auto tensors = worker_->tensors();
    resumed_->load(tensors, false, names_of_all(tensors, world_));
    worker_->set_num_steps(state_.step);
    worker_->loss_scale().value = state_.loss_scale;
    worker_->loss_scale().clean_steps = state_.clean_steps;
    worker_->loader().set_state(state_.position);
  });
}

}  // namespace trireme
