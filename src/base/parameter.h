// A named tensor of the training state, and which part of the whole this rank holds.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "base/tensor.h"

namespace trireme {

// The slice of a global tensor that this rank holds: global index = offset[d] + local index in every dim d. Tensor
// parallelism, ZeRO, clipping and checkpoints all read this one description.
struct ShardSpec {
  std::vector<int64_t> global_shape;  // of the whole tensor
  std::vector<int64_t> offset;        // of the local part; same length
  bool replicated = true;             // every data-parallel rank holds the same slice

  static ShardSpec whole(const at::Tensor& t) {
    return {t.sizes().vec(), std::vector<int64_t>(static_cast<size_t>(t.dim()), 0), true};
  }
};

struct Parameter {
  std::string name;  // Hugging Face name, e.g. model.layers.0.self_attn.q_proj.weight
  at::Tensor value;  // leaf; requires_grad() says whether it is trained
  ShardSpec shard;
  bool on_host = false;  // its values stay in host memory, whatever device the model is on, whole on every rank that has the slice
};

// Writes the values of parameters: initial ones, or those of a file.
using WeightFill = std::function<void(const std::vector<Parameter>& parameters)>;

}  // namespace trireme
