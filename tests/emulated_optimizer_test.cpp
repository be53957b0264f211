// The optimizer's kernels, emulated, against the loops that define them.
#include <algorithm>
#include <array>
#include <list>

#include "emulated.h"
#include "kernels/reference/quantize.h"
#include "src/base/random.h"

namespace trireme::kernels {
namespace {

using namespace test;
using reference::round_to;

constexpr int64_t kSizes[] = {1, 15, 16, 17, 127, 128, 129, 8191, 8192, 8193, 0, 20000};  // chunks have 8,192

constexpr reference::UpdateNumbers kNumbers{1e-2, 0.1, 0.9, 0.95, 1e-8, 1 - 0.9 * 0.9, 1 - 0.95 * 0.95, 0.5};

constexpr reference::UpdateNumbers kNumbersOfOthers{1e-2, 0.1, 0.9, 0.95, 0, 1, 1, 0.5};

// A tensor with its state in guarded memory, each of which begins `skip` elements later than it is aligned.
struct State {
  State(Type type, int64_t size, bool with_master, uint64_t seed, int64_t skip = 0) : skip(skip), size(size), before{
        random_values(with_master ? Type::kFloat32 : type, size, seed), random_values(Type::kFloat32, size, seed + 1), random_values(Type::kFloat32, size, seed + 2)},
        grads(random_values(Type::kFloat32, size, seed + 3)), type(type) {
    for (double& v : before.v) v = round_to(Type::kFloat32, 0.5 + std::abs(v));
    if (with_master) master.emplace_back(Type::kFloat32, padded(before.weight));
    weight.emplace_back(type, with_master ? Values(static_cast<size_t>(size + skip), 9) : padded(before.weight));
    grad.emplace_back(Type::kFloat32, padded(grads));
    exp_avg.emplace_back(Type::kFloat32, padded(before.m));
    exp_avg_sq.emplace_back(Type::kFloat32, padded(before.v));
  }
  Values padded(const Values& x) const {
    Values out(static_cast<size_t>(skip), 7);
    out.insert(out.end(), x.begin(), x.end());
    return out;
  }
  Values read(std::list<Tensor>& t) const {
    const Values all = t.front().values();
    EXPECT_EQ(Values(all.begin(), all.begin() + skip), Values(static_cast<size_t>(skip), &t == &weight && !master.empty() ? 9 : 7));
    return {all.begin() + skip, all.end()};
  }
  UpdateTensor part(int64_t first, int64_t count, uint32_t id) {
    auto at = [&](std::list<Tensor>& t) { return t.front().memory.as<float>() + skip + first; };
    return {count, weight.front().memory.as<char>() + (skip + first) * size_of(type), master.empty() ? nullptr : at(master), at(grad), at(exp_avg), at(exp_avg_sq), {.first = first}, id};
  }
  UpdateTensor whole(uint32_t id) { return part(0, size, id); }

  int64_t skip, size;
  reference::UpdateState before;
  Values grads;
  Type type;
  std::list<Tensor> weight, master, grad, exp_avg, exp_avg_sq;
};

void step(Type type, const std::vector<UpdateTensor>& tensors, float scale = kNumbers.grad_scale, UpdateRule rule = UpdateRule::kAdamW) {
  const OnDevice<float> device_scale(scale);
  const auto& n = rule == UpdateRule::kAdamW ? kNumbers : kNumbersOfOthers;
  emulated_kernels().update({rule, type, tensors.data(), static_cast<int64_t>(tensors.size()), n.lr, n.weight_decay, n.beta1, n.beta2, n.epsilon, n.correction1, n.correction2,
                            device_scale.data(), 11, 3}, nullptr);
}

// Some ten roundings, here and of the constants, of numbers below 8. An update is some 0.01: 10^4 times this.
constexpr double kBound = 10 * 8 * 0x1p-24;

class AdamWKernel : public testing::TestWithParam<std::tuple<Type, bool, int64_t>> {};

TEST_P(AdamWKernel, IsTheLoop) {
  const auto [type, with_master, skip] = GetParam();
  std::list<State> states;
  std::vector<UpdateTensor> tensors;
  for (int64_t size : kSizes) {
    states.emplace_back(type, size, with_master, 10 * states.size(), skip);
    tensors.push_back(states.back().whole(static_cast<uint32_t>(states.size())));
  }
  step(type, tensors);
  for (State& s : states) {
    const auto expected = reference::update(UpdateRule::kAdamW, kNumbers, s.before, s.grads);
    EXPECT_TRUE(near(s.read(s.exp_avg), expected.m, 0, kBound));
    EXPECT_TRUE(near(s.read(s.exp_avg_sq), expected.v, 0, kBound));
    EXPECT_TRUE(near(s.read(with_master ? s.master : s.weight), expected.weight, with_master || type == Type::kFloat32 ? 0 : 2 * unit(type), kBound));
    if (with_master) {
      EXPECT_EQ(s.read(s.weight), round_to(type, s.read(s.master)));
    }
    EXPECT_EQ(s.read(s.grad), s.grads);
  }
}
INSTANTIATE_TEST_SUITE_P(Types, AdamWKernel, testing::Values(
    std::tuple{Type::kFloat32, false, 0}, std::tuple{Type::kFloat32, false, 1}, std::tuple{Type::kBFloat16, true, 0}, std::tuple{Type::kBFloat16, true, 2},
    std::tuple{Type::kFloat16, true, 0}, std::tuple{Type::kFloat16, true, 3}, std::tuple{Type::kBFloat16, false, 0}, std::tuple{Type::kBFloat16, false, 1}));

class UpdateKernel : public testing::TestWithParam<std::tuple<UpdateRule, Type, bool, int64_t>> {};

TEST_P(UpdateKernel, IsTheLoop) {
  const auto [rule, type, with_master, skip] = GetParam();
  std::list<State> states;
  std::vector<UpdateTensor> tensors;
  for (int64_t size : kSizes) {
    states.emplace_back(type, size, with_master, 10 * states.size(), skip);
    tensors.push_back(states.back().whole(static_cast<uint32_t>(states.size())));
    tensors.back().v = nullptr;
  }
  step(type, tensors, kNumbersOfOthers.grad_scale, rule);
  for (State& s : states) {
    const auto expected = reference::update(rule, kNumbersOfOthers, s.before, s.grads);
    EXPECT_TRUE(near(s.read(s.exp_avg), expected.m, 0, kBound));
    EXPECT_EQ(s.read(s.exp_avg_sq), s.before.v);
    EXPECT_TRUE(near(s.read(with_master ? s.master : s.weight), expected.weight, with_master || type == Type::kFloat32 ? 0 : 2 * unit(type), kBound));
    if (with_master) {
      EXPECT_EQ(s.read(s.weight), round_to(type, s.read(s.master)));
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Rules, UpdateKernel, testing::Combine(testing::Values(UpdateRule::kSgd, UpdateRule::kLion), testing::Values(Type::kFloat32), testing::Values(false), testing::Values(0, 1)));
INSTANTIATE_TEST_SUITE_P(RulesOf16Bits, UpdateKernel, testing::Combine(testing::Values(UpdateRule::kSgd, UpdateRule::kLion), testing::Values(Type::kBFloat16), testing::Bool(), testing::Values(0, 2)));
INSTANTIATE_TEST_SUITE_P(RulesOfFloat16, UpdateKernel, testing::Combine(testing::Values(UpdateRule::kSgd, UpdateRule::kLion), testing::Values(Type::kFloat16), testing::Values(true), testing::Values(0, 2)));

TEST(UpdateKernel, SgdDoesWithoutMomentum) {
  State s(Type::kFloat32, 100, false, 1);
  UpdateTensor tensor = s.whole(0);
  tensor.m = tensor.v = nullptr;
  step(Type::kFloat32, {tensor}, 0.5, UpdateRule::kSgd);
  reference::UpdateState before = s.before;
  before.m.assign(100, 0);
  EXPECT_TRUE(near(s.read(s.weight), reference::update(UpdateRule::kSgd, kNumbersOfOthers, before, s.grads).weight, 0, kBound));
  EXPECT_EQ(s.read(s.exp_avg), s.before.m);
}

TEST(UpdateKernel, LionStandsStillWhereNothingPullsOrPushes) {
  Tensor weight(Type::kFloat32, Values(5, 2)), grad(Type::kFloat32, {0, 1, -1, 9, NAN}), m(Type::kFloat32, {0, 0, 0, -1, 0});
  const UpdateTensor tensor{5, weight.data(), nullptr, grad.memory.as<float>(), m.memory.as<float>(), nullptr, {}, 0};
  emulated_kernels().update({UpdateRule::kLion, Type::kFloat32, &tensor, 1, 0.5, 0, 0.9, 0.5, 0, 1, 1, nullptr, 0, 1}, nullptr);
  EXPECT_EQ(weight.values()[0], 2);
  EXPECT_EQ(weight.values()[1], 1.5);
  EXPECT_EQ(weight.values()[2], 2.5);
  EXPECT_NEAR(m.values()[3], 4, 1e-6);  // 0.9 * -1 + 0.1 * 9 is nearly nothing
  EXPECT_TRUE(std::isnan(weight.values()[4]));
}

// Maps that are not those of src/quant: ascending to 1, number 127 of the signed one is 0.
std::vector<float> some_maps() {
  std::vector<float> maps;
  for (int i = 0; i < 256; ++i) maps.push_back(static_cast<float>(std::pow((i - 127) / 128.0, 3)));
  for (int i = 0; i < 256; ++i) maps.push_back(static_cast<float>(std::pow(i / 255.0, 4)));
  return maps;
}

// Of moments in fp32 that the codes stand for, by the kernel without codes: weights, codes and scales, bit for bit.
TEST(AdamW8BitKernel, IsAdamWBetweenCodes) {
  const std::vector<float> numbers = some_maps();
  const OnDevice<float> maps(numbers);
  const auto &n = kNumbers;
  int64_t kept_below_zero = 0;
  for (const auto& [type, with_master] : {std::pair{Type::kFloat32, false}, {Type::kBFloat16, true}, {Type::kBFloat16, false}, {Type::kFloat16, true}})
    for (const int64_t skip : {0, 1, 8})
      for (const int64_t size : {1, 255, 256, 257, 8192, 8193, 20000}) {
        const auto seed = static_cast<uint64_t>(size);
        State in_codes(type, size, with_master, seed, skip), in_fp32(type, size, with_master, seed, skip);
        const int64_t blocks = (size + 255) / 256;
        Guarded m(size + skip), v(size + skip);
        Tensor m_scale(Type::kFloat32, random_values(Type::kFloat32, blocks, 7)), v_scale(Type::kFloat32, Values(static_cast<size_t>(blocks), 0.25));
        auto *m_codes = m.as<uint8_t>() + skip, *v_codes = v.as<uint8_t>() + skip;
        auto *mean = in_fp32.exp_avg.front().memory.as<float>() + skip, *square = in_fp32.exp_avg_sq.front().memory.as<float>() + skip;
        for (int64_t i = 0; i < size; ++i) {
          m_codes[i] = static_cast<uint8_t>(i * 37), v_codes[i] = static_cast<uint8_t>(i * 53 + 3);
          mean[i] = numbers[m_codes[i]] * m_scale.memory.as<float>()[i / 256], square[i] = numbers[size_t{256} + v_codes[i]] * v_scale.memory.as<float>()[i / 256];
        }
        for (State* s : {&in_codes, &in_fp32}) s->grad.front().memory.as<float>()[skip] = 1e6f;  // beside which others are nearly nothing
        UpdateTensor expected = in_fp32.whole(9), tensor = in_codes.whole(9);
        expected.places.first = tensor.places.first = 512;
        tensor.m = m_codes, tensor.v = v_codes, tensor.m_scale = m_scale.memory.as<float>(), tensor.v_scale = v_scale.memory.as<float>();
        const OnDevice<float> scale(0.5f);
        const auto update = [&](UpdateRule rule, const UpdateTensor& of) {
          emulated_kernels().update({rule, type, &of, 1, n.lr, n.weight_decay, n.beta1, n.beta2, n.epsilon, n.correction1, n.correction2, scale.data(), 11, 3, maps.data()}, nullptr);
        };
        update(UpdateRule::kAdamW, expected);
        update(UpdateRule::kAdamW8Bit, tensor);
        EXPECT_EQ(in_codes.read(in_codes.weight), in_fp32.read(in_fp32.weight)) << size << " " << skip;
        if (with_master) {
          EXPECT_EQ(in_codes.read(in_codes.master), in_fp32.read(in_fp32.master));
        }
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t begin = block * 256, end = std::min(size, begin + 256);
          float m_most = 0, v_most = 0;
          for (int64_t i = begin; i < end; ++i) m_most = std::max(m_most, std::abs(mean[i])), v_most = std::max(v_most, square[i]);
          ASSERT_EQ(m_scale.memory.as<float>()[block], m_most);
          ASSERT_EQ(v_scale.memory.as<float>()[block], v_most);
          for (int64_t i = begin; i < end; ++i) {
            const int code = reference::map_code(numbers.data(), mean[i] * (1 / m_most)), below = mean[i] < 0 && code == 127;
            kept_below_zero += below;
            ASSERT_EQ(m_codes[i], code - below) << i;
            ASSERT_EQ(v_codes[i], reference::map_code(numbers.data() + 256, square[i] * (1 / v_most))) << i;
          }
        }
      }
  EXPECT_GT(kept_below_zero, 100);
}

// Of the whole tensor in fp32, by the same kernel, and the generator of the CPU code.
TEST(AdamWKernelWithoutMaster, RoundsByTheBitsOfItsElements) {
  constexpr int64_t kSize = 8300;
  State exact(Type::kBFloat16, kSize, false, 1), in_fp32(Type::kFloat32, kSize, false, 1);
  for (int64_t i = 0; i < kSize; ++i) in_fp32.weight.front().memory.as<float>()[i] = static_cast<float>(exact.before.weight[static_cast<size_t>(i)]);
  step(Type::kFloat32, {in_fp32.whole(0)});
  Values expected = in_fp32.read(in_fp32.weight);
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto random = philox(11 ^ uint64_t{6} << 56, uint64_t{3} << 32 | 5, i / 8);
    const uint32_t word = random[i % 8 / 2], bits = std::bit_cast<uint32_t>(static_cast<float>(expected[i]));
    expected[i] = std::bit_cast<float>((bits + (i % 2 ? word >> 16 : word & 0xffff)) & 0xffff0000);
  }
  step(Type::kBFloat16, {exact.whole(5)});
  EXPECT_EQ(exact.read(exact.weight), expected);
  EXPECT_NE(expected, round_to(Type::kBFloat16, in_fp32.read(in_fp32.weight)));

  State shared(Type::kBFloat16, kSize, false, 1);  // in parts, of which some are not aligned
  step(Type::kBFloat16, {shared.part(0, 21, 5), shared.part(21, 3, 5), shared.part(24, 4101, 5), shared.part(4125, kSize - 4125, 5)});
  EXPECT_EQ(shared.read(shared.weight), expected);
}

TEST(AdamWKernelWithoutMaster, RoundsPartsThatBeginAnywhere) {
  State aligned(Type::kBFloat16, 40, false, 1), not_aligned(Type::kBFloat16, 40, false, 1, 1);
  for (State* s : {&aligned, &not_aligned}) {
    UpdateTensor part = s->whole(5);
    part.places.first = 21;
    step(Type::kBFloat16, {part});
  }
  EXPECT_EQ(aligned.read(aligned.weight), not_aligned.read(not_aligned.weight));
}

// A slice of columns: its rows' elements have the bits that they have in the whole tensor.
TEST(AdamWKernelWithoutMaster, RoundsASliceOfColumnsAsTheWhole) {
  constexpr int64_t kRows = 37, kWidth = 60;
  for (const auto& [begin, width] : {std::pair<int64_t, int64_t>{8, 24}, {11, 7}, {20, 40}})
    for (const int64_t first : {int64_t{0}, width + 3, 4 * width}) {
      State whole(Type::kBFloat16, kRows * kWidth, false, 3);
      Values weight, grad, m, v;
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t c = begin; c < begin + width; ++c) {
          const auto i = static_cast<size_t>(r * kWidth + c);
          weight.push_back(whole.before.weight[i]), grad.push_back(whole.grads[i]);
          m.push_back(whole.before.m[i]), v.push_back(whole.before.v[i]);
        }
      const auto rest = [&](Values& x) { return Values(x.begin() + first, x.end()); };
      Tensor w(Type::kBFloat16, rest(weight)), g(Type::kFloat32, rest(grad)), mean(Type::kFloat32, rest(m)), square(Type::kFloat32, rest(v));
      step(Type::kBFloat16, {whole.whole(5)});
      step(Type::kBFloat16, {{kRows * width - first, w.data(), nullptr, g.memory.as<float>(), mean.memory.as<float>(), square.memory.as<float>(),
                              {first, begin, width, kWidth}, 5}});
      const Values all = whole.read(whole.weight), got = w.values();
      for (size_t i = 0; i < got.size(); ++i) {
        const int64_t in_slice = first + static_cast<int64_t>(i);
        ASSERT_EQ(got[i], all[static_cast<size_t>(in_slice / width * kWidth + begin + in_slice % width)]) << begin << " " << first << " " << i;
      }
    }
}

TEST(AdamWKernelWithoutMaster, KeepsTheMeanOfSmallUpdates) {
  constexpr int64_t kSize = 20000;
  Tensor weight(Type::kBFloat16, Values(kSize, 1)), grad(Type::kFloat32, Values(kSize, 1)), m(Type::kFloat32, Values(kSize, 0)), v(Type::kFloat32, Values(kSize, 0));
  // The first step changes a weight by lr: an eighth of the distance to the next number below.
  const UpdateTensor tensor{kSize, weight.data(), nullptr, grad.memory.as<float>(), m.memory.as<float>(), v.memory.as<float>(), {}, 1};
  emulated_kernels().update({UpdateRule::kAdamW, Type::kBFloat16, &tensor, 1, 0x1p-11, 0, 0.9, 0.95, 0, 1 - 0.9, 1 - 0.95, nullptr, 1, 1}, nullptr);
  double mean = 0;
  for (double w : weight.values()) mean += (1 - w) / 0x1p-11 / kSize;
  EXPECT_NEAR(mean, 1, 5 * std::sqrt(7.0 / kSize));  // its variance is 8 - 1 for one weight
}

TEST(AdamWKernel, TakesMoreTensorsThanOneLaunch) {
  std::list<State> states;
  std::vector<UpdateTensor> tensors;
  for (uint64_t i = 0; i < 1000; ++i) tensors.push_back(states.emplace_back(Type::kFloat32, 2, false, i).whole(0));
  step(Type::kFloat32, tensors);
  for (State& s : states) ASSERT_TRUE(near(s.read(s.weight), reference::update(UpdateRule::kAdamW, kNumbers, s.before, s.grads).weight, 0, kBound));
}

TEST(AdamWKernel, TakesNoStepWhereTheScaleIsNotFinite) {
  for (float scale : {NAN, INFINITY, -INFINITY}) {
    State s(Type::kBFloat16, 40, true, 1);
    step(Type::kBFloat16, {s.whole(0)}, scale);
    EXPECT_EQ(s.read(s.master), s.before.weight);
    EXPECT_EQ(s.read(s.exp_avg), s.before.m);
    EXPECT_EQ(s.read(s.exp_avg_sq), s.before.v);
    EXPECT_EQ(s.read(s.weight), Values(40, 9));
  }
}

TEST(AdamWKernel, RefusesHalvesWithoutMaster) {
  State s(Type::kFloat16, 4, false, 1);
  try {
    step(Type::kFloat16, {s.whole(0)});
    FAIL() << "not refused";
  } catch (const Refused& error) {
    EXPECT_STREQ(error.what(), "update of tensor 0: weights in float16 need a master in fp32; bfloat16 does without, by stochastic rounding");
  }
}

// A tensor's step in parts: slices of rows and columns, each in flat pieces.
struct CutTensor {
  int64_t num_rows, num_columns;  // num_rows 0: a vector
  std::vector<std::array<int64_t, 4>> slices;  // rows and columns, [begin, end)
  int64_t piece;
  double weights = 1, means = 1, gradients = 1;  // their size
};
const std::vector<CutTensor> kCuts = {
    {0, 1, {{0, 1, 0, 1}}, 1}, {0, 513, {{0, 1, 0, 513}}, 513}, {0, 2000, {{0, 1, 0, 900}, {0, 1, 900, 2000}}, 700}, {1, 5, {{0, 1, 0, 5}}, 5}, {5, 1, {{0, 5, 0, 1}}, 5},
    {65, 512, {{0, 65, 0, 512}}, 65 * 512}, {130, 70, {{0, 130, 0, 70}}, 999}, {3, 1100, {{0, 1, 0, 1100}, {1, 3, 0, 1100}}, 4000}, {37, 1050, {{0, 37, 0, 521}, {0, 37, 521, 1050}}, 777},
    {40, 30, {{0, 40, 0, 30}}, 1200, 1e-5},  // moves by a thousandth of the step all the same
    {90, 600, {{0, 90, 0, 600}}, 20000, 1, 1e-3}, {0, 2000, {{0, 1, 0, 2000}}, 700, 1, 1e-3},  // larger directions than it takes
    {40, 30, {{0, 40, 0, 30}}, 700, 1, 0, 0}, {40, 30, {{0, 40, 0, 30}}, 700, 1, 0, 1e-5}, {0, 40, {{0, 1, 0, 40}}, 40, 1, 0, 0}};

struct AdafactorStep {
  Type type;
  bool with_master = false;
  float scale = 0.5f;

  reference::AdafactorState before, after;
  Values grads;
  double mean_of_rows = NAN;

  explicit AdafactorStep(Type type, bool with_master, const CutTensor& cut, float scale = 0.5f, bool keeps = false) : type(type), with_master(with_master), scale(scale) {
    const int64_t rows = std::max<int64_t>(cut.num_rows, 1), size = rows * cut.num_columns;
    const auto positive = [&](int64_t n, uint64_t seed) {
      Values out = random_values(Type::kFloat32, n, seed);
      for (double& x : out) x = round_to(Type::kFloat32, (0.2 + std::abs(x)) * cut.means);
      return out;
    };
    before.weight = random_values(with_master ? Type::kFloat32 : type, size, 1, cut.weights), grads = random_values(Type::kFloat32, size, 2, cut.gradients);
    if (cut.num_rows > 0) before.rows = positive(rows, 3), before.columns = positive(cut.num_columns, 4);
    else before.squares = positive(size, 5);
    after = before;
    Tensor row(Type::kFloat32, before.rows), column(Type::kFloat32, before.columns);
    struct Part {
      Part(std::vector<size_t> elements, Type type, const Values& w, const Values& m, const Values& g, const Values& s, const Adafactor& p)
          : of(std::move(elements)), weight(type, w), master(Type::kFloat32, m), grad(Type::kFloat32, g), squares(Type::kFloat32, s), workspace(adafactor_workspace(p) * 8), call(p) {}
      std::vector<size_t> of;  // elements of the whole
      Tensor weight, master, grad, squares;
      Guarded workspace;
      Adafactor call;
    };
    std::list<Part> parts;
    const OnDevice<float> device_scale(scale);
    const OnDevice<double> sums(std::vector<double>(static_cast<size_t>(cut.num_rows > 0 ? rows + cut.num_columns + 1 : 1), 0.0)), mean(NAN), norm(0.0);
    for (const auto& [top, bottom, left, right] : cut.slices)
      for (int64_t begin = 0; begin < (bottom - top) * (right - left); begin += cut.piece) {
        std::vector<size_t> of;
        for (int64_t i = begin; i < std::min(begin + cut.piece, (bottom - top) * (right - left)); ++i)
          of.push_back(static_cast<size_t>((top + i / (right - left)) * cut.num_columns + left + i % (right - left)));
        const auto pick = [&](const Values& from) {
          Values out;
          for (size_t i : of) out.push_back(from.empty() ? 0 : from[i]);
          return out;
        };
        Adafactor call{};
        call.type = type, call.size = static_cast<int64_t>(of.size()), call.num_rows = cut.num_rows, call.num_columns = cut.num_columns;
        call.places = {begin, top * cut.num_columns + left, right - left, cut.num_columns};
        call.mix = 0.3, call.lr = 0.05, call.largest_rate = 0.04, call.weight_decay = 0.1, call.seed = 11, call.step = 3, call.id = 5;
        Part& part = parts.emplace_back(of, type, with_master ? Values(of.size(), 9) : pick(before.weight), pick(before.weight), pick(grads), pick(before.squares), call);
        part.call.weight = part.weight.data(), part.call.master = with_master ? part.master.memory.as<float>() : nullptr, part.call.grad = part.grad.memory.as<float>();
        part.call.rows = row.memory.as<float>(), part.call.columns = column.memory.as<float>(), part.call.squares = part.squares.memory.as<float>();
        part.call.sums = sums.data(), part.call.mean_of_rows = mean.data(), part.call.norm = norm.data(), part.call.grad_scale = device_scale.data();
        part.call.workspace = part.workspace.as<double>();
      }
    const Kernels& k = emulated_kernels();
    for (Part& part : parts) k.adafactor_sums(part.call, nullptr);
    bool first = true;
    for (Part& part : parts)
      if (std::exchange(first, false) || cut.num_rows == 0) k.adafactor_means(part.call, nullptr);
    for (Part& part : parts) k.adafactor_norm(part.call, nullptr);
    for (Part& part : parts) k.adafactor_update(part.call, nullptr);
    const auto give = [&](Tensor& from, const std::vector<size_t>& of, Values& to) {
      const Values values = from.values();
      for (size_t i = 0; i < of.size() && !to.empty(); ++i) to[of[i]] = values[i];
    };
    for (Part& part : parts) {
      give(with_master ? part.master : part.weight, part.of, after.weight);
      give(part.squares, part.of, after.squares);
      if (with_master && !keeps) { EXPECT_EQ(part.weight.values(), round_to(type, part.master.values())); }
      if (with_master && keeps) { EXPECT_EQ(part.weight.values(), Values(part.of.size(), 9)); }
    }
    after.rows = row.values(), after.columns = column.values();
  }
};

class AdafactorKernel : public testing::TestWithParam<std::tuple<Type, bool>> {};

TEST_P(AdafactorKernel, IsTheLoop) {
  const auto [type, with_master] = GetParam();
  for (const CutTensor& cut : kCuts) {
    SCOPED_TRACE(testing::Message() << cut.num_rows << " x " << cut.num_columns << " in parts of " << cut.piece);
    const AdafactorStep step(type, with_master, cut);
    Values scaled = step.grads;
    for (double& g : scaled) g *= step.scale;
    const auto expected = reference::adafactor(cut.num_rows, step.before, scaled, 0.3, 0.05, 0.04, 0.1);
    EXPECT_TRUE(near(step.after.rows, expected.rows, 0, kBound));
    EXPECT_TRUE(near(step.after.columns, expected.columns, 0, kBound));
    EXPECT_TRUE(near(step.after.squares, expected.squares, 0, kBound));
    EXPECT_TRUE(near(step.after.weight, expected.weight, with_master || type == Type::kFloat32 ? 0 : 2 * unit(type), kBound));
  }
}
INSTANTIATE_TEST_SUITE_P(Types, AdafactorKernel, testing::Values(std::tuple{Type::kFloat32, false}, std::tuple{Type::kBFloat16, true}, std::tuple{Type::kBFloat16, false}, std::tuple{Type::kFloat16, true}));

// The step in fp32, rounded by the generator of the CPU code: but for what a last bit of the norm turns.
TEST(AdafactorKernel, RoundsByTheBitsOfItsElements) {
  for (const CutTensor& cut : kCuts) {
    const AdafactorStep rounded(Type::kBFloat16, false, cut);
    CutTensor whole = cut;
    whole.slices = {{0, std::max<int64_t>(cut.num_rows, 1), 0, cut.num_columns}}, whole.piece = std::max<int64_t>(cut.num_rows, 1) * cut.num_columns;
    EXPECT_EQ(AdafactorStep(Type::kBFloat16, false, whole).after.weight, rounded.after.weight) << cut.num_rows << " x " << cut.num_columns;
    if (rounded.before.weight.size() > 100) { EXPECT_NE(rounded.after.weight, AdafactorStep(Type::kBFloat16, true, cut).after.weight); }
  }
}

TEST(AdafactorKernel, TakesNoStepWhereTheScaleIsNotFinite) {
  for (float scale : {NAN, INFINITY})
    for (const CutTensor& cut : kCuts) {
      const AdafactorStep step(Type::kBFloat16, true, cut, scale, true);
      EXPECT_EQ(step.after.weight, step.before.weight);
      EXPECT_EQ(step.after.rows, step.before.rows);
      EXPECT_EQ(step.after.columns, step.before.columns);
      EXPECT_EQ(step.after.squares, step.before.squares);
    }
}

TEST(AdafactorKernel, RefusesWhatItDoesNotKnow) {
  Adafactor call{};
  call.type = Type::kFloat16, call.size = 1;
  const auto refusal = [&] {
    try {
      emulated_kernels().adafactor_update(call, nullptr);
    } catch (const Refused& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(refusal(), "adafactor_update: weights in float16 need a master in fp32; bfloat16 does without, by stochastic rounding");
  call.type = Type::kFloat32, call.size = -1, call.num_rows = 2, call.num_columns = 3;
  EXPECT_EQ(refusal(), "adafactor_update of -1 values of 2 x 3");
}

class GradientNormKernel : public testing::TestWithParam<Type> {};

struct Norm {
  double squares;
  float norm, factor;
};
Norm norm_of(Type type, const std::vector<GradientTensor>& tensors, double max_norm) {
  Guarded workspace(gradient_norm_workspace(tensors.data(), static_cast<int64_t>(tensors.size())) * 8);
  const OnDevice<double> squares(NAN);
  const OnDevice<float> norm(NAN), factor(NAN);
  emulated_kernels().gradient_norm({type, tensors.data(), static_cast<int64_t>(tensors.size()), workspace.as<double>(), squares.data(),
                                     {max_norm, 1, norm.data(), factor.data(), false}}, nullptr);
  return {*squares, *norm, *factor};
}

TEST_P(GradientNormKernel, IsTheLoop) {
  const Type type = GetParam();
  std::list<Tensor> grads;
  std::vector<GradientTensor> tensors;
  double expected = 0;
  for (int64_t size : {1, 15, 16, 17, 127, 128, 129, 0, 16384, 16385, 40001}) {
    const Values x = random_values(type, size + 1, static_cast<uint64_t>(size));
    grads.emplace_back(type, x);
    const int64_t skip = size % 2;  // odd ones at an address that is not aligned
    tensors.push_back({size, grads.back().memory.as<char>() + skip * size_of(type)});
    expected += reference::sum_of_squares({x.begin() + skip, x.begin() + skip + size});
  }
  const Norm norm = norm_of(type, tensors, 2.5);
  EXPECT_NEAR(norm.squares, expected, expected * 300 * 0x1p-53);  // a thread adds 64 values, then 8 + 32 + 32 sums
  EXPECT_FLOAT_EQ(norm.norm, static_cast<float>(std::sqrt(expected)));
  EXPECT_FLOAT_EQ(norm.factor, static_cast<float>(2.5 / (std::sqrt(expected) + 1e-6)));
  for (uint64_t seed : {1, 2, 3}) {
    emulated::set_seed(seed);
    EXPECT_EQ(norm_of(type, tensors, 0).squares, norm.squares);
  }
  EXPECT_EQ(norm_of(type, tensors, 0).factor, 1);
  EXPECT_EQ(norm_of(type, tensors, 1e6).factor, 1);

  const OnDevice<double> squares(norm.squares);
  const OnDevice<float> factor(0);
  emulated_kernels().clip_factor({squares.data(), {2.5, 1, nullptr, factor.data(), false}}, nullptr);
  EXPECT_EQ(*factor, norm.factor);
}
INSTANTIATE_TEST_SUITE_P(Types, GradientNormKernel, testing::Values(Type::kFloat32, Type::kBFloat16, Type::kFloat16));

TEST(ClipFactorKernel, IsOfScaledGradients) {
  const OnDevice<double> squares(36);
  const OnDevice<float> norm(0), factor(0);
  const auto factor_of = [&](double max_norm, double scale) {
    emulated_kernels().clip_factor({squares.data(), {max_norm, scale, norm.data(), factor.data(), false}}, nullptr);
    return *factor;
  };
  EXPECT_FLOAT_EQ(factor_of(2, 0.5), static_cast<float>(0.5 * 2 / (3 + 1e-6)));
  EXPECT_EQ(*norm, 3);
  EXPECT_EQ(factor_of(4, 0.5), 0.5f);
  EXPECT_EQ(factor_of(0, 0.25), 0.25f);
  EXPECT_EQ(*norm, 1.5f);
}

TEST(ClipFactorKernel, HoldsWhatIsNoNumber) {
  const OnDevice<double> squares(4);
  const OnDevice<float> norm(0), factor(5);
  const auto run = [&](bool hold) { emulated_kernels().clip_factor({squares.data(), {0, 1, norm.data(), factor.data(), hold}}, nullptr); };
  run(true);
  EXPECT_EQ(*factor, 1);
  *squares = INFINITY;
  run(true);
  EXPECT_TRUE(std::isnan(*factor));
  *squares = 9;
  run(true);
  EXPECT_TRUE(std::isnan(*factor));
  EXPECT_EQ(*norm, 3);
  run(false);
  EXPECT_EQ(*factor, 1);
}

TEST(GradientNormKernel, ShowsWhatIsNotFinite) {
  for (double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY), -static_cast<double>(INFINITY)}) {
    Values x(20000, 1);
    x[16999] = bad;
    Tensor grad(Type::kFloat32, x);
    const Norm norm = norm_of(Type::kFloat32, {{20000, grad.data()}}, 1);
    EXPECT_FALSE(std::isfinite(norm.squares));
    EXPECT_FALSE(std::isfinite(norm.norm));
    EXPECT_TRUE(std::isnan(norm.factor));
  }
  Tensor large(Type::kFloat32, Values(3, 3e38));  // whose squares are beyond fp32
  EXPECT_FLOAT_EQ(norm_of(Type::kFloat32, {{3, large.data()}}, 1).factor, static_cast<float>(1 / (std::sqrt(3.0) * 3e38)));
}

TEST(GradientNormKernel, TakesAnyNumberOfTensors) {
  EXPECT_EQ(norm_of(Type::kFloat32, {}, 1).squares, 0);
  Tensor grad(Type::kFloat32, Values(1, 2));
  EXPECT_EQ(norm_of(Type::kFloat32, std::vector<GradientTensor>(1700, {1, grad.data()}), 1).squares, 6800);
}

TEST(GradientNormKernel, RefusesSizesThatAreNone) {
  EXPECT_THROW(norm_of(Type::kFloat32, {{-1, nullptr}}, 1), Refused);
}

}  // namespace
}  // namespace trireme::kernels
