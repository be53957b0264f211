// The comparer must be able to fail.
#include "support.h"

namespace trireme::test {
namespace {

TEST(Near, AcceptsEqualAndClose) {
  at::Tensor x = at::randn({3, 5});
  EXPECT_TRUE(near(x, x));
  EXPECT_TRUE(near(x * (1 + 1e-6), x));
  EXPECT_TRUE(near(x.to(at::kBFloat16), x));
}

TEST(Near, RejectsOneWrongElement) {
  at::Tensor x = at::randn({3, 5}), y = x.clone();
  y[2][4] += 1e-3;
  EXPECT_FALSE(near(y, x));
  EXPECT_NE(std::string(near(y, x).message()).find("flat index 14"), std::string::npos);
  for (auto dtype : {at::kDouble, at::kBFloat16, at::kHalf}) {
    at::Tensor wrong = x.to(dtype).clone();
    wrong[0][0] += 0.1;
    EXPECT_FALSE(near(wrong, x.to(dtype))) << dtype;
  }
}

TEST(Near, RejectsNanInfinityShapeAndUndefined) {
  at::Tensor x = at::ones({4}), bad = x.clone();
  bad[1] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_FALSE(near(bad, x));
  EXPECT_FALSE(near(x, bad));
  EXPECT_FALSE(near(bad, bad));
  bad[1] = std::numeric_limits<double>::infinity();
  EXPECT_FALSE(near(bad, x));
  EXPECT_FALSE(near(x, bad));
  EXPECT_TRUE(near(bad, bad));
  EXPECT_FALSE(near(x, at::ones({2, 2})));
  EXPECT_FALSE(near(x, at::ones({1})));
  EXPECT_FALSE(near(at::Tensor(), x));
}

TEST(Near, IntegersAreEqualOrWrong) {
  at::Tensor x = at::arange(4);
  EXPECT_TRUE(near(x, x));
  EXPECT_FALSE(near(x + 1, x));
}

TEST(SameBits, RejectsTheLastBit) {
  at::Tensor x = at::ones({4}), y = x.clone();
  EXPECT_TRUE(same_bits(y, x));
  y[3] = 1.0f + 0x1p-23f;
  EXPECT_FALSE(same_bits(y, x));
  EXPECT_FALSE(same_bits(at::zeros({1}), -at::zeros({1})));
  EXPECT_FALSE(same_bits(x, x.to(at::kDouble)));
  EXPECT_FALSE(same_bits(x, at::ones({2, 2})));
}

}  // namespace
}  // namespace trireme::test
