// The error of each format on Gaussian weights is the published one.
#include <gtest/gtest.h>

#include <cmath>

#include "quant/affine.h"
#include "quant/dynamic_map.h"
#include "quant/four_bit.h"
#include "quant/int8.h"
#include "quant_values.h"

namespace trireme {
namespace {

const int64_t kCount = 1024 * 1024;

double mean_error(const at::Tensor& a, const at::Tensor& b) { return (a - b).abs().to(at::kDouble).mean().item<double>(); }
double root_mean_square(const at::Tensor& a, const at::Tensor& b) { return std::sqrt((a - b).to(at::kDouble).square().mean().item<double>()); }

// Mean |error| of 1024 x 1024 standard normal values and its deviation between 200 samples, measured by the authors of bitsandbytes on
// their CUDA code (tests/test_functional.py, test_4bit_quant).
TEST(QuantError, OfFourBitsIsThePublishedOne) {
  struct Published {
    int64_t block_size;
    double fp4, fp4_deviation, nf4, nf4_deviation;
  };
  const at::Tensor x = test::gaussian(kCount, 11), y = at::empty_like(x);
  for (const Published& p : std::vector<Published>{{32, 0.088925, 0.000091, 0.067746, 0.000069},
                                                   {64, 0.096543, 0.000111, 0.072798, 0.000074},
                                                   {128, 0.102969, 0.000134, 0.076831, 0.000091},
                                                   {256, 0.108684, 0.000182, 0.080337, 0.000102},
                                                   {512, 0.114115, 0.000234, 0.083547, 0.000143},
                                                   {1024, 0.119333, 0.000320, 0.086610, 0.000187},
                                                   {2048, 0.124556, 0.000455, 0.089592, 0.000251},
                                                   {4096, 0.129536, 0.000612, 0.092547, 0.000360}})
    for (FourBit kind : {FourBit::kFp4, FourBit::kNf4}) {
      FourBitTensor q = quantize_4bit(x, kind, p.block_size);
      dequantize_4bit(q, y);
      const double error = mean_error(y, x), published = kind == FourBit::kFp4 ? p.fp4 : p.nf4, deviation = kind == FourBit::kFp4 ? p.fp4_deviation : p.nf4_deviation;
      EXPECT_NEAR(error, published, 4 * deviation) << p.block_size;
      // "Double quantization does not degrade" (Dettmers et al. 2023, section 5): scales that are off by 1 % cost less than that.
      q.scales = double_quantized(q.scales);
      dequantize_4bit(q, y);
      EXPECT_NEAR(mean_error(y, x), error, 0.01 * error) << p.block_size;
    }
}

// The same tests' bounds for the dynamic map: mean |error| and mean |error| / |x|.
TEST(QuantError, OfTheDynamicMapIsWithinThePublishedBounds) {
  struct Case {
    const char* name;
    at::Tensor x;
    bool is_signed;
    double bound, relative_bound;
  };
  at::manual_seed(12);
  const at::Tensor uniform = at::rand({kCount});
  for (const Case& c : std::vector<Case>{{"normal, signed", test::gaussian(kCount, 12), true, 0.011, 0.018}, {"uniform, signed", uniform, true, 0.0036, 0.015},
                                         {"uniform, unsigned", uniform, false, 0.0023, 0.012}}) {
    const at::Tensor map = dynamic_map(c.is_signed), y = at::empty_like(c.x);
    dequantize_blockwise(quantize_blockwise(c.x, map, 256), map, 256, y);
    const double error = mean_error(y, c.x), relative = ((y - c.x).abs() / (c.x.abs() + 1e-8)).mean().item<double>();
    EXPECT_LT(error, c.bound) << c.name;
    EXPECT_GT(error, 0.65 * c.bound) << c.name;  // which are close
    EXPECT_LT(relative, c.relative_bound) << c.name;
  }
}

// Equal steps are wrong by a step / sqrt(12) in the root mean square (Bennett 1948), where there are many.
TEST(QuantError, OfEqualStepsIsBennetts) {
  const at::Tensor x = test::gaussian(kCount, 13).view({1024, 1024});
  at::Tensor y = at::empty_like(x);
  const Int8Rows rows = quantize_int8_rows(x);
  dequantize_int8_rows(rows, y);
  const auto bennett = [](const at::Tensor& steps) { return std::sqrt(steps.to(at::kDouble).square().mean().item<double>() / 12); };
  EXPECT_NEAR(root_mean_square(y, x) / bennett(rows.absmax_R / 127), 1, 0.01);
  for (const AffineFormat& format : {AffineFormat{8, false}, AffineFormat{8, true}, AffineFormat{4, true}})
    for (int64_t group : {0, 1024, 128}) {
      const AffineTensor q = quantize_affine(x, format, group);
      dequantize_affine(q, y);
      EXPECT_NEAR(root_mean_square(y, x) / bennett(q.scale), 1, format.bits == 8 ? 0.01 : 0.04) << format.bits << " " << group;
    }
}

}  // namespace
}  // namespace trireme
