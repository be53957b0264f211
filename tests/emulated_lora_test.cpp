// The low-rank products, emulated, against loops in fp64 with the mask of the CPU code's generator.
//
// Bounds. Factors are exact, and so are products of two in fp32. A sum of n terms is off by at most 2 n 2^-24 times the sum of their
// magnitudes (the factor 2: a tensor core may cut off where the emulation rounds), which is computed in fp64, element by element; the
// factor of dropout and the scale add a rounding each, and the result is rounded once to its type.
#include <array>

#include "emulated.h"
#include "src/base/random.h"

namespace trireme::kernels {
namespace {

using namespace test;

constexpr uint64_t kSeed = 77, kModule = 5;

// What the mask multiplies with.
Values kept(int64_t rows, int64_t width, const std::vector<int64_t>& row_ids, int64_t first, double p) {
  Values out;
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < width; ++i) {
      const uint64_t c = static_cast<uint64_t>(first + i);
      const auto words = philox(kSeed ^ static_cast<uint64_t>(RandomStream::kDropout) << 56, static_cast<uint64_t>(row_ids[static_cast<size_t>(t)]), kModule << 32 | (c / 64 * 16 + c % 16));
      out.push_back(words[c / 16 % 4] < static_cast<uint32_t>(p * 4294967296.0) ? 0 : 1 / (1 - p));
    }
  return out;
}

Values transposed(const Values& x, int64_t columns) {
  Values out;
  for (size_t c = 0; c < static_cast<size_t>(columns); ++c)
    for (size_t i = c; i < x.size(); i += static_cast<size_t>(columns)) out.push_back(x[i]);
  return out;
}

Values magnitudes(Values x) {
  for (double& value : x) value = std::abs(value);
  return x;
}

testing::AssertionResult within(Type type, const Values& actual, const Values& expected, const Values& sums, int64_t num_terms) {
  if (actual.size() != expected.size()) return testing::AssertionFailure() << actual.size() << " values, expected " << expected.size();
  for (size_t i = 0; i < actual.size(); ++i) {
    const double bound = unit(type) * std::abs(expected[i]) + static_cast<double>(2 * num_terms + 4) * 0x1p-24 * sums[i] + smallest_unit(type);
    if (!(std::abs(actual[i] - expected[i]) <= bound))
      return testing::AssertionFailure() << "number " << i << " is " << actual[i] << ", expected " << expected[i] << " within " << bound;
  }
  return testing::AssertionSuccess();
}

struct Case {
  Type type;
  int64_t num_rows, width, rank, first;  // first: feature
  double p;
  int64_t skip;                          // elements by which narrow tensors begin later than they are aligned
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << name_of(c.type) << " " << c.num_rows << " x " << c.width << ", rank " << c.rank << ", p " << c.p << " from feature " << c.first << ", " << c.skip << " later";
}

class LoraKernels : public testing::TestWithParam<Case> {
 protected:
  LoraKernels() : ids_(num_rows_ * 8) {
    for (int64_t i = 0; i < num_rows_; ++i) row_ids_.push_back(static_cast<int64_t>(0x9E3779B97F4A7C15ull * static_cast<uint64_t>(i + 1)));
    std::memcpy(ids_.as(), row_ids_.data(), row_ids_.size() * 8);
    dropout_ = {ids_.as<int64_t>(), kSeed, kModule, first_, p_};
    kept_ = kept(num_rows_, width_, row_ids_, first_, p_);
  }

  Values random(int64_t n, uint64_t seed) const { return random_values(type_, n, seed); }
  // Behind `skip` others.
  Tensor late(const Values& values) const {
    Values all(static_cast<size_t>(skip_), NAN);
    all.insert(all.end(), values.begin(), values.end());
    return {type_, all};
  }
  void* at(Tensor& x) const { return x.memory.as<char>() + skip_ * 2; }
  Values rest(Tensor& x) const {
    const Values all = x.values();
    return {all.begin() + skip_, all.end()};
  }

  const Type type_ = GetParam().type;
  const int64_t num_rows_ = GetParam().num_rows, width_ = GetParam().width, rank_ = GetParam().rank, first_ = GetParam().first, skip_ = GetParam().skip;
  const double p_ = GetParam().p;
  std::vector<int64_t> row_ids_;
  Guarded ids_;
  LoraDropout dropout_;
  Values kept_;
};

TEST_P(LoraKernels, Down) {
  const Values x = random(num_rows_ * width_, 1), w = random(rank_ * width_, 2), w_transposed = transposed(w, width_);
  Tensor in(type_, x), weight(type_, w), y = late(Values(static_cast<size_t>(num_rows_ * rank_), NAN));
  emulated_kernels().lora_down({type_, num_rows_, width_, rank_, in.data(), weight.data(), dropout_, at(y)}, nullptr);
  EXPECT_TRUE(within(type_, rest(y), reference::lora_down(x, w_transposed, kept_, rank_), reference::lora_down(magnitudes(x), magnitudes(w_transposed), kept_, rank_), width_));
}

TEST_P(LoraKernels, Up) {
  const Values x = random(num_rows_ * rank_, 1), w = random(rank_ * width_, 2), before = random(num_rows_ * width_, 3);
  const Values expected = reference::lora_up(before, x, w, kept_, rank_, 0.7), sums = reference::lora_up(magnitudes(before), magnitudes(x), magnitudes(w), kept_, rank_, 0.7);
  Tensor in = late(x), weight = late(w), by_rank(type_, transposed(w, rank_)), y(type_, before);
  emulated_kernels().lora_up({type_, num_rows_, width_, rank_, at(in), at(weight), false, 0.7f, dropout_, y.data()}, nullptr);
  EXPECT_TRUE(within(type_, y.values(), expected, sums, rank_));
  Tensor other(type_, before);
  emulated_kernels().lora_up({type_, num_rows_, width_, rank_, at(in), by_rank.data(), true, 0.7f, dropout_, other.data()}, nullptr);
  EXPECT_EQ(other.memory.bits(), y.memory.bits());
}

TEST_P(LoraKernels, Gradient) {
  const Values wide = random(num_rows_ * width_, 1), narrow = random(num_rows_ * rank_, 2);
  Values expected = reference::lora_gradient(wide, narrow, kept_, rank_), sums = reference::lora_gradient(magnitudes(wide), magnitudes(narrow), kept_, rank_);
  for (double& e : expected) e *= 0.7;
  Tensor left(type_, wide), right = late(narrow), gradient = late(Values(expected.size(), NAN));
  Guarded workspace(lora_gradient_workspace(num_rows_, width_, rank_) * 4);
  LoraGradient p{type_, type_, num_rows_, width_, rank_, left.data(), at(right), dropout_, 0.7f, false, false, at(gradient), workspace.as<float>()};
  emulated_kernels().lora_gradient(p, nullptr);
  EXPECT_TRUE(within(type_, rest(gradient), expected, sums, num_rows_));

  const Values before = random_values(Type::kFloat32, rank_ * width_, 3), at_rank = transposed(expected, rank_);
  Values total = before, total_sums = transposed(sums, rank_);
  for (size_t i = 0; i < total.size(); ++i) total[i] += at_rank[i], total_sums[i] += std::abs(before[i]);
  Tensor sum(Type::kFloat32, before), again(Type::kFloat32, before);
  p.gradient_type = Type::kFloat32, p.by_rank = p.add = true, p.gradient = sum.data();
  emulated_kernels().lora_gradient(p, nullptr);
  EXPECT_TRUE(within(Type::kFloat32, sum.values(), total, total_sums, num_rows_));
  p.gradient = again.data();  // in another order of threads
  emulated_kernels().lora_gradient(p, nullptr);
  EXPECT_EQ(again.memory.bits(), sum.memory.bits());
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (Type type : {Type::kBFloat16, Type::kFloat16})
    for (double p : {0.0, 0.3})
      for (const auto& [rows, width, rank, first, skip] : std::vector<std::array<int64_t, 5>>{
               {1, 8, 1, 0, 0}, {15, 72, 4, 8, 0}, {16, 64, 16, 64, 0}, {17, 128, 15, 40, 1}, {33, 520, 8, 96, 0}, {127, 64, 17, 0, 0}, {128, 248, 64, 24, 0}, {129, 264, 16, 0, 1},
               {31, 136, 65, 56, 0}, {40, 1032, 16, 0, 0}, {130, 40, 256, 120, 0}, {300, 72, 40, 0, 0}})
        all.push_back({type, rows, width, rank, first, p, skip});
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, LoraKernels, testing::ValuesIn(cases()));

TEST(LoraKernelsOf, NoRows) {
  Tensor w(Type::kBFloat16, Values(4 * 8, 1)), gradient(Type::kBFloat16, Values(4 * 8, 1));
  Guarded workspace(lora_gradient_workspace(0, 8, 4) * 4);
  emulated_kernels().lora_down({Type::kBFloat16, 0, 8, 4, nullptr, w.data(), {nullptr, 1, 2, 0, 0.1}, nullptr}, nullptr);
  emulated_kernels().lora_up({Type::kBFloat16, 0, 8, 4, nullptr, w.data(), false, 1, {nullptr, 1, 2, 0, 0.1}, nullptr}, nullptr);
  emulated_kernels().lora_gradient({Type::kBFloat16, Type::kBFloat16, 0, 8, 4, nullptr, nullptr, {nullptr, 1, 2, 0, 0.1}, 1, true, false, gradient.data(), workspace.as<float>()}, nullptr);
  EXPECT_EQ(gradient.values(), Values(4 * 8, 0));
}

TEST(LoraKernelsOf, SlicesOfTheWholesMask) {
  // The columns of a rank of tensor parallelism are dropped as those of the whole are.
  Guarded row_ids(2 * 8);
  row_ids.as<int64_t>()[0] = 3, row_ids.as<int64_t>()[1] = 4;
  auto ones = [&](int64_t width, int64_t first) {
    Tensor x(Type::kBFloat16, Values(2, 1)), w(Type::kBFloat16, Values(static_cast<size_t>(width), 1)), y(Type::kBFloat16, Values(static_cast<size_t>(2 * width)));
    emulated_kernels().lora_up({Type::kBFloat16, 2, width, 1, x.data(), w.data(), false, 1, {row_ids.as<int64_t>(), 1, 2, first, 0.5}, y.data()}, nullptr);
    return y.values();
  };
  const Values all = ones(256, 0), some = ones(104, 88);
  for (size_t row = 0; row < 2; ++row)
    for (size_t c = 0; c < 104; ++c) ASSERT_EQ(some[row * 104 + c], all[row * 256 + 88 + c]) << row << " " << c;
}

TEST(LoraKernelsOf, WhatDoesNotFitIsRefused) {
  auto refusal = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const Refused& error) {
      return error.what();
    }
    return "";
  };
  auto down = [&](Type type, int64_t width, int64_t rank, uintptr_t x, double p, int64_t first) {
    return refusal([&] { emulated_kernels().lora_down({type, 0, width, rank, reinterpret_cast<void*>(x), nullptr, {nullptr, 1, 2, first, p}, nullptr}, nullptr); });
  };
  EXPECT_EQ(down(Type::kBFloat16, 8, 16, 0, 0.1, 8), "");
  EXPECT_EQ(down(Type::kFloat32, 8, 16, 0, 0, 0), "lora_down: the type must be bfloat16 or float16");
  EXPECT_EQ(down(Type::kFloat16, 8, 0, 0, 0, 0), "lora_down: a rank of 0 is not within 1 .. 256");
  EXPECT_EQ(down(Type::kFloat16, 8, 257, 0, 0, 0), "lora_down: a rank of 257 is not within 1 .. 256");
  EXPECT_EQ(down(Type::kFloat16, 12, 8, 0, 0, 0), "lora_down: rows of 12 values are not in whole 16 bytes, or do not begin at a multiple of them");
  EXPECT_EQ(down(Type::kFloat16, 16, 8, 8, 0, 0), "lora_down: rows of 16 values are not in whole 16 bytes, or do not begin at a multiple of them");
  EXPECT_EQ(down(Type::kFloat16, 16, 8, 0, 1, 0), "lora_down: a probability of 1.000000 is not 0 or more and less than 1");
  EXPECT_EQ(down(Type::kFloat16, 16, 8, 0, 0.5, 12), "lora_down: a first feature of 12 is no multiple of 8");
  EXPECT_EQ(down(Type::kFloat16, -8, 8, 0, 0, 0), "lora_down: 0 rows of -8 values: a row has at most 2^30");
  auto odd = reinterpret_cast<void*>(uintptr_t{2});
  EXPECT_NE(refusal([&] { emulated_kernels().lora_up({Type::kFloat16, 0, 8, 8, nullptr, odd, true, 1, {nullptr, 1, 2, 0, 0}, nullptr}, nullptr); }), "");
  EXPECT_EQ(refusal([&] { emulated_kernels().lora_up({Type::kFloat16, 0, 8, 8, odd, odd, false, 1, {nullptr, 1, 2, 0, 0}, nullptr}, nullptr); }), "");
  EXPECT_NE(refusal([&] { emulated_kernels().lora_up({Type::kFloat16, 0, 8, 8, nullptr, nullptr, false, 1, {nullptr, 1, 2, 0, 0}, odd}, nullptr); }), "");
  EXPECT_EQ(refusal([&] {
              emulated_kernels().lora_gradient({Type::kFloat16, Type::kBFloat16, 0, 8, 8, nullptr, nullptr, {nullptr, 1, 2, 0, 0}, 1, false, false, nullptr, nullptr}, nullptr);
            }),
            "lora_gradient: the gradient is float32 or of the type of the factors");
}

}  // namespace
}  // namespace trireme::kernels
