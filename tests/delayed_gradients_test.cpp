// Weight gradients that wait: the same bits as without, nothing kept after they are computed.
#include "ops/delayed_gradients.h"

#include <torch/csrc/autograd/autograd.h>

#include <set>

#include "model/lora.h"
#include "ops/ops.h"
#include "parallel/data_parallel.h"
#include "support.h"
#include "tasks/task.h"

namespace trireme {
namespace {

using test::same_bits;

ModelConfig config(bool tied) {
  return model_config_from_json({{"model_type", "qwen2"},  // biases
                                 {"vocab_size", 61},
                                 {"hidden_size", 32},
                                 {"intermediate_size", 40},
                                 {"num_hidden_layers", 2},
                                 {"num_attention_heads", 4},
                                 {"num_key_value_heads", 2},
                                 {"rms_norm_eps", 1e-5},
                                 {"max_position_embeddings", 64},
                                 {"tie_word_embeddings", tied},
                                 {"initializer_range", 0.3}},
                                "config.json");
}

SequenceBatch batch_of(int64_t length) {
  SequenceBatch batch;
  for (int64_t i = 0; i < length; ++i) {
    batch.tokens.push_back((i * 17 + length) % 61);
    batch.targets.push_back(i % 3 == 0 ? kIgnoreTarget : (i * 17 + 17 + length) % 61);
    batch.positions.push_back(i);
  }
  batch.cu_seqlens = {0, length};
  batch.sample_ids = {length};
  return batch;
}

// The step's gradients over micro-batches of three lengths; late: the weight gradients of all wait for the end.
std::map<std::string, at::Tensor> gradients(Transformer& model, bool delayed, bool late) {
  auto task = make_task("sft");
  GradientReducer reducer(model.parameters(), Communicator::self());
  reducer.begin_step();
  WeightGradientQueue queue;
  auto sink = [&](const at::Tensor& weight, const at::Tensor& gradient) { reducer.contribute(weight, gradient); };
  for (int64_t length : {5, 12, 7}) {
    at::Tensor loss = task->run(model, to_model(batch_of(length), model)).loss_sum;
    reducer.before_backward(false);
    DelayWeightGradients delay(delayed ? &queue : nullptr);
    torch::autograd::backward({loss}, {});
    if (!late) queue.run(sink);
  }
  queue.run(sink);
  reducer.finish();
  std::map<std::string, at::Tensor> result;
  for (const GradientSlice& slice : reducer.slices()) result[slice.name] = slice.gradient.clone();
  return result;
}

TEST(DelayedGradients, SameBits) {
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble})
    for (Recompute mode : {Recompute::kNone, Recompute::kSelective, Recompute::kFull})
      for (bool tied : {false, true}) {
        SCOPED_TRACE(str(dtype, " recompute ", static_cast<int>(mode), tied ? " tied" : ""));
        Transformer model(config(tied), dtype, 3);
        model.set_recompute(mode);
        model.set_training(true);
        const auto expected = gradients(model, false, false);
        for (bool late : {false, true}) {
          const auto actual = gradients(model, true, late);
          EXPECT_EQ(actual.size(), expected.size());
          for (const auto& [name, gradient] : expected) EXPECT_TRUE(same_bits(actual.at(name), gradient)) << name;
        }
      }
}

// 14 linear layers of 2 blocks wait, each with its own weight, and nothing else does.
TEST(DelayedGradients, WhatWaits) {
  Transformer model(config(false), at::kFloat, 3);
  auto task = make_task("sft");
  WeightGradientQueue queue;
  {
    DelayWeightGradients delay(&queue);
    torch::autograd::backward({task->run(model, to_model(batch_of(9), model)).loss_sum}, {});
  }
  EXPECT_EQ(queue.size(), 14u);
  std::set<const void*> waiting, linear;
  queue.run([&](const at::Tensor& w, const at::Tensor& g) {
    EXPECT_EQ(w.sizes(), g.sizes());
    waiting.insert(w.unsafeGetTensorImpl());
  });
  EXPECT_EQ(queue.size(), 0u);
  for (Linear* layer : model.linears()) linear.insert(layer->weight_OI.unsafeGetTensorImpl());
  EXPECT_EQ(waiting, linear);
  for (const Parameter& p : model.parameters())
    EXPECT_EQ(p.value.grad().defined(), !linear.contains(p.value.unsafeGetTensorImpl())) << p.name;

  LoraConfig adapter;
  adapter.rank = 4, adapter.alpha = 8, adapter.targets = {"all-linear"};
  attach_lora(model, adapter, 5);
  DelayWeightGradients delay(&queue);
  torch::autograd::backward({task->run(model, to_model(batch_of(9), model)).loss_sum}, {});
  EXPECT_EQ(queue.size(), 0u);  // frozen weights have no gradient, and adapters do not wait
}

TEST(DelayedGradients, ScopesNestAndEnd) {
  at::Tensor x = at::ones({2, 3}), w = at::ones({4, 3}).requires_grad_();
  auto backward = [&] { torch::autograd::backward({trireme::linear(x, w).sum()}, {}); };
  WeightGradientQueue outer, inner;
  {
    DelayWeightGradients a(&outer);
    {
      DelayWeightGradients b(&inner);
      backward();
    }
    backward();
    DelayWeightGradients off(nullptr);
    backward();
  }
  backward();
  EXPECT_EQ(outer.size(), 1u);
  EXPECT_EQ(inner.size(), 1u);
  EXPECT_TRUE(same_bits(w.grad(), at::full({4, 3}, 4.0f)));  // two backwards, two rows each
  // Behind a view the gradient has to go through the graph.
  torch::autograd::backward({trireme::linear(x, w.slice(0, 0, 2)).sum()}, {});
  EXPECT_EQ(w.grad()[0][0].item<float>(), 6.0f);
}

// Who waits for other ranks in backward computes what was put off, the oldest first, and only where that is wanted.
TEST(DelayedGradients, FillTheTimeOfAWait) {
  at::Tensor x = at::ones({2, 3}), w = at::ones({4, 3}).requires_grad_(), v = at::ones({5, 3}).requires_grad_();
  WeightGradientQueue queue;
  std::vector<int64_t> rows;
  auto sink = [&](const at::Tensor&, const at::Tensor& gradient) { rows.push_back(gradient.size(0)); };
  auto backward = [&] {
    for (const at::Tensor& weight : {w, v}) torch::autograd::backward({trireme::linear(x, weight).sum()}, {});
  };
  EXPECT_FALSE(compute_waiting_gradient());
  {
    DelayWeightGradients kept(&queue);
    backward();
    EXPECT_FALSE(compute_waiting_gradient());
  }
  DelayWeightGradients fills(&queue, sink);
  EXPECT_TRUE(compute_waiting_gradient());
  EXPECT_TRUE(compute_waiting_gradient());
  EXPECT_FALSE(compute_waiting_gradient());
  EXPECT_EQ(rows, (std::vector<int64_t>{4, 5}));
  EXPECT_EQ(queue.size(), 0u);
}

TEST(DelayedGradients, NothingIsKeptAfterwards) {
  WeightGradientQueue queue;
  at::Tensor w[2] = {at::ones({4, 3}).requires_grad_(), at::ones({4, 4}).requires_grad_()};
  at::Storage storage;  // of the second layer's input
  {
    at::Tensor hidden = trireme::linear(at::ones({2, 3}), w[0]);
    storage = hidden.storage();
    DelayWeightGradients delay(&queue);
    torch::autograd::backward({trireme::linear(hidden, w[1]).sum()}, {});
  }
  EXPECT_GT(storage.use_count(), 1u);
  std::vector<size_t> users;
  queue.run([&](const at::Tensor&, const at::Tensor&) { users.push_back(storage.use_count()); });
  ASSERT_EQ(users.size(), 2u);
  EXPECT_EQ(users[1], 1u);  // freed before the next product, not with the whole queue
  EXPECT_EQ(storage.use_count(), 1u);
}

}  // namespace
}  // namespace trireme
