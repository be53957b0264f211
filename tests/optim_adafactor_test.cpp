// Adafactor against its formula in double, in every way of cutting.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include "base/check.h"
#include "optim/adafactor.h"
#include "support.h"

namespace trireme {
namespace {

using test::near;
using test::same_bits;

constexpr OptimizerOptions kAdafactor{.kind = OptimizerKind::kAdafactor};

at::Tensor random(at::IntArrayRef sizes) {
  static auto generator = at::make_generator<at::CPUGeneratorImpl>(13);
  return at::randn(sizes, generator, at::kDouble);
}
at::ScalarType wide(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// As torch.optim.Adafactor writes it.
struct Plain {
  at::Tensor w, row, column, variance;
  explicit Plain(const at::Tensor& weight)
      : w(weight.to(at::kDouble)), row(at::zeros({weight.size(0), 1}, at::kDouble)), column(at::zeros({1, weight.size(-1)}, at::kDouble)), variance(at::zeros_like(w)) {}
  void step(const at::Tensor& g, double lr, double decay, int t, double epsilon) {
    const double mix = std::pow(t, -0.8), alpha = std::max(1e-3, w.square().mean().sqrt().item<double>()) * std::min(lr, 1 / std::sqrt(t));
    w = w * (1 - lr * decay);
    at::Tensor estimate;
    if (g.dim() > 1) {
      row = row + (g.square().mean(1, true) - row) * mix;
      column = column + (g.square().mean(0, true) - column) * mix;
      estimate = row.matmul(column) / std::max(row.mean().item<double>(), epsilon);
    } else {
      estimate = variance = variance + (g.square() - variance) * mix;
    }
    const at::Tensor u = g / estimate.clamp_min(epsilon * epsilon).sqrt();
    w = w - u * (alpha / std::max(1.0, u.square().mean().sqrt().item<double>()));
  }
};

OptimTensor whole(const at::Tensor& weight, const at::Tensor& grad, const std::string& name = "w") {
  return {name, weight.view({-1}), grad.view({-1}), 0.1, places_of(weight.sizes(), ShardSpec::whole(weight), 0), weight.sizes().vec()};
}

TEST(Adafactor, EqualsTheFormula) {
  for (auto dtype : {at::kDouble, at::kFloat, at::kBFloat16})
    for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{{7}, {1, 5}, {5, 1}, {33, 70}, {300, 40}, {6, 7}}) {
      at::Tensor weight = (random(sizes) * (sizes[0] == 6 ? 1e-5 : 1)).to(dtype), grad = at::empty(sizes, wide(dtype));
      Plain plain(weight);
      Optimizer optimizer({whole(weight, grad)}, kAdafactor);
      for (int t = 1; t <= 4; ++t) {
        const at::Tensor g = (random(sizes) * std::pow(10.0, 2 - t)).to(wide(dtype));
        grad.copy_(g * 4);
        const double lr = sizes[0] == 7 ? 0.8 : 0.05 * t;
        plain.step(g.to(at::kDouble), lr, 0.1, t, dtype == at::kDouble ? 0x1p-52 : 0x1p-23);
        optimizer.step(lr, 0.25);
      }
      EXPECT_TRUE(near(weight, plain.w)) << dtype << sizes;
      for (const OptimState& s : optimizer.state()) {
        if (s.kind == "master") continue;
        const at::Tensor expected = s.kind == "row_var" ? plain.row.view({-1}) : s.kind == "col_var" ? plain.column.view({-1}) : plain.variance;
        EXPECT_TRUE(near(s.value, expected)) << s.kind << dtype << sizes;
      }
      EXPECT_EQ(optimizer.state().size(), (sizes.size() > 1 ? 2u : 1u) + (dtype == at::kBFloat16));
    }
}

// Of two tensors, and of one of them again, as a rank has it whose elements another rank counts.
TEST(Adafactor, TensorsHaveTheirOwnSums) {
  std::vector<at::Tensor> weights = {random({30, 40}), random({50})}, grads = {random({30, 40}), random({50}) * 9};
  weights.push_back(weights[0].clone()), grads.push_back(grads[0].clone());
  Plain first(weights[0]), second(weights[1]);
  std::vector<OptimTensor> tensors = {whole(weights[0], grads[0]), whole(weights[1], grads[1], "v"), whole(weights[2], grads[2])};
  tensors[2].counts = false;
  Optimizer optimizer(tensors, kAdafactor);
  for (int t = 1; t <= 2; ++t) {
    first.step(grads[0], 0.05, 0.1, t, 0x1p-52), second.step(grads[1], 0.05, 0.1, t, 0x1p-52);
    optimizer.step(0.05);
  }
  EXPECT_TRUE(near(weights[0], first.w));
  EXPECT_TRUE(near(weights[1], second.w));
  EXPECT_TRUE(same_bits(weights[2], weights[0]));
}

TEST(Adafactor, GradientsOfZeroMoveNothing) {
  at::Tensor weight = random({6, 5}).to(at::kFloat), start = weight.clone();
  OptimTensor tensor = whole(weight, at::zeros({6, 5}));
  tensor.weight_decay = 0;
  Optimizer optimizer({tensor}, kAdafactor);
  for (int t = 0; t < 2; ++t) optimizer.step(0.1);
  EXPECT_TRUE(same_bits(weight, start));
}

// Parts of rows, of columns and flat ones add up what they have.
TEST(Adafactor, ShardsAddUpWhatTheyHave) {
  constexpr int64_t kRows = 37, kWidth = 50;
  const at::Tensor start = random({kRows, kWidth}), g = random({kRows, kWidth});
  struct Cut {
    std::vector<int64_t> rows, columns;
    int64_t piece;
    int threads;
  };
  auto train = [&](const Cut& cut, at::ScalarType dtype) {
    const int before = at::get_num_threads();
    at::set_num_threads(cut.threads);
    const at::Tensor result = at::zeros({kRows, kWidth}, dtype);
    std::vector<std::pair<at::Tensor, at::Tensor>> slices;
    std::vector<OptimTensor> tensors;
    for (size_t r = 0; r + 1 < cut.rows.size(); ++r)
      for (size_t c = 0; c + 1 < cut.columns.size(); ++c) {
        const auto part = [&](const at::Tensor& x) { return x.slice(0, cut.rows[r], cut.rows[r + 1]).slice(1, cut.columns[c], cut.columns[c + 1]); };
        slices.emplace_back(part(start).to(dtype).clone(at::MemoryFormat::Contiguous), part(result));
        const at::Tensor weight = slices.back().first.view({-1}), grad = part(g).to(wide(dtype)).clone(at::MemoryFormat::Contiguous).view({-1});
        for (int64_t i = 0; i < weight.numel(); i += cut.piece)
          tensors.push_back({"w", weight.slice(0, i, i + cut.piece), grad.slice(0, i, i + cut.piece), 0.1,
                             places_of(slices.back().first.sizes(), {{kRows, kWidth}, {cut.rows[r], cut.columns[c]}, false}, i), {kRows, kWidth}});
      }
    Optimizer optimizer(tensors, {.kind = OptimizerKind::kAdafactor, .masters = false});
    for (int t = 0; t < 3; ++t) optimizer.step(0.05);
    at::set_num_threads(before);
    for (auto& [from, to] : slices) to.copy_(from);
    return result;
  };
  const Cut all{{0, kRows}, {0, kWidth}, kRows * kWidth, 1};
  for (auto dtype : {at::kDouble, at::kFloat}) {
    const at::Tensor one = train(all, dtype);
    EXPECT_FALSE(same_bits(one, start.to(dtype)));
    EXPECT_TRUE(same_bits(train({{0, kRows}, {0, kWidth}, kRows * kWidth, 3}, dtype), one));
    for (const Cut& cut : {Cut{{0, kRows}, {0, kWidth}, 333, 2}, {{0, 11, kRows}, {0, kWidth}, 10000, 1}, {{0, kRows}, {0, 21, kWidth}, 77, 3}})
      EXPECT_TRUE(near(train(cut, dtype), one)) << dtype;
  }
  // Rounded by the same bits: but for what a last bit of the direction turns.
  const at::Tensor one = train(all, at::kBFloat16), cut = train({{0, kRows}, {0, 21, kWidth}, 77, 3}, at::kBFloat16);
  EXPECT_LT((one != cut).sum().item<int64_t>(), kRows * kWidth / 50);
}

TEST(Adafactor, GoesOnFromItsState) {
  for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{{40}, {20, 30}}) {
    at::Tensor weight = random(sizes).to(at::kBFloat16), grad = random(sizes).to(at::kFloat);
    Optimizer first({whole(weight, grad)}, kAdafactor);
    first.step(0.05);
    at::Tensor copy = weight.clone();
    Optimizer second({whole(copy, grad)}, kAdafactor);
    auto from = first.state(), to = second.state();
    for (size_t i = 0; i < from.size(); ++i) to[i].value.copy_(from[i].value);
    second.set_num_steps(1);
    first.step(0.05);
    second.step(0.05);
    EXPECT_TRUE(same_bits(copy, weight));
  }
}

TEST(Adafactor, CountsBytes) {
  EXPECT_EQ(Optimizer::state_bytes(at::kFloat, kAdafactor, 200, {10, 20}), 4u * 30);
  EXPECT_EQ(Optimizer::state_bytes(at::kBFloat16, kAdafactor, 100, {10, 20}), 4u * (30 + 100));  // masters of a half
  EXPECT_EQ(Optimizer::state_bytes(at::kDouble, kAdafactor, 20, {20}), 8u * 20);
  EXPECT_EQ(Adafactor::sums_bytes({10, 20}), 8u * 32);
}

}  // namespace
}  // namespace trireme
