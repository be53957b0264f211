// A model cut over the tensor axis is the whole model: loss, hits, logits and the gradient of every parameter, in fp64, on
// 1, 2 and 4 ranks; with more ranks than key heads, uneven vocabularies and MLPs, biases, q/k norms, tied heads, adapters
// with dropout, packed rows and recomputation. Broken seams are told from whole ones.
#include "support.h"
#include "tiny_model.h"

#include <ATen/Parallel.h>

#include "base/check.h"
#include "comm/process.h"
#include "model/initialize.h"
#include "model/lora.h"
#include "ops/ops.h"
#include "parallel/gather.h"
#include "parallel/placement.h"
#include "parallel/tensor_parallel.h"

namespace trireme {
namespace {

using test::config_of;
using test::input_of;
using test::learnt;
using test::near;
using test::random_row;
using test::small_config;

const Communicator& world() {
  static Process process;
  static Communicator world = Communicator::world();
  return world;
}

struct Case {
  const char* name;
  Json config;
  bool lora = false;
  Recompute recompute = Recompute::kNone;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

// Whatever the number of rows, products go on with those that are here, and are summed in two pieces.
constexpr RowOverlap kOverlap{.over_mpi = true, .least_rows = 1, .num_pieces = 2};

std::unique_ptr<Transformer> build(const Case& c, at::ScalarType dtype, const Communicator& tensor, const RowOverlap& overlap = {}) {
  auto model = std::make_unique<Transformer>(config_of(c.config), dtype, 1, Weights::kRandom, at::kMeta);
  if (c.lora) attach_lora(*model, {4, 8.0, 0.2, false, {"all-linear"}}, 1);
  apply_tensor_parallel(*model, tensor, overlap);
  model->materialize(at::kCPU, 1, [](const std::string&) { return true; });
  for (auto& p : model->parameters())  // neither zeros nor ones: they would hide what is not computed
    if (p.value.dim() == 1 || p.name.ends_with(".lora_B.weight")) fill_normal(p, 5, 0.4);
  model->set_training(true);
  model->set_recompute(c.recompute);
  return model;
}

// A packed run of 36 tokens: a multiple of every number of ranks tested.
ModelInput packed() {
  ModelInput input = learnt(input_of({random_row(9, 1), random_row(2, 2), random_row(25, 3)}));
  input.dropout_seed = 9;
  return input;
}

struct Outcome {
  double loss = 0;
  int64_t correct = 0;
  std::map<std::string, at::Tensor> gradients;  // whole
};

// The gradient of a parameter is the sum over the ranks of what each has for its slice.
Outcome run(Transformer& model, const Communicator& tensor, const CrossEntropyTerms& terms = {}) {
  const ModelInput input = packed();
  LossSum loss = model.cross_entropy(model.forward(input), input.targets_T, 1, terms);
  loss.sum.backward();
  Outcome out{loss.sum.item<double>(), loss.correct.item<int64_t>(), {}};
  for (const auto& p : model.parameters()) {
    if (!p.value.requires_grad()) continue;
    at::Tensor whole = at::zeros(p.shard.global_shape, p.value.options().requires_grad(false)), part = whole;
    for (size_t d = 0; d < p.shard.offset.size(); ++d)
      part = part.narrow(static_cast<int64_t>(d), p.shard.offset[d], p.value.size(static_cast<int64_t>(d)));
    part.copy_(p.value.grad());
    tensor.all_reduce(whole);
    out.gradients[p.name] = whole;
  }
  return out;
}

// Relative Frobenius norm of the difference, of the worst parameter.
double worst_gradient(const Outcome& a, const Outcome& b) {
  EXPECT_EQ(a.gradients.size(), b.gradients.size());
  double worst = 0;
  for (const auto& [name, whole] : b.gradients)
    worst = std::max(worst, (a.gradients.at(name) - whole).norm().item<double>() / whole.norm().item<double>());
  return worst;
}

// 36 tokens, sums of at most some hundred terms in another order: 2^-53 each, through two layers and back.
constexpr double kGradientBound = 1e-12;

class TensorParallel : public testing::TestWithParam<Case> {
 protected:
  TensorParallel() { at::set_num_threads(1); }
};

TEST_P(TensorParallel, IsTheWholeModel) {
  auto whole = build(GetParam(), at::kDouble, Communicator::self());
  const Outcome expected = run(*whole, Communicator::self());
  for (const RowOverlap& overlap : {RowOverlap{}, kOverlap}) {
    whole->set_training(true);
    auto cut = build(GetParam(), at::kDouble, world(), overlap);
    const Outcome got = run(*cut, world());
    EXPECT_NEAR(got.loss, expected.loss, 1e-13 * expected.loss);
    EXPECT_EQ(got.correct, expected.correct);
    EXPECT_LT(worst_gradient(got, expected), kGradientBound);
    at::NoGradGuard no_grad;
    whole->set_training(false), cut->set_training(false);
    EXPECT_TRUE(near(cut->logits(cut->all_rows(cut->forward(packed()))), whole->logits(whole->forward(packed()))));
  }
}

TEST_P(TensorParallel, ARankHoldsItsShareOfEveryMatrix) {
  auto whole = build(GetParam(), at::kDouble, Communicator::self()), cut = build(GetParam(), at::kDouble, world());
  const int64_t n = world().size();
  int64_t held = 0, sliced = 0;
  for (const auto& p : cut->parameters()) held += p.value.numel();
  for (const auto& p : whole->parameters()) {
    const bool key = p.name.find(".k_proj.") != std::string::npos || p.name.find(".v_proj.") != std::string::npos;
    const bool row = p.name.find(".o_proj.") != std::string::npos || p.name.find(".down_proj.") != std::string::npos;
    const bool replicated = p.name.ends_with("norm.weight") || p.name.ends_with(row ? ".lora_B.weight" : ".lora_A.weight") ||
                            (row && p.name.ends_with(".bias"));
    sliced += replicated ? p.value.numel() * n : p.value.numel() * (key ? std::max<int64_t>(1, n / cut->config().num_kv_heads) : 1);
  }
  EXPECT_EQ(world().sum(held), sliced);
}

// What rank 0 writes is the whole model, and nobody else is handed a tensor.
TEST_P(TensorParallel, IsGatheredIntoTheWholeModel) {
  auto whole = build(GetParam(), at::kDouble, Communicator::self()), cut = build(GetParam(), at::kDouble, world());
  const auto sources = whole_tensors(cut->parameters(), world());
  const auto expected = whole->parameters();
  ASSERT_EQ(sources.size(), expected.size());
  for (size_t i = 0; i < sources.size(); ++i) {
    const at::Tensor got = sources[i].get();
    EXPECT_EQ(got.defined(), world().rank() == 0);
    EXPECT_EQ(sources[i].name, expected[i].name);
    if (got.defined()) {
      EXPECT_TRUE(test::same_bits(got, expected[i].value.detach())) << expected[i].name;
    }
  }
}

const Case kCases[] = {
    {"llama", small_config("llama")},
    {"one_key_head", small_config("llama", {{"num_key_value_heads", 1}})},
    {"uneven", small_config("llama", {{"vocab_size", 67}, {"intermediate_size", 41}})},
    {"tied", small_config("llama", {{"tie_word_embeddings", true}})},
    {"qwen2_biases", small_config("qwen2")},
    {"llama_all_biases", small_config("llama", {{"attention_bias", true}, {"mlp_bias", true}})},
    {"qwen3_norms", small_config("qwen3")},
    {"lora", small_config("qwen3", {{"tie_word_embeddings", true}}), true},
    {"lora_biases", small_config("llama", {{"attention_bias", true}, {"mlp_bias", true}, {"num_key_value_heads", 1}}), true},
    {"full_recompute", small_config("llama"), false, Recompute::kFull},
    {"selective_recompute", small_config("llama"), true, Recompute::kSelective},
    {"selective_recompute_of_all", small_config("qwen3"), false, Recompute::kSelective},
};
INSTANTIATE_TEST_SUITE_P(Models, TensorParallel, testing::ValuesIn(kCases), [](const auto& info) { return std::string(info.param.name); });

TEST(TensorParallelLoss, SmoothedLabelsAndZLossAreTheWholeModels) {
  const Case c = kCases[2];  // an uneven vocabulary
  auto whole = build(c, at::kDouble, Communicator::self()), cut = build(c, at::kDouble, world());
  for (const CrossEntropyTerms& terms : {CrossEntropyTerms{0.1, 0}, {0, 0.02}, {0.1, 0.02}}) {
    for (auto* model : {whole.get(), cut.get()})
      for (auto& p : model->parameters()) p.value.mutable_grad().reset();
    const Outcome expected = run(*whole, Communicator::self(), terms), got = run(*cut, world(), terms);
    EXPECT_NEAR(got.loss, expected.loss, 1e-13 * expected.loss);
    EXPECT_EQ(got.correct, expected.correct);
    EXPECT_LT(worst_gradient(got, expected), kGradientBound);
  }
}

TEST(TensorParallelFaults, ABrokenSeamIsToldFromAWholeOne) {
  if (world().size() == 1) GTEST_SKIP() << "one rank has no seams";
  const Case c = kCases[0];
  auto whole = build(c, at::kDouble, Communicator::self());
  const Outcome expected = run(*whole, Communicator::self());
  const int n = world().size();
  auto with = [](Linear& layer, const std::function<void(RowSum&)>& change) {
    auto sum = std::make_shared<RowSum>(*layer.after);
    change(*sum);
    layer.after = sum;
  };
  const std::pair<const char*, std::function<void(Transformer&)>> faults[] = {
      {"a sum over the ranks left out", [&](Transformer& m) {
         with(m.blocks()[1].down, [n](RowSum& sum) {
           sum.start = [n](const at::Tensor& part, const at::Tensor& y) {
             part.copy_(y.chunk(n)[world().rank()]);
             return [] {};
           };
         });
       }},
      {"a gradient scaled by the ranks", [&](Transformer& m) {
         with(m.blocks()[0].o, [n](RowSum& sum) {
           sum.gather = [right = sum.gather, n](const at::Tensor& part) { return right(part * n); };
         });
       }},
      {"rows of another rank", [&](Transformer& m) {
         with(m.blocks()[0].down, [](RowSum& sum) {
           sum.start = [right = sum.start](const at::Tensor& part, const at::Tensor& y) { return right(part, y.roll(1, 0)); };
         });
       }},
      {"rows that are here at another rank's place", [&](Transformer& m) {
         with(m.blocks()[0].o, [n](RowSum& sum) {
           sum.gather = [right = sum.gather, n](const at::Tensor& part) {
             const at::Tensor all = right(part).wait();
             return ArrivingRows(all, part, (world().rank() + 1) % n * part.size(0), [] {});
           };
         });
       }},
      {"a part of the vocabulary misplaced", [&](Transformer& m) {
         ModelSeams seams = m.seams();
         seams.vocabulary->first = 0;
         m.set_seams(std::move(seams));
       }},
  };
  for (const auto& [what, break_it] : faults) {
    auto cut = build(c, at::kDouble, world());
    break_it(*cut);
    const Outcome got = run(*cut, world());
    EXPECT_GT(worst_gradient(got, expected), 1e-3) << what;
  }
}

TEST(TensorParallelChecks, WhatCannotBeSharedOutIsRefusedWithWhatCan) {
  const ModelConfig config = config_of(small_config("llama", {{"num_attention_heads", 6}, {"num_key_value_heads", 2}}));
  for (int n : {1, 2, 6}) check_tensor_parallel(config, n);
  for (int n : {3, 4, 5, 8}) {
    try {
      check_tensor_parallel(config, n);
      ADD_FAILURE() << n;
    } catch (const ConfigError& error) {
      const char* what = n == 3 ? "2 key heads" : n == 5 ? "6 heads and the 2 key heads" : "6 heads";
      EXPECT_STREQ(error.what(), str("parallel.tensor=", n, ": the ", what, " of config.json cannot be shared out evenly over ", n,
                                     " ranks; sizes that can: 1, 2, 6").c_str());
    }
  }
}

TEST(Placements, GatheringAndScatteringAreEachOthersGradient) {
  const int n = world().size(), me = world().rank();
  at::Tensor x = at::arange(6, at::kDouble).view({3, 2}).add(10.0 * me).requires_grad_(true);
  at::Tensor whole = all_gather(Placed<Shard<0>>{x}, TensorAxis{world()}).local;
  for (int r = 0; r < n; ++r) EXPECT_TRUE(near(whole.narrow(0, 3 * r, 3), at::arange(6, at::kDouble).view({3, 2}).add(10.0 * r)));
  (whole * (me + 1)).sum().backward();  // every rank's use of every row
  EXPECT_TRUE(near(x.grad(), at::full({3, 2}, n * (n + 1) / 2.0, at::kDouble)));
  at::Tensor y = at::full({2 * n, 2}, me + 1.0, at::kDouble).requires_grad_(true);
  at::Tensor part = reduce_scatter(Placed<Partial>{y}, TensorAxis{world()}).local;
  EXPECT_TRUE(near(part, at::full({2, 2}, n * (n + 1) / 2.0, at::kDouble)));
  (part * (me + 1)).sum().backward();
  for (int r = 0; r < n; ++r) EXPECT_TRUE(near(y.grad().narrow(0, 2 * r, 2), at::full({2, 2}, r + 1.0, at::kDouble)));
}

template <typename Value>
constexpr bool kScatters = requires(Value value, TensorAxis axis) { reduce_scatter(value, axis); };
template <typename Value>
constexpr bool kGathers = requires(Value value, TensorAxis axis) { all_gather(value, axis); };
static_assert(kScatters<Placed<Partial>> && kGathers<Placed<Shard<0>>>);
static_assert(!kScatters<Placed<Replicate>> && !kScatters<Placed<Shard<0>>>, "what is whole would be multiplied by the ranks");
static_assert(!kGathers<Placed<Partial>> && !kGathers<Placed<Replicate>> && !kGathers<Placed<Shard<1>>>);
static_assert(!kScatters<Placed<Partial, MeshAxis::kData>> && !kGathers<Placed<Shard<0>, MeshAxis::kData>>, "another axis' sum");

// What the types cannot see is named on every rank.
TEST(Placements, AValueThatDiffersIsNamed) {
  const int me = world().rank();
  auto refusal = [&](const at::Tensor& local, bool same_values) -> std::string {
    try {
      check_placement(local, same_values, world(), "the batch");
    } catch (const InternalError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(refusal(at::ones({3}), true), "");
  EXPECT_EQ(refusal(at::full({3}, me), false), "");
  if (world().size() == 1) return;
  EXPECT_NE(refusal(at::full({3}, me), true).find("the batch is not the same on all ranks of its axis: rank 1 has"), std::string::npos);
  EXPECT_NE(refusal(at::ones({3 + (me == 1)}), false).find("the batch has not the same shape on all ranks of its axis: rank 1 has Float [4], rank 0 Float [3]"),
            std::string::npos);
}

}  // namespace
}  // namespace trireme
