// The vector loops under the number formats: serial functions over whole blocks, one set per dtype and instruction set. Callers split blocks
// over threads. The last block may be shorter.
#pragma once

#include "base/check.h"
#include "quant/dynamic_map.h"
#include "quant/four_bit.h"

namespace trireme {

// Of a group (quant/affine.h).
struct Extent {
  float low = 0, high = 0;
};
struct AffineGroup {
  float scale, inverse;  // inverse: of the scale, as values are multiplied with it
  int zero;
};
AffineGroup affine_group(const kernels::AffineFormat& format, const Extent& extent);

template <typename T>
struct QuantLoops {
  // `first`: number of the first block here
  void (*quantize_4bit)(FourBit kind, int64_t count, int64_t block_size, const T* x, uint8_t* codes, float* absmax);
  void (*dequantize_4bit)(FourBit kind, const kernels::ScalesOfBlocks& scales, int64_t first, int64_t count, int64_t block_size, const uint8_t* codes, T* y);
  void (*quantize_blockwise)(const DynamicSearch& map, int64_t count, int64_t block_size, const T* x, uint8_t* codes, float* absmax);
  void (*dequantize_blockwise)(const float* map, int64_t count, int64_t block_size, const uint8_t* codes, const float* absmax, T* y);
  // Of rows of `width`: absmax of what is below the threshold (0: none), and 1 in outlier where a column has what is not; rows may be given
  // to several threads. Then their codes, 0 in those columns (outlier null: none).
  void (*largest_of_rows)(int64_t rows, int64_t width, const T* x, float threshold, float* absmax, uint8_t* outlier);
  void (*quantize_rows)(int64_t rows, int64_t width, const T* x, const float* absmax, const uint8_t* outlier, int8_t* codes);
  void (*dequantize_rows)(int64_t rows, int64_t width, const int8_t* codes, const float* absmax, T* y);
  void (*scale_products)(int64_t rows, int64_t width, const int32_t* products, const float* row, const float* column, const T* bias, T* y);  // as kernels/quantize.h
  Extent (*extent)(int64_t count, const T* x);
  void (*quantize_affine)(const kernels::AffineFormat& format, const AffineGroup& group, int64_t count, const T* x, uint8_t* codes);
  void (*dequantize_affine)(const kernels::AffineFormat& format, float scale, int zero, int64_t count, const uint8_t* codes, T* y);
  void (*read_scales)(const kernels::ScalesOfBlocks& scales, int64_t first, int64_t count, float* to);
};

template <typename T>
const QuantLoops<T>& quant_loops(int level = -1);  // as loops() in ops/loops.h

// x as loops and kernels read it. InternalError: another dtype than fp32, bf16 or fp16.
at::Tensor quantizable(const at::Tensor& x);

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
