// Values that tests of the number formats quantize.
#pragma once

#include <cmath>
#include <random>
#include <utility>

#include "base/check.h"
#include "base/tensor.h"
#include "quant/four_bit.h"
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

// Elements [begin, end) along a dimension of a whole tensor [rows, columns], as a rank of FourBitWeight::keep holds them: its own codes and
// scales, and all nested scales.
inline FourBitTensor slice_4bit(const FourBitTensor& whole, int64_t rows, int64_t columns, int64_t dim, int64_t begin, int64_t end) {
  const int64_t size = whole.block_size;
  FourBitTensor part = whole;
  const auto run = [&](const at::Tensor& x, int64_t first, int64_t last) { return x.flatten().slice(0, first, last).clone(); };
  const auto run_of_rows = [&](const at::Tensor& x, int64_t first, int64_t last) { return x.view({rows, -1}).slice(1, first, last).contiguous().flatten(); };
  if (dim == 0) {
    part.scales.slice.first = begin * columns / size;
    part.codes = run(whole.codes, begin * columns / 2, (end * columns + 1) / 2);
    part.scales.absmax = run(whole.scales.absmax, begin * columns / size, (end * columns + size - 1) / size);
  } else {
    part.scales.slice = {begin / size, (end - begin) / size, columns / size};
    part.codes = run_of_rows(whole.codes, begin / 2, end / 2);
    part.scales.absmax = run_of_rows(whole.scales.absmax, begin / size, end / size);
  }
  return part;
}

}  // namespace trireme::test
