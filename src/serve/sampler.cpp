#include "base/tensor.h"

#include "serve/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"
#include "base/random.h"

namespace trireme {

Candidates candidates(const at::Tensor& logits_V, const std::vector<int64_t>& seen, const SamplingOptions& options) {
  at::Tensor copy = logits_V.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).contiguous();
  auto* logit = copy.data_ptr<float>();
  const int64_t v = copy.numel();
  if (options.repetition_penalty != 1.0) {
    std::vector<int64_t> once = seen;
    std::sort(once.begin(), once.end());
    once.erase(std::unique(once.begin(), once.end()), once.end());
    auto penalty = static_cast<float>(options.repetition_penalty);
    for (int64_t id : once) logit[id] = logit[id] > 0 ? logit[id] / penalty : logit[id] * penalty;
  }
  bool broken = std::any_of(logit, logit + v, [](float x) { return std::isnan(x); });
  const float largest = broken ? 0 : *std::max_element(logit, logit + v);
  if (broken || !std::isfinite(largest))
    throw DataError("the model's output is not finite: its weights are damaged, or model.dtype is too narrow for them");
  if (options.temperature <= 0) return {{std::max_element(logit, logit + v) - logit}, {1.0}};

  std::vector<int64_t> order(static_cast<size_t>(v));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logit[a] != logit[b] ? logit[a] > logit[b] : a < b; });
  auto n = order.size();
  if (options.top_k > 0 && options.top_k < v) {
    n = static_cast<size_t>(options.top_k);
    while (n < order.size() && logit[order[n]] == logit[order[n - 1]]) ++n;
  }
  std::vector<double> p;  // relative to the likeliest
  for (size_t i = 0; i < n; ++i)
    p.push_back(std::exp((static_cast<double>(logit[order[i]]) - static_cast<double>(largest)) / options.temperature));
  if (options.top_p < 1) {
    double enough = options.top_p * std::accumulate(p.begin(), p.end(), 0.0), sum = 0;
    for (n = 0; n < p.size() && sum < enough;) sum += p[n++];
    p.resize(std::max<size_t>(n, 1));
  }
  while (p.back() < options.min_p) p.pop_back();  // p[0] is 1: the likeliest stays
  order.resize(p.size());
  double total = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= total;
  return {order, p};
}

int64_t sample(const at::Tensor& logits_V, const std::vector<int64_t>& seen, const SamplingOptions& options, uint64_t prompt,
               uint64_t position) {
  auto [ids, probabilities] = candidates(logits_V, seen, options);
  double target = random_uniform(options.seed, RandomStream::kSampling, prompt, position);
  for (size_t i = 0; i < ids.size(); ++i)
    if ((target -= probabilities[i]) < 0) return ids[i];
  return ids.back();
}

}  // namespace trireme
