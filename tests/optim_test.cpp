// The optimizer against a plain loop in double, clipping and schedules against their formulas.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include <numbers>

#include "base/check.h"
#include "optim/adamw.h"
#include "optim/clip.h"
#include "optim/loss_scale.h"
#include "optim/offload.h"
#include "optim/schedule.h"
#include "optim/update_loops.h"
#include "support.h"

namespace trireme {
namespace {

using test::near;
using test::same_bits;

at::Tensor random(int64_t size, double scale = 1.0) {
  static auto generator = at::make_generator<at::CPUGeneratorImpl>(11);
  return at::randn({size}, generator, at::kDouble) * scale;
}
at::ScalarType wide(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

struct PlainAdamW {
  std::vector<double> w, m, v;
  explicit PlainAdamW(const at::Tensor& weight) {
    at::Tensor d = weight.to(at::kDouble).contiguous();
    w.assign(d.data_ptr<double>(), d.data_ptr<double>() + d.numel());
    m.assign(w.size(), 0.0);
    v.assign(w.size(), 0.0);
  }
  void step(int t, const at::Tensor& grad, double lr, double decay, double b1, double b2, double eps) {
    for (size_t i = 0; i < w.size(); ++i) {
      const double g = grad.data_ptr<double>()[i];
      w[i] *= 1 - lr * decay;
      m[i] = b1 * m[i] + (1 - b1) * g;
      v[i] = b2 * v[i] + (1 - b2) * g * g;
      w[i] -= lr / (1 - std::pow(b1, t)) * m[i] / (std::sqrt(v[i]) / std::sqrt(1 - std::pow(b2, t)) + eps);
    }
  }
  at::Tensor weight() { return at::tensor(w, at::kDouble); }
};

TEST(AdamW, EqualsThePlainLoop) {
  for (auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf})
    for (int64_t size : {1, 37, 20000}) {
      at::Tensor weight = random(size).to(dtype), grad = at::empty({size}, wide(dtype));
      PlainAdamW plain(weight);
      AdamW optimizer({{"w", weight, grad, 0.1}}, {0.8, 0.95, 1e-6});
      for (int t = 1; t <= 5; ++t) {
        at::Tensor g = random(size, 0.1 * t).to(wide(dtype));
        grad.copy_(g * 4);
        plain.step(t, g.to(at::kDouble), 0.01 * t, 0.1, 0.8, 0.95, 1e-6);
        optimizer.step(0.01 * t, 0.25);
      }
      EXPECT_EQ(optimizer.num_steps(), 5);
      EXPECT_TRUE(near(weight, plain.weight())) << dtype;
      for (auto& s : optimizer.state()) {
        at::Tensor expected = s.kind == "master"    ? plain.weight()
                              : s.kind == "exp_avg" ? at::tensor(plain.m, at::kDouble)
                                                    : at::tensor(plain.v, at::kDouble);
        EXPECT_TRUE(near(s.value, expected)) << dtype << " " << s.kind;
      }
      EXPECT_EQ(optimizer.state().size(), wide(dtype) == dtype ? 2u : 3u);
    }
}

TEST(AdamW, MasterKeepsWhatTheWeightCannot) {
  at::Tensor weight = at::ones({4}, at::kBFloat16), grad = at::ones({4});
  AdamW optimizer({{"w", weight, grad, 0.0}}, {});
  for (int t = 0; t < 8; ++t) optimizer.step(1e-3);  // each step moves by 0.001, less than half of bf16's 2^-8
  EXPECT_TRUE(near(optimizer.state()[2].value, at::full({4}, 0.992)));
  EXPECT_TRUE(same_bits(weight, at::full({4}, 0.992).to(at::kBFloat16)));
}

TEST(AdamW, ShardsAndThreadsChangeNothing) {
  at::Tensor start = random(50000).to(at::kFloat), g = random(50000).to(at::kFloat);
  auto train = [&](std::vector<int64_t> bounds, int threads) {
    const int before = at::get_num_threads();
    at::set_num_threads(threads);
    at::Tensor weight = start.clone();
    std::vector<OptimTensor> shards;
    for (size_t i = 0; i + 1 < bounds.size(); ++i)
      shards.push_back({"w", weight.slice(0, bounds[i], bounds[i + 1]), g.slice(0, bounds[i], bounds[i + 1]), 0.1});
    AdamW optimizer(shards, {});
    for (int t = 0; t < 3; ++t) optimizer.step(1e-2);
    at::set_num_threads(before);
    return weight;
  };
  at::Tensor whole = train({0, 50000}, 1);
  EXPECT_FALSE(same_bits(whole, start));
  EXPECT_TRUE(same_bits(train({0, 50000}, 3), whole));
  EXPECT_TRUE(same_bits(train({0, 1, 12345, 12345, 50000}, 2), whole));
}

TEST(AdamW, GoesOnFromItsState) {
  for (auto dtype : {at::kFloat, at::kBFloat16}) {
    at::Tensor weight = random(100).to(dtype), grad = random(100).to(at::kFloat);
    AdamW first({{"w", weight, grad, 0.1}}, {});
    first.step(1e-2);
    at::Tensor copy = weight.clone();
    AdamW second({{"w", copy, grad, 0.1}}, {});
    auto from = first.state(), to = second.state();
    for (size_t i = 0; i < from.size(); ++i) to[i].value.copy_(from[i].value);
    second.set_num_steps(first.num_steps());
    first.step(1e-2);
    second.step(1e-2);
    EXPECT_TRUE(same_bits(copy, weight));
  }
}

TEST(AdamW, CountsBytesAndRefusesOtherShapes) {
  at::Tensor weight = at::ones({10}, at::kBFloat16), grad = at::zeros({10});
  AdamW optimizer({{"w", weight, grad, 0.0}}, {});
  uint64_t bytes = 0;
  for (const auto& state : optimizer.state()) bytes += state.value.nbytes();
  EXPECT_EQ(bytes, 10 * AdamW::state_bytes_per_element(at::kBFloat16));
  EXPECT_THROW(AdamW({{"w", weight, at::zeros({9}), 0.0}}, {}), InternalError);
  for (const at::Tensor& bad : {grad.to(at::kBFloat16), grad.to(at::kMeta)})
    try {
      AdamW({{"w", weight, bad, 0.0}}, {});
      ADD_FAILURE() << bad.toString();
    } catch (const InternalError& error) {
      EXPECT_EQ(error.what(), str("AdamW of w: gradient is ", c10::toString(bad.scalar_type()), " on ", bad.device().str(),
                                  ", but with weight, which is BFloat16 on cpu, it has to be Float on cpu: bring it there with to()"));
    }
}

// Sizes around a piece and two, more tensors than buffers, of unlike dtypes; state passes from one kind to the other.
TEST(AdamW, OffloadChangesNothing) {
  constexpr int64_t kPiece = HostStaging::kPieceElements;
  const std::vector<std::pair<at::ScalarType, int64_t>> shapes = {{at::kBFloat16, 37}, {at::kFloat, 2 * kPiece + 5}, {at::kDouble, kPiece}, {at::kFloat, 0},
                                                                  {at::kBFloat16, kPiece + 1}, {at::kHalf, 1}};
  std::vector<at::Tensor> start;
  for (const auto& [dtype, size] : shapes) start.push_back(random(size).to(dtype));
  auto train = [&](std::vector<bool> offload) {
    std::vector<at::Tensor> grads;
    std::vector<OptimTensor> tensors;
    for (const at::Tensor& weight : start) {
      grads.push_back(at::empty({weight.numel()}, wide(weight.scalar_type())));
      tensors.push_back({"w", weight.clone(), grads.back(), 0.1});
    }
    std::vector<at::Tensor> ends;
    std::vector<OptimState> state;
    for (size_t t = 0; t < offload.size(); ++t) {
      AdamW optimizer(tensors, {0.9, 0.99, 1e-8, offload[t]});
      for (size_t i = 0; i < state.size(); ++i) optimizer.state()[i].value.copy_(state[i].value);
      optimizer.set_num_steps(static_cast<int64_t>(t));
      for (at::Tensor& grad : grads) grad.copy_(at::linspace(-1, 2, grad.numel()) + static_cast<double>(t));
      optimizer.step(1e-2, 0.5);
      state = optimizer.state();
      int64_t bytes = 0;  // gradients, and weights that are their own masters
      for (const OptimTensor& tensor : tensors) bytes += static_cast<int64_t>(tensor.grad.nbytes() + (tensor.weight.itemsize() >= 4 ? tensor.weight.nbytes() : 0));
      EXPECT_EQ(optimizer.bytes_fetched(), offload[t] ? bytes : 0);
    }
    for (const OptimTensor& tensor : tensors) ends.push_back(tensor.weight);
    for (const OptimState& s : state) ends.push_back(s.value);
    return ends;
  };
  const auto plain = train({false, false, false});
  EXPECT_EQ(plain.size(), 3 * shapes.size() + 3);  // two moments of each, three masters
  for (const auto& offload : {std::vector<bool>{true, true, true}, {true, false, true}}) {
    const auto staged = train(offload);
    ASSERT_EQ(staged.size(), plain.size());
    for (size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(same_bits(staged[i], plain[i])) << i;
  }
}

TEST(AdamW, ADeviceNeedsKernelsOrOffload) {
  const auto meta = at::TensorOptions(at::kMeta).dtype(at::kFloat);
  EXPECT_THROW(AdamW({{"w", at::empty({4}, meta), at::empty({4}, meta), 0.0}}, {}), InternalError);
}

TEST(AdamW, TakesNoStepOfAScaleThatIsNotFinite) {
  at::Tensor w = at::ones({4});
  AdamW optimizer({{"w", w, at::ones({4}), 0.1}}, {});
  optimizer.step(0.1, at::scalar_tensor(std::nan(""), at::kFloat));
  EXPECT_TRUE(same_bits(w, at::ones({4})));
  EXPECT_EQ(optimizer.num_steps(), 1);

  at::Tensor a = at::ones({4}), b = at::ones({4});
  AdamW({{"w", a, at::ones({4}), 0.1}}, {}).step(0.1, at::scalar_tensor(0.25, at::kFloat));
  AdamW({{"w", b, at::ones({4}), 0.1}}, {}).step(0.1, 0.25);
  EXPECT_TRUE(same_bits(a, b));
  EXPECT_FALSE(same_bits(a, w));
}

TEST(AdamW, EveryInstructionSetDoesTheSame) {
  for (int level : {0, 1, 2}) {
    at::Tensor w = at::linspace(-1, 1, 45), g = at::linspace(2, -3, 45), m = at::full({45}, 0.1),
               v = at::full({45}, 0.2);
    PlainAdamW plain(w);
    plain.m.assign(45, 0.1);
    plain.v.assign(45, 0.2);
    plain.step(1, g.to(at::kDouble), 0.1, 0.5, 0.9, 0.99, 1e-8);
    try {
      update_loops<float>(level).adamw(45, w.data_ptr<float>(), nullptr, g.data_ptr<float>(), m.data_ptr<float>(),
                                       v.data_ptr<float>(), {0.1, 0.5, 0.9, 0.99, 1e-8, 1.0, 1 - 0.9, 1 - 0.99});
    } catch (const InternalError&) {
      std::printf("level %d: not on this processor\n", level);
      continue;
    }
    EXPECT_TRUE(near(w, plain.weight())) << level;
  }
}

TEST(Clip, SquaredNorm) {
  for (auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf})
    for (int64_t size : {0, 1, 17, 200001}) {
      at::Tensor x = random(size).to(dtype);
      const double expected = x.to(at::kDouble).square().sum().item<double>();
      EXPECT_NEAR(squared_norm(x), expected, test::kSumFp64 * std::max(1.0, expected)) << dtype << size;
    }
  at::Tensor x = random(300000);
  const int before = at::get_num_threads();
  at::set_num_threads(3);
  const double three = squared_norm(x);
  at::set_num_threads(1);
  EXPECT_EQ(squared_norm(x), three);
  at::set_num_threads(before);
  EXPECT_DOUBLE_EQ(squared_norm(std::vector<at::Tensor>{at::full({2}, 3.0), at::full({1}, 4.0)}), 34.0);
  x[5] = std::nan("");
  EXPECT_TRUE(std::isnan(squared_norm(x)));
}

// However values are cut into tensors, and in whatever order these are added.
TEST(Clip, ASquareSumDoesNotDependOnOrder) {
  for (auto dtype : {at::kDouble, at::kFloat}) {
    at::Tensor x = (random(200001) * at::exp(random(200001) * 16)).to(dtype);  // 60 orders of magnitude
    const double whole = squared_norm(x);
    EXPECT_NEAR(whole, x.to(at::kDouble).square().sum().item<double>(), test::kSumFp64 * whole);
    SquareSum sum(largest_magnitude(x));
    for (int64_t end = x.size(0); end > 0; end = end * 2 / 3) sum.add(x.slice(0, end * 2 / 3, end));
    EXPECT_EQ(sum.total(), whole) << dtype;
  }
  at::Tensor x = at::ones({40});
  for (double value : {std::numeric_limits<double>::infinity(), std::nan("")}) {
    x[33] = value;
    EXPECT_EQ(std::isnan(largest_magnitude(x)), std::isnan(value));
    EXPECT_EQ(std::isinf(squared_norm(x)), std::isinf(value));
  }
  EXPECT_EQ(squared_norm(at::zeros({3})), 0);
}

TEST(Clip, Scale) {
  EXPECT_DOUBLE_EQ(clip_scale(4.0, 1.0), 1.0 / (4.0 + 1e-6));
  EXPECT_EQ(clip_scale(0.5, 1.0), 1.0);
  EXPECT_EQ(clip_scale(0.0, 1.0), 1.0);
  EXPECT_EQ(clip_scale(100.0, 0.0), 1.0);
  EXPECT_EQ(clip_scale(std::numeric_limits<double>::infinity(), 1.0), 0.0);
  EXPECT_TRUE(std::isnan(clip_scale(std::nan(""), 1.0)));
}

// Values of transformers 5.23's lambdas at (step - 1) for 100 steps, 10 of warm-up, lr 2: first, second, end of
// warm-up, after it, middle, last, past the end.
void expect_rates(const Schedule& schedule, std::vector<double> rates) {
  const std::vector<int64_t> steps = {1, 2, 10, 11, 56, 100, 101, 200};
  ASSERT_EQ(rates.size(), steps.size());
  for (size_t i = 0; i < steps.size(); ++i) EXPECT_NEAR(schedule(steps[i]), rates[i], 1e-14) << "step " << steps[i];
}

TEST(Schedule, RatesOfAllKinds) {
  const double pi = std::numbers::pi;
  expect_rates(Schedule(ScheduleKind::kConstant, 2.0, 100, 10), {0.0, 0.2, 1.8, 2.0, 2.0, 2.0, 2.0, 2.0});
  expect_rates(Schedule(ScheduleKind::kLinear, 2.0, 100, 10), {0.0, 0.2, 1.8, 2.0, 1.0, 2.0 / 90, 0.0, 0.0});
  expect_rates(Schedule(ScheduleKind::kCosine, 2.0, 100, 10),
               {0.0, 0.2, 1.8, 2.0, 1.0, 1.0 + std::cos(pi * 89 / 90), 0.0, 0.0});
  expect_rates(Schedule(ScheduleKind::kCosine, 2.0, 100, 10, 0.5),
               {0.0, 0.2, 1.8, 2.0, 1.25, 0.5 + 0.75 * (1 + std::cos(pi * 89 / 90)), 0.5, 0.5});
  expect_rates(Schedule(ScheduleKind::kLinear, 2.0, 100, 10, 0.5),
               {0.0, 0.2, 1.8, 2.0, 1.25, 0.5 + 1.5 / 90, 0.5, 0.5});
  expect_rates(Schedule(ScheduleKind::kExponential, 2.0, 100, 10, 0.5),
               {0.0, 0.2, 1.8, 2.0, 1.0, 2.0 * std::pow(0.25, 89.0 / 90), 0.5, 0.5});
  EXPECT_EQ(Schedule(ScheduleKind::kLinear, 2.0, 4)(1), 2.0);  // without warm-up the first step has the whole rate
}

TEST(Schedule, WarmupAsAFractionIsRoundedUpButIsNeverAll) {
  EXPECT_EQ(Schedule(ScheduleKind::kLinear, 1.0, 99, 0.1).warmup_steps(), 10);
  EXPECT_EQ(Schedule(ScheduleKind::kLinear, 1.0, 99, 7).warmup_steps(), 7);
  EXPECT_EQ(Schedule(ScheduleKind::kLinear, 1.0, 1, 0.03)(1), 1.0);  // a run of one step learns
}

std::string refusal(const std::function<void()>& f) {
  try {
    f();
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "";
}

TEST(Schedule, RefusesByName) {
  EXPECT_EQ(refusal([] { parse_schedule_kind("cosin"); }),
            "schedule.kind = cosin: allowed are constant, linear, cosine, exponential.");
  EXPECT_EQ(parse_schedule_kind("exponential"), ScheduleKind::kExponential);
  EXPECT_EQ(
      refusal([] { Schedule(ScheduleKind::kLinear, 1.0, 10, 2.5); }),
      "schedule.warmup_steps = 2.5: it must be a number of steps (0, 1, 2, ...) or a fraction of the run below 1.");
  EXPECT_EQ(refusal([] { Schedule(ScheduleKind::kLinear, 1.0, 4, 4); }),
            "schedule.warmup_steps = 4: the run has only 4 steps and would end before optim.lr is reached; lower "
            "it, or set a fraction of the run.");
  EXPECT_EQ(refusal([] { Schedule(ScheduleKind::kLinear, 1.0, 10, 0, 2.0); }),
            "schedule.min_lr = 2: it must lie between 0 and optim.lr = 1.");
  EXPECT_EQ(refusal([] { Schedule(ScheduleKind::kExponential, 1.0, 10); }),
            "schedule.kind = exponential falls from optim.lr to schedule.min_lr: set schedule.min_lr above 0.");
  EXPECT_EQ(refusal([] { Schedule(ScheduleKind::kLinear, -1.0, 10); }), "optim.lr = -1: it must be 0 or more.");
}

TEST(LossScale, HalvesAtAnOverflowAndDoublesAfterCleanSteps) {
  LossScale scale = LossScale::of(true);
  for (int64_t i = 0; i < LossScale::kPatience - 1; ++i) scale.count_clean_step();
  EXPECT_EQ(scale.value, 1024);
  EXPECT_TRUE(scale.lower());
  EXPECT_EQ(scale.value, 512);
  for (int64_t i = 0; i < LossScale::kPatience - 1; ++i) scale.count_clean_step();
  EXPECT_EQ(scale.value, 512);  // counted anew from the overflow on
  scale.count_clean_step();
  EXPECT_EQ(scale.value, 1024);
  for (int64_t i = 0; i < 20 * LossScale::kPatience; ++i) scale.count_clean_step();
  EXPECT_EQ(scale.value, LossScale::kLargest);
  int halvings = 0;
  while (scale.lower()) ++halvings;
  EXPECT_EQ(halvings, 25);
  EXPECT_EQ(scale.value, LossScale::kSmallest);
  LossScale none = LossScale::of(false);
  for (int64_t i = 0; i < 2 * LossScale::kPatience; ++i) none.count_clean_step();
  EXPECT_FALSE(none.lower());
  EXPECT_EQ(none.value, 1);
}

}  // namespace
}  // namespace trireme
