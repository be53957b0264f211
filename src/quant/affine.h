// Integers of 8 or 4 bits with a scale for each group of consecutive values of the flattened tensor: the whole, a row, a block. Symmetric
// around 0 (absmax quantization), or with a zero point (asymmetric), where 0 is a code too:
//   low = min(0, least value), high = max(0, largest), m = the larger magnitude; NaNs are left out
//                   range        steps  codes        zero point z
//   8, symmetric    m            127    -127 .. 127  0
//   8, zero point   high - low   255    -128 .. 127  -128 + nearest(-low * (steps / range))
//   4, symmetric    2 m          15     0 .. 15      8                                        (Frantar et al. 2023, GPTQ)
//   4, zero point   high - low   15     0 .. 15      nearest(-low * (steps / range))
//   scale = range / steps; code = nearest(x * (steps / range)) + z, kept within the codes; value = (code - z) * scale
// in fp32, to the nearest even, 0 where that is no number; values rounded once. A group of zeros has scale 0.
#pragma once

#include "base/tensor.h"
#include "kernels/quantize.h"

namespace trireme {

using kernels::AffineFormat;  // {bits, zero_point}

struct AffineTensor {
  AffineFormat format;
  int64_t group_size = 0;  // 0: the whole tensor
  at::Tensor codes;        // int8 [N], or uint8 [ceil(N / 2)]: element 2j in the low 4 bits of byte j, so that 8 make a little-endian word
  at::Tensor scale;        // fp32 [groups]
  at::Tensor zero;         // int8 [groups]; undefined: symmetric
};

// Of fp32, bf16 or fp16, in any shape. InternalError: another dtype, or groups of an odd size in 4 bits.
AffineTensor quantize_affine(const at::Tensor& x, const AffineFormat& format, int64_t group_size = 0);
void dequantize_affine(const AffineTensor& q, const at::Tensor& out);  // fp32, bf16 or fp16, contiguous, of as many elements

}  // namespace trireme
