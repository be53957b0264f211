// Every barrier of the kernels of number formats and optimizers is needed: without it the emulation gives other bits. That of attention is
// in emulated_attention_test.cpp.
#include "emulated_omissions.h"
#include "emulated_product.h"

#ifndef TRIREME_DEVICE_TESTS
namespace trireme::kernels {
namespace {

using namespace test;

const std::vector<float>& some_map() {
  static const std::vector<float> map = [] {
    std::vector<float> numbers;
    for (int i = 0; i < 256; ++i) numbers.push_back(static_cast<float>(std::pow((i - 127) / 128.0, 3)));
    return numbers;
  }();
  return map;
}

struct Barriers : testing::Test {
  void TearDown() override { emulated::leave_out(nullptr); }
  static constexpr int64_t kCount = 2048;
  const Kernels& k = emulated_kernels();
  Tensor x{Type::kFloat32, random_values(Type::kFloat32, kCount, 1)}, y{Type::kFloat32, kCount}, scale{Type::kFloat32, random_values(Type::kFloat32, kCount / 32, 2)};
  OnDevice<float> map{some_map()};
  Guarded codes{kCount};

  void fill_codes() {
    std::mt19937_64 random(3);
    for (int64_t i = 0; i < kCount; ++i) codes.as<uint8_t>()[i] = static_cast<uint8_t>(random());
  }
};

TEST_F(Barriers, OfCodesOfAMap) {
  const auto quantized = [&] {
    k.quantize_blocks({Type::kFloat32, kCount, 64, x.data(), 0, map.data(), codes.as<uint8_t>(), scale.memory.as<float>()}, nullptr);
    return codes.bits();
  };
  EXPECT_EQ(leave_out_each("barrier", quantized), 1);
  fill_codes();
  const auto dequantized = [&] {
    k.dequantize_blocks({Type::kFloat32, kCount, 64, codes.as<uint8_t>(), scale.memory.as<float>(), map.data(), y.data()}, nullptr);
    return y.memory.bits();
  };
  EXPECT_EQ(leave_out_each("barrier", dequantized), 1);
}

TEST_F(Barriers, OfFourBits) {
  fill_codes();
  const OnDevice<float> nested(std::vector<float>{0.5f, 2, 3}), offset(0.25f);
  const OnDevice<uint8_t> scale_codes(std::vector<uint8_t>(kCount / 32, 200));
  for (const bool is_nested : {false, true}) {
    const ScalesOfBlocks scales = is_nested ? ScalesOfBlocks{nullptr, scale_codes.data(), nested.data(), map.data(), 256, offset.data(), {}}
                                            : ScalesOfBlocks{scale.memory.as<float>(), nullptr, nullptr, nullptr, 0, nullptr, {}};
    const auto dequantized = [&] {
      k.dequantize_4({Type::kFloat32, FourBit::kNf4, kCount, 32, codes.as<uint8_t>(), scales, y.data()}, nullptr);
      return y.memory.bits();
    };
    EXPECT_EQ(leave_out_each("barrier", dequantized), 1) << is_nested;
  }
}

TEST_F(Barriers, OfRowsAndGroups) {
  x.memory.as<float>()[1800] = -9, x.memory.as<float>()[2000] = 10;  // of other warps than that which writes the result
  for (const float threshold : {0.0f, 20.0f}) {
    Guarded outlier(kCount);
    const auto rows = [&] {
      const QuantizeRows call{Type::kFloat32, 1, kCount, x.data(), threshold, codes.as<int8_t>(), scale.memory.as<float>(), threshold > 0 ? outlier.as<uint8_t>() : nullptr};
      k.largest_of_rows(call, nullptr), k.quantize_rows(call, nullptr);
      return std::pair(codes.bits(), scale.memory.bits());
    };
    EXPECT_EQ(leave_out_each("barrier", rows), 1) << threshold;
  }
  Guarded zero(1), workspace(quantize_groups_workspace(kCount, kCount) * 4);
  const auto groups = [&] {
    k.quantize_groups({Type::kFloat32, {8, true}, kCount, kCount, x.data(), codes.as<uint8_t>(), scale.memory.as<float>(), zero.as<int8_t>(), workspace.as<float>()}, nullptr);
    return std::vector{codes.bits(), scale.memory.bits(), zero.bits()};
  };
  EXPECT_EQ(leave_out_each("barrier", groups), 2);  // of the least value and of the largest
}

TEST_F(Barriers, OfMomentsIn8Bits) {
  std::vector<float> both = some_map();
  for (int i = 0; i < 256; ++i) both.push_back(static_cast<float>(std::pow(i / 255.0, 4)));
  const OnDevice<float> maps(both), grad_scale(0.5f);
  const Values weights = random_values(Type::kFloat32, kCount, 4);
  Tensor weight(Type::kFloat32, kCount), m_scale(Type::kFloat32, kCount / 256), v_scale(Type::kFloat32, kCount / 256);
  Guarded squares(kCount);
  const auto updated = [&] {
    fill_codes();
    for (int64_t i = 0; i < kCount; ++i) weight.memory.as<float>()[i] = static_cast<float>(weights[static_cast<size_t>(i)]), squares.as<uint8_t>()[i] = static_cast<uint8_t>(i * 53);
    for (int64_t b = 0; b < kCount / 256; ++b) m_scale.memory.as<float>()[b] = 1, v_scale.memory.as<float>()[b] = 0.25f;
    UpdateTensor t{};
    t.size = kCount, t.grad = x.memory.as<float>(), t.weight = weight.data(), t.m = codes.as<uint8_t>(), t.v = squares.as<uint8_t>(), t.m_scale = m_scale.memory.as<float>(),
    t.v_scale = v_scale.memory.as<float>();
    k.update({UpdateRule::kAdamW8Bit, Type::kFloat32, &t, 1, 1e-3, 0.01, 0.9, 0.999, 1e-8, 0.1, 0.001, grad_scale.data(), 11, 3, maps.data()}, nullptr);
    return std::vector{weight.memory.bits(), codes.bits(), squares.bits(), m_scale.memory.bits(), v_scale.memory.bits()};
  };
  EXPECT_EQ(leave_out_each("barrier", updated), 1);
}

TEST_F(Barriers, OfTheGradientsNorm) {
  const GradientTensor t{kCount, x.data()};
  const OnDevice<double> squares(0.0);
  Guarded workspace(gradient_norm_workspace(&t, 1) * 8);
  const auto norm = [&] {
    k.gradient_norm({Type::kFloat32, &t, 1, workspace.as<double>(), squares.data(), {}}, nullptr);
    return *squares;
  };
  EXPECT_EQ(leave_out_each("barrier", norm), 1);  // one in each of its two launches, left out together
}

TEST_F(Barriers, OfAdafactor) {
  constexpr int64_t kRows = 32, kColumns = 64;
  const Values means = random_values(Type::kFloat32, kColumns, 5);
  Tensor weight(Type::kFloat32, kCount), rows(Type::kFloat32, kRows), columns(Type::kFloat32, kColumns);
  const OnDevice<double> sums(std::vector<double>(kRows + kColumns + 1, 0.0)), mean(0.0), norm(0.0);
  Adafactor p{};
  p.size = kCount, p.num_rows = kRows, p.num_columns = kColumns, p.weight = weight.data(), p.grad = x.memory.as<float>(), p.rows = rows.memory.as<float>(), p.columns = columns.memory.as<float>();
  p.sums = sums.data(), p.mean_of_rows = mean.data(), p.norm = norm.data(), p.mix = 0.3, p.lr = p.largest_rate = 0.01;
  Guarded workspace(adafactor_workspace(p) * 8);
  p.workspace = workspace.as<double>();
  const auto begin = [&] {
    for (int64_t i = 0; i < kCount; ++i) weight.memory.as<float>()[i] = 1 + static_cast<float>(i % 7);
    for (int64_t i = 0; i <= kRows + kColumns; ++i) sums.data()[i] = 1;
    for (int64_t i = 0; i < kColumns; ++i) columns.memory.as<float>()[i] = rows.memory.as<float>()[i % kRows] = static_cast<float>(std::abs(means[static_cast<size_t>(i)]) + 0.1);
    *mean = 1, *norm = 0;
  };
  const auto summed = [&] {
    begin(), k.adafactor_sums(p, nullptr);
    return std::vector<double>(sums.data(), sums.data() + kRows + kColumns + 1);
  };
  EXPECT_EQ(leave_out_each("barrier", summed), 1);  // one in each of its two launches, left out together
  const auto moved = [&] {
    begin(), k.adafactor_means(p, nullptr);
    return *mean;
  };
  EXPECT_EQ(leave_out_each("barrier", moved), 1);
  const auto measured = [&] {
    begin(), k.adafactor_norm(p, nullptr);
    return *norm;
  };
  EXPECT_EQ(leave_out_each("barrier", measured), 1);
}

}  // namespace
}  // namespace trireme::kernels
#endif
