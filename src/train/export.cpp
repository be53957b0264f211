#include "train/export.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/check.h"
#include "checkpoint/export_folder.h"
#include "checkpoint/peft.h"
#include "ops/dequantized_weight.h"
#include "parallel/gather.h"
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
                 const ModelSource& source, bool writes, uint64_t max_shard_bytes) {
  const std::string dtype = dtype_name(type);
  Json json = source.folder.empty() ? model_config_from_fields(source.config, dtype) : model_config_to_json(source.config, dtype);
  // A run from random weights writes the Hub's fields it was given too: tokenizer ids, architectures and the like.
  if (source.folder.empty())
    for (const auto& [key, value] : source.config.raw.items())
      if (!json.contains(key)) json[key] = value;
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
  write_adapter(folder, peft_config_to_json(peft), tensors, writes);
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

void export_stored(const std::string& folder, const Config& config, const ModelSource& source,
                   const std::optional<Checkpoint>& checkpoint, uint64_t max_shard_bytes) {
  const at::ScalarType dtype = exported_dtype(config, source, checkpoint);
  WeightFill fill;
  Config stored = config;
  stored.quant.base = "dense";
  stored.lora.init = "random";
  const auto shapes = build_model(stored, source, dtype, checkpoint.has_value(), at::kCPU, true, {}, &fill);
  auto of_adapter = [](const auto& tensor) { return is_adapter({tensor.first, {}, {}}); };
  if (checkpoint && !has_lora(*shapes) && std::any_of(checkpoint->tensors().begin(), checkpoint->tensors().end(), of_adapter))
    throw ConfigError(str("the checkpoint ", checkpoint->folder(), " holds adapters, but lora.rank is 0: name the run's config.ini, ",
                          "as in trireme export RUN/config.ini --run.resume=", checkpoint->folder(), " --run.dir=OUT"));
  // A checkpoint holds what was trained: all weights, or the adapters.
  auto stored_as = [](const Parameter& p, const at::Tensor& value) { return NamedTensor{"model/" + p.name, value, p.shard}; };
  std::vector<NamedTensor> trained;
  std::map<std::string, Parameter> by_name;
  for (const Parameter& p : shapes->parameters()) {
    by_name[p.name] = p;
    if (p.value.requires_grad()) trained.push_back(stored_as(p, p.value.detach()));
  }
  if (checkpoint) checkpoint->check(trained, true);
  auto read = [&](const Parameter& p) {
    const bool wide = source.config.stored.count(p.name.substr(0, p.name.rfind(".weight"))) != 0 && p.value.scalar_type() != at::kDouble;
    const at::Tensor value = at::empty(p.value.sizes(), wide ? at::kFloat : p.value.scalar_type());
    if (checkpoint && p.value.requires_grad()) checkpoint->load({stored_as(p, value)}, true);
    else fill({{p.name, value, p.shard}});
    return value;
  };
  // What a base in 4 or 8 bits stands for is what was trained beside; float8 is how products are made, of the weights as they are stored.
  std::map<std::string, std::shared_ptr<FrozenWeight>> quantized;
  const auto frozen = config.quant.base == "none" ? nullptr : model_shapes(config, source.config, dtype, false);
  for (const Linear* l : frozen ? frozen->linears() : std::vector<Linear*>())
    if (dynamic_cast<const DequantizedWeight*>(l->frozen.get()) && !source.config.stored.count(l->path)) quantized[l->path + ".weight"] = l->frozen;
  std::map<std::string, const Linear*> adapted;
  for (const Linear* l : shapes->linears())
    if (l->lora) adapted[l->path + ".weight"] = l;

  const bool adapters = !adapted.empty() && !config.lora.merge;
  std::vector<TensorSource> tensors;
  InitialAdapters initial(config, source, dtype);
  for (const Parameter& p : only(shapes->parameters(), adapters)) {
    tensors.push_back({p.name, dtype, p.value.sizes().vec(), [&, p] {
                         at::Tensor value = read(p);
                         if (auto q = quantized.find(p.name); q != quantized.end()) value = value_of(*q->second, value);
                         if (auto l = adapted.find(p.name); l != adapted.end()) {
                           const std::string name = "base_model.model." + l->second->path;
                           if (const at::Tensor base = initial.base_of(l->second->path, value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat); base.defined()) value = base;
                           const auto adapter = [&](const char* suffix) {
                             const auto p = by_name.find(name + suffix);
                             return p == by_name.end() ? at::Tensor() : read(p->second);
                           };
                           merge_lora(value, {adapter(".lora_A.weight"), adapter(".lora_B.weight"), adapter(".lora_magnitude_vector"), l->second->lora->scale});
                         }
                         return value;
                       }});
    if (adapters) tensors.back() = initial.taken_off(tensors.back(), true);
  }
  if (adapters) write_peft(folder, tensors, dtype, config, source, true);
  else write_model(folder, tensors, dtype, config, source, true, max_shard_bytes);
}

}  // namespace trireme
