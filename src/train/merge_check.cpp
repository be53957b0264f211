#include "base/tensor.h"

#include "train/merge_check.h"

#include "base/check.h"
#include "base/random.h"
#include "train/export.h"

namespace trireme {
namespace {

at::Tensor probe_logits(Transformer& model) {
  constexpr int64_t kTokens = 64;
  const int64_t tokens = std::min(kTokens, model.config().max_positions);
  ModelInput input;
  std::vector<int64_t> ids, positions;
  for (int64_t t = 0; t < tokens; ++t) {
    ids.push_back(static_cast<int64_t>(random_bits(0, RandomStream::kDropout, 0, static_cast<uint64_t>(t)) % static_cast<uint64_t>(model.config().vocab_size)));
    positions.push_back(t);
  }
  input.tokens_T = at::tensor(ids), input.positions_T = at::tensor(positions), input.cu_seqlens = {0, tokens};
  return model.logits(model.forward(input));
}

at::Tensor trained_logits(const Config& config, const ModelSource& source, at::ScalarType dtype, const std::optional<Checkpoint>& checkpoint) {
  const auto model = build_model(config, source, dtype, checkpoint.has_value(), at::kCPU);
  std::vector<NamedTensor> adapters;
  for (const Parameter& p : model->parameters())
    if (checkpoint && p.value.requires_grad()) adapters.push_back({"model/" + p.name, p.value.detach(), p.shard});
  if (checkpoint) checkpoint->load(adapters, true);
  return probe_logits(*model);
}

at::Tensor written_logits(const std::string& folder, const Config& config, at::ScalarType dtype) {
  Config written;
  written.model.path = folder;
  written.quant.compute_dtype = config.quant.compute_dtype;
  return probe_logits(*build_model(written, find_model(written), dtype, false, at::kCPU));
}

double relative_difference(const at::Tensor& found, const at::Tensor& expected) { return ((found - expected).norm() / expected.norm()).item<double>(); }

}  // namespace

double merge_bound(const Config& config, at::ScalarType dtype) {
  const auto of = [](at::ScalarType rounded) { return rounded == at::kFloat ? 1e-4 : rounded == at::kDouble ? 1e-6 : rounded == at::kHalf ? 0.02 : 0.05; };
  const double rounding = std::max(of(dtype), of(frozen_base(config).compute.value_or(dtype)));
  return config.quant.base == "int8" ? rounding + 0.05 : rounding;
}

double check_merged(const std::string& folder, const Config& config, const ModelSource& source, at::ScalarType dtype, const std::optional<Checkpoint>& checkpoint) {
  at::NoGradGuard no_grad;
  const at::Tensor trained = trained_logits(config, source, dtype, checkpoint);
  const double difference = relative_difference(written_logits(folder, config, dtype), trained), bound = merge_bound(config, dtype);
  if (!(difference <= bound))
    throw DataError(str(config.run.dir, ": the merged weights are not the model that was trained: its logits differ by ", difference, " of their norm, and at most ", bound,
                        " is what rounding explains. Export the adapter alone (lora.merge=false), or merge in a wider dtype"));
  return difference;
}

RequantizedLogits compare_requantized(const std::string& folder, const Config& config, const ModelSource& source, at::ScalarType dtype, const std::optional<Checkpoint>& checkpoint) {
  at::NoGradGuard no_grad;
  const at::Tensor trained = trained_logits(config, source, dtype, checkpoint);
  const double written = relative_difference(written_logits(folder, config, dtype), trained);
  return {written, relative_difference(probe_logits(*merged_model(config, source, checkpoint)), trained)};
}

}  // namespace trireme
