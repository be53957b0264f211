// Integers of 8 and 4 bits with scales and zero points: the worked examples, and the bits of the rules.
#include "quant/affine.h"

#include "base/check.h"
#include "kernels/reference/quantize.h"
#include "quant_values.h"
#include "support.h"

namespace trireme {
namespace {

namespace reference = kernels::reference;
using test::same_bits;

const std::vector<AffineFormat> kFormats = {{8, false}, {8, true}, {4, false}, {4, true}};
const std::vector<at::ScalarType> kDtypes = {at::kFloat, at::kBFloat16, at::kHalf};

std::vector<float> floats(const at::Tensor& any) {
  const at::Tensor t = any.to(at::kFloat).contiguous();
  return {t.data_ptr<float>(), t.data_ptr<float>() + t.numel()};
}
at::Tensor settled(const at::Tensor& x) { return at::where(x.isnan(), at::full({}, NAN, x.options()), x); }  // which NaN is no rule's

at::Tensor values_of(const AffineTensor& q, at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
  const at::Tensor out = at::empty(sizes, at::TensorOptions(dtype));
  dequantize_affine(q, out);
  return out;
}

// Labonne 2023, "Introduction to Weight Quantization".
TEST(Affine, WorkedExampleOfAbsmax) {
  const AffineTensor q = quantize_affine(at::tensor({-3.2f, 0.1f, 3.2f, 0.0f}), {8, false});
  EXPECT_TRUE(q.codes.equal(at::tensor({-127, 4, 127, 0}, at::kChar)));
  EXPECT_NEAR(values_of(q, {4})[1].item<float>(), 0.1008, 5e-5);
  EXPECT_FALSE(q.zero.defined());
}
TEST(Affine, WorkedExampleOfAZeroPoint) {
  const AffineTensor q = quantize_affine(at::tensor({-3.0f, 0.1f, 3.2f, 0.0f}), {8, true});
  EXPECT_EQ(q.zero.item<int>(), -5);
  EXPECT_TRUE(q.codes.equal(at::tensor({-128, -1, 127, -5}, at::kChar)));
  EXPECT_NEAR(values_of(q, {4})[1].item<float>(), 0.0973, 5e-5);
  EXPECT_EQ(values_of(q, {4})[3].item<float>(), 0);
}
TEST(Affine, FourBitsInOneWord) {
  const AffineTensor q = quantize_affine(at::arange(16, at::kFloat), {4, true});
  EXPECT_EQ(q.zero.item<int>(), 0);
  EXPECT_EQ(q.scale.item<float>(), 1);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(q.codes.data_ptr());
  EXPECT_EQ(words[0], 0x76543210u);
  EXPECT_EQ(words[1], 0xfedcba98u);
}

TEST(Affine, BitsOfTheRules) {
  for (const AffineFormat& format : kFormats)
    for (at::ScalarType dtype : kDtypes)
      for (const auto& [size, count] : std::vector<std::pair<int64_t, int64_t>>{{32, 1}, {32, 1000}, {64, 64}, {128, 1300}, {50, 207}, {0, 1}, {0, 4099}, {1000, 4000}})
        for (const auto& [name, centred] : test::unusual_values(count, size == 0 ? count : size)) {
          SCOPED_TRACE(testing::Message() << name << " " << dtype << " " << format.bits << " bits, zero point " << format.zero_point << ", " << count << " in groups of " << size);
          const at::Tensor x = (format.zero_point ? centred + 0.25 : centred).to(dtype);
          const int64_t group = size == 0 ? count : size;
          const auto expected = reference::quantize_groups(format, floats(x), group);
          const AffineTensor q = quantize_affine(x, format, size);
          const std::vector<uint8_t> bytes = reference::packed(format, expected.codes);
          ASSERT_EQ(q.codes.numel(), static_cast<int64_t>(bytes.size()));
          ASSERT_EQ(std::memcmp(q.codes.data_ptr(), bytes.data(), bytes.size()), 0);
          ASSERT_TRUE(same_bits(q.scale, at::tensor(expected.scale)));
          if (format.zero_point) { ASSERT_TRUE(q.zero.to(at::kInt).equal(at::tensor(expected.zero, at::kInt))); }
          ASSERT_TRUE(same_bits(settled(values_of(q, {count}, dtype)), settled(at::tensor(reference::dequantize_groups(expected, group)).to(dtype))));
        }
}

// A tensor of more values than a thread takes at once.
TEST(Affine, OneGroupOfManyPieces) {
  const at::Tensor x = test::gaussian(200001, 3);
  x[150000] = 7.5, x[7] = -9;
  for (const AffineFormat& format : kFormats) {
    const AffineTensor q = quantize_affine(x, format);
    const auto expected = reference::quantize_groups(format, floats(x), x.numel());
    EXPECT_TRUE(same_bits(q.scale, at::tensor(expected.scale)));
    EXPECT_TRUE(same_bits(values_of(q, {200001}), at::tensor(reference::dequantize_groups(expected, x.numel()))));
  }
}

TEST(Affine, EveryInstructionSetHasTheSameBits) {
  const int64_t count = 1003;
  for (const AffineFormat& format : kFormats)
    for (const auto& [name, values] : test::unusual_values(count, count)) {
      const at::Tensor x = values.to(at::kBFloat16);
      const auto expected = reference::quantize_groups(format, floats(x), count);
      const std::vector<uint8_t> bytes = reference::packed(format, expected.codes);
      for (int level = 0; level < test::num_vector_levels(); ++level) {
        SCOPED_TRACE(testing::Message() << name << " " << format.bits << " " << format.zero_point << " " << level);
        const auto& loops = quant_loops<c10::BFloat16>(level);
        const AffineGroup group = affine_group(format, loops.extent(count, x.data_ptr<c10::BFloat16>()));
        std::vector<uint8_t> codes(bytes.size());
        loops.quantize_affine(format, group, count, x.data_ptr<c10::BFloat16>(), codes.data());
        EXPECT_EQ(codes, bytes);
        at::Tensor y = at::empty({count}, at::kBFloat16);
        loops.dequantize_affine(format, group.scale, group.zero, count, codes.data(), y.data_ptr<c10::BFloat16>());
        EXPECT_TRUE(same_bits(settled(y), settled(at::tensor(reference::dequantize_groups(expected, count)).to(at::kBFloat16))));
      }
    }
}

// By row, where a row of large values does not coarsen the others.
TEST(Affine, RowsHaveScalesOfTheirOwn) {
  at::Tensor x = test::gaussian(4 * 100, 9).view({4, 100});
  x[2] *= 1000;
  const at::Tensor rows = values_of(quantize_affine(x, {8, false}, 100), {4, 100}), whole = values_of(quantize_affine(x, {8, false}), {4, 100});
  EXPECT_LT((rows - x).abs().slice(0, 0, 2).max().item<float>(), 0.02);
  EXPECT_GT((whole - x).abs().slice(0, 0, 2).max().item<float>(), 1);
}

TEST(Affine, RefusesWhatItDoesNotKnow) {
  const at::Tensor x = at::ones({64});
  EXPECT_THROW(quantize_affine(x, {5, false}), InternalError);
  EXPECT_THROW(quantize_affine(x, {4, false}, 7), InternalError);
  EXPECT_THROW(quantize_affine(x, {8, false}, -1), InternalError);
  EXPECT_THROW(quantize_affine(x.to(at::kDouble), {8, false}), InternalError);
  const AffineTensor q = quantize_affine(x, {8, true}, 32);
  EXPECT_THROW(dequantize_affine(q, at::empty({63})), InternalError);
  AffineTensor without = q;
  without.zero = at::Tensor();
  EXPECT_THROW(dequantize_affine(without, at::empty({64})), InternalError);
}

}  // namespace
}  // namespace trireme
