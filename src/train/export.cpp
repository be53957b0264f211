#include "train/export.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/check.h"
#include "checkpoint/export_folder.h"
#include "checkpoint/peft.h"
#include "ops/dequantized_weight.h"
#include "parallel/gather.h"
#include "train/quantize.h"
#include "train/text_tools.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

std::vector<Parameter> only(std::vector<Parameter> parameters, bool adapters) {
  std::erase_if(parameters, [&](const Parameter& p) { return is_adapter(p) != adapters; });
  return parameters;
}

ExportedChat exported_chat(const Config& config, const ModelSource& source) {
  ExportedChat chat;
  if (config.data.chat_template.empty()) return chat;
  TextTools tools = load_text_tools(config, source.tokenizer_folder, &source.config);
  chat.chat_template = tools.chat->text();
  for (auto [name, id] : {std::pair("bos_token", tools.bos_id), std::pair("eos_token", tools.eos_id)})
    if (id >= 0) chat.special_tokens[name] = tools.tokenizer.id_to_token(id);
  if (auto id = end_of_turn(config, tools)) chat.end_ids.push_back(*id);
  return chat;
}

void write_model(const std::string& folder, const std::vector<TensorSource>& tensors, at::ScalarType type, const Config& config,
                 const ModelSource& source, bool writes, uint64_t max_shard_bytes, const Json& quantization = {}) {
  const std::string dtype = dtype_name(type);
  Json json = source.folder.empty() ? model_config_from_fields(source.config, dtype) : model_config_to_json(source.config, dtype);
  // A run from random weights writes the Hub's fields it was given too: tokenizer ids, architectures and the like.
  if (source.folder.empty())
    for (const auto& [key, value] : source.config.raw.items())
      if (!json.contains(key)) json[key] = value;
  if (!quantization.is_null()) json["quantization_config"] = quantization;
  const std::string files = source.folder.empty() ? fs::path(source.config.source).parent_path().string() : source.folder;
  export_model_folder(folder, files, source.tokenizer_folder, json, tensors, exported_chat(config, source), writes, max_shard_bytes);
}

// What adapters of lora.init=pissa or loftq begin with. Their base lacks it; an adapter for the weights of the folder takes it off again:
// B A - B0 A0 = [B, -B0] [A; A0], of twice the rank (Meng et al. 2024).
class InitialAdapters {
 public:
  InitialAdapters(const Config& config, const ModelSource& source, at::ScalarType dtype) {
    if (config.lora.init == "random") return;
    const auto model = build_model(config, source, dtype, true, at::kCPU, true, {}, &fill_);
    for (const Parameter& p : model->parameters()) shapes_[p.name] = p;
    for (const Linear* l : model->linears())
      if (l->frozen) frozen_[l->path] = l->frozen;
  }
  // What the layer's base stands for, beside which the adapter was trained; undefined where nothing was taken out of it.
  at::Tensor base_of(const std::string& path, at::ScalarType dtype) {
    if (!fill_) return {};
    const auto of_layer = frozen_.find(path);
    const auto* weight = of_layer == frozen_.end() ? nullptr : dynamic_cast<const DequantizedWeight*>(of_layer->second.get());
    std::vector<std::string> names = {path + ".weight"};
    if (weight) names.clear();
    for (size_t i = 0; weight && i < weight->leaves().size(); ++i) names.push_back(path + weight->leaves()[i].suffix);
    std::vector<Parameter> leaves;
    std::vector<at::Tensor> values;
    for (const std::string& name : names) {
      leaves.push_back(shapes_.at(name));
      leaves.back().value = at::empty(leaves.back().value.sizes(), leaves.back().value.scalar_type());
      values.push_back(leaves.back().value);
    }
    fill_(leaves);
    if (!weight) return values[0];
    const at::Tensor base_OI = at::empty({weight->out_features(), weight->in_features()}, at::TensorOptions(dtype));
    weight->decode(values, base_OI);
    return base_OI;
  }
  int64_t rank_factor() const { return fill_ ? 2 : 1; }
  // A's or B's values with those taken off; of another leaf, or where there are none, the values.
  at::Tensor taken_off(const std::string& name, const at::Tensor& value) {
    const bool a = name.ends_with(kA), b = name.ends_with(kB);
    if (!fill_ || !(a || b)) return value;
    const at::Tensor initial = value_of(name).to(value.scalar_type());
    return at::cat({value.detach().cpu(), a ? initial : initial.neg()}, a ? 0 : 1);
  }
  TensorSource taken_off(const TensorSource& tensor, bool here) {
    TensorSource out = tensor;
    if (tensor.name.ends_with(kA)) out.shape[0] *= rank_factor();
    if (tensor.name.ends_with(kB)) out.shape[1] *= rank_factor();
    out.get = [this, tensor, here] {
      const at::Tensor value = tensor.get();
      return here ? taken_off(tensor.name, value) : value;
    };
    return out;
  }

 private:
  static constexpr const char *kA = ".lora_A.weight", *kB = ".lora_B.weight";

  // A and B of a layer come from one decomposition: the other's is kept until it is asked for.
  at::Tensor value_of(const std::string& name) {
    if (!values_.count(name)) {
      values_.clear();
      const std::string layer = name.substr(0, name.rfind(".lora_"));
      std::vector<Parameter> both;
      for (const char* suffix : {kA, kB}) {
        Parameter p = shapes_.at(layer + suffix);
        p.value = values_[p.name] = at::empty(p.value.sizes(), p.value.scalar_type());
        both.push_back(p);
      }
      fill_(both);
    }
    return values_.at(name);
  }

  WeightFill fill_;
  std::map<std::string, Parameter> shapes_;
  std::map<std::string, std::shared_ptr<FrozenWeight>> frozen_;
  std::map<std::string, at::Tensor> values_;
};

void write_peft(const std::string& folder, const std::vector<TensorSource>& tensors, at::ScalarType type, const Config& config,
                const ModelSource& source, bool writes) {
  const LoraConfig lora = lora_config(config);
  // A part of the model cannot say whether every layer of a name has an adapter.
  const auto targets = lora_targets(*model_shapes(config, source.config, type, true));
  const int64_t factor = lora.init == LoraInit::kRandom ? 1 : 2;  // InitialAdapters; the scale stays
  const double alpha = lora.alpha * (lora.rank_stabilized ? std::sqrt(static_cast<double>(factor)) : static_cast<double>(factor));
  const PeftConfig peft{factor * lora.rank, alpha, lora.dropout, lora.rank_stabilized, targets, false, source.name, source.revision, lora.dora};
  // What begins with the weights is written as an adapter for them.
  write_adapter(folder, peft_config_to_json(peft), tensors, writes, lora.init == LoraInit::kRandom ? quantized_base(config, source.config) : "");
  if (writes && !source.tokenizer_folder.empty()) copy_tokenizer_files(source.tokenizer_folder, folder, exported_chat(config, source));
}

// In fp32: what a merged weight is rounded from, once.
at::Tensor value_of(FrozenWeight& frozen, const at::Tensor& whole_OI) {
  const std::vector<FrozenWeight::Leaf> without_memory = frozen.leaves();
  frozen.set(whole_OI);
  const at::Tensor value = at::empty(whole_OI.sizes(), whole_OI.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  dynamic_cast<const DequantizedWeight&>(frozen).dequantize(value);
  frozen.leaves() = without_memory;
  return value;
}

at::ScalarType trained_dtype(const Checkpoint& checkpoint) {
  for (const auto& [name, tensor] : checkpoint.tensors())
    if (name.starts_with("model/")) return tensor.dtype;
  throw DataError(str(checkpoint.folder(), " holds no weights of a model"));
}

// What files hold of a model: the weights that a checkpoint has from there, and adapters, merged or not. One weight is in memory at a time.
class StoredTensors {
 public:
  StoredTensors(const Config& config, const ModelSource& source, const std::optional<Checkpoint>& checkpoint)
      : dtype_(exported_dtype(config, source, checkpoint)), checkpoint_(checkpoint), source_(source), merges_(config.lora.merge), initial_(config, source, dtype_) {
    Config stored = config;
    stored.quant.base = "dense";
    stored.lora.init = "random";
    shapes_ = build_model(stored, source, dtype_, checkpoint.has_value(), at::kCPU, true, {}, &fill_);
    const auto of_adapter = [](const auto& tensor) { return is_adapter({tensor.first, {}, {}}); };
    if (checkpoint && !has_lora(*shapes_) && std::any_of(checkpoint->tensors().begin(), checkpoint->tensors().end(), of_adapter))
      throw ConfigError(str("the checkpoint ", checkpoint->folder(), " holds adapters, but lora.rank is 0: name the run's config.ini, ",
                            "as in trireme export RUN/config.ini --run.resume=", checkpoint->folder(), " --run.dir=OUT"));
    std::vector<NamedTensor> trained;  // a checkpoint holds what was trained: all weights, or the adapters
    for (const Parameter& p : shapes_->parameters()) {
      by_name_[p.name] = p;
      if (p.value.requires_grad()) trained.push_back(stored_as(p, p.value.detach()));
    }
    if (checkpoint) checkpoint->check(trained, true);
    // What a base in 4 or 8 bits stands for is what was trained beside; float8 is how products are made, of the weights as they are stored.
    const auto frozen = config.quant.base == "none" ? nullptr : model_shapes(config, source.config, dtype_, false);
    for (const Linear* l : frozen ? frozen->linears() : std::vector<Linear*>())
      if (dynamic_cast<const DequantizedWeight*>(l->frozen.get()) && !source.config.stored.count(l->path)) quantized_[l->path + ".weight"] = l->frozen;
    for (const Linear* l : shapes_->linears())
      if (l->lora) adapted_[l->path + ".weight"] = l;
  }

  at::ScalarType dtype() const { return dtype_; }
  bool adapters_alone() const { return !adapted_.empty() && !merges_; }
  bool is_adapted(const std::string& name) const { return adapted_.count(name) != 0; }

  // This object has to outlive them.
  std::vector<TensorSource> sources() {
    std::vector<TensorSource> tensors;
    for (const Parameter& p : only(shapes_->parameters(), adapters_alone())) {
      tensors.push_back({p.name, dtype_, p.value.sizes().vec(), [this, p] { return adapters_alone() ? read(p) : merged(p.name); }});
      if (adapters_alone()) tensors.back() = initial_.taken_off(tensors.back(), true);
    }
    return tensors;
  }
  // What an adapter is added to; of a quantized weight in fp32.
  at::Tensor base(const std::string& name) {
    const Parameter& p = by_name_.at(name);
    at::Tensor value = read(p);
    if (const auto q = quantized_.find(name); q != quantized_.end()) value = value_of(*q->second, value);
    if (!is_adapted(name)) return value;
    const at::Tensor begun = initial_.base_of(adapted_.at(name)->path, value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    return begun.defined() ? begun : value;
  }
  at::Tensor merged(const std::string& name) {
    const at::Tensor value = base(name);
    if (!is_adapted(name)) return value;
    const Linear& layer = *adapted_.at(name);
    const auto adapter = [&](const char* suffix) {
      const auto p = by_name_.find("base_model.model." + layer.path + suffix);
      return p == by_name_.end() ? at::Tensor() : read(p->second);
    };
    merge_lora(value, {adapter(".lora_A.weight"), adapter(".lora_B.weight"), adapter(".lora_magnitude_vector"), layer.lora->scale});
    return value;
  }

 private:
  static NamedTensor stored_as(const Parameter& p, const at::Tensor& value) { return {"model/" + p.name, value, p.shard}; }

  at::Tensor read(const Parameter& p) const {
    const bool wide = source_.config.stored.count(p.name.substr(0, p.name.rfind(".weight"))) != 0 && p.value.scalar_type() != at::kDouble;
    const at::Tensor value = at::empty(p.value.sizes(), wide ? at::kFloat : p.value.scalar_type());
    if (checkpoint_ && p.value.requires_grad()) checkpoint_->load({stored_as(p, value)}, true);
    else fill_({{p.name, value, p.shard}});
    return value;
  }

  const at::ScalarType dtype_;
  const std::optional<Checkpoint>& checkpoint_;
  const ModelSource& source_;
  const bool merges_;
  InitialAdapters initial_;
  WeightFill fill_;
  std::unique_ptr<Transformer> shapes_;
  std::map<std::string, Parameter> by_name_;
  std::map<std::string, std::shared_ptr<FrozenWeight>> quantized_;  // by X.weight, as the next
  std::map<std::string, const Linear*> adapted_;
};

// The model with its base in fewer bits, and the values that these have of any of its weights.
struct QuantizedBase {
  QuantizedBase(Config config, const ModelSource& source, at::ScalarType dtype) {
    config.lora = {};
    model = build_model(config, source, dtype, false, at::kCPU, true, {}, &fill);
    for (const Parameter& p : model->parameters()) shapes[p.name] = p;
  }
  std::vector<at::Tensor> leaves(const std::string& path, const FrozenWeight& weight) const {
    std::vector<Parameter> leaves;
    std::vector<at::Tensor> values;
    for (const FrozenWeight::Leaf& leaf : weight.leaves()) {
      leaves.push_back(shapes.at(path + leaf.suffix));
      leaves.back().value = at::empty(leaves.back().value.sizes(), leaves.back().value.scalar_type());
      values.push_back(leaves.back().value);
    }
    fill(leaves);
    return values;
  }
  std::unique_ptr<Transformer> model;
  WeightFill fill;
  std::map<std::string, Parameter> shapes;
};

UpdateLeft update_left(const std::string& layer, const at::Tensor& base, const at::Tensor& merged, const at::Tensor& again) {
  const at::Tensor update = merged - base;
  const auto dot = [](const at::Tensor& a, const at::Tensor& b) { return at::sum(a * b, at::kDouble).item<double>(); };
  const double square = dot(update, update);
  if (square == 0) return {layer};
  return {layer, dot(again - base, update) / square, std::sqrt(dot(again - merged, again - merged) / square)};
}

// Weights that have no adapter keep their codes.
std::vector<UpdateLeft> export_requantized(const std::string& folder, const Config& config, const ModelSource& source, StoredTensors& tensors, uint64_t max_shard_bytes) {
  const QuantizedBase base(config, source, tensors.dtype());
  const QuantizedLayers layers(*base.model, frozen_base(config, source.config));
  std::map<std::string, UpdateLeft> left;
  const auto encode = [&](const TensorSource& tensor) {
    const auto& weight = dynamic_cast<const DequantizedWeight&>(*layers.weights().at(tensor.name));
    const std::string path = tensor.name.substr(0, tensor.name.rfind(".weight"));
    if (!tensors.is_adapted(tensor.name)) return base.leaves(path, weight);
    const at::Tensor merged = tensors.merged(tensor.name);
    const std::vector<at::Tensor> leaves = weight.encode(merged);
    if (!left.count(path)) {
      const at::Tensor again = at::empty_like(merged);
      weight.decode(leaves, again);
      left[path] = update_left(path, tensors.base(tensor.name), merged, again);
    }
    return leaves;
  };
  write_model(folder, layers.stored(tensors.sources(), tensors.dtype(), encode), tensors.dtype(), config, source, true, max_shard_bytes, layers.config(tensors.dtype()));
  layers.warn_of_rows();
  std::vector<UpdateLeft> all;
  for (const auto& [path, of_layer] : left) all.push_back(of_layer);
  return all;
}

}  // namespace

void export_model(const std::string& folder, const Chunks& model, const Config& config, const ModelSource& source,
                  const Communicator& world, const HoldWeight& hold) {
  at::NoGradGuard no_grad;
  const auto tensors = whole_tensors(parameters_of(model), world, hold);
  write_model(folder, tensors, model[0]->dtype(), config, source, world.rank() == 0, kMaxShardBytes);
}

void export_adapter(const std::string& folder, const Chunks& model, const Config& config, const ModelSource& source,
                    const Communicator& world, const HoldWeight& hold) {
  at::NoGradGuard no_grad;
  std::vector<TensorSource> tensors;
  InitialAdapters initial(config, source, model[0]->dtype());
  const bool writes = world.rank() == 0;
  for (const TensorSource& tensor : whole_tensors(only(parameters_of(model), true), world, hold)) tensors.push_back(initial.taken_off(tensor, writes));
  write_peft(folder, tensors, model[0]->dtype(), config, source, writes);
}

at::ScalarType exported_dtype(const Config& config, const ModelSource& source, const std::optional<Checkpoint>& checkpoint) {
  return checkpoint ? trained_dtype(*checkpoint) : weight_dtype(config, source);
}

std::vector<UpdateLeft> export_stored(const std::string& folder, const Config& config, const ModelSource& source,
                                      const std::optional<Checkpoint>& checkpoint, uint64_t max_shard_bytes) {
  at::NoGradGuard no_grad;
  StoredTensors tensors(config, source, checkpoint);
  if (tensors.adapters_alone()) write_peft(folder, tensors.sources(), tensors.dtype(), config, source, true);
  else if (!config.lora.requantize) write_model(folder, tensors.sources(), tensors.dtype(), config, source, true, max_shard_bytes);
  else return export_requantized(folder, config, source, tensors, max_shard_bytes);
  return {};
}

std::unique_ptr<Transformer> merged_model(const Config& config, const ModelSource& source, const std::optional<Checkpoint>& checkpoint, WeightFill& fill) {
  at::NoGradGuard no_grad;
  const auto tensors = std::make_shared<StoredTensors>(config, source, checkpoint);
  Config dense = config;
  dense.lora = {};
  dense.quant = {};
  if (!source.config.stored.empty()) dense.quant.base = "dense";
  auto model = build_model(dense, source, tensors->dtype(), false, at::kCPU, false, {}, &fill);
  fill = [tensors](const std::vector<Parameter>& parameters) {
    for (const Parameter& p : parameters) p.value.detach().copy_(tensors->merged(p.name));
  };
  return model;
}

}  // namespace trireme
