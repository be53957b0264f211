// Values that tests of the number formats quantize.
#pragma once

#include <cmath>
#include <random>
#include <utility>

#include "base/check.h"
#include "base/tensor.h"
#include "quant/quant_loops.h"

namespace trireme::test {

// Instruction sets that this processor has loops for.
inline int num_vector_levels() {
  for (int level = 0;; ++level) try {
      quant_loops<float>(level);
    } catch (const InternalError&) {
      return level;
    }
}

inline at::Tensor gaussian(int64_t count, uint64_t seed, double deviation = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, deviation);
  at::Tensor out = at::empty({count}, at::kFloat);
  for (int64_t i = 0; i < count; ++i) out.data_ptr<float>()[i] = static_cast<float>(normal(random));
  return out;
}

// Ordinary values and others, in blocks of `size`: of zeros, subnormals, with outliers, infinities, NaNs.
inline std::vector<std::pair<const char*, at::Tensor>> unusual_values(int64_t count, int64_t size) {
  const at::Tensor normal = gaussian(count, 1), uniform = at::empty({count}, at::kFloat);
  std::mt19937_64 random(2);
  for (int64_t i = 0; i < count; ++i) uniform.data_ptr<float>()[i] = static_cast<float>(random() % 2048) / 1024 - 1;
  const auto changed = [&](at::Tensor x, int64_t step, float value) {
    x = x.clone();
    for (int64_t i = step / 2; i < count; i += step) x.data_ptr<float>()[i] = (i / step) % 2 == 0 ? value : -value;
    return x;
  };
  at::Tensor mixed = normal.clone();
  for (int64_t i = 0; i < count; ++i)
    switch (i / size % 4) {
      case 1:
        mixed.data_ptr<float>()[i] = i % 3 == 0 ? -0.0f : 0.0f;
        break;
      case 2:
        mixed.data_ptr<float>()[i] = NAN;
        break;
      case 3:
        mixed.data_ptr<float>()[i] *= 1e-39f;
        break;
    }
  return {{"normal", normal},
          {"uniform", uniform},
          {"tiny", normal * 1e-20f},
          {"subnormal", normal * 1e-40f},
          {"subnormal in float16", normal * 1e-6f},
          {"outliers", changed(normal, 37, 1000)},
          {"infinities", changed(normal, size + 5, INFINITY)},
          {"NaNs", changed(normal, 29, NAN)},
          {"zeros, NaNs and subnormals", mixed}};
}

}  // namespace trireme::test
