// Executes the actions of one stage of a pipeline schedule, once: a training step, or an evaluation.
//
// Transfers do not block: the receive of what each local chunk needs next is posted ahead, in each direction; a send is
// waited for at the end, so that both travel while the stage computes. What backward needs is freed as soon as it has
// been there: an output when it has been sent, the graph and the input after the input gradient, and what weight
// gradients need (ops/delayed_gradients.h) after each of them.
//
// It knows nothing of models: a chunk is a function from hidden states to hidden states, the last one to a loss.
#pragma once

#include <chrono>

#include "comm/communicator.h"
#include "ops/delayed_gradients.h"
#include "parallel/pipeline_schedule.h"

namespace trireme {

struct PipelineChunk {
  // What this chunk makes of a micro-batch. `hidden` is what the chunk before has returned, undefined for chunk 0. The
  // last chunk returns what backward starts from, a scalar; undefined or without a graph: no gradient comes from it.
  std::function<at::Tensor(int micro_batch, const at::Tensor& hidden)> forward;
  // Takes a weight gradient that waited (GradientReducer::contribute). Called where the schedule splits backward, and with
  // fill_waits.
  WeightGradientQueue::Sink contribute;
};

struct PipelineEvent {
  using Time = std::chrono::steady_clock::time_point;
  Action action;
  Time asked, begin, end;  // it wanted its input, had it, was done
};

struct PipelineStep {
  std::vector<PipelineChunk> chunks;  // of this stage, in the order of schedule.chunks_of(stage)
  // Shape of the hidden states of a micro-batch, the same between all chunks and known on every stage.
  std::function<std::vector<int64_t>(int micro_batch)> hidden_shape;
  at::TensorOptions hidden_options;                   // their dtype and device
  bool fill_waits = false;  // put weight gradients off to the waits of backward, as those of tensor parallelism
  std::function<void(const PipelineEvent&)> observe;  // told every action when it is done; may be empty
};

// Collective over `pipeline`, whose rank is the stage; every stage has the same schedule. The gradients of parameters
// arrive as always (.grad and its hooks, or contribute(); GradientReducer::before_all_backwards() comes first), in the order of
// the micro-batches unless they wait. Without gradients where
// the schedule does not train. An exception of a chunk passes through, and its peers wait: the caller ends the job.
void run_pipeline(const PipelineSchedule& schedule, const Communicator& pipeline, const PipelineStep& step);

}  // namespace trireme
