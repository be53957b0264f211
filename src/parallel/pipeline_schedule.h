// Pipeline schedules: which action each stage does next, as data. Made by a pure function, checked and timed without
// processes. A stage is a rank of the mesh's pipeline axis; the model is cut into stages * virtual_stages chunks, of
// which every stage holds virtual_stages.
//
//   gpipe        all forwards, then all backwards (Huang et al. 2019)
//   1f1b         a forward and a backward in turn as soon as there is a backward (Narayanan et al. 2019)
//   interleaved  1f1b over chunks that go round the stages virtual_stages times (Narayanan et al. 2021, Megatron-LM)
//   zb-h1        1f1b whose weight gradients fill the end (Qi et al. 2024, "Zero Bubble Pipeline Parallelism", H1)
//   zb-v         two chunks a stage, down and up again in a V, weight gradients apart (same paper, section 6)
//
// With equal costs of stages, t_f, t_b (input gradient), t_w (weight gradient) a stage and micro-batch, p stages, m
// micro-batches and transfers that take no time (simulate() agrees with the published figures;
// tests/pipeline_schedule_test.cpp):
//                idle time of the pipeline                     chunks' activations kept at once on stage r
//   gpipe        (p-1) (t_f + t_b + t_w)                       m
//   1f1b         (p-1) (t_f + t_b + t_w)                       min(m, p - r)
//   interleaved  (p-1) (t_f + t_b + t_w) / v                   min(m v, 2 (p - r - 1) + (v - 1) p + 1)
//   zb-h1        (p-1) (t_f + t_b - t_w) where m >= p          min(m, p), until the weight gradient
//   zb-v         (p-1) t_f / 2, none between a stage's first   2 p, until the weight gradient
//                and last action, where m >= 2p - 1
// The last two with t_f = t_b = t_w; fewer micro-batches work too, with longer waits.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace trireme {

enum class PipelineKind { kGpipe, k1F1B, kInterleaved, kZbH1, kZbV };
PipelineKind parse_pipeline_kind(const std::string& name);  // the names above; ConfigError names parallel.schedule
const char* pipeline_kind_name(PipelineKind kind);

enum class ActionKind { kForward, kBackward, kBackwardInput, kBackwardWeight };  // kBackward: the latter two together
const char* action_name(ActionKind kind);

struct Action {
  ActionKind kind;
  int micro_batch;
  int chunk;  // of the model: 0 .. stages * virtual_stages - 1, in the order of the layers
  bool operator==(const Action&) const = default;
};
std::string action_text(const Action& action);  // "forward of micro-batch 3 on chunk 1"

struct PipelineSchedule {
  PipelineKind kind = PipelineKind::k1F1B;
  int stages = 1, virtual_stages = 1, micro_batches = 1;
  bool trains = true;                        // false: forwards only
  std::vector<std::vector<Action>> actions;  // by stage

  int num_chunks() const { return stages * virtual_stages; }
  int stage_of(int chunk) const;
  std::vector<int> chunks_of(int stage) const;  // ascending
  // The stage that sends what `action` needs: the output of the chunk before for a forward, the gradient of the chunk
  // behind for a backward. -1: no transfer (the model's ends, weight gradients, a chunk on the same stage).
  int source(const Action& action) const;
  // The action elsewhere that waits for what `action` makes; source() of it is action's stage. False: no transfer.
  bool consumer(const Action& action, Action* waiting) const;
};

// virtual_stages 0: what the schedule takes by itself, 2 for interleaved and zb-v, else 1. ConfigError where the
// schedule cannot be made of these numbers; it names parallel.schedule, parallel.virtual_stages, train.accumulation.
PipelineSchedule make_pipeline_schedule(PipelineKind kind, int stages, int virtual_stages, int micro_batches);
// The same chunks on the same stages without any backward, for evaluation: any number of micro-batches.
PipelineSchedule make_forward_schedule(PipelineKind kind, int stages, int virtual_stages, int micro_batches);

// How the runner transfers, and what check_schedule() assumes: of what comes to a chunk in one direction (activations
// or gradients) one receive is always posted, for the micro-batch that the stage needs next; an action waits for its
// input, posts the next receive, acts, and sends. The runner's sends do not block; the check lets them block until the
// receive is posted (no buffering at all), which is harder.

// "" for a schedule in which every micro-batch goes forward and backward (input and weight) once through every chunk,
// in legal order on the right stage, and no stage waits for ever. Else one sentence about the first thing wrong.
std::string check_schedule(const PipelineSchedule& schedule);

struct ActionCosts {  // seconds a chunk and micro-batch; a combined backward takes both
  double forward = 1, backward_input = 1, backward_weight = 1, transfer = 0;
};

struct Simulation {
  double seconds = 0;               // from the first action to the end of the last, over all stages
  std::vector<double> begin, end;   // of each stage's first and last action
  std::vector<double> busy;         // a stage's time in actions
  std::vector<int> peak_in_flight;  // (micro-batch, chunk) pairs past forward and not past their last backward, at most
  double bubble() const;            // share of all stages' time that no action fills
};
// What check_schedule() accepts, timed: an action starts when its stage is free and its input has arrived.
Simulation simulate(const PipelineSchedule& schedule, const ActionCosts& costs);

struct LayerRange {
  int64_t begin = 0, end = 0;
  bool operator==(const LayerRange&) const = default;
};
// Layers of each chunk, at least one: the dearest chunk is as cheap as can be, where a layer costs 1, chunk 0 also has
// the embedding and the last one the head. ConfigError with too few layers; it says how many chunks would fit.
std::vector<LayerRange> split_layers(int64_t num_layers, int64_t num_chunks, double embedding_cost, double head_cost);

}  // namespace trireme
