#include "train/training_run.h"

#include <ATen/Parallel.h>

#include <cstdlib>
#include <filesystem>
#include <numeric>

#include "base/file.h"
#include "base/log.h"
#include "train/agreement.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

}  // namespace

bool TrainingRun::already_finished() {
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

void TrainingRun::find_checkpoint() {
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

void TrainingRun::keep_rows() {
  const int64_t rows = state_.rows_per_step, pass = shape_.micro_batch_size * shape_.data_size;
  if (shape_.rows_per_step() == rows) return;
  std::string from = str("cannot go on from ", resumed_->folder(), ": its steps have ", rows, " rows");
  if (state_.micro_batch_size != config_.train.micro_batch_size || state_.accumulation != config_.train.accumulation)
    throw ConfigError(str(from, " (train.micro_batch_size ", state_.micro_batch_size, ", train.accumulation ", state_.accumulation,
                          " then; ", config_.train.micro_batch_size, ", ", config_.train.accumulation, " now: ",
                          shape_.rows_per_step(), " rows); set these back, or start a new run with another run.dir"));
  if (rows % pass != 0) {
    std::string ways;
    if (const int64_t rows_of_copy = rows / shape_.data_size; rows % shape_.data_size == 0) {
      const int64_t micro = std::gcd(rows_of_copy, shape_.micro_batch_size), accumulation = rows_of_copy / micro;
      ways = str("set train.micro_batch_size=", micro, accumulation == config_.train.accumulation ? "" : str(" and train.accumulation=", accumulation), ", or ");
    }
    throw ConfigError(str(from, ", which ", shape_.data_size, " copies of the model with train.micro_batch_size=", shape_.micro_batch_size,
                          " cannot share out evenly; ", ways, "take a number of copies (parallel.data) that divides ", rows / shape_.micro_batch_size));
  }
  shape_.accumulation = rows / pass;
  log_info(str("going on with train.accumulation=", shape_.accumulation, ", so that a step keeps its ", rows, " rows"));
}

void TrainingRun::keep_threads() {
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
  compare("vector code", state_.vectors, vectors());
  if (!changes.empty()) log_info(str("from here on the last bits differ from those of a run that was never stopped: ", changes));
}

void TrainingRun::measure_by(const std::string& metric, const std::string& data) {
  if (state_.metric != metric || state_.eval_data != data) {
    if (state_.best_step > 0)
      log_warn(str(state_.metric != metric ? str("eval.metric is ", metric, " now, it was ", state_.metric) : "the evaluation data are others now",
                   ": the best so far, of step ", state_.best_step, ", does not count any more"));
    state_.forget_best();
    state_.stopped_early = false;
  }
  state_.metric = metric, state_.eval_data = data;
}

void TrainingRun::start_branch() {
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

}  // namespace trireme
