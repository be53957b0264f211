#include "base/tensor.h"

#include "ops/frozen_weight.h"

#include "base/check.h"

namespace trireme {

void FrozenWeight::set(const at::Tensor& whole_OI) {
  const std::vector<at::Tensor> values = encode(whole_OI);
  TRIREME_CHECK(values.size() == leaves_.size(), path_, values.size());
  for (size_t i = 0; i < values.size(); ++i) leaves_[i].value = values[i];
  ++times_set_;
}

int64_t FrozenWeight::num_bytes() const {
  size_t bytes = 0;
  for (const Leaf& leaf : leaves_) bytes += leaf.value.nbytes();
  return static_cast<int64_t>(bytes);
}

}  // namespace trireme
