#include "base/tensor.h"

#include "model/initialize.h"

#include <ATen/Parallel.h>

#include <cmath>

#include "base/check.h"
#include "base/random.h"

namespace trireme {
namespace {

uint64_t name_key(const std::string& name) {  // FNV-1a: stable across builds, unlike std::hash
  uint64_t h = 14695981039346656037ull;
  for (unsigned char c : name) h = (h ^ c) * 1099511628211ull;
  return h;
}

template <typename F>
void fill(at::Tensor weight, const F& element) {
  TRIREME_CHECK(weight.is_contiguous());
  at::NoGradGuard no_grad;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, weight.scalar_type(), "fill", [&] {
    auto* data = weight.data_ptr<scalar_t>();
    at::parallel_for(0, weight.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) data[i] = static_cast<scalar_t>(element(static_cast<uint64_t>(i)));
    });
  });
}

}  // namespace

void fill_normal(at::Tensor weight, uint64_t seed, const std::string& name, double standard_deviation) {
  uint64_t key = name_key(name);
  fill(weight, [=](uint64_t i) {
    auto r = philox(seed ^ (static_cast<uint64_t>(RandomStream::kInit) << 56), key, i);
    // Box-Muller; the first uniform is in (0, 1], so its logarithm is finite.
    double u = (static_cast<double>(r[0]) + 1.0) * 0x1.0p-32;
    double v = static_cast<double>(r[1]) * 0x1.0p-32;
    return standard_deviation * std::sqrt(-2.0 * std::log(u)) * std::cos(2 * M_PI * v);
  });
}

void fill_uniform(at::Tensor weight, uint64_t seed, const std::string& name, double bound) {
  uint64_t key = name_key(name);
  fill(weight, [=](uint64_t i) { return bound * (2 * random_uniform(seed, RandomStream::kInit, key, i) - 1); });
}

}  // namespace trireme
