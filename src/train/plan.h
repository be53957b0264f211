// What a run will cost, said before its first step.
#pragma once

#include "config/config.h"
#include "model/hf_config.h"
#include "base/tensor.h"
#include "train/memory.h"

namespace trireme {

struct Plan {
  int64_t parameters = 0, trainable = 0;
  uint64_t weight_bytes = 0, gradient_bytes = 0, optimizer_bytes = 0, activation_bytes = 0;  // of a rank
  uint64_t checkpoint_bytes = 0;  // a rank's share of weights and optimizer, copied for checkpoint.async
  uint64_t base_bytes = 0;        // program and libraries
  int64_t rows_per_step = 0, steps = 0, rows_per_epoch = 0;
  int64_t tokens_per_step = 0;  // about: rows * mean tokens of a row
  uint64_t total_bytes() const {
    return weight_bytes + gradient_bytes + optimizer_bytes + activation_bytes + checkpoint_bytes + base_bytes;
  }
  std::string text() const;
};

// What a rank holds of a model that is cut over ranks, in elements; 0: all of it.
struct HeldParameters {
  int64_t all = 0, trained = 0;
};

// `row_tokens`: tokens of the longest row. Activations are an upper estimate from shapes.
Plan make_plan(const Config& config, const ModelConfig& model, at::ScalarType dtype, int64_t trainable, int64_t row_tokens,
               double mean_row_tokens, int64_t rows_per_epoch, int64_t rows_per_step, int64_t steps, int num_ranks = 1,
               const HeldParameters& held = {});

// ConfigError where `num_local_ranks` such ranks do not fit this host's free memory; names the keys to change.
void check_memory(const Plan& plan, int num_local_ranks, uint64_t free_bytes = available_bytes());

}  // namespace trireme
