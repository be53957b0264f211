// Matrix products against plain loops: by cuBLASLt, or the emulated one.
#include "emulated_product.h"

namespace trireme::kernels {
namespace {

using namespace test;

// What sums of so many products of ordinary numbers may be off by: each addition rounds what is no larger than all of them.
double sums_in_fp32(int64_t k) { return 0x1p-24 * static_cast<double>((k + 3) * (k + 3)); }

TEST(ProductKernel, IsTheLoops) {
  for (Type type : kTypes)
    for (Type d_type : {type, Type::kFloat32})
      for (const auto& [m, n, k] : std::vector<std::array<int64_t, 3>>{{1, 1, 1}, {1, 17, 3}, {15, 1, 16}, {33, 16, 7}, {16, 48, 129}})
        for (int variant = 0; variant < 24; ++variant) {
          const bool transpose_a = variant & 1, transpose_b = variant & 2, with_bias = variant & 4;
          const float beta = variant / 8 == 0 ? 0 : variant / 8 == 1 ? 1 : -0.5f;
          SCOPED_TRACE(testing::Message() << name_of(type) << " to " << name_of(d_type) << " " << m << " x " << n << " x " << k << ", variant " << variant);
          const Values before = random_values(d_type, m * n, 3), bias_values = random_values(d_type, n, 4);
          for (int64_t gap : {0, 5}) {
            Product product(type, d_type, m, n, k, transpose_a, transpose_b, gap, beta == 0 ? Values() : before);
            Tensor bias(d_type, bias_values);
            product.p.alpha = 0.75f, product.p.beta = beta, product.p.bias = with_bias ? bias.data() : nullptr;
            run(product.p);
            Values expected = product.expected();
            for (size_t i = 0; i < expected.size(); ++i)
              expected[i] = 0.75 * expected[i] + (beta == 0 ? 0 : beta * before[i]) + (with_bias ? bias_values[i % static_cast<size_t>(n)] : 0);
            bool gaps_are_nan = true;
            EXPECT_TRUE(near(product.d.values(&gaps_are_nan), expected, unit(d_type), sums_in_fp32(k)));
            EXPECT_TRUE(gaps_are_nan);
          }
        }
}

TEST(ProductKernel, NothingOfNothing) {
  MatMul p{};
  p.k = 1, p.n = 3, p.a_stride = p.b_stride = p.d_stride = 3;
  run(p);
  p.m = 3, p.n = 0;
  run(p);
}

TEST(ProductKernel, RefusesInWords) {
  Product product(Type::kBFloat16, Type::kBFloat16, 4, 6, 8, false, true, 0);
  auto refused = [&](const std::function<void(MatMul&)>& change) {
    MatMul p = product.p;
    change(p);
    const std::string said = refusal([&] { run(p); });
    return said.substr(said.find(": ") + 2);
  };
  EXPECT_EQ(refusal([&] { MatMul p = product.p; p.k = 0; run(p); }),
            "matmul of bfloat16 [4, 0] by 8 and bfloat16 [0, 6] transposed, by 8 to bfloat16 [4, 6] by 6: each size is below 2^31, and what is summed over is not empty");
  EXPECT_EQ(refused([](MatMul& p) { p.m = -1; }), "each size is below 2^31, and what is summed over is not empty");
  EXPECT_EQ(refused([](MatMul& p) { p.n = int64_t{1} << 31; }), "each size is below 2^31, and what is summed over is not empty");
  for (auto change : std::vector<std::function<void(MatMul&)>>{[](MatMul& p) { p.a_stride = 7; }, [](MatMul& p) { p.b_stride = 7; }, [](MatMul& p) { p.d_stride = 5; }})
    EXPECT_EQ(refused(change), "a stride is less than its row");
  for (auto change : std::vector<std::function<void(MatMul&)>>{[](MatMul& p) { p.b_type = Type::kFloat16; }, [](MatMul& p) { p.d_type = Type::kFloat16; }})
    EXPECT_EQ(refused(change), "a and b are of one type, the result of theirs or float32");
  for (auto change : std::vector<std::function<void(MatMul&)>>{[](MatMul& p) { p.a = static_cast<const char*>(p.a) + 1; }, [](MatMul& p) { p.b = static_cast<const char*>(p.b) + 1; },
                                                               [](MatMul& p) { p.d = static_cast<char*>(p.d) + 1; }, [](MatMul& p) { p.bias = static_cast<char*>(p.d) + 1; }})
    EXPECT_EQ(refused(change), "an address is no multiple of its elements' size");
  EXPECT_EQ(refused([](MatMul& p) { p.workspace = static_cast<char*>(p.d) + 16, p.workspace_bytes = 1; }), "the workspace stands at a multiple of 256 bytes");
  const float scale = 1;
  EXPECT_EQ(refused([&](MatMul& p) { p.a_scale = &scale; }), "only float8 has scales");
}

}  // namespace
}  // namespace trireme::kernels
