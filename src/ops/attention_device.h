// Attention of tensors whose device has kernels for it (kernels/attention.h).
#pragma once

#include "ops/ops.h"

namespace trireme {

// Whether kernels compute it.
bool has_device_attention(const at::Tensor& q_THD);
bool has_attention_kernels(at::ScalarType dtype, int64_t head_dim);
// Of a device where kernels do not serve it: by ATen, with whole matrices of scores in fp32, a segment at a time.
at::Tensor plain_attention(const at::Tensor& q_THD, const at::Tensor& k_SKD, const at::Tensor& v_SKD, const AttentionSpec& spec, double scale);
at::Tensor plain_decode_attention(const at::Tensor& q_THD, const at::Tensor& k_BSKD, const at::Tensor& v_BSKD, const at::Tensor& lengths_B, int64_t window, double scale);
at::Tensor device_decode_attention(const at::Tensor& q_THD, const at::Tensor& k_BSKD, const at::Tensor& v_BSKD, const at::Tensor& lengths_B, int64_t window, double scale);
at::Tensor device_attention(const at::Tensor& q_THD, const at::Tensor& k_SKD, const at::Tensor& v_SKD, const AttentionSpec& spec, double scale);

}  // namespace trireme
