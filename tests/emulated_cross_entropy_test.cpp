// The cross-entropy kernels, emulated, against the loops that define them.
#include "emulated.h"

namespace trireme::kernels {
namespace {

using namespace test;

struct Setting {
  double label_smoothing, z_loss, gradient_scale;
};

// Device memory of a call; logits in rows `stride` apart, with NaNs between.
struct Call {
  Call(Type type, const Values& logits, int64_t width, int64_t stride, const std::vector<int64_t>& t, const Setting& setting, bool gradient = true)
      : num_rows(static_cast<int64_t>(t.size())), logits_(type, num_rows * stride), targets(num_rows * 8), loss(Type::kFloat32, num_rows), correct(num_rows) {
    Tensor packed(type, logits);
    for (int64_t r = 0; r < num_rows; ++r)
      std::memcpy(logits_.memory.as<char>() + r * stride * size_of(type), packed.memory.as<char>() + r * width * size_of(type), static_cast<size_t>(width * size_of(type)));
    std::memcpy(targets.as(), t.data(), t.size() * 8);
    p = {type, num_rows, width, stride, logits_.data(), targets.as<int64_t>(), static_cast<float>(setting.label_smoothing), static_cast<float>(setting.z_loss),
         static_cast<float>(setting.gradient_scale), gradient, loss.memory.as<float>(), correct.as<uint8_t>()};
  }
  Values logits() {
    const Values all = logits_.values();
    Values out;
    for (int64_t r = 0; r < num_rows; ++r) out.insert(out.end(), all.begin() + r * p.stride, all.begin() + r * p.stride + p.width);
    return out;
  }
  std::vector<bool> hits() { return std::vector<bool>(correct.as<uint8_t>(), correct.as<uint8_t>() + num_rows); }

  int64_t num_rows;
  Tensor logits_;
  Guarded targets;
  Tensor loss;
  Guarded correct;
  CrossEntropy p;
};

// A value of the softmax is wrong by that of its exponent (its argument, below 16 here, is rounded twice), of the sum (which is
// of positive terms: each thread's of at most 126, then a tree) and of a few operations.
constexpr double kValue = 64 * 0x1p-24;
// Where 1 is subtracted of a value near it.
constexpr double kTarget = 8 * 0x1p-24;
// Of values below 16 and their sums; of mean and square where these count.
constexpr double kLoss = 64 * 0x1p-24;

void expect_results(Call& call, const reference::CrossEntropy& expected, Type type, const Setting& setting) {
  EXPECT_TRUE(near(call.loss.values(), expected.loss, kLoss, kLoss));
  EXPECT_EQ(call.hits(), expected.correct);
  EXPECT_TRUE(near(call.logits(), expected.gradient, unit(type) + kValue, setting.gradient_scale * kTarget + smallest_unit(type)));
}

struct Case {
  Type type;
  int64_t num_rows, width, stride;
};
void PrintTo(const Case& c, std::ostream* out) { *out << name_of(c.type) << " " << c.num_rows << " x " << c.width << " of " << c.stride; }

// Targets: each place of a row in turn, first, last and the largest; with repetitions of the largest, and ignored rows.
std::vector<int64_t> make_targets(Values& logits, int64_t num_rows, int64_t width, Type type) {
  std::vector<int64_t> targets;
  for (int64_t r = 0; r < num_rows; ++r) {
    double* row = &logits[static_cast<size_t>(r * width)];
    const int64_t largest = std::max_element(row, row + width) - row;
    if (r % 4 == 1) row[width - 1] = row[width / 2] = row[largest];  // one of equals
    targets.push_back(r % 8 == 7 ? -100 : r % 4 == 0 ? largest : r % 4 == 1 ? std::max_element(row, row + width) - row : r % 4 == 2 ? width - 1 : r % width);
    if (r % 8 == 3) row[targets.back()] = reference::round_to(type, 12);  // a probability near 1
    if (r % 8 == 5 && width > 1) targets.back() = width - 1;  // the last of equals is not correct
  }
  return targets;
}

class CrossEntropyKernels : public testing::TestWithParam<Case> {};

TEST_P(CrossEntropyKernels, AreTheLoops) {
  const auto [type, num_rows, width, stride] = GetParam();
  Values logits = random_values(type, num_rows * width, 1, 2);
  const auto targets = make_targets(logits, num_rows, width, type);
  for (const Setting& setting : {Setting{0, 0, 1}, Setting{0.125, 0.0078125, 0.25}}) {
    Call call(type, logits, width, stride, targets, setting);
    emulated_kernels().cross_entropy(call.p, nullptr);
    const auto expected = reference::cross_entropy(logits, width, targets, setting.label_smoothing, setting.z_loss, setting.gradient_scale);
    expect_results(call, expected, type, setting);
    if (setting.z_loss == 0) continue;
    Call again(type, logits, width, stride, targets, setting, false);  // without the gradient, in another order of threads: the same bits
    emulated_kernels().cross_entropy(again.p, nullptr);
    EXPECT_EQ(again.loss.memory.bits(), call.loss.memory.bits());
    EXPECT_EQ(again.correct.bits(), call.correct.bits());
    EXPECT_EQ(again.logits(), logits);
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (Type type : {Type::kFloat32, Type::kBFloat16, Type::kFloat16})
    for (const auto& [rows, width, stride] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {1, 1, 1}, {8, 15, 15}, {4, 16, 16}, {8, 17, 17}, {4, 127, 128}, {2, 128, 128}, {4, 129, 131}, {2, 1000, 1000}, {2, 50257, 50304}})
      all.push_back({type, rows, width, stride});
  all.push_back({Type::kBFloat16, 3, 128256, 128256});
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, CrossEntropyKernels, testing::ValuesIn(cases()));

class CrossEntropyPartKernels : public testing::TestWithParam<Case> {};

TEST_P(CrossEntropyPartKernels, AreThoseOfTheWhole) {
  const auto [type, num_rows, width, stride] = GetParam();
  Values logits = random_values(type, num_rows * width, 1, 2);
  const auto targets = make_targets(logits, num_rows, width, type);
  const Setting setting{0.125, 0.0078125, 0.25};
  const auto expected = reference::cross_entropy(logits, width, targets, setting.label_smoothing, setting.z_loss, setting.gradient_scale);
  const std::vector<int64_t> cuts = {0, (width + 2) / 3, (width + 1) / 2, width};
  struct Part {
    Call call;
    Tensor maximum, sum, target_logit, logit_sum;
    Guarded largest;
    CrossEntropyPart p;
  };
  std::vector<std::unique_ptr<Part>> parts;
  const size_t n = static_cast<size_t>(num_rows);
  Values maximum(n, -INFINITY), sum(n), target_logit(n), logit_sum(n);
  std::vector<int64_t> largest(n, width);
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const int64_t begin = cuts[i], size = cuts[i + 1] - begin;
    if (size == 0) continue;
    Values mine;
    for (int64_t r = 0; r < num_rows; ++r) mine.insert(mine.end(), logits.begin() + r * width + begin, logits.begin() + r * width + begin + size);
    const Type f = Type::kFloat32;
    parts.emplace_back(new Part{{type, mine, size, size + 3, targets, setting}, {f, num_rows}, {f, num_rows}, {f, num_rows}, {f, num_rows}, Guarded(num_rows * 8), {}});
    Part& q = *parts.back();
    q.p = {q.call.p, begin, width, q.maximum.memory.as<float>(), q.sum.memory.as<float>(), q.target_logit.memory.as<float>(), q.logit_sum.memory.as<float>(), q.largest.as<int64_t>()};
    emulated_kernels().cross_entropy_part(q.p, nullptr);
    EXPECT_EQ(q.call.logits(), mine);
    for (size_t r = 0; r < n; ++r) maximum[r] = std::max(maximum[r], double{q.p.maximum[r]});
  }
  for (auto& q : parts)  // what the devices would tell each other
    for (size_t r = 0; r < n; ++r) {
      sum[r] += q->p.sum[r] * std::exp(q->p.maximum[r] - maximum[r]);
      target_logit[r] += q->p.target_logit[r], logit_sum[r] += q->p.logit_sum[r];
      if (q->p.maximum[r] == maximum[r]) largest[r] = std::min(largest[r], q->p.largest[r]);
    }
  Values gradient(logits.size());
  for (auto& q : parts) {
    for (size_t r = 0; r < n; ++r) {
      q->p.maximum[r] = static_cast<float>(maximum[r]), q->p.sum[r] = static_cast<float>(sum[r]), q->p.largest[r] = largest[r];
      q->p.target_logit[r] = static_cast<float>(target_logit[r]), q->p.logit_sum[r] = static_cast<float>(logit_sum[r]);
    }
    emulated_kernels().cross_entropy_finish(q->p, nullptr);
    EXPECT_TRUE(near(q->call.loss.values(), expected.loss, kLoss, kLoss));
    EXPECT_EQ(q->call.hits(), expected.correct);
    const Values mine = q->call.logits();
    const int64_t size = q->p.rows.width;
    for (int64_t r = 0; r < num_rows; ++r) std::copy(mine.begin() + r * size, mine.begin() + (r + 1) * size, gradient.begin() + r * width + q->p.first_id);
  }
  EXPECT_TRUE(near(gradient, expected.gradient, unit(type) + kValue, setting.gradient_scale * kTarget + smallest_unit(type)));
}
INSTANTIATE_TEST_SUITE_P(Shapes, CrossEntropyPartKernels, testing::Values(Case{Type::kFloat32, 8, 17, 17}, Case{Type::kBFloat16, 4, 129, 129}, Case{Type::kFloat16, 4, 2, 2}));

TEST(CrossEntropyKernels, OfLargeLogitsAreFinite) {
  const Values logits = {1e4, 1e4 - 20, -1e30, -INFINITY};
  Call call(Type::kFloat32, logits, 4, 4, {1}, {0, 0, 1});
  emulated_kernels().cross_entropy(call.p, nullptr);
  EXPECT_TRUE(near(call.loss.values(), {20}, 1e-6, 0));
  EXPECT_TRUE(near(call.logits(), {1, -1, 0, 0}, 1e-6, 0));
  EXPECT_EQ(call.hits(), std::vector{false});
}

TEST(CrossEntropyKernels, ShowWhatIsWrong) {
  Call call(Type::kBFloat16, {1, 2, 3, 1, NAN, 3}, 3, 3, {3, 0}, {0, 0, 1});  // a target beyond the last, a NaN
  emulated_kernels().cross_entropy(call.p, nullptr);
  for (double loss : call.loss.values()) EXPECT_TRUE(std::isnan(loss));
  EXPECT_EQ(call.hits(), (std::vector{false, false}));
}

TEST(CrossEntropyKernels, RefuseRowsThatDoNotFit) {
  auto refusal = [](int64_t width, int64_t stride, int64_t first, int64_t vocabulary) -> std::string {
    try {
      emulated_kernels().cross_entropy_part({{Type::kBFloat16, 2, width, stride, nullptr, nullptr, 0, 0, 1, true, nullptr, nullptr}, first, vocabulary, nullptr, nullptr, nullptr, nullptr, nullptr}, nullptr);
    } catch (const Refused& error) {
      return error.what();
    }
    return "";
  };
  const std::string rule = ": a row has 1 to 2^30 of the vocabulary's, and they do not overlap";
  EXPECT_EQ(refusal(8, 7, 0, 8), "cross_entropy_part of 2 rows of 8 logits, 7 apart, from 0 of 8" + rule);
  EXPECT_EQ(refusal(8, 8, 9, 16), "cross_entropy_part of 2 rows of 8 logits, 8 apart, from 9 of 16" + rule);
  EXPECT_EQ(refusal(0, 8, 0, 8), "cross_entropy_part of 2 rows of 0 logits, 8 apart, from 0 of 8" + rule);
}

}  // namespace
}  // namespace trireme::kernels
