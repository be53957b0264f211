// A task says how a batch becomes a loss and which metrics it has.
#pragma once

#include "data/batch.h"
#include "model/transformer.h"

namespace trireme {

// Sums, never means: sums of micro-batches and ranks add up, so accumulation, data parallelism, packing and chunking
// cannot change a loss. The one division is done by whoever knows the whole step's count.
// Scalars in fp64, where they were computed: nobody waits for a device to add one up.
using TensorSums = std::map<std::string, at::Tensor>;
void add(TensorSums& to, const TensorSums& sums);
std::map<std::string, double> read(const TensorSums& sums);  // waits

struct TaskResult {
  at::Tensor loss_sum;  // scalar, fp32 (fp64 for an fp64 model), differentiable
  int64_t count = 0;    // what the loss is divided by: learnt tokens
  TensorSums sums;      // additive, by name; contains "loss" and "count"
};

class Task {
 public:
  virtual ~Task() = default;
  // The gradient of loss_sum comes out times gradient_scale; its value does not (optim/loss_scale.h).
  virtual TaskResult run(Transformer& model, const ModelInput& input, double gradient_scale = 1) const = 0;
  // Metrics by name from sums over everything evaluated. Empty sums (count 0) are a DataError.
  virtual std::map<std::string, double> metrics(const std::map<std::string, double>& sums) const = 0;
  // Is a larger value of this metric better? ConfigError on a metric the task does not have, which lists those it has.
  virtual bool larger_is_better(const std::string& metric) const = 0;
};

// pretrain and sft (both the language-model loss; they differ in which targets the data marks). ConfigError lists the kinds.
// `terms` of the loss act only while a model is training().
std::unique_ptr<Task> make_task(const std::string& kind, const CrossEntropyTerms& terms = {});

// A batch as tensors on the device of the model, which nobody waits for. The copy is safe to keep while the batch goes.
ModelInput to_device(const SequenceBatch& batch, at::Device device);
// The number of rows of which products of this model want a multiple: 64 in 16 bits on a CPU, where each new number is compiled
// (some 30 ms for a model) and the code kept (some 3 MB); and what its seams want, where ranks share the rows.
int64_t row_multiple(const Transformer& model);
int64_t row_multiple(at::Device device, at::ScalarType dtype, int64_t num_tensor);
// The same for a sum over the batch, filled up to a number of tokens that the model's kernels want.
ModelInput to_model(SequenceBatch batch, const Transformer& model);

}  // namespace trireme
