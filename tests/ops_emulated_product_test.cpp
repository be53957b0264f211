// Products of the operations through the kernels' wrapper of cuBLASLt, over the emulated library: which are asked for, and their values.
#include "support.h"

#include "base/check.h"
#include "kernels/kernels.h"
#include "ops/device.h"
#include "ops/float8.h"
#include "ops/ops.h"
#include "ops/product.h"

namespace trireme {
namespace {

using kernels::MatMul;
using test::near;
using test::same_bits;

std::vector<MatMul> calls;

// While one lives, CPU tensors go to the emulated kernels, and their products are recorded.
struct Emulated {
  Emulated() {
    static const kernels::Kernels all = [] {
      kernels::Kernels k = kernels::emulated_kernels();
      k.matmul = [](const MatMul& p, kernels::Stream stream) {
        calls.push_back(p);
        kernels::emulated_kernels().matmul(p, stream);
      };
      return k;
    }();
    calls.clear();
    set_kernels(at::kCPU, &all);
  }
  ~Emulated() { set_kernels(at::kCPU, nullptr); }
};

class OpsProducts : public testing::TestWithParam<at::ScalarType> {
 protected:
  at::Tensor random(at::IntArrayRef sizes) const { return at::randn(sizes, at::kFloat).to(GetParam()); }
};

TEST_P(OpsProducts, TakeViewsAsTheyAre) {
  at::manual_seed(1);
  const at::Tensor x = random({6, 9}), tall = random({9, 6}), row = random({1, 9}), column = random({9, 1}), wide = random({6, 40});
  const std::vector<std::pair<at::Tensor, bool>> lefts = {  // [., 9], and whether it has to be copied
      {x, false}, {tall.t(), false}, {wide.narrow(1, 3, 9), false}, {wide.t().narrow(0, 5, 9).t(), false}, {row, false}, {column.t(), false}, {row.expand({6, 9}), true},
      {wide.slice(1, 0, 18, 2), true}, {random({9, 40}).narrow(1, 7, 1).t(), false}};
  const std::vector<at::Tensor> rights = {random({9, 5}), random({5, 9}).t(), random({9, 30}).narrow(1, 2, 5), column, row.t(), random({9, 30}).narrow(1, 3, 1)};
  for (const auto& [left, is_copied] : lefts)
    for (const at::Tensor& right : rights)
      for (at::ScalarType dtype : {GetParam(), at::kFloat}) {
        SCOPED_TRACE(testing::Message() << left.sizes() << " " << left.strides() << " " << right.sizes() << " " << right.strides() << " " << dtype);
        const at::Tensor exact = at::matmul(left.to(at::kDouble), right.to(at::kDouble)), before = at::randn(exact.sizes(), at::kFloat).to(dtype);
        const at::Tensor bias = at::randn({right.size(1) * 2}, at::kFloat).to(dtype).slice(0, 0, right.size(1) * 2, 2);
        at::Tensor y = at::zeros({exact.size(0) + 2, exact.size(1) + 3}, dtype), part = y.narrow(0, 1, exact.size(0)).narrow(1, 1, exact.size(1));
        Emulated emulated;
        product(left, right, part, {.scale = 0.5, .bias_N = bias});
        EXPECT_TRUE(near(part, (0.5 * exact + bias).to(dtype)));
        part.copy_(before);
        product(left, right, part, {.scale = -2, .add = true});
        EXPECT_TRUE(near(part, (before - 2 * exact).to(dtype)));
        part.zero_();
        EXPECT_EQ(y.abs().sum().item<double>(), 0);  // nothing beside it
        ASSERT_EQ(calls.size(), 2);
        EXPECT_EQ(calls[0].a != left.data_ptr(), is_copied);
        EXPECT_EQ(calls[0].b, right.data_ptr());
      }
}

TEST_P(OpsProducts, Linear) {
  at::manual_seed(2);
  const at::Tensor x = random({7, 24}), w = random({40, 24}), bias = random({40}), weights = random({7, 40});
  auto outcome = [&](bool trains) {
    const at::Tensor x_leaf = x.clone().requires_grad_(true), w_leaf = w.clone().requires_grad_(trains), bias_leaf = bias.clone().requires_grad_(trains);
    const at::Tensor y = linear(x_leaf, w_leaf, bias_leaf);
    y.backward(weights);
    return std::vector{y, x_leaf.grad(), w_leaf.grad(), bias_leaf.grad()};
  };
  for (bool trains : {false, true}) {
    const auto expected = outcome(trains);
    Emulated emulated;
    const auto got = outcome(trains);
    for (size_t i = 0; i < (trains ? 4u : 2u); ++i) EXPECT_TRUE(near(got[i], expected[i], 2));
    ASSERT_EQ(calls.size(), trains ? 3u : 2u);
    EXPECT_NE(calls[0].bias, nullptr);
    EXPECT_EQ(got[2].defined(), trains);
  }
}

// Forward: x w^T, x a^T, and the update into the first's output. Backward: the gradient of xa, those of a, b, and of x, in two parts.
TEST_P(OpsProducts, LoraAddsIntoItsOutputs) {
  at::manual_seed(3);
  const at::Tensor x = random({7, 24}), w = random({40, 24}), bias = random({40}), a = random({4, 24}), b = random({40, 4}), weights = random({7, 40});
  auto outcome = [&] {
    const at::Tensor x_leaf = x.clone().requires_grad_(true), a_leaf = a.clone().requires_grad_(true), b_leaf = b.clone().requires_grad_(true);
    const at::Tensor y = lora_linear(x_leaf, w, bias, a_leaf, b_leaf, 0.5);
    y.backward(weights);
    return std::vector{y, x_leaf.grad(), a_leaf.grad(), b_leaf.grad()};
  };
  const auto expected = outcome();
  Emulated emulated;
  const auto got = outcome();
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(near(got[i], expected[i], 4));  // with an intermediate result that is rounded, too
  ASSERT_EQ(calls.size(), 8u);
  EXPECT_EQ(calls[0].bias, bias.data_ptr());
  EXPECT_EQ(calls[2].d, calls[0].d);
  EXPECT_EQ(calls[2].alpha, 0.5f);
  EXPECT_EQ(calls[2].beta, 1);
  EXPECT_EQ(calls[7].d, calls[3].d);
  EXPECT_EQ(calls[7].beta, 1);
  for (const MatMul& call : calls) EXPECT_FALSE((call.m == 40 && call.n == 24) || (call.m == 24 && call.n == 40));  // no gradient of the base
}

TEST_P(OpsProducts, ProductsAddUpTheGradientOfAHead) {
  at::manual_seed(4);
  const at::Tensor hidden = random({150, 16}), head = random({33, 16}), targets = at::randint(33, {150}, at::kLong);
  auto outcome = [&] {
    const at::Tensor hidden_leaf = hidden.clone().requires_grad_(true), head_leaf = head.clone().requires_grad_(true);
    const LossSum loss = linear_cross_entropy(hidden_leaf, head_leaf, targets, 64);
    loss.sum.backward();
    return std::vector{loss.sum.detach(), hidden_leaf.grad(), head_leaf.grad()};
  };
  const auto expected = outcome();
  Emulated emulated;
  const auto got = outcome();
  EXPECT_NEAR(got[0].item<double>(), expected[0].item<double>(), 1e-3 * expected[0].item<double>());
  for (size_t i = 1; i < got.size(); ++i) EXPECT_TRUE(near(got[i], expected[i], 8));  // sums over rows of probabilities that are rounded to the dtype
  std::vector<float> betas;  // of chunks of 64 rows
  for (const MatMul& call : calls)
    if (call.m == 33 && call.n == 16) betas.push_back(call.beta);
  EXPECT_EQ(betas, (std::vector<float>{0, 1, 1}));
}

TEST_P(OpsProducts, OfNothing) {
  Emulated emulated;
  EXPECT_EQ(product(random({0, 8}), random({8, 3})).size(0), 0);
  EXPECT_TRUE(same_bits(product(random({4, 0}), random({0, 3})), at::zeros({4, 3}, GetParam())));
}

INSTANTIATE_TEST_SUITE_P(Types, OpsProducts, testing::Values(at::kFloat, at::kBFloat16, at::kHalf), [](const auto& type) { return std::string(c10::toString(type.param)); });

TEST(OpsProduct, Tf32IsASetting) {
  const at::Tensor x = at::ones({2, 2});
  Emulated emulated;
  product(x, x);
  set_kernel_settings({.tf32 = true});
  product(x, x);
  set_kernel_settings({});
  EXPECT_FALSE(calls[0].tf32);
  EXPECT_TRUE(calls[1].tf32);
}

// Against products of the same values in fp32: errors of one and a half rounding to three digits behind the point, of each factor.
TEST(OpsProduct, Float8OfAFrozenWeight) {
  at::manual_seed(6);
  for (at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    const at::Tensor x = at::randn({7, 48}).to(dtype).requires_grad_(true), w = (at::randn({32, 48}) * 0.02).to(dtype), bias = at::randn({32}).to(dtype), weights = at::randn({7, 32}).to(dtype);
    Emulated emulated;
    const auto weight = float8_weight("layer", 32, 48);
    weight->set(w);
    const at::Tensor y = trireme::linear(x, LinearWeight(weight), bias, nullptr);
    y.backward(weights);
    auto error = [](const at::Tensor& got, const at::Tensor& expected) { return ((got.to(at::kFloat) - expected).norm() / expected.norm()).item<double>(); };
    const at::Tensor wide = w.to(at::kFloat);
    EXPECT_EQ(y.scalar_type(), dtype);
    EXPECT_LT(error(y.detach() - bias, at::matmul(x.detach().to(at::kFloat), wide.t())), 0x1p-4);
    EXPECT_LT(error(x.grad(), at::matmul(weights.to(at::kFloat), wide)), 0x1p-3);  // the gradient has two digits
    ASSERT_EQ(calls.size(), 2u);
    EXPECT_EQ(calls[1].a_type, kernels::Type::kFloat8E5M2);
  }
  EXPECT_THROW(float8_weight("layer", 32, 48)->set(at::ones({32, 48}, at::kBFloat16)), InternalError);  // no kernels
}

// What ranks hold of it multiplies as the whole does: codes and scale are those of the whole weight.
TEST(OpsProduct, SlicesOfAFloat8Weight) {
  at::manual_seed(7);
  const at::Tensor x = at::randn({5, 64}).to(at::kBFloat16), w = (at::randn({32, 64}) * 0.02).to(at::kBFloat16);
  Emulated emulated;
  const auto whole = float8_weight("layer", 32, 64);
  const std::vector<at::Tensor> codes = whole->encode(w);
  whole->set(w);
  for (const int64_t dim : {0, 1}) {
    const auto part = float8_weight("layer", 32, 64);
    part->keep(dim, 16, 32);
    for (size_t i = 0; i < codes.size(); ++i) {
      FrozenWeight::Leaf& leaf = part->leaves()[i];
      at::Tensor value = codes[i];
      for (int64_t d = 0; d < value.dim(); ++d) value = value.narrow(d, leaf.place.offset[static_cast<size_t>(d)], leaf.value.size(d));
      leaf.value = value.contiguous();
    }
    const auto times = [](const at::Tensor& rows, const LinearWeight& weight) { return trireme::linear(rows, weight, {}, nullptr); };
    if (dim == 0) {
      EXPECT_TRUE(same_bits(times(x, part), times(x, whole).narrow(1, 16, 16)));
    } else {
      at::Tensor only = at::zeros_like(x);
      only.narrow(1, 16, 16).copy_(x.narrow(1, 16, 16));
      EXPECT_TRUE(same_bits(times(x.narrow(1, 16, 16), part), times(only, whole)));
    }
  }
  try {
    float8_weight("model.layers.0.mlp.down_proj", 32, 64)->keep(1, 0, 24);
    ADD_FAILURE();
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(), "quant.base=fp8: model.layers.0.mlp.down_proj has 32 outputs and 24 inputs on a rank, and products of float8 take multiples of 16: add it to quant.skip, or set another parallel.tensor");
  }
}

// What the result's dtype asks for is done where ATen computes, too.
TEST(OpsProduct, OfTheHostMayHaveAResultInFp32) {
  at::manual_seed(5);
  const at::Tensor a = at::randn({3, 8}).to(at::kBFloat16), b = at::randn({8, 5}).to(at::kBFloat16), bias = at::randn({5}), exact = at::matmul(a.to(at::kFloat), b.to(at::kFloat));
  at::Tensor y = at::empty({3, 5});
  product(a, b, y, {.scale = 2, .bias_N = bias});
  EXPECT_TRUE(near(y, 2 * exact + bias, 2, at::kBFloat16));
  product(a, b, y, {.add = true});
  EXPECT_TRUE(near(y, 3 * exact + bias, 4, at::kBFloat16));
}

}  // namespace
}  // namespace trireme
