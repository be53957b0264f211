#include "base/tensor.h"

#include "ops/device.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "base/check.h"

namespace trireme {
namespace {

std::array<const kernels::Kernels*, static_cast<size_t>(at::DeviceType::COMPILE_TIME_MAX_DEVICE_TYPES)> sets{};

std::atomic<KernelSettings> settings;

bool known(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf; }

}  // namespace

void set_kernels(at::DeviceType device, const kernels::Kernels* kernels) { sets.at(static_cast<size_t>(device)) = kernels; }

const kernels::Kernels* kernels_of(const at::Tensor& x) {
  const kernels::Kernels* found = sets[static_cast<size_t>(x.device().type())];
  if (x.is_cpu()) return known(x.scalar_type()) ? found : nullptr;
  TRIREME_CHECK(found, "no kernels for ", x.device().str());
  TRIREME_CHECK(known(x.scalar_type()), c10::toString(x.scalar_type()), " on ", x.device().str(), " is not float32, bfloat16 or float16");
  return found;
}

void set_kernel_settings(const KernelSettings& given) { settings = given; }
KernelSettings kernel_settings() { return settings; }

kernels::Type kernel_type(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat ? kernels::Type::kFloat32 : x.scalar_type() == at::kHalf ? kernels::Type::kFloat16 : kernels::Type::kBFloat16;
}

kernels::Stream stream_of(const at::Tensor& x) {
  if (x.is_cpu()) return nullptr;
  const c10::impl::VirtualGuardImpl device(x.device().type());
  return device.getStreamNativeHandle(device.getStream(x.device()));
}

at::Tensor to_device(at::IntArrayRef values, at::Device device, at::ScalarType dtype) {
  at::Tensor host = at::empty({static_cast<int64_t>(values.size())}, at::TensorOptions(dtype).pinned_memory(device.is_cuda()));
  if (dtype == at::kInt) std::copy(values.begin(), values.end(), host.data_ptr<int32_t>());
  else std::copy(values.begin(), values.end(), host.data_ptr<int64_t>());
  return device.is_cpu() ? host : host.to(device, /*non_blocking=*/device.is_cuda());
}

}  // namespace trireme
