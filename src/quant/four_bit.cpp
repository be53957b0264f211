#include "quant/four_bit.h"

#include "ops/device.h"
#include "ops/op_support.h"
#include "quant/quant_loops.h"

namespace trireme {

const std::array<float, 16>& four_bit_numbers(FourBit kind) {
  static constexpr std::array<float, 16> kNf4 = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
                                                 -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                                                 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
  static constexpr std::array<float, 16> kFp4 = {0.0f, 0.005208333333f, 0.66666667f, 1.0f, 0.33333333f, 0.5f, 0.16666667f, 0.25f,
                                                 -0.0f, -0.005208333333f, -0.66666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f};
  return kind == FourBit::kNf4 ? kNf4 : kFp4;
}

FourBitTensor quantize_4bit(const at::Tensor& w, FourBit kind, int64_t block_size) {
  TRIREME_CHECK(is_block_size(block_size), block_size);
  const at::Tensor x = quantizable(w);
  const int64_t count = x.numel(), num_blocks = (count + block_size - 1) / block_size;
  FourBitTensor q{kind, block_size, at::empty({(count + 1) / 2}, x.options().dtype(at::kByte)), {}};
  q.scales.absmax = at::empty({num_blocks}, x.options().dtype(at::kFloat));
  uint8_t* const codes = q.codes.data_ptr<uint8_t>();
  float* const absmax = q.scales.absmax.data_ptr<float>();
  if (const kernels::Kernels* k = kernels_of(x)) {
    k->quantize_4({kernel_type(x), kind, count, block_size, data_of(x), codes, absmax}, stream_of(x));
    return q;
  }
  with_quant_loops(x.scalar_type(), [&](const auto& loops, auto zero) {
    const auto* values = x.data_ptr<decltype(zero)>();
    for_rows(num_blocks, block_size, [&](int64_t first, int64_t last) {
      const int64_t begin = first * block_size, size = std::min(count, last * block_size) - begin;
      loops.quantize_4bit(kind, size, block_size, values + begin, codes + begin / 2, absmax + first);
    });
  });
  return q;
}

void dequantize_4bit(const FourBitTensor& q, const at::Tensor& out) {
  const int64_t count = out.numel(), block_size = q.block_size, num_blocks = (count + block_size - 1) / block_size;
  check_alike("dequantize_4bit", {"result", out}, {{"codes", q.codes}}, at::kByte);
  TRIREME_CHECK(is_block_size(block_size) && q.codes.numel() == (count + 1) / 2, block_size, " ", q.codes.sizes(), out.sizes());
  TRIREME_CHECK(q.codes.is_contiguous() && out.is_contiguous(), q.codes.strides(), out.strides());
  const kernels::ScalesOfBlocks scales = scales_of(q.scales, num_blocks, out);
  const uint8_t* const codes = q.codes.data_ptr<uint8_t>();
  if (const kernels::Kernels* k = kernels_of(out))
    return k->dequantize_4({kernel_type(out), q.kind, count, block_size, codes, scales, data_of(out)}, stream_of(out));
  with_quant_loops(out.scalar_type(), [&](const auto& loops, auto zero) {
    auto* values = out.data_ptr<decltype(zero)>();
    for_rows(num_blocks, block_size, [&](int64_t first, int64_t last) {
      const int64_t begin = first * block_size, size = std::min(count, last * block_size) - begin;
      loops.dequantize_4bit(q.kind, scales, first, size, block_size, codes + begin / 2, values + begin);
    });
  });
}

bool four_bit_slice_fits(int64_t rows, int64_t columns, int64_t dim, int64_t begin, int64_t end, int64_t block_size) {
  if (dim == 0) return begin * columns % block_size == 0 && (end == rows || end * columns % block_size == 0);
  return columns % block_size == 0 && begin % block_size == 0 && end % block_size == 0;
}

}  // namespace trireme
