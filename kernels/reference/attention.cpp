#include "kernels/reference/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace trireme::kernels::reference {
namespace {

using Doubles = std::vector<double>;

double dot(const double* a, const double* b, int n) {
  double sum = 0;
  for (int d = 0; d < n; ++d) sum += a[d] * b[d];
  return sum;
}

}  // namespace

void for_each_row(const Attention& spec, const std::function<void(const Row&)>& use) {
  for (size_t s = 0; s + 1 < spec.cu_seqlens_q.size(); ++s) {
    const int64_t q0 = spec.cu_seqlens_q[s], q1 = spec.cu_seqlens_q[s + 1];
    const int64_t k0 = spec.cu_seqlens_k[s], k1 = spec.cu_seqlens_k[s + 1];
    for (int64_t i = 0; i < q1 - q0; ++i)
      for (int h = 0; h < spec.num_heads; ++h) {
        const int64_t position = i + (k1 - k0) - (q1 - q0);
        const int64_t end = spec.causal ? std::clamp<int64_t>(position + 1, 0, k1 - k0) : k1 - k0;
        const int64_t begin = spec.window < 0 ? 0 : std::max<int64_t>(0, position - spec.window + 1);
        use({q0 + i, h, h / (spec.num_heads / spec.num_key_heads), k0 + begin, k0 + std::max(begin, end)});
      }
  }
}

double probabilities(const Attention& spec, const double* q, const Doubles& k, const Row& row, Doubles& p) {
  const double scale = spec.scale != 0 ? spec.scale : 1 / std::sqrt(spec.head_dim);
  p.resize(static_cast<size_t>(row.end - row.begin));
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int64_t j = row.begin; j < row.end; ++j) {
    const double* key = k.data() + (j * spec.num_key_heads + row.key_head) * spec.head_dim;
    largest = std::max(largest, p[static_cast<size_t>(j - row.begin)] = scale * dot(q, key, spec.head_dim));
  }
  for (double& x : p) sum += x = std::exp(x - largest);
  for (double& x : p) x /= sum;
  return largest + std::log(sum);
}

AttentionOutput attention(const Attention& spec, const Doubles& q, const Doubles& k, const Doubles& v) {
  const int64_t num_queries = spec.cu_seqlens_q.back(), dim = spec.head_dim;
  AttentionOutput out{Doubles(q.size()), Doubles(static_cast<size_t>(num_queries * spec.num_heads))};
  Doubles p;
  for_each_row(spec, [&](const Row& row) {
    const int64_t at = (row.query * spec.num_heads + row.head) * dim;
    out.lse[static_cast<size_t>(row.head * num_queries + row.query)] = probabilities(spec, q.data() + at, k, row, p);
    for (int64_t j = row.begin; j < row.end; ++j)
      for (int64_t d = 0; d < dim; ++d)
        out.o[static_cast<size_t>(at + d)] +=
            p[static_cast<size_t>(j - row.begin)] * v[static_cast<size_t>((j * spec.num_key_heads + row.key_head) * dim + d)];
  });
  return out;
}

AttentionGradients attention_backward(const Attention& spec, const Doubles& q, const Doubles& k, const Doubles& v,
                                      const Doubles& grad_o) {
  const int64_t dim = spec.head_dim;
  const double scale = spec.scale != 0 ? spec.scale : 1 / std::sqrt(spec.head_dim);
  AttentionGradients grad{Doubles(q.size()), Doubles(k.size()), Doubles(v.size())};
  Doubles p, grad_p;
  for_each_row(spec, [&](const Row& row) {
    const int64_t at = (row.query * spec.num_heads + row.head) * dim;
    probabilities(spec, q.data() + at, k, row, p);
    grad_p.resize(p.size());
    double mean = 0;
    for (size_t j = 0; j < p.size(); ++j) {
      const int64_t key = ((row.begin + static_cast<int64_t>(j)) * spec.num_key_heads + row.key_head) * dim;
      mean += p[j] * (grad_p[j] = dot(grad_o.data() + at, v.data() + key, spec.head_dim));
    }
    for (size_t j = 0; j < p.size(); ++j) {
      const int64_t key = ((row.begin + static_cast<int64_t>(j)) * spec.num_key_heads + row.key_head) * dim;
      const double grad_s = scale * p[j] * (grad_p[j] - mean);
      for (int64_t d = 0; d < dim; ++d) {
        grad.q[static_cast<size_t>(at + d)] += grad_s * k[static_cast<size_t>(key + d)];
        grad.k[static_cast<size_t>(key + d)] += grad_s * q[static_cast<size_t>(at + d)];
        grad.v[static_cast<size_t>(key + d)] += p[j] * grad_o[static_cast<size_t>(at + d)];
      }
    }
  });
  return grad;
}

}  // namespace trireme::kernels::reference
