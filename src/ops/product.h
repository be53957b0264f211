// Matrix products of plain tensors (no gradients): a device's by its kernels (cuBLASLt), those of the CPU by ATen.
#pragma once

#include "base/tensor.h"

namespace trireme {

struct ProductTerms {
  double scale = 1;
  bool add = false;        // to what is in y
  at::Tensor bias_N = {};  // undefined: none
};

// y = scale * a b (+ y, or + bias in each row). Any may be a transposed view; rows of y are contiguous. Dtypes are one, or y's is float32:
// by kernels all is added up in fp32 and rounded once; ATen rounds the product to the dtype of a and b first.
void product(const at::Tensor& a_MK, const at::Tensor& b_KN, at::Tensor& y_MN, const ProductTerms& terms = {});
at::Tensor product(const at::Tensor& a_MK, const at::Tensor& b_KN, double scale = 1);

// y = x w^T (+ bias), as a linear layer has it; on the CPU few rows in 16 bits, as when text is generated, read the weight as it lies.
void linear_product(const at::Tensor& x_TI, const at::Tensor& w_OI, const at::Tensor& bias_O, at::Tensor& y_TO);
// y += scale * x w^T
void add_linear_product(const at::Tensor& x_TI, const at::Tensor& w_OI, double scale, at::Tensor& y_TO);

// What a product of kernels may use while it runs, on x's device.
struct ProductWorkspace {
  explicit ProductWorkspace(const at::Tensor& x);
  at::Tensor memory;
  void* data;  // at a multiple of 256 bytes
  int64_t num_bytes;
};

}  // namespace trireme
