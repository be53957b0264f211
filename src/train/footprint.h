// Bytes of tensors that a rank holds at the peak of training, in a step or an evaluation, from shapes alone.
//
// The formulas follow the operations (ops/ops.h says what each keeps) as Korthikanti et al. 2022 ("Reducing Activation
// Recomputation in Large Transformer Models") do for theirs: a GPT layer of theirs without dropout and attention scores keeps
// 32 T C bytes in 16 bits, which a layer of ours with the same matrices keeps too; and over t tensor ranks with the rows shared
// out 1/t of it, but for the rows that are gathered to multiply with. What ZeRO leaves on a rank is Rajbhandari et al. 2020;
// chunks in flight are those of the pipeline's schedule.
#pragma once

#include "train/mesh_model.h"
#include "train/traffic.h"

namespace trireme {

struct Footprint {
  uint64_t weights = 0;      // with the blocks that ZeRO 3 has gathered, and what making them takes beyond all that a step has beside them
  uint64_t gradients = 0;    // with the buckets that ZeRO 2 and 3 have on their way
  uint64_t optimizer = 0;    // with optim.offload all of it is host memory, and so are the buffers of its update, counted here
  uint64_t pages = 0;        // of it, what a device has to hold with optim.paged; the rest may be in host memory
  uint64_t activations = 0;  // kept for backward, and what the largest moment of forward, loss or backward adds
  uint64_t away = 0;         // kept in host memory beside them: with train.offload_activations, of a device
  uint64_t embedding = 0;    // in host memory too: with model.embedding=host, of a device
  uint64_t buffers = 0;      // the step's batches, hidden states between stages
  uint64_t block = 0;        // of these activations, those of one block without recomputation
  bool in_evaluation = false;  // activations and buffers are those of an evaluation, which has more
  uint64_t total() const { return weights + gradients + optimizer + activations + buffers; }
};

// The batches of an evaluation, whose forwards keep nothing; gradients and optimizer stay where they are.
struct EvalBatches {
  int64_t tokens = 0;          // of the largest; 0: nothing is evaluated
  int64_t tokens_of_copy = 0;  // of all that one copy of the model has, which are there at once in a pipeline
};

// Of the rank at `coords` in a step of `num_batches` micro-batches like this one, or in an evaluation between two, on such a device.
Footprint step_footprint(const MeshModel& model, const Config& config, const MeshCoords& coords, const MicroBatch& batch, int64_t num_batches,
                         const EvalBatches& evaluation = {}, at::DeviceType device = at::kCPU);

// What one block keeps for backward of a micro-batch of so many tokens.
uint64_t kept_by_block(const Block& block, const ModelConfig& config, at::ScalarType dtype, int64_t tokens, int num_tensor, Recompute mode, int64_t mlp_rows = 0);

}  // namespace trireme
