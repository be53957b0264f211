// Operations through the kernels, emulated on the host, against the CPU code: values and gradients of every argument.
#include "support.h"

#include "base/check.h"
#include "emulated_ops.h"
#include "ops/attention_device.h"
#include "ops/ops.h"
#include "optim/clip.h"
#include "optim/optimizer.h"

namespace trireme {
namespace {

using test::Emulated;
using test::near;
using test::num_calls;
using test::same_bits;

using Op = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

struct Outcome {
  std::vector<at::Tensor> outputs, gradients;
};

Outcome run(const Op& op, const std::vector<at::Tensor>& inputs) {
  std::vector<at::Tensor> leaves;
  for (const auto& x : inputs) leaves.push_back(x.detach().clone().requires_grad_(x.is_floating_point()));
  Outcome out{op(leaves), {}};
  at::Tensor loss;
  for (size_t i = 0; i < out.outputs.size(); ++i) {
    at::Tensor weights = at::linspace(-1, 1 + static_cast<double>(i), out.outputs[i].numel(), at::kFloat).view(out.outputs[i].sizes()).to(out.outputs[i].scalar_type());
    at::Tensor term = (out.outputs[i] * weights).sum();
    loss = loss.defined() ? loss + term : term;
  }
  loss.backward();
  for (const auto& x : leaves) out.gradients.push_back(x.grad());
  return out;
}

void expect_same(const Op& op, const std::vector<at::Tensor>& inputs, int expected_calls) {
  const Outcome expected = run(op, inputs);
  const Outcome got = [&] {
    Emulated emulated;
    return run(op, inputs);
  }();
  EXPECT_EQ(num_calls, expected_calls);
  for (size_t i = 0; i < expected.outputs.size(); ++i) EXPECT_TRUE(near(got.outputs[i], expected.outputs[i]));
  for (size_t i = 0; i < expected.gradients.size(); ++i)
    if (expected.gradients[i].defined()) {
      // Sums over rows, in another order, of terms that may be rounded the other way.
      EXPECT_TRUE(near(got.gradients[i], expected.gradients[i], 4));
    }
}

class OpsEmulated : public testing::TestWithParam<at::ScalarType> {
 protected:
  at::Tensor random(at::IntArrayRef sizes) const { return at::randn(sizes, at::kFloat).to(GetParam()); }
};

TEST_P(OpsEmulated, RmsNorm) {
  at::manual_seed(1);
  expect_same([](const auto& in) { return std::vector{rms_norm(in[0], in[1], 1e-5)}; }, {random({7, 48}), random({48})}, 2);
  expect_same([](const auto& in) { return std::vector{rms_norm(in[0], in[1], 1e-5)}; }, {random({5, 3, 17}), random({17})}, 2);
  expect_same([](const auto& in) {
    auto [sum, y] = add_rms_norm(in[0], in[1], in[2], 1e-6);
    return std::vector{sum, y};
  }, {random({9, 40}), random({9, 40}), random({40})}, 2);
}

TEST_P(OpsEmulated, LayerNorm) {
  at::manual_seed(1);
  expect_same([](const auto& in) { return std::vector{layer_norm(in[0], in[1], in[2], 1e-5)}; }, {random({7, 48}), random({48}), random({48})}, 2);
  expect_same([](const auto& in) { return std::vector{layer_norm(in[0], in[1], in[2], 1e-5)}; }, {random({5, 3, 17}), random({17}), random({17})}, 2);
  expect_same([](const auto& in) {
    auto [sum, y] = add_layer_norm(in[0], in[1], in[2], in[3], 1e-6);
    return std::vector{sum, y};
  }, {random({9, 40}), random({9, 40}), random({40}), random({40})}, 2);
}

TEST_P(OpsEmulated, Rope) {
  at::manual_seed(2);
  const at::Tensor angles = at::rand({6, 16}) * 6;
  for (int64_t rotary : {16, 8})
    expect_same([&](const auto& in) { return std::vector{rope(in[0], angles.cos().slice(1, 0, rotary), angles.sin().slice(1, 0, rotary))}; }, {random({6, 3, 16})}, 2);
}

TEST_P(OpsEmulated, Swiglu) {
  at::manual_seed(3);
  expect_same([](const auto& in) { return std::vector{swiglu(in[0], in[1])}; }, {random({5, 33}), random({5, 33})}, 2);
}

TEST_P(OpsEmulated, Geglu) {
  at::manual_seed(3);
  expect_same([](const auto& in) { return std::vector{geglu(in[0], in[1])}; }, {random({5, 33}), random({5, 33})}, 2);
}

TEST_P(OpsEmulated, Dropout) {
  at::manual_seed(4);
  const DropoutKey key{0.3, 5, 6, at::arange(7, at::kLong) * 1000003, 96};
  expect_same([&](const auto& in) { return std::vector{dropout(in[0], key)}; }, {random({7, 40})}, 2);
  // Forward, and for each gradient that goes through the mask: of a, and of x, which is added to. By the kernels that drop as they
  // multiply, or by the mask alone: of float32, of widths that are not in whole 16 bytes, of ranks above 256.
  for (const auto& [width, rank] : std::vector<std::pair<int64_t, int64_t>>{{40, 4}, {136, 20}, {36, 4}, {8, 300}}) {
    const double small = 1 / std::sqrt(static_cast<double>(width));  // sums of the size of 1, where one rounding of a term is one of the sum
    const at::Tensor base = random({24, width}) * small, a = random({rank, width}) * small, b = random({24, rank}) / std::sqrt(static_cast<double>(rank));
    expect_same([&](const auto& in) { return std::vector{lora_linear(in[0], base, {}, in[1], in[2], 2.0, key)}; }, {random({7, width}), a, b}, 3);
  }
}

// Two segments, the second with more keys than queries; a window; four heads to two of keys.
TEST_P(OpsEmulated, Attention) {
  at::manual_seed(4);
  AttentionSpec spec{{0, 21, 40}, {0, 21, 60}};
  for (int64_t window : {-1, 9}) {
    spec.window = window;
    expect_same([&](const auto& in) { return std::vector{attention(in[0], in[1], in[2], spec)}; }, {random({40, 4, 64}), random({60, 2, 64}), random({60, 2, 64})},
                GetParam() == at::kFloat ? 0 : 2);
  }
  expect_same([&](const auto& in) { return std::vector{attention(in[0], in[1], in[2], spec)}; }, {random({40, 2, 24}), random({60, 2, 24}), random({60, 2, 24})}, 0);
}

TEST(OpsEmulatedSettings, GradientsAreAddedInOneOrderUnlessTheyNeedNot) {
  static bool said = false;
  static kernels::Kernels kernels = kernels::emulated_kernels();
  kernels.attention_backward = [](const kernels::AttentionBackward& call, kernels::Stream stream) {
    said = call.deterministic;
    kernels::emulated_kernels().attention_backward(call, stream);
  };
  const auto gradient = [](bool deterministic) {
    set_kernel_settings({.deterministic = deterministic});
    set_kernels(at::kCPU, &kernels);
    at::manual_seed(5);
    at::Tensor x = at::randn({33, 2, 64}).to(at::kBFloat16).requires_grad_();
    attention(x, x, x, {{0, 33}, {0, 33}}).sum().backward();
    set_kernels(at::kCPU, nullptr);
    set_kernel_settings({});
    return x.grad().to(at::kFloat);
  };
  const at::Tensor in_order = gradient(true);
  EXPECT_TRUE(said);
  const at::Tensor in_any = gradient(false);
  EXPECT_FALSE(said);
  EXPECT_LE((in_any - in_order).norm().item<float>(), 0.01 * in_order.norm().item<float>());
}

// What is in the cache behind the lengths is not to be seen. Three sequences, one without keys, in a cache of 150 rows; four heads to two.
TEST_P(OpsEmulated, DecodeAttention) {
  at::manual_seed(5);
  for (const int64_t dim : {64, 24})
    for (const int64_t queries : {1, 3})
      for (const int64_t window : {-1, 9}) {
        const at::Tensor lengths = at::tensor(std::vector<int32_t>{130, 0, 7}, at::kInt);
        const at::Tensor q = random({3 * queries, 4, dim}), k = random({3, 150, 2, dim}), v = random({3, 150, 2, dim});
        const at::Tensor expected = decode_attention(q, k, v, lengths, window);
        for (int64_t b = 0; b < 3; ++b) {
          const int64_t length = lengths[b].item<int64_t>();
          k[b].slice(0, length).fill_(60), v[b].slice(0, length).fill_(-60);
          if (length == 0) continue;
          const AttentionSpec spec{{0, queries}, {0, length}, window};
          EXPECT_TRUE(same_bits(expected.narrow(0, b * queries, queries), attention(q.narrow(0, b * queries, queries), k[b].slice(0, 0, length), v[b].slice(0, 0, length), spec)));
        }
        EXPECT_TRUE(same_bits(expected.narrow(0, queries, queries), at::zeros({queries, 4, dim}, q.options())));
        EXPECT_TRUE(near(plain_decode_attention(q, k, v, lengths, window, 1 / std::sqrt(static_cast<double>(dim))), expected));
        Emulated emulated;
        EXPECT_TRUE(near(decode_attention(q, k, v, lengths, window), expected));
        EXPECT_EQ(num_calls, GetParam() != at::kFloat && dim == 64 ? 1 : 0);
      }
}

const at::Tensor kTargets = at::tensor(std::vector<int64_t>{3, -100, 0, 36, -100, 7, 7, 12, 1}, at::kLong);

TEST_P(OpsEmulated, LinearCrossEntropy) {
  at::manual_seed(6);
  for (auto [chunk_rows, gradient_scale] : std::vector<std::pair<int64_t, double>>{{0, 1}, {0, 256}, {3, 1}}) {
    LossSum loss;
    const Op op = [&](const auto& in) {
      loss = linear_cross_entropy(in[0], in[1], kTargets, chunk_rows, gradient_scale);
      return std::vector{loss.sum};
    };
    const std::vector<at::Tensor> inputs = {random({9, 24}), random({37, 24})};
    run(op, inputs);
    const int64_t correct = loss.correct.item<int64_t>();
    // Of one chunk or of three; and of the gradients of hidden and head by what came in.
    expect_same(op, inputs, (chunk_rows ? 3 : 1) + 2);
    EXPECT_EQ(loss.count, 7);
    EXPECT_EQ(loss.correct.item<int64_t>(), correct);
  }
}

TEST_P(OpsEmulated, LinearCrossEntropyWithItsTerms) {
  at::manual_seed(6);
  for (const CrossEntropyTerms& terms : {CrossEntropyTerms{0.2, 0}, {0, 0.05}, {0.2, 0.05}})
    expect_same([&](const auto& in) { return std::vector{linear_cross_entropy(in[0], in[1], kTargets, 0, 1, nullptr, terms).sum}; }, {random({9, 24}), random({37, 24})}, 3);
}

TEST_P(OpsEmulated, LinearCrossEntropyOfNothing) {
  const at::Tensor none = at::full({9}, -100, at::kLong);
  expect_same([&](const auto& in) { return std::vector{linear_cross_entropy(in[0], in[1], none).sum}; }, {random({9, 24}), random({37, 24})}, 2);
}

TEST_P(OpsEmulated, LinearCrossEntropyOfAFrozenHeadIsScaledByNothing) {
  at::manual_seed(6);
  const at::Tensor hidden = random({9, 24}), head = random({37, 24});
  auto gradient = [&] {
    at::Tensor leaf = hidden.clone().requires_grad_();
    linear_cross_entropy(leaf, head, kTargets).sum.backward();
    return leaf.grad();
  };
  const at::Tensor expected = gradient();
  Emulated emulated;
  EXPECT_TRUE(near(gradient(), expected, 4));
  EXPECT_EQ(num_calls, 2);
}

// Ranks that hold rows of the head, one after another: each begins anew, and stops where it would have to wait for one behind it.
struct Waits {};
template <typename F>
void for_ranks(int num_ranks, const F& run) {
  std::vector<at::Tensor> combined;  // by the calls of `combine`
  for (bool again = true; again;) {
    again = false;
    at::Tensor next;
    for (int rank = 0; rank < num_ranks; ++rank) {
      size_t call = 0;
      try {
        run(rank, [&](at::Tensor x, bool maximum) {
          ASSERT_TRUE(x.is_contiguous());
          if (call < combined.size()) {
            x.copy_(combined[call++]);
            return;
          }
          next = !next.defined() ? x.clone() : maximum ? at::maximum(next, x) : next + x;
          throw Waits();
        });
      } catch (const Waits&) {
        again = true;
      }
    }
    if (again) combined.push_back(next);
  }
}

TEST_P(OpsEmulated, LinearCrossEntropyOfPartsOfTheVocabulary) {
  at::manual_seed(7);
  const at::Tensor hidden = random({9, 24}), head = random({37, 24});
  head.slice(0, 36).copy_(head.slice(0, 1, 2));  // equal logits on two ranks: the first of them counts
  at::Tensor whole_hidden = hidden.clone().requires_grad_(), whole_head = head.clone().requires_grad_();
  const CrossEntropyTerms terms{0.2, 0.05};
  const LossSum whole = linear_cross_entropy(whole_hidden, whole_head, kTargets, 4, 2, nullptr, terms);
  whole.sum.backward();

  Emulated emulated;
  const std::vector<int64_t> bounds = {0, 11, 12, 37};
  std::vector<at::Tensor> grad_head(3);
  at::Tensor grad_hidden = at::zeros({9, 24});
  for_ranks(3, [&](int rank, const auto& combine) {
    const VocabularyPart part{bounds[rank], 37, combine};
    at::Tensor h = hidden.clone().requires_grad_(), w = head.slice(0, bounds[rank], bounds[rank + 1]).clone().requires_grad_();
    const LossSum loss = linear_cross_entropy(h, w, kTargets, 4, 2, &part, terms);
    loss.sum.backward();
    EXPECT_TRUE(near(loss.sum, whole.sum.detach()));
    EXPECT_EQ(loss.correct.template item<int64_t>(), whole.correct.template item<int64_t>());
    grad_hidden += h.grad();
    grad_head[rank] = w.grad();
  });
  EXPECT_TRUE(near(grad_hidden, whole_hidden.grad(), 4, GetParam()));
  EXPECT_TRUE(near(at::cat(grad_head), whole_head.grad(), 4));
  EXPECT_GT(test::num_calls_of<&kernels::Kernels::cross_entropy_finish>, 0);
}

TEST_P(OpsEmulated, Embedding) {
  at::manual_seed(8);
  const at::Tensor ids = at::tensor(std::vector<int64_t>{4, 0, 4, 10, 4, 2, 0}, at::kLong);
  for (int64_t size : {24, 7}) expect_same([&](const auto& in) { return std::vector{trireme::embedding(in[0], ids)}; }, {random({11, size})}, 2);
}

TEST_P(OpsEmulated, Bias) {
  at::manual_seed(9);
  for (int64_t rows : {5, 200}) expect_same([](const auto& in) { return std::vector{trireme::linear(in[0], in[1], in[2])}; }, {random({rows, 8}), random({17, 8}), random({17})}, 1);
}

// Several tensors of two weight decays over three steps, of which the host knows the scale of two and the device of one.
TEST_P(OpsEmulated, AdamW) {
  at::manual_seed(10);
  std::vector<at::Tensor> weights, gradients;
  for (int64_t size : {1, 33, 9000}) weights.push_back(random({size})), gradients.push_back(at::randn({3, size}));
  auto train = [&] {
    std::vector<OptimTensor> tensors;
    for (size_t i = 0; i < weights.size(); ++i) tensors.push_back({"w", weights[i].clone(), at::empty({weights[i].numel()}), i == 1 ? 0.0 : 0.1});
    Optimizer optimizer(tensors, {});
    for (int64_t step = 0; step < 3; ++step) {
      for (size_t i = 0; i < tensors.size(); ++i) tensors[i].grad.copy_(gradients[i][step]);
      if (step == 0) optimizer.step(1e-2);
      if (step == 1) optimizer.step(1e-2, 0.7);
      if (step == 2) optimizer.step(1e-2, at::full({}, 0.3, at::kFloat));
    }
    std::vector<at::Tensor> out;
    for (const auto& t : tensors) out.push_back(t.weight);
    for (const auto& s : optimizer.state()) out.push_back(s.value);
    for (const auto& s : optimizer.state()) {
      if (s.kind != "master") continue;
      EXPECT_TRUE(same_bits(tensors[s.tensor].weight, s.value.to(GetParam())));
    }
    EXPECT_EQ(optimizer.num_steps(), 3);
    return out;
  };
  const auto expected = train();
  Emulated emulated;
  const auto got = train();
  EXPECT_EQ(num_calls, 6);  // one for each weight decay
  ASSERT_EQ(got.size(), expected.size());
  // Ten roundings a step; the weights of 16 bits may be rounded to the neighbour.
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(near(got[i], expected[i], i < weights.size() ? 0.5 : 0.2));
}

TEST_P(OpsEmulated, SgdAndLion) {
  at::manual_seed(13);
  const at::Tensor weight = random({9000}), gradients = at::randn({3, 9000});
  for (const OptimizerOptions& options : {OptimizerOptions{.kind = OptimizerKind::kSgd}, {.kind = OptimizerKind::kSgd, .momentum = 0}, {.kind = OptimizerKind::kLion}}) {
    auto train = [&] {
      at::Tensor w = weight.clone(), g = at::empty({9000});
      Optimizer optimizer({{"w", w, g, 0.1}}, options);
      for (int64_t step = 0; step < 3; ++step) {
        g.copy_(gradients[step]);
        optimizer.step(1e-2, 0.7);
      }
      std::vector<at::Tensor> out = {w};
      for (const auto& s : optimizer.state()) out.push_back(s.value);
      return out;
    };
    const auto expected = train();
    Emulated emulated;
    const auto got = train();
    EXPECT_EQ(num_calls, 3);
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(near(got[i], expected[i], i == 0 ? 0.5 : 0.2));  // as of AdamW
  }
}

// Numbers of which no operation rounds away anything but quotients and roots: products may be added without being rounded first,
// as some processors do, and nothing changes.
TEST(OpsDevice, AdamWWithoutMastersHasTheBitsOfTheHost) {
  at::manual_seed(12);
  struct Part {
    int64_t size;
    Places places;
  };
  const std::vector<Part> parts = {{1, {}}, {9001, {.first = 3}}, {8200, {.first = 8}}, {60 * 37 - 5, {5, 11, 37, 100}}, {64 * 24, {0, 16, 24, 64}}};
  std::vector<at::Tensor> weights, gradients;
  for (const Part& part : parts) {
    weights.push_back(at::randn({part.size}).to(at::kBFloat16));
    gradients.push_back(at::randint(-64, 64, {3, part.size}).to(at::kFloat) / 32);
  }
  auto train = [&] {
    std::vector<OptimTensor> tensors;
    for (size_t i = 0; i < parts.size(); ++i) tensors.push_back({str("w", i), weights[i].clone(), at::empty({parts[i].size}), 0.0, parts[i].places});
    Optimizer optimizer(tensors, {.beta1 = 0.5, .beta2 = 0.75, .epsilon = 0x1p-10, .masters = false, .seed = 7});
    for (int64_t step = 0; step < 3; ++step) {
      for (size_t i = 0; i < tensors.size(); ++i) tensors[i].grad.copy_(gradients[i][step]);
      optimizer.step((1 - std::pow(0.5, static_cast<double>(step + 1))) / 64);
    }
    std::vector<at::Tensor> out;
    for (const auto& t : tensors) out.push_back(t.weight);
    for (const auto& s : optimizer.state()) out.push_back(s.value);
    return out;
  };
  const auto expected = train();
  Emulated emulated;
  const auto got = train();
  EXPECT_EQ(num_calls, 3);
  ASSERT_EQ(got.size(), 3 * parts.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(same_bits(got[i], expected[i])) << i;
}

TEST_P(OpsEmulated, AdamWTakesNoStepOfAScaleThatIsNotFinite) {
  at::Tensor w = at::ones({40}, GetParam());
  Optimizer optimizer({{"w", w, at::ones({40}), 0.1}}, {});
  Emulated emulated;
  optimizer.step(0.1, at::full({}, std::nan(""), at::kFloat));
  EXPECT_TRUE(same_bits(w, at::ones({40}, GetParam())));
  for (const auto& s : optimizer.state()) EXPECT_TRUE(same_bits(s.value, s.kind == "master" ? at::ones({40}) : at::zeros({40})));
  EXPECT_EQ(num_calls, 1);
}

INSTANTIATE_TEST_SUITE_P(Types, OpsEmulated, testing::Values(at::kFloat, at::kBFloat16, at::kHalf), [](const auto& type) { return std::string(c10::toString(type.param)); });

TEST(OpsDevice, OtherDtypesOfTheHostGoToItsOwnCode) {
  Emulated emulated;
  rms_norm(at::ones({2, 8}, at::kDouble), at::ones({8}, at::kDouble), 1e-5);
  EXPECT_EQ(num_calls, 0);
}

TEST(OpsDevice, NormAndClip) {
  at::manual_seed(11);
  const std::vector<at::Tensor> gradients = {at::randn({40001}), at::randn({7}), at::randn({0})};
  const double scale = 1.0 / 37, norm = std::sqrt(squared_norm(gradients)) * scale;
  Emulated emulated;
  DeviceNorm device(at::kCPU);
  for (double max_norm : {0.0, 1.0, 1e6}) {
    device.measure(gradients);
    device.clip({max_norm, scale});
    const float of_two = device.factor.item<float>();
    device.measure(gradients, {max_norm, scale});
    EXPECT_EQ(device.factor.item<float>(), of_two);
    EXPECT_NEAR(device.squares.item<double>(), squared_norm(gradients), 1e-12 * squared_norm(gradients));  // 300 roundings of fp64
    EXPECT_FLOAT_EQ(device.norm.item<float>(), static_cast<float>(norm));
    EXPECT_FLOAT_EQ(device.factor.item<float>(), static_cast<float>(scale * clip_scale(norm, max_norm)));
  }
  EXPECT_EQ(num_calls, 9);
  device.measure(gradients, {1.0, scale, at::full({}, std::nan(""), at::kDouble)});
  EXPECT_TRUE(std::isnan(device.factor.item<float>()));
  device.measure({});
  EXPECT_EQ(device.squares.item<double>(), 0);
}

TEST(OpsDevice, NoStepBehindOneThatWasNotTaken) {
  Emulated emulated;
  DeviceNorm norm(at::kCPU);
  at::Tensor w = at::ones({4}), g = at::ones({4});
  Optimizer optimizer({{"w", w, g, 0.0}}, {});
  for (double value : {1.0, std::nan(""), 1.0}) {
    g.fill_(value);
    norm.measure({g});
    norm.clip({1, 1});
    optimizer.step(0.1, norm.factor);
  }
  EXPECT_EQ(norm.norm.item<float>(), 2);
  EXPECT_TRUE(near(w, at::full({4}, 0.9)));  // the first step of AdamW is the learning rate
  norm.resume();
  norm.clip({1, 1});
  optimizer.step(0.1, norm.factor);
  EXPECT_LT(w.max().item<float>(), 0.85);
}

TEST(OpsDevice, NumbersOfTheHost) {
  EXPECT_TRUE(same_bits(to_device({3, -1}, at::kCPU), at::tensor(std::vector<int64_t>{3, -1}, at::kLong)));
  EXPECT_TRUE(same_bits(to_device({3, -1}, at::kCPU, at::kInt), at::tensor(std::vector<int64_t>{3, -1}, at::kInt)));
  EXPECT_EQ(to_device({3, -1, 0}, at::kMeta).sizes(), at::IntArrayRef({3}));
}

TEST(OpsDevice, ADeviceWithoutKernelsIsAnError) { EXPECT_THROW(kernels_of(at::empty({2}, at::kMeta)), InternalError); }

}  // namespace
}  // namespace trireme
