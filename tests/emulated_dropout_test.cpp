// Dropout, emulated, against its definition with the generator of the CPU code.
#include "emulated.h"
#include "src/base/random.h"

namespace trireme::kernels {
namespace {

using namespace test;

constexpr uint64_t kSeed = 77, kModule = 5;
constexpr double kP = 0.3;

Values expected(const Values& x, const Values& before, int64_t width, const std::vector<int64_t>& row_ids, int64_t first) {
  Values y = before;
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t row = i / static_cast<size_t>(width);
    const uint64_t c = static_cast<uint64_t>(first) + i % static_cast<size_t>(width);
    const auto words = philox(kSeed ^ static_cast<uint64_t>(RandomStream::kDropout) << 56, static_cast<uint64_t>(row_ids[row]), kModule << 32 | (c / 64 * 16 + c % 16));
    y[i] += words[c / 16 % 4] < static_cast<uint32_t>(kP * 4294967296.0) ? 0 : x[i] / (1 - kP);
  }
  return y;
}

std::vector<int64_t> ids(int64_t rows) {
  std::vector<int64_t> out;
  for (int64_t i = 0; i < rows; ++i) out.push_back(static_cast<int64_t>(0x9E3779B97F4A7C15ull * static_cast<uint64_t>(i + 1)));
  return out;
}

struct Case {
  Type type;
  int64_t num_rows, width, first, skip;  // x and y begin `skip` elements later than they are aligned
};
void PrintTo(const Case& c, std::ostream* out) { *out << name_of(c.type) << " " << c.num_rows << " x " << c.width << " from " << c.first << ", " << c.skip << " later"; }

class DropoutKernel : public testing::TestWithParam<Case> {};

TEST_P(DropoutKernel, IsItsDefinition) {
  const auto [type, rows, width, first, skip] = GetParam();
  const int64_t size = rows * width;
  const std::vector<int64_t> row_ids = ids(rows);
  const OnDevice<int64_t> device_ids(row_ids);
  const Values x = random_values(type, skip + size, 1), old = random_values(type, skip + size, 2), values(x.begin() + skip, x.end());
  for (bool add : {false, true}) {
    Tensor in(type, x), out(type, old);
    auto at = [&](Tensor& t) { return t.memory.as<char>() + skip * size_of(type); };
    emulated_kernels().dropout({type, rows, width, at(in), device_ids.data(), kSeed, kModule, first, kP, add, at(out)}, nullptr);
    const Values y = out.values();
    EXPECT_EQ(Values(y.begin(), y.begin() + skip), Values(old.begin(), old.begin() + skip));
    const Values before = add ? Values(old.begin() + skip, old.end()) : Values(static_cast<size_t>(size));
    // One rounding to the type; scale, product and sum each one to fp32, of numbers below 16.
    EXPECT_TRUE(near({y.begin() + skip, y.end()}, expected(values, before, width, row_ids, first), unit(type), 16 * 0x1p-22));
    emulated_kernels().dropout({type, rows, width, at(in), device_ids.data(), kSeed, kModule, first, kP, false, at(in)}, nullptr);
    if (!add) {
      EXPECT_EQ(in.values(), [&] { Values both = x; std::copy(y.begin() + skip, y.end(), both.begin() + skip); return both; }());  // in place
    }
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (Type type : {Type::kFloat32, Type::kBFloat16, Type::kFloat16})
    for (const auto& [rows, width, first, skip] : std::vector<std::array<int64_t, 4>>{
             {1, 1, 0, 0}, {3, 15, 0, 0}, {2, 16, 0, 0}, {5, 17, 0, 0}, {2, 127, 0, 0}, {17, 128, 0, 0}, {3, 129, 0, 0}, {3, 128, 0, 1}, {4, 64, 72, 0}, {4, 48, 35, 0}, {2, 1, 191, 3}})
      all.push_back({type, rows, width, first, skip});
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, DropoutKernel, testing::ValuesIn(cases()));

TEST(DropoutKernel, GivesSlicesOfTheWholesMask) {
  const Values ones(3 * 256, 1);
  const OnDevice<int64_t> row_ids(ids(3));
  Tensor x(Type::kBFloat16, ones), whole(Type::kBFloat16, 3 * 256), part(Type::kBFloat16, 3 * 104);
  auto run = [&](int64_t width, int64_t first, Tensor& y) {
    emulated_kernels().dropout({Type::kBFloat16, 3, width, x.data(), row_ids.data(), kSeed, kModule, first, 0.5, false, y.data()}, nullptr);
  };
  run(256, 0, whole);
  run(104, 88, part);
  const Values all = whole.values(), some = part.values();
  for (size_t row = 0; row < 3; ++row)
    for (size_t c = 0; c < 104; ++c) ASSERT_EQ(some[row * 104 + c], all[row * 256 + 88 + c]) << row << " " << c;
}

TEST(DropoutKernel, KeepsAllWhereNothingIsDropped) {
  const Values x = random_values(Type::kFloat16, 130, 1);
  const OnDevice<int64_t> row_ids(ids(2));
  Tensor in(Type::kFloat16, x), out(Type::kFloat16, 130);
  emulated_kernels().dropout({Type::kFloat16, 2, 65, in.data(), row_ids.data(), 1, 2, 0, 0, false, out.data()}, nullptr);
  EXPECT_EQ(out.values(), x);
  emulated_kernels().dropout({Type::kFloat16, 0, 65, nullptr, nullptr, 1, 2, 0, 0.1, false, nullptr}, nullptr);
}

TEST(DropoutKernel, RefusesProbabilitiesThatAreNone) {
  for (double p : {1.0, -0.1, static_cast<double>(NAN)})
    EXPECT_THROW(emulated_kernels().dropout({Type::kFloat32, 1, 8, nullptr, nullptr, 1, 2, 0, p, false, nullptr}, nullptr), Refused) << p;
}

}  // namespace
}  // namespace trireme::kernels
