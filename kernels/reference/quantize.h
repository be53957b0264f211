// The number formats of kernels/quantize.h by plain loops in fp32, bit for bit. The tensors of a slice are those that it has.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/quantize.h"

namespace trireme::kernels::reference {

int four_bit_code(FourBit kind, float x);
float four_bit_number(FourBit kind, int code);
int map_code(const float* map, float x);

struct BlockCodes {
  std::vector<uint8_t> codes;
  std::vector<float> absmax;
};
BlockCodes quantize_4(FourBit kind, const std::vector<float>& x, int64_t block_size);
BlockCodes quantize_blocks(const float* map, const std::vector<float>& x, float offset, int64_t block_size);

// All scales of nested ones.
std::vector<float> nested_scales(const std::vector<uint8_t>& codes, const std::vector<float>& nested, const float* map, int64_t nested_block_size, float offset, const BlockSlice& slice);

// In fp32, before they are rounded.
std::vector<float> dequantize_4(FourBit kind, const std::vector<uint8_t>& codes, const std::vector<float>& scales, int64_t count, int64_t block_size);
std::vector<float> dequantize_blocks(const float* map, const BlockCodes& q, int64_t block_size);

struct RowCodes {
  std::vector<int8_t> codes;
  std::vector<float> absmax;
  std::vector<uint8_t> outlier;
};
RowCodes quantize_rows(const std::vector<float>& x, int64_t width, float threshold);
std::vector<float> dequantize_rows(const RowCodes& q, int64_t width);
std::vector<float> scale_products(const std::vector<int32_t>& products, const std::vector<float>& row, const std::vector<float>& column, const std::vector<float>& bias);

struct GroupCodes {
  std::vector<int> codes;  // one each
  std::vector<float> scale;
  std::vector<int> zero;
};
GroupCodes quantize_groups(const AffineFormat& format, const std::vector<float>& x, int64_t group_size);
std::vector<float> dequantize_groups(const GroupCodes& q, int64_t group_size);
std::vector<uint8_t> packed(const AffineFormat& format, const std::vector<int>& codes);

}  // namespace trireme::kernels::reference
