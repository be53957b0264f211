#include "base/tensor.h"

#include "model/frozen_base.h"

#include "base/check.h"
#include "model/linear_names.h"
#include "ops/float8.h"
#include "quant/four_bit_weight.h"
#include "quant/int8_weight.h"

namespace trireme {

namespace {

// What is stored cannot be brought into another form: its values are rounded already.
void check_stored(const FrozenBase& base, const std::string& path, const StoredFormat& f) {
  const FrozenBase usual;
  const auto differs = [&](const auto&... key) { return ConfigError(str(key..., ", but the model's files hold ", path, " in ", f.kind, f.kind == "int8" ? std::string() : str(", in blocks of ", f.block_size, " with scales in ", f.is_double ? "8 bits" : "32 bits"),
                                                                        ": leave it out, or set quant.base=dense and quantize what that exports")); };
  if (base.kind != "none" && base.kind != f.kind) throw differs("quant.base=", base.kind);
  if (base.block_size != usual.block_size && base.block_size != f.block_size) throw differs("quant.block_size=", base.block_size);
  if (base.is_double != usual.is_double && base.is_double != f.is_double) throw differs("quant.double=", base.is_double ? "true" : "false");
}

}  // namespace

void freeze_base(Transformer& model, const FrozenBase& base) {
  if (base.none()) return;
  TRIREME_CHECK(model.device().is_meta(), base.kind);
  const auto four_bits = [&](const Linear& l, const std::string& kind, int64_t block_size, bool is_double) {
    TRIREME_CHECK(kind == "nf4" || kind == "fp4", kind);
    return four_bit_weight(l.path, l.out_features(), l.in_features(), {kind == "nf4" ? FourBit::kNf4 : FourBit::kFp4, block_size, is_double, base.compute.value_or(model.dtype())});
  };
  const auto made = [&](const Linear& l) -> std::shared_ptr<FrozenWeight> {
    if (base.kind == "fp8") return float8_weight(l.path, l.out_features(), l.in_features());
    if (base.kind == "int8") return int8_weight(l.path, l.out_features(), l.in_features(), model.dtype(), base.threshold);
    return four_bits(l, base.kind, base.block_size, base.is_double);
  };
  const auto as_stored = [&](const Linear& l) -> std::shared_ptr<FrozenWeight> {
    const StoredFormat& f = base.stored.at(l.path);
    check_stored(base, l.path, f);
    if (f.rows != l.out_features() || f.columns != l.in_features())
      throw DataError(str(l.path, " is stored in ", f.kind, " as ", f.rows, " x ", f.columns, ", but the model's is ", l.out_features(), " x ", l.in_features(), "."));
    if (f.kind == "int8") return int8_weight(l.path, l.out_features(), l.in_features(), model.dtype(), base.threshold);
    return four_bits(l, f.kind, f.block_size, f.is_double);
  };
  for (const Parameter& p : model.parameters()) p.value.requires_grad_(false);
  const std::set<Linear*> skipped = linears_named(model, base.skipped, "quant.skip");
  for (Linear* l : model.linears()) {
    const bool is_stored = base.stored.count(l->path) != 0;
    if (is_stored && skipped.count(l)) throw ConfigError(str("quant.skip: the model's files hold ", l->path, " in ", base.stored.at(l->path).kind, ": leave it out, or set quant.base=dense"));
    if (base.stored.empty() ? skipped.count(l) != 0 : !is_stored) continue;
    l->frozen = is_stored ? as_stored(*l) : made(*l);
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

void FrozenLayers::fill(const std::vector<Parameter>& leaves, const std::function<void(const Parameter&)>& read,
                        const std::function<std::vector<at::Tensor>(const std::string&)>& stored) const {
  std::map<const Layer*, std::vector<const Parameter*>> of_layer;
  for (const Parameter& leaf : leaves) of_layer[layers_.at(leaf.name).first.get()].push_back(&leaf);
  for (const auto& [layer, parts] : of_layer) {
    Parameter whole = layer->whole;
    std::vector<at::Tensor> values = stored ? stored(whole.name) : std::vector<at::Tensor>();
    if (values.empty()) {
      whole.value = at::empty(whole.value.sizes(), whole.value.options().device(parts[0]->value.device()));
      read(whole);
      values = layer->weight->encode(whole.value);
    }
    for (const Parameter* part : parts) {
      at::Tensor value = values.at(layers_.at(part->name).second);
      for (int64_t d = 0; d < value.dim(); ++d) value = value.narrow(d, part->shard.offset[static_cast<size_t>(d)], part->value.size(d));
      part->value.detach().copy_(value);
    }
  }
}

}  // namespace trireme
