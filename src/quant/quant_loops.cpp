#include "quant/quant_loops.h"

#include <algorithm>
#include <cmath>

namespace trireme {
namespace {

constexpr float kNf4Thresholds[] = {-0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
                                    -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f,
                                    0.2920137718319893f, 0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f};
constexpr float kFp4Thresholds[] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f};

}  // namespace
}  // namespace trireme

#define TRIREME_LOOPS "quant/quant_loops.inc"
#include "ops/vector_targets.h"

namespace trireme {

template <typename T>
const QuantLoops<T>& quant_loops(int level) {
  if (level < 0) level = vector_level();
  TRIREME_CHECK(level <= vector_level(), "level ", level);
  return level == 2 ? level2::kQuantLoops<T> : level == 1 ? level1::kQuantLoops<T> : level0::kQuantLoops<T>;
}

template const QuantLoops<float>& quant_loops<float>(int);
template const QuantLoops<c10::BFloat16>& quant_loops<c10::BFloat16>(int);
template const QuantLoops<c10::Half>& quant_loops<c10::Half>(int);

AffineGroup affine_group(const kernels::AffineFormat& format, const Extent& extent) {
  const bool is_byte = format.bits == 8;
  const float steps = !is_byte ? 15 : format.zero_point ? 255 : 127;
  const float range = format.zero_point ? extent.high - extent.low : std::max(extent.high, -extent.low) * (is_byte ? 1 : 2), inverse = steps / range;
  if (!format.zero_point) return {range / steps, inverse, kernels::symmetric_zero(format)};
  const float zero = std::nearbyint(-extent.low * inverse);  // NaN of a group of zeros
  return {range / steps, inverse, (zero > 0 ? static_cast<int>(std::min(zero, steps)) : 0) + kernels::least_code(format)};
}

at::Tensor quantizable(const at::Tensor& x) {
  with_quant_loops(x.scalar_type(), [](const auto&, auto) {});
  const at::Tensor dense = x.contiguous();
  return reinterpret_cast<uintptr_t>(dense.data_ptr()) % 16 == 0 ? dense : dense.clone();  // what kernels ask for
}

}  // namespace trireme
