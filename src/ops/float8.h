// A frozen weight in eight bits on a device (compute capability 8.9 or later): products of float8 with one scale a tensor
// (Micikevicius et al. 2022), the weight and inputs in e4m3, gradients in e5m2. Twice the rate of 16 bits; the weight is held in both
// arrangements, as such products take one alone: its memory is that of 16 bits. The CPU has no code for it.
#pragma once

#include "ops/frozen_weight.h"

namespace trireme {

// Leaves .weight and .weight.transposed (the codes as uint8, [O, I] and [I, O]) and .weight.scale (fp32 [1], of the whole weight). Rows and
// results are bfloat16 or float16; rows that come together
// share a scale, so that what they are multiplied to depends on them all. ConfigError: O or I, or what they are cut into, is no multiple of 16; it names the layer.
std::shared_ptr<FrozenWeight> float8_weight(const std::string& path, int64_t out_features, int64_t in_features);

}  // namespace trireme
