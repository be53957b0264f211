#include "base/tensor.h"

#include "model/lora.h"

#include <cmath>

#include "base/check.h"
#include "model/initialize.h"
#include "model/linear_names.h"
#include "ops/dequantized_weight.h"

namespace trireme {
namespace {

const std::string kNiter = "pissa_niter_";  // PEFT's spelling

}  // namespace

void LoraConfig::set_init(const std::string& name) {
  init = name == "loftq" ? LoraInit::kLoftq : name.starts_with("pissa") ? LoraInit::kPissa : LoraInit::kRandom;
  pissa_iterations = name.starts_with(kNiter) ? std::stoll(name.substr(kNiter.size())) : 0;
  TRIREME_CHECK(init_name() == name, name);
}

std::string LoraConfig::init_name() const {
  if (init == LoraInit::kRandom) return "random";
  if (init == LoraInit::kLoftq) return "loftq";
  return pissa_iterations > 0 ? str(kNiter, pissa_iterations) : "pissa";
}

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
    if (const int64_t values = std::min(l->in_features(), l->out_features()); config.init != LoraInit::kRandom && config.rank > values)
      throw ConfigError(str("lora.rank=", config.rank, ": ", l->path, " has ", values, " singular values, and lora.init=", config.init_name(), " takes as many as the rank: lower lora.rank, or set lora.init=random"));
    auto adapter = std::make_unique<LoraAdapter>();
    const auto options = at::TensorOptions(model.dtype()).device(model.device());
    adapter->a_RI = at::empty({config.rank, l->in_features()}, options).requires_grad_(true);
    adapter->b_OR = at::empty({l->out_features(), config.rank}, options).requires_grad_(true);
    if (config.dora) adapter->magnitude_O = at::empty({l->out_features()}, options).requires_grad_(true);
    adapter->scale = config.scale();
    adapter->dropout = config.dropout;
    l->lora = std::move(adapter);
  }
  if (weights == Weights::kUninitialized || model.device().is_meta()) return;
  TRIREME_CHECK(config.init == LoraInit::kRandom && !config.dora, "adapters made of the weights before the weights are there");
  for (const auto& p : model.parameters())
    if (p.value.requires_grad()) fill_initial(p, seed, 0.0);
}

bool has_lora(Transformer& model) {
  for (Linear* l : model.linears())
    if (l->lora) return true;
  return false;
}

at::Tensor adapted_row_norms(const LinearWeight& base, const LoraAdapter& adapter, const std::function<void(at::Tensor)>& sum) {
  at::NoGradGuard no_grad;
  const auto* frozen = dynamic_cast<const DequantizedWeight*>(base.frozen.get());
  TRIREME_CHECK(frozen || !base.frozen, "a magnitude beside a weight without values");
  const at::Tensor w_OI = frozen ? frozen->in_scratch() : base.dense_OI;
  const auto wide = adapter.b_OR.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor a_RI = adapter.a_RI.to(wide), b_OR = adapter.b_OR.to(wide), squares_O = at::empty({w_OI.size(0)}, b_OR.options());
  const int64_t rows = std::max<int64_t>(1, (1 << 18) / w_OI.size(1));  // so many stay in the caches
  for (int64_t first = 0; first < w_OI.size(0); first += rows) {
    const int64_t count = std::min(rows, w_OI.size(0) - first);
    const at::Tensor part = at::addmm(w_OI.narrow(0, first, count).to(wide), b_OR.narrow(0, first, count), a_RI, 1, adapter.scale);
    squares_O.narrow(0, first, count).copy_(part.square_().sum(1));
  }
  if (sum) sum(squares_O);
  return squares_O.sqrt();
}

void merge_lora(const at::Tensor& weight_OI, const LoraAdapter& adapter) {
  at::NoGradGuard no_grad;
  const auto wide = weight_OI.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor update = at::matmul(adapter.b_OR.to(wide), adapter.a_RI.to(wide)).mul_(adapter.scale);
  update.add_(weight_OI.to(wide));
  if (adapter.magnitude_O.defined()) update.mul_((adapter.magnitude_O.to(wide) / at::linalg_vector_norm(update, 2, at::IntArrayRef{1})).unsqueeze(1));
  weight_OI.detach().copy_(update);
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
