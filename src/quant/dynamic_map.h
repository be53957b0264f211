// The dynamic 8-bit data type (Dettmers 2016; Dettmers et al. 2022, "8-bit optimizers"): 256 numbers in [-1, 1], or [0, 1] unsigned, of
// which each decade down to 1e-7 has half as many as the one above it; blocks of consecutive values share their absmax as a scale. The
// bits of bitsandbytes' CUDA code:
//   x = value * (1 / absmax) in fp32; code = the nearest number's: seven steps of a binary search from number 127, which end at an
//   even one, then the midpoint between that and its neighbour on x's side, where a tie is the even one
//   value = number[code] * absmax in fp32, rounded once
// A block of zeros has scale 0 and gives zeros of a signed map's number 0 (-0.99 * 0), as a NaN has code 0.
#pragma once

#include <array>

#include "base/tensor.h"

namespace trireme {

// The numbers, fp32 [256], ascending. A file of bitsandbytes has its own, which are to be used with its codes.
at::Tensor dynamic_map(bool is_signed, at::Device device = at::kCPU);

struct BlockCodes {
  at::Tensor codes;   // uint8, of the tensor's shape
  at::Tensor absmax;  // fp32 [ceil(N / block_size)]
};

// Of fp32, bf16 or fp16; map_256 where x is. InternalError: another dtype, or !is_block_size(block_size) (quant/scales.h).
BlockCodes quantize_blockwise(const at::Tensor& x, const at::Tensor& map_256, int64_t block_size);

// Into `out`: fp32, bf16 or fp16, contiguous, of as many elements.
void dequantize_blockwise(const BlockCodes& q, const at::Tensor& map_256, int64_t block_size, const at::Tensor& out);

// A map as the CPU's loops search it: a code is the number of thresholds below x. Those are counted up to the cell that x is in, of the
// numbers that share sign, exponent and 7 digits; in a cell there are `most` at most (1 of the dynamic maps).
struct DynamicSearch {
  static constexpr int kFirstCell = 0x3380, kLastCell = 0x3f80;     // upper 16 bits of |x|: 2^-24 and below, 1 and above
  static constexpr int kCells = kLastCell - kFirstCell + 1;
  explicit DynamicSearch(const float* numbers);
  uint8_t code(float x) const;

  alignas(64) std::array<float, 256> number, threshold;  // the last threshold is infinite
  std::array<uint8_t, 2 * kCells + 3> before;            // thresholds below all numbers of the cell; cells of negative numbers are behind
  int most = 0;
};

}  // namespace trireme
