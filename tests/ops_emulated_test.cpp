// Operations through the kernels, emulated on the host, against the CPU code: values and gradients of every argument.
#include "support.h"

#include "base/check.h"
#include "kernels/kernels.h"
#include "ops/device.h"
#include "ops/ops.h"

namespace trireme {
namespace {

using test::near;

int num_calls = 0;  // of kernels

template <typename Args, void (*kernels::Kernels::*kOperation)(const Args&, kernels::Stream)>
void counted(const Args& args, kernels::Stream stream) {
  ++num_calls;
  (kernels::emulated_kernels().*kOperation)(args, stream);
}
template <auto kOperation>
struct Counted;
template <typename Args, void (*kernels::Kernels::*kOperation)(const Args&, kernels::Stream)>
struct Counted<kOperation> {
  explicit Counted(kernels::Kernels& kernels) { kernels.*kOperation = counted<Args, kOperation>; }
};

// While one lives, CPU tensors go to the emulated kernels, whose calls are counted.
struct Emulated {
  Emulated() {
    using K = kernels::Kernels;
    static K all{};
    Counted<&K::rms_norm_forward>{all}, Counted<&K::rms_norm_backward>{all}, Counted<&K::rope>{all}, Counted<&K::glu_forward>{all}, Counted<&K::glu_backward>{all}, Counted<&K::dropout>{all};
    Counted<&K::lora_down>{all}, Counted<&K::lora_up>{all}, Counted<&K::lora_gradient>{all}, Counted<&K::attention_forward>{all}, Counted<&K::attention_backward>{all};
    num_calls = 0;
    set_kernels(at::kCPU, &all);
  }
  ~Emulated() { set_kernels(at::kCPU, nullptr); }
};

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

INSTANTIATE_TEST_SUITE_P(Types, OpsEmulated, testing::Values(at::kFloat, at::kBFloat16, at::kHalf), [](const auto& type) { return std::string(c10::toString(type.param)); });

TEST(OpsDevice, OtherDtypesOfTheHostGoToItsOwnCode) {
  Emulated emulated;
  rms_norm(at::ones({2, 8}, at::kDouble), at::ones({8}, at::kDouble), 1e-5);
  EXPECT_EQ(num_calls, 0);
}

TEST(OpsDevice, ADeviceWithoutKernelsIsAnError) { EXPECT_THROW(kernels_of(at::empty({2}, at::kMeta)), InternalError); }

}  // namespace
}  // namespace trireme
