#include "base/tensor.h"

#include "model/linear.h"

#include "ops/ops.h"

namespace trireme {

at::Tensor Linear::forward(const ArrivingRows& x_TI, const DropoutContext& dropout) const {
  // Behind an `after` the bias is added to what it returns: a row-parallel layer adds it once, not once a rank.
  at::Tensor fused_bias = after ? at::Tensor() : bias_O;
  at::Tensor y;
  if (lora) {
    DropoutKey key;
    if (dropout.active && lora->dropout > 0)
      key = {lora->dropout, dropout.seed, static_cast<uint64_t>(index), dropout.row_ids_T, first_feature};
    y = lora_linear(x_TI, weight(), fused_bias, lora->a_RI, lora->b_OR, lora->scale, key, after);
  } else {
    y = trireme::linear(x_TI, weight(), fused_bias, after);
  }
  return after && bias_O.defined() ? y + bias_O : y;
}

}  // namespace trireme
