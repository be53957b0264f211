#include "optim/paged.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include "base/check.h"
#include "ops/paged_memory.h"

namespace trireme {

PagedState::PagedState(at::Device device, int64_t window_elements) : device_(device), window_elements_(window_elements) {
  TRIREME_CHECK(window_elements >= 2 * kernels::k8BitBlock, window_elements);
}

at::Tensor PagedState::zeros(at::IntArrayRef sizes, at::ScalarType dtype) {
  constexpr int64_t kBlockBytes = 64 << 20, kAlignment = 256;  // a driver's own blocks are of MiBs
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype)), taken = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (bytes == 0) return at::zeros(sizes, at::TensorOptions(dtype).device(device_));
  if (!block_.defined() || block_.numel() - used_bytes_ < taken) block_ = paged_bytes(std::max(taken, kBlockBytes), device_), used_bytes_ = 0;
  at::Tensor x = block_.narrow(0, used_bytes_, bytes);
  used_bytes_ += taken;
  const c10::impl::VirtualGuardImpl device(device_.type());
  paged_memory_of(device_).prefetch(x.data_ptr(), x.nbytes(), device_, device.getStreamNativeHandle(device.getStream(device_)));
  return x.zero_().view(dtype).view(sizes);
}

std::vector<std::vector<StatePiece>> PagedState::windows_of(const std::vector<StatePiece>& pieces) const {
  std::vector<std::vector<StatePiece>> windows;
  int64_t room = 0;  // of the last one
  for (StatePiece rest : pieces)
    while (rest.begin < rest.end) {
      if (rest.end - rest.begin > room && room < window_elements_ / 2) windows.emplace_back(), room = window_elements_;  // the other is nearly full
      const int64_t count = rest.end - rest.begin <= room ? rest.end - rest.begin : room / kernels::k8BitBlock * kernels::k8BitBlock;
      windows.back().push_back({rest.tensor, rest.begin, rest.begin + count});
      rest.begin += count, room -= count;
    }
  return windows;
}

// Neighbours in one call.
void PagedState::prefetch(const std::vector<at::Tensor>& state) const {
  constexpr ptrdiff_t kGap = 256;
  const c10::impl::VirtualGuardImpl device(device_.type());
  const auto move = [&](const char* from, const char* to) {
    if (from != to) paged_memory_of(device_).prefetch(from, static_cast<size_t>(to - from), device_, device.getStreamNativeHandle(*ahead_));
  };
  const char *begin = nullptr, *end = nullptr;
  for (const at::Tensor& x : state) {
    const auto* data = static_cast<const char*>(x.data_ptr());
    if (data < end || data - end > kGap || !end) move(std::exchange(begin, data), end);
    end = data + x.nbytes();
  }
  move(begin, end);
}

void PagedState::for_windows(const std::vector<StatePiece>& pieces, const std::function<std::vector<at::Tensor>(const StatePiece&)>& state,
                             const std::function<void(const std::vector<StatePiece>&)>& update) {
  const c10::impl::VirtualGuardImpl device(device_.type());
  const c10::Stream computing = device.getStream(device_);
  const std::vector<std::vector<StatePiece>> windows = windows_of(pieces);
  if (!ahead_) ahead_ = device.getStreamFromGlobalPool(device_);
  const auto fetch = [&](size_t k) {  // behind the update before the last, whose pages may leave for these
    std::vector<at::Tensor> parts;
    for (const StatePiece& piece : windows[k])
      for (at::Tensor& x : state(piece))
        if (x.defined()) parts.push_back(std::move(x));
    prefetch(parts);
    c10::Event arrived(device_.type());
    arrived.record(*ahead_);
    return arrived;
  };
  if (updated_) updated_->block(*ahead_);
  std::optional<c10::Event> arrived, next;
  if (!windows.empty()) arrived = fetch(0);
  for (size_t k = 0; k < windows.size(); ++k) {
    if (k + 1 < windows.size()) next = fetch(k + 1);
    arrived->block(computing);
    update(windows[k]);
    updated_.emplace(device_.type());
    updated_->record(computing);
    updated_->block(*ahead_);
    arrived = std::move(next);
  }
}

}  // namespace trireme
