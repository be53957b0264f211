// Attention as kernels/attention.h defines it, by plain loops in fp64. Tensors are contiguous.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace trireme::kernels::reference {

struct Attention {
  int head_dim = 0, num_heads = 0, num_key_heads = 0;
  std::vector<int32_t> cu_seqlens_q, cu_seqlens_k;
  double scale = 0;  // 0: 1 / sqrt(D)
  int64_t window = -1;
  bool causal = true;
};

// A query of a head, and the keys [begin, end) that it sees.
struct Row {
  int64_t query;
  int head, key_head;
  int64_t begin, end;
};
void for_each_row(const Attention& spec, const std::function<void(const Row&)>& use);

// p of the row, q being its query's first element; returns the log-sum-exp (-inf: it sees nothing).
double probabilities(const Attention& spec, const double* q, const std::vector<double>& k, const Row& row, std::vector<double>& p);

struct AttentionOutput {
  std::vector<double> o, lse;  // [T, H, D], [H, T]
};
AttentionOutput attention(const Attention& spec, const std::vector<double>& q, const std::vector<double>& k,
                          const std::vector<double>& v);

struct AttentionGradients {
  std::vector<double> q, k, v;
};
AttentionGradients attention_backward(const Attention& spec, const std::vector<double>& q, const std::vector<double>& k,
                                      const std::vector<double>& v, const std::vector<double>& grad_o);

}  // namespace trireme::kernels::reference
