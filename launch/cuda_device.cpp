#include "base/tensor.h"

#include "launch/cuda_device.h"

#include <ATen/Context.h>
#include <dlfcn.h>

#include "base/check.h"
#include "launch/cuda_graph.h"
#include "train/device.h"

namespace trireme {

#ifdef TRIREME_CUDA
namespace {

constexpr int kOldest = 8;  // compute capability: A100

std::string number(int version) { return str(version / 1000, ".", version % 1000 / 10); }

DeviceKind::Found find_devices() {
  const int count = kernels::num_devices();
  const kernels::Versions v = kernels::versions();
  if (count == 0 && v.driver > 0 && v.driver / 1000 < v.runtime / 1000)
    return {0, str("the driver is for CUDA ", number(v.driver), " at most, this build is of CUDA ", number(v.runtime), ": update the driver")};
  return {count, ""};
}

// The program is linked to the half of libtorch that needs no device; here the other half comes.
void load_device(int index) {
  const kernels::DeviceReport report = kernels::probe_device(index);
  const std::string device = str("run.device: CUDA device ", index, report.name.empty() ? "" : " (" + report.name + ")");
  if (report.compute_major > 0 && report.compute_major < kOldest)
    throw ConfigError(str(device, " has compute capability ", report.compute_major, ".", report.compute_minor, ", the kernels need ", kOldest,
                          ".0 (A100) or newer: take another with CUDA_VISIBLE_DEVICES, or set run.device=cpu"));
  if (!report.failure.empty())
    throw ConfigError(str(device, " cannot be used: ", report.failure, ". Look at nvidia-smi, take another with CUDA_VISIBLE_DEVICES, or set run.device=cpu"));
  if (!::dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL))
    throw ConfigError(str(device, " wants the CUDA half of libtorch: ", ::dlerror(), ". Install a torch package with CUDA (launch/setup.sh), or set run.device=cpu"));
  at::globalContext().lazyInitDevice(c10::kCUDA);
}

}  // namespace

void offer_cuda() {
  offer_cuda_graphs();
  set_device_kind({.type = at::kCUDA, .name = "cuda", .find = find_devices, .load = load_device, .kernels = &kernels::cuda_kernels()});
}
#else
void offer_cuda() {}
#endif

}  // namespace trireme
