#include "kernels/reference.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace trireme::kernels::reference {

namespace {

struct Format {
  int digits, least;  // the smallest number is 2^least
  double largest;
};
Format format_of(Type type) {
  switch (type) {
    case Type::kFloat32: return {24, -149, 0x1.fffffep127};
    case Type::kBFloat16: return {8, -133, 0x1.fep127};
    case Type::kFloat16: return {11, -24, 65504};
    case Type::kFloat8E4M3: return {4, -9, 448};
    case Type::kFloat8E5M2: return {3, -16, 57344};
  }
  return {};
}

}  // namespace

double round_to(Type type, double x) {
  const Format format = format_of(type);
  if (size_of(type) == 1 && std::abs(x) > format.largest) return std::copysign(format.largest, x);
  if (!std::isfinite(x) || x == 0) return x;
  int exponent = 0;
  std::frexp(x, &exponent);
  const double step = std::ldexp(1.0, std::max(exponent - format.digits, format.least));
  const double rounded = std::nearbyint(x / step) * step;
  return std::abs(rounded) > format.largest ? std::copysign(INFINITY, x) : rounded;
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

LayerNorm layer_norm(Type type, const Values& x, const Values& residual, const Values& weight, const Values& bias, double eps) {
  const size_t width = weight.size();
  LayerNorm out{x, {}, {}, x};
  for (size_t i = 0; i < residual.size(); ++i) out.s[i] = round_to(type, x[i] + residual[i]);
  for (size_t row = 0; row < x.size() / width; ++row) {
    const auto s = out.s.begin() + static_cast<int64_t>(row * width);
    const double mean = std::accumulate(s, s + static_cast<int64_t>(width), 0.0) / static_cast<double>(width);
    double squares = 0;
    for (size_t c = 0; c < width; ++c) squares += std::pow(s[static_cast<int64_t>(c)] - mean, 2);
    out.mean.push_back(mean);
    out.rstd.push_back(1 / std::sqrt(squares / static_cast<double>(width) + eps));
    for (size_t c = 0; c < width; ++c) out.y[row * width + c] = (out.s[row * width + c] - mean) * out.rstd[row] * weight[c] + (bias.empty() ? 0 : bias[c]);
  }
  return out;
}

LayerNormGradient layer_norm_gradient(const Values& grad_y, const Values& grad_sum, const Values& s, const Values& weight, const Values& mean, const Values& rstd) {
  const size_t width = weight.size();
  LayerNormGradient out{Values(s.size()), Values(width), Values(width)};
  for (size_t row = 0; row < rstd.size(); ++row) {
    const size_t begin = row * width;
    auto n = [&](size_t c) { return (s[begin + c] - mean[row]) * rstd[row]; };
    double mean_g = 0, mean_gn = 0;
    for (size_t c = 0; c < width; ++c) {
      const double grad = grad_y[begin + c], g = grad * weight[c] / static_cast<double>(width);
      out.weight[c] += grad * n(c), out.bias[c] += grad;
      mean_g += g, mean_gn += g * n(c);
    }
    for (size_t c = 0; c < width; ++c)
      out.x[begin + c] = rstd[row] * (grad_y[begin + c] * weight[c] - mean_g - n(c) * mean_gn) + (grad_sum.empty() ? 0 : grad_sum[begin + c]);
  }
  return out;
}

Values lora_down(const Values& x, const Values& w, const Values& kept, int64_t rank) {
  const size_t R = static_cast<size_t>(rank), width = w.size() / R, rows = x.size() / width;
  Values y(rows * R);
  for (size_t t = 0; t < rows; ++t)
    for (size_t c = 0; c < width; ++c)
      for (size_t r = 0; r < R; ++r) y[t * R + r] += kept[t * width + c] * x[t * width + c] * w[c * R + r];
  return y;
}

Values lora_up(Values y, const Values& x, const Values& w, const Values& kept, int64_t rank, double scale) {
  const size_t R = static_cast<size_t>(rank), width = w.size() / R;
  for (size_t t = 0; t < x.size() / R; ++t)
    for (size_t c = 0; c < width; ++c)
      for (size_t r = 0; r < R; ++r) y[t * width + c] += scale * kept[t * width + c] * x[t * R + r] * w[c * R + r];
  return y;
}

Values lora_gradient(const Values& wide, const Values& narrow, const Values& kept, int64_t rank) {
  const size_t R = static_cast<size_t>(rank), rows = narrow.size() / R, width = wide.size() / rows;
  Values gradient(width * R);
  for (size_t t = 0; t < rows; ++t)
    for (size_t c = 0; c < width; ++c)
      for (size_t r = 0; r < R; ++r) gradient[c * R + r] += kept[t * width + c] * wide[t * width + c] * narrow[t * R + r];
  return gradient;
}

Values rope(const Values& x, int64_t num_heads, int64_t head_dim, const Values& cos, const Values& sin, bool inverse) {
  const size_t heads = static_cast<size_t>(num_heads), dim = static_cast<size_t>(head_dim), tokens = x.size() / (heads * dim), rotary = cos.size() / tokens;
  Values y = x;
  for (size_t t = 0; t < tokens; ++t)
    for (size_t h = 0; h < heads; ++h)
      for (size_t c = 0; c < rotary / 2; ++c) {
        const size_t i = (t * heads + h) * dim + c, j = i + rotary / 2, low = t * rotary + c, high = low + rotary / 2;
        y[i] = x[i] * cos[low] - x[j] * (inverse ? -sin[high] : sin[low]);
        y[j] = x[j] * cos[high] + x[i] * (inverse ? -sin[low] : sin[high]);
      }
  return y;
}

double activate(Gate gate, double g) {
  if (gate == Gate::kSilu) return g / (1 + std::exp(-g));
  if (gate == Gate::kGelu) return g / 2 * std::erfc(-g / std::sqrt(2));
  return g / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
}

double activate_slope(Gate gate, double g) {
  if (gate == Gate::kSilu) {
    const double sigmoid = 1 / (1 + std::exp(-g));
    return sigmoid * (1 + g * (1 - sigmoid));
  }
  if (gate == Gate::kGelu) return std::erfc(-g / std::sqrt(2)) / 2 + g * std::exp(-g * g / 2) / std::sqrt(2 * M_PI);
  const double scale = std::sqrt(2 / M_PI), t = std::tanh(scale * (g + 0.044715 * g * g * g));
  return (1 + t) / 2 + g / 2 * (1 - t * t) * scale * (1 + 3 * 0.044715 * g * g);
}

CrossEntropy cross_entropy(const Values& logits, int64_t width, const std::vector<int64_t>& targets, double label_smoothing, double z_loss, double gradient_scale) {
  CrossEntropy out{{}, Values(logits.size()), {}};
  for (size_t row = 0; row < targets.size(); ++row) {
    const auto begin = logits.begin() + static_cast<int64_t>(row) * width, end = begin + width, largest = std::max_element(begin, end);
    const bool ignored = targets[row] < 0;
    double sum = 0, total = 0;
    for (auto x = begin; x != end; ++x) sum += std::exp(*x - *largest), total += *x;
    const double log_sum = *largest + std::log(sum), every = label_smoothing / static_cast<double>(width);
    out.loss.push_back(ignored ? 0 : log_sum - (1 - label_smoothing) * begin[targets[row]] - every * total + z_loss * log_sum * log_sum);
    out.correct.push_back(!ignored && largest - begin == targets[row]);
    for (int64_t c = 0; c < width && !ignored; ++c)
      out.gradient[row * static_cast<size_t>(width) + static_cast<size_t>(c)] =
          gradient_scale * (std::exp(begin[c] - log_sum) * (1 + 2 * z_loss * log_sum) - every - (c == targets[row] ? 1 - label_smoothing : 0));
  }
  return out;
}

UpdateState update(UpdateRule rule, const UpdateNumbers& n, UpdateState state, const Values& grad) {
  for (size_t i = 0; i < grad.size(); ++i) {
    const double g = grad[i] * n.grad_scale;
    double &w = state.weight[i], &m = state.m[i], &v = state.v[i];
    switch (rule) {
      case UpdateRule::kAdamW:
      case UpdateRule::kAdamW8Bit:  // between codes
        m += (g - m) * (1 - n.beta1);
        v = v * n.beta2 + g * g * (1 - n.beta2);
        w = w * (1 - n.lr * n.weight_decay) - m / (std::sqrt(v) / std::sqrt(n.correction2) + n.epsilon) * n.lr / n.correction1;
        break;
      case UpdateRule::kSgd:
        m = m * n.beta1 + g + w * n.weight_decay;
        w -= m * n.lr;
        break;
      case UpdateRule::kLion: {
        const double c = m * n.beta1 + g * (1 - n.beta1);
        w = w * (1 - n.lr * n.weight_decay) - (c > 0 ? 1 : c < 0 ? -1 : 0) * n.lr;
        m = m * n.beta2 + g * (1 - n.beta2);
      }
    }
  }
  return state;
}

AdafactorState adafactor(int64_t num_rows, AdafactorState s, const Values& grad, double mix, double lr, double largest_rate, double weight_decay) {
  const size_t rows = static_cast<size_t>(num_rows), columns = s.columns.size(), size = grad.size();
  const auto take = [&](double& mean, double to) { mean += (to - mean) * mix; };
  double mean = 0, norm = 0;
  Values u(size);
  for (size_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (size_t c = 0; c < columns; ++c) sum += grad[r * columns + c] * grad[r * columns + c];
    take(s.rows[r], sum / static_cast<double>(columns));
    mean += s.rows[r] / static_cast<double>(rows);
  }
  for (size_t c = 0; c < columns && rows > 0; ++c) {
    double sum = 0;
    for (size_t r = 0; r < rows; ++r) sum += grad[r * columns + c] * grad[r * columns + c];
    take(s.columns[c], sum / static_cast<double>(rows));
  }
  constexpr double kEpsilon = 0x1p-23;
  for (size_t i = 0; i < size; ++i) {
    if (rows == 0) take(s.squares[i], grad[i] * grad[i]);
    const double estimate = rows == 0 ? s.squares[i] : s.rows[i / columns] * s.columns[i % columns] / std::max(mean, kEpsilon);
    u[i] = grad[i] / std::sqrt(std::max(estimate, kEpsilon * kEpsilon));
    norm += u[i] * u[i];
  }
  const double count = static_cast<double>(size), rate = std::max(1e-3, std::sqrt(sum_of_squares(s.weight) / count)) * largest_rate / std::max(1.0, std::sqrt(norm / count));
  for (size_t i = 0; i < size; ++i) s.weight[i] -= lr * weight_decay * s.weight[i] + u[i] * rate;
  return s;
}

double sum_of_squares(const Values& x) {
  double sum = 0;
  for (double value : x) sum += value * value;
  return sum;
}

Values matmul(int64_t m, int64_t n, int64_t k, const Values& a, bool transpose_a, const Values& b, bool transpose_b) {
  Values d(static_cast<size_t>(m * n));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t l = 0; l < k; ++l)
        d[static_cast<size_t>(i * n + j)] += a[static_cast<size_t>(transpose_a ? l * m + i : i * k + l)] * b[static_cast<size_t>(transpose_b ? j * k + l : l * n + j)];
  return d;
}

}  // namespace trireme::kernels::reference
