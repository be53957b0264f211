#include "base/tensor.h"

#include "tasks/language_model.h"

#include <cmath>
#include <numeric>

#include "base/check.h"
#include "ops/device.h"
#include "ops/ops.h"

namespace trireme {

TaskResult LanguageModelTask::run(Transformer& model, const ModelInput& input, double gradient_scale) const {
  LossSum loss = model.cross_entropy(model.forward(input), input.targets_T, gradient_scale, model.training() ? terms_ : CrossEntropyTerms());
  TaskResult result;
  result.loss_sum = loss.sum;
  result.count = loss.count;
  result.sums = {{"loss", loss.sum.detach().to(at::kDouble)},
                 {"count", at::scalar_tensor(loss.count, at::kDouble)},
                 {"correct", loss.correct.to(at::kDouble)}};
  return result;
}

std::map<std::string, double> LanguageModelTask::metrics(const std::map<std::string, double>& sums) const {
  auto it = sums.find("count");
  if (it == sums.end() || it->second == 0) throw DataError("the evaluation data has no learnt token");
  double count = it->second, loss = sums.at("loss") / count;
  return {{"loss", loss}, {"perplexity", std::exp(loss)}, {"token_accuracy", sums.at("correct") / count}, {"tokens", count}};
}

bool LanguageModelTask::larger_is_better(const std::string& metric) const {
  if (metric == "loss" || metric == "perplexity") return false;
  if (metric == "token_accuracy") return true;
  throw ConfigError(str("eval.metric=", metric, ": this task has loss, perplexity, token_accuracy"));
}

void add(TensorSums& to, const TensorSums& sums) {
  for (const auto& [name, value] : sums) {
    at::Tensor& sum = to[name];
    sum = sum.defined() ? sum + value : value;
  }
}

std::map<std::string, double> read(const TensorSums& sums) {
  std::map<std::string, double> values;
  for (const auto& [name, value] : sums) values[name] = value.item<double>();
  return values;
}

std::unique_ptr<Task> make_task(const std::string& kind, const CrossEntropyTerms& terms) {
  if (kind == "sft" || kind == "pretrain") return std::make_unique<LanguageModelTask>(terms);
  throw ConfigError(str("task.kind=", kind, ": allowed are pretrain, sft"));
}

ModelInput to_device(const SequenceBatch& batch, at::Device device) {
  ModelInput input;
  input.tokens_T = to_device(batch.tokens, device);
  input.targets_T = at::tensor(batch.targets, at::kLong);
  input.positions_T = to_device(batch.positions, device);
  input.cu_seqlens = batch.cu_seqlens;
  input.sample_ids = batch.sample_ids;
  return input;
}

int64_t row_multiple(const Transformer& model) { return row_multiple(model.device(), model.dtype(), model.seams().row_multiple); }

int64_t row_multiple(at::Device device, at::ScalarType dtype, int64_t num_tensor) {
  const bool compiled = device.is_cpu() && (dtype == at::kBFloat16 || dtype == at::kHalf);
  return std::lcm(compiled ? int64_t{64} : int64_t{1}, num_tensor);
}

ModelInput to_model(SequenceBatch batch, const Transformer& model) {
  batch.fill_up(row_multiple(model));
  return to_device(batch, model.device());
}

}  // namespace trireme
