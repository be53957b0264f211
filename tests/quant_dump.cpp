// quant_dump FORMAT SIZE IN OUT: quantizes the fp32 values of file IN, for quant_parity_test.py.
//   nf4 | fp4 | signed | unsigned (the dynamic maps)   in blocks of SIZE
//   int8                                                rows of SIZE
//   linear8                                             a layer in LLM.int8() of the second half of the rows of SIZE, with the first as inputs
// Writes OUT.codes, OUT.absmax (fp32), OUT.values (fp32) and OUT.values16 (bf16); of nf4 and fp4 also OUT.nested_codes,
// OUT.nested_absmax, OUT.offset and OUT.nested_values16, with scales in eight bits;
// of linear8 the layer's outputs as OUT.y and, with these as gradients, that of the inputs as OUT.grad.
#include <fstream>
#include <iostream>

#include "quant/dynamic_map.h"
#include "quant/four_bit.h"
#include "quant/int8_weight.h"

namespace {

using namespace trireme;

at::Tensor read(const std::string& path) {
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  at::Tensor x = at::empty({static_cast<int64_t>(in.tellg()) / 4}, at::kFloat);
  in.seekg(0);
  in.read(static_cast<char*>(x.data_ptr()), static_cast<std::streamsize>(x.nbytes()));
  if (!in) throw std::runtime_error("cannot read " + path);
  return x;
}

void write(const std::string& path, const at::Tensor& x) {
  std::ofstream out(path, std::ios::binary);
  out.write(static_cast<const char*>(x.data_ptr()), static_cast<std::streamsize>(x.nbytes()));
  if (!out) throw std::runtime_error("cannot write " + path);
}

template <typename F>
void write_values(const std::string& out, const at::Tensor& like, const char* name, const F& dequantize) {
  for (const auto& [suffix, dtype] : {std::pair("", at::kFloat), std::pair("16", at::kBFloat16)}) {
    const at::Tensor values = at::empty(like.sizes(), at::TensorOptions(dtype));
    dequantize(values);
    write(out + name + suffix, values);
  }
}

void run(const std::string& format, int64_t size, const at::Tensor& x, const std::string& out) {
  if (format == "int8") {
    const at::Tensor rows = x.view({-1, size});
    const Int8Rows q = quantize_int8_rows(rows);
    write(out + ".codes", q.codes_RC), write(out + ".absmax", q.absmax_R);
    write_values(out, rows, ".values", [&](const at::Tensor& to) { dequantize_int8_rows(q, to); });
  } else if (format == "linear8") {
    const at::Tensor rows = x.view({2, -1, size}), inputs = rows[0];
    const int64_t count = rows.size(1);
    const auto w = int8_weight("layer", count, size, at::kFloat);
    w->set(rows[1]);
    at::Tensor y = at::empty({count, count}), grad = at::empty_like(inputs);
    w->times_transposed()(inputs, {}, y);
    w->times()(y, {}, grad);
    write(out + ".y", y), write(out + ".grad", grad);
  } else if (format == "nf4" || format == "fp4") {
    FourBitTensor q = quantize_4bit(x, format == "nf4" ? FourBit::kNf4 : FourBit::kFp4, size);
    write(out + ".codes", q.codes), write(out + ".absmax", q.scales.absmax);
    write_values(out, x, ".values", [&](const at::Tensor& to) { dequantize_4bit(q, to); });
    q.scales = double_quantized(q.scales);
    write(out + ".nested_codes", q.scales.absmax), write(out + ".nested_absmax", q.scales.nested_absmax), write(out + ".offset", q.scales.offset);
    write_values(out, x, ".nested_values", [&](const at::Tensor& to) { dequantize_4bit(q, to); });
  } else {
    const at::Tensor map = dynamic_map(format == "signed");
    const BlockCodes q = quantize_blockwise(x, map, size);
    write(out + ".codes", q.codes), write(out + ".absmax", q.absmax), write(out + ".map", map);
    write_values(out, x, ".values", [&](const at::Tensor& to) { dequantize_blockwise(q, map, size, to); });
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 5) throw std::runtime_error("quant_dump FORMAT SIZE IN OUT");
  run(argv[1], std::stol(argv[2]), read(argv[3]), argv[4]);
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
