#include "optim/offload.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include "ops/op_support.h"

namespace trireme {
namespace {

// The front of a buffer, as the host's place of `piece`.
at::Tensor front(const at::Tensor& buffer, const at::Tensor& piece) {
  return buffer.narrow(0, 0, static_cast<int64_t>(piece.nbytes())).view(piece.scalar_type());
}

}  // namespace

HostStaging::HostStaging(const std::vector<OptimTensor>& tensors, bool masters) : masters_(masters) {
  size_t weight_bytes = 0, gradient_bytes = 0;
  bool pinned = false;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t begin = 0; begin < tensors[i].weight.numel(); begin += kPieceElements) {
      const int64_t count = std::min(kPieceElements, tensors[i].weight.numel() - begin);
      pieces_.push_back({i, begin, tensors[i].weight.narrow(0, begin, count), tensors[i].grad.narrow(0, begin, count)});
      weight_bytes = std::max(weight_bytes, pieces_.back().weight.nbytes());
      gradient_bytes = std::max(gradient_bytes, pieces_.back().gradient.nbytes());
      pinned |= pieces_.back().weight.is_cuda();
    }
  const auto options = at::TensorOptions(at::kByte).pinned_memory(pinned);
  for (Buffers& buffers : buffers_) {
    buffers.weight = at::empty({static_cast<int64_t>(weight_bytes)}, options);
    buffers.gradient = at::empty({static_cast<int64_t>(gradient_bytes)}, options);
  }
}

void HostStaging::fetch(size_t k) {
  const Piece& piece = pieces_[k];
  Buffers& buffers = buffers_[k % buffers_.size()];
  front(buffers.gradient, piece.gradient).copy_(piece.gradient, /*non_blocking=*/true);
  bytes_fetched_ += static_cast<int64_t>(piece.gradient.nbytes());
  if (!has_master(piece.weight.scalar_type(), masters_))
    front(buffers.weight, piece.weight).copy_(piece.weight, /*non_blocking=*/true), bytes_fetched_ += static_cast<int64_t>(piece.weight.nbytes());
  if (piece.weight.is_cpu()) return;
  buffers.arrived.emplace(piece.weight.device().type());
  buffers.arrived->record(c10::impl::VirtualGuardImpl(piece.weight.device().type()).getStream(piece.weight.device()));
}

// One stream orders it all: what comes into a buffer waits there for what still goes out of it.
void HostStaging::for_pieces(const Update& update) {
  if (!pieces_.empty()) fetch(0);
  for (size_t k = 0; k < pieces_.size(); ++k) {
    if (k + 1 < pieces_.size()) fetch(k + 1);
    const Piece& piece = pieces_[k];
    Buffers& buffers = buffers_[k % buffers_.size()];
    if (buffers.arrived) buffers.arrived->synchronize();
    const at::Tensor weight = front(buffers.weight, piece.weight);
    update(piece.tensor, piece.begin, weight, front(buffers.gradient, piece.gradient));
    at::Tensor(piece.weight).copy_(weight, /*non_blocking=*/true);
  }
}

uint64_t HostStaging::bytes(int64_t largest, at::ScalarType dtype) {
  return 2 * static_cast<uint64_t>(std::min(largest, kPieceElements)) * (c10::elementSize(dtype) + c10::elementSize(compute_dtype(dtype)));
}

}  // namespace trireme
