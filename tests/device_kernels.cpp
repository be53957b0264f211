// device_kernels_test: the tests of the emulated kernels once more, whose kernels are now those of the first CUDA device. Launches block,
// so that a fault is the fault of the call that threw it.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

#include "emulated.h"
#include "kernels/architecture.h"

namespace trireme::kernels {

const Kernels& emulated_kernels() { return cuda_kernels(); }
namespace emulated {
void set_seed(uint64_t) {}  // a device has its own order
void set_architecture(int architecture) { cuda::set_architecture(architecture); }
}  // namespace emulated

namespace test {
namespace {

constexpr size_t kGuard = 240;  // of 256, which allocations are multiples of
constexpr int kPattern = 0xa5;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
bool untouched(const char* guard, size_t size) {
  for (size_t i = 0; i < size; ++i)
    if (guard[i] != static_cast<char>(kPattern)) return false;
  return true;
}

}  // namespace

Guarded::Guarded(int64_t num_bytes) : num_bytes_(static_cast<size_t>(num_bytes)), behind_(std::getenv("TRIREME_NO_GUARDS") ? 0 : kGuard) {
  void* memory = nullptr;
  check(cudaMallocManaged(&memory, kGuard + num_bytes_ + behind_));
  data_ = static_cast<char*>(memory) + kGuard;
  std::memset(data_ - kGuard, kPattern, kGuard);
  std::memset(data_, 0xff, num_bytes_);
  std::memset(data_ + num_bytes_, kPattern, behind_);
}
Guarded::~Guarded() {
  if (cudaDeviceSynchronize() != cudaSuccess) return;  // the memory is gone with the device's context
  EXPECT_TRUE(untouched(data_ - kGuard, kGuard)) << "a kernel wrote before a buffer of " << num_bytes_ << " bytes";
  EXPECT_TRUE(untouched(data_ + num_bytes_, behind_)) << "a kernel wrote behind a buffer of " << num_bytes_ << " bytes";
  cudaFree(data_ - kGuard);
}
void Guarded::settle() const { check(cudaDeviceSynchronize()); }

namespace {

TEST(Device, RunsTheTests) {
  if (num_devices() == 0) GTEST_SKIP() << "no CUDA device: the kernels are tested in the emulation alone";
  EXPECT_EQ(probe_device(0).failure, "");
  Guarded memory(100);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.as()) % 32, 16u);
}

}  // namespace
}  // namespace test
}  // namespace trireme::kernels

int main(int argc, char** argv) {
  setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
  testing::InitGoogleTest(&argc, argv);
  if (trireme::kernels::num_devices() == 0) testing::GTEST_FLAG(filter) = "Device.*";
  return RUN_ALL_TESTS();
}
