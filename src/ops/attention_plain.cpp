#include "base/tensor.h"

#include "ops/attention_device.h"

namespace trireme {

// Scores of what is not seen: finite, so that rows that see nothing have gradients too.
constexpr double kUnseen = -1e30;

at::Tensor plain_attention(const at::Tensor& q_THD, const at::Tensor& k_SKD, const at::Tensor& v_SKD, const AttentionSpec& spec, double scale) {
  const int64_t num_heads = q_THD.size(1), group = num_heads / k_SKD.size(1);
  const auto indices = q_THD.options().dtype(at::kLong);
  std::vector<at::Tensor> outputs;
  for (size_t s = 0; s + 1 < spec.cu_seqlens_q.size(); ++s) {
    const int64_t queries = spec.cu_seqlens_q[s + 1] - spec.cu_seqlens_q[s], keys = spec.cu_seqlens_k[s + 1] - spec.cu_seqlens_k[s];
    const auto heads = [&](const at::Tensor& x, int64_t first, int64_t count) { return x.narrow(0, first, count).transpose(0, 1); };  // [heads, rows, D]
    const at::Tensor q = heads(q_THD, spec.cu_seqlens_q[s], queries);
    const at::Tensor k = heads(k_SKD, spec.cu_seqlens_k[s], keys).repeat_interleave(group, 0), v = heads(v_SKD, spec.cu_seqlens_k[s], keys).repeat_interleave(group, 0);
    if (keys == 0) {
      outputs.push_back(at::zeros({queries, num_heads, q_THD.size(2)}, q_THD.options()));
      continue;
    }
    at::Tensor scores = at::matmul(q.to(at::kFloat), k.to(at::kFloat).transpose(1, 2)) * scale;
    const at::Tensor position = at::arange(keys - queries, keys, indices).unsqueeze(1), key = at::arange(keys, indices);
    at::Tensor unseen = spec.causal ? key > position : at::zeros({queries, keys}, q_THD.options().dtype(at::kBool));
    if (spec.window >= 0) unseen = unseen.logical_or(key <= position - spec.window);
    const at::Tensor weights = at::softmax(scores.masked_fill(unseen, kUnseen), -1).masked_fill(unseen.all(-1, /*keepdim=*/true), 0);
    outputs.push_back(at::matmul(weights, v.to(at::kFloat)).transpose(0, 1).to(q_THD.scalar_type()));
  }
  return outputs.empty() ? at::zeros_like(q_THD) : at::cat(outputs);
}

at::Tensor plain_decode_attention(const at::Tensor& q_THD, const at::Tensor& k_BSKD, const at::Tensor& v_BSKD, const at::Tensor& lengths_B, int64_t window, double scale) {
  const int64_t num_sequences = k_BSKD.size(0), capacity = k_BSKD.size(1), key_heads = k_BSKD.size(2), dim = q_THD.size(2);
  const int64_t queries = q_THD.size(0) / num_sequences, group = q_THD.size(1) / key_heads;
  const auto indices = q_THD.options().dtype(at::kLong);
  const auto heads = [](const at::Tensor& x_BSKD) { return x_BSKD.to(at::kFloat).transpose(1, 2); };  // [B, K, S, D]
  // The rows of a key head are its queries of all heads of its group: [B, K, G n, D].
  const at::Tensor q = q_THD.to(at::kFloat).view({num_sequences, queries, key_heads, group, dim}).permute({0, 2, 3, 1, 4}).reshape({num_sequences, key_heads, group * queries, dim});
  const at::Tensor scores = at::matmul(q, heads(k_BSKD).transpose(2, 3)) * scale;
  const at::Tensor position = lengths_B.to(at::kLong).view({-1, 1, 1, 1, 1}) - queries + at::arange(queries, indices).view({-1, 1}), key = at::arange(capacity, indices);
  at::Tensor unseen = key > position;  // [B, 1, 1, n, S]
  if (window >= 0) unseen = unseen.logical_or(key <= position - window);
  at::Tensor weights = at::softmax(scores.view({num_sequences, key_heads, group, queries, capacity}).masked_fill(unseen, kUnseen), -1);
  weights = weights.masked_fill(unseen.all(-1, /*keepdim=*/true), 0).view(scores.sizes());
  const at::Tensor o = at::matmul(weights, heads(v_BSKD)).view({num_sequences, key_heads, group, queries, dim});
  return o.permute({0, 3, 1, 2, 4}).reshape(q_THD.sizes()).to(q_THD.scalar_type());
}

}  // namespace trireme
