// What adapters begin with (PiSSA, LoftQ), and a layer with a magnitude (DoRA), by their definitions.
#include "model/lora_init.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "model/lora.h"
#include "ops/ops.h"
#include "quant/four_bit_weight.h"

namespace trireme {
namespace {

at::Tensor normal(at::IntArrayRef sizes, uint64_t seed, at::ScalarType dtype = at::kDouble) {
  at::manual_seed(seed);
  return at::randn(sizes, at::TensorOptions(at::kDouble)).to(dtype);
}

double length_of(const at::Tensor& x) { return x.to(at::kDouble).norm().item<double>(); }

TEST(LoraInit, PissaTakesTheLargestDirectionsOutOfTheBase) {
  for (const auto& sizes : {std::vector<int64_t>{12, 20}, {20, 12}}) {
    const at::Tensor w = normal(sizes, 1);
    const LoraStart start = pissa_start(w, 4, 0.5);
    const at::Tensor update = at::matmul(start.b_OR, start.a_RI) * 0.5;
    EXPECT_LT(length_of(start.base_OI + update - w), 1e-13);
    const at::Tensor all = std::get<1>(at::linalg_svd(w, false)), left = std::get<1>(at::linalg_svd(start.base_OI, false)), taken = std::get<1>(at::linalg_svd(update, false));
    EXPECT_LT(length_of(taken.narrow(0, 0, 4) - all.narrow(0, 0, 4)), 1e-12);
    EXPECT_LT(length_of(left.narrow(0, 0, 8) - all.narrow(0, 4, 8)), 1e-12);
    const at::Tensor columns = start.b_OR.norm(2, {0}), rows = start.a_RI.norm(2, {1});  // the root of a value goes to each side
    EXPECT_LT(length_of(columns - rows), 1e-13);
    EXPECT_TRUE((start.b_OR.amax(0) == start.b_OR.abs().amax(0)).all().item<bool>());
    const LoraStart negative = pissa_start(-w, 4, 0.5);  // signs are of the values
    EXPECT_LT(length_of(negative.b_OR - start.b_OR), 1e-12);
    EXPECT_LT(length_of(negative.a_RI + start.a_RI), 1e-12);
  }
}

TEST(LoraInit, PissaRoundsTheBaseBesideTheAdapterAsItIsRounded) {
  const at::Tensor w = normal({24, 16}, 2, at::kBFloat16);
  const LoraStart start = pissa_start(w, 4, 2.0);
  EXPECT_EQ(start.base_OI.scalar_type(), at::kBFloat16);
  EXPECT_EQ(start.a_RI.scalar_type(), at::kBFloat16);
  const at::Tensor again = start.base_OI.to(at::kDouble) + at::matmul(start.b_OR.to(at::kDouble), start.a_RI.to(at::kDouble)) * 2.0;
  EXPECT_LE((again - w.to(at::kDouble)).abs().max().item<double>(), std::ldexp(start.base_OI.abs().max().item<double>(), -8));
}

TEST(LoraInit, LoftqLosesLessWithEachIteration) {
  const at::Tensor w = normal({64, 128}, 3, at::kFloat);
  const auto layer = four_bit_weight("layer", 64, 128, {FourBit::kNf4, 64, false, at::kFloat});
  const auto quantized = [&](const at::Tensor& base) {
    at::Tensor out = at::empty_like(base);
    std::dynamic_pointer_cast<DequantizedWeight>(layer)->decode(layer->encode(base), out);
    return out;
  };
  double last = length_of(w - quantized(w));
  for (const int64_t iterations : {1, 2, 5}) {
    const LoraStart start = loftq_start(w, 8, 0.25, iterations, quantized);
    const double lost = length_of(w - quantized(start.base_OI) - at::matmul(start.b_OR, start.a_RI) * 0.25);
    EXPECT_LT(lost, last) << iterations;
    EXPECT_EQ(at::equal(start.base_OI, w), iterations == 1);
    last = lost;
  }
}

// U diag(values) V^T of random U and V.
at::Tensor with_singular_values(const at::Tensor& values, int64_t rows, int64_t columns) {
  const at::Tensor u = std::get<0>(at::linalg_qr(normal({rows, values.size(0)}, 20))), v = std::get<0>(at::linalg_qr(normal({columns, values.size(0)}, 21)));
  return at::matmul(u * values, v.t());
}

// The sine of the largest angle between the spaces of the columns.
double largest_angle(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor q = std::get<0>(at::linalg_qr(a)), other = std::get<0>(at::linalg_qr(b));
  return std::get<1>(at::linalg_svd(other - at::matmul(q, at::matmul(q.t(), other)), false)).max().item<double>();
}

TEST(LoraInit, PissaByIterationsIsNearlyTheWhole) {
  const at::Tensor values = at::pow(0.8, at::arange(60, at::kDouble));
  for (const auto& sizes : {std::vector<int64_t>{60, 200}, {200, 60}}) {
    const at::Tensor w = with_singular_values(values, sizes[0], sizes[1]);
    const LoraStart exact = pissa_start(w, 4, 0.5);
    double last = 1;
    for (const auto& [iterations, bound] : std::vector<std::pair<int64_t, double>>{{1, 1e-1}, {4, 1e-4}, {16, 1e-13}}) {  // (0.8^9)^(2 iterations) and a factor
      const LoraStart start = pissa_start(w, 4, 0.5, iterations);
      EXPECT_LT(length_of(start.base_OI + at::matmul(start.b_OR, start.a_RI) * 0.5 - w), 1e-13);  // whatever was found
      const double angle = std::max(largest_angle(start.b_OR, exact.b_OR), largest_angle(start.a_RI.t(), exact.a_RI.t()));
      EXPECT_LT(angle, bound) << iterations;
      EXPECT_LT(angle, last) << iterations;
      last = angle;
      if (iterations == 16) { EXPECT_LT(length_of(start.b_OR - exact.b_OR) + length_of(start.a_RI - exact.a_RI), 1e-11); }
    }
  }
  const at::Tensor few = normal({9, 40}, 22);  // too few directions for vectors beside those of the rank: all of them
  EXPECT_TRUE(at::equal(pissa_start(few, 4, 1, 1).b_OR, pissa_start(few, 4, 1).b_OR));
}

TEST(LoraInit, WeightsOfALowerRankBeginWithWhatThereIs) {
  const at::Tensor w = with_singular_values(at::tensor({3.0, 2.0}, at::kDouble), 30, 40);
  for (const int64_t iterations : {0, 4}) {
    const LoraStart start = pissa_start(w, 4, 2.0, iterations);
    EXPECT_LT(length_of(start.base_OI), 1e-14);
    EXPECT_LT(length_of(at::matmul(start.b_OR, start.a_RI) * 2.0 - w), 1e-14);
    const LoraStart zeros = pissa_start(at::zeros_like(w), 4, 2.0, iterations);
    EXPECT_EQ(length_of(zeros.a_RI) + length_of(zeros.b_OR) + length_of(zeros.base_OI), 0);
  }
}

TEST(LoraInit, HasTheSameBitsWithAnyNumberOfThreads) {
  const at::Tensor w = normal({256, 512}, 23);  // in float64, where nothing is rounded away
  const auto rounded = [](const at::Tensor& base) { return (base * 4).round() / 4; };
  const int before = at::get_num_threads();
  std::vector<at::Tensor> first;
  for (const int threads : {1, 2, 4}) {
    at::set_num_threads(threads);
    std::vector<at::Tensor> all;
    for (const LoraStart& start : {pissa_start(w, 8, 0.5), pissa_start(w, 8, 0.5, 4), loftq_start(w, 8, 0.5, 2, rounded)}) all.insert(all.end(), {start.base_OI, start.a_RI, start.b_OR});
    EXPECT_EQ(at::get_num_threads(), threads);
    if (first.empty()) first = all;
    for (size_t i = 0; i < all.size(); ++i) EXPECT_TRUE(at::equal(all[i], first[i])) << threads << " threads, tensor " << i;
  }
  at::set_num_threads(before);
}

TEST(LoraInit, WhatTakesLongIsSaid) {
  StartProgress progress("pissa", 224);
  EXPECT_EQ(progress.line(1, 9.9), "");
  EXPECT_EQ(progress.line(2, 20), "lora.init=pissa: 2 of 224 layers, about 37 minutes left; lora.init=pissa_niter_16 takes a fraction of that");
  EXPECT_EQ(progress.line(3, 49), "");
  EXPECT_EQ(progress.line(214, 2140), "lora.init=pissa: 214 of 224 layers, about 100 s left");
  EXPECT_EQ(progress.line(224, 2240), "");  // that is all of them
  EXPECT_EQ(StartProgress("pissa_niter_4", 9000).line(1, 11), "lora.init=pissa_niter_4: 1 of 9000 layers, about 1650 minutes left");
}

TEST(LoraInit, LoftqIsRightForAnyAlphaAndPeftsForThatOfTheRank) {
  const at::Tensor w = normal({32, 48}, 24);
  const auto rounded = [](const at::Tensor& base) { return base.round(); };
  const auto rest = [&](const LoraStart& start, double scale) { return length_of(w - rounded(start.base_OI) - at::matmul(start.b_OR, start.a_RI) * scale); };
  const LoraStart as_peft = loftq_start(w, 4, 1, 1, rounded);
  for (const double scale : {0.25, 4.0}) {
    const LoraStart start = loftq_start(w, 4, scale, 1, rounded);
    EXPECT_NEAR(rest(start, scale), rest(as_peft, 1), 1e-12) << scale;
    EXPECT_GT(rest(as_peft, scale), 1.05 * rest(start, scale)) << scale;  // what PEFT's would leave
  }
}

// y = (x - d) W^T + m / |W + scale B A| (d W^T + scale d A^T B^T) + bias with a constant norm, by ATen's operations.
TEST(Dora, ForwardAndGradientsAreThoseOfTheFormula) {
  for (const double p : {0.0, 0.4}) {
    Linear layer;
    layer.path = "layer", layer.index = 5;
    layer.weight_OI = normal({6, 10}, 4), layer.bias_O = normal({6}, 5);
    layer.lora = std::make_unique<LoraAdapter>();
    LoraAdapter& adapter = *layer.lora;
    adapter.a_RI = normal({3, 10}, 6).requires_grad_(true), adapter.b_OR = normal({6, 3}, 7).requires_grad_(true);
    adapter.magnitude_O = normal({6}, 8).requires_grad_(true);
    adapter.scale = 0.5, adapter.dropout = p;
    const at::Tensor x = normal({7, 10}, 9).requires_grad_(true), weights = normal({7, 6}, 10);
    const DropoutContext dropout{11, at::arange(7), true};
    const std::vector<at::Tensor> leaves{x, adapter.a_RI, adapter.b_OR, adapter.magnitude_O};
    const auto gradients = [&](const at::Tensor& y) {
      for (const at::Tensor& leaf : leaves) leaf.mutable_grad() = at::Tensor();
      (y * weights).sum().backward();
      std::vector<at::Tensor> out;
      for (const at::Tensor& leaf : leaves) out.push_back(leaf.grad().clone());
      return out;
    };
    const at::Tensor y = layer.forward(x, dropout);
    const auto found = gradients(y);
    const at::Tensor d = p > 0 ? trireme::dropout(x, {p, 11, 5, at::arange(7)}) : x;
    const at::Tensor norm_O = (layer.weight_OI + at::matmul(adapter.b_OR, adapter.a_RI) * 0.5).norm(2, {1}).detach();
    const at::Tensor turned = at::matmul(d, layer.weight_OI.t()) + at::matmul(at::matmul(d, adapter.a_RI.t()), adapter.b_OR.t()) * 0.5;
    const at::Tensor expected = at::matmul(x - d, layer.weight_OI.t()) + turned * (adapter.magnitude_O / norm_O) + layer.bias_O;
    EXPECT_LT(length_of(y - expected), 1e-12) << p;
    const auto wanted = gradients(expected);
    for (size_t i = 0; i < wanted.size(); ++i) EXPECT_LT(length_of(found[i] - wanted[i]), 1e-12) << p << " " << i;
    if (p > 0) continue;
    at::Tensor merged = layer.weight_OI.clone();
    merge_lora(merged, adapter);
    EXPECT_LT(length_of(at::matmul(x, merged.t()) + layer.bias_O - y), 1e-12);
  }
}

}  // namespace
}  // namespace trireme
