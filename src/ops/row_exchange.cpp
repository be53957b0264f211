#include "base/tensor.h"

#include "ops/row_exchange.h"

namespace trireme {

const at::Tensor& ArrivingRows::wait() const {
  if (journey_ && journey_->here_tC.defined()) {
    journey_->wait();
    *journey_ = {};
  }
  return all_TC_;
}

void ArrivingRows::in_order(const std::function<void(int64_t first, const at::Tensor& rows)>& f) const {
  if (!journey_ || !journey_->here_tC.defined()) return f(0, all_TC_);
  const int64_t first = journey_->first, end = first + journey_->here_tC.size(0), rows = all_TC_.size(0);
  f(first, journey_->here_tC);
  wait();
  if (first > 0) f(0, all_TC_.narrow(0, 0, first));
  if (end < rows) f(end, all_TC_.narrow(0, end, rows - end));
}

}  // namespace trireme
