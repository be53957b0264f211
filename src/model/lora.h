// LoRA (Hu et al. 2021) with PEFT's names, targets and initial values.
#pragma once

#include "model/transformer.h"

namespace trireme {

// What adapters begin with: random A and B of zeros; or model/lora_init.h, and the base lacks it.
enum class LoraInit { kRandom, kPissa, kLoftq };

struct LoraConfig {
  int64_t rank = 0;
  double alpha = 16.0;
  double dropout = 0.0;
  bool rank_stabilized = false;  // rsLoRA (Kalajdzievski 2023): scale = alpha / sqrt(rank) instead of alpha / rank
  std::vector<std::string> targets = {"all-linear"};  // model/linear_names.h; the head is none of them
  LoraInit init = LoraInit::kRandom;
  int64_t pissa_iterations = 0;  // 0: singular directions to rounding; else model/lora_init.h
  int64_t loftq_iterations = 1;
  bool dora = false;

  double scale() const;
  void set_init(const std::string& name);  // random, pissa, pissa_niter_N, loftq
  std::string init_name() const;
};

// Puts an adapter on every matching Linear, in the model's dtype (A uniform(-1, 1) / sqrt(in), B zero; a function of
// seed, layer and element) and freezes all other parameters. kUninitialized: a file will fill the adapters.
// Where `init` is not random, or with `dora`, the model is on the meta device, and FrozenLayers (model/frozen_base.h) has the values.
// ConfigError: rank or dropout out of range, a target that matches nothing, a rank above the number of a layer's singular values.
void attach_lora(Transformer& model, const LoraConfig& config, uint64_t seed, Weights weights = Weights::kRandom);

bool has_lora(Transformer& model);

// [O] norms of the rows of base + scale B A, where all inputs are on this rank; fp32 (fp64 for fp64). `sum`: see Linear::sum_over_inputs.
at::Tensor adapted_row_norms(const LinearWeight& base, const LoraAdapter& adapter, const std::function<void(at::Tensor)>& sum = {});

// W += scale * B A, with a magnitude W = m / |W| * W behind it, computed in fp32 (fp64 for fp64) and rounded once.
void merge_lora(const at::Tensor& weight_OI, const LoraAdapter& adapter);

// The adapters' target_modules: a short name where every layer of that name has an adapter, else whole paths.
std::vector<std::string> lora_targets(Transformer& model);

}  // namespace trireme
