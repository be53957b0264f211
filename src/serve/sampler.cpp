#include "base/tensor.h"

#include "serve/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "base/random.h"

namespace trireme {

int64_t sample(const at::Tensor& logits_V, const std::vector<int64_t>& seen, const SamplingOptions& options, uint64_t prompt,
               uint64_t position) {
  at::Tensor copy = logits_V.to(at::kFloat).contiguous().clone();
  auto* logit = copy.data_ptr<float>();
  const int64_t v = copy.numel();
  if (options.repetition_penalty != 1.0) {
    auto penalty = static_cast<float>(options.repetition_penalty);
    for (int64_t id : std::set<int64_t>(seen.begin(), seen.end())) logit[id] = logit[id] > 0 ? logit[id] / penalty : logit[id] * penalty;
  }
  if (options.temperature <= 0) return std::max_element(logit, logit + v) - logit;

  std::vector<int64_t> order(static_cast<size_t>(v));
  std::iota(order.begin(), order.end(), 0);
  auto likelier = [&](int64_t a, int64_t b) { return logit[a] != logit[b] ? logit[a] > logit[b] : a < b; };
  std::sort(order.begin(), order.end(), likelier);
  if (options.top_k > 0 && options.top_k < v) order.resize(static_cast<size_t>(options.top_k));
  std::vector<double> p;
  for (int64_t id : order) p.push_back(std::exp((static_cast<double>(logit[id]) - static_cast<double>(logit[order[0]])) / options.temperature));
  auto keep = [&](size_t n) { p.resize(n); };
  if (options.top_p < 1) {
    double total = std::accumulate(p.begin(), p.end(), 0.0), sum = 0;
    size_t n = 0;
    while (n < p.size() && sum < options.top_p * total) sum += p[n++];
    keep(std::max<size_t>(n, 1));
  }
  if (options.min_p > 0) {  // p[0] is 1: the likeliest always stays
    size_t n = 1;
    while (n < p.size() && p[n] >= options.min_p) ++n;
    keep(n);
  }
  double target = random_uniform(options.seed, RandomStream::kSampling, prompt, position) * std::accumulate(p.begin(), p.end(), 0.0);
  for (size_t i = 0; i < p.size(); ++i)
    if ((target -= p[i]) < 0) return order[i];
  return order[p.size() - 1];
}

}  // namespace trireme
