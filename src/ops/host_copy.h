// A tensor's values in host memory while backward does not need them yet (activation offload; Ren et al. 2021).
#pragma once

#include <c10/core/Event.h>

#include <deque>

#include "base/tensor.h"

namespace trireme {

// One that lives on a device goes to pinned host memory and comes back by take(), both in a stream of their own beside the
// computation; its own memory is free as soon as it has left. On the CPU it stays where it is.
class HostCopy {
 public:
  explicit HostCopy(const at::Tensor& x);
  // Begins to bring the values back, before somebody asks for them.
  void fetch();
  // The values, where they were; ordered behind their arrival in the current stream. Once.
  at::Tensor take();

 private:
  at::Tensor host_, device_;
  c10::TensorOptions options_;
  std::optional<c10::Event> arrived_;
};

}  // namespace trireme
