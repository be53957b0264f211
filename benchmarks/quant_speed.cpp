// The number formats on one thread of the CPU, for a weight of 2,816 x 1,024 in bf16: what it takes to quantize and to dequantize it,
// beside a copy of it and the product with 1,024 rows that it feeds. Prints a table; not a test.
#include <ATen/Parallel.h>

#include <chrono>
#include <cstdio>

#include "quant/affine.h"
#include "quant/dynamic_map.h"
#include "quant/four_bit.h"
#include "quant/int8.h"

namespace {

using namespace trireme;

template <typename F>
double milliseconds(const F& f) {
  using Clock = std::chrono::steady_clock;
  f();
  double best = 1e30;
  for (int i = 0; i < 20; ++i) {
    const auto begin = Clock::now();
    f();
    best = std::min(best, std::chrono::duration<double, std::milli>(Clock::now() - begin).count());
  }
  return best;
}

template <typename Quantize, typename Dequantize>
void row(const char* name, const Quantize& quantize, const Dequantize& dequantize) {
  const auto q = quantize();
  const double forth = milliseconds(quantize), back = milliseconds([&] { dequantize(q); });
  std::printf("%-36s %8.3f %8.3f ms\n", name, forth, back);
}

}  // namespace

int main() {
  at::set_num_threads(1);
  const at::Tensor w = at::randn({2816, 1024}).to(at::kBFloat16), out = at::empty_like(w), x = at::randn({1024, 1024}).to(at::kBFloat16);
  at::Tensor y = at::empty({1024, 2816}, w.options());
  std::printf("%-36s %8s %8.3f ms\n%-36s %8s %8.3f ms\n", "copy", "", milliseconds([&] { out.copy_(w); }), "product", "", milliseconds([&] { at::mm_out(y, x, w.t()); }));
  const Int8Rows rows = quantize_int8_rows(w);
  std::printf("%-36s %8s %8.3f ms\n", "product in LLM.int8()", "", milliseconds([&] { int8_linear(x, rows, {}, y); }));
  std::printf("%-36s %8s %8s\n", "", "quantize", "dequantize");
  for (FourBit kind : {FourBit::kNf4, FourBit::kFp4})
    for (bool nested : {false, true})
      row(kind == FourBit::kNf4 ? nested ? "nf4, scales in 8 bits" : "nf4" : nested ? "fp4, scales in 8 bits" : "fp4",
          [&] {
            FourBitTensor q = quantize_4bit(w, kind, 64);
            if (nested) q.scales = double_quantized(q.scales);
            return q;
          },
          [&](const FourBitTensor& q) { dequantize_4bit(q, out); });
  const at::Tensor map = dynamic_map(true);
  row("dynamic map", [&] { return quantize_blockwise(w, map, 256); }, [&](const BlockCodes& q) { dequantize_blockwise(q, map, 256, out); });
  row("int8 rows", [&] { return quantize_int8_rows(w); }, [&](const Int8Rows& q) { dequantize_int8_rows(q, out); });
  row("8 bits with a zero point, rows", [&] { return quantize_affine(w, {8, true}, 1024); }, [&](const AffineTensor& q) { dequantize_affine(q, out); });
  row("4 bits with a zero point, 128", [&] { return quantize_affine(w, {4, true}, 128); }, [&](const AffineTensor& q) { dequantize_affine(q, out); });
  return 0;
}
