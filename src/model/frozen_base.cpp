#include "base/tensor.h"

#include "model/frozen_base.h"

#include <algorithm>
#include <chrono>

#include "base/check.h"
#include "base/log.h"
#include "model/linear_names.h"
#include "model/lora_init.h"
#include "ops/dequantized_weight.h"
#include "ops/float8.h"
#include "ops/weight_leaf.h"
#include "quant/four_bit_weight.h"
#include "quant/int8_weight.h"

namespace trireme {
namespace {

// What is stored cannot be brought into another form: its values are rounded already.
void check_stored(const FrozenBase& base, const std::string& path, const StoredFormat& f) {
  const bool four_bits = f.kind != "int8";
  const auto differs = [&](const auto&... key) {
    const std::string blocks = four_bits ? str(", in blocks of ", f.block_size, " with scales in ", f.is_double ? "8 bits" : "32 bits") : "";
    return ConfigError(str(key..., ", but the model's files hold ", path, " in ", f.kind, blocks, ": leave it out, or set quant.base=dense and quantize what that exports"));
  };
  if (base.kind != "none" && base.kind != f.kind) throw differs("quant.base=", base.kind);
  if (four_bits && base.block_size.value_or(f.block_size) != f.block_size) throw differs("quant.block_size=", *base.block_size);
  if (four_bits && base.is_double.value_or(f.is_double) != f.is_double) throw differs("quant.double=", *base.is_double ? "true" : "false");
}

// Why a layer cannot be kept in this form; empty where it can.
std::string misfit(const std::string& kind, const Linear& l) {
  const int64_t inputs = l.in_features();
  if (kind == "int8" && inputs > kInt8MostColumns) return str(l.path, " has ", inputs, " inputs, but at most ", kInt8MostColumns, " products of 8 bits add up in 32 bits");
  if ((kind == "nf4" || kind == "fp4") && inputs % 2 != 0) return str(l.path, " has ", inputs, " inputs, an odd number, whose codes of 4 bits fill no whole bytes");
  return "";
}

}  // namespace

void freeze_base(Transformer& model, const FrozenBase& base) {
  if (base.none()) return;
  TRIREME_CHECK(model.device().is_meta(), base.kind);
  const auto four_bits = [&](const Linear& l, const std::string& kind, int64_t block_size, bool is_double) {
    TRIREME_CHECK(kind == "nf4" || kind == "fp4", kind);
    return four_bit_weight(l.path, l.out_features(), l.in_features(), {kind == "nf4" ? FourBit::kNf4 : FourBit::kFp4, block_size, is_double, base.compute.value_or(model.dtype()), !base.stored.empty()});
  };
  const auto made = [&](const Linear& l) -> std::shared_ptr<FrozenWeight> {
    if (const std::string why = misfit(base.kind, l); !why.empty()) throw ConfigError(str("quant.base=", base.kind, ": ", why, ": add it to quant.skip"));
    if (base.kind == "fp8") return float8_weight(l.path, l.out_features(), l.in_features());
    if (base.kind == "int8") return int8_weight(l.path, l.out_features(), l.in_features(), model.dtype(), base.threshold);
    return four_bits(l, base.kind, base.blocks(), base.has_double());
  };
  const auto as_stored = [&](const Linear& l) -> std::shared_ptr<FrozenWeight> {
    const StoredFormat& f = base.stored.at(l.path);
    check_stored(base, l.path, f);
    if (f.rows != l.out_features() || f.columns != l.in_features())
      throw DataError(str(l.path, " is stored in ", f.kind, " as ", f.rows, " x ", f.columns, ", but the model's is ", l.out_features(), " x ", l.in_features(), "."));
    if (const std::string why = misfit(f.kind, l); !why.empty()) throw DataError(str(why, ", and the model's files hold it in ", f.kind, ": set quant.base=dense for the values that its codes stand for."));
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
  if (skipped.size() == model.linears().size()) throw ConfigError(str("quant.skip leaves no layer to quantize: name fewer layers, or leave quant.base=", base.kind, " out"));
}

FrozenLayers::FrozenLayers(Transformer& model, const LoraConfig& lora) : lora_(lora) {
  for (const Linear* l : model.linears()) {
    // What is in no fewer bits loses nothing that LoftQ would make up for.
    const bool starts = l->lora && (lora.init == LoraInit::kPissa || (lora.init == LoraInit::kLoftq && l->frozen)), dora = l->lora && lora.dora;
    if (!l->frozen && !starts && !dora) continue;
    const at::Tensor whole = at::empty({l->out_features(), l->in_features()}, at::TensorOptions(model.dtype()).device(at::kMeta));
    Layer layer{{l->path + ".weight", whole, ShardSpec::whole(whole)}, l->frozen, {}};
    if (l->frozen) for (const FrozenWeight::Leaf& leaf : l->frozen->leaves()) layer.leaves.push_back(l->path + leaf.suffix);
    else layer.leaves.push_back(l->path + ".weight");
    const auto add = [&](const char* name) { layer.leaves.push_back("base_model.model." + l->path + name); };
    if (starts) add(".lora_A.weight"), add(".lora_B.weight");
    if (dora) add(".lora_magnitude_vector");
    if (l->lora) layer.rank = l->lora->a_RI.size(0), layer.scale = l->lora->scale;
    layer.starts = starts, layer.dora = dora;
    const auto shared = std::make_shared<const Layer>(std::move(layer));
    for (size_t i = 0; i < shared->leaves.size(); ++i) layers_[shared->leaves[i]] = {shared, i};
  }
}

// `codes`: of the weight where it is stored in its form; else they are made of the whole.
std::vector<at::Tensor> FrozenLayers::values(const Layer& layer, const at::Tensor& whole_OI, std::vector<at::Tensor> codes) const {
  const auto* weight = dynamic_cast<const DequantizedWeight*>(layer.weight.get());
  TRIREME_CHECK(weight || !layer.weight || (lora_.init != LoraInit::kLoftq && !layer.dora), layer.whole.name, ": its form has no values");
  TRIREME_CHECK(codes.empty() || !layer.starts, layer.whole.name, " is stored in its form");
  // One bad value is in all sums of a decomposition: none of what it gives could name it.
  if (layer.starts) check_finite(layer.whole.name.substr(0, layer.whole.name.rfind(".weight")), whole_OI, str("and lora.init=", lora_.init_name(), " begins with them"));
  const at::ScalarType dtype = layer.whole.value.scalar_type();
  const at::Device device = codes.empty() ? whole_OI.device() : codes[0].device();
  const auto decoded = [&](const std::vector<at::Tensor>& of, at::ScalarType type) {
    const at::Tensor again_OI = at::empty(layer.whole.value.sizes(), at::TensorOptions(type).device(device));
    weight->decode(of, again_OI);
    return again_OI;
  };
  LoraStart start{whole_OI, {}, {}};
  if (layer.starts && lora_.init == LoraInit::kPissa) start = pissa_start(whole_OI, layer.rank, layer.scale, lora_.pissa_iterations);
  else if (layer.starts) start = loftq_start(whole_OI, layer.rank, layer.scale, lora_.loftq_iterations, [&](const at::Tensor& base_OI) { return decoded(weight->encode(base_OI), at::kFloat); });
  std::vector<at::Tensor> values = !codes.empty() ? std::move(codes) : layer.weight ? layer.weight->encode(start.base_OI) : std::vector<at::Tensor>{start.base_OI};
  const at::Tensor base_OI = !layer.dora ? at::Tensor() : layer.weight ? decoded(values, dtype == at::kDouble ? at::kFloat : dtype) : start.base_OI;
  if (layer.starts) values.insert(values.end(), {start.a_RI, start.b_OR});
  if (!layer.dora) return values;
  const auto none = [&](int64_t rows, int64_t columns) { return at::zeros({rows, columns}, at::TensorOptions(dtype).device(device)); };
  if (!layer.starts) start.a_RI = none(1, base_OI.size(1)), start.b_OR = none(base_OI.size(0), 1);
  values.push_back(adapted_row_norms(base_OI, {start.a_RI, start.b_OR, {}, layer.scale}));
  return values;
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
  std::vector<const Layer*> in_order;
  for (const Parameter& leaf : leaves) {
    const Layer* layer = layers_.at(leaf.name).first.get();
    if (of_layer[layer].empty()) in_order.push_back(layer);
    of_layer[layer].push_back(&leaf);
  }
  const auto starts = std::count_if(in_order.begin(), in_order.end(), [](const Layer* layer) { return layer->starts; });
  StartProgress progress(lora_.init_name(), starts);
  const auto begin = std::chrono::steady_clock::now();
  int64_t started = 0;
  for (const Layer* layer : in_order) {
    const auto& parts = of_layer.at(layer);
    Parameter whole = layer->whole;
    std::vector<at::Tensor> codes = layer->weight && stored ? stored(whole.name) : std::vector<at::Tensor>();
    if (codes.empty()) {
      whole.value = at::empty(whole.value.sizes(), whole.value.options().device(parts[0]->value.device()));
      read(whole);
    }
    const std::vector<at::Tensor> values = this->values(*layer, whole.value, std::move(codes));
    for (const Parameter* part : parts) {
      at::Tensor value = values.at(layers_.at(part->name).second);
      for (int64_t d = 0; d < value.dim(); ++d) value = value.narrow(d, part->shard.offset[static_cast<size_t>(d)], part->value.size(d));
      part->value.detach().copy_(value);
    }
    if (!layer->starts) continue;
    if (const std::string line = progress.line(++started, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count()); !line.empty()) log_info(line);
  }
}

}  // namespace trireme
