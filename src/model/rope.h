// Frequencies of the rotary embedding for every supported type.
#pragma once

#include "base/tensor.h"
#include "model/hf_config.h"

namespace trireme {

struct RopeFrequencies {
  at::Tensor inv_freq;   // [D / 2], fp32 (fp64 where asked)
  double scale = 1.0;    // of cos and sin (yarn's attention factor)
};

RopeFrequencies rope_frequencies(const RopeConfig& rope, int64_t head_dim, at::ScalarType dtype);

}  // namespace trireme
