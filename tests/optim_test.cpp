// The optimizer against a plain loop in double, clipping and schedules against their formulas.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include <bit>
#include <numbers>

#include "base/check.h"
#include "base/random.h"
#include "optim/clip.h"
#include "optim/loss_scale.h"
#include "optim/offload.h"
#include "optim/optimizer.h"
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

class EveryRule : public testing::TestWithParam<OptimizerKind> {};
INSTANTIATE_TEST_SUITE_P(Rules, EveryRule, testing::Values(OptimizerKind::kAdamW, OptimizerKind::kSgd, OptimizerKind::kLion));

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
      Optimizer optimizer({{"w", weight, grad, 0.1}}, {.beta1 = 0.8, .beta2 = 0.95, .epsilon = 1e-6});
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

// What torch.optim.SGD computes, and Lion as its paper writes it.
struct PlainRule {
  OptimizerKind rule;
  std::vector<double> w, m;
  void step(const at::Tensor& grad, double lr, double decay, double b1, double b2, bool first) {
    for (size_t i = 0; i < w.size(); ++i) {
      const double g = grad.data_ptr<double>()[i];
      if (rule == OptimizerKind::kSgd) {
        const double with_decay = g + decay * w[i];
        m[i] = first ? with_decay : b1 * m[i] + with_decay;
        w[i] -= lr * m[i];
      } else {
        const double c = b1 * m[i] + (1 - b1) * g;
        w[i] -= lr * ((c > 0) - (c < 0) + decay * w[i]);
        m[i] = b2 * m[i] + (1 - b2) * g;
      }
    }
  }
};

TEST(SgdAndLion, EqualThePlainLoop) {
  for (auto rule : {OptimizerKind::kSgd, OptimizerKind::kLion})
    for (auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf})
      for (int64_t size : {1, 37, 20000}) {
        at::Tensor weight = random(size).to(dtype), grad = at::empty({size}, wide(dtype)), start = weight.to(at::kDouble);
        PlainRule plain{rule, {start.data_ptr<double>(), start.data_ptr<double>() + size}, std::vector<double>(static_cast<size_t>(size))};
        Optimizer optimizer({{"w", weight, grad, 0.1}}, {.kind = rule, .beta1 = 0.8, .beta2 = 0.95, .momentum = 0.8});
        for (int t = 1; t <= 5; ++t) {
          at::Tensor g = random(size, 0.1 * t).to(wide(dtype));
          grad.copy_(g * 4);
          plain.step(g.to(at::kDouble), 0.01 * t, 0.1, 0.8, 0.95, t == 1);
          optimizer.step(0.01 * t, 0.25);
        }
        EXPECT_TRUE(near(weight, at::tensor(plain.w, at::kDouble))) << static_cast<int>(rule) << dtype;
        const auto state = optimizer.state();
        ASSERT_EQ(state.size(), wide(dtype) == dtype ? 1u : 2u);
        EXPECT_EQ(state[0].kind, rule == OptimizerKind::kSgd ? "momentum_buffer" : "exp_avg");
        EXPECT_TRUE(near(state[0].value, at::tensor(plain.m, at::kDouble))) << static_cast<int>(rule) << dtype;
      }
}

TEST(SgdAndLion, NoMomentumIsNoState) {
  at::Tensor weight = at::ones({4}), grad = at::full({4}, 2.0);
  Optimizer optimizer({{"w", weight, grad, 0.5}}, {.kind = OptimizerKind::kSgd, .momentum = 0});
  for (int t = 0; t < 2; ++t) optimizer.step(0.1);
  EXPECT_TRUE(near(weight, at::full({4}, (1 - 0.1 * 2.5) - 0.1 * (2 + 0.5 * 0.75))));
  EXPECT_TRUE(optimizer.state().empty());
}

TEST(AdamW, MasterKeepsWhatTheWeightCannot) {
  at::Tensor weight = at::ones({4}, at::kBFloat16), grad = at::ones({4});
  Optimizer optimizer({{"w", weight, grad, 0.0}}, {});
  for (int t = 0; t < 8; ++t) optimizer.step(1e-3);  // each step moves by 0.001, less than half of bf16's 2^-8
  EXPECT_TRUE(near(optimizer.state()[2].value, at::full({4}, 0.992)));
  EXPECT_TRUE(same_bits(weight, at::full({4}, 0.992).to(at::kBFloat16)));
}

float rounded_at_random(float x, uint64_t seed, uint64_t step, uint32_t id, int64_t place) {
  const auto words = philox(seed ^ uint64_t{6} << 56, step << 32 | id, static_cast<uint64_t>(place / 8));
  const uint32_t bits = std::bit_cast<uint32_t>(x), noise = words[static_cast<size_t>(place % 8 / 2)] >> place % 2 * 16 & 0xffff;
  return std::isfinite(x) ? std::bit_cast<float>((bits + noise) & 0xffff0000) : x;
}

// What the same code makes of weights in fp32, rounded by the bits of their places, beyond the 32 bits that a block's number might have.
TEST(WithoutMaster, WeightsAreRoundedByTheirPlaces) {
  for (int level : {0, 1, 2})
    for (int64_t size : {1, 7, 16, 129, 1000})
      for (int64_t place : {int64_t{0}, int64_t{5}, int64_t{127}, (int64_t{1} << 35) - 100}) {
        at::Tensor weight = random(size).to(at::kBFloat16), in_fp32 = weight.to(at::kFloat), g = random(size).to(at::kFloat), m = random(size).to(at::kFloat), v = m.square();
        if (place == 5) weight[0].fill_(INFINITY), in_fp32[0].fill_(INFINITY);
        at::Tensor m32 = m.clone(), v32 = v.clone();
        const UpdateStep step{0.1, 0.5, 0.9, 0.99, 1e-8, 1.0, 1 - 0.9, 1 - 0.99};
        const RandomRounding rounding{11 ^ uint64_t{6} << 56, uint64_t{3} << 32 | 17, place};
        try {
          update_loops<float>(level).update[0](size, in_fp32.data_ptr<float>(), nullptr, g.data_ptr<float>(), m32.data_ptr<float>(), v32.data_ptr<float>(), step, nullptr);
        } catch (const InternalError&) {
          std::printf("level %d: not on this processor\n", level);
          continue;
        }
        update_loops<at::BFloat16>(level).update[0](size, weight.data_ptr<at::BFloat16>(), nullptr, g.data_ptr<float>(), m.data_ptr<float>(), v.data_ptr<float>(), step, &rounding);
        for (int64_t i = 0; i < size; ++i) in_fp32[i] = rounded_at_random(in_fp32[i].item<float>(), 11, 3, 17, place + i);
        EXPECT_TRUE(same_bits(weight, in_fp32.to(at::kBFloat16))) << level << " " << size << " " << place;
        EXPECT_TRUE(same_bits(m, m32) && same_bits(v, v32));
      }
}

// A step moves by an eighth of the distance to the next number, which rounding to the nearest would lose.
TEST(WithoutMaster, SmallUpdatesSurviveAndTheirMeanIsKept) {
  constexpr int64_t kSize = 20000;
  at::Tensor weight = at::ones({kSize}, at::kBFloat16), grad = at::ones({kSize});
  Optimizer optimizer({{"w", weight, grad, 0.0}}, {.masters = false, .seed = 5});
  for (int t = 0; t < 8; ++t) optimizer.step(0x1p-11);
  EXPECT_EQ(optimizer.state().size(), 2u);
  const double moved = (1 - weight.to(at::kDouble)).mean().item<double>() / 0x1p-11;
  EXPECT_NEAR(moved, 8, 5 * std::sqrt(8 * 7.0 / kSize));  // the variance of a step is 8 - 1 for one weight
  EXPECT_NEAR((weight == 1).to(at::kDouble).mean().item<double>(), std::pow(7.0 / 8, 8), 0.02);  // each by itself: five deviations
}

TEST(WithoutMaster, EveryStepSeedAndNameHasItsOwnBits) {
  auto train = [](const char* name, uint64_t seed, int64_t step) {
    at::Tensor weight = at::ones({1000}, at::kBFloat16);
    Optimizer optimizer({{name, weight, at::ones({1000}), 0.0}}, {.masters = false, .seed = seed});
    optimizer.set_num_steps(step);
    optimizer.step(1e-3);
    return weight;
  };
  const at::Tensor one = train("w", 1, 0);
  EXPECT_TRUE(same_bits(train("w", 1, 0), one));
  EXPECT_FALSE(same_bits(train("v", 1, 0), one));
  EXPECT_FALSE(same_bits(train("w", 2, 0), one));
  EXPECT_FALSE(same_bits(train("w", 1, 1), one));
}

// Slices of a tensor of up to three dimensions, from anywhere in them on, against indices counted one by one.
TEST(WithoutMaster, PlacesAreThoseOfTheWholeTensor) {
  struct Case {
    std::vector<int64_t> whole, offset, sizes;
  };
  for (const Case& c : std::vector<Case>{{{}, {}, {}}, {{9}, {4}, {5}}, {{6, 7}, {0, 0}, {6, 7}}, {{6, 7}, {2, 0}, {3, 7}}, {{6, 7}, {0, 3}, {6, 2}}, {{6, 7}, {1, 3}, {4, 4}},
                                         {{4, 5, 6}, {1, 0, 0}, {2, 5, 6}}, {{4, 5, 6}, {0, 2, 0}, {4, 2, 6}}, {{4, 5, 6}, {1, 0, 4}, {2, 5, 2}}}) {
    at::Tensor all = at::arange(c10::multiply_integers(c.whole), at::kLong).view(c.whole);
    for (size_t d = 0; d < c.sizes.size(); ++d) all = all.narrow(static_cast<int64_t>(d), c.offset[d], c.sizes[d]);
    const at::Tensor expected = all.contiguous().view({-1});
    for (int64_t begin = 0; begin < expected.numel(); ++begin) {
      const Places p = places_of(c.sizes, {c.whole, c.offset, false}, begin);
      for (int64_t i = 0; begin + i < expected.numel(); ++i) {
        const int64_t j = p.first + i;
        ASSERT_EQ(p.offset + j / p.run * p.stride + j % p.run, expected[begin + i].item<int64_t>()) << c.whole << c.offset << c.sizes << begin;
      }
    }
  }
}

// Parts of rows and of columns, in pieces that begin anywhere, by any threads, here and by way of the host's buffers.
TEST(WithoutMaster, ShardsOfSlicesChangeNothing) {
  constexpr int64_t kRows = 333, kWidth = 210, kCut = 70;  // 70 * 333 = 23,310 > 16,384, a thread's least
  const at::Tensor start = random(kRows * kWidth).to(at::kBFloat16).view({kRows, kWidth}), g = random(kRows * kWidth).to(at::kFloat).view({kRows, kWidth});
  auto train = [&](const std::vector<std::pair<int64_t, int64_t>>& columns, int64_t piece, bool offload, int threads) {
    const int before = at::get_num_threads();
    at::set_num_threads(threads);
    std::vector<at::Tensor> slices;
    std::vector<OptimTensor> tensors;
    for (const auto& [begin, end] : columns) {
      slices.push_back(start.slice(1, begin, end).clone(at::MemoryFormat::Contiguous));
      const at::Tensor weight = slices.back().view({-1}), grad = g.slice(1, begin, end).contiguous().view({-1});
      for (int64_t i = 0; i < weight.numel(); i += piece)
        tensors.push_back({"w", weight.slice(0, i, i + piece), grad.slice(0, i, i + piece), 0.1, places_of(slices.back().sizes(), {{kRows, kWidth}, {0, begin}, false}, i)});
    }
    Optimizer optimizer(tensors, {.offload = offload, .masters = false, .seed = 3});
    for (int t = 0; t < 3; ++t) optimizer.step(1e-2);
    at::set_num_threads(before);
    return at::cat(slices, 1);
  };
  const at::Tensor whole = train({{0, kWidth}}, kRows * kWidth, false, 1);
  EXPECT_FALSE(same_bits(whole, start));
  EXPECT_TRUE(same_bits(train({{0, kWidth}}, 12345, false, 3), whole));
  EXPECT_TRUE(same_bits(train({{0, kCut}, {kCut, kWidth}}, kRows * kWidth, false, 3), whole));
  EXPECT_TRUE(same_bits(train({{0, kCut + 3}, {kCut + 3, kWidth}}, 777, true, 2), whole));
}

TEST_P(EveryRule, ShardsAndThreadsChangeNothing) {
  at::Tensor start = random(50000).to(at::kFloat), g = random(50000).to(at::kFloat);
  auto train = [&](std::vector<int64_t> bounds, int threads) {
    const int before = at::get_num_threads();
    at::set_num_threads(threads);
    at::Tensor weight = start.clone();
    std::vector<OptimTensor> shards;
    for (size_t i = 0; i + 1 < bounds.size(); ++i)
      shards.push_back({"w", weight.slice(0, bounds[i], bounds[i + 1]), g.slice(0, bounds[i], bounds[i + 1]), 0.1});
    Optimizer optimizer(shards, {.kind = GetParam()});
    for (int t = 0; t < 3; ++t) optimizer.step(1e-2);
    at::set_num_threads(before);
    return weight;
  };
  at::Tensor whole = train({0, 50000}, 1);
  EXPECT_FALSE(same_bits(whole, start));
  EXPECT_TRUE(same_bits(train({0, 50000}, 3), whole));
  EXPECT_TRUE(same_bits(train({0, 1, 12345, 12345, 50000}, 2), whole));
}

TEST_P(EveryRule, GoesOnFromItsState) {
  for (auto [dtype, masters] : {std::pair{at::kFloat, true}, {at::kBFloat16, true}, {at::kBFloat16, false}}) {
    at::Tensor weight = random(100).to(dtype), grad = random(100).to(at::kFloat);
    Optimizer first({{"w", weight, grad, 0.1}}, {.kind = GetParam(), .masters = masters});
    first.step(1e-2);
    at::Tensor copy = weight.clone();
    Optimizer second({{"w", copy, grad, 0.1}}, {.kind = GetParam(), .masters = masters});
    auto from = first.state(), to = second.state();
    for (size_t i = 0; i < from.size(); ++i) to[i].value.copy_(from[i].value);
    second.set_num_steps(first.num_steps());
    first.step(1e-2);
    second.step(1e-2);
    EXPECT_TRUE(same_bits(copy, weight));
  }
}

TEST_P(EveryRule, CountsBytes) {
  at::Tensor weight = at::ones({10}, at::kBFloat16), grad = at::zeros({10});
  auto bytes_of = [](const Optimizer& of) {
    uint64_t bytes = 0;
    for (const auto& state : of.state()) bytes += state.value.nbytes();
    return bytes;
  };
  for (auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf})
    for (const OptimizerOptions& options : {OptimizerOptions{.kind = GetParam()}, {.kind = GetParam(), .momentum = 0}, {.kind = GetParam(), .masters = false}})
      if (options.masters || dtype != at::kHalf) {
        const Optimizer optimizer({{"w", weight.to(dtype), grad.to(wide(dtype)), 0.0}}, options);
        EXPECT_EQ(bytes_of(optimizer), Optimizer::state_bytes(dtype, options, 10, {10})) << dtype;
      }
}

TEST(AdamW, CountsBytesAndRefusesOtherShapes) {
  at::Tensor weight = at::ones({10}, at::kBFloat16), grad = at::zeros({10});
  EXPECT_EQ(Optimizer::state_bytes(at::kBFloat16, {}, 10, {10}), 120u);
  EXPECT_EQ(Optimizer::state_bytes(at::kBFloat16, {.masters = false}, 10, {10}), 80u);
  EXPECT_EQ(Optimizer::state_bytes(at::kFloat, {.kind = OptimizerKind::kLion}, 10, {10}), 40u);
  EXPECT_EQ(Optimizer::state_bytes(at::kFloat, {.kind = OptimizerKind::kAdamW8Bit}, 4096, {4096}), 2u * (4096 + 4 * 16));
  EXPECT_EQ(Optimizer::state_bytes(at::kFloat, {.kind = OptimizerKind::kAdamW8Bit}, 1000, {4000}), 8000u);
  EXPECT_THROW(Optimizer({{"w", weight.to(at::kHalf), grad, 0.0}}, {.masters = false}), InternalError);
  EXPECT_THROW(Optimizer({{"w", weight, at::zeros({9}), 0.0}}, {}), InternalError);
  for (const at::Tensor& bad : {grad.to(at::kBFloat16), grad.to(at::kMeta)})
    try {
      Optimizer({{"w", weight, bad, 0.0}}, {});
      ADD_FAILURE() << bad.toString();
    } catch (const InternalError& error) {
      EXPECT_EQ(error.what(), str("the optimizer of w: gradient is ", c10::toString(bad.scalar_type()), " on ", bad.device().str(),
                                  ", but with weight, which is BFloat16 on cpu, it has to be Float on cpu: bring it there with to()"));
    }
}

// Sizes around a piece and two, more tensors than buffers, of unlike dtypes; state passes from one kind to the other.
TEST_P(EveryRule, OffloadChangesNothing) {
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
      Optimizer optimizer(tensors, {.kind = GetParam(), .beta2 = 0.99, .offload = offload[t]});
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
  EXPECT_EQ(plain.size(), (GetParam() == OptimizerKind::kAdamW ? 3 : 2) * shapes.size() + 3);  // moments of each, three masters
  for (const auto& offload : {std::vector<bool>{true, true, true}, {true, false, true}}) {
    const auto staged = train(offload);
    ASSERT_EQ(staged.size(), plain.size());
    for (size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(same_bits(staged[i], plain[i])) << i;
  }
}

TEST(AdamW, ADeviceNeedsKernelsOrOffload) {
  const auto meta = at::TensorOptions(at::kMeta).dtype(at::kFloat);
  EXPECT_THROW(Optimizer({{"w", at::empty({4}, meta), at::empty({4}, meta), 0.0}}, {}), InternalError);
}

TEST(AdamW, TakesNoStepOfAScaleThatIsNotFinite) {
  at::Tensor w = at::ones({4});
  Optimizer optimizer({{"w", w, at::ones({4}), 0.1}}, {});
  optimizer.step(0.1, at::scalar_tensor(std::nan(""), at::kFloat));
  EXPECT_TRUE(same_bits(w, at::ones({4})));
  EXPECT_EQ(optimizer.num_steps(), 1);

  at::Tensor a = at::ones({4}), b = at::ones({4});
  Optimizer({{"w", a, at::ones({4}), 0.1}}, {}).step(0.1, at::scalar_tensor(0.25, at::kFloat));
  Optimizer({{"w", b, at::ones({4}), 0.1}}, {}).step(0.1, 0.25);
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
      update_loops<float>(level).update[0](45, w.data_ptr<float>(), nullptr, g.data_ptr<float>(), m.data_ptr<float>(),
                                       v.data_ptr<float>(), {0.1, 0.5, 0.9, 0.99, 1e-8, 1.0, 1 - 0.9, 1 - 0.99}, nullptr);
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
