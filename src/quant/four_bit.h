// NF4 and FP4 (Dettmers et al. 2023): blocks of consecutive values of the flattened tensor share a scale, their largest magnitude
// (absmax), and each value is the code of one of 16 numbers in [-1, 1] times the scale. The bits of bitsandbytes' CUDA code:
//   x = value * (1 / absmax) in fp32; NF4: code = how many of the 15 thresholds are below x (a tie is the lower code);
//   FP4: a sign bit (8) where x < 0, and so of |x| with the 7 thresholds of FP4
//   element 2j is in the high 4 bits of byte j; a last odd element has a 0 beside it
//   value = number[code] * scale in fp32, rounded once
// A block of zeros has scale 0 and gives zeros. A NaN has code 0 and leaves the scale alone (a block of nothing else: 0); an infinity
// makes the scale infinite and the block's values NaN or infinite: check_scales (quant/scales.h) finds it.
#pragma once

#include <array>

#include "quant/scales.h"

namespace trireme {

using kernels::FourBit;

// The numbers of the codes; bitsandbytes' files hold them as quant_map.
const std::array<float, 16>& four_bit_numbers(FourBit kind);

struct FourBitTensor {
  FourBit kind = FourBit::kNf4;
  int64_t block_size = 64;
  at::Tensor codes;    // uint8 [ceil(N / 2)]
  BlockScales scales;  // of ceil(N / block_size) blocks
};

// Of fp32, bf16 or fp16, in any shape; scales plain. InternalError: another dtype, or !is_block_size(block_size).
FourBitTensor quantize_4bit(const at::Tensor& w, FourBit kind, int64_t block_size);

// Writes the values into `out`: fp32, bf16 or fp16, contiguous, of as many elements as there are codes (or one less). In one pass,
// with nothing allocated. InternalError: sizes, dtypes or devices do not fit.
void dequantize_4bit(const FourBitTensor& q, const at::Tensor& out);

// Whether elements [begin, end) along dimension `dim` (0 or 1) of a tensor [rows, columns] cut no block.
bool four_bit_slice_fits(int64_t rows, int64_t columns, int64_t dim, int64_t begin, int64_t end, int64_t block_size);

}  // namespace trireme
