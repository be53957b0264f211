// Weight gradients apart from input gradients: for pipeline schedules that do them as two actions (Qi et al. 2024, "Zero
// Bubble Pipeline Parallelism"), and as the work that fills the time while backward waits for other ranks.
//
//   WeightGradientQueue queue;
//   {
//     DelayWeightGradients delay(&queue);
//     loss.backward();  // gradients of inputs; of weights only those that are not delayed
//   }
//   ... queue.run([&](const at::Tensor& weight, const at::Tensor& gradient) { reducer.contribute(weight, gradient); });
//
// Delayed is the weight of linear(), which is nearly all of the work. In backward stay: norms and biases (a pass over
// what is in the cache anyway), the embedding and the head (tied weights get one sum; linear_cross_entropy has its
// gradient since forward, and keeping it longer would hold a head for every micro-batch), and adapters (a hundredth of
// the work, whose delay would keep every input and output gradient alive). The gradients are the same bits as without.
#pragma once

#include <deque>
#include <mutex>

#include "base/tensor.h"

namespace trireme {

// Products that wait, of one or several backward passes. push() may come from the threads of backward.
class WeightGradientQueue {
 public:
  using Sink = std::function<void(const at::Tensor& weight, const at::Tensor& gradient)>;

  void push(const at::Tensor& weight, std::function<at::Tensor()> compute);
  // Computes them in the order in which they came and hands each to the sink; what a product needed is freed after it.
  void run(const Sink& sink);
  bool run_one(const Sink& sink);  // the oldest; false where there is none
  size_t size() const;

 private:
  struct Item {
    at::Tensor weight;
    std::function<at::Tensor()> compute;
  };
  mutable std::mutex mutex_;
  std::deque<Item> items_;
};

// While one lives, backward puts weight gradients into the queue (nullptr: none is delayed). For the whole process, as
// backward of CUDA tensors runs in threads of its own: one backward at a time. The last one made counts.
class DelayWeightGradients {
 public:
  // `fill`: compute_waiting_gradient() may take from the queue, for this sink.
  explicit DelayWeightGradients(WeightGradientQueue* queue, WeightGradientQueue::Sink fill = {});
  ~DelayWeightGradients();
  DelayWeightGradients(const DelayWeightGradients&) = delete;
  DelayWeightGradients& operator=(const DelayWeightGradients&) = delete;

 private:
  friend bool compute_waiting_gradient();
  friend at::Tensor weight_gradient(const at::Tensor& weight, std::function<at::Tensor()> compute);
  WeightGradientQueue* queue_;
  WeightGradientQueue::Sink fill_;
  DelayWeightGradients* before_;
};

// Computes the oldest weight gradient that waits, where that is wanted; false where there is none. For the time in which an
// operation's backward has sent something and waits.
bool compute_waiting_gradient();

// For the backward of an operation: the weight's gradient, or undefined where it has been put into the queue. Only of
// leaves: what depends on another tensor must go on through the graph.
at::Tensor weight_gradient(const at::Tensor& weight, std::function<at::Tensor()> compute);

}  // namespace trireme
