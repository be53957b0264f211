// Embedding and its gradient, emulated.
#include "emulated.h"

#include <array>

namespace trireme::kernels {
namespace {

using namespace test;

struct Case {
  Type type, weight_type;
  int64_t num_tokens, width, first;  // first: of the weight's and the outputs' memory
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << name_of(c.type) << " into " << name_of(c.weight_type) << ", " << c.num_tokens << " tokens of " << c.width << " values from " << c.first;
}

class EmbeddingKernels : public testing::TestWithParam<Case> {};

constexpr int64_t kFirstId = 100, kNumIds = 40;

// Some ids of this device's, of which one has most of the tokens, and some that are not.
std::vector<int64_t> make_ids(int64_t n) {
  std::mt19937_64 random(5);
  std::vector<int64_t> ids;
  for (int64_t t = 0; t < n; ++t) ids.push_back(t % 3 == 1 ? kFirstId + 7 : t % 5 == 4 ? static_cast<int64_t>(random() % 300) - 50 : kFirstId + static_cast<int64_t>(random() % kNumIds));
  return ids;
}

TEST_P(EmbeddingKernels, AreTheLoops) {
  const auto [type, weight_type, num_tokens, width, first] = GetParam();
  const auto token_ids = make_ids(num_tokens);
  Guarded ids(num_tokens * 8), workspace(embedding_gradient_workspace(num_tokens) * 8);
  std::memcpy(ids.as(), token_ids.data(), ids.num_bytes());
  const Values weight = random_values(type, kNumIds * width + first, 1), grad_y = random_values(type, num_tokens * width + first, 2);
  const Values before = random_values(weight_type, kNumIds * width + first, 3);
  const size_t w = static_cast<size_t>(width), begin = static_cast<size_t>(first);
  Values expected(begin, NAN), sums(before.size()), expected_gradient = before;
  for (size_t t = 0; t < token_ids.size(); ++t) {
    const int64_t id = token_ids[t] - kFirstId;
    const bool here = id >= 0 && id < kNumIds;
    for (size_t c = 0; c < w; ++c) {
      expected.push_back(here ? weight[begin + static_cast<size_t>(id) * w + c] : 0);
      if (here) sums[begin + static_cast<size_t>(id) * w + c] += grad_y[begin + t * w + c];
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) expected_gradient[i] += sums[i];

  Tensor table(type, weight), y(type, num_tokens * width + first), gy(type, grad_y), gradient(weight_type, before), again(weight_type, before);
  auto at = [first = first](Tensor& x) { return x.memory.as<char>() + first * size_of(x.type); };
  emulated_kernels().embedding({type, num_tokens, width, ids.as<int64_t>(), at(table), kFirstId, kNumIds, at(y)}, nullptr);
  const Values out = y.values();
  EXPECT_EQ(Values(out.begin() + first, out.end()), Values(expected.begin() + first, expected.end()));

  EmbeddingGradient p{type, weight_type, num_tokens, width, ids.as<int64_t>(), at(gy), kFirstId, kNumIds, at(gradient), workspace.as<int64_t>()};
  emulated_kernels().embedding_gradient(p, nullptr);
  // Each addition rounds a sum that is of the size of a few values; then the result is rounded once.
  EXPECT_TRUE(near(gradient.values(), expected_gradient, unit(weight_type) + 0x1p-23, 2 * 0x1p-24 * static_cast<double>(num_tokens)));
  p.grad_weight = at(again);  // in another order of threads
  emulated_kernels().embedding_gradient(p, nullptr);
  EXPECT_EQ(again.memory.bits(), gradient.memory.bits());
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (Type type : {Type::kFloat32, Type::kBFloat16, Type::kFloat16})
    for (const auto& [tokens, width, first] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {1, 1, 0}, {15, 15, 0}, {16, 16, 0}, {17, 17, 0}, {127, 24, 0}, {128, 16, 1}, {129, 8, 0}, {300, 16, 0}, {3, 520, 0}, {5, 127, 0}}) {
      all.push_back({type, type, tokens, width, first});
      if (type != Type::kFloat32) all.push_back({type, Type::kFloat32, tokens, width, first});
    }
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, EmbeddingKernels, testing::ValuesIn(cases()));

TEST(EmbeddingKernels, AddInTheOrderOfTokens) {
  // In fp32 2^24 + 1 - 2^24 is 0, -2^24 + 1 + 2^24 is 1: bits show the order.
  Tensor gy(Type::kFloat32, {0x1p24, 5, 1, -0x1p24, 3, 0}), gradient(Type::kFloat32, Values(2));
  Guarded ids(6 * 8), workspace(embedding_gradient_workspace(6) * 8);
  for (int64_t t = 0; t < 6; ++t) ids.as<int64_t>()[t] = t == 1;
  emulated_kernels().embedding_gradient({Type::kFloat32, Type::kFloat32, 6, 1, ids.as<int64_t>(), gy.data(), 0, 2, gradient.data(), workspace.as<int64_t>()}, nullptr);
  EXPECT_EQ(gradient.values(), (Values{3, 5}));
}

// Several blocks sort ids of as many digits as num_ids has. Gradients are small whole numbers, whose sums are exact.
TEST(EmbeddingKernels, SortManyTokensOfManyIds) {
  for (const auto& [num_tokens, num_ids] : std::vector<std::pair<int64_t, int64_t>>{{4095, 255}, {4097, 256}, {10000, 70000}, {6145, 1 << 24}}) {
    SCOPED_TRACE(testing::Message() << num_tokens << " tokens, " << num_ids << " ids");
    constexpr int64_t kUsed = 1000;  // ids: the first and the last
    const int64_t used = std::min(2 * kUsed, num_ids);
    auto id_of = [&, num_ids = num_ids](int64_t i) { return i < kUsed || used < 2 * kUsed ? i : num_ids - used + i; };
    std::mt19937_64 random(7);
    Guarded ids(num_tokens * 8), workspace(embedding_gradient_workspace(num_tokens) * 8);
    Values grad_y, expected(2 * kUsed);
    for (int64_t t = 0; t < num_tokens; ++t) {
      const int64_t at = static_cast<int64_t>(random() % static_cast<uint64_t>(used));
      ids.as<int64_t>()[t] = id_of(at) + (t % 7 == 0 ? num_ids : 0);  // the latter are not here
      grad_y.push_back(static_cast<double>(t % 61) - 30);
      if (t % 7 != 0) expected[static_cast<size_t>(at)] += grad_y.back();
    }
    // Memory of all ids, of which those in the middle are never touched.
    Guarded gradient(num_ids * 4);
    for (int64_t i = 0; i < used; ++i) gradient.as<float>()[id_of(i)] = 0;
    Tensor gy(Type::kFloat32, grad_y);
    emulated_kernels().embedding_gradient({Type::kFloat32, Type::kFloat32, num_tokens, 1, ids.as<int64_t>(), gy.data(), 0, num_ids, gradient.as(), workspace.as<int64_t>()}, nullptr);
    for (int64_t i = 0; i < used; ++i) ASSERT_EQ(gradient.as<float>()[id_of(i)], expected[static_cast<size_t>(i)]) << i;
    for (int64_t i = kUsed; i < num_ids - kUsed; ++i) ASSERT_EQ(std::isnan(gradient.as<float>()[i]), used == 2 * kUsed) << i;
  }
}

TEST(EmbeddingKernels, KeepTheOrderOfManyTokens) {
  // Pairs of 2^24 and 1 before -2^24, of which each gives 0, and at the end 5: any other order leaves ones.
  constexpr int64_t kTokens = 6001;
  Guarded ids(kTokens * 8), workspace(embedding_gradient_workspace(kTokens) * 8);
  Values grad_y;
  for (int64_t t = 0; t < kTokens; ++t) {
    ids.as<int64_t>()[t] = 300;
    grad_y.push_back(t + 1 == kTokens ? 5 : std::array<double, 3>{0x1p24, 1, -0x1p24}[static_cast<size_t>(t % 3)]);
  }
  Tensor gy(Type::kFloat32, grad_y), gradient(Type::kFloat32, Values(301));
  emulated_kernels().embedding_gradient({Type::kFloat32, Type::kFloat32, kTokens, 1, ids.as<int64_t>(), gy.data(), 0, 301, gradient.data(), workspace.as<int64_t>()}, nullptr);
  EXPECT_EQ(gradient.values().back(), 5);
}

TEST(EmbeddingKernels, RefuseWhatDoesNotFit) {
  auto refusal = [](int64_t num_tokens, Type weight_type) -> std::string {
    try {
      emulated_kernels().embedding_gradient({Type::kBFloat16, weight_type, num_tokens, 8, nullptr, nullptr, 0, 4, nullptr, nullptr}, nullptr);
    } catch (const Refused& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(refusal(int64_t{1} << 31, Type::kBFloat16),
            "embedding_gradient of 2147483648 tokens, 4 ids of 8 values: fewer than 2^31 tokens, and at most 2^31 ids of 2^30 values");
  EXPECT_EQ(refusal(3, Type::kFloat16), "embedding_gradient: the weight's gradient is float32 or of the type of the outputs' gradient");
  EXPECT_EQ(refusal(0, Type::kBFloat16), "");
}

}  // namespace
}  // namespace trireme::kernels
