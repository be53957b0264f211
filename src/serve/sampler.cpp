#include "base/tensor.h"

#include "serve/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/random.h"

namespace trireme {

DataError not_finite() { return DataError("the model's output is not finite: its weights are damaged, or model.dtype is too narrow for them"); }

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
  if (broken || !std::isfinite(largest)) throw not_finite();
  if (options.temperature <= 0) return {{std::max_element(logit, logit + v) - logit}, {1.0}};

  std::vector<int64_t> ids(static_cast<size_t>(v));
  std::iota(ids.begin(), ids.end(), 0);
  auto likelier = [&](int64_t a, int64_t b) { return logit[a] != logit[b] ? logit[a] > logit[b] : a < b; };
  auto weight = [&](int64_t id) {  // relative to the likeliest
    return std::exp((static_cast<double>(logit[id]) - static_cast<double>(largest)) / options.temperature);
  };
  const bool counts = options.top_k > 0 && options.top_k < v;
  if (counts) {
    std::nth_element(ids.begin(), ids.begin() + (options.top_k - 1), ids.end(), likelier);
    const float last = logit[ids[static_cast<size_t>(options.top_k - 1)]];
    std::erase_if(ids, [&](int64_t id) { return logit[id] < last; });
  }
  Candidates out;
  double sum = 0;
  if (!counts && options.top_p >= 1 && options.min_p <= 0) {
    out.ids = std::move(ids);
    for (int64_t id : out.ids) out.probabilities.push_back(weight(id));
  } else {  // the likeliest first, in pieces that grow: most of what is left out is never sorted
    double total = 0;
    for (int64_t id : ids) total += weight(id);
    bool enough = false;
    for (size_t done = 0, end = 64; done < ids.size() && !enough; done = end, end *= 8) {
      end = std::min(end, ids.size());
      auto at = [&](size_t i) { return ids.begin() + static_cast<std::ptrdiff_t>(i); };
      if (end < ids.size()) std::nth_element(at(done), at(end), ids.end(), likelier);
      std::sort(at(done), at(end), likelier);
      for (size_t i = done; i < end; ++i) {
        const double w = weight(ids[i]);
        if ((enough = i > 0 && (w < options.min_p || (options.top_p < 1 && sum >= options.top_p * total)))) break;
        out.ids.push_back(ids[i]);
        out.probabilities.push_back(w);
        sum += w;
      }
    }
  }
  sum = std::accumulate(out.probabilities.begin(), out.probabilities.end(), 0.0);
  for (double& p : out.probabilities) p /= sum;
  return out;
}

int64_t sample(const at::Tensor& logits_V, const std::vector<int64_t>& seen, const SamplingOptions& options, uint64_t prompt,
               uint64_t position) {
  auto [ids, probabilities] = candidates(logits_V, seen, options);
  double target = random_uniform(options.seed, RandomStream::kSampling, prompt, position);
  size_t last = 0;  // that can be drawn: the probabilities' sum may be a rounding below 1
  for (size_t i = 0; i < ids.size(); ++i) {
    if ((target -= probabilities[i]) < 0) return ids[i];
    if (probabilities[i] > 0) last = i;
  }
  return ids[last];
}

}  // namespace trireme
