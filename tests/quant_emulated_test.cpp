// The number formats by the emulated kernels: the same bits as by the CPU's loops, and nothing is computed elsewhere.
#include "emulated_ops.h"
#include "quant/affine.h"
#include "quant/dynamic_map.h"
#include "quant/four_bit.h"
#include "quant/int8.h"
#include "quant_values.h"
#include "support.h"

namespace trireme {
namespace {

using kernels::Kernels;
using test::Emulated;
using test::num_calls_of;
using test::same_bits;

const std::vector<at::ScalarType> kDtypes = {at::kFloat, at::kBFloat16, at::kHalf};

template <typename F>
auto emulated(const F& f) {
  const Emulated on;
  return f();
}

TEST(QuantByKernels, FourBits) {
  const int64_t count = 64 * 700 + 5;
  for (at::ScalarType dtype : kDtypes) {
    const at::Tensor w = test::gaussian(count, 1).to(dtype);
    const auto values = [&](bool nested) {
      FourBitTensor q = quantize_4bit(w, FourBit::kNf4, 64);
      if (nested) q.scales = double_quantized(q.scales);
      const at::Tensor out = at::empty({count}, w.options());
      dequantize_4bit(q, out);
      return std::vector<at::Tensor>{q.codes, q.scales.absmax, nested ? q.scales.nested_absmax : at::Tensor(), out};
    };
    for (bool nested : {false, true}) {
      const auto expected = values(nested), actual = emulated([&] { return values(nested); });
      for (size_t i = 0; i < expected.size(); ++i)
        if (expected[i].defined()) { EXPECT_TRUE(same_bits(actual[i], expected[i])) << dtype << " " << i; }
      EXPECT_EQ(num_calls_of<&Kernels::quantize_4> + num_calls_of<&Kernels::dequantize_4> + num_calls_of<&Kernels::quantize_blocks>, nested ? 3 : 2);
    }
  }
}

TEST(QuantByKernels, Slices) {
  const int64_t rows = 24, columns = 512;
  const at::Tensor w = test::gaussian(rows * columns, 2).view({rows, columns});
  FourBitTensor q = quantize_4bit(w, FourBit::kFp4, 64);
  q.scales = double_quantized(q.scales);
  for (int64_t dim : {0, 1}) {
    const int64_t length = (dim == 0 ? rows : columns) / 2;
    const FourBitTensor slice = test::slice_4bit(q, rows, columns, dim, length, 2 * length);
    const at::Tensor expected = at::empty({rows * columns / 2}), actual = at::empty({rows * columns / 2});
    dequantize_4bit(slice, expected);
    emulated([&] { return dequantize_4bit(slice, actual), 0; });
    EXPECT_EQ(num_calls_of<&Kernels::dequantize_4>, 1);
    EXPECT_TRUE(same_bits(actual, expected));
  }
}

TEST(QuantByKernels, Blockwise) {
  const at::Tensor x = test::gaussian(5001, 3), odd = x.slice(0, 1), map = dynamic_map(true);  // that begins at no multiple of 16 bytes
  for (const at::Tensor& values : {x, odd}) {
    const auto both = [&] {
      const BlockCodes q = quantize_blockwise(values, map, 256);
      const at::Tensor out = at::empty_like(values);
      dequantize_blockwise(q, map, 256, out);
      return std::vector<at::Tensor>{q.codes, q.absmax, out};
    };
    const auto expected = both(), actual = emulated(both);
    for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(same_bits(actual[i], expected[i])) << i;
    EXPECT_EQ(num_calls_of<&Kernels::quantize_blocks> + num_calls_of<&Kernels::dequantize_blocks>, 2);
  }
}

TEST(QuantByKernels, Int8) {
  for (at::ScalarType dtype : kDtypes) {
    at::Tensor x = test::gaussian(20 * 48, 4).view({20, 48});
    x[7][3] = 50;
    x = x.to(dtype);
    const at::Tensor w = test::gaussian(32 * 48, 5).view({32, 48}).to(dtype), bias = test::gaussian(32, 6).to(dtype);
    const auto all = [&](float threshold) {
      const Int8Rows q = quantize_int8_rows(w);
      at::Tensor values = at::empty_like(w), y = at::empty({20, 32}, w.options());
      dequantize_int8_rows(q, values);
      int8_linear(x, q, bias, y, threshold);
      return std::vector<at::Tensor>{q.codes_RC, q.absmax_R, values, y};
    };
    const auto expected = all(0), actual = emulated([&] { return all(0); });
    for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(same_bits(actual[i], expected[i])) << dtype << " " << i;
    const auto with_outliers = emulated([&] { return all(kInt8Threshold); });
    EXPECT_TRUE(test::near(with_outliers[3], all(kInt8Threshold)[3]));
    EXPECT_EQ(num_calls_of<&Kernels::scale_products>, 1);
    EXPECT_EQ(num_calls_of<&Kernels::quantize_rows>, 2);
  }
}

// Two have half of the columns each, and tell each other their rows' largest values.
TEST(QuantByKernels, Int8OfPartsOfRowsIsThatOfWholeRows) {
  for (at::ScalarType dtype : kDtypes)
    for (const float threshold : {0.0f, 2.0f}) {
      const at::Tensor x = test::gaussian(20 * 48, 4).view({20, 48}).to(dtype);
      const auto codes_of_both = [&] {
        const Int8Inputs whole = quantize_int8_inputs(x, threshold);
        std::vector<at::Tensor> codes;
        for (const auto& [begin, end] : {std::pair{0, 16}, {16, 48}}) {
          const Int8Inputs part = quantize_int8_inputs(x.slice(1, begin, end).contiguous(), threshold, [&](at::Tensor absmax) {
            EXPECT_TRUE((absmax <= whole.rows.absmax_R).all().item<bool>() && (absmax < whole.rows.absmax_R).any().item<bool>());
            absmax.copy_(whole.rows.absmax_R);
          });
          EXPECT_TRUE(same_bits(part.rows.absmax_R, whole.rows.absmax_R));
          codes.push_back(part.rows.codes_RC);
        }
        EXPECT_TRUE(same_bits(at::cat(codes, 1), whole.rows.codes_RC)) << dtype << " " << threshold;
        return codes;
      };
      codes_of_both();
      emulated(codes_of_both);
    }
}

TEST(QuantByKernels, Affine) {
  for (const AffineFormat& format : {AffineFormat{8, false}, AffineFormat{8, true}, AffineFormat{4, false}, AffineFormat{4, true}})
    for (int64_t group : {0, 48, 128}) {
      const at::Tensor x = test::gaussian(20003, 7);
      const auto both = [&] {
        const AffineTensor q = quantize_affine(x, format, group);
        const at::Tensor out = at::empty_like(x);
        dequantize_affine(q, out);
        return std::vector<at::Tensor>{q.codes, q.scale, format.zero_point ? q.zero : at::Tensor(), out};
      };
      const auto expected = both(), actual = emulated(both);
      for (size_t i = 0; i < expected.size(); ++i)
        if (expected[i].defined()) { EXPECT_TRUE(same_bits(actual[i], expected[i])) << format.bits << " " << group << " " << i; }
      EXPECT_EQ(num_calls_of<&Kernels::quantize_groups> + num_calls_of<&Kernels::dequantize_groups>, 2);
    }
}

}  // namespace
}  // namespace trireme
