// Tasks on one device: a batch as a loss.
#include "tasks/task.h"

#include <torch/csrc/autograd/autograd.h>

#include "model/lora.h"
#include "support.h"

namespace trireme {
namespace {

using test::near;

ModelConfig config() {
  return model_config_from_json({{"model_type", "llama"},
                                 {"vocab_size", 61},
                                 {"hidden_size", 32},
                                 {"intermediate_size", 40},
                                 {"num_hidden_layers", 2},
                                 {"num_attention_heads", 4},
                                 {"num_key_value_heads", 2},
                                 {"rms_norm_eps", 1e-5},
                                 {"max_position_embeddings", 64},
                                 {"tie_word_embeddings", true},
                                 {"initializer_range", 0.3}},
                                "config.json");
}

SequenceBatch batch_of(const std::vector<int64_t>& lengths) {
  SequenceBatch batch;
  batch.cu_seqlens = {0};
  for (int64_t length : lengths) {
    for (int64_t i = 0; i < length; ++i) {
      batch.tokens.push_back((i * 17 + length) % 61);
      batch.targets.push_back(i % 3 == 0 ? kIgnoreTarget : (i * 17 + 17 + length) % 61);
      batch.positions.push_back(i);
    }
    batch.cu_seqlens.push_back(batch.num_tokens());
    batch.sample_ids.push_back(length);
  }
  return batch;
}

TEST(SequenceBatch, FillsUpWithASegmentOfItsOwn) {
  SequenceBatch batch = batch_of({5, 9});
  batch.fill_up(7);
  EXPECT_EQ(batch.num_tokens(), 14);
  EXPECT_EQ(batch.num_segments(), 2);
  batch.fill_up(16);
  EXPECT_EQ(batch.num_tokens(), 16);
  EXPECT_EQ(batch.cu_seqlens, (std::vector<int64_t>{0, 5, 14, 16}));
  EXPECT_EQ(batch.sample_ids.size(), 3u);
  EXPECT_EQ(batch.positions[15], 1);
  EXPECT_EQ(batch.targets[14], kIgnoreTarget);
  EXPECT_EQ(batch.tokens[15], batch.tokens[13]);
  SequenceBatch empty;
  empty.fill_up(8);
  EXPECT_EQ(empty.num_tokens(), 0);
}

// Sums and the gradient of every parameter, with the dropout masks of the samples.
TEST(SequenceBatch, FillingUpChangesNoSumAndNoGradient) {
  auto task = make_task("sft");
  for (bool lora : {false, true}) {
    Transformer model(config(), at::kDouble, 3, Weights::kRandom);
    if (lora) {
      LoraConfig adapter;
      adapter.rank = 4, adapter.alpha = 8, adapter.dropout = 0.3, adapter.targets = {"all-linear"};
      attach_lora(model, adapter, 5);
    }
    model.set_training(true);
    std::vector<at::Tensor> grads[2];
    TaskResult results[2];
    for (int filled : {0, 1}) {
      SequenceBatch batch = batch_of({5, 9, 20});
      if (filled) batch.fill_up(64);
      results[filled] = task->run(model, to_device(batch, model.device()));
      torch::autograd::backward({results[filled].loss_sum}, {});
      for (auto& p : model.parameters()) {
        if (!p.value.requires_grad()) continue;
        grads[filled].push_back(p.value.grad());
        p.value.mutable_grad().reset();
      }
    }
    EXPECT_EQ(results[1].count, results[0].count);
    const auto sums = read(results[0].sums), filled_sums = read(results[1].sums);
    EXPECT_EQ(filled_sums.at("correct"), sums.at("correct"));
    EXPECT_NEAR(filled_sums.at("loss"), sums.at("loss"), test::kSumFp64 * sums.at("loss"));
    ASSERT_FALSE(grads[0].empty());
    for (size_t i = 0; i < grads[0].size(); ++i) EXPECT_TRUE(near(grads[1][i], grads[0][i])) << i;
  }
}

// Sums of what is minimised in training, and of the plain loss outside of it.
TEST(LanguageModelTask, TermsOfTheLossActInTrainingAlone) {
  Transformer model(config(), at::kDouble, 3, Weights::kRandom);
  const CrossEntropyTerms terms{0.1, 0.02};
  const ModelInput input = to_device(batch_of({5, 9, 20}), model.device());
  const double plain = make_task("sft")->run(model, input).sums.at("loss").item<double>();
  const auto task = make_task("sft", terms);
  EXPECT_EQ(task->run(model, input).sums.at("loss").item<double>(), plain);
  model.set_training(true);
  const TaskResult result = task->run(model, input);
  at::NoGradGuard no_grad;
  const at::Tensor logits = model.logits(model.forward(input));
  const double expected = (at::cross_entropy_loss(logits, input.targets_T, {}, at::Reduction::Sum, kIgnoreTarget, terms.label_smoothing) +
                           terms.z_loss * logits.logsumexp({1}).square().masked_select(input.targets_T != kIgnoreTarget).sum()).item<double>();
  EXPECT_NEAR(result.sums.at("loss").item<double>(), expected, test::kSumFp64 * expected);
  EXPECT_EQ(result.loss_sum.item<double>(), result.sums.at("loss").item<double>());
  EXPECT_GT(expected, 1.001 * plain);
}

TEST(ToModel, FillsUpWhereKernelsAreCompiledForEachNumberOfRows) {
  for (auto [dtype, tokens] : {std::pair{at::kFloat, 14}, {at::kDouble, 14}, {at::kBFloat16, 64}, {at::kHalf, 64}}) {
    Transformer model(config(), dtype, 3, Weights::kRandom);
    EXPECT_EQ(to_model(batch_of({5, 9}), model).tokens_T.numel(), tokens) << dtype;
  }
}

}  // namespace
}  // namespace trireme
