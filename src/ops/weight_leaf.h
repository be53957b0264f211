// What the kinds of frozen weights make their leaves with.
#pragma once

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

}  // namespace trireme
