// Frozen weights in 4 bits as linear layers use them: their products, what ranks hold of them, and how often they are brought back.
#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/ops.h"
#include "quant/four_bit_weight.h"
#include "quant/int8_weight.h"
#include "tensor_bytes.h"

namespace trireme {
namespace {

bool same_bits(const at::Tensor& a, const at::Tensor& b) { return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() && at::equal(a, b); }

at::Tensor weight(int64_t rows, int64_t columns, at::ScalarType dtype = at::kBFloat16) {
  at::manual_seed(3);
  return (at::randn({rows, columns}) * 0.02).to(dtype);
}

std::shared_ptr<FrozenWeight> made(const at::Tensor& w_OI, const FourBitOptions& options) {
  const auto q = four_bit_weight("layer", w_OI.size(0), w_OI.size(1), options);
  q->set(w_OI);
  return q;
}

at::Tensor values(const FrozenWeight& w, at::ScalarType dtype = at::kBFloat16) {
  const at::Tensor out = at::empty({w.out_features(), w.in_features()}, dtype);
  dynamic_cast<const DequantizedWeight&>(w).dequantize(out);
  return out;
}

// The slices of the leaves of `whole` that `part` holds.
void fill(FrozenWeight& part, const FrozenWeight& whole) {
  for (size_t i = 0; i < whole.leaves().size(); ++i) {
    FrozenWeight::Leaf& leaf = part.leaves()[i];
    at::Tensor value = whole.leaves()[i].value;
    for (int64_t d = 0; d < value.dim(); ++d) value = value.narrow(d, leaf.place.offset[static_cast<size_t>(d)], leaf.value.size(d));
    EXPECT_EQ(value.sizes(), leaf.value.sizes()) << leaf.suffix;
    leaf.value = value.contiguous();
  }
}

TEST(FourBitWeight, MultipliesAsTheValuesItStandsFor) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble})
    for (const bool is_double : {false, true}) {
      const at::Tensor w = weight(48, 128, dtype), x = at::randn({5, 128}).to(dtype).requires_grad_(true), bias = at::randn({48}).to(dtype), g = at::randn({5, 48}).to(dtype);
      const auto q = made(w, {FourBit::kNf4, 64, is_double, dtype});
      const at::Tensor stands_for = values(*q, dtype);
      EXPECT_GT((stands_for - w).abs().max().item<double>(), 0);
      EXPECT_LT(((stands_for - w).norm() / w.norm()).item<double>(), 0.12);
      const at::Tensor y = linear(x, LinearWeight(q), bias, nullptr);
      y.backward(g);
      const at::Tensor found = x.grad().clone();
      x.mutable_grad() = at::Tensor();
      const at::Tensor expected = trireme::linear(x, stands_for, bias);
      expected.backward(g);
      EXPECT_TRUE(same_bits(y, expected) && same_bits(found, x.grad())) << dtype << is_double;
    }
}

TEST(FourBitWeight, ComputesInAnotherDtypeThanTheModels) {
  const at::Tensor w = weight(48, 128), x = at::randn({5, 128}).to(at::kBFloat16);
  const auto q = made(w, {FourBit::kFp4, 64, true, at::kFloat});
  const at::Tensor expected = at::matmul(x.to(at::kFloat), values(*q, at::kFloat).t()).to(at::kBFloat16);
  EXPECT_TRUE(same_bits(linear(x, LinearWeight(q), {}, nullptr), expected));
}

// Every rank computes with the numbers of one quantization.
TEST(FourBitWeight, SlicesStandForTheWholesValues) {
  for (const bool is_double : {false, true})
    for (const int64_t columns : {128, 96}) {  // rows of whole blocks, and rows that blocks straddle
      const FourBitOptions options{FourBit::kNf4, columns == 96 ? 64 : 32, is_double, at::kBFloat16};
      const auto whole = made(weight(1024, columns), options);
      for (const auto& [dim, begin, end] : {std::tuple<int64_t, int64_t, int64_t>{0, 256, 512}, {0, 512, 1024}, {1, 32, 96}, {1, 0, 32}}) {
        const auto part = four_bit_weight("layer", 1024, columns, options);
        if (columns == 96 && dim == 1) continue;
        part->keep(dim, begin, end);
        fill(*part, *whole);
        EXPECT_TRUE(same_bits(values(*part), values(*whole).narrow(dim, begin, end - begin))) << is_double << columns << dim << begin;
      }
    }
}

TEST(FourBitWeight, CutsNoBlock) {
  const auto refusal = [](int64_t dim, int64_t begin, int64_t end, int64_t columns, int64_t size) {
    try {
      four_bit_weight("model.layers.0.mlp.down_proj", 64, columns, {FourBit::kNf4, size})->keep(dim, begin, end);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(refusal(1, 64, 128, 128, 128), "quant.block_size=128: a rank's columns 64 to 127 of model.layers.0.mlp.down_proj (64 x 128) would cut a block of scales: take 32, 64; or set another "
                                           "parallel.tensor, or add the layer to quant.skip");
  EXPECT_NE(refusal(1, 0, 24, 48, 32).find("no block size fits; or set another parallel.tensor"), std::string::npos);
  EXPECT_NE(refusal(0, 0, 1, 48, 64).find("rows 0 to 0"), std::string::npos);
  EXPECT_EQ(refusal(1, 64, 128, 128, 64), "");
  EXPECT_THROW(four_bit_weight("layer", 4, 33, {}), InternalError);
}

TEST(FourBitWeight, TakesABitMoreThanFourOrExactlyFourAndAHalf) {
  const auto bits = [](bool is_double) { return 8.0 * static_cast<double>(made(weight(1024, 1024), {FourBit::kNf4, 64, is_double})->num_bytes()) / (1024.0 * 1024.0); };
  EXPECT_EQ(bits(false), 4.5);
  EXPECT_NEAR(bits(true), 4 + 8.0 / 64 + 32.0 / (64 * 256), 0.01);  // and the map of its codes
}

// A backward that begins where the recomputation of its forward ended finds the weight in the scratch.
TEST(FourBitWeight, IsBroughtBackOnceWhereItsUsesMeet) {
  const auto a = made(weight(64, 64), {}), b = made(weight(64, 64) * 2, {});
  const at::Tensor x = at::randn({4, 64}).to(at::kBFloat16).requires_grad_(true);
  const auto layers = [&](const at::Tensor& in) { return linear(linear(in, LinearWeight(a), {}, nullptr), LinearWeight(b), {}, nullptr); };
  int64_t before = num_dequantized();
  layers(x).sum().backward();
  EXPECT_EQ(num_dequantized() - before, 3);  // a, b, and a again
  linear(x.detach(), LinearWeight(b), {}, nullptr);  // is in it then
  before = num_dequantized();
  recompute([&](const std::vector<at::Tensor>& in) { return layers(in[0]); }, {x}, false).sum().backward();
  EXPECT_EQ(num_dequantized() - before, 5);  // a, b; a, b, and a again
  before = num_dequantized();
  const at::Tensor y = linear(x.detach(), LinearWeight(a), {}, nullptr);
  a->leaves()[0].value.fill_(0x77);  // other values in the same memory
  EXPECT_EQ(num_dequantized() - before, 0);
  EXPECT_FALSE(same_bits(linear(x.detach(), LinearWeight(a), {}, nullptr), y));
  for (const double scale : {1.0, 2.0, 1.0}) {
    a->set(weight(64, 64) * scale);  // other memory, as new as the one before
    EXPECT_EQ(same_bits(linear(x.detach(), LinearWeight(a), {}, nullptr), y), scale == 1) << scale;
  }
}

// Rows in the model's dtype are converted to that of products.
TEST(FourBitWeight, SaysWhatAProductTakes) {
  test::TensorBytes::install();
  for (const at::ScalarType compute : {at::kBFloat16, at::kFloat}) {
    FourBitOptions options;
    options.compute = compute;
    const auto q = made(weight(64, 128), options);
    const at::Tensor x = at::randn({3000, 128}).to(at::kBFloat16);
    const auto multiplied = [&] { linear(x, LinearWeight(q), {}, nullptr); };
    multiplied();  // the scratch is there from here on
    const int64_t scratch = q->product_bytes(0, at::kBFloat16), said = q->product_bytes(x.size(0), at::kBFloat16) - scratch;
    EXPECT_EQ(scratch, 64 * 128 * static_cast<int64_t>(c10::elementSize(compute)));
    EXPECT_NEAR(static_cast<double>(test::TensorBytes::install().grown(multiplied) - 3000 * 64 * 2), static_cast<double>(said), 4e5);  // oneDNN takes some, too
  }
}

TEST(Int8Weight, MultipliesAsLlmInt8AndGoesBackThroughItsValues) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor w = weight(48, 128, dtype), bias = at::randn({48}).to(dtype), g = at::randn({5, 48}).to(dtype);
    at::Tensor x = at::randn({5, 128}).to(dtype);
    x.select(1, 7).fill_(20);  // outliers
    x.requires_grad_(true);
    const auto q = int8_weight("layer", 48, 128, dtype);
    q->set(w);
    const at::Tensor y = linear(x, LinearWeight(q), bias, nullptr), stands_for = values(*q, dtype);
    y.backward(g);
    at::Tensor expected = at::empty({5, 48}, w.options());
    int8_linear(x.detach(), quantize_int8_rows(w.to(at::kHalf)), bias, expected);
    EXPECT_TRUE(same_bits(y, expected));
    EXPECT_TRUE(same_bits(x.grad(), at::matmul(g, stands_for)));
    const at::Tensor exact = at::matmul(x.detach().to(at::kFloat), w.to(at::kFloat).t()) + bias.to(at::kFloat);
    EXPECT_LT(((y - exact).norm() / exact.norm()).item<double>(), 0.02);
  }
}

// bitsandbytes' codes are of weights in float16.
TEST(Int8Weight, HasTheCodesOfFloat16) {
  const at::Tensor w = weight(1027, 1031, at::kFloat);  // more than is quantized at once
  const auto q = int8_weight("layer", 1027, 1031, at::kFloat);
  q->set(w);
  const Int8Rows expected = quantize_int8_rows(w.to(at::kHalf)), of_float = quantize_int8_rows(w);
  EXPECT_TRUE(same_bits(q->leaves()[0].value, expected.codes_RC) && same_bits(q->leaves()[1].value, expected.absmax_R));
  EXPECT_FALSE(same_bits(of_float.codes_RC, expected.codes_RC) || same_bits(of_float.absmax_R, expected.absmax_R));
  w[3][5] = -65504;  // float16's largest
  q->set(w);
  w[3][5] = -65600;
  try {
    q->set(w);
    ADD_FAILURE();
  } catch (const ConfigError& error) {
    EXPECT_EQ(std::string(error.what()), "quant.base=int8: layer.weight has values of up to 65600, but LLM.int8() takes weights in float16, of 65504 at most: add it to quant.skip, or set quant.base=nf4");
  }
}

TEST(Int8Weight, SlicesHaveTheScalesOfWholeRows) {
  const at::Tensor w = weight(32, 64);
  const auto whole = int8_weight("layer", 32, 64, at::kBFloat16);
  whole->set(w);
  for (const int64_t dim : {0, 1}) {
    const auto part = int8_weight("layer", 32, 64, at::kBFloat16);
    part->keep(dim, 8, 21);
    fill(*part, *whole);
    EXPECT_TRUE(same_bits(values(*part), values(*whole).narrow(dim, 8, 13)));
  }
  EXPECT_THROW(int8_weight("layer", 8, 133152, at::kBFloat16), InternalError);
}

}  // namespace
}  // namespace trireme
