// Clipping by the global norm of the gradients, as torch.nn.utils.clip_grad_norm_.
#pragma once

#include "base/tensor.h"

namespace trireme {

// Sum of the squares of a contiguous tensor, in fp64. Shards add up: all-reduce the sums, then take the root. The same
// bits on any number of threads. NaN and infinity come through.
double squared_norm(const at::Tensor& x);
double squared_norm(const std::vector<at::Tensor>& tensors);

// What gradients are multiplied by so that their norm is at most max_norm: min(1, max_norm / (norm + 1e-6)).
// max_norm <= 0: 1, no clipping. NaN where the norm is.
double clip_scale(double norm, double max_norm);

}  // namespace trireme
