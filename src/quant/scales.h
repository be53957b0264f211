// The scales of blocks of values: one fp32 each, or with double quantization (Dettmers et al. 2023) 8 bits each, one fp32 for 256 of
// them and an offset for all:
//   offset = mean of the scales (summed in order in fp64, rounded); scale[b] = map[code[b]] * nested[b / 256] + offset, product and sum
//   each rounded to fp32; codes and nested scales are those of quantize_blockwise (quant/dynamic_map.h) of scale - offset.
#pragma once

#include "base/tensor.h"
#include "kernels/quantize.h"

namespace trireme {

// 32, 64, ... 4096: blocks that share a scale.
constexpr bool is_block_size(int64_t size) { return size >= 32 && size <= 4096 && (size & (size - 1)) == 0; }

using kernels::BlockSlice;

struct BlockScales {
  at::Tensor absmax{};         // fp32 [B], or the codes, uint8 [B]
  at::Tensor nested_absmax{};  // fp32 [ceil(blocks of the whole / nested_block_size)]; undefined: absmax is fp32
  at::Tensor nested_map{};     // fp32 [256], the numbers of the codes
  at::Tensor offset{};         // fp32 [1]
  int64_t nested_block_size = 256;
  BlockSlice slice{};

  bool is_nested() const { return nested_absmax.defined(); }
};

// The pointers, as the loops and kernels take them; `scales` has to outlive them. InternalError: devices (that of `where`), dtypes or sizes
// do not fit num_blocks, or a nested block size that is no power of two.
kernels::ScalesOfBlocks scales_of(const BlockScales& scales, int64_t num_blocks, const at::Tensor& where);

// Double quantization of the plain scales of a whole tensor. The same bits on every device.
BlockScales double_quantized(const BlockScales& plain);

// All scales as fp32 [B].
at::Tensor plain_scales(const BlockScales& scales);

// What is wrong with scales that came from outside, as the end of a sentence that names the tensor: "scale 7 is NaN", "nested scale 2 is
// negative (-0.5)", "its nested offset is inf", "scale 7 stands for -99 (negative)"; empty: nothing. Scales must be finite and not negative, as what nested
// ones stand for must, the numbers of a nested map finite. (What stands for a block of zeros may be below 0 by the rounding of its code: the widest step
// of the map times its nested scale.)
std::string check_scales(const BlockScales& scales);

}  // namespace trireme
