// The kernels of RMSNorm and LayerNorm, emulated, against the loops that define them.
#include "emulated.h"

namespace trireme::kernels {
namespace {

using namespace test;
using reference::round_to;

struct Case {
  Type type;
  int64_t num_rows, width;
};
void PrintTo(const Case& c, std::ostream* out) { *out << name_of(c.type) << " " << c.num_rows << " x " << c.width; }

class RmsNormKernels : public testing::TestWithParam<Case> {};

// A sum of n fp32 terms is wrong by at most some sqrt(n) roundings of 2^-24; five cover the longest row here with its tail.
constexpr double kSum = 64 * 0x1p-24;

TEST_P(RmsNormKernels, AreTheLoops) {
  const auto [type, num_rows, width] = GetParam();
  const Kernels& kernels = emulated_kernels();
  for (bool with_residual : {false, true}) {
    const Values x = random_values(type, num_rows * width, 1), residual = with_residual ? random_values(type, num_rows * width, 2) : Values();
    const Values weight = random_values(type, width, 3), grad_y = random_values(type, num_rows * width, 4);
    const Values grad_sum = with_residual ? random_values(type, num_rows * width, 5) : Values();
    const auto expected = reference::rms_norm(type, x, residual, weight, 1e-5);

    Tensor in(type, x), other(type, residual), w(type, weight), y(type, num_rows * width), sum(type, num_rows * width), rstd(Type::kFloat32, num_rows);
    kernels.rms_norm_forward({type, num_rows, width, in.data(), with_residual ? other.data() : nullptr, w.data(), 1e-5f, y.data(),
                              with_residual ? sum.data() : nullptr, rstd.memory.as<float>()}, nullptr);
    EXPECT_TRUE(near(rstd.values(), expected.rstd, kSum, 0));
    if (with_residual) {
      EXPECT_EQ(sum.values(), expected.s);
    }
    // Two roundings, of which the first may fall the other way where rstd is another one in its last bits.
    EXPECT_TRUE(near(y.values(), expected.y, 3 * unit(type) + kSum, 8 * smallest_unit(type)));  // weights are below 7

    Tensor gy(type, grad_y), gs(type, grad_sum), s(type, expected.s), r(Type::kFloat32, expected.rstd), gx(type, num_rows * width), gw(Type::kFloat32, width);
    Guarded workspace(rms_norm_workspace(num_rows, width) * 4);
    kernels.rms_norm_backward({type, num_rows, width, gy.data(), with_residual ? gs.data() : nullptr, s.data(), w.data(), r.memory.as<float>(), gx.data(),
                               gw.memory.as<float>(), workspace.as<float>()}, nullptr);
    const auto gradient = reference::rms_norm_gradient(type, grad_y, grad_sum, expected.s, weight, r.values());
    EXPECT_TRUE(near(gx.values(), gradient.x, unit(type), kSum * 8));  // of the largest term
    // Each row's term may be rounded the other way.
    EXPECT_TRUE(near(gw.values(), gradient.weight, kSum, (2 * unit(type) + kSum) * 16 * std::sqrt(static_cast<double>(num_rows))));

    Tensor alone(type, num_rows * width);  // without the weights' gradient
    kernels.rms_norm_backward({type, num_rows, width, gy.data(), with_residual ? gs.data() : nullptr, s.data(), w.data(), r.memory.as<float>(), alone.data(),
                               nullptr, nullptr}, nullptr);
    EXPECT_EQ(alone.memory.bits(), gx.memory.bits());
    Tensor again(Type::kFloat32, width);   // without the other, in another order of threads
    kernels.rms_norm_backward({type, num_rows, width, gy.data(), nullptr, s.data(), w.data(), r.memory.as<float>(), nullptr, again.memory.as<float>(),
                               workspace.as<float>()}, nullptr);
    EXPECT_EQ(again.memory.bits(), gw.memory.bits());
  }
}

class LayerNormKernels : public testing::TestWithParam<Case> {};

TEST_P(LayerNormKernels, AreTheLoops) {
  const auto [type, num_rows, width] = GetParam();
  const Kernels& kernels = emulated_kernels();
  for (bool with_all : {false, true}) {  // residual and bias
    Values x = random_values(type, num_rows * width, 1), residual = with_all ? random_values(type, num_rows * width, 2) : Values();
    for (double& value : x) value = round_to(type, value + 3);  // a mean to take off
    const Values weight = random_values(type, width, 3), grad_y = random_values(type, num_rows * width, 4), bias = with_all ? random_values(type, width, 6) : Values();
    const Values grad_sum = with_all ? random_values(type, num_rows * width, 5) : Values();
    const auto expected = reference::layer_norm(type, x, residual, weight, bias, 1e-5);

    Tensor in(type, x), other(type, residual), w(type, weight), b(type, bias), y(type, num_rows * width), sum(type, num_rows * width);
    Tensor mean(Type::kFloat32, num_rows), rstd(Type::kFloat32, num_rows);
    kernels.layer_norm_forward({type, num_rows, width, in.data(), with_all ? other.data() : nullptr, w.data(), with_all ? b.data() : nullptr, 1e-5f, y.data(),
                                with_all ? sum.data() : nullptr, mean.memory.as<float>(), rstd.memory.as<float>()}, nullptr);
    EXPECT_TRUE(near(mean.values(), expected.mean, 0, kSum * 4));  // values are some 4 in the mean
    // The differences, which are of the size of 1, are as wrong as the mean.
    EXPECT_TRUE(near(rstd.values(), expected.rstd, 3 * kSum, 0));
    if (with_all) {
      EXPECT_EQ(sum.values(), expected.s);
    }
    EXPECT_TRUE(near(y.values(), expected.y, unit(type) + kSum, kSum * 16 + smallest_unit(type)));  // terms are below 16

    Tensor gy(type, grad_y), gs(type, grad_sum), s(type, expected.s), m(Type::kFloat32, expected.mean), r(Type::kFloat32, expected.rstd), gx(type, num_rows * width);
    Tensor gw(Type::kFloat32, width), gb(Type::kFloat32, width);
    Guarded workspace(layer_norm_workspace(num_rows, width) * 4);
    LayerNormBackward p{type, num_rows, width, gy.data(), with_all ? gs.data() : nullptr, s.data(), w.data(), m.memory.as<float>(), r.memory.as<float>(), gx.data(),
                        gw.memory.as<float>(), gb.memory.as<float>(), workspace.as<float>()};
    kernels.layer_norm_backward(p, nullptr);
    const auto gradient = reference::layer_norm_gradient(grad_y, grad_sum, expected.s, weight, m.values(), r.values());
    // Of the largest term; a row of one value has rstd 300, which its difference of 0 is multiplied with.
    EXPECT_TRUE(near(gx.values(), gradient.x, unit(type), kSum * 8 * std::max(1.0, *std::max_element(expected.rstd.begin(), expected.rstd.end())) + smallest_unit(type)));
    EXPECT_TRUE(near(gw.values(), gradient.weight, kSum, kSum * 16 * std::sqrt(static_cast<double>(num_rows))));
    EXPECT_TRUE(near(gb.values(), gradient.bias, kSum, kSum * 4 * std::sqrt(static_cast<double>(num_rows))));

    Tensor alone(type, num_rows * width), again(Type::kFloat32, width), other_bias(Type::kFloat32, width);  // each by itself, in another order of threads
    p.grad_x = alone.data(), p.grad_weight = p.grad_bias = p.workspace = nullptr;
    kernels.layer_norm_backward(p, nullptr);
    EXPECT_EQ(alone.memory.bits(), gx.memory.bits());
    p.grad_x = nullptr, p.grad_weight = again.memory.as<float>(), p.workspace = workspace.as<float>();
    kernels.layer_norm_backward(p, nullptr);
    EXPECT_EQ(again.memory.bits(), gw.memory.bits());
    p.grad_weight = nullptr, p.grad_bias = other_bias.memory.as<float>();
    kernels.layer_norm_backward(p, nullptr);
    EXPECT_EQ(other_bias.memory.bits(), gb.memory.bits());
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (Type type : {Type::kFloat32, Type::kBFloat16, Type::kFloat16})
    for (const auto& [rows, width] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 15}, {9, 16}, {8, 17}, {17, 128}, {5, 257}, {3, 1024}, {2, 1032}, {1, 2049}, {2, 8200}, {1, 16384}})
      all.push_back({type, rows, width});
  all.push_back({Type::kBFloat16, 1030, 24});  // more rows than partial sums
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, RmsNormKernels, testing::ValuesIn(cases()));
INSTANTIATE_TEST_SUITE_P(Shapes, LayerNormKernels, testing::ValuesIn(cases()));

TEST(LayerNormKernels, ReadRowsAndBiasAtOddAddresses) {
  const Type type = Type::kFloat16;
  Tensor x(type, random_values(type, 64, 1)), w(type, random_values(type, 32, 2)), b(type, random_values(type, 33, 3)), y(type, 64);
  Tensor mean(Type::kFloat32, 2), rstd(Type::kFloat32, 2);
  emulated_kernels().layer_norm_forward({type, 2, 32, x.data(), nullptr, w.data(), b.memory.as<uint16_t>() + 1, 1e-6f, y.data(), nullptr, mean.memory.as<float>(),
                                         rstd.memory.as<float>()}, nullptr);
  const Values bias = b.values();
  EXPECT_TRUE(near(y.values(), reference::layer_norm(type, x.values(), {}, w.values(), {bias.begin() + 1, bias.end()}, 1e-6).y, unit(type) + kSum, kSum * 16));
}

TEST(RmsNormKernels, ReadRowsAtOddAddresses) {
  Tensor x(Type::kBFloat16, random_values(Type::kBFloat16, 65, 1)), w(Type::kBFloat16, random_values(Type::kBFloat16, 32, 2)), y(Type::kBFloat16, 64);
  Tensor rstd(Type::kFloat32, 2);
  emulated_kernels().rms_norm_forward({Type::kBFloat16, 2, 32, x.memory.as<uint16_t>() + 1, nullptr, w.data(), 1e-6f, y.data(), nullptr, rstd.memory.as<float>()}, nullptr);
  const Values all = x.values();
  EXPECT_TRUE(near(y.values(), reference::rms_norm(Type::kBFloat16, {all.begin() + 1, all.end()}, {}, w.values(), 1e-6).y, 3 * unit(Type::kBFloat16) + kSum, 0));
}

TEST(RmsNormKernels, WithoutRowsDoNothingButClearTheGradient) {
  Tensor w(Type::kFloat32, Values(8, 1)), gw(Type::kFloat32, 8);
  emulated_kernels().rms_norm_forward({Type::kFloat32, 0, 8, nullptr, nullptr, w.data(), 1e-6f, nullptr, nullptr, nullptr}, nullptr);
  emulated_kernels().rms_norm_backward({Type::kFloat32, 0, 8, nullptr, nullptr, nullptr, w.data(), nullptr, nullptr, gw.memory.as<float>(), nullptr}, nullptr);
  EXPECT_EQ(gw.values(), Values(8, 0));
}

TEST(LayerNormKernels, WithoutRowsDoNothingButClearTheGradients) {
  Tensor gw(Type::kFloat32, 8), gb(Type::kFloat32, 8);
  emulated_kernels().layer_norm_forward({Type::kFloat32, 0, 8, nullptr, nullptr, nullptr, nullptr, 1e-6f, nullptr, nullptr, nullptr, nullptr}, nullptr);
  emulated_kernels().layer_norm_backward({Type::kFloat32, 0, 8, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, gw.memory.as<float>(), gb.memory.as<float>(), nullptr}, nullptr);
  EXPECT_EQ(gw.values(), Values(8, 0));
  EXPECT_EQ(gb.values(), Values(8, 0));
}

TEST(LayerNormKernels, RefuseRowsThatDoNotFit) {
  auto sentence = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const Refused& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(sentence([] { emulated_kernels().layer_norm_forward({Type::kBFloat16, 2, 16392, nullptr, nullptr, nullptr, nullptr, 1, nullptr, nullptr, nullptr, nullptr}, nullptr); }),
            "layer_norm_forward of 2 rows of 16392 values: a row has 1 to 16384");
  EXPECT_EQ(sentence([] { emulated_kernels().layer_norm_backward({Type::kBFloat16, 2, 8193, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr}, nullptr); }),
            "layer_norm_backward of 2 rows of 8193 values: a row has 1 to 8192 where it is not in whole 16 bytes");
}

TEST(RmsNormKernels, RefuseRowsThatDoNotFit) {
  auto refusal = [](int64_t width) -> std::string {
    try {
      emulated_kernels().rms_norm_forward({Type::kBFloat16, 2, width, nullptr, nullptr, nullptr, 1e-6f, nullptr, nullptr, nullptr}, nullptr);
    } catch (const Refused& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(refusal(16392), "rms_norm_forward of 2 rows of 16392 values: a row has 1 to 16384");
  EXPECT_EQ(refusal(8193), "rms_norm_forward of 2 rows of 8193 values: a row has 1 to 8192 where it is not in whole 16 bytes");
  EXPECT_EQ(refusal(0), "rms_norm_forward of 2 rows of 0 values: a row has 1 to 16384");
}

}  // namespace
}  // namespace trireme::kernels
