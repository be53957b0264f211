#include "quant/scales.h"

#include <cmath>

#include "ops/op_support.h"
#include "quant/quant_loops.h"

namespace trireme {

ScaleReader::ScaleReader(const BlockScales& s)
    : plain(nullptr), codes(nullptr), nested(nullptr), map(nullptr), nested_block_size(s.nested_block_size), offset(0), slice(s.slice) {
  TRIREME_CHECK(s.absmax.is_cpu() && s.absmax.is_contiguous(), s.absmax.device().str(), s.absmax.strides());
  if (!s.is_nested()) {
    plain = s.absmax.data_ptr<float>();
    return;
  }
  TRIREME_CHECK(s.nested_map.numel() == 256 && s.nested_block_size > 0 && s.offset.numel() == 1, s.nested_map.sizes(), " ", s.nested_block_size);
  offset = s.offset.data_ptr<float>()[0];
  TRIREME_CHECK(s.nested_map.is_contiguous() && s.nested_absmax.is_contiguous());
  const int64_t count = s.absmax.numel();
  TRIREME_CHECK(count == 0 || slice.whole(count - 1) / nested_block_size < s.nested_absmax.numel(), "block ", slice.whole(count - 1), " has no nested scale: there are ",
                s.nested_absmax.numel());
  codes = s.absmax.data_ptr<uint8_t>(), nested = s.nested_absmax.data_ptr<float>(), map = s.nested_map.data_ptr<float>();
}

BlockScales double_quantized(const BlockScales& plain) {
  TRIREME_CHECK(!plain.is_nested() && plain.slice.first == 0 && plain.slice.per_row == 0, "scales of a whole tensor, not nested yet");
  const at::Tensor on_host = plain.absmax.cpu();
  const float* const values = on_host.data_ptr<float>();
  double sum = 0;
  for (int64_t i = 0; i < on_host.numel(); ++i) sum += static_cast<double>(values[i]);
  BlockScales out = plain;
  out.offset = at::full({1}, static_cast<float>(sum / static_cast<double>(std::max<int64_t>(1, on_host.numel()))), plain.absmax.options());
  out.nested_map = dynamic_map(true, plain.absmax.device());
  const BlockCodes q = quantize_blockwise(plain.absmax - out.offset, out.nested_map, out.nested_block_size);
  out.absmax = q.codes, out.nested_absmax = q.absmax;
  return out;
}

at::Tensor plain_scales(const BlockScales& scales) {
  if (!scales.is_nested()) return scales.absmax;
  BlockScales on_host = scales;
  on_host.absmax = scales.absmax.cpu(), on_host.nested_absmax = scales.nested_absmax.cpu(), on_host.nested_map = scales.nested_map.cpu(), on_host.offset = scales.offset.cpu();
  const at::Tensor out = at::empty({scales.absmax.numel()}, at::kFloat);
  quant_loops<float>().read_scales(ScaleReader(on_host), 0, out.numel(), out.data_ptr<float>());
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
  if (const float offset = scales.offset.item<float>(); wrong.empty() && !std::isfinite(offset)) wrong = str("its nested offset is ", offset);
  return wrong;
}

}  // namespace trireme
