// The next token from logits.
#pragma once

#include "base/check.h"
#include "base/tensor.h"

namespace trireme {

struct SamplingOptions {
  double temperature = 0;         // 0: the likeliest token (the first of equals)
  int64_t top_k = 0;              // keep the k likeliest, and what equals the last of them; 0: all
  double top_p = 1;               // keep the likeliest that together reach this probability (Holtzman et al. 2020)
  double min_p = 0;               // keep those with at least this part of the likeliest's probability
  double repetition_penalty = 1;  // logits of seen tokens: divided where positive, else multiplied (Keskar et al. 2019)
  uint64_t seed = 0;
};

// What may come next, with probabilities that sum to 1: the likeliest first (of equals, the smaller id), or all by id where
// nothing is left out.
struct Candidates {
  std::vector<int64_t> ids;
  std::vector<double> probabilities;
};

// logits_V: fp32 [V]. `seen`: ids of prompt and answer so far. As Hugging Face, in its order: penalty, temperature, top-k,
// top-p, min-p, each on the probabilities of what the one before left. DataError: a logit is not a number, or none is finite.
Candidates candidates(const at::Tensor& logits_V, const std::vector<int64_t>& seen, const SamplingOptions& options);

// What is said of such logits.
DataError not_finite();

// One of the candidates. The random number is a function of (seed, prompt, position).
int64_t sample(const at::Tensor& logits_V, const std::vector<int64_t>& seen, const SamplingOptions& options, uint64_t prompt,
               uint64_t position);

}  // namespace trireme
