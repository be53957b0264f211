#include "base/tensor.h"

#include "model/lora.h"

#include <algorithm>
#include <cmath>
#include <regex>
#include <set>

#include "base/check.h"
#include "model/initialize.h"

namespace trireme {
namespace {

std::string last_name(const std::string& path) { return path.substr(path.rfind('.') + 1); }

bool is_plain(const std::string& target) {
  return std::all_of(target.begin(), target.end(), [](unsigned char c) { return std::isalnum(c) || c == '_' || c == '.'; });
}

bool matches(const std::string& path, const std::string& target) {
  if (target == "all-linear") return true;
  if (is_plain(target))
    return path == target || (path.size() > target.size() && path.ends_with("." + target));
  try {
    return std::regex_match(path, std::regex(target));
  } catch (const std::regex_error& error) {
    throw ConfigError(str("lora.targets=", target, ": not a regular expression: ", error.what()));
  }
}

}  // namespace

double LoraConfig::scale() const {
  auto r = static_cast<double>(rank);
  return rank_stabilized ? alpha / std::sqrt(r) : alpha / r;
}

void attach_lora(Transformer& model, const LoraConfig& config, uint64_t seed, Weights weights) {
  if (config.rank < 1) throw ConfigError(str("lora.rank=", config.rank, ": must be at least 1"));
  if (!(config.dropout >= 0 && config.dropout < 1)) throw ConfigError(str("lora.dropout=", config.dropout, ": must be from 0 to below 1"));
  auto linears = model.linears();
  std::set<Linear*> chosen;
  for (const auto& target : config.targets) {
    bool any = false;
    for (Linear* l : linears)
      if (matches(l->path, target)) chosen.insert(l), any = true;
    if (any) continue;
    std::set<std::string> names;
    for (Linear* l : linears) names.insert(last_name(l->path));
    std::string list;
    for (const auto& n : names) list += (list.empty() ? "" : ", ") + n;
    throw ConfigError(str("lora.targets=", target, ": no linear layer has this name; there are ", list, ", or all-linear"));
  }
  for (auto& p : model.parameters()) p.value.requires_grad_(false);
  for (Linear* l : linears) {
    if (!chosen.count(l)) continue;
    auto adapter = std::make_unique<LoraAdapter>();
    auto options = l->weight_OI.options().requires_grad(false);
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
