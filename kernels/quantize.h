// Number formats of 4 and 8 bits, included by kernels.h: contracts of the kernels in quantize_blocks.cu and int8.cu. What a code means is
// in src/quant/four_bit.h, dynamic_map.h and int8.h; all results have those bits. Blocks and their codes begin at multiples of 16 bytes, but codes that are
// read in 4 bits, and rows and groups, anywhere.
#pragma once

#include "kernels/types.h"

namespace trireme::kernels {

enum class FourBit { kNf4, kFp4 };

// Which blocks of a whole tensor a slice of it has, whose nested scales are the whole's: its rows have `per_row` blocks of the
// whole_per_row that a row of the whole has, from block `first` of the whole on. per_row 0: all that follow, in one run.
struct BlockSlice {
  int64_t first = 0, per_row = 0, whole_per_row = 0;
  int64_t whole(int64_t block) const { return first + (per_row == 0 ? block : block / per_row * whole_per_row + block % per_row); }
};

// One scale for each block: plain[b], or with w = slice.whole(b), map[codes[b]] * nested[w / nested_block_size] + *offset, product and sum
// rounded each.
struct ScalesOfBlocks {
  const float* plain;            // null: nested
  const uint8_t* codes;
  const float *nested, *map;     // map: [256]
  int64_t nested_block_size;     // a power of two
  const float* offset;           // [1]
  BlockSlice slice;
};

// Blocks of block_size values (32, 64, ... 4096) of fp32, bf16 or fp16, the last one maybe shorter; less than 2^31 blocks.
struct Quantize4 {
  Type type;
  FourBit kind;
  int64_t count, block_size;
  const void* x;
  uint8_t* codes;  // [ceil(count / 2)]
  float* absmax;
};
struct Dequantize4 {
  Type type;
  FourBit kind;
  int64_t count, block_size;
  const uint8_t* codes;
  ScalesOfBlocks scales;
  void* y;
};
struct QuantizeBlocks {  // of x - offset
  Type type;
  int64_t count, block_size;
  const void* x;
  float offset;
  const float* map;  // [256]
  uint8_t* codes;    // [count]
  float* absmax;
};
struct DequantizeBlocks {
  Type type;
  int64_t count, block_size;
  const uint8_t* codes;
  const float *absmax, *map;
  void* y;
};

// code = x * (127 / absmax) to the nearest even, absmax of each row, NaNs left out, whose code is 0 as in rows of zeros. With a threshold, values from it on and NaNs count
// for nothing, and columns that have one get codes 0 and outlier 1. In two calls: between them absmax may become that of rows which others
// have parts of.
struct QuantizeRows {
  Type type;
  int64_t num_rows, width;
  const void* x;
  float threshold;    // 0: none
  int8_t* codes;      // [num_rows, width]
  float* absmax;      // [num_rows]
  uint8_t* outlier;   // [width]; null without a threshold
};
// y = code * absmax * (1 / 127)
struct DequantizeRows {
  Type type;
  int64_t num_rows, width;
  const int8_t* codes;
  const float* absmax;
  void* y;
};
// y = product * row * column * (1 / 127^2) (+ bias), in this order, rounded once to `type`; of codes' products in int32.
struct ScaleProducts {
  Type type;
  int64_t num_rows, width;
  const int32_t* products;  // [num_rows, width]
  const float *row, *column;
  const void* bias;         // [width] of `type`; null: none
  void* y;
};

// Integers with a scale and maybe a zero point for each group of group_size values (the last maybe shorter): src/quant/affine.h.
struct AffineFormat {
  int bits = 8;  // or 4
  bool zero_point = false;
};
constexpr int symmetric_zero(const AffineFormat& format) { return format.bits == 4 ? 8 : 0; }
constexpr int least_code(const AffineFormat& format) { return format.bits == 4 ? 0 : format.zero_point ? -128 : -127; }
constexpr int largest_code(const AffineFormat& format) { return format.bits == 4 ? 15 : 127; }

struct QuantizeGroups {
  Type type;
  AffineFormat format;
  int64_t count, group_size;  // of 4 bits: even, where there is more than one group
  const void* x;
  uint8_t* codes;    // int8 [count], or [ceil(count / 2)]
  float* scale;      // [groups]
  int8_t* zero;      // [groups]; null where symmetric
  float* workspace;  // quantize_groups_workspace(count, group_size) elements
};
constexpr int64_t groups_of(int64_t count, int64_t group_size) { return (count + group_size - 1) / group_size; }
constexpr int64_t parts_of_group(int64_t group_size) { return group_size < 8192 ? 1 : group_size / 8192 < 512 ? group_size / 8192 : 512; }
constexpr int64_t quantize_groups_workspace(int64_t count, int64_t group_size) { return 2 * groups_of(count, group_size) * (1 + parts_of_group(group_size)); }

struct DequantizeGroups {
  Type type;
  AffineFormat format;
  int64_t count, group_size;
  const uint8_t* codes;
  const float* scale;
  const int8_t* zero;  // null where symmetric
  void* y;
};

}  // namespace trireme::kernels
