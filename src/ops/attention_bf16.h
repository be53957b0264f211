// Causal attention, with a sliding window or without, in bfloat16 on the matrix units of the processor (AMX or AVX512-BF16).
#pragma once

#include "base/tensor.h"

namespace trireme {

// Can this processor do it, and does it pay for heads of this size?
bool has_attention_bf16(int64_t dim);

// One segment in which query i sees keys i - window < j <= i: q, out [L, H, D], k, v [L, K, D], all bfloat16 with contiguous last dim (slices
// of the flat tensors); lse [K, H / K, L] fp32, the log-sum-exp of the scaled scores. Writes out and lse.
struct AttentionForward {
  at::Tensor q, k, v, out, lse;
  int64_t window;  // at least the length: all keys
};

// The gradients of q, k and v, which it writes; like them.
struct AttentionBackward {
  at::Tensor grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v;
  int64_t window;
};

// Scores exist 64 x 64 at a time, tiles beyond the window not at all; sums are fp32, in an order that depends on nothing else. With AVX512-BF16
// alone values below 1.2e-38 are 0.
void attention_bf16_forward(const std::vector<AttentionForward>& segments, double scale);
void attention_bf16_backward(const std::vector<AttentionBackward>& segments, double scale);

}  // namespace trireme
