// LLM.int8() (Dettmers et al. 2022): rows of a matrix in eight bits, and the product of such a weight with inputs that are quantized on
// the way, but for the few columns with outliers. The bits of bitsandbytes' CUDA code:
//   codes: x * (127 / absmax of the row) in fp32, to the nearest even; a row of zeros, and a NaN, have codes 0
//   values: code * absmax * (1 / 127) in fp32, rounded once
#pragma once

#include "base/tensor.h"

namespace trireme {

struct Int8Rows {
  at::Tensor codes_RC;  // int8; bitsandbytes' files: weight
  at::Tensor absmax_R;  // fp32; bitsandbytes' files: SCB
};

// Of [R, C] in fp32, bf16 or fp16.
Int8Rows quantize_int8_rows(const at::Tensor& x_RC);
void dequantize_int8_rows(const Int8Rows& q, const at::Tensor& out_RC);  // fp32, bf16 or fp16, contiguous

// Inputs: columns that have a value of `threshold` or more in magnitude, or a NaN, have codes 0, and such values no part in absmax.
struct Int8Inputs {
  Int8Rows rows;
  at::Tensor outlier_C;  // uint8: 1 where the column has one; undefined with a threshold of 0, which is none
};
// Where others have the rows' other columns: makes of [R] the largest of all of them, so that all have the codes of the whole rows.
using RowMaximum = std::function<void(at::Tensor absmax_R)>;
Int8Inputs quantize_int8_inputs(const at::Tensor& x_RC, float threshold, const RowMaximum& maximum = {});

constexpr float kInt8Threshold = 6.0f;
constexpr int64_t kInt8MostColumns = (int64_t{1} << 31) / (127 * 127);  // 133,144: of more the sum of products may leave int32

// y = x w^T (+ bias): codes' products in int32, times absmax of both rows times 1 / 127^2 in fp32 (+ bias), rounded once; then the
// columns of x with outliers times those of w's values in x's dtype are added. Which columns have outliers is of all rows of x
// together. y and bias are of x's dtype. A gradient goes back through w's values (dequantize_int8_rows). On a device a w whose
// sizes are no multiples of 8 is copied for each product. InternalError: sizes, dtypes or devices do not fit; more than
// kInt8MostColumns.
void int8_linear(const at::Tensor& x_TI, const Int8Rows& w_OI, const at::Tensor& bias_O, at::Tensor& y_TO, float threshold = kInt8Threshold,
                 const RowMaximum& maximum = {});

}  // namespace trireme
