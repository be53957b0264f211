#include "base/tensor.h"

#include "model/linear.h"

#include "model/lora.h"
#include "ops/ops.h"

namespace trireme {

at::Tensor Linear::forward(const ArrivingRows& x_TI, const DropoutContext& dropout, bool is_read) const {
  const at::Tensor y = product(x_TI, dropout, row_norms(), after, is_read);
  return after && bias_O.defined() ? y + bias_O : y;
}

at::Tensor Linear::whole(const at::Tensor& part_TO, bool is_read) const {
  if (!after) return part_TO;
  const at::Tensor y = sum_over_ranks(part_TO, after, is_read);
  return bias_O.defined() ? y + bias_O : y;
}

at::Tensor Linear::product(const ArrivingRows& x_TI, const DropoutContext& dropout, const at::Tensor& norm_O, const std::shared_ptr<const RowSum>& sum, bool is_read) const {
  DropoutKey key;
  if (lora && dropout.active && lora->dropout > 0)
    key = {lora->dropout, dropout.seed, static_cast<uint64_t>(index), dropout.row_ids_T, first_feature};
  if (norm_O.defined()) return with_magnitude(x_TI, key, norm_O, sum);
  // Behind an `after` the bias is added to what it returns: a row-parallel layer adds it once, not once a rank.
  const at::Tensor bias = after ? at::Tensor() : bias_O;
  return lora ? lora_linear(x_TI, weight(), bias, lora->a_RI, lora->b_OR, lora->scale, key, sum, is_read) : trireme::linear(x_TI, weight(), bias, sum, is_read);
}

at::Tensor Linear::row_norms() const {
  return lora && lora->magnitude_O.defined() ? adapted_row_norms(weight(), *lora, sum_over_inputs) : at::Tensor();
}

at::Tensor Linear::with_magnitude(const ArrivingRows& x_TI, const DropoutKey& key, const at::Tensor& norm_O, const std::shared_ptr<const RowSum>& sum) const {
  const at::Tensor factor_O = (lora->magnitude_O.to(norm_O.scalar_type()) / norm_O).to(x_TI.promised().scalar_type());
  const auto turned = [&](const ArrivingRows& d_TI) { return lora_linear(d_TI, weight(), {}, lora->a_RI, lora->b_OR, lora->scale, {}, sum) * factor_O; };
  at::Tensor y;
  if (key.p > 0) {
    const at::Tensor all_TI = x_TI.wait(), d_TI = trireme::dropout(all_TI, key);
    y = trireme::linear(all_TI - d_TI, weight(), {}, sum) + turned(d_TI);
  } else {
    y = turned(x_TI);
  }
  return bias_O.defined() && !after ? y + bias_O : y;
}

std::vector<at::Tensor> Linear::trained() const {
  std::vector<at::Tensor> leaves = {weight_OI, bias_O};
  if (lora) leaves.insert(leaves.end(), {lora->a_RI, lora->b_OR, lora->magnitude_O});
  std::erase_if(leaves, [](const at::Tensor& leaf) { return !leaf.defined() || !leaf.requires_grad(); });
  return leaves;
}

}  // namespace trireme
