#include "base/tensor.h"

#include "ops/delayed_gradients.h"

#include <atomic>

namespace trireme {
namespace {

std::atomic<DelayWeightGradients*> active = nullptr;

}  // namespace

void WeightGradientQueue::push(const at::Tensor& weight, std::function<at::Tensor()> compute) {
  std::lock_guard lock(mutex_);
  items_.push_back({weight, std::move(compute)});
}

void WeightGradientQueue::run(const Sink& sink) {
  while (run_one(sink)) {}
}

bool WeightGradientQueue::run_one(const Sink& sink) {
  at::NoGradGuard no_grad;
  Item item;
  {
    std::lock_guard lock(mutex_);
    if (items_.empty()) return false;
    item = std::move(items_.front());
    items_.pop_front();
  }
  sink(item.weight, item.compute());
  return true;
}

size_t WeightGradientQueue::size() const {
  std::lock_guard lock(mutex_);
  return items_.size();
}

DelayWeightGradients::DelayWeightGradients(WeightGradientQueue* queue, WeightGradientQueue::Sink fill)
    : queue_(queue), fill_(std::move(fill)), before_(active.exchange(this)) {}
DelayWeightGradients::~DelayWeightGradients() { active = before_; }

bool compute_waiting_gradient() {
  DelayWeightGradients* delay = active;
  return delay && delay->queue_ && delay->fill_ && delay->queue_->run_one(delay->fill_);
}

at::Tensor weight_gradient(const at::Tensor& weight, std::function<at::Tensor()> compute) {
  DelayWeightGradients* delay = active;
  if (!delay || !delay->queue_ || !weight.is_leaf()) return compute();
  delay->queue_->push(weight, std::move(compute));
  return {};
}

}  // namespace trireme
