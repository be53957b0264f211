#include "base/tensor.h"

#include "parallel/pipeline_runner.h"

#include <torch/csrc/autograd/engine.h>

#include <deque>

#include "base/check.h"
#include "base/trace.h"

namespace trireme {
namespace {

using Time = PipelineEvent::Time;

// What comes to one chunk from another stage, in one direction.
struct Channel {
  std::deque<int> micro_batches;  // still to be posted, in the order in which they are needed
  at::Tensor buffer;              // of the receive that is posted
  Work work;
};

// What a micro-batch leaves in a chunk between its actions.
struct Passing {
  at::Tensor hidden;           // the input, which gets its gradient in .grad
  torch::autograd::Edge root;  // where backward starts; the output itself is not kept
  at::Tensor ones;             // the gradient to start from, of the last chunk
  WeightGradientQueue weights;
};

class Runner {
 public:
  Runner(const PipelineSchedule& schedule, const Communicator& pipeline, const PipelineStep& step)
      : schedule_(schedule), comm_(pipeline), step_(step), local_(schedule.chunks_of(pipeline.rank())) {
    TRIREME_CHECK(pipeline.size() == schedule.stages && step.chunks.size() == local_.size(), pipeline.size(),
                  " ranks, ", schedule.stages, " stages, ", step.chunks.size(), " chunks");
    for (const Action& a : actions())
      if (schedule.source(a) >= 0) channels_[tag(a)].micro_batches.push_back(a.micro_batch);
  }

  void run() {
    at::AutoGradMode with_gradients(schedule_.trains);
    for (const Action& a : actions())
      if (schedule_.source(a) >= 0 && !channels_[tag(a)].buffer.defined()) post(a);
    for (const Action& a : actions()) {
      PipelineEvent event{a, std::chrono::steady_clock::now(), {}, {}};
      at::Tensor input = a.kind == ActionKind::kBackwardWeight ? at::Tensor() : take_input(a);
      event.begin = std::chrono::steady_clock::now();
      at::Tensor output = act(a, std::move(input));
      event.end = std::chrono::steady_clock::now();
      if (output.defined()) pass_on(a, std::move(output));
      if (step_.observe) step_.observe(event);
    }
    Span span(TimeKind::kBubble, "wait for sends");
    for (Work& send : sends_) send.wait();
  }

 private:
  const std::vector<Action>& actions() const { return schedule_.actions[static_cast<size_t>(comm_.rank())]; }
  const PipelineChunk& chunk(const Action& a) const {
    return step_.chunks[static_cast<size_t>(std::find(local_.begin(), local_.end(), a.chunk) - local_.begin())];
  }
  bool last(int chunk) const { return chunk + 1 == schedule_.num_chunks(); }
  // By receiving chunk and direction: messages of one kind arrive in the order in which they are sent.
  static int tag(const Action& receiver) {
    return 2 * receiver.chunk + (receiver.kind == ActionKind::kForward ? 0 : 1);
  }

  void post(const Action& a) {
    Channel& channel = channels_[tag(a)];
    if (channel.micro_batches.empty()) return;
    channel.buffer = at::empty(step_.hidden_shape(channel.micro_batches.front()), step_.hidden_options);
    channel.work = comm_.start_receive(channel.buffer, schedule_.source(a), tag(a));
    channel.micro_batches.pop_front();
  }

  at::Tensor act(const Action& a, at::Tensor input) {
    Span span(TimeKind::kCompute, action_name(a.kind), {.micro_batch = a.micro_batch, .chunk = a.chunk});
    return a.kind == ActionKind::kForward          ? forward(a, std::move(input))
           : a.kind == ActionKind::kBackwardWeight ? weight_gradients(a)
                                                   : backward(a, std::move(input));
  }

  // From another stage, from another chunk here, or undefined at the ends of the model.
  at::Tensor take_input(const Action& a) {
    if (schedule_.source(a) < 0) {
      auto found = handed_over_.find({tag(a), a.micro_batch});
      if (found == handed_over_.end()) return {};
      at::Tensor input = std::move(found->second);
      handed_over_.erase(found);
      return input;
    }
    Channel& channel = channels_[tag(a)];
    {
      Span span(TimeKind::kBubble, "wait for input", {.micro_batch = a.micro_batch, .chunk = a.chunk});
      channel.work.wait();
    }
    at::Tensor input = std::move(channel.buffer);
    post(a);
    return input;
  }

  void pass_on(const Action& a, at::Tensor output) {
    std::erase_if(sends_, [](Work& send) { return send.test(); });
    // Forwards alone go one way: without backward to wait for, the first stage would run ahead with the outputs of all.
    for (; !schedule_.trains && sends_.size() >= 2 * local_.size(); sends_.pop_front()) sends_.front().wait();
    Action next = a;
    next.chunk += a.kind == ActionKind::kForward ? 1 : -1;
    if (schedule_.stage_of(next.chunk) == comm_.rank())
      handed_over_[{tag(next), a.micro_batch}] = std::move(output);
    else
      sends_.push_back(comm_.start_send(output, schedule_.stage_of(next.chunk), tag(next)));
  }

  at::Tensor forward(const Action& a, at::Tensor hidden) {
    if (hidden.defined() && schedule_.trains) hidden.requires_grad_();
    at::Tensor output = chunk(a).forward(a.micro_batch, hidden);
    if (schedule_.trains) {
      Passing& passing = passing_[{a.chunk, a.micro_batch}];
      passing.hidden = std::move(hidden);
      if (output.defined() && output.requires_grad()) {
        passing.root = torch::autograd::impl::gradient_edge(output);
        if (last(a.chunk)) passing.ones = at::ones_like(output);
      }
    }
    if (last(a.chunk)) return {};
    TRIREME_CHECK(output.defined() && output.sizes() == step_.hidden_shape(a.micro_batch) &&
                      output.scalar_type() == step_.hidden_options.dtype().toScalarType(),
                  action_text(a), " made ", output.sizes(), " of ", output.scalar_type());
    return output.detach().contiguous();
  }

  // `gradient` of the output; returns that of the input, for the chunk before.
  at::Tensor backward(const Action& a, at::Tensor gradient) {
    Passing& passing = passing_.at({a.chunk, a.micro_batch});
    const bool split = a.kind == ActionKind::kBackwardInput;
    if (passing.root.is_valid()) {  // else nothing before here is trained, or there is no loss
      const bool fills = !split && step_.fill_waits;
      DelayWeightGradients delay(split || fills ? &passing.weights : nullptr, fills ? chunk(a).contribute : WeightGradientQueue::Sink());
      torch::autograd::Engine::get_default_engine().execute({std::exchange(passing.root, {})},
                                                            {last(a.chunk) ? passing.ones : gradient},
                                                            /*keep_graph=*/false, /*create_graph=*/false,
                                                            /*accumulate_grad=*/true);
    }
    if (!split) passing.weights.run(chunk(a).contribute);
    at::Tensor hidden = std::exchange(passing.hidden, at::Tensor());
    if (!split) passing_.erase({a.chunk, a.micro_batch});
    if (!hidden.defined()) return {};
    return hidden.grad().defined() ? hidden.grad().contiguous() : at::zeros_like(hidden);
  }

  at::Tensor weight_gradients(const Action& a) {
    passing_.at({a.chunk, a.micro_batch}).weights.run(chunk(a).contribute);
    passing_.erase({a.chunk, a.micro_batch});
    return {};
  }

  const PipelineSchedule& schedule_;
  const Communicator& comm_;
  const PipelineStep& step_;
  std::vector<int> local_;
  std::map<int, Channel> channels_;                        // by tag
  std::map<std::pair<int, int>, at::Tensor> handed_over_;  // within this stage, by tag and micro-batch
  std::map<std::pair<int, int>, Passing> passing_;         // by chunk and micro-batch
  std::deque<Work> sends_;  // the oldest first
};

}  // namespace

void run_pipeline(const PipelineSchedule& schedule, const Communicator& pipeline, const PipelineStep& step) {
  Runner(schedule, pipeline, step).run();
}

}  // namespace trireme
