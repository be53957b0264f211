#include "quant/int8.h"

#include <algorithm>

#include "ops/device.h"
#include "ops/op_support.h"
#include "ops/product.h"
#include "quant/quant_loops.h"

namespace trireme {
namespace {

// Products of codes in int8 as the processor has them are exact with VNNI; without it they are added in pairs in 16 bits, of which oneDNN
// says that they saturate. Asked of it and not of the processor, as its settings may keep it from using what is there.
bool adds_codes_exactly() {
  static const bool exact = [] {
    constexpr int64_t kSize = 64;
    const at::Tensor most = at::full({kSize, kSize}, 127, at::kChar);
    return at::_int_mm(most, most).eq(kSize * 127 * 127).all().item<bool>();
  }();
  return exact;
}

// int32 [M, N] = a b^T in fp32 products of so few columns that every sum of theirs is an integer of 24 bits, which fp32 adds exactly; of
// so few rows of both that what they need is no matter (14 MiB).
at::Tensor product_in_fp32(const at::Tensor& a_MK, const at::Tensor& b_NK) {
  constexpr int64_t kRun = (1 << 24) / (128 * 128), kRowsA = 1024, kRowsB = 512;
  const auto pieces = [](int64_t size, int64_t most, const auto& f) {
    for (int64_t i = 0; i < size; i += most) f(i, std::min(most, size - i));
  };
  at::Tensor y_MN = at::zeros({a_MK.size(0), b_NK.size(0)}, a_MK.options().dtype(at::kInt));
  pieces(a_MK.size(0), kRowsA, [&](int64_t m, int64_t ms) {
    pieces(a_MK.size(1), kRun, [&](int64_t k, int64_t ks) {
      const at::Tensor a = a_MK.narrow(0, m, ms).narrow(1, k, ks).to(at::kFloat);
      pieces(b_NK.size(0), kRowsB, [&](int64_t n, int64_t ns) {
        const at::Tensor b = b_NK.narrow(0, n, ns).narrow(1, k, ks).to(at::kFloat);
        y_MN.narrow(0, m, ms).narrow(1, n, ns).add_(at::mm(a, b.t()).to(at::kInt));
      });
    });
  });
  return y_MN;
}

// int32 [M, N] = a b^T
at::Tensor product_of_codes(const at::Tensor& a_MK, const at::Tensor& b_NK) {
  const int64_t m = a_MK.size(0), n = b_NK.size(0), k = a_MK.size(1);
  if (m == 0 || n == 0 || k == 0) return at::zeros({m, n}, a_MK.options().dtype(at::kInt));
  if (a_MK.is_cpu()) return adds_codes_exactly() ? at::_int_mm(a_MK, b_NK.t()) : product_in_fp32(a_MK, b_NK);
  // ATen's on a device: 17 rows and more, and sizes of b in eights.
  const auto padded = [](const at::Tensor& x, int64_t rows, int64_t columns) { return rows == 0 && columns == 0 ? x : at::constant_pad_nd(x, {0, columns, 0, rows}); };
  const int64_t more_m = std::max<int64_t>(32 - m, 0), more_n = -n & 7, more_k = -k & 7;
  return at::_int_mm(padded(a_MK, more_m, more_k), padded(b_NK, more_n, more_k).t()).narrow(0, 0, m).narrow(1, 0, n).contiguous();
}

}  // namespace

Int8Inputs quantize_int8_inputs(const at::Tensor& any_RC, float threshold, const RowMaximum& maximum) {
  TRIREME_CHECK(any_RC.dim() == 2 && threshold >= 0, any_RC.sizes(), " ", threshold);
  const at::Tensor x_RC = quantizable(any_RC);
  const int64_t rows = x_RC.size(0), width = x_RC.size(1);
  Int8Inputs q{{at::empty(x_RC.sizes(), x_RC.options().dtype(at::kChar)), at::empty({rows}, x_RC.options().dtype(at::kFloat))}, {}};
  if (threshold > 0) q.outlier_C = at::zeros({width}, x_RC.options().dtype(at::kByte));
  int8_t* const codes = q.rows.codes_RC.data_ptr<int8_t>();
  float* const absmax = q.rows.absmax_R.data_ptr<float>();
  uint8_t* const outlier = static_cast<uint8_t*>(data_of(q.outlier_C));
  if (const kernels::Kernels* k = kernels_of(x_RC)) {
    const kernels::QuantizeRows call{kernel_type(x_RC), rows, width, data_of(x_RC), threshold, codes, absmax, outlier};
    k->largest_of_rows(call, stream_of(x_RC));
    if (maximum) maximum(q.rows.absmax_R);
    k->quantize_rows(call, stream_of(x_RC));
    return q;
  }
  with_quant_loops(x_RC.scalar_type(), [&](const auto& loops, auto zero) {
    const auto* x = x_RC.data_ptr<decltype(zero)>();
    for_rows(rows, width, [&](int64_t first, int64_t last) { loops.largest_of_rows(last - first, width, x + first * width, threshold, absmax + first, outlier); });
    if (maximum) maximum(q.rows.absmax_R);
    for_rows(rows, width, [&](int64_t first, int64_t last) { loops.quantize_rows(last - first, width, x + first * width, absmax + first, outlier, codes + first * width); });
  });
  return q;
}

Int8Rows quantize_int8_rows(const at::Tensor& x_RC) { return quantize_int8_inputs(x_RC, 0).rows; }

void dequantize_int8_rows(const Int8Rows& q, const at::Tensor& out_RC) {
  check_alike("dequantize_int8_rows", {"result", out_RC}, {{"codes", q.codes_RC}}, at::kChar);
  check_alike("dequantize_int8_rows", {"result", out_RC}, {{"scales", q.absmax_R}}, at::kFloat);
  TRIREME_CHECK(out_RC.dim() == 2 && q.codes_RC.sizes() == out_RC.sizes() && q.absmax_R.numel() == out_RC.size(0), q.codes_RC.sizes(), q.absmax_R.sizes(), out_RC.sizes());
  TRIREME_CHECK(out_RC.is_contiguous() && q.codes_RC.is_contiguous() && q.absmax_R.is_contiguous(), out_RC.strides(), q.codes_RC.strides(), q.absmax_R.strides());
  const int64_t rows = out_RC.size(0), width = out_RC.size(1);
  const int8_t* const codes = q.codes_RC.data_ptr<int8_t>();
  const float* const absmax = q.absmax_R.data_ptr<float>();
  if (const kernels::Kernels* k = kernels_of(out_RC)) return k->dequantize_rows({kernel_type(out_RC), rows, width, codes, absmax, data_of(out_RC)}, stream_of(out_RC));
  with_quant_loops(out_RC.scalar_type(), [&](const auto& loops, auto zero) {
    auto* y = out_RC.data_ptr<decltype(zero)>();
    for_rows(rows, width, [&](int64_t first, int64_t last) { loops.dequantize_rows(last - first, width, codes + first * width, absmax + first, y + first * width); });
  });
}

void int8_linear(const at::Tensor& x_TI, const Int8Rows& w_OI, const at::Tensor& bias_O, at::Tensor& y_TO, float threshold, const RowMaximum& maximum) {
  check_alike("int8_linear", {"x", x_TI}, {{"weight", w_OI.codes_RC}}, at::kChar);
  check_alike("int8_linear", {"x", x_TI}, {{"scales", w_OI.absmax_R}}, at::kFloat);
  check_alike("int8_linear", {"x", x_TI}, {{"bias", bias_O}, {"y", y_TO}});
  const int64_t rows = x_TI.size(0), width = w_OI.codes_RC.size(0);
  TRIREME_CHECK(x_TI.dim() == 2 && x_TI.size(1) == w_OI.codes_RC.size(1) && x_TI.size(1) <= kInt8MostColumns && w_OI.absmax_R.numel() == width, x_TI.sizes(), w_OI.codes_RC.sizes(),
                w_OI.absmax_R.sizes());
  TRIREME_CHECK(y_TO.dim() == 2 && y_TO.size(0) == rows && y_TO.size(1) == width && y_TO.is_contiguous(), y_TO.sizes(), y_TO.strides());
  const Int8Inputs q = quantize_int8_inputs(x_TI, threshold, maximum);
  const at::Tensor products_TO = product_of_codes(q.rows.codes_RC, w_OI.codes_RC), bias = bias_O.defined() ? bias_O.contiguous() : at::Tensor();
  const int32_t* const products = products_TO.data_ptr<int32_t>();
  const float *const row = q.rows.absmax_R.data_ptr<float>(), *const column = w_OI.absmax_R.data_ptr<float>();
  if (const kernels::Kernels* k = kernels_of(x_TI)) {
    k->scale_products({kernel_type(x_TI), rows, width, products, row, column, data_of(bias), data_of(y_TO)}, stream_of(x_TI));
  } else {
    with_quant_loops(x_TI.scalar_type(), [&](const auto& loops, auto zero) {
      using T = decltype(zero);
      T* const y = y_TO.data_ptr<T>();
      for_rows(rows, width, [&](int64_t first, int64_t last) {
        loops.scale_products(last - first, width, products + first * width, row + first, column, static_cast<const T*>(data_of(bias)), y + first * width);
      });
    });
  }
  if (threshold == 0) return;
  const at::Tensor columns = q.outlier_C.nonzero().flatten();
  if (columns.numel() == 0) return;
  const Int8Rows part{w_OI.codes_RC.index_select(1, columns), w_OI.absmax_R};
  const at::Tensor values = at::empty(part.codes_RC.sizes(), x_TI.options());
  dequantize_int8_rows(part, values);
  product(x_TI.index_select(1, columns), values.t(), y_TO, {.add = true});
}

}  // namespace trireme
