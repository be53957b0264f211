// The vector loops under the number formats: serial functions over whole blocks, one set per dtype and instruction set. Callers split blocks
// over threads. The last block may be shorter.
#pragma once

#include "base/check.h"
#include "quant/dynamic_map.h"
#include "quant/four_bit.h"

namespace trireme {

// BlockScales as the loops read them.
struct ScaleReader {
  explicit ScaleReader(const BlockScales& scales);  // which must outlive this; InternalError: not on the CPU, or sizes that do not fit
  const float* plain;  // null: nested
  const uint8_t* codes;
  const float *nested, *map;
  int64_t nested_block_size;
  float offset;
  BlockSlice slice;
};

template <typename T>
struct QuantLoops {
  // `first`: number of the first block here
  void (*quantize_4bit)(FourBit kind, int64_t count, int64_t block_size, const T* x, uint8_t* codes, float* absmax);
  void (*dequantize_4bit)(FourBit kind, const ScaleReader& scales, int64_t first, int64_t count, int64_t block_size, const uint8_t* codes, T* y);
  void (*quantize_blockwise)(const DynamicSearch& map, int64_t count, int64_t block_size, const T* x, uint8_t* codes, float* absmax);
  void (*dequantize_blockwise)(const float* map, int64_t count, int64_t block_size, const uint8_t* codes, const float* absmax, T* y);
  void (*read_scales)(const ScaleReader& scales, int64_t first, int64_t count, float* to);
};

template <typename T>
const QuantLoops<T>& quant_loops(int level = -1);  // as loops() in ops/loops.h

// f(loops, T{}) of a dtype that can be quantized.
template <typename F>
void with_quant_loops(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat:
      return f(quant_loops<float>(), float{});
    case at::kBFloat16:
      return f(quant_loops<c10::BFloat16>(), c10::BFloat16{});
    case at::kHalf:
      return f(quant_loops<c10::Half>(), c10::Half{});
    default:
      TRIREME_CHECK(false, "dtype ", c10::toString(dtype), " is not float32, bfloat16 or float16");
  }
}

}  // namespace trireme
