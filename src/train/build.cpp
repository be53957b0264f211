#include "train/build.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "base/check.h"
#include "base/hash.h"
#include "checkpoint/bitsandbytes.h"
#include "checkpoint/hf_hub.h"
#include "checkpoint/load_weights.h"
#include "checkpoint/peft.h"
#include "data/file_hash.h"
#include "data/token_file.h"
#include "model/frozen_base.h"
#include "model/initialize.h"
#include "parallel/tensor_parallel.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

// What else a folder without config.json may be.
std::string instead_of_model(const std::string& folder) {
  if (fs::is_empty(folder)) return " is empty; model.path wants a Hugging Face model folder";
  if (fs::exists(folder + "/adapter_config.json"))
    return " holds a PEFT adapter: set lora.path to it, and model.path to its base model";
  return str(" has no config.json; ", fs::exists(folder + "/model/config.json") ? str("the run's model is ", folder, "/model")
                                                                                : "model.path wants a Hugging Face model folder");
}

// ConfigError where a rank's slice of a layer in fewer bits would cut what is kept together.
void check_cut_of_base(Config c, const ModelConfig& model, int num_tensor) {
  if (frozen_base(c).none() && model.stored.empty()) return;
  c.lora = {};
  for (int part = 0; part < num_tensor; ++part) {
    std::unique_ptr<Transformer> shapes;
    try {
      shapes = model_shapes(c, model, at::kFloat, false);
    } catch (const Error&) {  // said elsewhere
      return;
    }
    keep_tensor_part(*shapes, part, num_tensor);
  }
}

}  // namespace

Mesh mesh_of(const Config& c, int num_ranks) {
  std::optional<ModelConfig> model;
  auto can_be_cut = [&, asked = false](int tensor, int stages) mutable {
    try {
      if (!std::exchange(asked, true)) model = find_model(c).config;
    } catch (const Error&) {  // said elsewhere
    }
    Config cut = c;
    cut.parallel.pipeline = stages;
    try {
      if (model) check_tensor_parallel(*model, tensor), stages_of(cut, *model);
      if (stages > 1) schedule_of(cut);
      if (model) check_cut_of_base(cut, *model, tensor);
    } catch (const ConfigError&) {
      return false;
    }
    return stages > 1 || c.parallel.virtual_stages <= 1;
  };
  return Mesh(num_ranks, static_cast<int>(c.parallel.data), static_cast<int>(c.parallel.tensor), static_cast<int>(c.parallel.pipeline),
              parse_mesh_order(c.parallel.order), can_be_cut);
}

PipelineSchedule schedule_of(const Config& c, int64_t micro_batches) {
  return make_pipeline_schedule(parse_pipeline_kind(c.parallel.schedule), static_cast<int>(c.parallel.pipeline),
                                static_cast<int>(c.parallel.virtual_stages), static_cast<int>(micro_batches > 0 ? micro_batches : c.train.accumulation));
}

Stages stages_of(const Config& c, const ModelConfig& model) {
  return make_stages(model, parse_pipeline_kind(c.parallel.schedule), static_cast<int>(c.parallel.pipeline),
                     static_cast<int>(c.parallel.virtual_stages));
}

void check_adapter(const std::string& path) {
  if (!path.empty() && !fs::exists(path + "/adapter_config.json"))
    throw DataError(str("lora.path=", path, " is no PEFT adapter: there is no adapter_config.json in it",
                        fs::exists(path + "/adapter/adapter_config.json") ? str("; the run's adapter is ", path, "/adapter") : ""));
}

ModelSource find_model(const Config& config) {
  ModelSource source;
  if (!config.model.path.empty()) {
    source.folder = resolve_model_folder(config.model.path, config.model.revision, {true, config.model.tokenizer.empty()});
    if (!fs::exists(source.folder + "/config.json"))
      throw DataError(str("model folder ", source.folder, instead_of_model(source.folder)));
    source.config = read_model_config(source.folder);
    if (!source.config.quantization.empty()) {
      const QuantizedFolder quantized(std::make_shared<SafetensorsFolder>(source.folder));
      quantized.check_config(source.config.quantization, source.config.raw["quantization_config"], source.config.source);
      source.config.stored = quantized.layers();
    }
    source.tokenizer_folder = source.folder;
    const bool is_folder = fs::is_directory(config.model.path);
    source.name = is_folder ? fs::absolute(config.model.path).lexically_normal().string() : config.model.path;
    if (!is_folder && config.model.revision != "main") source.revision = config.model.revision;
  } else {
    source.config = read_model_config(config.model.config);
    if (!source.config.quantization.empty())
      throw DataError(str(source.config.source, ": has a quantization_config, but model.config starts from random weights, which are in no file: take it out of the file, and set quant.base=",
                          source.config.quantization, " where it is meant"));
    fs::path path = config.model.config;
    source.tokenizer_folder = fs::is_directory(path) ? path.string() : path.has_parent_path() ? path.parent_path().string() : ".";
  }
  if (config.quant.base == "dense" && source.config.quantization.empty())
    throw ConfigError(str("quant.base=dense is set, but ", source.config.source, " has no quantization_config: the weights are dense already; leave quant.base out"));
  if (!config.model.tokenizer.empty()) source.tokenizer_folder = resolve_model_folder(config.model.tokenizer, "main", {false, true}, "model.tokenizer");
  check_adapter(config.lora.path);
  std::string of = source.folder.empty() ? "random" : source.folder;
  if (!config.lora.path.empty()) of += " and " + config.lora.path;
  source.identity["config.json"] = source.config.raw;
  source.identity["weights"] = {{"of", of}};
  return source;
}

std::string hash_of_weights(const Config& config, const ModelSource& source) {
  std::string text;
  for (const std::string& folder : {source.folder, config.lora.path}) {
    std::vector<fs::path> files;
    if (fs::is_directory(folder))
      for (const auto& entry : fs::directory_iterator(folder))
        if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    for (const auto& path : files)
      text += str("|", path.filename().string(), remembered_hash(path.string(), config.data.cache.empty() ? default_token_cache() : config.data.cache));
  }
  return hash_bytes(text);
}

at::ScalarType weight_dtype(const Config& config, const ModelSource& source) {
  if (config.model.dtype != "auto") return parse_dtype(config.model.dtype, "model.dtype");
  if (source.folder.empty() || source.config.dtype.empty()) return at::kFloat;
  return parse_dtype(source.config.dtype, source.config.source + ": dtype");
}

at::ScalarType train_dtype(const Config& config, const ModelSource& source) {
  if (config.train.dtype != "auto") return parse_dtype(config.train.dtype, "train.dtype");
  at::ScalarType dtype = weight_dtype(config, source);
  return dtype == at::kHalf && config.model.dtype == "auto" ? at::kBFloat16 : dtype;
}

OptimizerOptions optimizer_options(const Config& config, at::ScalarType dtype) {
  const auto& c = config.optim;
  if (!c.masters && dtype == at::kHalf)
    throw ConfigError("optim.masters=false is not possible with train.dtype=float16, whose range is too small for weights that are updated in it: set "
                      "train.dtype=bfloat16, or optim.masters=true");
  if (!c.masters && dtype != at::kBFloat16)
    throw ConfigError(str("optim.masters is set, but weights in ", dtype_name(dtype), " have no masters: set train.dtype=bfloat16, or leave optim.masters out"));
  const OptimizerKind kind = parse_optimizer_kind(c.kind);
  if (kind == OptimizerKind::kAdafactor && c.offload)
    throw ConfigError("optim.offload=true is not possible with optim.kind=adafactor, which has next to no state: leave it out");
  if (c.offload && c.paged)
    throw ConfigError("optim.offload=true and optim.paged=true are two places for the same state: set optim.paged=false and it is updated in host memory, or optim.offload=false "
                      "and only what does not fit a device waits there");
  if (kind == OptimizerKind::kAdamW8Bit && dtype == at::kDouble)
    throw ConfigError("optim.kind=adamw8bit is not possible with train.dtype=float64: set train.dtype=float32, or optim.kind=adamw");
  return {kind, c.beta1, c.beta2, c.epsilon, c.momentum, c.offload, c.masters, static_cast<uint64_t>(config.run.seed), c.paged};
}

LoraConfig lora_config(const Config& config) {
  LoraConfig lora;
  if (!config.lora.path.empty()) {
    PeftConfig peft = read_peft_config(config.lora.path);
    lora = {peft.rank, peft.alpha, peft.dropout, peft.use_rslora,
            adapter_modules(SafetensorsFolder(config.lora.path, "adapter_model").names())};
    lora.dora = peft.use_dora;
    if (lora.targets.empty()) throw DataError(str(config.lora.path, ": the adapter has no lora_A tensors"));
    return lora;
  }
  lora.rank = config.lora.rank;
  lora.alpha = config.lora.alpha > 0 ? config.lora.alpha : static_cast<double>(config.lora.rank);
  lora.dropout = config.lora.dropout;
  lora.rank_stabilized = config.lora.rslora;
  lora.targets = config.lora.targets;
  lora.dora = config.lora.dora;
  lora.set_init(config.lora.init);
  lora.loftq_iterations = config.lora.loftq_iterations;
  return lora;
}

ModelCut forward_cut(const ModelConfig& model, const MeshComms& comms) {
  check_tensor_parallel(model, comms.tensor.size());
  return [&comms, stages = make_stages(model, PipelineKind::k1F1B, comms.pipeline.size(), 1)](Transformer& whole) {
    keep_chunk(whole, stages, comms.pipeline.rank());
    apply_tensor_parallel(whole, comms.tensor);
    join_stages(whole, comms.pipeline);
  };
}

FrozenBase frozen_base(const Config& config) {
  FrozenBase base;
  if (config.quant.base != "dense") base.kind = config.quant.base;
  if (config.quant.block_size > 0) base.block_size = config.quant.block_size;
  if (config.quant.double_quant != "auto") base.is_double = config.quant.double_quant == "true";
  if (config.quant.threshold >= 0) base.threshold = config.quant.threshold;
  base.skipped = config.quant.skip;
  if (config.quant.compute_dtype != "auto") base.compute = parse_dtype(config.quant.compute_dtype, "quant.compute_dtype");
  return base;
}

FrozenBase frozen_base(const Config& config, const ModelConfig& model) {
  FrozenBase base = frozen_base(config);
  if (config.quant.base != "dense") base.stored = model.stored;
  if (base.stored.empty() || model.quantization != "int8") return base;
  const std::string where = model.source + ": quantization_config";
  const auto threshold = json_get_or<double>(model.raw["quantization_config"], "llm_int8_threshold", base.threshold, where);
  if (!(threshold >= 0)) throw DataError(str(where, ": llm_int8_threshold ", threshold, " is negative"));
  if (config.quant.threshold < 0) base.threshold = threshold;
  return base;
}

std::string quantized_base(const Config& config, const ModelConfig& model) {
  const FrozenBase base = frozen_base(config, model);
  const StoredFormat format = base.stored.empty() ? StoredFormat{base.kind, base.blocks(), base.has_double()} : base.stored.begin()->second;
  if (format.kind == "none" || format.kind == "fp8") return "";
  std::string text = format.kind;
  if (format.kind != "int8") text += str(", blocks of ", format.block_size, ", scales in ", format.is_double ? "8 bits" : "32 bits");
  return text + (base.skipped.empty() ? "" : str(", without ", joined(base.skipped)));
}

bool is_adapter(const Parameter& p) { return p.name.find(".lora_") != std::string::npos; }

std::vector<Parameter> parameters_of(const Chunks& chunks) {
  std::vector<Parameter> all;
  std::set<std::string> names;
  for (const auto& chunk : chunks)
    for (Parameter& p : chunk->parameters())
      if (names.insert(p.name).second) all.push_back(std::move(p));
  return all;
}

std::unique_ptr<Transformer> model_shapes(const Config& config, const ModelConfig& shape, at::ScalarType dtype, bool attach) {
  const auto seed = static_cast<uint64_t>(config.run.seed);
  at::NoGradGuard no_grad;
  auto model = std::make_unique<Transformer>(shape, dtype, seed, Weights::kUninitialized, at::kMeta);
  const FrozenBase base = frozen_base(config, shape);
  if (!base.stored.empty() && shape.quantization == "int8" && dtype == at::kDouble)
    throw ConfigError(str(shape.source, ": the weights are stored in int8, which goes with float32 or 16 bits, but the dtype is float64: set another, or quant.base=dense"));
  if (base.kind == "int8" && dtype == at::kDouble) throw ConfigError("quant.base=int8 goes with float32 or 16 bits, but the dtype is float64: set another, or leave quant.base out");
  if (attach && !base.stored.empty() && config.lora.rank == 0 && config.lora.path.empty())
    throw ConfigError(str(shape.source, ": the weights are stored in ", shape.quantization, ", which stays as it is, and nothing would be trained: set lora.rank, or quant.base=dense to train the values that they stand for"));
  if (attach && !base.stored.empty() && config.lora.init != "random")
    throw ConfigError(str("lora.init=", config.lora.init, " begins with the weights, but those of ", shape.source, " are stored in ", shape.quantization,
                          ", which stays as it is: set lora.init=random, or quant.base=dense with lora.init=pissa"));
  if (config.model.embedding == "host") {
    if (shape.tie_embeddings)
      throw ConfigError(str("model.embedding=host saves nothing with ", shape.source, ", whose output layer is the same table and computes with it (tie_word_embeddings): leave model.embedding out"));
    if (attach && config.lora.rank == 0 && config.lora.path.empty())
      throw ConfigError("model.embedding=host keeps a table that is not trained, but all weights are trained: set lora.rank, or leave model.embedding out");
    model->keep_embedding_on_host();
  }
  freeze_base(*model, base);  // the adapters are not part of it
  if (!config.lora.path.empty()) {
    LoraConfig lora = lora_config(config);
    std::set<std::string> paths;
    for (Linear* l : model->linears()) paths.insert(l->path);
    for (const auto& target : lora.targets)
      if (!paths.count(target))
        throw DataError(str(config.lora.path, ": the adapter changes ", target, ", which is no linear layer of a block of ",
                            shape.source, "; Trireme has adapters on those only"));
    if (lora.dora && config.quant.base == "fp8") throw ConfigError(str("lora.path=", config.lora.path, ": its magnitudes (use_dora) are not possible with quant.base=fp8: set another quant.base"));
    attach_lora(*model, lora, seed);
  } else if (attach && config.lora.rank > 0) {
    attach_lora(*model, lora_config(config), seed);
  }
  return model;
}

std::unique_ptr<Transformer> build_model(const Config& config, const ModelSource& source, at::ScalarType dtype, bool attach,
                                         at::Device device, bool shapes_only, const ModelCut& cut, WeightFill* fill) {
  const auto seed = static_cast<uint64_t>(config.run.seed);
  at::NoGradGuard no_grad;
  auto model = model_shapes(config, source.config, dtype, attach);
  const FrozenLayers frozen(*model, config.lora.path.empty() && has_lora(*model) ? lora_config(config) : LoraConfig());
  std::set<std::string> whole;  // what files have of the model
  for (const auto& p : model->parameters())
    if (!frozen.holds(p.name)) whole.insert(p.name);
    else for (const Parameter& weight : frozen.made_of({p})) whole.insert(weight.name);
  if (cut) cut(*model);
  using Stored = std::shared_ptr<const SafetensorsFolder>;  // opened once, whoever reads how often; null: random values
  const Stored base = source.folder.empty() ? nullptr : std::make_shared<SafetensorsFolder>(source.folder);
  if (base && source.config.quantization.empty()) check_not_quantized(*base, source.config.source);
  const Stored adapter = config.lora.path.empty() ? nullptr : std::make_shared<SafetensorsFolder>(config.lora.path, adapter_options().stem);
  const auto quantized = source.config.stored.empty() ? nullptr : std::make_shared<QuantizedFolder>(base);
  for (const auto& [path, format] : source.config.stored)
    if (!whole.count(path + ".weight")) throw DataError(str(source.folder, ": ", path, " is stored in ", format.kind, ", but the model that config.json describes has no such layer."));
  const auto load = [base, quantized, adapter, frozen, dtype, seed, range = source.config.initializer_range](const std::vector<Parameter>& parameters, const std::set<std::string>* names_to_check) {
    at::NoGradGuard no_grad;
    const auto read = [&](const std::vector<Parameter>& targets, bool adapters) {
      LoadOptions options = adapters ? adapter_options() : LoadOptions();
      options.headers_only = names_to_check != nullptr, options.partial = !names_to_check;
      options.elsewhere = [&](const std::string& name) { return names_to_check->count(name) != 0 || (quantized && quantized->owns(name)); };
      if (const Stored& stored = adapters ? adapter : base) load_weights(*stored, targets, options);
      else if (!names_to_check) for (const auto& p : targets) fill_initial(p, seed, range);
    };
    const auto is_quantized = [&](const Parameter& p) { return quantized && quantized->holds(p.name); };
    const auto leaves_of = [&](const std::string& weight) { return quantized && quantized->holds(weight) ? quantized->leaves(weight) : std::vector<at::Tensor>(); };
    std::vector<Parameter> dense, dequantized, adapters, encoded;
    for (const Parameter& p : parameters) (frozen.holds(p.name) ? encoded : is_adapter(p) ? adapters : is_quantized(p) ? dequantized : dense).push_back(p);
    if (names_to_check) {
      for (Parameter& whole : frozen.made_of(encoded)) (is_quantized(whole) ? dequantized : dense).push_back(std::move(whole));
      for (const Parameter& p : dequantized) quantized->check_shape(p);
    } else {
      frozen.fill(encoded, [&](const Parameter& whole) { is_quantized(whole) ? quantized->load(whole) : read({whole}, false); }, leaves_of);
      for (const Parameter& p : dequantized) quantized->load(p);
    }
    read(dense, false);
    read(adapters, true);
  };
  load(model->parameters(), &whole);
  const WeightFill fill_now = [load](const std::vector<Parameter>& parameters) { load(parameters, nullptr); };
  if (fill) *fill = fill_now;
  if (!shapes_only) model->materialize(device, seed, fill ? std::function<bool(const std::string&)>() : [](const std::string&) { return false; });
  if (!shapes_only && !fill) fill_now(model->parameters());
  return model;
}

}  // namespace trireme
