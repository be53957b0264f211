// Whether merged weights are the model that was trained: a quantized base with adapters beside it, and the weights that became of both.
#pragma once

#include <optional>

#include "checkpoint/checkpoint.h"
#include "train/build.h"

namespace trireme {

// DataError where the logits of the merged model in `folder` are farther from those of the model of `config` with its adapters (those of
// `checkpoint`, if there is one), for fixed tokens, than merge_bound() of their norm. One block of one of them is in memory at a
// time. Returns how far.
double check_merged(const std::string& folder, const Config& config, const ModelSource& source, at::ScalarType dtype, const std::optional<Checkpoint>& checkpoint);

// How far from those of base and adapter, in their norm, the logits of `folder` are, which lora.requantize has written, and those of the same
// weights as they were before they were quantized again. Nothing bounds what that loses.
struct RequantizedLogits {
  double written, merged;
};
RequantizedLogits compare_requantized(const std::string& folder, const Config& config, const ModelSource& source, at::ScalarType dtype, const std::optional<Checkpoint>& checkpoint);

// What rounding makes of logits: of the merged weights once and of every activation on both sides, or on one in quant.compute_dtype; with int8, asked for or stored, also that
// inputs are quantized on one side alone.
double merge_bound(const Config& config, const ModelConfig& model, at::ScalarType dtype);

}  // namespace trireme
