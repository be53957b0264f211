// What the kinds of frozen weights make their leaves with.
#pragma once

#include <cmath>

#include "base/check.h"
#include "ops/frozen_weight.h"

namespace trireme {

// Of a whole weight, on the meta device.
inline FrozenWeight::Leaf whole_leaf(const char* suffix, at::IntArrayRef sizes, at::ScalarType dtype) {
  const at::Tensor value = at::empty(sizes, at::TensorOptions(dtype).device(at::kMeta));
  return {suffix, value, ShardSpec::whole(value)};
}

// Of that, begin .. end - 1 of dimension `dim`.
inline void cut_leaf(FrozenWeight::Leaf& leaf, int64_t dim, int64_t begin, int64_t end) {
  leaf.value = at::empty_like(leaf.value.narrow(dim, begin, end - begin), at::MemoryFormat::Contiguous);
  leaf.place.offset[static_cast<size_t>(dim)] = begin;
}

// DataError where a weight is not finite. `harm`: what would come of it.
inline void check_finite(const std::string& path, const at::Tensor& whole_OI, const std::string& harm = "which fewer bits would hide") {
  const auto [lowest, highest] = at::aminmax(whole_OI.detach());
  if (std::isfinite(lowest.item<double>()) && std::isfinite(highest.item<double>())) return;
  throw DataError(str(path, ".weight: ", whole_OI.numel() - at::isfinite(whole_OI).sum().item<int64_t>(), " of ", whole_OI.numel(), " values are not finite, ", harm, ": the model's weights are damaged; copy its folder again"));
}

}  // namespace trireme
