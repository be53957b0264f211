#include "base/tensor.h"

#include "train/trainer.h"

#include <ATen/Parallel.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "base/counted.h"
#include "base/error_text.h"
#include "base/file.h"
#include "base/log.h"
#include "base/trace.h"
#include "comm/watchdog.h"
#include "eval/evaluate.h"
#include "parallel/tensor_parallel.h"
#include "train/agreement.h"
#include "train/export.h"
#include "train/memory.h"
#include "train/plan.h"
#include "train/progress.h"
#include "train/run_folder.h"
#include "train/signals.h"
#include "train/state.h"
#include "train/timeline.h"
#include "train/worker.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// A number of steps as configured: a count, or below 1 a fraction of the run.
int64_t steps_of(double value, int64_t total) {
  if (value <= 0) return 0;
  return value < 1 ? std::max<int64_t>(1, std::llround(value * static_cast<double>(total))) : std::llround(value);
}

constexpr double kSlowDisk = 10;  // times comm.timeout_s, for what is written

// A model is not trained beyond the positions that its config.json promises: nothing would say so afterwards.
void check_positions(const Dataset& data, const ModelConfig& model) {
  int64_t longest = 0;
  for (const Sample& sample : data.samples()) longest = std::max(longest, sample.end - sample.begin);
  if (longest > model.max_positions)
    throw ConfigError(str("the longest sample has ", longest, " tokens, but ", model.source, " has max_position_embeddings ", model.max_positions,
                          ": set data.max_length to at most that, or raise it in config.json if the model shall learn longer texts"));
}

class Run {
 public:
  Run(const Config& config, const CommandLine& line, const Process& process)
      : config_(config), only_asks_(line.verb == "plan"), process_(process), world_(Communicator::world()),
        mesh_(mesh_of(config, process.size())),
        comms_(mesh_, world_) {
    if (config_.run.dir.empty()) config_.run.dir = default_run_dir(line.config_file);
  }

  ExitStatus run(bool plan_only) {
    agree_on(world_, [&] { read_files(); });
    agree_on(world_, [&] { if (rank0()) check_run_folder(config_.run.dir, config_.run.resume == "never"); });
    if (!plan_only) open_folder();
    if (!plan_only && !names_checkpoint() && already_finished()) return kExitDone;  // whether its data are still there or not
    open_data();
    store_.emplace(config_.run.dir + "/checkpoints", world_, config_.checkpoint.keep);
    if (!plan_only) agree_on(world_, [&] { store_->prepare(); });
    find_checkpoint();
    agree_on(world_, [&] { make_shape(); });
    if (!plan_only && !origin_.is_object() && already_finished()) return kExitDone;
    agree_on(world_, [&] { say_plan(); });
    if (plan_only) return kExitDone;
    build();
    agree_on(world_, [&] { start_branch(); });
    worker_->weights_changed();
    worker_->check_ranks_equal();
    log_info(str("ready after ", duration_text(seconds_since(started_)), "; ", counted(process_.size(), "rank"), " of ",
                 counted(at::get_num_threads(), "thread")));
    if (config_.log.trace) open_run_trace(config_.run.dir, world_);
    start_time_spent();
    try {
      loop();
      if (!stopped_) finish();
      close_trace();
      for (const std::string& line : time_lines(world_)) log_info(line);
      if (stopped_) return kExitStopped;
    } catch (const AgreedError&) {  // every rank is here: what is being saved in the background is kept
      wait_for_save();
      throw;
    } catch (const std::exception& error) {  // of this rank alone, its peers wait: unwinding would first end a background save
      if (process_.size() == 1) throw;
      log_message(LogLevel::kError, text_of(error));
      const auto* known = dynamic_cast<const Error*>(&error);
      Process::abort(known ? known->status() : kExitFailure);
    }
    return kExitDone;
  }

 private:
  bool rank0() const { return process_.rank() == 0; }
  // What this rank holds of the model, and how each part is cut out of the whole.
  std::vector<ModelCut> cuts() const {
    std::vector<ModelCut> all;
    for (int chunk : stages_.shape.chunks_of(comms_.coords.pipeline))
      all.push_back([this, chunk](Transformer& whole) {
        keep_chunk(whole, stages_, chunk);
        apply_tensor_parallel(whole, comms_.tensor);
      });
    return all;
  }
  bool names_checkpoint() const { return config_.run.resume != "auto" && config_.run.resume != "never"; }

  void read_files() {
    source_ = find_model(config_);
    check_tensor_parallel(source_.config, mesh_.num_tensor());
    stages_ = stages_of(config_, source_.config);
    tools_.emplace(load_text_tools(config_, source_.tokenizer_folder, &source_.config));
    task_ = make_task(config_.task.kind);
    larger_is_better_ = task_->larger_is_better(config_.eval.metric);
    dtype_ = train_dtype(config_, source_);
    options_ = data_options(config_, *tools_, source_.config.vocab_size);
    options_.check();
    build_model(config_, source_, dtype_, true, true);
  }

  void open_folder() {
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

  // Rank 0 tokenises (or finds it cached) while the others wait in the agreement; then all read the same file.
  void open_data() {
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

  // run.resume=FOLDER is where the run began: started again by the same command it goes on from its own newest checkpoint.
  void find_checkpoint() {
    std::string weights;
    agree_on(world_, [&] { weights = rank0() ? hash_of_weights(config_, source_) : ""; });
    source_.identity["weights"]["hash"] = world_.broadcast_bytes(weights);
    if (config_.run.resume == "never") return;
    agree_on(world_, [&] { resumed_ = store_->newest(); });
    if (!names_checkpoint()) return;
    agree_on(world_, [&] {
      fs::path given = config_.run.resume;
      if (!given.has_filename()) given = given.parent_path();  // "step-4/"
      if (fs::is_directory(given / "checkpoints"))
        throw ConfigError(str("run.resume=", config_.run.resume, " is a run folder, not a checkpoint: name ", config_.run.resume,
                              "/checkpoints/step-N, or set run.dir=", config_.run.resume, " to go on with that run"));
      const bool exists = fs::exists(given / "manifest.hash");
      origin_ = {{"folder", fs::weakly_canonical(given).string()}, {"manifest", exists ? read_file(given / "manifest.hash", 1000) : ""}};
    });
    bool goes_on = false;
    agree_on(world_, [&] {
      if (!resumed_) return;
      Json began = TrainState::from_json(resumed_->state(), resumed_->folder()).origin;
      const char* what = origin_["manifest"] == "" ? "folder" : "manifest";  // gone by keep-last-k: then its name must do
      goes_on = began.is_object() && began.value(what, "") == origin_[what].get<std::string>();
    });
    if (goes_on) return void(origin_ = Json());
    std::optional<Checkpoint> own = std::move(resumed_);
    agree_on(world_, [&] { resumed_ = store_->open(config_.run.resume); });
    agree_on(world_, [&] {
      if (own && own->step() > resumed_->step() && !fs::equivalent(fs::path(origin_["folder"].get<std::string>()).parent_path(), store_->folder()))
        throw ConfigError(str("the run folder ", config_.run.dir, " holds another run, at step ", own->step(), ", and run.resume=",
                              config_.run.resume, " is not of it; set another run.dir"));
    });
  }

  // The rows of a step, the length of the run, and whether the checkpoint belongs to it.
  void make_shape() {
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
    state_.vectors = at::get_cpu_capability();
  }

  void check_schedule() const {
    try {
      schedule_of(config_, shape_.accumulation);
    } catch (const ConfigError& error) {
      if (shape_.accumulation == config_.train.accumulation) throw;
      throw ConfigError(str(error.what(), ". It is ", shape_.accumulation, " because a step of ", resumed_->folder(), " has ", state_.rows_per_step, " rows, which ",
                            shape_.data_size, " copies of the model share out: take fewer copies, or a smaller train.micro_batch_size with as much more of "
                            "train.accumulation"));
    }
  }

  // Values of two metrics, or on two data sets, cannot be compared.
  void measure_by(const std::string& metric, const std::string& data) {
    if (state_.metric != metric || state_.eval_data != data) {
      if (state_.best_step > 0)
        log_warn(str(state_.metric != metric ? str("eval.metric is ", metric, " now, it was ", state_.metric) : "the evaluation data are others now",
                     ": the best so far, of step ", state_.best_step, ", does not count any more"));
      state_.forget_best();
      state_.stopped_early = false;
    }
    state_.metric = metric, state_.eval_data = data;
  }

  // A run that goes on keeps the rows of its steps: on another number of ranks the accumulation makes up for it.
  void keep_rows() {
    const int64_t rows = state_.rows_per_step, pass = shape_.micro_batch_size * shape_.data_size;
    if (shape_.rows_per_step() == rows) return;
    std::string from = str("cannot go on from ", resumed_->folder(), ": its steps have ", rows, " rows");
    if (state_.micro_batch_size != config_.train.micro_batch_size || state_.accumulation != config_.train.accumulation)
      throw ConfigError(str(from, " (train.micro_batch_size ", state_.micro_batch_size, ", train.accumulation ", state_.accumulation,
                            " then; ", config_.train.micro_batch_size, ", ", config_.train.accumulation, " now: ",
                            shape_.rows_per_step(), " rows); set these back, or start a new run with another run.dir"));
    if (rows % pass != 0)
      throw ConfigError(str(from, ", which ", shape_.data_size, " copies of the model with train.micro_batch_size=", shape_.micro_batch_size,
                            " cannot share out evenly; take a number of copies (parallel.data) that divides ", rows / shape_.micro_batch_size));
    shape_.accumulation = rows / pass;
    log_info(str("going on with train.accumulation=", shape_.accumulation, ", so that a step keeps its ", rows, " rows"));
  }

  // Sums over ranks, threads and vectors depend in their last bits on how many these are. A run that goes on takes the threads
  // it had, unless somebody has set them, there are other ranks, or this host has fewer cores.
  void keep_threads() {
    if (state_.threads == 0) return;  // an older checkpoint
    const bool told = config_.train.threads > 0 || std::getenv("OMP_NUM_THREADS");
    if (!told && state_.ranks == process_.size() && static_cast<double>(state_.threads) <= process_.load().cores_of_rank + 1e-9)
      at::set_num_threads(static_cast<int>(state_.threads));
    std::string changes;
    auto compare = [&](const char* what, const auto& then, const auto& now) {
      if (then != now) changes += str(changes.empty() ? "" : "; ", what, " ", then, " then, ", now, " now");
    };
    compare("ranks", state_.ranks, static_cast<int64_t>(process_.size()));
    compare("threads of a rank", state_.threads, static_cast<int64_t>(at::get_num_threads()));
    compare("vector code", state_.vectors, at::get_cpu_capability());
    if (!changes.empty()) log_info(str("from here on the last bits differ from those of a run that was never stopped: ", changes));
  }

  // Asked before the data are read, where train.steps says the length, and again once the length is known.
  bool already_finished() {
    std::string text;
    const int64_t total = total_steps_ > 0 ? total_steps_ : config_.train.steps;
    agree_on(world_, [&] {
      auto finished = rank0() ? folder_->finished() : std::nullopt;
      if (!finished) return;
      std::string file = config_.run.dir + "/finished.json";
      auto step = json_get<int64_t>(*finished, "step", file);
      bool early = json_get<bool>(*finished, "stopped_early", file);
      const char* product = config_.lora.rank > 0 || !config_.lora.path.empty() ? "/adapter" : "/model";
      if (early || (total > 0 && total <= step))
        text = str(config_.run.dir, " is finished (step ", step, early ? ", stopped early" : "",
                   early ? "); set another run.dir to train again" : "); raise train.steps to go on, or set another run.dir",
                   fs::exists(config_.run.dir + product) ? ""
                       : str("; its ", product + 1, " is gone: trireme export ", config_.run.dir, "/config.ini --run.resume=", config_.run.dir,
                             "/checkpoints/step-N --run.dir=OUT writes it again"));
      else if (total_steps_ > 0 && !resumed_)
        throw ConfigError(str("the run folder ", config_.run.dir, " holds a finished run of ", step,
                              " steps without its checkpoints: it cannot go on; set another run.dir"));
    });
    text = world_.broadcast_bytes(text);
    if (!text.empty()) log_info(text);
    return !text.empty();
  }

  void say_plan() {
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
    const Plan plan = make_plan(config_, source_.config, dtype_, mesh_, planned);
    log_info(plan.text());
    if (rank0() && rows < shape_.rows_per_step())
      log_warn(str("a step takes ", shape_.rows_per_step(), " rows, but the training data has ", rows,
                   ": each is learnt more than once a step; lower train.accumulation or train.micro_batch_size"));
    if (resumed_) log_info(str("going on from ", resumed_->folder(), ", step ", state_.step, " of ", total_steps_));
    if (!only_asks_) return check_memory(plan, process_.local_size());
    log_info(fit_text(plan, config_, source_.config, dtype_, config_.plan.memory_gb > 0 ? static_cast<uint64_t>(config_.plan.memory_gb * 1e9)
                                                                                       : available_bytes() / static_cast<uint64_t>(process_.local_size())));
  }

  void build() {
    Chunks chunks;
    WeightFill fill;
    std::optional<Loader> loader;
    agree_on(world_, [&] {
      loader.emplace(train_data_, shape_, config_.data.shuffle, options_.seed);
      for (const ModelCut& cut : cuts()) {
        chunks.push_back(build_model(config_, source_, dtype_, true, false, cut, config_.parallel.zero == 3 ? &fill : nullptr));
        chunks.back()->share_tied_embedding(*chunks[0]);
      }
    });
    agree_on(world_, [&] {
      worker_ = std::make_unique<Worker>(config_, std::move(chunks), std::move(task_), std::move(*loader), *schedule_,
                                         shape_.accumulation, comms_, fill);
    });
    if (!resumed_) return;
    agree_on(world_, [&] {
      const auto tensors = worker_->tensors();
      resumed_->load(tensors, false, names_of_all(tensors, world_));
      worker_->set_num_steps(state_.step);
      worker_->loss_scale().value = state_.loss_scale;
      worker_->loss_scale().clean_steps = state_.clean_steps;
      worker_->loader().set_state(state_.position);
    });
  }

  // From here on the folder belongs to what comes after the checkpoint, and has what finish() needs.
  void start_branch() {
    if (resumed_ && state_.best_step > 0) {
      const fs::path from = origin_.is_object() ? origin_["folder"].get<std::string>() : resumed_->folder();
      std::string why = store_->adopt(str(from.parent_path().string(), "/", step_name(state_.best_step)));
      if (!why.empty() && state_.step < total_steps_ && !state_.stopped_early) {  // else finish() says it
        log_warn(str("the best model so far, of step ", state_.best_step, ", is lost and does not count any more: ", why));
        state_.forget_best();
      }
    }
    if (resumed_) store_->start_branch(state_.step, state_.best_step);
    if (rank0()) {
      folder_->clear_finished();
      folder_->write_config(config_to_ini(config_, true));
      metrics_ = std::make_unique<MetricsLog>(config_.run.dir + "/metrics.jsonl", state_.step,
                                              resumed_ ? resumed_->folder() + "/../../metrics.jsonl" : "");
    }
    resumed_.reset();
  }

  void loop() {
    Progress progress(rank0(), process_.size() == 1);
    const auto started = Clock::now();
    const double seconds_before = state_.seconds;
    const int64_t first = state_.step;
    while (state_.step < total_steps_ && !state_.stopped_early && !stopped_) {
      const auto step_start = Clock::now();
      const double epoch = worker_->loader().epoch();
      set_trace_step(state_.step + 1);
      StepResult result = worker_->run(state_.step + 1, stop_requested(), !store_->pending() || store_->finished());
      ++state_.step;
      state_.seconds = seconds_before + seconds_since(started);
      if (rank0()) report(result, epoch, seconds_since(step_start), progress, first, seconds_since(started));
      if (store_->pending() && result.save_ready) wait_for_save();

      const bool last = state_.step == total_steps_;
      const bool evaluates = eval_data_ && (last || (eval_every_ > 0 && state_.step % eval_every_ == 0));
      const bool best = evaluates && evaluate_now();
      const bool ends = last || state_.stopped_early;
      stopped_ = !ends && (result.stop || (config_.train.stop_after > 0 && state_.step - first >= config_.train.stop_after));
      if (ends || stopped_ || best || (save_every_ > 0 ? state_.step % save_every_ == 0 : evaluates)) save(ends || stopped_);
      flush_trace();
    }
    if (stopped_)
      log_info(str("stopped after step ", state_.step, " of ", total_steps_, "; saved. Run the same command again to go on"));
  }

  void report(const StepResult& r, double epoch, double seconds, Progress& progress, int64_t first, double elapsed) {
    uint64_t memory = peak_resident_bytes();
    Json line;
    line["step"] = state_.step;
    line["epoch"] = epoch;
    line["split"] = "train";
    line["loss"] = r.loss;
    line["tokens"] = r.learnt;
    line["tokens_per_second"] = static_cast<double>(r.tokens) / seconds;
    line["learning_rate"] = r.learning_rate;
    line["grad_norm"] = r.grad_norm;
    if (dtype_ == at::kHalf) line["loss_scale"] = r.loss_scale;
    line["seconds"] = seconds;
    line["memory_bytes"] = memory;
    line["bytes_reduced"] = r.bytes_reduced;
    metrics_->write(line);
    char text[256];
    double left = elapsed / static_cast<double>(state_.step - first) * static_cast<double>(total_steps_ - state_.step);
    std::snprintf(text, sizeof text, "step %lld/%lld  epoch %.2f  loss %.4f  lr %.2e  %.0f tokens/s  %s  left %s",
                  static_cast<long long>(state_.step), static_cast<long long>(total_steps_), epoch, r.loss, r.learning_rate,
                  static_cast<double>(r.tokens) / seconds, bytes_text(static_cast<double>(memory)).c_str(), duration_text(left).c_str());
    progress.show(text, state_.step, config_.log.every, state_.step == total_steps_ || state_.step == first + 1);
  }

  // Evaluates and decides: is it the best so far, is patience at its end?
  bool evaluate_now() {
    Span span(TimeKind::kEvaluation, "evaluate");
    const Phase phase = [&](const auto& part) { agree_on(world_, part); };
    auto of_stages = [&] {
      EvalLoader loader(eval_data_, config_.eval.micro_batch_size, comms_.coords.data, mesh_.num_data());
      std::vector<SequenceBatch> batches;
      for (int64_t i = 0; i < loader.num_batches(); ++i) batches.push_back(loader.batch(i));
      auto sums = worker_->evaluate_in_pipeline(batches);
      return comms_.coords.tensor == 0 ? sums : std::map<std::string, double>();
    };
    auto metrics = mesh_.num_pipeline() > 1 ? evaluate(worker_->task(), of_stages, world_, phase)
                                            : evaluate(*worker_->chunks()[0], worker_->task(), eval_data_, config_.eval.micro_batch_size, comms_.data, comms_.data, phase);
    double value = metrics.at(config_.eval.metric);
    bool better = !std::isnan(value) && (std::isnan(state_.best) || (larger_is_better_ ? value > state_.best : value < state_.best));
    if (better) {
      state_.best = value, state_.best_step = state_.step, state_.evaluations_without_better = 0;
    } else {
      ++state_.evaluations_without_better;  // also without patience: a resumed run may ask for it
      state_.stopped_early = config_.eval.patience > 0 && state_.evaluations_without_better >= config_.eval.patience;
    }
    if (rank0()) {
      Json line;
      line["step"] = state_.step;
      line["epoch"] = worker_->loader().epoch();
      line["split"] = "eval";
      std::string text;
      for (const auto& [name, v] : metrics) {
        line[name] = name == "tokens" ? Json(static_cast<int64_t>(v)) : Json(v);
        text += str("  ", name, " ", v);
      }
      metrics_->write(line);
      log_info(str("evaluation at step ", state_.step, ":", text, better ? "  (best so far)" : ""));
      if (state_.stopped_early)
        log_info(str("stopping early: no better ", config_.eval.metric, " in ", state_.evaluations_without_better, " evaluations; the best was ",
                     state_.best, " at step ", state_.best_step));
    }
    return better;
  }

  void save(bool now) {
    Span span(TimeKind::kCheckpoint, "save");
    CommTimeoutPause patient(true, kSlowDisk);
    agree_on(world_, [&] {
      if (metrics_) metrics_->sync();
    });
    state_.position = worker_->loader().state();
    state_.loss_scale = worker_->loss_scale().value;
    state_.clean_steps = worker_->loss_scale().clean_steps;
    agree_on(world_, [&] {
      if (now || !config_.checkpoint.async) store_->save(state_.step, worker_->tensors(), state_.to_json(), state_.best_step);
      else store_->start_save(state_.step, worker_->tensors(), state_.to_json(), state_.best_step);
    });
  }

  void wait_for_save() {
    Span span(TimeKind::kCheckpoint, "finish saving");
    CommTimeoutPause patient(true, kSlowDisk);
    agree_on(world_, [&] { store_->wait(); });
  }

  void finish() {
    Span span(TimeKind::kCheckpoint, "export");
    CommTimeoutPause patient(true, kSlowDisk);
    if (config_.eval.restore_best && eval_data_ && state_.best_step > 0 && state_.best_step != state_.step) {
      agree_on(world_, [&] {
        try {
          store_->open(str(store_->folder(), "/", step_name(state_.best_step))).load(worker_->weights(), true);
        } catch (const DataError& error) {
          throw DataError(str("the best model, of step ", state_.best_step, ", cannot be restored: ", error.what(),
                              " Set eval.restore_best=false to take the last one."));
        }
      });
      log_info(str("restored the best model, of step ", state_.best_step));
    }
    worker_->weights_changed();
    const bool adapter = config_.lora.rank > 0 || !config_.lora.path.empty();
    const std::string folder = config_.run.dir + (adapter ? "/adapter" : "/model");
    agree_on(world_, [&] { (adapter ? export_adapter : export_model)(folder, worker_->chunks(), config_, source_, world_, [&](const std::string& name) { worker_->hold_weight(name); }); });
    agree_on(world_, [&] {
      if (!rank0()) return;
      Json done;
      done["step"] = state_.step;
      done["stopped_early"] = state_.stopped_early;
      done["metric"] = state_.metric;
      done["best"] = std::isnan(state_.best) ? Json() : Json(state_.best);
      done["best_step"] = state_.best_step;
      folder_->set_finished(done);
      log_info(str("done: ", counted(state_.step, "step"), " in ", duration_text(state_.seconds), "; wrote ", folder));
    });
  }

  const Clock::time_point started_ = Clock::now();
  Config config_;
  const bool only_asks_;  // trireme plan
  const Process& process_;
  Communicator world_;
  Mesh mesh_;
  MeshComms comms_;
  ModelSource source_;
  std::optional<TextTools> tools_;
  std::unique_ptr<Task> task_;
  bool larger_is_better_ = false, stopped_ = false;
  at::ScalarType dtype_ = at::kFloat;
  DataOptions options_;
  std::unique_ptr<RunFolder> folder_;  // rank 0's
  std::shared_ptr<const Dataset> train_data_, eval_data_;
  BatchShape shape_;
  std::optional<Schedule> schedule_;
  Stages stages_;
  int64_t total_steps_ = 0, eval_every_ = 0, save_every_ = 0;
  TrainState state_;
  std::optional<CheckpointStore> store_;
  std::optional<Checkpoint> resumed_;
  Json origin_;  // of run.resume=FOLDER, where the run goes on from that
  std::unique_ptr<Worker> worker_;
  std::unique_ptr<MetricsLog> metrics_;  // rank 0's
};

}  // namespace

ExitStatus run_training(const Config& config, const CommandLine& line, const Process& process, bool plan_only) {
  if (!plan_only) install_stop_signals();  // again: MPI may have put its own in their place
  return Run(config, line, process).run(plan_only);
}

}  // namespace trireme
