// What a run will cost, said before its first step: memory of each rank, bytes sent, the pipeline's idle time. From shapes alone.
#pragma once

#include "base/tensor.h"

#include "config/config.h"
#include "model/hf_config.h"
#include "train/footprint.h"
#include "train/memory.h"

namespace trireme {

// The rows that a run reads.
struct PlannedData {
  int64_t longest_row = 0;  // tokens
  double mean_row = 0;
  int64_t rows_per_epoch = 0;  // 0: not known
  int64_t rows_per_step = 0, steps = 0;
  int64_t accumulation = 1;    // micro-batches a step, of each copy of the model
  int64_t longest_eval_row = 0;  // tokens; 0: nothing is evaluated
  int64_t eval_tokens = 0;       // of all that is evaluated; 0: not known
  at::DeviceType device = at::kCPU;  // that computes
};

struct Plan {
  int64_t parameters = 0, trainable = 0;  // of the whole model
  Mesh mesh;
  PlannedData data;
  struct Stage {  // of the pipeline: its largest rank
    Footprint memory;
    Traffic traffic;  // of a step of mean rows, everything learnt
  };
  std::vector<Stage> stages;
  uint64_t checkpoint_bytes = 0;  // a rank's share of weights and optimizer, copied for checkpoint.async
  // Program and libraries in host memory; without a device also what lies in the heap between tensors that are kept, in holes too
  // small for a block at work.
  uint64_t base_bytes = 300ull << 20;
  bool offload = false;  // the optimizer is in host memory
  bool paged = false;    // it is on the device as far as there is room, at least Footprint::pages of it, and the rest in host memory
  std::string schedule;  // of the pipeline; "" where there is none
  double bubble = 0;     // its share of idle time, where forward, input and weight gradients of all stages cost the same

  const Footprint& largest() const;
  bool of_device() const { return data.device != at::kCPU; }
  // Of a rank where it computes: of its device the tensors and the workspace of products (beside CUDA's context), else all of it.
  uint64_t needed_bytes() const;
  uint64_t host_bytes() const;  // of a rank in host memory; without a device all of it
  uint64_t away_bytes(const Footprint& memory) const;  // of its optimizer, which may be in host memory
  std::string text() const;
};

// Memory of steps of longest rows, at most; ConfigError where the model cannot be cut so.
Plan make_plan(const Config& config, const ModelConfig& model, at::ScalarType dtype, const Mesh& mesh, const PlannedData& data);

// ConfigError where what `num_local_ranks` such ranks need of this host does not fit its free memory; names the keys to change.
void check_memory(const Plan& plan, int num_local_ranks, uint64_t free_bytes = available_bytes());

// The same of a rank's own device.
void check_device_memory(const Plan& plan, uint64_t free_bytes);

// Whether a rank fits what it may use where it computes, and else by which changes of the configuration it would. One line.
std::string fit_text(const Plan& plan, const Config& config, const ModelConfig& model, at::ScalarType dtype, std::optional<uint64_t> room_bytes);

// The longest rows, in 64s up to the model's max_position_embeddings, of which a micro-batch fits into so many bytes: "plan: rows of up to
// 4096 tokens fit ...".
std::string longest_row_text(const Plan& plan, const Config& config, const ModelConfig& model, at::ScalarType dtype, uint64_t room_bytes);

}  // namespace trireme
