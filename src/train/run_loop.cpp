#include "train/training_run.h"

#include "base/counted.h"
#include "base/log.h"
#include "base/trace.h"
#include "comm/watchdog.h"
#include "eval/evaluate.h"
#include "train/agreement.h"
#include "train/export.h"
#include "train/signals.h"

namespace trireme {
namespace {

constexpr double kSlowDisk = 10;  // times comm.timeout_s, for what is written

}  // namespace

void TrainingRun::loop() {
  Progress progress(rank0(), process_.size() == 1);
  loop_started_ = Clock::now(), first_step_ = state_.step;
  const double seconds_before = state_.seconds;
  std::optional<Unreported> before;
  const auto report_before = [&] {
    if (before) report(*before, progress);
    before.reset();
  };
  while (state_.step < total_steps_ && !state_.stopped_early && !stopped_) {
    Unreported now{{}, state_.step + 1, worker_->loader().epoch(), Clock::now()};
    set_trace_step(now.step);
    StepResult& result = now.result = worker_->run(now.step, stop_requested(), !store_->pending() || store_->finished());
    ++state_.step;
    state_.seconds = seconds_before + seconds_since(loop_started_);
    report_before();
    if (store_->pending() && result.save_ready) wait_for_save();

    const bool last = state_.step == total_steps_;
    const bool evaluates = eval_data_ && (last || (eval_every_ > 0 && state_.step % eval_every_ == 0));
    const bool stops = result.stop || (config_.train.stop_after > 0 && state_.step - first_step_ >= config_.train.stop_after);
    const bool saves = last || stops || (save_every_ > 0 ? state_.step % save_every_ == 0 : evaluates);
    const bool waits = !result.late || evaluates || saves;  // what is evaluated or saved is known to be finite
    before.emplace(std::move(now));
    if (waits) report_before();
    const bool best = evaluates && evaluate_now();
    const bool ends = last || state_.stopped_early;
    stopped_ = !ends && stops;
    if (saves || ends || best) save(ends || stopped_);
    flush_trace();
  }
  if (stopped_)
    log_info(str("stopped after step ", state_.step, " of ", total_steps_, "; saved. Run the same command again to go on"));
}

void TrainingRun::report(Unreported& of, Progress& progress) {
  worker_->complete(of.result);
  const auto start = std::max(of.start, std::exchange(reported_, Clock::now()));
  if (rank0()) report(of.result, of.step, of.epoch, std::chrono::duration<double>(reported_ - start).count(), progress, seconds_since(loop_started_));
}

void TrainingRun::report(const StepResult& r, int64_t step, double epoch, double seconds, Progress& progress, double elapsed) {
  const uint64_t memory = peak_bytes(device_);
  Json line;
  line["step"] = step;
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
  const double left = elapsed / static_cast<double>(step - first_step_) * static_cast<double>(total_steps_ - step);
  std::snprintf(text, sizeof text, "step %lld/%lld  epoch %.2f  loss %.4f  lr %.2e  %.0f tokens/s  %s  left %s",
                static_cast<long long>(step), static_cast<long long>(total_steps_), epoch, r.loss, r.learning_rate,
                static_cast<double>(r.tokens) / seconds, bytes_text(static_cast<double>(memory)).c_str(), duration_text(left).c_str());
  progress.show(text, step, config_.log.every, step == total_steps_ || step == first_step_ + 1);
}

bool TrainingRun::evaluate_now() {
  Span span(TimeKind::kEvaluation, "evaluate");
  const Phase phase = [&](const auto& part) { agree_on_memory(part); };
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

void TrainingRun::save(bool now) {
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

void TrainingRun::wait_for_save() {
  Span span(TimeKind::kCheckpoint, "finish saving");
  CommTimeoutPause patient(true, kSlowDisk);
  agree_on(world_, [&] { store_->wait(); });
}

void TrainingRun::finish() {
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

}  // namespace trireme
