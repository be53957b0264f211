// A linear layer with the seams that tensor parallelism and LoRA hang on.
#pragma once

#include "base/parameter.h"
#include "ops/frozen_weight.h"
#include "ops/row_exchange.h"

namespace trireme {

struct DropoutKey;

// What keys the dropout masks of one forward: a mask depends on (seed, layer, sample, position, feature), never on how
// samples are packed or spread over ranks.
struct DropoutContext {
  uint64_t seed = 0;        // of this run and step or epoch; set by the caller
  at::Tensor row_ids_T;     // int64 [T] key of each row: a hash of (sample id, position)
  bool active = false;      // false: evaluation, no dropout

  DropoutContext rows(int64_t first, int64_t count) const { return {seed, active ? row_ids_T.narrow(0, first, count) : row_ids_T, active}; }
};

// y = x W^T + scale * dropout(x) A^T B^T; A [R, I], B [O, R]. With a magnitude (DoRA, Liu et al. 2024) d = dropout(x) and
// y = (x - d) W^T + m / |W + scale B A| * (d W^T + scale * d A^T B^T), the norm of each row taken as a constant, as PEFT does.
struct LoraAdapter {
  at::Tensor a_RI, b_OR;
  at::Tensor magnitude_O;  // m, or undefined
  double scale = 1.0;
  double dropout = 0.0;
};

// forward(x) = after(x W^T + lora) + bias. Weight [O, I] as in Hugging Face files. `after` is null (identity) on one
// device; where parallel/ has sliced the inputs (a row-parallel layer) it sums over the ranks.
class Linear {
 public:
  std::string path;      // model.layers.0.self_attn.q_proj
  int64_t index = 0;     // number of this layer in the model; keys its dropout masks
  at::Tensor weight_OI;  // leaf; undefined where there is a
  std::shared_ptr<FrozenWeight> frozen;  // whose leaves are the layer's
  at::Tensor bias_O;     // leaf, or undefined
  std::unique_ptr<LoraAdapter> lora;
  std::shared_ptr<const RowSum> after;
  std::function<void(at::Tensor)> sum_over_inputs;  // over the ranks that hold this layer's other inputs; null: there are none
  int64_t first_feature = 0;  // of x in the whole layer's inputs, where they are sliced; keys the dropout masks

  // `is_read`: as of linear() in ops/ops.h.
  at::Tensor forward(const ArrivingRows& x_TI, const DropoutContext& dropout, bool is_read = true) const;
  // forward() in pieces of the rows: part() of each, where no ranks meet, then whole() of all of them together.
  at::Tensor row_norms() const;  // of the adapted weight, for all parts; undefined where there is no magnitude
  at::Tensor part(const at::Tensor& x_tI, const DropoutContext& dropout, const at::Tensor& norm_O) const { return product({x_tI}, dropout, norm_O, nullptr, true); }
  at::Tensor whole(const at::Tensor& part_TO, bool is_read) const;
  std::vector<at::Tensor> trained() const;  // of its leaves

  LinearWeight weight() const { return frozen ? LinearWeight(frozen) : LinearWeight(weight_OI); }
  int64_t out_features() const { return weight().out_features(); }
  int64_t in_features() const { return weight().in_features(); }

 private:
  // Without the bias where `after` is to come or has been.
  at::Tensor product(const ArrivingRows& x_TI, const DropoutContext& dropout, const at::Tensor& norm_O, const std::shared_ptr<const RowSum>& sum, bool is_read) const;
  at::Tensor with_magnitude(const ArrivingRows& x_TI, const DropoutKey& key, const at::Tensor& norm_O, const std::shared_ptr<const RowSum>& sum) const;
};

}  // namespace trireme
