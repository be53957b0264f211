#include "kernels/reference.h"

#include <cmath>

namespace trireme::kernels::reference {

double round_to(Type type, double x) {
  if (!std::isfinite(x) || x == 0) return x;
  const int digits = type == Type::kFloat32 ? 24 : type == Type::kBFloat16 ? 8 : 11, least = type == Type::kFloat16 ? -24 : -149;
  const double largest = type == Type::kFloat16 ? 65504 : type == Type::kBFloat16 ? 0x1.fep127 : 0x1.fffffep127;
  int exponent = 0;
  std::frexp(x, &exponent);
  const double step = std::ldexp(1.0, std::max(exponent - digits, type == Type::kBFloat16 ? -133 : least));
  const double rounded = std::nearbyint(x / step) * step;
  return std::abs(rounded) > largest ? std::copysign(INFINITY, x) : rounded;
}

Values round_to(Type type, Values x) {
  for (double& value : x) value = round_to(type, value);
  return x;
}

RmsNorm rms_norm(Type type, const Values& x, const Values& residual, const Values& weight, double eps) {
  const size_t width = weight.size();
  RmsNorm out{x, {}, x};
  for (size_t i = 0; i < residual.size(); ++i) out.s[i] = round_to(type, x[i] + residual[i]);
  for (size_t row = 0; row < x.size() / width; ++row) {
    double squares = 0;
    for (size_t c = 0; c < width; ++c) squares += out.s[row * width + c] * out.s[row * width + c];
    out.rstd.push_back(1 / std::sqrt(squares / static_cast<double>(width) + eps));
    for (size_t c = 0; c < width; ++c) out.y[row * width + c] = round_to(type, out.s[row * width + c] * out.rstd[row]) * weight[c];
  }
  return out;
}

RmsNormGradient rms_norm_gradient(Type type, const Values& grad_y, const Values& grad_sum, const Values& s, const Values& weight, const Values& rstd) {
  const size_t width = weight.size();
  RmsNormGradient out{Values(s.size()), Values(width)};
  for (size_t row = 0; row < rstd.size(); ++row) {
    const size_t begin = row * width;
    double mean = 0;
    for (size_t c = 0; c < width; ++c) {
      out.weight[c] += grad_y[begin + c] * round_to(type, s[begin + c] * rstd[row]);
      mean += grad_y[begin + c] * weight[c] * s[begin + c] / static_cast<double>(width);
    }
    for (size_t c = 0; c < width; ++c) {
      const double g = grad_y[begin + c] * weight[c];
      out.x[begin + c] = rstd[row] * (g - s[begin + c] * rstd[row] * rstd[row] * mean) + (grad_sum.empty() ? 0 : grad_sum[begin + c]);
    }
  }
  return out;
}

}  // namespace trireme::kernels::reference
