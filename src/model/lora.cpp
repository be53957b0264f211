#include "base/tensor.h"

#include "model/lora.h"

#include <cmath>

#include "base/check.h"
#include "model/initialize.h"
#include "model/linear_names.h"

namespace trireme {
double LoraConfig::scale() const {
  auto r = static_cast<double>(rank);
  return rank_stabilized ? alpha / std::sqrt(r) : alpha / r;
}

void attach_lora(Transformer& model, const LoraConfig& config, uint64_t seed, Weights weights) {
  if (config.rank < 1) throw ConfigError(str("lora.rank=", config.rank, ": must be at least 1"));
  if (!(config.dropout >= 0 && config.dropout < 1)) throw ConfigError(str("lora.dropout=", config.dropout, ": must be from 0 to below 1"));
  const std::set<Linear*> chosen = linears_named(model, config.targets, "lora.targets");
  for (auto& p : model.parameters()) p.value.requires_grad_(false);
  for (Linear* l : model.linears()) {
    if (!chosen.count(l)) continue;
    auto adapter = std::make_unique<LoraAdapter>();
    const auto options = at::TensorOptions(model.dtype()).device(model.device());
    adapter->a_RI = at::empty({config.rank, l->in_features()}, options).requires_grad_(true);
    adapter->b_OR = at::empty({l->out_features(), config.rank}, options).requires_grad_(true);
    adapter->scale = config.scale();
    adapter->dropout = config.dropout;
    l->lora = std::move(adapter);
  }
  if (weights == Weights::kUninitialized || model.device().is_meta()) return;
  for (const auto& p : model.parameters())
    if (p.value.requires_grad()) fill_initial(p, seed, 0.0);
}

bool has_lora(Transformer& model) {
  for (Linear* l : model.linears())
    if (l->lora) return true;
  return false;
}

void merge_lora(const at::Tensor& weight_OI, const LoraAdapter& adapter) {
  at::NoGradGuard no_grad;
  const auto wide = weight_OI.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor update = at::matmul(adapter.b_OR.to(wide), adapter.a_RI.to(wide)).mul_(adapter.scale);
  weight_OI.detach().copy_(update.add_(weight_OI.to(wide)));
}

std::vector<std::string> lora_targets(Transformer& model) {
  std::set<std::string> without, targets;
  for (Linear* l : model.linears())
    if (!l->lora) without.insert(last_name(l->path));
  for (Linear* l : model.linears())
    if (l->lora) targets.insert(without.count(last_name(l->path)) ? l->path : last_name(l->path));
  return {targets.begin(), targets.end()};
}

}  // namespace trireme
