// The emulation of sm_90a: a matrix product is right over it, and a part that is left out is noticed.
#include "emulated.h"
#include "hopper_gemm.h"

namespace trireme::kernels {
namespace {

using namespace test;
using emulated::Without;

template <typename T, Without kWithout>
void multiply(T* a, T* b, T* c, int m, int n, int k, int stride_k, int stride_n) {
#ifdef TRIREME_DEVICE_TESTS
  cuda::hopper_gemm(std::is_same_v<T, emulated::arch::bf16>, a, b, c, m, n, k, stride_k, stride_n);
#else
  emulated::hopper_gemm<T, kWithout>(a, b, c, m, n, k, stride_k, stride_n, nullptr);
#endif
}

struct Shape {
  int m, n, k;
};

template <typename T, Without kWithout = Without::kNothing>
testing::AssertionResult product_is_right(Type type, const Shape& shape, uint64_t seed) {
  const auto [m, n, k] = shape;
  const int stride_k = (k + 7) / 8 * 8, stride_n = (n + 7) / 8 * 8;
  const Values a = random_values(type, m * stride_k, 1), b = random_values(type, n * stride_k, 2);
  Tensor at(type, a), bt(type, b), ct(type, Values(static_cast<size_t>(m * stride_n), 5));
  Values expected(static_cast<size_t>(m * stride_n), 5);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      double& sum = expected[static_cast<size_t>(i * stride_n + j)] = 0;
      for (int e = 0; e < k; ++e) sum += a[static_cast<size_t>(i * stride_k + e)] * b[static_cast<size_t>(j * stride_k + e)];
    }
  emulated::set_seed(seed);
  multiply<T, kWithout>(at.memory.as<T>(), bt.memory.as<T>(), ct.memory.as<T>(), m, n, k, stride_k, stride_n);
  return near(ct.values(), expected, unit(type), k * 16 * 0x1p-24);  // products are below 16
}

TEST(EmulatedHopper, MultipliesTiles) {
#ifdef TRIREME_DEVICE_TESTS
  if (probe_device(0).compute_major != 9) GTEST_SKIP() << "this device has no wgmma";
#endif
  for (const Shape& shape : {Shape{64, 64, 64}, {1, 1, 1}, {65, 63, 129}, {128, 72, 320}, {17, 127, 200}})
    for (uint64_t seed : {1, 2}) {
      EXPECT_TRUE((product_is_right<emulated::arch::bf16>(Type::kBFloat16, shape, seed))) << shape.m << " " << shape.n << " " << shape.k;
      EXPECT_TRUE((product_is_right<emulated::arch::fp16>(Type::kFloat16, shape, seed))) << shape.m << " " << shape.n << " " << shape.k;
    }
}

#ifndef TRIREME_DEVICE_TESTS
// What is wrong with the product where a part is left out: a Fault, or "wrong numbers"; empty: nothing, for each of five seeds.
template <Without kWithout>
std::string noticed() {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    try {
      if (!product_is_right<emulated::arch::bf16, kWithout>(Type::kBFloat16, {64, 64, 320}, seed)) return "wrong numbers";
    } catch (const emulated::Fault& fault) {
      return fault.what();
    }
  }
  return "";
}

TEST(EmulatedHopper, NoticesWhatIsLeftOut) {
  EXPECT_EQ(noticed<Without::kNothing>(), "");
  EXPECT_NE(noticed<Without::kWaitForTiles>(), "");
  EXPECT_NE(noticed<Without::kWaitForSpace>(), "");
  EXPECT_EQ(noticed<Without::kWaitForProducts>(), "wrong numbers");
  EXPECT_NE(noticed<Without::kGroupFence>().find("multiplies without group_fence"), std::string::npos);
  EXPECT_EQ(noticed<Without::kAsyncFence>(), "wrong numbers");
  EXPECT_EQ(noticed<Without::kStoreShared>(), "wrong numbers");
  EXPECT_EQ(noticed<Without::kSwizzle>(), "wrong numbers");
  EXPECT_NE(noticed<Without::kStoreWait>().find("has ended with tile stores under way"), std::string::npos);
  EXPECT_NE(noticed<Without::kBytes>().find("waits for ever in barrier_wait"), std::string::npos);
  EXPECT_NE(noticed<Without::kInit>().find("uses a barrier that was not begun"), std::string::npos);
}
#endif

}  // namespace
}  // namespace trireme::kernels
