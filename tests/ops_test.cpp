// Every operation against plain ATen formulas in fp64 with autograd, forward and backward, in every dtype, odd sizes.
#include "ops/ops.h"

#include <torch/csrc/autograd/autograd.h>
#include <ATen/Parallel.h>

#include <ATen/CPUGeneratorImpl.h>

#include "base/check.h"
#include "base/random.h"
#include "ops/attention_bf16.h"
#include "ops/dropout_mask.h"
#include "ops/loops.h"
#include "ops/product.h"
#include "support.h"

namespace trireme {
namespace {

using test::near;
using test::same_bits;
using Tensors = std::vector<at::Tensor>;
using Fn = std::function<at::Tensor(const Tensors&)>;

const std::vector<at::ScalarType> kDtypes = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};

at::Tensor random(std::vector<int64_t> shape, double scale = 1.0) {
  static auto generator = at::make_generator<at::CPUGeneratorImpl>(7);
  return at::randn(shape, generator, at::kDouble) * scale;
}

// Gradients of sum(fn(inputs) * weights) for inputs of `dtype`; inputs that do not float pass as they are.
struct Result {
  at::Tensor output;
  Tensors grads;
};
Result run(const Fn& fn, const Tensors& inputs, at::ScalarType dtype, const at::Tensor& weights) {
  Tensors leaves;
  for (const auto& input : inputs) {
    at::Tensor leaf = input.is_floating_point() ? input.to(dtype).clone() : input;
    if (leaf.is_floating_point()) leaf.requires_grad_();
    leaves.push_back(leaf);
  }
  Result result;
  result.output = fn(leaves);
  torch::autograd::backward({(result.output * weights.to(result.output.scalar_type())).sum()}, {});
  for (auto& leaf : leaves)
    if (leaf.is_floating_point()) result.grads.push_back(leaf.grad());
  return result;
}

// Inputs are rounded to the dtype first, so that both sides see the same values.
void compare(const Fn& fn, const Fn& reference, const Tensors& inputs, double factor = 1.0) {
  for (auto dtype : kDtypes) {
    Tensors rounded;
    for (const auto& input : inputs)
      rounded.push_back(input.is_floating_point() ? input.to(dtype).to(at::kDouble) : input);
    at::Tensor weights = random(reference(rounded).sizes().vec()).to(dtype).to(at::kDouble);
    Result actual = run(fn, rounded, dtype, weights), expected = run(reference, rounded, at::kDouble, weights);
    EXPECT_EQ(actual.output.scalar_type(), dtype);
    EXPECT_TRUE(near(actual.output, expected.output, factor)) << dtype;
    for (size_t i = 0; i < actual.grads.size(); ++i)
      EXPECT_TRUE(near(actual.grads[i], expected.grads[i], 2 * factor)) << dtype << " gradient " << i;
  }
}

at::Tensor plain_norm(const at::Tensor& x, const at::Tensor& w, double eps) {
  return w * x * (x.square().mean(-1, true) + eps).rsqrt();
}

TEST(RmsNorm, EqualsFormula) {
  for (int64_t size : {1, 16, 37, 100})
    compare([](const Tensors& t) { return rms_norm(t[0], t[1], 1e-5); },
            [](const Tensors& t) { return plain_norm(t[0], t[1], 1e-5); }, {random({70, size}), random({size})}, 3);
  compare([](const Tensors& t) { return rms_norm(t[0], t[1], 1e-6); },
          [](const Tensors& t) { return plain_norm(t[0], t[1], 1e-6); }, {random({5, 3, 24}), random({24})}, 3);
}

TEST(RmsNorm, AddsTheResidual) {
  for (int part : {0, 1, 2}) {  // the sum alone, the norm alone, both used
    auto pick = [part](const at::Tensor& sum, const at::Tensor& y) {
      return part == 0 ? sum * 1 : part == 1 ? y * 1 : sum * 0.5 + y;
    };
    compare(
        [&](const Tensors& t) {
          auto [sum, y] = add_rms_norm(t[0], t[1], t[2], 1e-5);
          return pick(sum, y) + 0 * t[2].sum();
        },
        [&](const Tensors& t) {
          at::Tensor sum = t[0] + t[1];
          return pick(sum, plain_norm(sum, t[2], 1e-5)) + 0 * t[2].sum();
        },
        {random({9, 37}), random({9, 37}), random({37})}, 4);
  }
}

TEST(RmsNorm, TakesAStridedWeight) {
  const at::Tensor x = random({5, 24}).to(at::kFloat), column = random({24, 3}).to(at::kFloat).select(1, 1);
  auto run_with = [&](const at::Tensor& weight) {
    at::Tensor leaf = weight.detach().requires_grad_();
    auto [sum, y] = add_rms_norm(x, x, leaf, 1e-5);
    at::Tensor all = at::stack({rms_norm(x, leaf, 1e-5), y});
    torch::autograd::backward({all.sum()}, {});
    return std::pair(all, leaf.grad());
  };
  const auto strided = run_with(column), dense = run_with(column.contiguous());
  EXPECT_TRUE(same_bits(strided.first, dense.first));
  EXPECT_TRUE(same_bits(strided.second, dense.second));
}

TEST(RmsNorm, WeightGradientDoesNotDependOnThreads) {
  at::Tensor x = random({1000, 40}), w = random({40}), weights = random({1000, 40});
  auto fn = [](const Tensors& t) { return rms_norm(t[0], t[1], 1e-5); };
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  Result one = run(fn, {x, w}, at::kFloat, weights);
  at::set_num_threads(3);
  Result three = run(fn, {x, w}, at::kFloat, weights);
  at::set_num_threads(before);
  for (size_t i = 0; i < 2; ++i) EXPECT_TRUE(same_bits(three.grads[i], one.grads[i]));
}

at::Tensor plain_layer_norm(const at::Tensor& x, const at::Tensor& w, const at::Tensor& b, double eps) {
  const at::Tensor centred = x - x.mean(-1, true);
  return centred * (centred.square().mean(-1, true) + eps).rsqrt() * w + b;
}

TEST(LayerNorm, EqualsFormula) {
  for (int64_t size : {1, 16, 37, 100})
    compare([](const Tensors& t) { return layer_norm(t[0], t[1], t[2], 1e-3); }, [](const Tensors& t) { return plain_layer_norm(t[0], t[1], t[2], 1e-3); },
            {random({70, size}) + 1, random({size}), random({size})}, 3);
  compare([](const Tensors& t) { return layer_norm(t[0].transpose(0, 1), t[1].as_strided({24}, {2}), t[2], 1e-5); },
          [](const Tensors& t) { return plain_layer_norm(t[0].transpose(0, 1), t[1].slice(0, 0, 48, 2), t[2], 1e-5); }, {random({5, 3, 24}), random({48}), random({24})}, 3);
}

TEST(LayerNorm, AddsTheResidual) {
  for (int part : {0, 1, 2}) {  // the sum alone, the norm alone, both used
    auto pick = [part](const at::Tensor& sum, const at::Tensor& y) { return part == 0 ? sum * 1 : part == 1 ? y * 1 : sum * 0.5 + y; };
    compare(
        [&](const Tensors& t) {
          auto [sum, y] = add_layer_norm(t[0], t[1], t[2], t[3], 1e-5);
          return pick(sum, y) + 0 * (t[2] + t[3]).sum();
        },
        [&](const Tensors& t) { return pick(t[0] + t[1], plain_layer_norm(t[0] + t[1], t[2], t[3], 1e-5)) + 0 * (t[2] + t[3]).sum(); },
        {random({9, 37}), random({9, 37}), random({37}), random({37})}, 4);
  }
}

TEST(LayerNorm, DoesNotDependOnThreads) {
  const at::Tensor x = random({1000, 40}), w = random({40}), b = random({40}), weights = random({1000, 40});
  auto fn = [](const Tensors& t) { return layer_norm(t[0], t[1], t[2], 1e-5); };
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const Result one = run(fn, {x, w, b}, at::kFloat, weights);
  at::set_num_threads(3);
  const Result three = run(fn, {x, w, b}, at::kFloat, weights);
  at::set_num_threads(before);
  for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(same_bits(three.grads[i], one.grads[i])) << i;
}

at::Tensor plain_rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t rotary = cos.size(1);
  at::Tensor turned = x.slice(2, 0, rotary), rest = x.slice(2, rotary);
  at::Tensor rotated = at::cat({-turned.slice(2, rotary / 2), turned.slice(2, 0, rotary / 2)}, 2);
  return at::cat({turned * cos.unsqueeze(1) + rotated * sin.unsqueeze(1), rest}, 2);
}

TEST(Rope, EqualsFormulaWithDifferentHalves) {
  for (int64_t rotary : {24, 10}) {
    at::Tensor cos = random({7, rotary}), sin = random({7, rotary});  // any table: the gradient is the transpose
    auto table = [](const at::Tensor& t, const at::Tensor& x) {
      return t.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    };
    compare([&](const Tensors& t) { return rope(t[0], table(cos, t[0]), table(sin, t[0])); },
            [&](const Tensors& t) { return plain_rope(t[0], cos, sin); }, {random({7, 3, 24})}, 2);
  }
}

TEST(Swiglu, EqualsFormula) {
  compare([](const Tensors& t) { return swiglu(t[0], t[1]); }, [](const Tensors& t) { return at::silu(t[0]) * t[1]; },
          {random({5, 19}, 4.0), random({5, 19})}, 2);
}

TEST(Swiglu, IsFiniteWhereExpOverflows) {
  for (auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    at::Tensor gate = at::tensor({-1000.0, -90.0, 90.0, 1000.0}).to(dtype).reshape({1, 4});
    at::Tensor y = swiglu(gate, at::ones_like(gate));
    EXPECT_TRUE(near(y, at::tensor({0.0, 0.0, 90.0, 1000.0}).reshape({1, 4})));
    gate[0][2] = std::numeric_limits<double>::quiet_NaN();
    EXPECT_TRUE(swiglu(gate, at::ones_like(gate))[0][2].isnan().item<bool>());
  }
}

TEST(Geglu, EqualsFormula) {
  compare([](const Tensors& t) { return geglu(t[0], t[1]); }, [](const Tensors& t) { return at::gelu(t[0], "tanh") * t[1]; }, {random({5, 19}, 4.0), random({5, 19})}, 2);
}

TEST(Geglu, IsFiniteWhereExpOverflows) {
  for (auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    at::Tensor gate = at::tensor({-1000.0, -90.0, 90.0, 1000.0}).to(dtype).reshape({1, 4}).requires_grad_();
    const at::Tensor y = geglu(gate, at::ones_like(gate));
    EXPECT_TRUE(near(y, at::tensor({0.0, 0.0, 90.0, 1000.0}).reshape({1, 4})));
    torch::autograd::backward({y.sum()}, {});
    EXPECT_TRUE(near(gate.grad(), at::tensor({0.0, 0.0, 1.0, 1.0}).reshape({1, 4})));
  }
}

at::Tensor plain_attention(const Tensors& t, const AttentionSpec& spec) {
  const at::Tensor &q = t[0], &k = t[1], &v = t[2];
  const int64_t group = q.size(1) / k.size(1);
  const double scale = spec.scale != 0.0 ? spec.scale : 1.0 / std::sqrt(static_cast<double>(q.size(2)));
  Tensors parts;
  for (size_t s = 0; s + 1 < spec.cu_seqlens_q.size(); ++s) {
    at::Tensor qs = q.slice(0, spec.cu_seqlens_q[s], spec.cu_seqlens_q[s + 1]).transpose(0, 1);
    at::Tensor ks =
        k.slice(0, spec.cu_seqlens_k[s], spec.cu_seqlens_k[s + 1]).transpose(0, 1).repeat_interleave(group, 0);
    at::Tensor vs =
        v.slice(0, spec.cu_seqlens_k[s], spec.cu_seqlens_k[s + 1]).transpose(0, 1).repeat_interleave(group, 0);
    at::Tensor scores = at::matmul(qs, ks.transpose(1, 2)) * scale;
    if (spec.causal) {
      const int64_t nq = qs.size(1), nk = ks.size(1);
      at::Tensor i = at::arange(nk - nq, nk).unsqueeze(1), j = at::arange(nk).unsqueeze(0);
      at::Tensor hidden = j > i;
      if (spec.window >= 0) hidden = hidden.logical_or(j <= i - spec.window);
      scores = scores.masked_fill(hidden, -std::numeric_limits<double>::infinity());
    }
    parts.push_back(at::matmul(at::softmax(scores, -1), vs).transpose(0, 1));
  }
  return at::cat(parts, 0);
}

void compare_attention(const AttentionSpec& spec, int64_t heads, int64_t key_heads, int64_t dim, double factor = 3) {
  const int64_t queries = spec.cu_seqlens_q.back(), keys = spec.cu_seqlens_k.back();
  compare([&](const Tensors& t) { return attention(t[0], t[1], t[2], spec); },
          [&](const Tensors& t) { return plain_attention(t, spec); },
          {random({queries, heads, dim}), random({keys, key_heads, dim}), random({keys, key_heads, dim})}, factor);
}

TEST(Attention, CausalSegmentsGroupedHeads) {
  compare_attention({{0, 1, 18, 18, 41}, {0, 1, 18, 18, 41}}, 6, 2, 16);
  compare_attention({{0, 29}, {0, 29}, -1, 0.3}, 3, 1, 24);
  compare_attention({{0, 13}, {0, 13}}, 2, 2, 8);
}
TEST(Attention, LongSegment) { compare_attention({{0, 300}, {0, 300}}, 2, 1, 16); }
// Head sizes that ops/attention_bf16.h takes, with whole and broken tiles of 64, and windows that end inside a tile, at
// its edge, and before the one of the query. Other processors take ATen's way: that is compared, and said.
TEST(Attention, TilesOf64) {
  compare_attention({{0, 1, 65, 193, 256}, {0, 1, 65, 193, 256}}, 6, 2, 64);
  compare_attention({{0, 70}, {0, 70}, -1, 0.2}, 2, 1, 128);
  compare_attention({{0, 70}, {0, 70}}, 2, 2, 192);
  for (int64_t window : {1, 40, 64, 65, 150, 299}) compare_attention({{0, 90, 390}, {0, 90, 390}, window}, 2, 1, 64);
  if (!has_attention_bf16(64)) GTEST_SKIP() << "no products of bf16: ATen's attention was compared";
}
// Its own numbers are all that a segment's result and gradients are made of, in one order.
TEST(Attention, TilesDoNotDependOnThreadsOrNeighbours) {
  const int before = at::get_num_threads();
  const auto run = [](const std::vector<at::Tensor>& qkv, const std::vector<int64_t>& bounds, int threads) {
    at::set_num_threads(threads);
    std::vector<at::Tensor> leaves;
    for (const at::Tensor& t : qkv) leaves.push_back(t.clone().requires_grad_(true));
    const at::Tensor out = attention(leaves[0], leaves[1], leaves[2], {bounds, bounds});
    (out.to(at::kFloat) * at::arange(4 * 64).reshape({4, 64}).remainder(7)).sum().backward();
    return std::vector<at::Tensor>{out.detach(), leaves[0].grad(), leaves[1].grad(), leaves[2].grad()};
  };
  const std::vector<at::Tensor> qkv = {random({330, 4, 64}).to(at::kBFloat16), random({330, 2, 64}).to(at::kBFloat16), random({330, 2, 64}).to(at::kBFloat16)};
  const std::vector<at::Tensor> one = run(qkv, {0, 100, 330}, 1), three = run(qkv, {0, 100, 330}, 3);
  std::vector<at::Tensor> last;
  for (const at::Tensor& t : qkv) last.push_back(t.slice(0, 100));
  const std::vector<at::Tensor> alone = run(last, {0, 230}, 1);
  at::set_num_threads(before);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_TRUE(same_bits(three[i], one[i])) << i;
    EXPECT_TRUE(same_bits(alone[i], one[i].slice(0, 100))) << i;
  }
}
TEST(Attention, QueriesAfterACache) { compare_attention({{0, 1, 6, 146}, {0, 9, 30, 180}}, 4, 2, 16); }
TEST(Attention, SlidingWindow) {
  compare_attention({{0, 20, 60}, {0, 20, 60}, 5}, 4, 2, 16);
  compare_attention({{0, 300}, {0, 300}, 40}, 2, 1, 16);
  compare_attention({{0, 3, 4}, {0, 50, 90}, 7}, 2, 1, 16);
  compare_attention({{0, 20}, {0, 20}, 1}, 2, 1, 16);
  compare_attention({{0, 20}, {0, 20}, 20}, 2, 1, 16);
}
TEST(Attention, AllKeys) { compare_attention({{0, 7, 20}, {0, 11, 30}, -1, 0.0, false}, 4, 2, 16); }

TEST(Attention, RefusesQueriesWithoutKeys) {
  at::Tensor q = at::ones({3, 2, 8}), k = at::ones({2, 2, 8});
  EXPECT_THROW(attention(q, k, k, {{0, 3}, {0, 2}}), InternalError);
  EXPECT_THROW(attention(q, k, k, {{0, 3}, {0, 3}}), InternalError);
}

TEST(Linear, EqualsFormula) {
  compare([](const Tensors& t) { return trireme::linear(t[0], t[1], t[2]); },
          [](const Tensors& t) { return at::linear(t[0], t[1], t[2]); },
          {random({70, 33}, 0.3), random({21, 33}, 0.3), random({21})}, 4);
  compare([](const Tensors& t) { return trireme::linear(t[0], t[1]); },
          [](const Tensors& t) { return at::linear(t[0], t[1]); }, {random({5, 8}, 0.3), random({3, 8}, 0.3)}, 4);
}

// In 16 bits up to 4 rows take loops of our own: blocks of features and lanes with rests, slices, a bias of every kind.
TEST(Linear, FewRowsEqualTheFormula) {
  for (int64_t rows : {1, 4, 5})
    for (auto [features, size] : {std::pair<int64_t, int64_t>{1, 5}, {7, 16}, {21, 33}, {40, 1100}}) {
      compare([](const Tensors& t) { return trireme::linear(t[0].slice(1, 3), t[1], t[2]); },
              [](const Tensors& t) { return at::linear(t[0].slice(1, 3), t[1], t[2]); },
              {random({rows, size + 3}, 0.1), random({features, size}, 0.3), random({features})}, 4);
      compare([](const Tensors& t) { return trireme::linear(t[0], t[1].t()); },
              [](const Tensors& t) { return at::linear(t[0], t[1].t()); },
              {random({rows, size}, 0.1), random({size, features}, 0.3)}, 4);
    }
  EXPECT_EQ(trireme::linear(at::ones({0, 4}, at::kBFloat16), at::ones({3, 4}, at::kBFloat16)).sizes(),
            (std::vector<int64_t>{0, 3}));
}

TEST(Linear, FewRowsDoNotDependOnThreads) {
  at::Tensor x = random({1, 301}).to(at::kBFloat16), w = random({1003, 301}).to(at::kBFloat16);
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  at::Tensor one = trireme::linear(x, w);
  at::set_num_threads(3);
  at::Tensor three = trireme::linear(x, w);
  at::set_num_threads(before);
  EXPECT_TRUE(same_bits(three, one));
}

TEST(Linear, ComputesOnlyTheGradientsAskedFor) {
  at::Tensor x = at::ones({3, 4}), w = at::ones({2, 4}).requires_grad_();
  torch::autograd::backward({trireme::linear(x, w).sum()}, {});
  EXPECT_FALSE(x.grad().defined());
  EXPECT_TRUE(near(w.grad(), at::full({2, 4}, 3.0)));
}

DropoutKey key_of(double p, int64_t rows) {
  DropoutKey key{p, 99, 5, at::arange(rows) * 1000003 + 12345678901};
  return key;
}

// The mask from base/random.h alone, by the rule in ops.h.
at::Tensor plain_mask(const DropoutKey& key, int64_t size) {
  at::Tensor mask = at::empty({key.row_ids_T.numel(), size}, at::kDouble);
  for (int64_t t = 0; t < mask.size(0); ++t)
    for (int64_t i = 0; i < size; ++i) {
      const int64_t c = i + key.first_feature;
      auto words = philox(key.seed ^ (uint64_t{3} << 56), static_cast<uint64_t>(key.row_ids_T[t].item<int64_t>()),
                          (key.module << 32) | static_cast<uint64_t>(c / 64 * 16 + c % 16));
      mask[t][i] = words[static_cast<size_t>(c / 16 % 4)] < key.p * 4294967296.0 ? 0.0 : 1.0 / (1.0 - key.p);
    }
  return mask;
}

TEST(Dropout, MaskIsAFunctionOfItsKey) {
  for (int64_t size : {5, 64, 150}) {
    DropoutKey key = key_of(0.3, 11);
    at::Tensor mask = plain_mask(key, size);
    compare([&](const Tensors& t) { return dropout(t[0], key); }, [&](const Tensors& t) { return t[0] * mask; },
            {random({11, size})}, 1);
  }
  DropoutKey other = key_of(0.3, 11);
  other.module = 6;
  EXPECT_FALSE(near(plain_mask(other, 64), plain_mask(key_of(0.3, 11), 64)));
}

TEST(Dropout, SlicesOfTheFeaturesGetTheirPartOfTheMask) {
  at::Tensor x = random({9, 150});
  DropoutKey key = key_of(0.5, 9);
  at::Tensor whole = dropout(x, key);
  key.first_feature = 37;
  EXPECT_TRUE(same_bits(dropout(x.slice(1, 37, 140).contiguous(), key), whole.slice(1, 37, 140)));
}

TEST(Dropout, DropsTheAskedShare) {
  at::Tensor y = dropout(at::ones({500, 200}), key_of(0.1, 500));
  EXPECT_NEAR((y == 0).to(at::kDouble).mean().item<double>(), 0.1, 0.004);  // 4 standard deviations
  EXPECT_NEAR(y.mean().item<double>(), 1.0, 0.005);
}

TEST(LoraLinear, EqualsFormula) {
  for (auto [p, rows] : {std::pair<double, int64_t>{0.0, 23}, {0.4, 23}, {0.0, 1}, {0.4, 4}}) {
    DropoutKey key = key_of(p, rows);
    at::Tensor mask = p == 0.0 ? at::ones({rows, 70}, at::kDouble) : plain_mask(key, 70);
    at::Tensor w = random({30, 70}, 0.2), bias = random({30});
    compare(
        [&](const Tensors& t) {
          return lora_linear(t[0], w.to(t[0].scalar_type()), bias.to(t[0].scalar_type()), t[1], t[2], 0.5, key);
        },
        [&](const Tensors& t) {
          return at::linear(t[0], w, bias) + 0.5 * at::linear(at::linear(t[0] * mask, t[1]), t[2]);
        },
        {random({rows, 70}, 0.3), random({8, 70}, 0.2), random({30, 8}, 0.3)}, 5);
  }
}

TEST(LoraLinear, GradientReachesXOnlyWhereAskedFor) {
  at::Tensor x = at::ones({4, 6}), w = at::ones({5, 6});
  at::Tensor a = at::ones({2, 6}).requires_grad_(), b = at::ones({5, 2}).requires_grad_();
  torch::autograd::backward({lora_linear(x, w, {}, a, b, 1.0).sum()}, {});
  EXPECT_FALSE(w.grad().defined());
  EXPECT_TRUE(near(b.grad(), at::full({5, 2}, 24.0)));
  w.requires_grad_();
  EXPECT_THROW(lora_linear(x, w, {}, a, b, 1.0), InternalError);
}

TEST(Embedding, AddsRowsOfEqualIds) {
  at::Tensor ids = at::tensor(std::vector<int64_t>{3, 0, 3, 3, 6, 0, 3});
  compare([&](const Tensors& t) { return trireme::embedding(t[0], ids); },
          [&](const Tensors& t) { return t[0].index_select(0, ids); }, {random({7, 21})}, 1);
}

void compare_loss(const at::Tensor& targets, int64_t vocabulary, int64_t chunk) {
  at::Tensor hidden = random({targets.numel(), 12}, 0.7), head = random({vocabulary, 12}, 0.7);
  compare(
      [&](const Tensors& t) {
        LossSum loss = linear_cross_entropy(t[0], t[1], targets, chunk);
        EXPECT_EQ(loss.sum.scalar_type(), t[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
        return (loss.sum * 0.25).to(t[0].scalar_type());
      },
      [&](const Tensors& t) {
        return at::cross_entropy_loss(at::linear(t[0], t[1]), targets, {}, at::Reduction::Sum) * 0.25;
      },
      {hidden, head}, 3);
}

TEST(LinearCrossEntropy, EqualsFormulaInChunks) {
  at::Tensor targets = at::tensor(std::vector<int64_t>{3, -100, 52, 0, 17, -100, -100, 8, 9, 52, 1, 2, 3});
  for (int64_t chunk : {0, 1, 3, 4, 100}) compare_loss(targets, 53, chunk);
  compare_loss(at::tensor(std::vector<int64_t>{-100, 4, 2, -100}), 5, 2);
  compare_loss(at::tensor(std::vector<int64_t>{1, 4, 2, 0}), 33, 2);
  at::Tensor many = at::arange(300).remainder(53);  // more than 64 rows: products with rows of padding
  compare_loss(many, 53, 100);
  many.index_put_({at::arange(300).remainder(7) == 2}, at::scalar_tensor(-100, at::kLong));
  for (int64_t chunk : {0, 70, 128}) compare_loss(many, 53, chunk);
}

TEST(LinearCrossEntropy, SmoothedLabelsAndZLossEqualTorchs) {
  const at::Tensor targets = at::tensor(std::vector<int64_t>{3, -100, 52, 0, 17, -100, -100, 8, 9, 52, 1, 2, 3});
  for (const CrossEntropyTerms& terms : {CrossEntropyTerms{0.1, 0}, {0, 0.03}, {0.3, 0.02}})
    for (int64_t chunk : {0, 4})
      compare([&](const Tensors& t) { return (linear_cross_entropy(t[0], t[1], targets, chunk, 1, nullptr, terms).sum * 0.25).to(t[0].scalar_type()); },
              [&](const Tensors& t) {
                const at::Tensor logits = at::linear(t[0], t[1]);
                const at::Tensor squares = logits.logsumexp({1}).square().masked_select(targets != -100).sum();
                return (at::cross_entropy_loss(logits, targets, {}, at::Reduction::Sum, -100, terms.label_smoothing) + terms.z_loss * squares) * 0.25;
              },
              {random({targets.numel(), 12}, 0.7), random({53, 12}, 0.7)}, 3);
}

TEST(LinearCrossEntropy, CountsAndHits) {
  at::Tensor head = at::eye(5), targets = at::tensor(std::vector<int64_t>{0, 1, -100, 2, 4});
  at::Tensor hidden = at::zeros({5, 5});
  for (int64_t t : {0, 1, 2, 3}) hidden[t][t] = 1.0;  // row 3's largest is 3, not 2; row 4 is a tie, whose first is 0
  at::NoGradGuard no_grad;
  LossSum loss = linear_cross_entropy(hidden, head, targets, 2);
  EXPECT_EQ(loss.count, 4);
  EXPECT_EQ(loss.correct.item<int64_t>(), 2);
  EXPECT_FALSE(loss.sum.requires_grad());
}

TEST(LinearCrossEntropy, NothingLearntIsZero) {
  at::Tensor hidden = at::ones({3, 4}).requires_grad_(), head = at::ones({6, 4}).requires_grad_();
  LossSum loss = linear_cross_entropy(hidden, head, at::full({3}, -100, at::kLong));
  EXPECT_EQ(loss.count, 0);
  torch::autograd::backward({loss.sum}, {});
  EXPECT_TRUE(same_bits(hidden.grad(), at::zeros({3, 4})));
  EXPECT_TRUE(same_bits(head.grad(), at::zeros({6, 4})));
}

TEST(LinearCrossEntropy, LargeLogitsAndBadTargets) {
  at::Tensor hidden = at::full({1, 1}, 1.0), head = at::tensor({1000.0f, 0.0f, -1000.0f}).reshape({3, 1});
  LossSum loss = linear_cross_entropy(hidden, head, at::tensor(std::vector<int64_t>{2}));
  EXPECT_EQ(loss.sum.item<double>(), 2000.0);
  EXPECT_THROW(linear_cross_entropy(hidden, head, at::tensor(std::vector<int64_t>{3})), InternalError);
  EXPECT_THROW(linear_cross_entropy(hidden, head, at::tensor(std::vector<int64_t>{-1})), InternalError);
  LossSum bad = linear_cross_entropy(hidden * std::nan(""), head, at::tensor(std::vector<int64_t>{2}));
  EXPECT_TRUE(std::isnan(bad.sum.item<double>()));
}

// Every tensor that an operation is given beside its first: on another device, or of another dtype.
TEST(Ops, RefuseMixedDevicesAndDtypes) {
  const at::Tensor x_TC = at::ones({4, 8}), w_C = at::ones({8}), w_OC = at::ones({6, 8}), bias_O = at::ones({6}), a_RC = at::ones({2, 8}), b_OR = at::ones({6, 2}), x_TR = at::ones({4, 2}),
                   table = at::ones({4, 2}), heads = at::ones({4, 2, 8}), ids = at::zeros({4}, at::kLong), bounds = at::tensor(std::vector<int64_t>{0, 4}).to(at::kInt),
                   cache = at::ones({1, 4, 2, 8}), lengths = at::full({1}, 4, at::kInt);
  AttentionSpec spec{{0, 4}, {0, 4}};
  const DropoutKey key{0.5, 1, 2, ids, 0};
  const DropoutMask mask(key);
  struct Case {
    std::string of, name, first;
    at::Tensor good;
    std::function<void(const at::Tensor& t)> call;
  };
  const std::vector<Case> cases = {
      {"rms_norm", "weight", "x", w_C, [&](auto& t) { rms_norm(x_TC, t, 1e-5); }},
      {"add_rms_norm", "residual", "x", x_TC, [&](auto& t) { add_rms_norm(x_TC, t, w_C, 1e-5); }},
      {"add_rms_norm", "weight", "x", w_C, [&](auto& t) { add_rms_norm(x_TC, x_TC, t, 1e-5); }},
      {"rope", "cos", "x", table, [&](auto& t) { rope(heads, t, table); }},
      {"rope", "sin", "x", table, [&](auto& t) { rope(heads, table, t); }},
      {"layer_norm", "weight", "x", w_C, [&](auto& t) { layer_norm(x_TC, t, w_C, 1e-5); }},
      {"layer_norm", "bias", "x", w_C, [&](auto& t) { layer_norm(x_TC, w_C, t, 1e-5); }},
      {"add_layer_norm", "residual", "x", x_TC, [&](auto& t) { add_layer_norm(x_TC, t, w_C, w_C, 1e-5); }},
      {"add_layer_norm", "weight", "x", w_C, [&](auto& t) { add_layer_norm(x_TC, x_TC, t, w_C, 1e-5); }},
      {"add_layer_norm", "bias", "x", w_C, [&](auto& t) { add_layer_norm(x_TC, x_TC, w_C, t, 1e-5); }},
      {"swiglu", "up", "gate", x_TC, [&](auto& t) { swiglu(x_TC, t); }},
      {"geglu", "up", "gate", x_TC, [&](auto& t) { geglu(x_TC, t); }},
      {"decode_attention", "k", "q", cache, [&](auto& t) { decode_attention(heads, t, cache, lengths); }},
      {"decode_attention", "v", "q", cache, [&](auto& t) { decode_attention(heads, cache, t, lengths); }},
      {"decode_attention", "lengths", "q", lengths, [&](auto& t) { decode_attention(heads, cache, cache, t); }},
      {"attention", "k", "q", heads, [&](auto& t) { attention(heads, t, heads, spec); }},
      {"attention", "v", "q", heads, [&](auto& t) { attention(heads, heads, t, spec); }},
      {"attention", "bounds_q", "q", bounds, [&](auto& t) { attention(heads, heads, heads, {{0, 4}, {0, 4}, -1, 0.0, true, t, bounds}); }},
      {"attention", "bounds_k", "q", bounds, [&](auto& t) { attention(heads, heads, heads, {{0, 4}, {0, 4}, -1, 0.0, true, bounds, t}); }},
      {"linear", "weight", "x", w_OC, [&](auto& t) { trireme::linear(x_TC, t); }},
      {"linear", "bias", "x", bias_O, [&](auto& t) { trireme::linear(x_TC, w_OC, t); }},
      {"lora_linear", "weight", "x", w_OC, [&](auto& t) { lora_linear(x_TC, t, {}, a_RC, b_OR, 1.0); }},
      {"lora_linear", "bias", "x", bias_O, [&](auto& t) { lora_linear(x_TC, w_OC, t, a_RC, b_OR, 1.0); }},
      {"lora_linear", "A", "x", a_RC, [&](auto& t) { lora_linear(x_TC, w_OC, {}, t, b_OR, 1.0); }},
      {"lora_linear", "B", "x", b_OR, [&](auto& t) { lora_linear(x_TC, w_OC, {}, a_RC, t, 1.0); }},
      {"dropout", "row ids", "x", ids, [&](auto& t) { trireme::dropout(x_TC, {0.5, 1, 2, t, 0}); }},
      {"DropoutMask::down", "A", "x", a_RC, [&](auto& t) { mask.down(x_TC, t); }},
      {"DropoutMask::add_up", "A", "x", a_RC, [&](auto& t) { at::Tensor y = at::zeros({4, 8}); mask.add_up(x_TR, t, y); }},
      {"DropoutMask::add_up", "y", "x", x_TC.clone(), [&](auto& t) { at::Tensor y = t; mask.add_up(x_TR, a_RC, y); }},
      {"DropoutMask::gradient", "grad", "x", x_TR, [&](auto& t) { mask.gradient(t, x_TC); }},
      {"embedding", "ids", "weight", ids, [&](auto& t) { trireme::embedding(w_OC, t); }},
      {"linear_cross_entropy", "head", "hidden", w_OC, [&](auto& t) { linear_cross_entropy(x_TC, t, ids); }},
      {"product", "b", "a", w_OC, [&](auto& t) { product(x_TC, t.t()); }},
      {"product", "y", "a", at::ones({4, 6}), [&](auto& t) { at::Tensor y = t; product(x_TC, w_OC.t(), y); }},
      {"product", "bias", "y", bias_O, [&](auto& t) { at::Tensor y = at::empty({4, 6}); product(x_TC, w_OC.t(), y, {.bias_N = t}); }}};
  for (const Case& c : cases) {
    c.call(c.good);
    for (const at::Tensor& bad : {c.good.to(at::kMeta), c.good.to(c.good.is_floating_point() ? at::kHalf : at::kShort)}) {
      const auto text = [](const at::Tensor& t) { return str(c10::toString(t.scalar_type()), " on ", t.device().str()); };
      const std::string expected = str(c.of, ": ", c.name, " is ", text(bad), ", but with ", c.first, ", which is Float on cpu, it has to be ", text(c.good), ": bring it there with to()");
      try {
        c.call(bad);
        ADD_FAILURE() << expected;
      } catch (const InternalError& error) {
        EXPECT_EQ(error.what(), expected);
      }
    }
  }
}

// Central differences of the whole chain in fp64: independent of every formula above.
TEST(Ops, FiniteDifferences) {
  at::Tensor cos = random({6, 8}), sin = random({6, 8});
  at::Tensor targets = at::tensor(std::vector<int64_t>{3, -100, 1, 0, 8, 2});
  AttentionSpec spec{{0, 2, 6}, {0, 2, 6}};
  auto f = [&](const Tensors& t) {
    at::Tensor x = rms_norm(t[0], t[1], 1e-5);
    at::Tensor q = rope(trireme::linear(x, t[2]).view({6, 2, 8}), cos, sin);
    at::Tensor a = attention(q, q, q, spec).reshape({6, 16});
    at::Tensor h =
        lora_linear(swiglu(a, a + 1), at::ones({16, 16}, at::kDouble) * 0.1, {}, t[3], t[4], 0.5, key_of(0.3, 6));
    return linear_cross_entropy(h, t[5], targets, 2).sum;
  };
  Tensors inputs = {random({6, 10}), random({10}),    random({16, 10}, 0.4),
                    random({3, 16}), random({16, 3}), random({9, 16}, 0.3)};
  Result exact = run(f, inputs, at::kDouble, at::ones({}, at::kDouble));
  for (size_t i = 0; i < inputs.size(); ++i) {
    at::Tensor direction = random(inputs[i].sizes().vec());
    auto value = [&](double step) {
      Tensors moved = inputs;
      moved[i] = inputs[i] + step * direction;
      return f(moved).item<double>();
    };
    const double slope = (value(1e-5) - value(-1e-5)) / 2e-5;
    const double expected = (exact.grads[i] * direction).sum().item<double>();
    EXPECT_NEAR(slope, expected, 1e-6 * std::max(1.0, std::abs(expected))) << "input " << i;
  }
}

struct Chain {
  at::Tensor norm, q, gate, up, down, bias;
  DropoutKey key = key_of(0.2, 20);
  AttentionSpec spec{{0, 7, 20}, {0, 7, 20}};
  at::Tensor cos = random({20, 16}).to(at::kFloat), sin = random({20, 16}).to(at::kFloat);
  explicit Chain(at::ScalarType dtype) {
    auto make = [&](std::vector<int64_t> shape) { return random(shape, 0.3).to(dtype).requires_grad_(); };
    norm = make({32}), q = make({32, 32}), gate = make({48, 32}), up = make({48, 32}), down = make({32, 48}),
    bias = make({32});
  }
  Tensors parameters() const { return {norm, q, gate, up, down, bias}; }
  at::Tensor block(const at::Tensor& x) const {
    at::Tensor h = rms_norm(x, norm, 1e-5);
    at::Tensor heads =
        rope(rms_norm(trireme::linear(h, q, bias).view({20, 2, 16}), norm.slice(0, 0, 16), 1e-5), cos, sin);
    auto [sum, y] = add_rms_norm(attention(heads, heads, heads, spec).reshape({20, 32}), x, norm, 1e-5);
    return sum + trireme::linear(dropout(swiglu(trireme::linear(y, gate), trireme::linear(y, up)), key), down);
  }
};

// The gradients of two blocks, under full, selective or no recomputation.
Tensors chain_gradients(const std::vector<Chain>& chains, const at::Tensor& start, int mode, bool input_trains) {
  for (const auto& chain : chains)
    for (auto& p : chain.parameters()) p.mutable_grad().reset();
  at::Tensor x = start.clone();
  if (input_trains) x.requires_grad_();
  at::Tensor y = x;
  {
    SelectiveRecompute selective(mode == 2);
    for (const auto& chain : chains) {
      auto block = [&chain](const Tensors& t) { return chain.block(t[0]); };
      y = mode == 1 ? recompute(block, {y}) : block({y});
    }
  }
  torch::autograd::backward({(y * y).sum()}, {});
  Tensors grads = {y.detach()};
  if (input_trains) grads.push_back(x.grad());
  for (const auto& chain : chains)
    for (auto& p : chain.parameters()) grads.push_back(p.grad().clone());
  return grads;
}

TEST(Recompute, GradientsAreTheSameBits) {
  for (auto dtype : {at::kFloat, at::kBFloat16}) {
    std::vector<Chain> chain = {Chain(dtype), Chain(dtype)};
    at::Tensor x = random({20, 32}).to(dtype);
    for (bool input_trains : {true, false}) {
      Tensors kept = chain_gradients(chain, x, 0, input_trains);
      for (int mode : {1, 2}) {
        Tensors again = chain_gradients(chain, x, mode, input_trains);
        for (size_t i = 0; i < kept.size(); ++i)
          EXPECT_TRUE(same_bits(again[i], kept[i])) << dtype << " mode " << mode << " tensor " << i;
      }
    }
  }
}

TEST(Recompute, RunsTwiceWithGradientsAndOnceWithout) {
  at::Tensor x = at::ones({3}).requires_grad_();
  int calls = 0;
  auto fn = [&](const Tensors& t) {
    ++calls;
    return t[0] * t[0];
  };
  at::Tensor y = recompute(fn, {x}, false);
  EXPECT_EQ(calls, 1);
  torch::autograd::backward({y.sum()}, {});
  EXPECT_EQ(calls, 2);
  EXPECT_TRUE(near(x.grad(), at::full({3}, 2.0)));
  at::NoGradGuard no_grad;
  EXPECT_FALSE(recompute(fn, {x}).requires_grad());
  EXPECT_EQ(calls, 3);
}

// A linear layer of which nobody reads the output has the gradients of one.
TEST(Recompute, WhatNobodyReadsIsNotMadeAndHasItsGradients) {
  for (bool adapts : {false, true}) {
    const at::Tensor x = random({20, 8}).to(at::kFloat), w = random({6, 8}).to(at::kFloat), grad = random({20, 6}).to(at::kFloat);
    const at::Tensor a = random({3, 8}).to(at::kFloat), b = random({6, 3}).to(at::kFloat);
    std::vector<Tensors> found;
    for (bool is_read : {true, false}) {
      Tensors leaves;
      for (const at::Tensor& t : {x, a, b}) leaves.push_back(t.clone().requires_grad_());
      if (!adapts) leaves.push_back(w.clone().requires_grad_());
      const at::Tensor y = adapts ? lora_linear(leaves[0], w, {}, leaves[1], leaves[2], 2.0, {}, nullptr, is_read) : trireme::linear(leaves[0], LinearWeight(leaves[3]), {}, nullptr, is_read);
      torch::autograd::backward({y}, {grad});
      found.push_back({});
      for (const at::Tensor& leaf : leaves)
        if (leaf.grad().defined()) found.back().push_back(leaf.grad());
    }
    ASSERT_EQ(found[0].size(), found[1].size());
    EXPECT_EQ(found[0].size(), adapts ? 3u : 2u);
    for (size_t i = 0; i < found[0].size(); ++i) EXPECT_TRUE(same_bits(found[1][i], found[0][i])) << i;
  }
  bool first = true, second = false;
  at::Tensor y = recompute([&](const Tensors& t) {
    std::swap(first, second);
    EXPECT_EQ(recomputing(), first);
    return t[0] * 2;
  }, {at::ones({3}).requires_grad_()});
  EXPECT_FALSE(recomputing());
  torch::autograd::backward({y.sum()}, {});
  EXPECT_TRUE(first && !recomputing());
}

struct CountingHook : torch::autograd::PostAccumulateGradHook {
  explicit CountingHook(int& count) : count_(count) {}
  void operator()(const torch::autograd::Variable&) override { ++count_; }
  int& count_;
};

TEST(InRowPieces, IsTheWholeAndBringsEachLeafOneGradient) {
  for (auto dtype : kDtypes)
    for (bool input_trains : {true, false})
      for (int64_t rows : {1, 7, 20, 50}) {  // the last piece is a shorter one, or there is but one
        const at::Tensor x = random({20, 8}).to(dtype), w = random({6, 8}).to(dtype), row = random({20, 1}).to(dtype), grad = random({20, 6}).to(dtype);
        struct Found {
          at::Tensor y, grad_x, grad_w;
          int contributions = 0;
        };
        const auto find = [&](bool whole) {
          Found found;
          const at::Tensor in = x.clone().requires_grad_(input_trains), leaf = w.clone().requires_grad_();
          torch::autograd::impl::set_post_acc_grad_hooks(leaf, std::make_unique<CountingHook>(found.contributions));
          const auto fn = [&](int64_t first, const at::Tensor& piece) {
            EXPECT_LE(piece.size(0), whole ? 20 : rows);
            return at::tanh(trireme::linear(piece, leaf) * row.narrow(0, first, piece.size(0)));
          };
          found.y = whole ? fn(0, in) : in_row_pieces(fn, in, rows, 6, {leaf});
          torch::autograd::backward({found.y}, {grad});
          torch::autograd::impl::set_post_acc_grad_hooks(leaf, nullptr);
          found.grad_x = in.grad(), found.grad_w = leaf.grad();
          return found;
        };
        const Found expected = find(true), found = find(false);
        EXPECT_TRUE(near(found.y, expected.y)) << dtype << " " << rows;
        EXPECT_EQ(found.grad_x.defined(), input_trains);
        if (input_trains) {
          EXPECT_TRUE(near(found.grad_x, expected.grad_x)) << dtype << " " << rows;
        }
        EXPECT_TRUE(near(found.grad_w, expected.grad_w, 3)) << dtype << " " << rows;
        EXPECT_EQ(found.contributions, 1);
        at::NoGradGuard no_grad;
        EXPECT_FALSE(in_row_pieces([&](int64_t, const at::Tensor& piece) { return piece; }, x, rows, 8, {w}).requires_grad());
      }
}

// What is alive between forward and backward, told by the storages that the op's output chain still holds.
// One case an operation: what it gives to an operation that keeps its inputs lives until backward, or not at all.
TEST(SelectiveRecompute, DropsWhatCanBeComputedAgain) {
  const at::Tensor norm = at::ones({8}), w = random({8, 8}).to(at::kFloat), start = random({4, 8}).to(at::kFloat);
  auto heads = [](const at::Tensor& x) { return x.view({4, 1, 8}); };
  auto product = [&](const at::Tensor& h) { return trireme::linear(h, w.detach().requires_grad_()); };
  const at::Tensor cos = random({4, 8}).to(at::kFloat), sin = random({4, 8}).to(at::kFloat);
  struct Case {
    const char* name;
    std::function<at::Tensor(const at::Tensor&)> make, keep;
  };
  const Case cases[] = {
      {"rms_norm", [&](auto& x) { return rms_norm(x, norm, 1e-5); }, product},
      {"add_rms_norm", [&](auto& x) { return add_rms_norm(x, start, norm, 1e-5).second; }, product},
      {"layer_norm", [&](auto& x) { return layer_norm(x, norm, norm, 1e-5); }, product},
      {"add_layer_norm", [&](auto& x) { return add_layer_norm(x, start, norm, norm, 1e-5).second; }, product},
      {"swiglu", [&](auto& x) { return swiglu(x, start); }, product},
      {"geglu", [&](auto& x) { return geglu(x, start); }, product},
      {"dropout", [&](auto& x) { return dropout(x, key_of(0.5, 4)); }, product},
      {"rope", [&](auto& x) { return rope(heads(x), cos, sin); },
       [&](auto& h) { return attention(h, heads(start), heads(start), {{0, 4}, {0, 4}}); }},
  };
  for (const Case& c : cases) {
    at::Tensor grads[2];
    for (bool on : {false, true}) {
      at::Tensor x = start.clone().requires_grad_(), y;
      c10::weak_intrusive_ptr<c10::StorageImpl> watched(c10::intrusive_ptr<c10::StorageImpl>{});
      {
        SelectiveRecompute selective(on);
        at::Tensor h = c.make(x);
        watched = h.storage().getWeakStorageImpl();
        y = c.keep(h);
      }
      EXPECT_EQ(watched.expired(), on) << c.name;
      torch::autograd::backward({y.square().sum()}, {});
      grads[on] = x.grad();
    }
    EXPECT_TRUE(same_bits(grads[1], grads[0])) << c.name;
  }
}

// What every loop of the table writes, by name, for inputs that are the same at every level. Odd sizes.
template <typename T>
std::vector<std::pair<std::string, at::Tensor>> outputs_of(const Loops<T>& loops) {
  using A = typename ComputeType<T>::type;
  const auto dtype = c10::CppTypeToScalarType<T>::value, compute = c10::CppTypeToScalarType<A>::value;
  constexpr int64_t kRows = 3, kSize = 203, kHeads = 3, kDim = 20, kRotary = 12;
  auto generator = at::make_generator<at::CPUGeneratorImpl>(11);
  auto values = [&](std::vector<int64_t> shape, at::ScalarType type) {
    return (at::randn(shape, generator, at::kDouble) * 3).to(type);
  };
  std::vector<std::pair<std::string, at::Tensor>> out;
  auto output = [&](const char* name, const at::Tensor& start) {
    out.emplace_back(name, start.clone());
    return out.back().second;
  };
  auto t = [](const at::Tensor& x) { return x.data_ptr<T>(); };
  auto a = [](const at::Tensor& x) { return x.data_ptr<A>(); };
  const at::Tensor x = values({kRows, kSize}, dtype), other = values({kRows, kSize}, dtype),
                   weight = values({kSize}, dtype), zeros = at::zeros_like(x), sums = values({kSize}, compute);
  at::Tensor rstd = at::empty({kRows}, compute);
  for (bool residual : {false, true}) {
    at::Tensor sum = output("rms_norm: sum", zeros), y = output("rms_norm", zeros);
    loops.rms_norm(kRows, kSize, t(x), residual ? t(other) : nullptr, residual ? t(sum) : nullptr, t(weight), 1e-5,
                   t(y), a(rstd));
    output("rms_norm: rstd", rstd);
    at::Tensor grad_x = output("rms_norm_backward", zeros), grad_weight = output("rms_norm_backward: weight", sums);
    loops.rms_norm_backward(kRows, kSize, t(other), residual ? t(x) : nullptr, t(x), t(weight), a(rstd), t(grad_x),
                            a(grad_weight));
  }
  const at::Tensor heads = values({kRows, kHeads, kDim}, dtype), cos = values({kRows, kRotary}, compute),
                   sin = values({kRows, kRotary}, compute);
  for (bool inverse : {false, true})
    loops.rope(kRows, kHeads, kDim, kRotary, t(heads), a(cos), a(sin), t(output("rope", heads)), inverse);
  loops.swiglu(kRows * kSize, t(x), t(other), t(output("swiglu", zeros)));
  at::Tensor grad_gate = output("swiglu_backward: gate", zeros), grad_up = output("swiglu_backward: up", zeros);
  loops.swiglu_backward(kRows * kSize, t(weight.repeat({kRows})), t(x), t(other), t(grad_gate), t(grad_up));
  loops.geglu(kRows * kSize, t(x), t(other), t(output("geglu", zeros)));
  grad_gate = output("geglu_backward: gate", zeros), grad_up = output("geglu_backward: up", zeros);
  loops.geglu_backward(kRows * kSize, t(weight.repeat({kRows})), t(x), t(other), t(grad_gate), t(grad_up));
  const at::Tensor row_ids = at::arange(kRows) * 1000003;
  for (bool add : {false, true})
    loops.dropout(kRows, kSize, t(x), row_ids.data_ptr<int64_t>(), {1, 2, 1u << 30, 1.5, 3}, add,
                  t(output("dropout", other)));
  const int64_t targets[kRows] = {0, kSize - 1, x[2].argmax().template item<int64_t>()};
  for (bool gradient : {false, true})
    for (double term : {0.0, 0.1}) {
      at::Tensor loss = output("cross_entropy: loss", at::zeros({kRows}, at::kDouble));
      at::Tensor correct = output("cross_entropy: correct", at::zeros({kRows}, at::kByte));
      loops.cross_entropy(kRows, kSize, t(output("cross_entropy", x)), targets, term, term, loss.data_ptr<double>(), correct.data_ptr<uint8_t>(), gradient);
    }
  loops.add_rows(kRows, kSize, t(x), a(output("add_rows", sums)));
  loops.scale_from(kSize, a(sums), 0.3, t(output("scale_from", weight)));
  const at::Tensor few = x * 0.05, matrix = values({7, kSize}, dtype);
  at::Tensor y = output("product", values({kRows, 7}, dtype));
  for (const T* plus : {static_cast<const T*>(nullptr), static_cast<const T*>(t(y))})
    loops.product(kRows, 7, kSize, t(few), t(matrix), 0.5, plus, 7, t(y), 7);
  return out;
}

template <typename T>
void compare_levels() {
  const auto wanted = outputs_of(loops<T>(0));
  for (int level = -1; level <= 2; ++level) {
    std::vector<std::pair<std::string, at::Tensor>> got;
    try {
      got = outputs_of(loops<T>(level));
    } catch (const InternalError&) {
      std::printf("level %d: not on this processor\n", level);
      continue;
    }
    for (size_t i = 0; i < wanted.size(); ++i)
      EXPECT_TRUE(near(got[i].second, wanted[i].second)) << wanted[i].first << ", level " << level;
  }
}

TEST(Loops, EveryInstructionSetDoesTheSame) {
  compare_levels<float>();
  compare_levels<double>();
  compare_levels<c10::BFloat16>();
  compare_levels<c10::Half>();
}

TEST(Loops, RoundingEqualsThatOfATen) {
  at::Tensor values = at::cat({random({4000}, 3.0), random({4000}, 1e-5), random({200}, 1e30),
                               at::tensor({0.0, 1.00390625, 1.01171875, 65504.0, 65520.0, 1e-8})})
                          .to(at::kFloat);
  for (int level : {0, 1, 2}) {
    if (level > 0) try {
        loops<float>(level);
      } catch (const InternalError&) {
        continue;
      }
    at::Tensor bf16 = at::empty_like(values, at::kBFloat16), half = at::empty_like(values, at::kHalf);
    loops<c10::BFloat16>(level).scale_from(values.numel(), values.data_ptr<float>(), 1.0,
                                           bf16.data_ptr<c10::BFloat16>());
    loops<c10::Half>(level).scale_from(values.numel(), values.data_ptr<float>(), 1.0, half.data_ptr<c10::Half>());
    EXPECT_TRUE(same_bits(bf16, values.to(at::kBFloat16))) << level;
    EXPECT_TRUE(same_bits(half, values.to(at::kHalf))) << level;
  }
}

}  // namespace
}  // namespace trireme
