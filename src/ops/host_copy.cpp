#include "base/tensor.h"

#include "ops/host_copy.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "base/check.h"

namespace trireme {
namespace {

// The stream of copies is current while one lives; it begins behind what the computation's stream holds by then.
class CopyStream {
 public:
  explicit CopyStream(at::Device device) : guard_(device.type()), computation_(guard_.getStream(device)), copies_(of(device)) {
    c10::Event now(device.type());
    now.record(computation_);
    now.block(copies_);
    guard_.exchangeStream(copies_);
  }
  ~CopyStream() { guard_.exchangeStream(computation_); }
  c10::Event behind() const {
    c10::Event event(copies_.device_type());
    event.record(copies_);
    return event;
  }
  // The memory of x is not given to others before these copies are done.
  void keep(const at::Tensor& x) const { c10::getDeviceAllocator(x.device().type())->recordStream(x.storage().data_ptr(), copies_); }

 private:
  static c10::Stream of(at::Device device) {
    static const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device, false);  // a process has one device
    return stream;
  }
  c10::impl::VirtualGuardImpl guard_;
  c10::Stream computation_, copies_;
};

}  // namespace

HostCopy::HostCopy(const at::Tensor& x) : options_(x.options()) {
  if (x.is_cpu()) {
    device_ = x;
    return;
  }
  host_ = at::empty(x.sizes(), options_.device(at::kCPU).pinned_memory(x.is_cuda()));
  const at::Tensor values = x.contiguous();
  const CopyStream copies(x.device());
  host_.copy_(values, /*non_blocking=*/true);
  copies.keep(values);
}

void HostCopy::fetch() {
  if (device_.defined() || !host_.defined()) return;
  const CopyStream copies(options_.device());
  device_ = at::empty(host_.sizes(), options_);
  device_.copy_(host_, /*non_blocking=*/true);  // behind its way here: they share a stream
  arrived_.emplace(copies.behind());
}

at::Tensor HostCopy::take() {
  fetch();
  TRIREME_CHECK(device_.defined(), "taken twice");
  if (arrived_) {
    const c10::Stream computation = c10::impl::VirtualGuardImpl(device_.device().type()).getStream(device_.device());
    arrived_->block(computation);
    c10::getDeviceAllocator(device_.device().type())->recordStream(device_.storage().data_ptr(), computation);
  }
  host_.reset();
  return std::exchange(device_, at::Tensor());
}

}  // namespace trireme
