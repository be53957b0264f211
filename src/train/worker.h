// The step of one rank: forward, backward, reduction, clipping, update.
#pragma once

#include "checkpoint/checkpoint.h"
#include "comm/mesh.h"
#include "data/loader.h"
#include "optim/optimizer.h"
#include "optim/clip.h"
#include "optim/loss_scale.h"
#include "optim/schedule.h"
#include "parallel/pipeline_runner.h"
#include "parallel/sharded_weights.h"
#include "tasks/task.h"
#include "train/build.h"
#include "train/device.h"
#include "train/traffic.h"

namespace trireme {

struct LateNumbers;

struct StepResult {
  double loss = 0;        // mean over the learnt tokens of the whole step, before the update
  int64_t learnt = 0;     // of all ranks
  int64_t tokens = 0;     // of all ranks
  int64_t bytes_reduced = 0;  // gradients this rank gave to the all-reduce
  double grad_norm = 0;   // before clipping
  double learning_rate = 0;
  double loss_scale = 1;
  bool stop = false;      // a rank was asked to stop
  bool save_ready = false;  // every rank's background save has written its part
  std::shared_ptr<LateNumbers> late;  // loss and grad_norm are on their way from the device; null: they are here
};

class Worker {
 public:
  // `chunks`: the parts of the model that this rank holds, by layers; one where there is no pipeline. `fill`: of a model whose
  // leaves have no values yet, with ZeRO-3. Collective.
  Worker(const Config& config, Chunks chunks, std::unique_ptr<Task> task, Loader loader, const Schedule& schedule,
         int64_t accumulation, const MeshComms& comms, const WeightFill& fill = {});

  // Step `step` (from 1). `stop` and `save_ready` travel with the step's one small all-reduce. SystemError (on every
  // rank) where the loss or its gradient is not finite (float16: at the smallest loss scale): it names the first layer where that appeared; nothing was updated.
  // On a device the host does not wait: loss and norm come by complete(), which throws that error then, and until then no later
  // step updates anything either.
  StepResult run(int64_t step, bool stop, bool save_ready);
  void complete(StepResult& result);

  // Everything a checkpoint holds: trained weights and optimizer state, under global names.
  std::vector<NamedTensor> tensors() const;
  // Of what stays on this rank from step to step: weights, gradients and optimizer state, by name.
  std::vector<NamedBytes> held() const;
  // The trained weights alone, under the same names.
  std::vector<NamedTensor> weights() const;
  // Collective: SystemError where ranks that hold the same differ. Under ZeRO-3 none do.
  void check_ranks_equal() const;
  // The weights changed from outside, such as by loading the state's tensors. Collective.
  void weights_changed();
  // The same, and all weights are whole on every rank until the next step.
  void gather_weights();
  // Brings the values of a parameter that this rank has a slice of, until another is asked for. Collective over who has it.
  void hold_weight(const std::string& name);
  // The task's sums over batches of the evaluation data, on the ranks that have the head; elsewhere none. Collective over the
  // ranks of the tensor and pipeline axes, which give the same batches.
  std::map<std::string, double> evaluate_in_pipeline(const std::vector<SequenceBatch>& batches);
  // Since the start, as the Communicators of the model's axes counted it; `other`: the reductions of the world.
  Traffic exchanged() const;
  void set_num_steps(int64_t steps) { optimizer_->set_num_steps(steps); }
  LossScale& loss_scale() { return loss_scale_; }  // part of the state

  const Chunks& chunks() const { return chunks_; }
  std::vector<Parameter> parameters() const;  // of all chunks
  const Task& task() const { return *task_; }
  Loader& loader() { return loader_; }

 private:
  struct Sums {
    at::Tensor loss;  // fp64, where the model is; undefined where no loss was computed
    int64_t learnt = 0, tokens = 0;
    void add(const TaskResult& result);
  };
  Sums accumulate(std::vector<ModelInput>& inputs);
  Sums accumulate_in_pipeline(std::vector<ModelInput>& inputs);
  ModelInput load(int64_t micro, Sums& sums) const;
  ModelInput input_of(SequenceBatch batch) const;
  PipelineStep pipeline_step(const std::vector<ModelInput>& inputs, const std::function<at::Tensor(Transformer&, const ModelInput&)>& last);
  bool has_head() const;  // computes losses
  bool reads_late(int64_t step) const;
  void update(StepResult& out, int64_t step);
  void update_late(StepResult& out, const Sums& mine, int64_t step);
  at::Device device() const { return chunks_[0]->device(); }
  AcrossRanks across_ranks() const;  // collective
  [[noreturn]] void report_nonfinite(int64_t step, const std::vector<ModelInput>& inputs);
  void write_gradients(const std::string& path) const;
  at::Tensor flat_weight(const GradientPart& part) const;  // [end - begin], a view of where the optimizer works

  const Config& config_;
  Chunks chunks_;
  std::unique_ptr<Task> task_;
  Loader loader_;
  Schedule schedule_;
  int64_t accumulation_;
  const MeshComms& comms_;
  LossScale loss_scale_;
  Holders holders_;  // of the model's parameters
  std::unique_ptr<GradientReducer> reducer_;
  std::unique_ptr<ShardedWeights> weights_;  // with ZeRO
  std::unique_ptr<Optimizer> optimizer_;
  std::optional<DeviceNorm> norm_;  // on a device
};

}  // namespace trireme
