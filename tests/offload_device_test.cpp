// The optimizer's way through host memory with a device that is as late as it may be: what is put into its stream happens
// when the host waits for an event behind it, and not before. Its memory is the host's.
#include "base/tensor.h"

#include <ATen/ops/as_strided_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>
#include <deque>

#include "base/check.h"
#include "optim/offload.h"
#include "support.h"

namespace trireme {
namespace {

constexpr c10::DeviceType kLate = c10::DeviceType::PrivateUse1;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
struct Stream {
  std::deque<Copy> waiting;
  int64_t num_put = 0, num_done = 0;
  void run_to(int64_t position) {
    for (; num_done < position; ++num_done, waiting.pop_front()) std::memcpy(waiting.front().to, waiting.front().from, waiting.front().bytes);
  }
};
Stream stream;

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kLate; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return c10::Device(kLate, 0); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(getDevice()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new int64_t;
    *static_cast<int64_t*>(*event) = stream.num_put;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<int64_t*>(event); }
  void synchronizeEvent(void* event) const override { stream.run_to(*static_cast<int64_t*>(event)); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  TRIREME_CHECK(from.is_contiguous() && to.is_contiguous() && from.nbytes() == to.nbytes() && from.scalar_type() == to.scalar_type());
  stream.waiting.push_back({to.data_ptr(), from.data_ptr(), from.nbytes()});
  ++stream.num_put;
  if (!non_blocking) stream.run_to(stream.num_put);
  return to;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("_copy_from", copy_from);
}

at::Tensor on_device(const at::Tensor& host) {
  return at::for_blob(host.data_ptr(), host.sizes()).target_device(c10::Device(kLate, 0)).options(host.options().device(kLate, 0)).make_tensor();
}

TEST(OffloadDevice, ALateDeviceChangesNothing) {
  constexpr int64_t kPiece = HostStaging::kPieceElements;
  std::vector<at::Tensor> ends[2];
  for (const bool late : {false, true}) {
    std::vector<at::Tensor> weights = {at::linspace(-1, 1, 4 * kPiece + 5), at::linspace(-2, 2, kPiece + 1).to(at::kBFloat16), at::linspace(-1, 2, 37)}, grads;
    std::vector<OptimTensor> tensors;
    for (const at::Tensor& w : weights) {
      grads.push_back(at::empty(w.sizes()));
      tensors.push_back({"w", late ? on_device(w) : w, late ? on_device(grads.back()) : grads.back(), 0.1});
    }
    Optimizer optimizer(tensors, {.beta2 = 0.99, .offload = late});
    for (int t = 0; t < 3; ++t) {
      for (at::Tensor& g : grads) g.copy_(at::linspace(-1, 2, g.numel()) + t);
      optimizer.step(1e-2, 0.5);
      stream.run_to(stream.num_put);  // as whatever reads the weights on the device would
    }
    ends[late] = weights;
    for (const OptimState& state : optimizer.state()) {
      EXPECT_TRUE(state.value.is_cpu());
      ends[late].push_back(state.value);
    }
  }
  EXPECT_GT(stream.num_done, 3 * 2 * 8);
  for (size_t i = 0; i < ends[0].size(); ++i) EXPECT_TRUE(test::same_bits(ends[1][i], ends[0][i])) << i;
}

}  // namespace
}  // namespace trireme
