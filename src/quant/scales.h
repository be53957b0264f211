// The scales of blocks of values: one fp32 each, or with double quantization (Dettmers et al. 2023) 8 bits each, one fp32 for 256 of
// them and an offset for all:
//   offset = mean of the scales (summed in order in fp64, rounded); scale[b] = map[code[b]] * nested[b / 256] + offset, product and sum
//   each rounded to fp32; codes and nested scales are those of quantize_blockwise (quant/dynamic_map.h) of scale - offset.
#pragma once

#include "base/tensor.h"

namespace trireme {

// 32, 64, ... 4096: blocks that share a scale.
constexpr bool is_block_size(int64_t size) { return size >= 32 && size <= 4096 && (size & (size - 1)) == 0; }

// Which blocks of a whole tensor a slice of it has, whose nested scales are the whole's: its rows have `per_row` blocks of the
// whole_per_row that a row of the whole has, from block `first` of the whole on. per_row 0: all that follow, in one run.
struct BlockSlice {
  int64_t first = 0, per_row = 0, whole_per_row = 0;
  int64_t whole(int64_t block) const { return first + (per_row == 0 ? block : block / per_row * whole_per_row + block % per_row); }
};

struct BlockScales {
  at::Tensor absmax{};         // fp32 [B], or the codes, uint8 [B]
  at::Tensor nested_absmax{};  // fp32 [ceil(blocks of the whole / nested_block_size)]; undefined: absmax is fp32
  at::Tensor nested_map{};     // fp32 [256], the numbers of the codes
  int64_t nested_block_size = 256;
  at::Tensor offset{};           // fp32 [1], where the scales are
  BlockSlice slice{};

  bool is_nested() const { return nested_absmax.defined(); }
};

// Double quantization of the plain scales of a whole tensor. The same bits on every device.
BlockScales double_quantized(const BlockScales& plain);

// All scales as fp32 [B].
at::Tensor plain_scales(const BlockScales& scales);

// What is wrong with scales that came from outside, as the end of a sentence that names the tensor: "scale 7 is NaN", "nested scale 2 is
// negative (-0.5)", "its nested offset is inf"; empty: nothing. Scales must be finite and not negative, the numbers of a nested map finite.
std::string check_scales(const BlockScales& scales);

}  // namespace trireme
