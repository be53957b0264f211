#include "base/tensor.h"

#include "model/frozen_base.h"

#include "base/check.h"
#include "model/linear_names.h"
#include "ops/float8.h"
#include "quant/four_bit_weight.h"
#include "quant/int8_weight.h"

namespace trireme {

void freeze_base(Transformer& model, const FrozenBase& base) {
  if (base.none()) return;
  TRIREME_CHECK(model.device().is_meta(), base.kind);
  const auto made = [&](const std::string& path, int64_t out_features, int64_t in_features) -> std::shared_ptr<FrozenWeight> {
    if (base.kind == "fp8") return float8_weight(path, out_features, in_features);
    if (base.kind == "int8") return int8_weight(path, out_features, in_features, model.dtype(), base.threshold);
    TRIREME_CHECK(base.kind == "nf4" || base.kind == "fp4", base.kind);
    return four_bit_weight(path, out_features, in_features, {base.kind == "nf4" ? FourBit::kNf4 : FourBit::kFp4, base.block_size, base.is_double, base.compute.value_or(model.dtype())});
  };
  for (const Parameter& p : model.parameters()) p.value.requires_grad_(false);
  const std::set<Linear*> skipped = linears_named(model, base.skipped, "quant.skip");
  for (Linear* l : model.linears()) {
    if (skipped.count(l)) continue;
    l->frozen = made(l->path, l->out_features(), l->in_features());
    l->weight_OI = at::Tensor();
  }
}

FrozenLayers::FrozenLayers(Transformer& model) {
  for (const Linear* l : model.linears()) {
    if (!l->frozen) continue;
    const at::Tensor whole = at::empty({l->out_features(), l->in_features()}, at::TensorOptions(model.dtype()).device(at::kMeta));
    const auto layer = std::make_shared<Layer>(Layer{{l->path + ".weight", whole, ShardSpec::whole(whole)}, l->frozen});
    for (size_t i = 0; i < l->frozen->leaves().size(); ++i) layers_[l->path + l->frozen->leaves()[i].suffix] = {layer, i};
  }
}

std::vector<Parameter> FrozenLayers::made_of(const std::vector<Parameter>& leaves) const {
  std::vector<Parameter> wholes;
  std::set<const Layer*> seen;
  for (const Parameter& leaf : leaves)
    if (const Layer* layer = layers_.at(leaf.name).first.get(); seen.insert(layer).second) wholes.push_back(layer->whole);
  return wholes;
}

void FrozenLayers::fill(const std::vector<Parameter>& leaves, const std::function<void(const Parameter&)>& read) const {
  std::map<const Layer*, std::vector<const Parameter*>> of_layer;
  for (const Parameter& leaf : leaves) of_layer[layers_.at(leaf.name).first.get()].push_back(&leaf);
  for (const auto& [layer, parts] : of_layer) {
    Parameter whole = layer->whole;
    whole.value = at::empty(whole.value.sizes(), whole.value.options().device(parts[0]->value.device()));
    read(whole);
    const std::vector<at::Tensor> values = layer->weight->encode(whole.value);
    for (const Parameter* part : parts) {
      at::Tensor value = values.at(layers_.at(part->name).second);
      for (int64_t d = 0; d < value.dim(); ++d) value = value.narrow(d, part->shard.offset[static_cast<size_t>(d)], part->value.size(d));
      part->value.detach().copy_(value);
    }
  }
}

}  // namespace trireme
