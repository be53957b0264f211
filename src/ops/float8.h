// A frozen weight in eight bits on a device (compute capability 8.9 or later): products of float8 with one scale a tensor
// (Micikevicius et al. 2022), the weight and inputs in e4m3, gradients in e5m2. Twice the rate of 16 bits; the weight is held in both
// arrangements, as such products take one alone: its memory is that of 16 bits. The CPU has no code for it.
#pragma once

#include "base/tensor.h"

namespace trireme {

struct Float8Weight {
  at::Tensor w_OI, w_IO;  // codes, as uint8
  at::Tensor scale;       // fp32 [1]
};
Float8Weight float8_weight(const at::Tensor& w_OI);  // I and O multiples of 16; 16 bits

// x w^T (+ bias), of x's dtype (bfloat16 or float16); the gradient of x alone, from that of the result rounded to e5m2. Keeps nothing
// but the weight.
at::Tensor float8_linear(const at::Tensor& x_TI, const Float8Weight& w, const at::Tensor& bias_O = {});

}  // namespace trireme
