// A whole model through the emulated kernels, forward, backward and the steps of a run, beside the CPU code and beside fp64.
#include "support.h"

#include <ATen/Parallel.h>

#include "emulated_ops.h"
#include "model/lora.h"
#include "optim/optimizer.h"
#include "optim/clip.h"
#include "tiny_model.h"

namespace trireme {
namespace {

using kernels::Kernels;
using test::Emulated;
using test::num_calls_of;
using test::same_bits;

// Two layers, the second with a window; two heads of 64 to one of keys; biases.
ModelConfig config() {
  return test::config_of(test::small_config("qwen2", {{"hidden_size", 64}, {"intermediate_size", 96}, {"num_attention_heads", 2}, {"num_key_value_heads", 1},
                                                      {"head_dim", 64}, {"initializer_range", 0.12}, {"use_sliding_window", true}, {"sliding_window", 19},
                                                      {"max_window_layers", 1}}));
}

// Three samples in one row; a third of the tokens is learnt.
ModelInput packed() {
  ModelInput input = test::learnt(test::input_of({test::random_row(25, 1), test::random_row(12, 2), test::random_row(3, 3)}));
  for (int64_t t = 0; t < 40; ++t)
    if (t % 3) input.targets_T[t] = -100;
  input.dropout_seed = 5;
  return input;
}

// The weights of bf16, whatever the dtype, so that each dtype has the same model.
std::unique_ptr<Transformer> model_of(at::ScalarType dtype, bool lora, Recompute recompute = Recompute::kNone) {
  auto make = [&](at::ScalarType type) {
    auto model = std::make_unique<Transformer>(config(), type, 3);
    if (lora) attach_lora(*model, {4, 8.0, 0.2, false, {"all-linear"}}, 4);
    return model;
  };
  auto model = make(dtype), rounded = make(at::kBFloat16);
  at::NoGradGuard no_grad;
  const auto from = rounded->parameters(), to = model->parameters();
  for (size_t i = 0; i < to.size(); ++i) {
    at::Tensor value = from[i].value;
    if (value.dim() < 2 || to[i].name.ends_with("lora_B.weight")) value.add_(at::linspace(-0.2, 0.2, value.numel(), at::kBFloat16).view(value.sizes()));  // biases and B are not zero
    to[i].value.copy_(value);
  }
  model->set_training(true);
  model->set_recompute(recompute);
  return model;
}

struct Pass {
  at::Tensor loss;
  std::vector<std::string> names;
  std::vector<at::Tensor> gradients;
};

Pass pass_of(at::ScalarType dtype, bool lora, Recompute recompute = Recompute::kNone) {
  auto model = model_of(dtype, lora, recompute);
  const ModelInput input = packed();
  const LossSum loss = model->cross_entropy(model->forward(input), input.targets_T);
  loss.sum.backward();
  Pass pass{loss.sum.detach(), {}, {}};
  for (const auto& p : model->parameters()) {
    if (!p.value.requires_grad()) continue;
    pass.names.push_back(p.name);
    pass.gradients.push_back(p.value.grad());
  }
  return pass;
}

double norm_of(const at::Tensor& x) { return x.norm().item<double>(); }
double unit(at::ScalarType dtype) { return dtype == at::kFloat ? 0x1p-24 : 0x1p-9; }  // of rounding

class ModelEmulated : public testing::TestWithParam<std::tuple<at::ScalarType, bool>> {
 protected:
  ModelEmulated() { at::set_num_threads(1); }  // on matrices this small threads only wait for each other
};

// Two computations that round as often are about as far from the exact result: all gradients together nearly as the CPU code, each
// alone, of which some have few values, at most twice.
TEST_P(ModelEmulated, GradientsAreAsExactAsThoseOfTheCpu) {
  const auto [dtype, lora] = GetParam();
  const Pass exact = pass_of(at::kDouble, lora), cpu = pass_of(dtype, lora);
  Pass first;
  for (Recompute recompute : {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
    const Pass pass = [&] {
      Emulated emulated;
      return pass_of(dtype, lora, recompute);
    }();
    ASSERT_EQ(pass.names, exact.names);
    if (recompute != Recompute::kNone) {
      EXPECT_TRUE(same_bits(pass.loss, first.loss));
      for (size_t i = 0; i < pass.names.size(); ++i) EXPECT_TRUE(same_bits(pass.gradients[i], first.gradients[i])) << pass.names[i];
      continue;
    }
    first = pass;
    double errors = 0, errors_of_cpu = 0;
    for (size_t i = 0; i < pass.names.size(); ++i) {
      const double size = norm_of(exact.gradients[i]), error = norm_of(pass.gradients[i].to(at::kDouble) - exact.gradients[i]) / size;
      const double of_cpu = norm_of(cpu.gradients[i].to(at::kDouble) - exact.gradients[i]) / size;
      EXPECT_LT(error, 2 * of_cpu) << pass.names[i];
      errors += error * error, errors_of_cpu += of_cpu * of_cpu;
    }
    EXPECT_LT(std::sqrt(errors), 1.2 * std::sqrt(errors_of_cpu));
    // A value on its way through two layers and back is rounded some hundred times, now up, now down; slopes beyond 1 make it more.
    EXPECT_LT(std::sqrt(errors_of_cpu / static_cast<double>(pass.names.size())), 32 * unit(dtype));
    EXPECT_NEAR(pass.loss.item<double>(), exact.loss.item<double>(), 32 * unit(dtype) * 14);  // of 14 tokens, with losses of some 4
  }
}

// Losses of 20 steps.
std::vector<double> train(at::ScalarType dtype, bool lora) {
  auto model = model_of(dtype, lora);
  const ModelInput input = packed();
  std::vector<OptimTensor> tensors;
  std::vector<at::Tensor> leaves, gradients;
  for (const auto& p : model->parameters()) {
    if (!p.value.requires_grad()) continue;
    leaves.push_back(p.value);
    gradients.push_back(at::empty({p.value.numel()}, dtype == at::kDouble ? at::kDouble : at::kFloat));
    tensors.push_back({p.name, p.value.detach().view({-1}), gradients.back(), p.value.dim() > 1 ? 0.01 : 0.0});
  }
  Optimizer optimizer(std::move(tensors), {});
  const bool by_kernels = kernels_of(at::empty({0}));
  std::optional<DeviceNorm> norm;
  if (by_kernels) norm.emplace(at::kCPU);
  std::vector<double> losses;
  for (int step = 0; step < 20; ++step) {
    const LossSum loss = model->cross_entropy(model->forward(input), input.targets_T);
    loss.sum.backward();
    for (size_t i = 0; i < leaves.size(); ++i) {
      gradients[i].copy_(leaves[i].grad().view({-1}));
      leaves[i].mutable_grad().reset();
    }
    const double scale = 1.0 / static_cast<double>(loss.count), lr = 2e-3;
    losses.push_back(loss.sum.item<double>() * scale);
    if (by_kernels) {
      norm->measure(gradients, {1.0, scale});
      optimizer.step(lr, norm->factor);
    } else {
      optimizer.step(lr, scale * clip_scale(scale * std::sqrt(squared_norm(gradients)), 1.0));
    }
  }
  return losses;
}

// The roundings of 20 steps take the CPU code some way from the exact curve; the kernels at most twice as far (the sum of two such
// ways), and a unit of the loss.
TEST_P(ModelEmulated, LossesOfTwentySteps) {
  const auto [dtype, lora] = GetParam();
  const auto exact = train(at::kDouble, lora), cpu = train(dtype, lora);
  Emulated emulated;
  const auto losses = train(dtype, lora);
  double furthest = 0;
  for (size_t i = 0; i < 20; ++i) furthest = std::max(furthest, std::abs(cpu[i] - exact[i]));
  EXPECT_LT(furthest, 32 * unit(dtype) * exact[0]);
  for (size_t i = 0; i < 20; ++i) EXPECT_NEAR(losses[i], exact[i], 2 * furthest + exact[i] * 0x1p-23) << "step " << i + 1;
  EXPECT_LT(losses[19], 0.6 * losses[0]);

  // Each layer has two norms, of which a frozen embedding wants no gradient of the first, q and k to rotate, and three biases; the
  // step two kinds of weight decay.
  using K = Kernels;
  const int attention = dtype == at::kFloat ? 0 : 2;  // heads in fp32 are the CPU code's
  EXPECT_EQ((std::vector{num_calls_of<&K::attention_forward>, num_calls_of<&K::attention_backward>}), (std::vector{20 * attention, 20 * attention}));
  EXPECT_EQ((std::vector{num_calls_of<&K::rms_norm_forward>, num_calls_of<&K::rms_norm_backward>}), (std::vector{20 * 5, 20 * (lora ? 4 : 5)}));
  EXPECT_EQ((std::vector{num_calls_of<&K::rope>, num_calls_of<&K::glu_forward>, num_calls_of<&K::glu_backward>}), (std::vector{20 * 8, 20 * 2, 20 * 2}));
  EXPECT_EQ((std::vector{num_calls_of<&K::cross_entropy>, num_calls_of<&K::convert>}), (std::vector{20, 20 * (lora ? 1 : 2)}));
  EXPECT_EQ((std::vector{num_calls_of<&K::embedding>, num_calls_of<&K::embedding_gradient>, num_calls_of<&K::sum_rows>}),
            lora ? (std::vector{20, 0, 0}) : (std::vector{20, 20, 20 * 6}));
  // Each linear layer's mask in forward, and for the gradients of A and, but for the first three, which nobody asks for, of x: by
  // products that drop as they go, which are for 16 bits.
  const auto masked = std::vector{20 * 14, 20 * 14, 20 * 11}, none = std::vector{0, 0, 0};
  EXPECT_EQ((std::vector{num_calls_of<&K::lora_down>, num_calls_of<&K::lora_gradient>, num_calls_of<&K::lora_up>}), lora && dtype == at::kBFloat16 ? masked : none);
  EXPECT_EQ(num_calls_of<&K::dropout>, lora && dtype == at::kFloat ? 20 * (14 + 14 + 11) : 0);
  EXPECT_EQ((std::vector{num_calls_of<&K::gradient_norm>, num_calls_of<&K::clip_factor>, num_calls_of<&K::update>}), (std::vector{20, 0, 20 * (lora ? 1 : 2)}));
}

INSTANTIATE_TEST_SUITE_P(Types, ModelEmulated, testing::Combine(testing::Values(at::kFloat, at::kBFloat16), testing::Bool()),
                         [](const auto& p) { return std::string(c10::toString(std::get<0>(p.param))) + (std::get<1>(p.param) ? "Lora" : "Full"); });

}  // namespace
}  // namespace trireme
