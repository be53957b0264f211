// Next-token cross-entropy over the learnt positions.
#pragma once

#include "tasks/task.h"

namespace trireme {

// sums: loss (natural log; in training with its terms), count (learnt tokens), correct (argmax equals the target).
// metrics: loss = loss / count, perplexity = exp(loss), token_accuracy = correct / count, tokens = count.
class LanguageModelTask : public Task {
 public:
  explicit LanguageModelTask(const CrossEntropyTerms& terms) : terms_(terms) {}
  TaskResult run(Transformer& model, const ModelInput& input, double gradient_scale) const override;
  std::map<std::string, double> metrics(const std::map<std::string, double>& sums) const override;
  bool larger_is_better(const std::string& metric) const override;

 private:
  CrossEntropyTerms terms_;
};

}  // namespace trireme
