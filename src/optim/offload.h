// Gradients and weights on their way through host memory, where the optimizer's state is and the update is computed
// (Ren et al. 2021, "ZeRO-Offload"): a piece of a tensor at a time, through two buffers of each kind, so that a device
// copies the next piece while the host computes this one. The buffers are pinned where the weights are on CUDA; the state
// need not be, for only the host touches it. Weights on the CPU go the same way.
#pragma once

#include <c10/core/Event.h>

#include <array>

#include "optim/optimizer.h"

namespace trireme {

class HostStaging {
 public:
  static constexpr int64_t kPieceElements = 1 << 18;  // 1 MiB of fp32: the time that starting a copy takes is a tenth of it

  explicit HostStaging(const std::vector<OptimTensor>& tensors, bool masters = true);

  // update(tensor, begin, weight, gradient) of every piece in turn: elements from `begin` on of that tensor, both on the host.
  // `weight` has its values where it is its own master (has_master()); what update leaves there goes back. On a device the last
  // pieces are then still on their way, in its current stream.
  using Update = std::function<void(size_t tensor, int64_t begin, const at::Tensor& weight, const at::Tensor& gradient)>;
  void for_pieces(const Update& update);
  int64_t bytes_fetched() const { return bytes_fetched_; }  // since the start

  // Bytes of the buffers where the largest tensor has so many elements of `dtype`.
  static uint64_t bytes(int64_t largest, at::ScalarType dtype);

 private:
  struct Piece {
    size_t tensor;
    int64_t begin;
    at::Tensor weight, gradient;  // where they live
  };
  struct Buffers {
    at::Tensor weight, gradient;       // bytes
    std::optional<c10::Event> arrived;  // from a device
  };
  void fetch(size_t piece);

  bool masters_;
  std::vector<Piece> pieces_;
  std::array<Buffers, 2> buffers_;
  int64_t bytes_fetched_ = 0;
};

}  // namespace trireme
