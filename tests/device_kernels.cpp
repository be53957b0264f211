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

// `count` elements in plain memory of the device: zeros, and at the end those of a tensor.
class Many {
 public:
  Many(int64_t count, Tensor& end) : end_bytes_(end.memory.num_bytes()), before_(static_cast<size_t>((count - end.size) * size_of(end.type))) {
    check(cudaMalloc(&data_, before_ + end_bytes_));
    check(cudaMemset(data_, 0, before_));
    check(cudaMemcpy(static_cast<char*>(data_) + before_, end.data(), end_bytes_, cudaMemcpyDefault));
  }
  ~Many() { cudaFree(data_); }
  Many(const Many&) = delete;
  Many& operator=(const Many&) = delete;

  template <typename T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  // Zeros at the beginning still, and at the end these bits.
  void expect_end(const Tensor& end, const char* what) const {
    std::string first(end_bytes_, 1), last(end_bytes_, 1);
    check(cudaMemcpy(first.data(), data_, end_bytes_, cudaMemcpyDeviceToHost));
    check(cudaMemcpy(last.data(), as<char>() + before_, end_bytes_, cudaMemcpyDeviceToHost));
    EXPECT_TRUE(first == std::string(end_bytes_, 0)) << what << " wrote elsewhere";
    EXPECT_TRUE(last == end.memory.bits()) << what << " differs at the end";
  }

 private:
  size_t end_bytes_, before_;
  void* data_ = nullptr;
};

// The last elements of tensors of more than 2^31 are those of small tensors.
TEST(Device, ServesMoreThanTwoToThe31Elements) {
  if (num_devices() == 0) GTEST_SKIP() << "no CUDA device: the kernels are tested in the emulation alone";
  constexpr int64_t kCount = (int64_t{1} << 31) + 10, kRows = 3, kEnd = 75;  // three rows are so many
  static_assert(kCount % kRows == 0 && kEnd % kRows == 0);
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total));
  if (free < size_t{20} * kCount) GTEST_SKIP() << "the device has " << (free >> 30) << " GiB free, and 40 are needed";
  const Kernels& k = emulated_kernels();
  const auto random = [&](Type type, uint64_t seed) { return Tensor(type, random_values(type, kEnd, seed)); };
  {
    Tensor x = random(Type::kFloat32, 1), y(Type::kBFloat16, kEnd);
    const Many all_x(kCount, x), all_y(kCount, y);
    k.convert({Type::kFloat32, Type::kBFloat16, kEnd, x.data(), y.data(), 1, false, nullptr}, nullptr);
    k.convert({Type::kFloat32, Type::kBFloat16, kCount, all_x.as(), all_y.as(), 1, false, nullptr}, nullptr);
    all_y.expect_end(y, "convert");
  }
  {
    Tensor gate = random(Type::kBFloat16, 2), up = random(Type::kBFloat16, 3), y(Type::kBFloat16, kEnd);
    const Many all_gate(kCount, gate), all_up(kCount, up), all_y(kCount, y);
    k.glu_forward({Type::kBFloat16, Gate::kSilu, 1, kEnd, kEnd, gate.data(), up.data(), y.data()}, nullptr);
    k.glu_forward({Type::kBFloat16, Gate::kSilu, kRows, kCount / kRows, kCount / kRows, all_gate.as(), all_up.as(), all_y.as()}, nullptr);
    all_y.expect_end(y, "glu_forward");
  }
  {
    constexpr int64_t kMany = (int64_t{1} << 31) + 128, kLast = 128, kSize = 64;  // the last are blocks of their own; zeros are zeros in FP4
    Tensor x(Type::kBFloat16, random_values(Type::kBFloat16, kLast, 7)), y(Type::kBFloat16, kLast), absmax(Type::kFloat32, kLast / kSize);
    Tensor codes(Type::kFloat16, kLast / 4);  // four in 16 bits
    const Many all_x(kMany, x), all_y(kMany, y), all_absmax(kMany / kSize, absmax), all_codes(kMany / 4, codes);
    const auto scales = [](float* plain) { return ScalesOfBlocks{plain, nullptr, nullptr, nullptr, 0, nullptr, {}}; };
    k.quantize_4({Type::kBFloat16, FourBit::kFp4, kLast, kSize, x.data(), static_cast<uint8_t*>(codes.data()), static_cast<float*>(absmax.data())}, nullptr);
    k.quantize_4({Type::kBFloat16, FourBit::kFp4, kMany, kSize, all_x.as(), all_codes.as<uint8_t>(), all_absmax.as<float>()}, nullptr);
    all_codes.expect_end(codes, "quantize_4's codes");
    all_absmax.expect_end(absmax, "quantize_4's scales");
    k.dequantize_4({Type::kBFloat16, FourBit::kFp4, kLast, kSize, static_cast<uint8_t*>(codes.data()), scales(static_cast<float*>(absmax.data())), y.data()}, nullptr);
    k.dequantize_4({Type::kBFloat16, FourBit::kFp4, kMany, kSize, all_codes.as<uint8_t>(), scales(all_absmax.as<float>()), all_y.as()}, nullptr);
    all_y.expect_end(y, "dequantize_4");
  }
  Tensor master = random(Type::kFloat32, 4), weight(Type::kBFloat16, master.values()), grad = random(Type::kFloat32, 5);
  Tensor m = random(Type::kFloat32, 6), v(Type::kFloat32, Values(kEnd, 0.25));
  const Many all_master(kCount, master), all_weight(kCount, weight), all_grad(kCount, grad), all_m(kCount, m), all_v(kCount, v);
  const auto step = [&](const UpdateTensor& of) { k.update({UpdateRule::kAdamW, Type::kBFloat16, &of, 1, 1e-2, 0.01, 0.9, 0.95, 1e-8, 0.1, 0.05, nullptr, 1, 1}, nullptr); };
  step({kEnd, weight.data(), static_cast<float*>(master.data()), static_cast<float*>(grad.data()), static_cast<float*>(m.data()), static_cast<float*>(v.data()), {}, 0});
  step({kCount, all_weight.as(), all_master.as<float>(), all_grad.as<float>(), all_m.as<float>(), all_v.as<float>(), {}, 0});
  all_weight.expect_end(weight, "update's weight");
  all_master.expect_end(master, "update's master");
  all_m.expect_end(m, "update's exp_avg");
  all_v.expect_end(v, "update's exp_avg_sq");
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
