#include "base/tensor.h"

#include "train/merge_check.h"

#include "base/check.h"
#include "base/random.h"
#include "parallel/buckets.h"
#include "train/export.h"

namespace trireme {
namespace {

// Weights that are there while they are used: a block's while it computes, those outside of the blocks until the end.
class OneBlock : public BlockWeights {
 public:
  OneBlock(Transformer& model, WeightFill fill) : fill_(std::move(fill)) {
    for (const Parameter& p : model.parameters()) of_block_[block_of(p.name)].push_back(p);
  }
  void acquire(int64_t block, bool) override {
    for (Parameter& p : of_block_[block]) p.value.set_data(at::empty(p.value.sizes(), p.value.options().requires_grad(false)));
    fill_(of_block_[block]);
  }
  void release(int64_t block, bool) override {
    for (Parameter& p : of_block_[block]) p.value.set_data(at::empty({}, p.value.options().requires_grad(false)).expand(p.value.sizes()));
  }

 private:
  const WeightFill fill_;
  std::map<int64_t, std::vector<Parameter>> of_block_;
};

// Of a model whose leaves have no memory yet.
at::Tensor probe_logits(Transformer& model, const WeightFill& fill) {
  OneBlock weights(model, fill);
  model.set_block_weights(&weights);
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
  WeightFill fill;
  const auto model = build_model(config, source, dtype, checkpoint.has_value(), at::kCPU, false, {}, &fill);
  return probe_logits(*model, [&](const std::vector<Parameter>& parameters) {
    fill(parameters);
    std::vector<NamedTensor> trained;
    for (const Parameter& p : parameters)
      if (checkpoint && p.value.requires_grad()) trained.push_back({"model/" + p.name, p.value.detach(), p.shard});
    if (!trained.empty()) checkpoint->load(trained, true);
  });
}

at::Tensor written_logits(const std::string& folder, const Config& config, at::ScalarType dtype) {
  Config written;
  written.model.path = folder;
  written.quant.compute_dtype = config.quant.compute_dtype;
  WeightFill fill;
  const auto model = build_model(written, find_model(written), dtype, false, at::kCPU, false, {}, &fill);
  return probe_logits(*model, fill);
}

double relative_difference(const at::Tensor& found, const at::Tensor& expected) { return ((found - expected).norm() / expected.norm()).item<double>(); }

}  // namespace

double merge_bound(const Config& config, const ModelConfig& model, at::ScalarType dtype) {
  const auto of = [](at::ScalarType rounded) { return rounded == at::kFloat ? 1e-4 : rounded == at::kDouble ? 1e-6 : rounded == at::kHalf ? 0.02 : 0.05; };
  const FrozenBase base = frozen_base(config, model);
  const double rounding = std::max(of(dtype), of(base.compute.value_or(dtype)));
  return base.kind == "int8" || (!base.stored.empty() && model.quantization == "int8") ? rounding + 0.05 : rounding;
}

double check_merged(const std::string& folder, const Config& config, const ModelSource& source, at::ScalarType dtype, const std::optional<Checkpoint>& checkpoint) {
  at::NoGradGuard no_grad;
  const at::Tensor trained = trained_logits(config, source, dtype, checkpoint);
  const double difference = relative_difference(written_logits(folder, config, dtype), trained), bound = merge_bound(config, source.config, dtype);
  if (!(difference <= bound))
    throw DataError(str(config.run.dir, ": the merged weights are not the model that was trained: its logits differ by ", difference, " of their norm, and at most ", bound,
                        " is what rounding explains. Export the adapter alone (lora.merge=false), or merge in a wider dtype"));
  return difference;
}

RequantizedLogits compare_requantized(const std::string& folder, const Config& config, const ModelSource& source, at::ScalarType dtype, const std::optional<Checkpoint>& checkpoint) {
  at::NoGradGuard no_grad;
  const at::Tensor trained = trained_logits(config, source, dtype, checkpoint);
  const double written = relative_difference(written_logits(folder, config, dtype), trained);
  WeightFill fill;
  const auto merged = merged_model(config, source, checkpoint, fill);
  return {written, relative_difference(probe_logits(*merged, fill), trained)};
}

}  // namespace trireme
