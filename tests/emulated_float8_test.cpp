// Conversion to eight bits, and products of what it gives, emulated.
#include "emulated.h"

#include "kernels/cublaslt.h"

namespace trireme::kernels {
namespace {

using namespace test;

const std::vector<Type> kTypes = {Type::kFloat32, Type::kBFloat16, Type::kFloat16};

template <typename F>
std::string refusal(const F& call) {
  try {
    call();
  } catch (const Refused& error) {
    return error.what();
  }
  return "";
}

struct Float8 {
  Float8(Type type, Type from, const Values& values)
      : x(from, values), y(static_cast<int64_t>(values.size())), scale(Type::kFloat32, 1), workspace(kFloat8Partials * 4), to(type) {
    emulated_kernels().to_float8({from, to, x.size, x.data(), y.as(), scale.memory.as<float>(), workspace.as<float>()}, nullptr);
  }
  Values values() const {
    Values out;
    for (int64_t i = 0; i < x.size; ++i)
      out.push_back(to == Type::kFloat8E4M3 ? emulated::arch::to_float(y.as<emulated::arch::e4m3>()[i]) : emulated::arch::to_float(y.as<emulated::arch::e5m2>()[i]));
    return out;
  }
  double by() const { return *scale.memory.as<float>(); }
  Tensor x;
  Guarded y;
  Tensor scale;
  Guarded workspace;
  Type to;
};
const std::vector<Type> kFloat8Types = {Type::kFloat8E4M3, Type::kFloat8E5M2};

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
  for (const auto& [count, first] : std::vector<std::pair<int64_t, int64_t>>{{5000, 0}, {5000, 1}, {kFloat8Partials * 256 + 300, 3}}) {
    Values in(static_cast<size_t>(count), 0.5);
    in.back() = -7;
    Tensor x(Type::kFloat16, in), scale(Type::kFloat32, 1);
    Guarded y(count), workspace(kFloat8Partials * 4);
    emulated_kernels().to_float8({Type::kFloat16, Type::kFloat8E4M3, count - first, x.memory.as<uint16_t>() + first, y.as<char>() + first, scale.memory.as<float>(), workspace.as<float>()}, nullptr);
    EXPECT_EQ(*scale.memory.as<float>(), 7.0f / 448);
    int64_t wrong = 0;
    for (int64_t i = 0; i < count; ++i) wrong += emulated::arch::to_float(y.as<emulated::arch::e4m3>()[i]) != (i == count - 1 ? -448 : 32) && i >= first;
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

TEST(Float8Kernel, Products) {
  const int64_t m = 5, n = 32, k = 48;
  const Values a = random_values(Type::kBFloat16, m * k, 1), b = random_values(Type::kBFloat16, n * k, 2, 0.02);
  for (Type a_type : kFloat8Types)
    for (Type d_type : kTypes)
      for (bool with_bias : {false, true}) {
        if (with_bias && d_type == Type::kFloat32) continue;
        const Float8 x(a_type, Type::kBFloat16, a), w(Type::kFloat8E4M3, Type::kBFloat16, b);
        const Values bias_values = random_values(d_type, n, 3), before = random_values(d_type, m * n, 4);
        Tensor bias(d_type, bias_values), d(d_type, before);
        MatMul p{a_type, Type::kFloat8E4M3, d_type, m, n, k, false, true, x.y.as(), w.y.as(), k, k, d.data(), n, with_bias ? bias.data() : nullptr, 2, 1, false,
                 x.scale.memory.as<float>(), w.scale.memory.as<float>(), nullptr, 0};
        emulated_kernels().matmul(p, nullptr);
        Values expected = reference::matmul(m, n, k, x.values(), false, w.values(), true);
        for (size_t i = 0; i < expected.size(); ++i) expected[i] = 2 * x.by() * w.by() * expected[i] + before[i] + (with_bias ? bias_values[i % static_cast<size_t>(n)] : 0);
        EXPECT_TRUE(near(d.values(), expected, unit(d_type), 0x1p-30));
        // Within what eight bits say: three digits behind the point of a, or two, and three of b.
        Values exact = reference::matmul(m, n, k, a, false, b, true), got = d.values();
        double error = 0, square = 0;
        for (size_t i = 0; i < exact.size(); ++i) {
          const double rest = (got[i] - before[i] - (with_bias ? bias_values[i % static_cast<size_t>(n)] : 0)) / 2;
          error += (rest - exact[i]) * (rest - exact[i]), square += exact[i] * exact[i];
        }
        EXPECT_LT(std::sqrt(error / square), a_type == Type::kFloat8E4M3 ? 0x1p-4 : 0x1p-3);
        auto refused = [&](const std::function<void(MatMul&)>& change) {
          MatMul q = p;
          change(q);
          const std::string said = refusal([&] { emulated_kernels().matmul(q, nullptr); });
          return said.substr(said.find(": ") + 2);
        };
        EXPECT_EQ(refused([](MatMul& q) { q.b_type = Type::kFloat8E5M2, q.a_type = Type::kFloat8E5M2; }), "float8 goes with float8, one of them e4m3");
        EXPECT_EQ(refused([](MatMul& q) { q.b_type = Type::kBFloat16; }), "float8 goes with float8, one of them e4m3");
        EXPECT_EQ(refused([](MatMul& q) { q.d_type = Type::kFloat8E4M3; }), "its result is not float8");
        EXPECT_EQ(refused([](MatMul& q) { q.a_scale = nullptr; }), "float8 needs both scales");
        EXPECT_EQ(refused([](MatMul& q) { q.transpose_b = false; }), "of float8 a is not transposed and b is");
        EXPECT_EQ(refused([](MatMul& q) { q.k = 40; }), "sizes and strides of float8, but the rows of a, are multiples of 16");
        EXPECT_EQ(refused([](MatMul& q) { q.a = static_cast<const char*>(q.a) + 8; }), "float8 stands at multiples of 16 bytes");
        if (d_type == Type::kFloat32) {
          EXPECT_EQ(refused([&](MatMul& q) { q.bias = bias.data(); }), "float8 with a float32 result takes no bias");
        }
        set_emulated_capability(8, 0);
        p.n = 16;  // not asked for yet
        EXPECT_NE(refused([&](MatMul& q) { q.m = d_type == Type::kFloat32 ? 1 : d_type == Type::kFloat16 ? 2 : 3, q.m += with_bias ? 0 : 1; })
                      .find("does not have it on this device (not supported); float8 needs a card of compute capability 8.9 or later"),
                  std::string::npos);
        set_emulated_capability(9, 0);
      }
}

}  // namespace
}  // namespace trireme::kernels
