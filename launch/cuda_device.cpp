#include "base/tensor.h"

#include "launch/cuda_device.h"

#include <ATen/Context.h>
#include <dlfcn.h>

#include "base/check.h"
#include "kernels/devices.h"
#include "launch/cuda_graph.h"
#include "launch/cuda_paged.h"
#include "train/device.h"
#include "train/device_choice.h"

namespace trireme {

#ifdef TRIREME_CUDA
namespace {

DeviceKind::Found find_devices() {
  DeviceKind::Found found;
  for (int i = 0; i < kernels::num_devices(); ++i) found.uuids.push_back(kernels::device_uuid(i));
  found.problem = missing_devices_text(static_cast<int>(found.uuids.size()), kernels::versions(), kernels::counting_failure());
  return found;
}

// The program is linked to the half of libtorch that needs no device; here the other half comes.
void load_device(int index) {
  const kernels::DeviceReport report = kernels::probe_device(index);
  check_device_report(index, report, kernels::shared_bytes_per_block(index), kernels::kSharedBytesPerBlock);
  if (!::dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL))
    throw ConfigError(str("run.device: CUDA device ", index, " (", report.name, ") wants the CUDA half of libtorch: ", ::dlerror(), ". Install a torch package with CUDA (launch/setup.sh), or set run.device=cpu"));
  at::globalContext().lazyInitDevice(c10::kCUDA);
}

int capability_of(int index) {
  const kernels::DeviceReport report = kernels::probe_device(index);
  return 10 * report.compute_major + report.compute_minor;
}

}  // namespace

void offer_cuda() {
  offer_cuda_graphs();
  offer_cuda_paged_memory();
  set_device_kind({.type = at::kCUDA, .name = "cuda", .find = find_devices, .load = load_device, .capability = capability_of, .kernels = &kernels::cuda_kernels()});
}
#else
void offer_cuda() {}
#endif

}  // namespace trireme
