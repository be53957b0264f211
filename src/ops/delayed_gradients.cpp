#include "base/tensor.h"

#include "ops/delayed_gradients.h"

#include <atomic>

namespace trireme {
namespace {

std::atomic<WeightGradientQueue*> active = nullptr;

}  // namespace

void WeightGradientQueue::push(const at::Tensor& weight, std::function<at::Tensor()> compute) {
  std::lock_guard lock(mutex_);
  items_.push_back({weight, std::move(compute)});
}

void WeightGradientQueue::run(const Sink& sink) {
  at::NoGradGuard no_grad;
  std::vector<Item> items;
  {
    std::lock_guard lock(mutex_);
    items.swap(items_);
  }
  for (Item& waiting : items) {
    const Item item = std::move(waiting);  // dies with this turn
    sink(item.weight, item.compute());
  }
}

size_t WeightGradientQueue::size() const {
  std::lock_guard lock(mutex_);
  return items_.size();
}

DelayWeightGradients::DelayWeightGradients(WeightGradientQueue* queue) : before_(active.exchange(queue)) {}
DelayWeightGradients::~DelayWeightGradients() { active = before_; }

at::Tensor weight_gradient(const at::Tensor& weight, std::function<at::Tensor()> compute) {
  WeightGradientQueue* queue = active;
  if (queue == nullptr || !weight.is_leaf()) return compute();
  queue->push(weight, std::move(compute));
  return {};
}

}  // namespace trireme
