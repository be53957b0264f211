// Attention of tensors whose device has kernels for it (kernels/attention.h).
#pragma once

#include "ops/ops.h"

namespace trireme {

// Whether kernels compute it. On the host only what they serve; on a device everything, of which they refuse what they do not serve.
bool has_device_attention(const at::Tensor& q_THD);
at::Tensor device_attention(const at::Tensor& q_THD, const at::Tensor& k_SKD, const at::Tensor& v_SKD, const AttentionSpec& spec, double scale);

}  // namespace trireme
