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

// element(i) at the place whose index in the whole tensor, row-major, is i.
template <typename F>
void fill(const Parameter& p, const F& element) {
  at::Tensor weight = p.value;
  TRIREME_CHECK(weight.is_contiguous() && weight.dim() >= 1 && weight.dim() <= 2, p.name, " ", weight.sizes());
  at::NoGradGuard no_grad;
  const bool matrix = weight.dim() == 2;
  const int64_t rows = matrix ? weight.size(0) : 1, columns = weight.size(-1), whole_columns = p.shard.global_shape.back();
  const int64_t first = (matrix ? p.shard.offset[0] * whole_columns : 0) + p.shard.offset.back();
  at::Tensor values = weight.is_cpu() ? weight : at::empty(weight.sizes(), weight.scalar_type());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, weight.scalar_type(), "fill", [&] {
    auto* data = values.data_ptr<scalar_t>();
    at::parallel_for(0, rows * columns, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        data[i] = static_cast<scalar_t>(element(static_cast<uint64_t>(first + i / columns * whole_columns + i % columns)));
    });
  });
  if (!weight.is_cpu()) weight.copy_(values);
}

}  // namespace

void fill_normal(const Parameter& p, uint64_t seed, double standard_deviation) {
  uint64_t key = name_key(p.name);
  fill(p, [=](uint64_t i) {
    auto r = philox(seed ^ (static_cast<uint64_t>(RandomStream::kInit) << 56), key, i);
    // Box-Muller; the first uniform is in (0, 1], so its logarithm is finite.
    double u = (static_cast<double>(r[0]) + 1.0) * 0x1.0p-32;
    double v = static_cast<double>(r[1]) * 0x1.0p-32;
    return standard_deviation * std::sqrt(-2.0 * std::log(u)) * std::cos(2 * M_PI * v);
  });
}

void fill_uniform(const Parameter& p, uint64_t seed, double bound) {
  uint64_t key = name_key(p.name);
  fill(p, [=](uint64_t i) { return bound * (2 * random_uniform(seed, RandomStream::kInit, key, i) - 1); });
}

void fill_initial(const Parameter& p, uint64_t seed, double initializer_range) {
  at::NoGradGuard no_grad;
  if (p.name.ends_with(".lora_A.weight"))
    fill_uniform(p, seed, 1.0 / std::sqrt(static_cast<double>(p.shard.global_shape[1])));
  else if (p.name.ends_with(".lora_B.weight") || p.name.ends_with(".bias"))
    p.value.detach().zero_();
  else if (p.value.dim() == 1)
    p.value.detach().fill_(1.0);
  else
    fill_normal(p, seed, initializer_range);
}

}  // namespace trireme
