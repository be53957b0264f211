// Conversion to eight bits, emulated.
#include "emulated_product.h"

namespace trireme::kernels {
namespace {

using namespace test;

TEST(Float8Kernel, IsTheNearest) {
  for (Type to : kFloat8Types)
    for (Type from : kTypes)
      for (int64_t count : {1, 15, 16, 17, 4095, 4096, 4100}) {
        SCOPED_TRACE(testing::Message() << name_of(from) << " to " << (to == Type::kFloat8E4M3 ? "e4m3 " : "e5m2 ") << count);
        Values in = random_values(from, count, 1, 3);
        for (double& x : in) x = reference::round_to(from, x * std::pow(2.0, -(&x - &in[0]) % 20));
        const Float8 f(to, from, in);
        double largest = 0;
        for (double x : in) largest = std::max(largest, std::abs(x));
        EXPECT_NEAR(f.by(), largest / (to == Type::kFloat8E4M3 ? 448 : 57344), 0x1p-24 * f.by());
        const Values out = f.values();
        for (size_t i = 0; i < in.size(); ++i) {  // by 1 / scale and that product, each rounded in fp32, a tie may fall to the other side
          const double scaled = in[i] / f.by(), slack = 0x1p-22 * std::abs(scaled);
          EXPECT_TRUE(out[i] == reference::round_to(to, scaled) || out[i] == reference::round_to(to, scaled - slack) || out[i] == reference::round_to(to, scaled + slack)) << in[i];
        }
      }
}

// Every code is a number that comes back as itself: the scale is 1 where the largest number is in x.
TEST(Float8Kernel, EveryCodeComesBack) {
  for (Type to : kFloat8Types) {
    Values all;
    std::vector<int> codes;
    for (int code = 0; code < 256; ++code) {
      const uint8_t bits = static_cast<uint8_t>(code);
      const double x = to == Type::kFloat8E4M3 ? emulated::arch::to_float(emulated::arch::e4m3{bits}) : emulated::arch::to_float(emulated::arch::e5m2{bits});
      if (std::isfinite(x)) all.push_back(x), codes.push_back(code);
    }
    EXPECT_EQ(all.size(), to == Type::kFloat8E4M3 ? 254u : 248u);
    EXPECT_EQ(reference::round_to(to, all), all);
    const Float8 f(to, Type::kFloat32, all);
    EXPECT_EQ(f.by(), 1);
    for (size_t i = 0; i < codes.size(); ++i) EXPECT_EQ(f.y.as<uint8_t>()[i], codes[i]);
  }
}

// The largest is in the last block, which is one of more than there are partial results where values are read one by one.
TEST(Float8Kernel, TheLargestMayBeAnywhere) {
  for (Type to : kFloat8Types)
    for (Type from : kTypes)
      for (const auto& [count, first] : std::vector<std::pair<int64_t, int64_t>>{{5000, 0}, {5000, 1}, {kFloat8Partials * 256 + 300, 3}}) {
        if (count > 5000 && from != Type::kFloat16) continue;
        SCOPED_TRACE(testing::Message() << name_of(from) << " " << count << " " << first);
        Values in(static_cast<size_t>(count), 0.5);
        in.back() = -7;
        Tensor x(from, in), scale(Type::kFloat32, 1);
        Guarded y(count), workspace(kFloat8Partials * 4);
        emulated_kernels().to_float8({from, to, count - first, x.memory.as<char>() + first * size_of(from), y.as<char>() + first, scale.memory.as<float>(), workspace.as<float>()}, nullptr);
        const float largest = to == Type::kFloat8E4M3 ? 448 : 57344;
        EXPECT_EQ(*scale.memory.as<float>(), 7.0f / largest);
        int64_t wrong = 0;
        for (int64_t i = first; i < count; ++i) {
          const uint8_t code = y.as<uint8_t>()[i];
          const float got = to == Type::kFloat8E4M3 ? emulated::arch::to_float(emulated::arch::e4m3{code}) : emulated::arch::to_float(emulated::arch::e5m2{code});
          wrong += got != (i == count - 1 ? -largest : largest / 14);
        }
        EXPECT_EQ(wrong, 0);
      }
}

TEST(Float8Kernel, UnusualNumbers) {
  for (Type to : kFloat8Types) {
    EXPECT_EQ(Float8(to, Type::kFloat32, Values{0, -0.0, 0}).values(), (Values{0, 0, 0}));
    const Float8 tiny(to, Type::kFloat32, Values{0x1p-140, -0x1p-126});
    EXPECT_EQ(tiny.by(), 0x1p-126);
    EXPECT_EQ(tiny.values(), (Values{to == Type::kFloat8E4M3 ? 0.0 : 0x1p-14, -1}));
    const Float8 nan(to, Type::kBFloat16, Values{1, NAN, -2});
    EXPECT_TRUE(std::isnan(nan.values()[1]));
    EXPECT_EQ(nan.values()[2], to == Type::kFloat8E4M3 ? -448 : -57344);
    const Float8 infinite(to, Type::kFloat16, Values{1, INFINITY});
    EXPECT_EQ(infinite.by(), INFINITY);  // 0 * that is no number either
    EXPECT_EQ(infinite.values()[0], 0);
  }
  EXPECT_EQ(refusal([] { emulated_kernels().to_float8({Type::kFloat8E4M3, Type::kFloat8E4M3, 3, nullptr, nullptr, nullptr, nullptr}, nullptr); }),
            "to_float8 of 3 values: from float32, bfloat16 or float16 to float8");
}

}  // namespace
}  // namespace trireme::kernels
