#include "train/training_run.h"

#include <ATen/Parallel.h>

#include "base/counted.h"
#include "base/error_text.h"
#include "base/log.h"
#include "base/trace.h"
#include "train/agreement.h"
#include "train/signals.h"
#include "train/timeline.h"

namespace trireme {

TrainingRun::TrainingRun(const Config& config, const CommandLine& line, const Process& process)
    : config_(config), only_asks_(line.verb == "plan"), process_(process), world_(Communicator::world()), mesh_(mesh_of(config, process.size())),
      comms_(mesh_, world_) {
  if (config_.run.dir.empty()) config_.run.dir = default_run_dir(line.config_file);
}

void TrainingRun::or_out_of_memory(const std::function<void()>& part) const {
  const auto held = [&] {
    std::vector<NamedBytes> all = worker_ ? worker_->held() : std::vector<NamedBytes>();
    all.emplace_back("activations (as planned)", planned_activations_);
    return all;
  };
  name_out_of_memory(device_, held,
                     "Lower train.micro_batch_size (and raise train.accumulation), data.max_length or lora.rank, set train.recompute=full, train.offload_activations=true, "
                     "optim.paged=true, optim.offload=true or train.dtype=bfloat16, or share the model out: parallel.zero, parallel.tensor, parallel.pipeline",
                     part);
}

void TrainingRun::agree_on_memory(const std::function<void()>& part) const {
  agree_on(world_, [&] { or_out_of_memory(part); });
}

ExitStatus TrainingRun::run(bool plan_only) {
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
    or_out_of_memory([&] { loop(); });
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

ExitStatus run_training(const Config& config, const CommandLine& line, const Process& process, bool plan_only) {
  if (!plan_only) install_stop_signals();  // again: MPI may have put its own in their place
  return TrainingRun(config, line, process).run(plan_only);
}

}  // namespace trireme
