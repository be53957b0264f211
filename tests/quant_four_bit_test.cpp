// NF4, FP4 and their scales in 8 bits: the bits are those of the rules written as plain loops.
#include <cmath>

#include "base/check.h"
#include "kernels/reference/quantize.h"
#include "quant/dynamic_map.h"
#include "quant/four_bit.h"
#include "quant/quant_loops.h"
#include "quant_values.h"
#include "support.h"

namespace trireme {
namespace {

using test::same_bits;

namespace reference = kernels::reference;

std::vector<float> floats(const at::Tensor& any) {
  const at::Tensor t = any.to(at::kFloat).flatten().contiguous();
  return {t.data_ptr<float>(), t.data_ptr<float>() + t.numel()};
}
at::Tensor bytes(const std::vector<uint8_t>& values) { return at::tensor(values, at::kByte); }

FourBitTensor by_rule(const at::Tensor& x, FourBit kind, int64_t size) {
  const auto q = reference::quantize_4(kind, floats(x), size);
  return {kind, size, bytes(q.codes), {.absmax = at::tensor(q.absmax)}};
}

at::Tensor values_by_rule(const FourBitTensor& q, const std::vector<float>& scales, int64_t count, at::ScalarType dtype) {
  const std::vector<uint8_t> codes(q.codes.data_ptr<uint8_t>(), q.codes.data_ptr<uint8_t>() + q.codes.numel());
  return at::tensor(reference::dequantize_4(q.kind, codes, scales, count, q.block_size)).to(dtype);
}

// Every NaN the same: which of them an instruction gives is not part of any rule.
at::Tensor settled(const at::Tensor& x) { return at::where(x.isnan(), at::full({}, NAN, x.options()), x); }

const std::vector<at::ScalarType> kDtypes = {at::kFloat, at::kBFloat16, at::kHalf};

TEST(FourBit, BitsOfTheRules) {
  for (FourBit kind : {FourBit::kNf4, FourBit::kFp4})
    for (at::ScalarType dtype : kDtypes)
      for (int64_t size = 32; size <= 4096; size *= 2)
        for (int64_t count : {int64_t{1}, int64_t{33}, size - 1, size, size + 1, 3 * size + 2, 5 * size + 31}) {
          SCOPED_TRACE(testing::Message() << (kind == FourBit::kNf4 ? "nf4 " : "fp4 ") << dtype << ", " << count << " in blocks of " << size);
          for (const auto& [name, values] : test::unusual_values(count, size)) {
            SCOPED_TRACE(name);
            const at::Tensor x = values.to(dtype);
            const FourBitTensor q = quantize_4bit(x, kind, size), expected = by_rule(x, kind, size);
            ASSERT_TRUE(same_bits(q.scales.absmax, expected.scales.absmax));
            ASSERT_TRUE(same_bits(q.codes, expected.codes));
            const at::Tensor out = at::full({count}, 7, at::TensorOptions(dtype));
            dequantize_4bit(q, out);
            ASSERT_TRUE(same_bits(settled(out), settled(values_by_rule(q, floats(q.scales.absmax), count, dtype))));
          }
        }
}

// A tie is the code below, in FP4 that of the smaller magnitude; the next number is the one above.
TEST(FourBit, CodesAtTheThresholds) {
  const std::vector<float> nf4 = {-0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
                                  -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f,
                                  0.2920137718319893f, 0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f};
  const std::vector<float> fp4 = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f};
  const std::vector<int> order = {0, 1, 6, 7, 4, 5, 2, 3};  // FP4's codes by magnitude
  const auto code = [](FourBit kind, float x) { return quantize_4bit(at::tensor({x, 1.0f}), kind, 32).codes[0].item<int>() >> 4; };  // in a block of scale 1
  for (size_t i = 0; i < nf4.size(); ++i) {
    EXPECT_EQ(code(FourBit::kNf4, nf4[i]), static_cast<int>(i));
    EXPECT_EQ(code(FourBit::kNf4, std::nextafter(nf4[i], 2.0f)), static_cast<int>(i) + 1);
  }
  for (size_t i = 0; i < fp4.size(); ++i)
    for (int sign : {0, 8}) {
      const float way = sign == 0 ? 1.0f : -1.0f;
      EXPECT_EQ(code(FourBit::kFp4, way * fp4[i]), sign + order[i]);
      EXPECT_EQ(code(FourBit::kFp4, way * std::nextafter(fp4[i], 2.0f)), sign + order[i + 1]);
    }
  EXPECT_EQ(code(FourBit::kFp4, -0.0f), 0);
  EXPECT_EQ(code(FourBit::kFp4, -1e-30f), 8);
}

TEST(FourBit, EveryInstructionSetHasTheSameBits) {
  const int64_t count = 64 * 9 + 45, size = 64;
  for (const auto& [name, values] : test::unusual_values(count, size))
    for (FourBit kind : {FourBit::kNf4, FourBit::kFp4})
      for (at::ScalarType dtype : kDtypes) {
        SCOPED_TRACE(testing::Message() << name << " " << dtype);
        const at::Tensor x = values.to(dtype);
        const FourBitTensor expected = quantize_4bit(x, kind, size);
        const BlockScales nested = double_quantized(expected.scales);
        at::Tensor plain_values = at::empty({count}, x.options()), nested_values = at::empty({count}, x.options());
        dequantize_4bit(expected, plain_values);
        FourBitTensor doubled = expected;
        doubled.scales = nested;
        dequantize_4bit(doubled, nested_values);
        for (int level = 0; level < test::num_vector_levels(); ++level)
          with_quant_loops(dtype, [&](const auto&, auto zero) {
            using T = decltype(zero);
            const QuantLoops<T>& loops = quant_loops<T>(level);
            FourBitTensor q = by_rule(x, kind, size);
            q.codes.fill_(0xaa), q.scales.absmax.fill_(3);
            loops.quantize_4bit(kind, count, size, x.data_ptr<T>(), q.codes.data_ptr<uint8_t>(), q.scales.absmax.data_ptr<float>());
            EXPECT_TRUE(same_bits(q.codes, expected.codes)) << level;
            EXPECT_TRUE(same_bits(q.scales.absmax, expected.scales.absmax)) << level;
            at::Tensor out = at::empty({count}, x.options());
            loops.dequantize_4bit(kind, scales_of(expected.scales, (count + size - 1) / size, x), 0, count, size, q.codes.data_ptr<uint8_t>(), out.data_ptr<T>());
            EXPECT_TRUE(same_bits(settled(out), settled(plain_values))) << level;
            loops.dequantize_4bit(kind, scales_of(nested, (count + size - 1) / size, x), 0, count, size, q.codes.data_ptr<uint8_t>(), out.data_ptr<T>());
            EXPECT_TRUE(same_bits(settled(out), settled(nested_values))) << level;
          });
      }
}

TEST(FourBit, DoubleQuantizationIsTheRule) {
  const at::Tensor x = test::gaussian(64 * 1500 + 3, 5).to(at::kBFloat16);
  FourBitTensor q = quantize_4bit(x, FourBit::kNf4, 64);
  const std::vector<float> plain = floats(q.scales.absmax);
  double sum = 0;
  for (float s : plain) sum += static_cast<double>(s);
  const float offset = static_cast<float>(sum / static_cast<double>(plain.size()));
  q.scales = double_quantized(q.scales);
  EXPECT_EQ(q.scales.offset.item<float>(), offset);
  EXPECT_EQ(q.scales.absmax.scalar_type(), at::kByte);
  EXPECT_EQ(q.scales.nested_absmax.numel(), 6);
  const at::Tensor map = dynamic_map(true);
  const auto codes = reference::quantize_blocks(map.data_ptr<float>(), plain, offset, 256);
  EXPECT_TRUE(same_bits(q.scales.absmax, bytes(codes.codes)));
  EXPECT_TRUE(same_bits(q.scales.nested_absmax, at::tensor(codes.absmax)));
  const auto back = reference::nested_scales(codes.codes, codes.absmax, map.data_ptr<float>(), 256, offset, {});
  EXPECT_TRUE(same_bits(plain_scales(q.scales), at::tensor(back)));
  for (at::ScalarType dtype : kDtypes) {
    const at::Tensor out = at::empty(x.sizes(), at::TensorOptions(dtype));
    dequantize_4bit(q, out);
    EXPECT_TRUE(same_bits(out, values_by_rule(q, back, x.numel(), dtype)));
  }
}

// A slice has the values of the whole, by rows and by columns, with plain and nested scales.
TEST(FourBit, ASliceHasTheValuesOfTheWhole) {
  const int64_t rows = 48, columns = 1024;
  const at::Tensor w = test::gaussian(rows * columns, 6).view({rows, columns});
  for (int64_t size : {32, 64, 256})
    for (bool nested : {false, true}) {
      FourBitTensor q = quantize_4bit(w, FourBit::kNf4, size);
      if (nested) q.scales = double_quantized(q.scales);
      const at::Tensor whole = at::empty({rows, columns}, at::kFloat);
      dequantize_4bit(q, whole);
      for (int64_t dim : {0, 1})
        for (int64_t part = 0; part < 4; ++part) {
          SCOPED_TRACE(testing::Message() << size << " " << nested << " " << dim << " " << part);
          const int64_t length = (dim == 0 ? rows : columns) / 4;
          const at::Tensor expected = whole.slice(dim, part * length, (part + 1) * length).contiguous(), out = at::empty(expected.sizes(), at::kFloat);
          const FourBitTensor slice = test::slice_4bit(q, rows, columns, dim, part * length, (part + 1) * length);
          dequantize_4bit(slice, out);
          EXPECT_TRUE(same_bits(out, expected));
          EXPECT_EQ(slice.scales.nested_absmax.defined() ? slice.scales.nested_absmax.data_ptr() : nullptr, nested ? q.scales.nested_absmax.data_ptr() : nullptr);
        }
    }
  EXPECT_TRUE(four_bit_slice_fits(rows, columns, 1, 512, 1024, 512));
  EXPECT_FALSE(four_bit_slice_fits(rows, columns, 1, 256, 512, 512));
  EXPECT_FALSE(four_bit_slice_fits(3, 100, 0, 1, 2, 32));
  EXPECT_TRUE(four_bit_slice_fits(3, 96, 0, 1, 3, 32));
}

TEST(FourBit, ZerosComeBack) {
  for (FourBit kind : {FourBit::kNf4, FourBit::kFp4}) {
    const FourBitTensor q = quantize_4bit(at::zeros({128}), kind, 64);
    EXPECT_EQ(q.scales.absmax.abs().sum().item<float>(), 0);
    EXPECT_EQ(q.codes.sum().item<int64_t>(), 0);
    const at::Tensor out = at::ones({128});
    dequantize_4bit(q, out);
    EXPECT_EQ(out.abs().sum().item<float>(), 0);
  }
}

TEST(FourBit, RefusesWhatItDoesNotKnow) {
  const at::Tensor w = at::ones({128});
  for (int64_t size : {0, 16, 48, 8192, -64}) EXPECT_THROW(quantize_4bit(w, FourBit::kNf4, size), InternalError) << size;
  EXPECT_THROW(quantize_4bit(w.to(at::kDouble), FourBit::kNf4, 64), InternalError);
  EXPECT_THROW(quantize_4bit(w.to(at::kLong), FourBit::kNf4, 64), InternalError);
  const FourBitTensor q = quantize_4bit(w, FourBit::kNf4, 64);
  EXPECT_THROW(dequantize_4bit(q, at::empty({130})), InternalError);
  EXPECT_THROW(dequantize_4bit(q, at::empty({192})), InternalError);
  EXPECT_THROW(dequantize_4bit(q, at::empty({128}, at::kDouble)), InternalError);
  EXPECT_THROW(dequantize_4bit(q, at::empty({16, 16}).slice(1, 0, 8)), InternalError);
  FourBitTensor few = q;
  few.scales.absmax = q.scales.absmax.slice(0, 0, 1);
  EXPECT_THROW(dequantize_4bit(few, at::empty({128})), InternalError);
  few.scales = double_quantized(q.scales);
  few.scales.slice.first = 255;  // of which the second has no nested scale
  EXPECT_THROW(dequantize_4bit(few, at::empty({128})), InternalError);
  EXPECT_THROW(double_quantized(few.scales), InternalError);
}

TEST(BlockScales, WrongOnesAreNamed) {
  BlockScales scales{.absmax = at::ones({5})};
  EXPECT_EQ(check_scales(scales), "");
  const auto with = [&](int64_t i, float x) {
    BlockScales wrong = scales;
    wrong.absmax = scales.absmax.clone();
    wrong.absmax[i] = x;
    return check_scales(wrong);
  };
  EXPECT_EQ(with(3, NAN), "scale 3 is NaN");
  EXPECT_EQ(with(0, INFINITY), "scale 0 is infinite");
  EXPECT_EQ(with(4, -INFINITY), "scale 4 is infinite");
  EXPECT_EQ(with(2, -0.5), "scale 2 is negative (-0.5)");
  EXPECT_EQ(with(2, -0.0), "");

  const BlockScales nested = double_quantized({.absmax = at::linspace(0, 1, 600)});
  EXPECT_EQ(check_scales(nested), "");
  BlockScales wrong = nested;
  wrong.offset = at::full({}, NAN);
  EXPECT_EQ(check_scales(wrong), "its nested offset is nan");
  wrong = nested, wrong.nested_absmax = -nested.nested_absmax;
  EXPECT_EQ(check_scales(wrong).substr(0, 28), "nested scale 0 is negative (");
  wrong = nested, wrong.nested_map = nested.nested_map.clone(), wrong.nested_map[17] = NAN;
  EXPECT_EQ(check_scales(wrong), "number of the nested map 17 is NaN");
  wrong = nested, wrong.absmax = nested.absmax.clone(), wrong.nested_absmax = nested.nested_absmax.clone();
  wrong.absmax.fill_(127), wrong.absmax[300] = 255, wrong.nested_absmax[1] = 3e38F, wrong.offset = at::full({1}, 1e38F);
  EXPECT_EQ(check_scales(wrong).substr(0, 28), "scale 300 stands for inf (no");
  wrong = nested, wrong.absmax = nested.absmax.clone();
  wrong.absmax[512] = 0;  // the mean less the farthest from it
  EXPECT_EQ(check_scales(wrong), "");
  wrong.nested_absmax = nested.nested_absmax.clone(), wrong.nested_absmax[2] = 100;
  EXPECT_EQ(check_scales(wrong).substr(0, 25), "scale 512 stands for -98.");
  // Blocks of zeros come back below 0 by a rounding, and are what honest files hold.
  float least = 0;
  for (int i = 0; i < 20; ++i) {
    at::Tensor zeros = at::full({600}, 1.05F);
    zeros[0] = 2.3F + 0.01F * static_cast<float>(i), zeros[7] = 0;
    const BlockScales honest = double_quantized({.absmax = zeros});
    least = std::min(least, plain_scales(honest).min().item<float>());
    EXPECT_EQ(check_scales(honest), "") << i;
  }
  EXPECT_LT(least, -1e-3F);
}

}  // namespace
}  // namespace trireme
