// The dynamic 8-bit map: its numbers by their rule, codes and values by the rules written as plain loops.
#include <cmath>

#include "base/check.h"
#include "kernels/reference/quantize.h"
#include "quant/dynamic_map.h"
#include "quant/quant_loops.h"
#include "quant_values.h"
#include "support.h"

namespace trireme {
namespace {

namespace reference = kernels::reference;
using test::same_bits;

// linspace(0.1, 1, count) in fp32, as torch on processors that multiply and add at once: from the first number in the lower half, from
// the last in the upper.
std::vector<float> linspace(int64_t count) {
  const float step = (1.0f - 0.1f) / static_cast<float>(count - 1);
  std::vector<float> out;
  for (int64_t i = 0; i < count; ++i)
    out.push_back(i < count / 2 ? std::fma(step, static_cast<float>(i), 0.1f) : std::fma(-step, static_cast<float>(count - 1 - i), 1.0f));
  return out;
}

TEST(DynamicMap, NumbersOfTheRule) {
  for (bool is_signed : {true, false}) {
    std::vector<float> numbers = {0, 1};
    for (int i = 0; i < 7; ++i) {
      const std::vector<float> bounds = linspace((int64_t{1} << (is_signed ? i : i + 1)) + 1);
      for (size_t j = 0; j + 1 < bounds.size(); ++j) {
        const float number = (bounds[j] + bounds[j + 1]) / 2 * static_cast<float>(std::pow(10.0, i - 6));
        numbers.push_back(number);
        if (is_signed) numbers.push_back(-number);
      }
    }
    std::sort(numbers.begin(), numbers.end());
    EXPECT_TRUE(same_bits(dynamic_map(is_signed), at::tensor(numbers))) << is_signed;
  }
  const at::Tensor map = dynamic_map(true);
  EXPECT_EQ(map[127].item<float>(), 0);
  EXPECT_FLOAT_EQ(map[0].item<float>(), -0.99296874f);
  EXPECT_FLOAT_EQ(map[128].item<float>(), 5.5e-7f);
  EXPECT_FLOAT_EQ(dynamic_map(false)[1].item<float>(), 3.25e-7f);
}

// Around each number and each midpoint between two, where the codes change.
TEST(DynamicMap, CodesAtTheirBounds) {
  for (bool is_signed : {true, false}) {
    const at::Tensor map = dynamic_map(is_signed);
    const float* numbers = map.data_ptr<float>();
    const DynamicSearch search(numbers);
    std::vector<float> all = {0.0f, -0.0f, NAN, INFINITY, -INFINITY, 2, -2, 1e-30f, -1e-30f};
    const auto around = [&](float x) {
      for (float y : {x, std::nextafter(x, 9.0f), std::nextafter(x, -9.0f)}) all.push_back(y), all.push_back(-y);
    };
    for (int i = 0; i < 256; ++i) {
      around(numbers[i]);
      if (i < 255) around((numbers[i] + numbers[i + 1]) * 0.5f);
    }
    for (float x : all) EXPECT_EQ(search.code(x), reference::map_code(numbers, x)) << x;
    for (int i = 0; i < 256; ++i) EXPECT_EQ(search.code(numbers[i]), i);
    EXPECT_EQ(search.most, 1);
    all.insert(all.begin(), 1.0f);
    std::erase_if(all, [](float x) { return std::abs(x) > 1; });  // in a block of scale 1
    const int64_t count = static_cast<int64_t>(all.size());
    for (int level = 0; level < test::num_vector_levels(); ++level) {
      std::vector<uint8_t> codes(all.size());
      float absmax = 0;
      quant_loops<float>(level).quantize_blockwise(search, count, 4096, all.data(), codes.data(), &absmax);
      EXPECT_EQ(absmax, 1);
      for (size_t i = 0; i < all.size(); ++i) EXPECT_EQ(codes[i], reference::map_code(numbers, all[i])) << all[i] << " " << level;
    }
  }
}

BlockCodes by_rule(const at::Tensor& x, const at::Tensor& map, int64_t size) {
  const at::Tensor values = x.to(at::kFloat).flatten();
  const auto q = reference::quantize_blocks(map.data_ptr<float>(), {values.data_ptr<float>(), values.data_ptr<float>() + values.numel()}, 0, size);
  return {at::tensor(q.codes, at::kByte), at::tensor(q.absmax)};
}

at::Tensor settled(const at::Tensor& x) { return at::where(x.isnan(), at::full({}, NAN, x.options()), x); }  // which NaN is no rule's

// Not only the dynamic maps: one that has many numbers in a cell.
TEST(DynamicMap, AnyMapIsSearched) {
  std::vector<float> numbers;
  for (int i = 0; i < 256; ++i) numbers.push_back(0.5f + static_cast<float>(i) * 1e-4f);
  const DynamicSearch search(numbers.data());
  EXPECT_GT(search.most, 10);
  for (float x = -0.1f; x < 0.7f; x += 1.7e-5f) EXPECT_EQ(search.code(x), reference::map_code(numbers.data(), x)) << x;
  for (float x : {INFINITY, -INFINITY, NAN, 0.0f, -0.0f}) EXPECT_EQ(search.code(x), reference::map_code(numbers.data(), x)) << x;
}

TEST(Blockwise, BitsOfTheRules) {
  for (bool is_signed : {true, false})
    for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf})
      for (int64_t size = 32; size <= 4096; size *= 2)
        for (int64_t count : {int64_t{1}, size - 1, size, 3 * size + 17}) {
          const at::Tensor map = dynamic_map(is_signed);
          for (const auto& [name, values] : test::unusual_values(count, size)) {
            SCOPED_TRACE(testing::Message() << name << " " << is_signed << " " << dtype << ", " << count << " in blocks of " << size);
            const at::Tensor x = (is_signed ? values : values * values).to(dtype);
            const BlockCodes q = quantize_blockwise(x, map, size), expected = by_rule(x, map, size);
            ASSERT_TRUE(same_bits(q.absmax, expected.absmax));
            ASSERT_TRUE(same_bits(q.codes, expected.codes));
            const at::Tensor out = at::empty({count}, x.options());
            dequantize_blockwise(q, map, size, out);
            const at::Tensor by_block = q.absmax.repeat_interleave(size).slice(0, 0, count);
            ASSERT_TRUE(same_bits(settled(out), settled((map.index_select(0, q.codes.to(at::kLong)) * by_block).to(dtype))));
          }
        }
}

TEST(Blockwise, EveryInstructionSetHasTheSameBits) {
  const int64_t count = 256 * 5 + 45, size = 256;
  for (bool is_signed : {true, false})
    for (const auto& [name, values] : test::unusual_values(count, size)) {
      const at::Tensor map = dynamic_map(is_signed), x = values.to(at::kBFloat16);
      const BlockCodes expected = by_rule(x, map, size);
      at::Tensor wanted = at::empty({count}, x.options());
      dequantize_blockwise(expected, map, size, wanted);
      for (int level = 0; level < test::num_vector_levels(); ++level) {
        SCOPED_TRACE(testing::Message() << name << " " << is_signed << " " << level);
        const auto& loops = quant_loops<c10::BFloat16>(level);
        const BlockCodes q{at::empty({count}, at::kByte), at::empty({6}, at::kFloat)};
        loops.quantize_blockwise(DynamicSearch(map.data_ptr<float>()), count, size, x.data_ptr<c10::BFloat16>(), q.codes.data_ptr<uint8_t>(), q.absmax.data_ptr<float>());
        EXPECT_TRUE(same_bits(q.codes, expected.codes));
        EXPECT_TRUE(same_bits(q.absmax, expected.absmax));
        at::Tensor out = at::empty({count}, x.options());
        loops.dequantize_blockwise(map.data_ptr<float>(), count, size, q.codes.data_ptr<uint8_t>(), q.absmax.data_ptr<float>(), out.data_ptr<c10::BFloat16>());
        EXPECT_TRUE(same_bits(settled(out), settled(wanted)));
      }
    }
}

TEST(Blockwise, RefusesWhatItDoesNotKnow) {
  const at::Tensor x = at::ones({300}), map = dynamic_map(true);
  EXPECT_THROW(quantize_blockwise(x, map, 100), InternalError);
  EXPECT_THROW(quantize_blockwise(x.to(at::kDouble), map, 256), InternalError);
  EXPECT_THROW(quantize_blockwise(x, map.slice(0, 0, 128), 256), InternalError);
  const BlockCodes q = quantize_blockwise(x, map, 256);
  EXPECT_THROW(dequantize_blockwise(q, map, 128, at::empty({300})), InternalError);
  EXPECT_THROW(dequantize_blockwise(q, map, 256, at::empty({299})), InternalError);
  EXPECT_THROW(dequantize_blockwise(q, map, 256, at::empty({300}, at::kLong)), InternalError);
}

}  // namespace
}  // namespace trireme
