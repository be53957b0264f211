// LoRA (Hu et al. 2021) with PEFT's names, targets and initial values.
#pragma once

#include "model/transformer.h"

namespace trireme {

struct LoraConfig {
  int64_t rank = 0;
  double alpha = 16.0;
  double dropout = 0.0;
  bool rank_stabilized = false;  // rsLoRA (Kalajdzievski 2023): scale = alpha / sqrt(rank) instead of alpha / rank
  std::vector<std::string> targets = {"all-linear"};  // model/linear_names.h; the head is none of them

  double scale() const;
};

// Puts an adapter on every matching Linear, in the model's dtype (A uniform(-1, 1) / sqrt(in), B zero; a function of
// seed, layer and element) and freezes all other parameters. kUninitialized: a file will fill the adapters.
// ConfigError: rank or dropout out of range, a target that matches nothing.
void attach_lora(Transformer& model, const LoraConfig& config, uint64_t seed, Weights weights = Weights::kRandom);

bool has_lora(Transformer& model);

// W += scale * B A, computed in fp32 (fp64 for fp64) and rounded once.
void merge_lora(const at::Tensor& weight_OI, const LoraAdapter& adapter);

// The adapters' target_modules: a short name where every layer of that name has an adapter, else whole paths.
std::vector<std::string> lora_targets(Transformer& model);

}  // namespace trireme
