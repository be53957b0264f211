// Moments and masters in paged memory (ops/paged_memory.h; Dettmers et al. 2023, "QLoRA", has paged optimizers): what does not fit a
// device beside weights and activations waits in host memory and is back when it is updated. A step goes through the state in windows:
// while one is updated the next is on its way, in a stream of its own, so that a device needs room for two.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include "optim/optimizer.h"

namespace trireme {

class PagedState {
 public:
  PagedState(at::Device device, int64_t window_elements);

  // Zeros. What is taken one after another stands together.
  at::Tensor zeros(at::IntArrayRef sizes, at::ScalarType dtype);

  // update(window) of each part of `pieces`, which puts it into the device's current stream, behind what it needs; `state` names what it
  // uses of a piece. A window has window_elements together, or less: whole pieces, or parts at multiples of kernels::k8BitBlock. The host
  // waits for nothing.
  void for_windows(const std::vector<StatePiece>& pieces, const std::function<std::vector<at::Tensor>(const StatePiece&)>& state,
                   const std::function<void(const std::vector<StatePiece>&)>& update);

 private:
  std::vector<std::vector<StatePiece>> windows_of(const std::vector<StatePiece>& pieces) const;
  void prefetch(const std::vector<at::Tensor>& state) const;

  at::Device device_;
  int64_t window_elements_, used_bytes_ = 0;
  at::Tensor block_;  // that is being filled
  std::optional<c10::Stream> ahead_;
  std::optional<c10::Event> updated_;  // the last window, of the step before
};

}  // namespace trireme
