// One training run as one rank sees it: what its phases share. trainer.cpp has their order, run_setup.cpp what is there before the
// first step, run_resume.cpp what a run that goes on keeps, run_loop.cpp steps, evaluations, saving and the end.
#pragma once

#include "base/tensor.h"

#include <chrono>

#include "train/device.h"
#include "train/plan.h"
#include "train/progress.h"
#include "train/run_folder.h"
#include "train/state.h"
#include "train/text_tools.h"
#include "train/trainer.h"
#include "train/worker.h"

namespace trireme {

class TrainingRun {
 public:
  TrainingRun(const Config& config, const CommandLine& line, const Process& process);

  ExitStatus run(bool plan_only);

 private:
  using Clock = std::chrono::steady_clock;
  static double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

  std::string vectors() const { return device_.is_cpu() ? at::get_cpu_capability() : c10::DeviceTypeName(device_.type(), /*lower_case=*/true); }
  bool rank0() const { return process_.rank() == 0; }
  bool names_checkpoint() const { return config_.run.resume != "auto" && config_.run.resume != "never"; }

  // SystemError in the place of torch's where memory is out.
  void or_out_of_memory(const std::function<void()>& part) const;
  void agree_on_memory(const std::function<void()>& part) const;  // a phase with it

  // run_setup.cpp
  // What this rank holds of the model, and how each part is cut out of the whole.
  std::vector<ModelCut> cuts() const;
  void read_files();
  void open_folder();
  // Rank 0 tokenises (or finds it cached) while the others wait in the agreement; then all read the same file.
  void open_data();
  // The rows of a step, the length of the run, and whether the checkpoint belongs to it.
  void make_shape();
  void check_schedule() const;
  void say_plan();
  void build();

  // run_resume.cpp
  // Asked before the data are read, where train.steps says the length, and again once the length is known.
  bool already_finished();
  // run.resume=FOLDER is where the run began: started again by the same command it goes on from its own newest checkpoint.
  void find_checkpoint();
  // A run that goes on keeps the rows of its steps: on another number of ranks the accumulation makes up for it.
  void keep_rows();
  // Sums over ranks, threads and vectors depend in their last bits on how many these are. A run that goes on takes the threads
  // it had, unless somebody has set them, there are other ranks, or this host has fewer cores.
  void keep_threads();
  // Values of two metrics, or on two data sets, cannot be compared.
  void measure_by(const std::string& metric, const std::string& data);
  // From here on the folder belongs to what comes after the checkpoint, and has what finish() needs.
  void start_branch();

  // run_loop.cpp
  void loop();
  // A step whose numbers may still be on their way from the device: they are read when the next one is under way.
  struct Unreported {
    StepResult result;
    int64_t step;
    double epoch;
    Clock::time_point start;
  };
  void report(Unreported& of, Progress& progress);
  void report(const StepResult& r, int64_t step, double epoch, double seconds, Progress& progress, double elapsed);
  // Evaluates and decides: is it the best so far, is patience at its end?
  bool evaluate_now();
  void save(bool now);
  void wait_for_save();
  void finish();

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
  at::Device device_ = at::kCPU;
  at::ScalarType dtype_ = at::kFloat;
  DataOptions options_;
  std::unique_ptr<RunFolder> folder_;  // rank 0's
  std::shared_ptr<const Dataset> train_data_, eval_data_;
  BatchShape shape_;
  std::optional<Schedule> schedule_;
  Stages stages_;
  Clock::time_point loop_started_, reported_;  // the last step
  int64_t first_step_ = 0;  // done before loop()
  uint64_t planned_activations_ = 0;  // bytes
  int64_t total_steps_ = 0, eval_every_ = 0, save_every_ = 0;
  TrainState state_;
  std::optional<CheckpointStore> store_;
  std::optional<Checkpoint> resumed_;
  Json origin_;  // of run.resume=FOLDER, where the run goes on from that
  std::unique_ptr<Worker> worker_;
  std::unique_ptr<MetricsLog> metrics_;  // rank 0's
};

}  // namespace trireme
