// Does this build run on this device? See kernels.h and devices.h.
#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "kernels/devices.h"
#include "kernels/kernels.h"

namespace trireme::kernels {
namespace {

constexpr uint32_t kNumValues = 1 << 16;

__host__ __device__ uint32_t expected(uint32_t i) { return (i ^ (i >> 3)) * 2654435761u; }

__global__ void fill(uint32_t* out_N, uint32_t n) {
  uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out_N[i] = expected(i);
}

struct Buffer {
  uint32_t* data = nullptr;
  ~Buffer() { cudaFree(data); }
};

std::string run(int index, DeviceReport& report) {
  cudaDeviceProp facts;
  auto failed = [](const char* call, cudaError_t error) { return std::string(call) + ": " + cudaGetErrorString(error); };
  if (auto e = cudaSetDevice(index)) return failed("cudaSetDevice", e);
  if (auto e = cudaGetDeviceProperties(&facts, index)) return failed("cudaGetDeviceProperties", e);
  report.name = facts.name;
  report.compute_major = facts.major;
  report.compute_minor = facts.minor;
  report.num_multiprocessors = facts.multiProcessorCount;
  if (auto e = cudaMemGetInfo(&report.free_bytes, &report.total_bytes)) return failed("cudaMemGetInfo", e);
  Buffer buffer;
  if (auto e = cudaMalloc(&buffer.data, kNumValues * sizeof(uint32_t))) return failed("cudaMalloc", e);
  fill<<<kNumValues / 256, 256>>>(buffer.data, kNumValues);
  if (auto e = cudaGetLastError()) return failed("kernel launch", e);
  std::vector<uint32_t> values(kNumValues);
  if (auto e = cudaMemcpy(values.data(), buffer.data, kNumValues * sizeof(uint32_t), cudaMemcpyDeviceToHost))
    return failed("cudaMemcpy", e);
  for (uint32_t i = 0; i < kNumValues; ++i)
    if (values[i] != expected(i)) return "the kernel gave wrong numbers at " + std::to_string(i);
  return "";
}

}  // namespace

int num_devices() {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

Versions versions() {
  Versions v;
  if (cudaDriverGetVersion(&v.driver) != cudaSuccess) v.driver = 0;
  if (cudaRuntimeGetVersion(&v.runtime) != cudaSuccess) v.runtime = 0;
  return v;
}

DeviceReport probe_device(int index) {
  DeviceReport report;
  report.failure = run(index, report);
  return report;
}

std::string counting_failure() {
  int n = 0;
  const cudaError_t e = cudaGetDeviceCount(&n);
  return e == cudaSuccess || e == cudaErrorNoDevice || e == cudaErrorInsufficientDriver ? "" : cudaGetErrorString(e);
}

std::string device_uuid(int index) {
  cudaDeviceProp facts;
  if (cudaGetDeviceProperties(&facts, index) != cudaSuccess) return "";
  return {facts.uuid.bytes, sizeof facts.uuid.bytes};
}

size_t shared_bytes_per_block(int index) {
  int bytes = 0;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) == cudaSuccess ? static_cast<size_t>(bytes) : 0;
}

}  // namespace trireme::kernels
