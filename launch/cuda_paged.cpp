// Managed memory (Unified Memory, CUDA Programming Guide), whose pages the driver moves between host and device: a page that is touched
// where it is not comes by a fault, and what has been on a full device longest leaves it, for memory that is not managed too.
#include "base/tensor.h"

#include "launch/cuda_paged.h"

#ifdef TRIREME_CUDA
#include <cuda_runtime.h>
#endif

#include "base/check.h"
#include "ops/paged_memory.h"

namespace trireme {

#ifdef TRIREME_CUDA
namespace {

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess)
    throw SystemError(str(call, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), "), of the optimizer's paged state; optim.paged=false does without"));
}

cudaMemLocation location_of(at::Device device) {
  cudaMemLocation location{};
  location.type = cudaMemLocationTypeDevice;
  location.id = device.index();
  return location;
}

void* allocate(size_t num_bytes, at::Device device) {
  int moves_pages = 0;
  check(cudaDeviceGetAttribute(&moves_pages, cudaDevAttrConcurrentManagedAccess, device.index()), "cudaDeviceGetAttribute");
  if (!moves_pages)
    throw ConfigError(str("optim.paged=true: the driver of CUDA device ", static_cast<int>(device.index()), " moves no pages while kernels run, as it does on Linux from compute capability 6.0 on: set optim.offload=true, "
                          "or leave both out"));
  void* data = nullptr;
  check(cudaMallocManaged(&data, num_bytes, cudaMemAttachGlobal), "cudaMallocManaged");
  // At home on the device: pages go there when they are touched, and leave it where others need the room alone.
  check(cudaMemAdvise(data, num_bytes, cudaMemAdviseSetPreferredLocation, location_of(device)), "cudaMemAdvise");
  return data;
}

void free_managed(void* data) { cudaFree(data); }  // at the program's end CUDA may have gone before

void prefetch(const void* data, size_t num_bytes, at::Device device, kernels::Stream stream) {
  check(cudaMemPrefetchAsync(data, num_bytes, location_of(device), 0, static_cast<cudaStream_t>(stream)), "cudaMemPrefetchAsync");
}

}  // namespace

void offer_cuda_paged_memory() { set_paged_memory(at::kCUDA, {allocate, free_managed, prefetch}); }
#else
void offer_cuda_paged_memory() {}
#endif

}  // namespace trireme
