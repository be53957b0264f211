// device_kernels_test: the tests of the emulated kernels once more, whose kernels are now those of the first CUDA device. Launches block,
// so that a fault is the fault of the call that threw it.
#include <cuda_runtime.h>

#include <array>
#include <cstdlib>
#include <cstring>

#include "emulated.h"

namespace trireme::kernels {

const Kernels& emulated_kernels() { return cuda_kernels(); }
namespace emulated {
void set_seed(uint64_t) {}  // a device has its own order
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

// emulated_matmul_test looks at the wrapper, over a library of its own; this is the real one, which sums in fp32.
TEST(Device, MultipliesMatrices) {
  for (Type type : {Type::kFloat32, Type::kBFloat16, Type::kFloat16})
    for (const auto& [m, n, k] : std::vector<std::array<int64_t, 3>>{{1, 1, 1}, {33, 16, 7}, {64, 264, 136}, {200, 48, 1000}})
      for (int variant = 0; variant < 8; ++variant) {
        const bool transpose_a = variant & 1, transpose_b = variant & 2, adds = variant & 4;
        SCOPED_TRACE(testing::Message() << name_of(type) << " " << m << " x " << n << " x " << k << ", variant " << variant);
        const Values a = random_values(type, m * k, 1), b = random_values(type, k * n, 2), before = random_values(type, m * n, 3), bias = random_values(type, n, 4);
        Tensor at(type, a), bt(type, b), dt(type, before), bias_t(type, bias);
        Guarded workspace(1 << 20);
        void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.as()) + 255) / 256 * 256);
        emulated_kernels().matmul({type, type, type, m, n, k, transpose_a, transpose_b, at.data(), bt.data(), transpose_a ? m : k, transpose_b ? k : n, dt.data(), n,
                                   adds ? bias_t.data() : nullptr, 1, adds ? 1.0f : 0.0f, false, nullptr, nullptr, aligned, (1 << 20) - 256}, nullptr);
        Values expected = reference::matmul(m, n, k, a, transpose_a, b, transpose_b);
        if (adds)
          for (size_t i = 0; i < expected.size(); ++i) expected[i] += before[i] + bias[i % static_cast<size_t>(n)];
        // Terms are below 30; a sum of k of them is wrong by at most k roundings of as many, by far.
        EXPECT_TRUE(near(dt.values(), expected, unit(type), static_cast<double>(k) * 30 * 0x1p-24 + smallest_unit(type)));
      }
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
