#include "quant/scales.h"

#include <cmath>

#include "ops/op_support.h"
#include "quant/quant_loops.h"

namespace trireme {

kernels::ScalesOfBlocks scales_of(const BlockScales& s, int64_t num_blocks, const at::Tensor& where) {
  const auto data = [](const at::Tensor& t) {
    TRIREME_CHECK(t.is_contiguous(), t.strides());
    return t.data_ptr<float>();
  };
  TRIREME_CHECK(s.absmax.numel() == num_blocks && s.absmax.is_contiguous(), s.absmax.sizes(), " for ", num_blocks, " blocks");
  check_alike("scales", {"values", where}, {{"scales", s.absmax}}, s.is_nested() ? at::kByte : at::kFloat);
  if (!s.is_nested()) return {data(s.absmax), nullptr, nullptr, nullptr, 0, nullptr, s.slice};
  check_alike("scales", {"values", where}, {{"nested scales", s.nested_absmax}, {"nested map", s.nested_map}, {"nested offset", s.offset}}, at::kFloat);
  TRIREME_CHECK(s.nested_map.numel() == 256 && s.offset.numel() == 1, s.nested_map.sizes(), s.offset.sizes());
  const int64_t size = s.nested_block_size;
  TRIREME_CHECK(size > 0 && (size & (size - 1)) == 0, size);
  TRIREME_CHECK(num_blocks == 0 || s.slice.whole(num_blocks - 1) / size < s.nested_absmax.numel(), "block ", s.slice.whole(num_blocks - 1), " has no nested scale: there are ",
                s.nested_absmax.numel());
  return {nullptr, s.absmax.data_ptr<uint8_t>(), data(s.nested_absmax), data(s.nested_map), size, data(s.offset), s.slice};
}

BlockScales double_quantized(const BlockScales& plain) {
  TRIREME_CHECK(!plain.is_nested() && plain.slice.first == 0 && plain.slice.per_row == 0, "scales of a whole tensor, not nested yet");
  const at::Tensor on_host = plain.absmax.cpu();
  const float* const values = on_host.data_ptr<float>();
  double sum = 0;
  for (int64_t i = 0; i < on_host.numel(); ++i) sum += static_cast<double>(values[i]);
  BlockScales out = plain;
  const float offset = static_cast<float>(sum / static_cast<double>(std::max<int64_t>(1, on_host.numel())));
  out.offset = at::full({1}, offset, plain.absmax.options());
  out.nested_map = dynamic_map(true, plain.absmax.device());
  const BlockCodes q = quantize_blockwise(plain.absmax - offset, out.nested_map, out.nested_block_size);
  out.absmax = q.codes, out.nested_absmax = q.absmax;
  return out;
}

at::Tensor plain_scales(const BlockScales& scales) {
  if (!scales.is_nested()) return scales.absmax;
  BlockScales on_host = scales;
  on_host.absmax = scales.absmax.cpu(), on_host.nested_absmax = scales.nested_absmax.cpu(), on_host.nested_map = scales.nested_map.cpu();
  on_host.offset = scales.offset.cpu();
  const at::Tensor out = at::empty({scales.absmax.numel()}, at::kFloat);
  quant_loops<float>().read_scales(scales_of(on_host, out.numel(), out), 0, out.numel(), out.data_ptr<float>());
  return out.to(scales.absmax.device());
}

std::string check_scales(const BlockScales& scales) {
  const auto first_wrong = [](const char* name, const at::Tensor& t, bool may_be_negative) -> std::string {
    const at::Tensor on_host = t.cpu().contiguous();
    const float* const values = on_host.data_ptr<float>();
    for (int64_t i = 0; i < on_host.numel(); ++i) {
      const float x = values[i];
      if (std::isnan(x)) return str(name, " ", i, " is NaN");
      if (std::isinf(x)) return str(name, " ", i, " is infinite");
      if (x < 0 && !may_be_negative) return str(name, " ", i, " is negative (", x, ")");
    }
    return "";
  };
  if (!scales.is_nested()) return first_wrong("scale", scales.absmax, false);
  std::string wrong = first_wrong("nested scale", scales.nested_absmax, false);
  if (wrong.empty()) wrong = first_wrong("number of the nested map", scales.nested_map, true);
  if (!wrong.empty()) return wrong;
  const float offset = scales.offset.item<float>();
  if (!std::isfinite(offset)) return str("its nested offset is ", offset);
  if (offset < 0) return str("its nested offset is negative (", offset, ")");
  const at::Tensor plain = plain_scales(scales).cpu(), nested = scales.nested_absmax.cpu(), numbers = std::get<0>(scales.nested_map.cpu().sort());
  const float step = numbers.diff().max().item<float>();
  const float *const values = plain.data_ptr<float>(), *const widths = nested.data_ptr<float>();
  for (int64_t i = 0; i < plain.numel(); ++i) {
    if (!std::isfinite(values[i])) return str("scale ", i, " stands for ", values[i], " (not finite)");
    if (values[i] < -step * widths[scales.slice.whole(i) / scales.nested_block_size]) return str("scale ", i, " stands for ", values[i], " (negative)");
  }
  return "";
}

}  // namespace trireme
