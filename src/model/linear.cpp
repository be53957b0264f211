#include "base/tensor.h"

#include "model/linear.h"

#include "model/lora.h"
#include "ops/ops.h"

namespace trireme {

at::Tensor Linear::forward(const ArrivingRows& x_TI, const DropoutContext& dropout) const {
  DropoutKey key;
  if (lora && dropout.active && lora->dropout > 0)
    key = {lora->dropout, dropout.seed, static_cast<uint64_t>(index), dropout.row_ids_T, first_feature};
  if (lora && lora->magnitude_O.defined()) return with_magnitude(x_TI, key);
  // Behind an `after` the bias is added to what it returns: a row-parallel layer adds it once, not once a rank.
  at::Tensor fused_bias = after ? at::Tensor() : bias_O;
  at::Tensor y = lora ? lora_linear(x_TI, weight(), fused_bias, lora->a_RI, lora->b_OR, lora->scale, key, after)
                      : trireme::linear(x_TI, weight(), fused_bias, after);
  return after && bias_O.defined() ? y + bias_O : y;
}

at::Tensor Linear::with_magnitude(const ArrivingRows& x_TI, const DropoutKey& key) const {
  const at::Tensor norm_O = adapted_row_norms(weight(), *lora, sum_over_inputs);
  const at::Tensor factor_O = (lora->magnitude_O.to(norm_O.scalar_type()) / norm_O).to(x_TI.promised().scalar_type());
  const auto turned = [&](const ArrivingRows& d_TI) { return lora_linear(d_TI, weight(), {}, lora->a_RI, lora->b_OR, lora->scale, {}, after) * factor_O; };
  at::Tensor y;
  if (key.p > 0) {
    const at::Tensor all_TI = x_TI.wait(), d_TI = trireme::dropout(all_TI, key);
    y = trireme::linear(all_TI - d_TI, weight(), {}, after) + turned(d_TI);
  } else {
    y = turned(x_TI);
  }
  return bias_O.defined() ? y + bias_O : y;
}

}  // namespace trireme
