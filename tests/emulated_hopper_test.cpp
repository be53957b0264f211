// The emulation of sm_90a: matrix products are right over it, and a part that is left out or wrong is noticed.
#include "emulated.h"
#include "hopper_gemm.h"

#include <iterator>
#include <utility>

namespace trireme::kernels {
namespace {

using namespace test;
using emulated::Without;
using emulated::arch::bf16;
using emulated::arch::fp16;

template <typename T, size_t kForm, Without kWithout, typename... More>
void multiply(T* a, T* b, T* c, More... more) {
#ifdef TRIREME_DEVICE_TESTS
  cuda::hopper_gemm(std::is_same_v<T, bf16>, kForm, a, b, c, more...);
#else
  emulated::hopper_gemm<T, kGemmForms[kForm], kWithout>(a, b, c, more..., nullptr);
#endif
}

struct Shape {
  int m, n, k;
};

template <typename T, size_t kForm, Without kWithout = Without::kNothing>
testing::AssertionResult product_is_right(const Shape& shape, uint64_t seed) {
  constexpr GemmForm kOf = kGemmForms[kForm];
  constexpr bool kLeftColumns = kOf.left == Left::kColumns;
  const Type type = std::is_same_v<T, bf16> ? Type::kBFloat16 : Type::kFloat16;
  const auto [m, n, k] = shape;
  const auto stride_of = [](int columns) { return (columns + 7) / 8 * 8; };
  const int stride_a = stride_of(kLeftColumns ? m : k), stride_b = stride_of(kOf.right_columns ? n : k), stride_c = stride_of(n);
  const Values a = random_values(type, (kLeftColumns ? k : m) * stride_a, 1), b = random_values(type, (kOf.right_columns ? k : n) * stride_b, 2);
  Tensor at(type, a), bt(type, b), ct(type, Values(static_cast<size_t>(m * stride_c), 5));
  Values expected(static_cast<size_t>(m * stride_c), 5);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      double& sum = expected[static_cast<size_t>(i * stride_c + j)] = 0;
      for (int e = 0; e < k; ++e)
        sum += a[static_cast<size_t>(kLeftColumns ? e * stride_a + i : i * stride_a + e)] * b[static_cast<size_t>(kOf.right_columns ? e * stride_b + j : j * stride_b + e)];
    }
  emulated::set_seed(seed);
  multiply<T, kForm, kWithout>(at.memory.as<T>(), bt.memory.as<T>(), ct.memory.as<T>(), m, n, k, stride_a, stride_b, stride_c);
  return near(ct.values(), expected, unit(type), k * 16 * 0x1p-24);  // products are below 16
}

template <size_t kForm>
void expect_right() {
  for (const Shape& shape : {Shape{64, 64, 64}, {1, 1, 1}, {65, 63, 129}, {128, 136, 320}, {17, 127, 200}}) {
    EXPECT_TRUE((product_is_right<bf16, kForm>(shape, 1))) << "form " << kForm << ", " << shape.m << " " << shape.n << " " << shape.k;
    EXPECT_TRUE((product_is_right<fp16, kForm>(shape, 2))) << "form " << kForm << ", " << shape.m << " " << shape.n << " " << shape.k;
  }
}

TEST(EmulatedHopper, MultipliesTiles) {
#ifdef TRIREME_DEVICE_TESTS
  if (probe_device(0).compute_major != 9) GTEST_SKIP() << "this device has no wgmma";
#endif
  [&]<size_t... kForms>(std::index_sequence<kForms...>) { (expect_right<kForms>(), ...); }(std::make_index_sequence<std::size(kGemmForms)>());
}

#ifndef TRIREME_DEVICE_TESTS
// What is wrong with the product where a part is left out: a Fault, or "wrong numbers"; empty: nothing, for each of five seeds.
template <Without kWithout, size_t kForm = 0>
std::string noticed() {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    try {
      if (!product_is_right<bf16, kForm, kWithout>({64, kGemmForms[kForm].tile_columns, 320}, seed)) return "wrong numbers";
    } catch (const emulated::Fault& fault) {
      return fault.what();
    }
  }
  return "";
}

constexpr size_t kBothColumns = 3, kRegistersAndColumns = 5;

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
  EXPECT_EQ(noticed<Without::kFirst>(), "wrong numbers");
  EXPECT_NE(noticed<Without::kSameProducts>().find("the warps of its group had different products"), std::string::npos);
}

TEST(EmulatedHopper, NoticesWrongFactors) {
  ASSERT_TRUE(kGemmForms[kBothColumns].left == Left::kColumns && kGemmForms[kRegistersAndColumns].left == Left::kRegisters);
  EXPECT_EQ((noticed<Without::kNext, kBothColumns>()), "wrong numbers");
  EXPECT_NE((noticed<Without::kColumns, kBothColumns>()), "");
  EXPECT_NE((noticed<Without::kKeptRegisters, kRegistersAndColumns>().find("has written registers that are a factor of a product under way")), std::string::npos);
  EXPECT_NE((noticed<Without::kWaitForProducts, kRegistersAndColumns>().find("has written registers that are a factor of a product under way")), std::string::npos);
}
#endif

}  // namespace
}  // namespace trireme::kernels
