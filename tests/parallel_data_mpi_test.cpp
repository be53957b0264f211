// Gradients of N ranks = gradients of one rank with N times the batch, however the contributions arrive: tied weights,
// nested backward of recomputation, delayed weight gradients, leaves without a gradient, accumulation; overlap changes
// no bit. Runs on 1, 2 and 4 ranks.
#include "parallel/data_parallel.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstring>

#include "base/check.h"
#include "comm/process.h"
#include "support.h"

namespace trireme {
namespace {

constexpr int64_t kRows = 6, kWidth = 8;

const Communicator& world() {
  static Process process;
  static Communicator world = Communicator::world();
  return world;
}

at::Tensor random(uint64_t seed, at::IntArrayRef shape, at::ScalarType type) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn(shape, generator, at::TensorOptions().dtype(at::kDouble)).to(type);
}

// y = f(x, w) whose backward runs f again with gradients and starts a backward of its own inside: activation
// recomputation as the model does it. Every use of w is so a contribution of its own.
struct Recomputed : torch::autograd::Function<Recomputed> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, at::Tensor x, at::Tensor w) {
    at::NoGradGuard no_grad;
    ctx->save_for_backward({x});
    ctx->saved_data["w"] = w;
    return at::tanh(x.matmul(w));
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* ctx,
                                               torch::autograd::tensor_list grads) {
    at::AutoGradMode with_grad(true);
    at::Tensor x = ctx->get_saved_variables()[0].detach().requires_grad_(true);
    at::Tensor y = at::tanh(x.matmul(ctx->saved_data["w"].toTensor()));
    torch::autograd::backward({y}, {grads[0]});
    return {x.grad(), at::Tensor()};
  }
};

// y = x w whose gradient for w is computed later, when the queue is run.
struct Delayed : torch::autograd::Function<Delayed> {
  static inline std::vector<std::function<void()>> queue;
  static inline GradientReducer* reducer = nullptr;
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, at::Tensor x, at::Tensor w) {
    ctx->save_for_backward({x});
    ctx->saved_data["w"] = w;
    return x.matmul(w);
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* ctx,
                                               torch::autograd::tensor_list grads) {
    at::Tensor x = ctx->get_saved_variables()[0], g = grads[0], w = ctx->saved_data["w"].toTensor();
    queue.push_back([=] {
      at::NoGradGuard no_grad;
      const at::Tensor gradient = x.t().matmul(g);
      if (reducer != nullptr)
        reducer->contribute(w, gradient);
      else
        w.mutable_grad() = w.grad().defined() ? w.grad() + gradient : gradient;
    });
    return {g.matmul(w.detach().t()), at::Tensor()};
  }
  static void run() {
    for (auto& item : queue) item();
    queue.clear();
  }
};

enum Uses { kPlain = 1, kTied = 2, kNested = 4, kDelay = 8 };

struct Net {
  std::vector<Parameter> parameters;
  at::ScalarType type;

  explicit Net(at::ScalarType t) : type(t) {
    at::Tensor bias = random(9, {kWidth}, t).requires_grad_(true);
    parameters.push_back({"bias", bias, ShardSpec::whole(bias)});
    for (int i = 0; i < 5; ++i) {
      at::Tensor w = random(static_cast<uint64_t>(i), {kWidth, kWidth}, t).mul_(0.3).requires_grad_(true);
      parameters.push_back({str("w", i), w, ShardSpec::whole(w)});
    }
    parameters.push_back({"tied to w0", w(0), ShardSpec::whole(w(0))});
    at::Tensor frozen = at::ones({3}, t);
    parameters.push_back({"frozen", frozen, ShardSpec::whole(frozen)});
  }
  at::Tensor w(size_t i) const { return parameters[i + 1].value; }

  // The sum of the losses of rows. w4 never takes part.
  at::Tensor loss(const at::Tensor& x, int uses, int num_nested = 2) const {
    at::Tensor h = at::tanh(x.matmul(w(0)) + parameters[0].value);
    if (uses & kNested)
      for (int i = 0; i < num_nested; ++i) h = Recomputed::apply(h, w(1));
    else
      for (int i = 0; i < num_nested; ++i) h = at::tanh(h.matmul(w(1)));
    h = (uses & kDelay) ? Delayed::apply(h, w(2)) : h.matmul(w(2));
    h = at::tanh(h.matmul(w(3)));
    if (uses & kTied) h = h.matmul(w(0).t());
    return h.square().sum();
  }
};

at::Tensor rows(int rank, int micro_batch, at::ScalarType type) {
  return random(static_cast<uint64_t>(1000 + rank * 10 + micro_batch), {kRows, kWidth}, type);
}

// Gradients by plain autograd of one process over all ranks' rows, in order of Net's parameters.
std::vector<at::Tensor> reference(const Net& net, int uses, int num_micro_batches, int num_nested = 2) {
  std::vector<at::Tensor> all;
  for (int r = 0; r < world().size(); ++r)
    for (int m = 0; m < num_micro_batches; ++m) all.push_back(rows(r, m, net.type));
  net.loss(at::cat(all), uses & kTied, num_nested).backward();
  std::vector<at::Tensor> gradients;
  for (const Parameter& p : net.parameters) {
    if (p.name == "frozen" || p.name == "tied to w0") continue;
    gradients.push_back(p.value.grad().defined() ? p.value.grad().clone() : at::zeros_like(p.value));
    p.value.mutable_grad().reset();
  }
  return gradients;
}

void backward_step(GradientReducer& reducer, const Net& net, int uses, int num_micro_batches, int num_nested = 2) {
  reducer.begin_step();
  for (int m = 0; m < num_micro_batches; ++m) {
    reducer.before_backward(m + 1 == num_micro_batches);
    net.loss(rows(world().rank(), m, net.type), uses, num_nested).backward();
    Delayed::run();
  }
}

void expect_near(const GradientReducer& reducer, const std::vector<at::Tensor>& right) {
  ASSERT_EQ(reducer.slices().size(), right.size());
  for (size_t i = 0; i < right.size(); ++i) {
    const GradientSlice& s = reducer.slices()[i];
    ASSERT_EQ(s.gradient.sizes(), s.weight.sizes());
    EXPECT_FALSE(s.weight.grad().defined()) << s.name;
    const double error = (s.gradient - right[i]).abs().max().item<double>();
    EXPECT_LE(error, test::kSumFp64 * std::max(1.0, right[i].abs().max().item<double>())) << s.name;
  }
}

TEST(GradientReducer, NRanksEqualOneRankWithNTimesTheBatch) {
  for (int uses : {0 + kPlain, 0 + kTied, 0 + kNested, 0 + kDelay, kTied | kNested | kDelay})
    for (int accumulation : {1, 3})
      for (bool overlap : {false, true}) {
        SCOPED_TRACE(str("uses ", uses, ", accumulation ", accumulation, ", overlap ", overlap));
        Net net(at::kDouble);
        GradientReducer reducer(net.parameters, world(),
                                {.bucket_bytes = 700, .overlap = overlap});  // one weight a bucket
        const std::vector<at::Tensor> right = [&] {  // on leaves of its own: the hooks of net take every .grad
          Net plain(at::kDouble);
          return reference(plain, uses, accumulation);
        }();
        Delayed::reducer = &reducer;
        for (int step = 0; step < 3; ++step) {
          backward_step(reducer, net, uses, accumulation);
          reducer.finish();
          expect_near(reducer, right);
          EXPECT_EQ(reducer.num_late_contributions(), 0);
          EXPECT_EQ(reducer.slices()[5].gradient.abs().max().item<double>(), 0);  // w4
        }
        Delayed::reducer = nullptr;
      }
}

std::vector<at::Tensor> step_bits(at::ScalarType type, bool overlap, int64_t bucket_bytes) {
  Net net(type);
  GradientReducer reducer(net.parameters, world(), {.bucket_bytes = bucket_bytes, .overlap = overlap});
  Delayed::reducer = &reducer;
  std::vector<at::Tensor> result;
  for (int step = 0; step < 2; ++step) {
    backward_step(reducer, net, kTied | kNested | kDelay, 3);
    reducer.finish();
    for (const GradientSlice& s : reducer.slices()) result.push_back(s.gradient.clone());
  }
  Delayed::reducer = nullptr;
  return result;
}

TEST(GradientReducer, NeitherOverlapNorBucketSizeChangesABit) {
  for (at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble}) {
    const std::vector<at::Tensor> right = step_bits(type, false, 1 << 20);
    for (int64_t bucket_bytes : {1, 300, 600, 1 << 20}) {
      const std::vector<at::Tensor> other = step_bits(type, true, bucket_bytes);
      ASSERT_EQ(other.size(), right.size());
      for (size_t i = 0; i < right.size(); ++i) {
        EXPECT_EQ(right[i].scalar_type(), type == at::kDouble ? at::kDouble : at::kFloat);
        EXPECT_EQ(std::memcmp(right[i].data_ptr(), other[i].data_ptr(), right[i].nbytes()), 0)
            << i << " " << bucket_bytes;
      }
      for (size_t i = 0; i < right.size() / 2; ++i)  // the second step is overlapped, the first is not
        EXPECT_EQ(std::memcmp(other[i].data_ptr(), other[i + right.size() / 2].data_ptr(), other[i].nbytes()), 0);
    }
  }
}

int64_t num_all_reduces(const Communicator& group) {
  for (const auto& line : group.statistics().lines)
    if (line.op == "all_reduce") return line.num_calls;
  return 0;
}

TEST(GradientReducer, BucketsAreSentDuringTheLastBackward) {
  if (world().size() == 1) GTEST_SKIP() << "nothing is sent by one rank";
  Net net(at::kFloat);
  Communicator group = world().split(0, world().rank(), "counted");
  GradientReducer reducer(net.parameters, group, {.bucket_bytes = 300, .overlap = true});
  ASSERT_EQ(reducer.layout().size(), 5u);
  Delayed::reducer = &reducer;
  for (int step = 0; step < 3; ++step) {
    const int64_t before = num_all_reduces(group);
    backward_step(reducer, net, kTied | kNested | kDelay, 1);
    EXPECT_EQ(num_all_reduces(group) - before, step == 0 ? 0 : 5);  // the first backward is counted only
    bool asked = false;
    reducer.finish([&](bool late) {
      asked = !late;
      return late;
    });
    EXPECT_TRUE(asked);
    EXPECT_EQ(num_all_reduces(group) - before, 5);  // the question for late ones travels with the caller's sums
    EXPECT_EQ(reducer.bytes_reduced(), 4 * (5 * kWidth * kWidth + kWidth));
  }
  Delayed::reducer = nullptr;
}

// Adapters of a megabyte would all fit into one bucket of the usual size, which can only be sent when backward is over.
TEST(GradientReducer, ASmallModelHasSeveralBuckets) {
  std::vector<Parameter> parameters;
  for (int i = 0; i < 16; ++i) {
    at::Tensor w = at::zeros({1 << 14}).requires_grad_(true);
    parameters.push_back({"w" + std::to_string(i), w, ShardSpec::whole(w)});
  }
  EXPECT_EQ(GradientReducer(parameters, world()).layout().size(), 8u);
  parameters.resize(2);  // below 64 KiB a message costs more than it hides
  EXPECT_EQ(GradientReducer(parameters, world()).layout().size(), 2u);
  parameters.resize(1);
  EXPECT_EQ(GradientReducer(parameters, world()).layout().size(), 1u);
}

// More contributions than any backward before brought, on one rank only: reduced afterwards, and right.
void late_contributions(bool by_caller) {
  Net net(at::kDouble), plain(at::kDouble);
  GradientReducer reducer(net.parameters, world(), {.bucket_bytes = 700, .overlap = true});
  backward_step(reducer, net, kNested, 1, 1);
  reducer.finish();
  const int last = world().size() - 1;
  for (int r = 0; r < world().size(); ++r) plain.loss(rows(r, 0, at::kDouble), 0, r == last ? 3 : 1).backward();
  std::vector<at::Tensor> right;
  for (const GradientSlice& s : reducer.slices())
    for (const Parameter& p : plain.parameters)
      if (p.name == s.name) right.push_back(p.value.grad().defined() ? p.value.grad() : at::zeros_like(p.value));
  for (int step = 0; step < 2; ++step) {
    backward_step(reducer, net, kNested, 1, world().rank() == last ? 3 : 1);
    if (by_caller)
      reducer.finish([&](bool late) { return world().agree(late) != 0; });
    else
      reducer.finish();
    expect_near(reducer, right);
    EXPECT_EQ(reducer.num_late_contributions(), world().rank() == last ? 2 : 0);  // learnt: none in the second step
  }
}

TEST(GradientReducer, LateContributionsAreNotLost) {
  for (bool by_caller : {false, true}) late_contributions(by_caller);
}

// A leaf that had a gradient in the step before and has none now: not anywhere, or not on the last rank.
TEST(GradientReducer, LastStepsGradientDoesNotStay) {
  for (bool overlap : {true, false}) {
    Net net(at::kDouble);
    GradientReducer reducer(net.parameters, world(), {.bucket_bytes = 700, .overlap = overlap});
    const int last = world().size() - 1;
    ASSERT_EQ(reducer.slices()[2].name, "w1");
    for (int step = 0; step < 3; ++step) {
      backward_step(reducer, net, kPlain, 1, step < 2 ? 1 : 0);
      reducer.finish();
      EXPECT_EQ(reducer.slices()[2].gradient.abs().max().item<double>() > 0, step < 2) << step;
    }
    backward_step(reducer, net, kPlain, 1, world().rank() == last ? 0 : 1);
    reducer.finish();
    Net plain(at::kDouble);
    at::Tensor right = at::zeros({kWidth, kWidth}, at::kDouble);
    for (int r = 0; r < last; ++r) plain.loss(rows(r, 0, at::kDouble), kPlain, 1).backward();
    if (last > 0) right = plain.w(1).grad();
    EXPECT_LE((reducer.slices()[2].gradient - right).abs().max().item<double>(), test::kSumFp64);
  }
}

TEST(GradientReducer, AGradientPutIntoGradPastTheHooksCounts) {
  Net net(at::kFloat);
  GradientReducer reducer(net.parameters, world());
  reducer.begin_step();
  reducer.before_backward(true);
  net.w(4).mutable_grad() = at::ones({kWidth, kWidth});
  reducer.finish();
  EXPECT_EQ(reducer.slices()[5].gradient.min().item<float>(), static_cast<float>(world().size()));
  EXPECT_FALSE(net.w(4).grad().defined());
}

TEST(GradientReducer, SmallGradientsOf16BitWeightsAddUpInFp32) {
  at::Tensor w = at::zeros({4}, at::kBFloat16).requires_grad_(true);
  GradientReducer reducer({{"w", w, ShardSpec::whole(w)}}, world());
  reducer.begin_step();
  for (int m = 0; m < 300; ++m) {
    reducer.before_backward(m == 299);
    w.sum().backward();
  }
  reducer.finish();
  EXPECT_EQ(reducer.slices()[0].gradient[0].item<float>(),
            300.0f * static_cast<float>(world().size()));  // bf16 would stop at 256
}

TEST(GradientReducer, ScaleAndNorm) {
  Net net(at::kFloat);
  GradientReducer reducer(net.parameters, world());
  backward_step(reducer, net, kPlain, 1);
  reducer.finish();
  double sum = 0;
  for (const GradientSlice& s : reducer.slices()) sum += s.gradient.to(at::kDouble).square().sum().item<double>();
  EXPECT_NEAR(reducer.squared_norm(), sum, test::kSumFp64 * sum);
  reducer.scale(0.5);
  EXPECT_NEAR(reducer.squared_norm(), sum / 4, test::kSumFp64 * sum);
}

TEST(GradientReducer, TheHooksGoWithIt) {
  Net net(at::kFloat);
  { GradientReducer reducer(net.parameters, world()); }
  net.loss(rows(0, 0, at::kFloat), kPlain).backward();
  EXPECT_TRUE(net.w(0).grad().defined());
}

TEST(GradientReducer, AGradientOutsideOfAStepIsRefused) {
  Net net(at::kFloat);
  GradientReducer reducer(net.parameters, world());
  EXPECT_THROW(net.loss(rows(0, 0, at::kFloat), kPlain).backward(), InternalError);
}

TEST(GradientReducer, RanksWithOtherParametersAreRefused) {
  if (world().size() == 1) GTEST_SKIP() << "needs two ranks";
  const bool last = world().rank() == world().size() - 1;
  at::Tensor w = at::zeros({last ? 4 : 3}).requires_grad_(true);
  EXPECT_THROW(GradientReducer({{"w", w, ShardSpec::whole(w)}}, world()), InternalError);
}

TEST(Parameters, AreCompared) {
  at::Tensor w = at::full({3, 2}, world().rank(), at::kBFloat16).t(), v = at::full({5}, 7.0 + world().rank());
  const std::vector<Parameter> parameters{{"w", w, ShardSpec::whole(w)}, {"v", v, ShardSpec::whole(v)}};
  if (world().size() > 1) {
    try {
      check_parameters_equal(parameters, same_holders(parameters, world()));
      ADD_FAILURE() << "accepted";
    } catch (const SystemError& e) {
      EXPECT_NE(std::string(e.what()).find(world().rank() == 0 ? "another rank" : "parameter w differs"),
                std::string::npos)
          << e.what();
    }
  }
  w.zero_();
  v.zero_();
  check_parameters_equal(parameters, same_holders(parameters, world()));
}

}  // namespace
}  // namespace trireme
