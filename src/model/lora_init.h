// Adapters that begin with the strongest directions of a layer's weight, or of what its 4 bits lose: PiSSA (Meng et al. 2024) and LoftQ
// (Li et al. 2023).
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace trireme {

// What a layer begins with: base + scale * B A is about the weight.
struct LoraStart {
  at::Tensor base_OI;     // what the base holds, or is encoded from
  at::Tensor a_RI, b_OR;  // in the weight's dtype
};

// base = W - scale B A in the weight's dtype, scale B A being the sum of the `rank` largest singular directions of W: A = sqrt(S / scale) V^T,
// B = U sqrt(S / scale), computed on the CPU in float64 from the values alone. A direction's sign makes the largest element of its u
// positive (the SVD leaves it open). `rank` is at most the smaller size of W.
LoraStart pissa_start(const at::Tensor& weight_OI, int64_t rank, double scale);

// Alternates Q = quantized(base), scale B A = the largest singular directions of W - Q, base = W - scale B A, `iterations` times from base = W.
// base_OI is the last that was quantized, in float32. PEFT leaves the scale out: its numbers are those of alpha = rank.
LoraStart loftq_start(const at::Tensor& weight_OI, int64_t rank, double scale, int64_t iterations,
                      const std::function<at::Tensor(const at::Tensor& base_OI)>& quantized);

}  // namespace trireme
