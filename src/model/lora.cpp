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

constexpr const char* kPrefix = "base_model.model.";

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
    size_t before = chosen.size();
    bool any = false;
    for (Linear* l : linears)
      if (matches(l->path, target)) chosen.insert(l), any = true;
    if (any || chosen.size() > before) continue;
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
    adapter->a_RI = at::empty({config.rank, l->in_features()}, options);
    adapter->b_OR = at::zeros({l->out_features(), config.rank}, options);
    if (weights == Weights::kRandom)
      fill_uniform(adapter->a_RI, seed, kPrefix + l->path + ".lora_A.weight", 1.0 / std::sqrt(static_cast<double>(l->in_features())));
    adapter->a_RI.requires_grad_(true);
    adapter->b_OR.requires_grad_(true);
    adapter->scale = config.scale();
    adapter->dropout = config.dropout;
    l->lora = std::move(adapter);
  }
}

bool has_lora(Transformer& model) {
  for (Linear* l : model.linears())
    if (l->lora) return true;
  return false;
}

void merge_lora(Transformer& model) {
  at::NoGradGuard no_grad;
  for (Linear* l : model.linears()) {
    if (!l->lora) continue;
    auto wide = l->weight_OI.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    at::Tensor update = at::matmul(l->lora->b_OR.to(wide), l->lora->a_RI.to(wide)).mul_(l->lora->scale);
    l->weight_OI.copy_(update.add_(l->weight_OI.to(wide)));
    l->lora.reset();
  }
}

Json lora_config_to_json(Transformer& model, const LoraConfig& config, const std::string& base) {
  // Short names where every layer of that name has an adapter, else whole paths.
  std::set<std::string> with, without;
  for (Linear* l : model.linears()) (l->lora ? with : without).insert(last_name(l->path));
  std::set<std::string> targets;
  for (Linear* l : model.linears())
    if (l->lora) targets.insert(without.count(last_name(l->path)) ? l->path : last_name(l->path));
  Json j;
  j["peft_type"] = "LORA";
  j["task_type"] = "CAUSAL_LM";
  j["base_model_name_or_path"] = base.empty() ? Json() : Json(base);
  j["r"] = config.rank;
  j["lora_alpha"] = config.alpha == std::floor(config.alpha) ? Json(static_cast<int64_t>(config.alpha)) : Json(config.alpha);
  j["lora_dropout"] = config.dropout;
  j["use_rslora"] = config.rank_stabilized;
  j["target_modules"] = targets;
  j["bias"] = "none";
  j["fan_in_fan_out"] = false;
  j["inference_mode"] = true;
  j["init_lora_weights"] = true;
  j["modules_to_save"] = Json();
  return j;
}

LoraConfig lora_config_from_json(const Json& json, const std::string& source, const std::vector<std::string>& tensor_names) {
  LoraConfig config;
  if (json_get<std::string>(json, "peft_type", source) != "LORA")
    throw DataError(str(source, ": peft_type ", dump_json(json["peft_type"]), " is not supported; supported is LORA"));
  config.rank = json_get_or<int64_t>(json, "r", 8, source);
  config.alpha = json_get_or<double>(json, "lora_alpha", 8.0, source);
  config.dropout = json_get_or<double>(json, "lora_dropout", 0.0, source);
  config.rank_stabilized = json_get_or<bool>(json, "use_rslora", false, source);
  config.targets.clear();
  const std::string suffix = ".lora_A.weight", prefix = kPrefix;
  for (const auto& name : tensor_names)
    if (name.starts_with(prefix) && name.ends_with(suffix))
      config.targets.push_back(name.substr(prefix.size(), name.size() - prefix.size() - suffix.size()));
  if (config.targets.empty()) throw DataError(str(source, ": the adapter beside it has no lora_A tensors"));
  return config;
}

}  // namespace trireme
