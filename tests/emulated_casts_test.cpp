// Conversions, transposes and sums over rows, emulated.
#include "emulated.h"

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

Values part_of(const Values& x, size_t first) { return {x.begin() + static_cast<int64_t>(first), x.end()}; }

TEST(ConvertKernels, RoundToTheNearest) {
  for (Type from : kTypes)
    for (Type to : kTypes)
      for (const auto& [count, first] : std::vector<std::pair<int64_t, int64_t>>{{1, 0}, {15, 0}, {16, 0}, {17, 0}, {127, 0}, {128, 1}, {129, 0}, {4100, 0}}) {
        SCOPED_TRACE(testing::Message() << name_of(from) << " to " << name_of(to) << ", " << count << " from " << first);
        Values in = random_values(from, count + first, 1, 3);
        for (double& x : in) x = reference::round_to(from, x * std::pow(2.0, (&x - &in[0]) % 40 - 30));  // with those that float16 has few digits for
        in.back() = reference::round_to(from, 1e6);  // beyond float16
        Tensor x(from, in), y(to, count);
        Convert p{from, to, count, x.memory.as<char>() + first * size_of(from), y.data(), 1, false, nullptr};
        emulated_kernels().convert(p, nullptr);
        EXPECT_EQ(y.values(), reference::round_to(to, part_of(in, static_cast<size_t>(first))));

        const Values before = random_values(to, count, 2);
        Tensor sum(to, before);
        p.y = sum.data(), p.scale = 0.3f, p.add = true;
        emulated_kernels().convert(p, nullptr);
        Values expected = part_of(in, static_cast<size_t>(first));
        for (size_t i = 0; i < expected.size(); ++i) expected[i] = before[i] + double{0.3f} * expected[i];
        Values actual = sum.values();
        if (from == Type::kFloat16 || to == Type::kFloat16) {
          EXPECT_EQ(actual.back(), INFINITY);
          actual.pop_back(), expected.pop_back();
        }
        EXPECT_TRUE(near(actual, expected, unit(to) + 0x1p-23, 8 * 0x1p-24));  // product and sum, of which the terms may cancel
      }
}

TEST(ConvertKernels, ScaleInPlace) {
  Tensor x(Type::kBFloat16, {1, -2, 3, 0.5, NAN, INFINITY, 0, 7, 9});
  emulated_kernels().convert({Type::kBFloat16, Type::kBFloat16, 9, x.data(), x.data(), 0.5f, false, nullptr}, nullptr);
  const Values y = x.values();
  EXPECT_TRUE(std::isnan(y[4]));
  EXPECT_EQ(Values(y.begin(), y.begin() + 4), (Values{0.5, -1, 1.5, 0.25}));
  EXPECT_EQ(part_of(y, 5), (Values{INFINITY, 0, 3.5, 4.5}));
  EXPECT_EQ(refusal([&] { emulated_kernels().convert({Type::kBFloat16, Type::kFloat16, 9, x.data(), x.data(), 1, false, nullptr}, nullptr); }),
            "convert in place: the types must be the same");
}

TEST(ConvertKernels, ScaleByAFactorOfTheDevice) {
  for (const auto& [scale, factor] : std::vector<std::pair<float, float>>{{0.5f, 4}, {1, 1}, {1, NAN}}) {
    Tensor x(Type::kFloat32, {1, -2, 3, 0.5, 7}), y(Type::kBFloat16, {1, 1, 1, 1, 1});
    emulated_kernels().convert({Type::kFloat32, Type::kBFloat16, 5, x.data(), y.data(), scale, true, &factor}, nullptr);
    emulated_kernels().convert({Type::kFloat32, Type::kFloat32, 5, x.data(), x.data(), scale, false, &factor}, nullptr);
    const double product = double{scale} * double{factor};
    if (std::isnan(product)) {
      EXPECT_TRUE(std::isnan(x.values()[4]) && std::isnan(y.values()[4]));
      continue;
    }
    EXPECT_EQ(x.values(), (Values{product, -2 * product, 3 * product, product / 2, 7 * product}));
    EXPECT_EQ(y.values(), (Values{1 + product, 1 - 2 * product, 1 + 3 * product, 1 + product / 2, 1 + 7 * product}));
  }
}

TEST(TransposeKernels, MoveEachValue) {
  for (Type type : kTypes)
    for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {15, 17}, {16, 16}, {127, 129}, {64, 128}, {65, 72}, {1, 300}, {136, 8}, {129, 64}})
      for (const auto& [batches, first] : std::vector<std::pair<int64_t, int64_t>>{{1, 0}, {3, 0}, {2, 1}}) {
        SCOPED_TRACE(testing::Message() << name_of(type) << " " << batches << " x " << rows << " x " << columns << " from " << first);
        const int64_t size = batches * rows * columns + first;
        const Values in = random_values(type, size, 1);
        Tensor x(type, in), y(type, size);
        emulated_kernels().transpose({type, batches, rows, columns, x.memory.as<char>() + first * size_of(type), y.memory.as<char>() + first * size_of(type)}, nullptr);
        Values expected;
        for (int64_t b = 0; b < batches; ++b)
          for (int64_t c = 0; c < columns; ++c)
            for (int64_t r = 0; r < rows; ++r) expected.push_back(in[static_cast<size_t>(first + (b * rows + r) * columns + c)]);
        EXPECT_EQ(part_of(y.values(), static_cast<size_t>(first)), expected);
      }
  Tensor x(Type::kFloat32, 4);
  EXPECT_EQ(refusal([&] { emulated_kernels().transpose({Type::kFloat32, 1, 2, 2, x.data(), x.data()}, nullptr); }), "transpose of 1 x 2 x 2 values: never in place");
  EXPECT_EQ(refusal([&] { emulated_kernels().transpose({Type::kFloat32, 0, 2, 2, nullptr, nullptr}, nullptr); }), "");
}

TEST(SumKernels, AreTheLoops) {
  for (Type type : kTypes)
    for (const auto& [rows, width] : std::vector<std::pair<int64_t, int64_t>>{{0, 9}, {1, 1}, {15, 17}, {16, 16}, {127, 129}, {128, 128}, {129, 264}, {1000, 7}, {9000, 8}})
      for (int64_t first : {0, 1}) {
        if (first == 1 && rows > 200) continue;
        SCOPED_TRACE(testing::Message() << name_of(type) << " " << rows << " x " << width << " from " << first);
        const Values in = random_values(type, rows * width + first, 1);
        Tensor x(type, in), sum(Type::kFloat32, width), again(Type::kFloat32, width);
        Guarded workspace(sum_rows_workspace(rows, width) * 4);
        SumRows p{type, rows, width, x.memory.as<char>() + first * size_of(type), sum.memory.as<float>(), workspace.as<float>()};
        emulated_kernels().sum_rows(p, nullptr);
        Values expected(static_cast<size_t>(width));
        for (size_t i = 0; i < in.size() - static_cast<size_t>(first); ++i) expected[i % static_cast<size_t>(width)] += in[i + static_cast<size_t>(first)];
        // Each addition rounds a sum that is of the size of a few values.
        EXPECT_TRUE(near(sum.values(), expected, 0x1p-23, 2 * 0x1p-24 * static_cast<double>(rows)));
        p.sum = again.memory.as<float>();  // in another order of threads
        emulated_kernels().sum_rows(p, nullptr);
        EXPECT_EQ(again.memory.bits(), sum.memory.bits());
      }
}

}  // namespace
}  // namespace trireme::kernels
