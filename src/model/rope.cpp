#include "model/rope.h"

#include <cmath>

namespace trireme {
namespace {

// Peng et al. 2023, "YaRN", equation 22 and Hugging Face's form of it.
double yarn_scale(double factor, double mscale = 1.0) { return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0; }

at::Tensor yarn(const RopeConfig& rope, int64_t dim, const at::Tensor& inv_freq) {
  // The dim whose wave turns `rotations` times within the original context.
  auto dim_of = [&](double rotations) {
    return static_cast<double>(dim) * std::log(static_cast<double>(rope.original_max_positions) / (rotations * 2 * M_PI)) /
           (2 * std::log(rope.theta));
  };
  double low = dim_of(rope.beta_fast), high = dim_of(rope.beta_slow);
  if (rope.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0), high = std::min(high, static_cast<double>(dim - 1));
  if (low == high) high += 0.001;
  at::Tensor ramp = ((at::arange(dim / 2, inv_freq.options()) - low) / (high - low)).clamp(0, 1);
  return inv_freq / rope.factor * ramp + inv_freq * (1 - ramp);
}

// Llama 3.1: long waves are stretched by the factor, short ones kept, those between blended.
at::Tensor llama3(const RopeConfig& rope, const at::Tensor& inv_freq) {
  auto context = static_cast<double>(rope.original_max_positions);
  at::Tensor wavelength = 2 * M_PI / inv_freq;
  at::Tensor smooth = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  at::Tensor blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq;
  at::Tensor out = at::where(wavelength > context / rope.low_freq_factor, inv_freq / rope.factor, blended);
  return at::where(wavelength < context / rope.high_freq_factor, inv_freq, out);
}

}  // namespace

RopeFrequencies rope_frequencies(const RopeConfig& rope, int64_t dim, at::ScalarType dtype) {
  auto options = at::TensorOptions().dtype(dtype == at::kDouble ? at::kDouble : at::kFloat);
  at::Tensor exponent = at::arange(0, dim, 2, options) / static_cast<double>(dim);
  at::Tensor inv_freq = 1.0 / at::pow(rope.theta, exponent);
  if (rope.type == "linear") return {inv_freq / rope.factor, 1.0};
  if (rope.type == "llama3") return {llama3(rope, inv_freq), 1.0};
  if (rope.type == "yarn") {
    double scale = rope.attention_factor ? *rope.attention_factor
                   : rope.mscale != 0 && rope.mscale_all_dim != 0
                       ? yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
                       : yarn_scale(rope.factor);
    return {yarn(rope, dim, inv_freq), scale};
  }
  return {inv_freq, 1.0};
}

}  // namespace trireme
