// LLM.int8(): rows in eight bits and their products.
#include "quant/int8.h"

#include "base/check.h"
#include "kernels/reference/quantize.h"
#include "quant_values.h"
#include "support.h"

namespace trireme {
namespace {

namespace reference = kernels::reference;
using test::near;
using test::same_bits;

const std::vector<at::ScalarType> kDtypes = {at::kFloat, at::kBFloat16, at::kHalf};

std::vector<float> floats(const at::Tensor& any) {
  const at::Tensor t = any.to(at::kFloat).contiguous();
  return {t.data_ptr<float>(), t.data_ptr<float>() + t.numel()};
}
at::Tensor chars(const std::vector<int8_t>& values) { return at::from_blob(const_cast<int8_t*>(values.data()), {static_cast<int64_t>(values.size())}, at::kChar).clone(); }
at::Tensor settled(const at::Tensor& x) { return at::where(x.isnan(), at::full({}, NAN, x.options()), x); }  // which NaN is no rule's

TEST(Int8Rows, BitsOfTheRules) {
  for (at::ScalarType dtype : kDtypes)
    for (float threshold : {0.0f, 2.5f})
      for (const auto& [rows, width] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 17}, {5, 64}, {40, 1000}})
        for (const auto& [name, values] : test::unusual_values(rows * width, width)) {
          SCOPED_TRACE(testing::Message() << name << " " << dtype << " " << rows << " x " << width << " below " << threshold);
          const at::Tensor x = values.to(dtype).view({rows, width});
          const auto expected = reference::quantize_rows(floats(x), width, threshold);
          const Int8Inputs q = quantize_int8_inputs(x, threshold);
          EXPECT_TRUE(same_bits(q.rows.absmax_R, at::tensor(expected.absmax)));
          EXPECT_TRUE(same_bits(q.rows.codes_RC.flatten(), chars(expected.codes)));
          EXPECT_EQ(q.outlier_C.defined(), threshold > 0);
          if (threshold > 0) { EXPECT_TRUE(same_bits(q.outlier_C, at::tensor(std::vector<uint8_t>(expected.outlier), at::kByte))); }
          const at::Tensor out = at::empty(x.sizes(), x.options());
          dequantize_int8_rows(q.rows, out);
          EXPECT_TRUE(same_bits(settled(out.flatten()), settled(at::tensor(reference::dequantize_rows(expected, width)).to(dtype))));
        }
}

TEST(Int8Rows, EveryInstructionSetHasTheSameBits) {
  const int64_t rows = 6, width = 77;
  for (const auto& [name, values] : test::unusual_values(rows * width, width))
    for (int level = 0; level < test::num_vector_levels(); ++level) {
      SCOPED_TRACE(testing::Message() << name << " " << level);
      const auto& loops = quant_loops<float>(level);
      const Int8Inputs expected = quantize_int8_inputs(values.view({rows, width}), 3);
      at::Tensor codes = at::empty({rows, width}, at::kChar), absmax = at::empty({rows}), outlier = at::zeros({width}, at::kByte), y = at::empty({rows, width}), wanted = y.clone();
      loops.largest_of_rows(rows, width, values.data_ptr<float>(), 3, absmax.data_ptr<float>(), outlier.data_ptr<uint8_t>());
      loops.quantize_rows(rows, width, values.data_ptr<float>(), absmax.data_ptr<float>(), outlier.data_ptr<uint8_t>(), codes.data_ptr<int8_t>());
      EXPECT_TRUE(same_bits(absmax, expected.rows.absmax_R));
      EXPECT_TRUE(same_bits(codes, expected.rows.codes_RC));
      EXPECT_TRUE(same_bits(outlier, expected.outlier_C));
      loops.dequantize_rows(rows, width, codes.data_ptr<int8_t>(), absmax.data_ptr<float>(), y.data_ptr<float>());
      dequantize_int8_rows(expected.rows, wanted);
      EXPECT_TRUE(same_bits(settled(y), settled(wanted)));

      const at::Tensor products = at::randint(-50000000, 50000000, {rows, width}, at::kInt), column = test::gaussian(width, 3), bias = test::gaussian(width, 4), row = test::gaussian(rows, 5);
      const std::vector<int32_t> integers(products.data_ptr<int32_t>(), products.data_ptr<int32_t>() + rows * width);
      loops.scale_products(rows, width, products.data_ptr<int32_t>(), row.data_ptr<float>(), column.data_ptr<float>(), bias.data_ptr<float>(), y.data_ptr<float>());
      EXPECT_TRUE(same_bits(y.flatten(), at::tensor(reference::scale_products(integers, floats(row), floats(column), floats(bias)))));
    }
}

TEST(Int8Linear, IsTheProductOfCodes) {
  const int64_t T = 9, I = 80, O = 24;
  for (at::ScalarType dtype : kDtypes)
    for (bool with_bias : {false, true}) {
      SCOPED_TRACE(testing::Message() << dtype << " " << with_bias);
      const at::Tensor x = test::gaussian(T * I, 1).view({T, I}).to(dtype), w = test::gaussian(O * I, 2, 0.05).view({O, I}).to(dtype);
      const at::Tensor bias = with_bias ? test::gaussian(O, 3).to(dtype) : at::Tensor();
      const Int8Rows q = quantize_int8_rows(w), inputs = quantize_int8_rows(x);
      at::Tensor y = at::empty({T, O}, x.options());
      int8_linear(x, q, bias, y);
      const at::Tensor products = at::mm(inputs.codes_RC.to(at::kDouble), q.codes_RC.to(at::kDouble).t()).to(at::kInt);
      const std::vector<int32_t> integers(products.data_ptr<int32_t>(), products.data_ptr<int32_t>() + T * O);
      const auto expected = reference::scale_products(integers, floats(inputs.absmax_R), floats(q.absmax_R), with_bias ? floats(bias) : std::vector<float>());
      EXPECT_TRUE(same_bits(y, at::tensor(expected).view({T, O}).to(dtype)));
      at::Tensor dense = at::mm(x.to(at::kDouble), w.to(at::kDouble).t());
      if (with_bias) dense += bias.to(at::kDouble);
      // Each factor is off by half a 127th of its row's largest at most; errors of I terms add up like their root.
      EXPECT_LT((y.to(at::kDouble) - dense).abs().max().item<double>(), 0.1);
    }
}

// The largest codes, whose pairs leave 16 bits; of columns and rows that are taken in several pieces, and of sizes that are in no eights.
TEST(Int8Linear, AddsTheLargestCodesExactly) {
  for (const auto& [T, I, O] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{{1, 4096, 16}, {5, 61, 7}, {33, 2049, 1030}, {1030, 1025, 3}, {17, 64, 64}}) {
    SCOPED_TRACE(testing::Message() << T << " x " << I << " x " << O);
    at::manual_seed(1);
    const auto codes = [](int64_t rows, int64_t columns) {
      const at::Tensor any = at::randint(-127, 128, {rows, columns}, at::kChar);
      for (int64_t r = 0; r < rows; r += 2) any[r] = r % 4 == 0 ? 127 : -127;
      return any;
    };
    // Rows with a largest value of 127 are their own codes. Scales of 127 make products the codes', whose last bits fp32 may not have.
    const at::Tensor x = codes(T, I), w = codes(O, I);
    for (const at::Tensor& each : {x, w}) each.select(1, 0).fill_(127);
    at::Tensor y = at::empty({T, O});
    int8_linear(x.to(at::kFloat), {w, at::full({O}, 127.0f)}, {}, y, 0);
    const at::Tensor products = at::mm(x.to(at::kDouble), w.to(at::kDouble).t()).to(at::kInt);
    const std::vector<int32_t> integers(products.data_ptr<int32_t>(), products.data_ptr<int32_t>() + T * O);
    const std::vector<float> of_x(static_cast<size_t>(T), 127.0f), of_w(static_cast<size_t>(O), 127.0f);
    EXPECT_TRUE(same_bits(y, at::tensor(reference::scale_products(integers, of_x, of_w, {})).view({T, O})));
  }
}

// With columns of outliers in 16 bits the error stays that of the others; without a threshold they spoil all.
TEST(Int8Linear, OutliersAreMultipliedInTheirOwnDtype) {
  const int64_t T = 7, I = 64, O = 16;
  at::Tensor x = test::gaussian(T * I, 1).clamp(-3, 3).view({T, I});
  x[3][10] = -60, x[5][10] = 40, x[0][63] = 6;  // the threshold itself is one
  const at::Tensor w = test::gaussian(O * I, 2).view({O, I}), dense = at::mm(x.to(at::kDouble), w.to(at::kDouble).t());
  const Int8Rows q = quantize_int8_rows(w);
  const Int8Inputs inputs = quantize_int8_inputs(x, kInt8Threshold);
  EXPECT_EQ(inputs.outlier_C.nonzero().flatten().equal(at::tensor({10, 63}, at::kLong)), true);
  EXPECT_LE(inputs.rows.absmax_R.max().item<float>(), 3);
  at::Tensor y = at::empty({T, O}), without = at::empty({T, O});
  int8_linear(x, q, {}, y);
  int8_linear(x, q, {}, without, 0);
  EXPECT_GT((without.to(at::kDouble) - dense).abs().max().item<double>(), 1.5);
  EXPECT_LT((y.to(at::kDouble) - dense).abs().max().item<double>(), 1.0);  // 60 times the error of a weight, 3 / 254

  at::Tensor values = at::empty(w.sizes());
  dequantize_int8_rows(q, values);
  at::Tensor kept = x.clone(), others = at::empty({T, O});
  kept.select(1, 10).zero_(), kept.select(1, 63).zero_();
  int8_linear(kept, q, {}, others);
  const at::Tensor columns = at::tensor({10, 63}, at::kLong);
  EXPECT_TRUE(near(y, others + at::mm(x.index_select(1, columns), values.index_select(1, columns).t())));
}

// What is no number stays none, in its row alone.
TEST(Int8Linear, NaNsAndInfinitiesStay) {
  const Int8Rows q = quantize_int8_rows(test::gaussian(8 * 16, 1).view({8, 16}));
  for (float wrong : {NAN, INFINITY}) {
    at::Tensor x = test::gaussian(3 * 16, 2).view({3, 16}), y = at::empty({3, 8});
    x[1][5] = wrong;
    int8_linear(x, q, {}, y);
    EXPECT_FALSE(y[1].isfinite().any().item<bool>());
    EXPECT_TRUE(y[0].isfinite().all().item<bool>() && y[2].isfinite().all().item<bool>());
  }
}

TEST(Int8Linear, NothingIsNothing) {
  const Int8Rows q = quantize_int8_rows(at::ones({8, 16}));
  at::Tensor none = at::empty({0, 8}), y = at::ones({2, 8});
  int8_linear(at::empty({0, 16}), q, {}, none);
  int8_linear(at::zeros({2, 16}), q, {}, y);
  EXPECT_EQ(y.abs().sum().item<float>(), 0);
}

TEST(Int8Linear, RefusesWhatItDoesNotKnow) {
  const Int8Rows q = quantize_int8_rows(at::ones({8, 16}));
  at::Tensor y = at::empty({2, 8}), y16 = y.to(at::kBFloat16);
  EXPECT_THROW(int8_linear(at::ones({2, 15}), q, {}, y), InternalError);
  EXPECT_THROW(int8_linear(at::ones({3, 16}), q, {}, y), InternalError);
  EXPECT_THROW(int8_linear(at::ones({2, 16}), q, {}, y16), InternalError);
  EXPECT_THROW(int8_linear(at::ones({2, 16}), q, {}, y, -1), InternalError);
  EXPECT_THROW(quantize_int8_rows(at::ones({2, 16}, at::kDouble)), InternalError);
  EXPECT_THROW(quantize_int8_rows(at::ones({16})), InternalError);
  EXPECT_THROW(dequantize_int8_rows(q, at::empty({16, 8})), InternalError);
  const Int8Rows wide = quantize_int8_rows(at::ones({1, 133145}));
  at::Tensor one = at::empty({1, 1});
  EXPECT_THROW(int8_linear(at::ones({1, 133145}), wide, {}, one), InternalError);
}

}  // namespace
}  // namespace trireme
