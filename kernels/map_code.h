// Codes of the dynamic 8-bit data type, as src/quant/dynamic_map.h has them.
#pragma once

#include "kernels/arch.h"

namespace trireme::kernels::TRIREME_ARCH {

// Of a map in shared memory: seven steps of a binary search, which end at an even number, and the midpoint to its neighbour.
ARCH_FN uint32_t map_code(const arch::Shared<float>& map, float x) {
  int pivot = 127, upper = 255, lower = 0;
  ARCH_UNROLL
  for (int step = 64; step > 0; step /= 2)
    if (x > map[pivot]) lower = pivot, pivot += step;
    else upper = pivot, pivot -= step;
  const float number = map[pivot];
  if (x > number) return static_cast<uint32_t>(x > (map[upper] + number) * 0.5f ? upper : pivot);
  return static_cast<uint32_t>(x < (map[lower] + number) * 0.5f ? lower : pivot);
}

}  // namespace trireme::kernels::TRIREME_ARCH
