// A pipeline over N ranks gives the losses and gradients of one rank, to the bit, by every schedule: the sums over
// micro-batches are taken in the same order. Runs on 1, 2 and 4 ranks.
#include "parallel/pipeline_runner.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "base/check.h"
#include "comm/process.h"
#include "ops/ops.h"
#include "parallel/data_parallel.h"
#include "support.h"

namespace trireme {
namespace {

using test::same_bits;

constexpr int64_t kWidth = 6;

const Communicator& world() {
  static Process process;
  static Communicator world = Communicator::world();
  return world;
}

at::Tensor random(uint64_t seed, at::IntArrayRef shape) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn(shape, generator, at::TensorOptions().dtype(at::kDouble));
}

std::vector<int64_t> shape_of(int micro_batch) { return {2 + micro_batch % 3, kWidth}; }

enum Variant { kPlain, kRecompute, kFrozenStart, kNoLoss };

// A chunk is two linear layers, of which the second adds to the residual stream. Micro-batch 1 has no loss in kNoLoss;
// in kFrozenStart chunk 0 is not trained.
struct Toy {
  int num_chunks;
  Variant variant;
  std::vector<std::vector<Parameter>> parameters;  // by chunk
  double gradient_factor = 1;                      // a fault: of the gradient that a chunk hands back
  int replica = 0;                                 // whose rows

  Toy(int n, Variant v) : num_chunks(n), variant(v) {
    for (int c = 0; c < n; ++c) {
      parameters.emplace_back();
      for (int i = 0; i < 3; ++i) {
        const auto seed = static_cast<uint64_t>(10 * c + i);
        at::Tensor w = random(seed, i == 2 ? at::IntArrayRef({kWidth}) : at::IntArrayRef({kWidth, kWidth})).mul_(0.4);
        w.requires_grad_(v != kFrozenStart || c > 0);
        parameters.back().push_back({str("w", c, ".", i), w, ShardSpec::whole(w)});
      }
    }
  }

  at::Tensor forward(int chunk, int micro_batch, const at::Tensor& hidden) const {
    const auto& p = parameters[static_cast<size_t>(chunk)];
    auto body = [w0 = p[0].value, w1 = p[1].value, b = p[2].value](const std::vector<at::Tensor>& in) {
      return in[0] + trireme::linear(at::tanh(trireme::linear(in[0], w0, b)), w1);
    };
    at::Tensor x = chunk == 0 ? random(1000 + static_cast<uint64_t>(100 * replica + micro_batch), shape_of(micro_batch)) : hidden;
    if (gradient_factor != 1 && chunk > 0) x = x * gradient_factor - x.detach() * (gradient_factor - 1);
    at::Tensor y = variant == kRecompute ? recompute(body, {x}) : body({x});
    if (chunk + 1 < num_chunks) return y;
    return variant == kNoLoss && micro_batch == 1 ? at::Tensor() : (y * y).sum();
  }
};

struct Result {
  std::map<std::string, at::Tensor> gradients;
  std::map<int, double> losses;  // by micro-batch
};

Result alone(const Toy& toy, int micro_batches) {
  std::vector<Parameter> parameters;
  for (const auto& p : toy.parameters) parameters.insert(parameters.end(), p.begin(), p.end());
  GradientReducer reducer(parameters, Communicator::self());
  Result result;
  reducer.begin_step();
  for (int m = 0; m < micro_batches; ++m) {
    at::Tensor hidden;
    for (int c = 0; c < toy.num_chunks; ++c) hidden = toy.forward(c, m, hidden);
    if (hidden.defined()) result.losses[m] = hidden.item<double>();
    reducer.before_backward(false);
    if (hidden.defined() && hidden.requires_grad()) torch::autograd::backward({hidden}, {});
  }
  reducer.finish();
  for (const auto& slice : reducer.slices()) result.gradients[slice.name] = slice.gradient.clone();
  return result;
}

Result piped(const Toy& toy, const PipelineSchedule& schedule, std::vector<PipelineEvent>* events = nullptr) {
  Result result;
  PipelineStep step;
  std::vector<std::unique_ptr<GradientReducer>> reducers;
  for (int c : schedule.chunks_of(world().rank())) {
    reducers.push_back(std::make_unique<GradientReducer>(toy.parameters[static_cast<size_t>(c)], Communicator::self()));
    GradientReducer* reducer = reducers.back().get();
    reducer->begin_step();
    reducer->before_all_backwards();
    PipelineChunk chunk;
    chunk.forward = [&, c](int micro_batch, const at::Tensor& hidden) {
      EXPECT_EQ(hidden.defined(), c > 0);
      at::Tensor out = toy.forward(c, micro_batch, hidden);
      if (c + 1 == toy.num_chunks && out.defined()) result.losses[micro_batch] = out.item<double>();
      return out;
    };
    chunk.contribute = [reducer](const at::Tensor& w, const at::Tensor& g) { reducer->contribute(w, g); };
    step.chunks.push_back(std::move(chunk));
  }
  step.hidden_shape = shape_of;
  step.hidden_options = at::TensorOptions().dtype(at::kDouble);
  step.observe = [&](const PipelineEvent& event) {
    if (events != nullptr) events->push_back(event);
  };
  run_pipeline(schedule, world(), step);
  for (const auto& reducer : reducers) {
    reducer->finish();
    for (const auto& slice : reducer->slices()) result.gradients[slice.name] = slice.gradient.clone();
  }
  return result;
}

void expect_same(const Toy& toy, const PipelineSchedule& schedule) {
  SCOPED_TRACE(str(pipeline_kind_name(schedule.kind), " virtual ", schedule.virtual_stages, " micro-batches ",
                   schedule.micro_batches, " variant ", toy.variant));
  const Result expected = alone(toy, schedule.micro_batches), actual = piped(toy, schedule);
  size_t count = 0;
  for (int c : schedule.chunks_of(world().rank()))
    for (const Parameter& p : toy.parameters[static_cast<size_t>(c)]) {
      if (!p.value.requires_grad()) continue;
      // Weight gradients that wait come after those that do not: sums of some ten terms in another order, 2^-53 each.
      const at::Tensor &got = actual.gradients.at(p.name), &wanted = expected.gradients.at(p.name);
      if (schedule.kind == PipelineKind::kZbV || schedule.kind == PipelineKind::kZbH1) {
        EXPECT_TRUE(at::allclose(got, wanted, /*rtol=*/0, /*atol=*/1e-13 * wanted.abs().max().item<double>())) << p.name;
      } else {
        EXPECT_TRUE(same_bits(got, wanted)) << p.name;
      }
      ++count;
    }
  EXPECT_EQ(actual.gradients.size(), count);
  if (schedule.stage_of(toy.num_chunks - 1) == world().rank()) {
    EXPECT_EQ(actual.losses, expected.losses);
  }
}

constexpr PipelineKind kKinds[] = {PipelineKind::kGpipe, PipelineKind::k1F1B, PipelineKind::kInterleaved,
                                   PipelineKind::kZbH1, PipelineKind::kZbV};

TEST(Pipeline, EverySchedule) {
  const int stages = world().size();
  for (PipelineKind kind : kKinds)
    for (int m : {1, 3, 4, 8})
      for (int v : {0, 3}) {
        const bool interleaved = kind == PipelineKind::kInterleaved;
        if (interleaved ? m % stages != 0 : v != 0) continue;
        const PipelineSchedule schedule = make_pipeline_schedule(kind, stages, v, m);
        expect_same(Toy(schedule.num_chunks(), kPlain), schedule);
      }
}

TEST(Pipeline, AScaledGradientIsToldFromTheRightOne) {
  if (world().size() == 1) GTEST_SKIP() << "one stage hands nothing back";
  const PipelineSchedule schedule = make_pipeline_schedule(PipelineKind::k1F1B, world().size(), 0, 4);
  Toy toy(schedule.num_chunks(), kPlain);
  const Result expected = alone(toy, 4);
  toy.gradient_factor = 2;  // the value stays to the bit
  const Result actual = piped(toy, schedule);
  const bool last = world().rank() + 1 == world().size();
  EXPECT_EQ(actual.losses, last ? expected.losses : Result().losses);
  for (const auto& [name, gradient] : actual.gradients) EXPECT_EQ(same_bits(gradient, expected.gradients.at(name)), last) << name;
}

TEST(Pipeline, EveryKindOfChunk) {
  for (PipelineKind kind : kKinds)
    for (Variant variant : {kRecompute, kFrozenStart, kNoLoss}) {
      const PipelineSchedule schedule = make_pipeline_schedule(kind, world().size(), 0, 4);
      expect_same(Toy(schedule.num_chunks(), variant), schedule);
    }
}

TEST(Pipeline, ForwardsOnly) {
  for (PipelineKind kind : kKinds) {
    const PipelineSchedule schedule = make_forward_schedule(kind, world().size(), 0, 3);
    Toy toy(schedule.num_chunks(), kPlain);
    const Result expected = alone(toy, 3), actual = piped(toy, schedule);
    if (schedule.stage_of(toy.num_chunks - 1) == world().rank()) {
      EXPECT_EQ(actual.losses, expected.losses);
    }
    for (const auto& [name, gradient] : actual.gradients) EXPECT_EQ(gradient.abs().sum().item<double>(), 0.0) << name;
  }
}

// Two replicas of a pipeline, one reducer for all chunks of a rank and a bucket for each parameter: what is summed in two steps.
std::vector<at::Tensor> overlapped(PipelineKind kind, const GradientReducerOptions& options) {
  constexpr int kMicroBatches = 4;
  const int stages = world().size() / 2, replica = world().rank() / stages;
  const Communicator pipeline = world().split(replica, world().rank(), "pipeline");
  const Communicator data = world().split(pipeline.rank(), replica, "data");
  const PipelineSchedule schedule = make_pipeline_schedule(kind, stages, 0, kMicroBatches);
  Toy toy(schedule.num_chunks(), kPlain);
  toy.replica = replica;
  std::vector<Parameter> parameters;
  for (int c : schedule.chunks_of(pipeline.rank())) {
    const auto& own = toy.parameters[static_cast<size_t>(c)];
    parameters.insert(parameters.end(), own.begin(), own.end());
  }
  GradientReducer reducer(parameters, data, options);
  EXPECT_EQ(reducer.layout().size(), parameters.size());
  PipelineStep step;
  for (int c : schedule.chunks_of(pipeline.rank()))
    step.chunks.push_back({[&toy, c](int micro_batch, const at::Tensor& hidden) { return toy.forward(c, micro_batch, hidden); },
                           [&reducer](const at::Tensor& w, const at::Tensor& g) { reducer.contribute(w, g); }});
  step.hidden_shape = shape_of;
  step.hidden_options = at::TensorOptions().dtype(at::kDouble);
  auto num_reductions = [&] {
    int64_t calls = 0;
    for (const auto& line : data.statistics().lines)
      if (line.op == "all_reduce" || line.op == "reduce_scatter") calls += line.num_calls;
    return calls;
  };
  std::vector<at::Tensor> sums;
  for (int i = 0; i < 2; ++i) {
    const int64_t before = num_reductions();
    reducer.begin_step();
    reducer.before_all_backwards();
    run_pipeline(schedule, pipeline, step);
    const int64_t started = num_reductions() - before, all = static_cast<int64_t>(parameters.size());
    if (i == 0 || !options.overlap) EXPECT_EQ(started, 0);  // the first step counts contributions
    else if (options.zero < 2) EXPECT_EQ(started, all);
    else EXPECT_GE(started, 2);  // more than two only where the first ones have ended
    reducer.finish([&](bool late) { return late; });
    EXPECT_EQ(num_reductions() - before, all);
    EXPECT_EQ(reducer.num_late_contributions(), 0);
    for (const GradientPart& part : reducer.parts()) sums.push_back(part.gradient.clone());
  }
  return sums;
}

TEST(Pipeline, EveryBucketIsSentBeforeTheStepEnds) {
  if (world().size() == 1) GTEST_SKIP() << "nothing is sent by one rank";
  for (PipelineKind kind : kKinds)
    for (int zero : {0, 1, 2}) {
      SCOPED_TRACE(str(pipeline_kind_name(kind), " zero ", zero));
      const auto right = overlapped(kind, {.bucket_bytes = 1, .overlap = false, .zero = zero});
      const auto sums = overlapped(kind, {.bucket_bytes = 1, .overlap = true, .zero = zero});
      ASSERT_EQ(sums.size(), right.size());
      for (size_t i = 0; i < right.size(); ++i) EXPECT_TRUE(same_bits(sums[i], right[i])) << i;
    }
}

TEST(Pipeline, EventsAreTheActions) {
  const PipelineSchedule schedule = make_pipeline_schedule(PipelineKind::kZbV, world().size(), 0, 4);
  std::vector<PipelineEvent> events;
  piped(Toy(schedule.num_chunks(), kPlain), schedule, &events);
  const auto& actions = schedule.actions[static_cast<size_t>(world().rank())];
  ASSERT_EQ(events.size(), actions.size());
  for (size_t i = 0; i < events.size(); ++i) {
    EXPECT_EQ(events[i].action, actions[i]);
    EXPECT_LE(events[i].asked, events[i].begin);
    EXPECT_LE(events[i].begin, events[i].end);
    if (i > 0) {
      EXPECT_LE(events[i - 1].end, events[i].asked);
    }
  }
}

// What a micro-batch's graph holds lives from its forward to the backward that needs it: as many at once as the
// schedule says, none afterwards.
TEST(Pipeline, ActivationsLiveAsLongAsTheScheduleSays) {
  for (PipelineKind kind : {PipelineKind::kGpipe, PipelineKind::k1F1B, PipelineKind::kInterleaved}) {
    const PipelineSchedule schedule = make_pipeline_schedule(kind, world().size(), 0, 8);
    auto token = std::make_shared<int>();
    long most = 0;
    at::Tensor w = at::ones({kWidth, kWidth}, at::kDouble).requires_grad_();
    PipelineStep step;
    for (int c : schedule.chunks_of(world().rank())) {
      PipelineChunk chunk;
      chunk.forward = [&, c](int micro_batch, const at::Tensor& hidden) {
        at::Tensor x = c == 0 ? at::ones(shape_of(micro_batch), at::kDouble) : hidden;
        at::Tensor y =
            recompute([w, token](const std::vector<at::Tensor>& in) { return trireme::linear(in[0], w); }, {x});
        most = std::max(most, token.use_count() - 1);
        return c + 1 == schedule.num_chunks() ? y.sum() : y;
      };
      step.chunks.push_back(std::move(chunk));
    }
    step.hidden_shape = shape_of;
    step.hidden_options = at::TensorOptions().dtype(at::kDouble);
    run_pipeline(schedule, world(), step);
    EXPECT_EQ(most, simulate(schedule, {}).peak_in_flight[static_cast<size_t>(world().rank())])
        << pipeline_kind_name(kind);
    EXPECT_EQ(token.use_count(), 1);
  }
}

TEST(Pipeline, WrongChunksAreRefused) {
  const PipelineSchedule schedule = make_pipeline_schedule(PipelineKind::k1F1B, world().size(), 0, 2);
  EXPECT_THROW(run_pipeline(schedule, world(), PipelineStep()), InternalError);
  const PipelineSchedule other = make_pipeline_schedule(PipelineKind::k1F1B, world().size() + 1, 0, 2);
  EXPECT_THROW(piped(Toy(other.num_chunks(), kPlain), other), InternalError);
  if (world().size() > 1) return;  // its peers would wait
  const PipelineSchedule two = make_pipeline_schedule(PipelineKind::kZbV, 1, 0, 1);
  PipelineStep step;
  step.chunks.resize(2);
  step.chunks[0].forward = [](int, const at::Tensor&) { return at::ones({9, kWidth}, at::kDouble); };
  step.hidden_shape = shape_of;
  step.hidden_options = at::TensorOptions().dtype(at::kDouble);
  try {
    run_pipeline(two, world(), step);
    FAIL();
  } catch (const InternalError& e) {
    EXPECT_NE(std::string(e.what()).find("forward of micro-batch 0 on chunk 0 made [9, 6]"), std::string::npos)
        << e.what();
  }
}

}  // namespace
}  // namespace trireme
