#include "train/build.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>

#include "base/check.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/log.h"
#include "checkpoint/hf_hub.h"
#include "checkpoint/load_weights.h"
#include "checkpoint/peft.h"
#include "data/file_hash.h"
#include "data/masking.h"
#include "data/records.h"
#include "model/initialize.h"
#include "optim/schedule.h"
#include "parallel/tensor_parallel.h"
#include "tasks/task.h"
#include "train/run_folder.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

void check_adapter(const std::string& path) {
  if (!path.empty() && !fs::exists(path + "/adapter_config.json"))
    throw DataError(str("lora.path=", path, " is no PEFT adapter: there is no adapter_config.json in it",
                        fs::exists(path + "/adapter/adapter_config.json") ? str("; the run's adapter is ", path, "/adapter") : ""));
}

// What else a folder without config.json may be.
std::string instead_of_model(const std::string& folder) {
  if (fs::is_empty(folder)) return " is empty; model.path wants a Hugging Face model folder";
  if (fs::exists(folder + "/adapter_config.json"))
    return " holds a PEFT adapter: set lora.path to it, and model.path to its base model";
  return str(" has no config.json; ", fs::exists(folder + "/model/config.json") ? str("the run's model is ", folder, "/model")
                                                                                : "model.path wants a Hugging Face model folder");
}

// The product of a run, model/ or adapter/, never replaces what the run begins with.
void check_product(const Config& c, const std::string& run_dir, std::vector<std::string>& problems) {
  std::error_code none;
  for (const auto& [key, begin, product] : {std::tuple("model.path", c.model.path, "model"), {"lora.path", c.lora.path, "adapter"}})
    if (!begin.empty() && fs::equivalent(begin, fs::path(run_dir) / product, none))
      problems.push_back(str("run.dir=", run_dir, ": the run would write ", product, "/ over ", key, "=", begin, "; set another run.dir"));
}

}  // namespace

void find_conflicts(const Config& c, const CommandLine& line, int num_ranks, std::vector<std::string>& problems) {
  auto wrong = [&](const auto&... parts) { problems.push_back(str(parts...)); };
  const bool complete = problems.empty();  // else what seems missing may be what was misspelt
  if (c.model.path.empty() == c.model.config.empty() && (complete || !c.model.path.empty()))
    wrong(c.model.path.empty() ? "neither model.path nor model.config is set" : "model.path and model.config are both set",
          ": set model.path to a Hugging Face folder, or model.config to a config.json for random weights",
          line.verb == "prepare" || line.verb == "tokenize" ? ", or model.tokenizer to a folder with a tokenizer.json" : "");
  const std::string& resume = c.run.resume;
  // A checkpoint that is gone may be where a run began that goes on from its own.
  if (resume != "auto" && resume != "never" && !fs::is_directory(resume) && !fs::path(resume).filename().string().starts_with("step-"))
    wrong("run.resume=", resume, " is ", fs::exists(resume) ? "no folder" : "not there", ": allowed are auto, never, and the folder of a "
          "checkpoint, RUN/checkpoints/step-N");
  bool trains = line.verb == "train" || line.verb == "plan";
  if (trains) {
    check_product(c, c.run.dir.empty() ? default_run_dir(line.config_file) : c.run.dir, problems);
    const bool has_data = line.verb != "plan" || !c.data.train.empty();  // a plan does without
    if (complete && c.data.train.empty() && has_data) wrong("data.train is not set: name one or more .jsonl, .json or .txt files");
    if ((c.train.steps > 0) == (c.train.epochs > 0) && ((complete && has_data) || c.train.steps > 0))
      wrong(c.train.steps > 0 ? "train.steps and train.epochs are both set; set one"
                              : "the length of the run is not set: set train.steps or train.epochs");
    const Config d;  // values count, not what was written: the resolved configuration of a run names every key
    const std::pair<const char*, bool> lora_keys[] = {{"lora.alpha", c.lora.alpha != d.lora.alpha},
                                                      {"lora.dropout", c.lora.dropout != d.lora.dropout},
                                                      {"lora.targets", c.lora.targets != d.lora.targets},
                                                      {"lora.rslora", c.lora.rslora != d.lora.rslora}};
    for (const auto& [key, is_set] : lora_keys)
      if (is_set && !c.lora.path.empty())
        wrong(key, " and lora.path are both set: the adapter of lora.path brings its own; leave ", key, " out");
      else if (is_set && c.lora.rank == 0)
        wrong(key, " is set, but lora.rank is 0: set lora.rank, or leave ", key, " out");
    if (c.lora.rank > 0 && !c.lora.path.empty()) wrong("lora.rank and lora.path are both set: the adapter of lora.path has a rank; set one");
    if (complete && c.eval.patience > 0 && c.eval.every == 0) wrong("eval.patience needs eval.every");
    if (complete && c.eval.every > 0 && c.data.eval.empty() && c.data.eval_fraction == 0)
      wrong("eval.every is set, but there is nothing to evaluate: set data.eval or data.eval_fraction");
    for (const auto& [key, every] : {std::pair("eval.every", c.eval.every), {"checkpoint.every", c.checkpoint.every}})
      if (every >= 1 && every != std::floor(every))
        wrong(key, "=", every, ": a whole number of steps is expected, or a fraction of the run below 1");
    auto check = [&](const auto& part) {
      try {
        part();
      } catch (const ConfigError& error) {
        wrong(error.what());
      }
    };
    check([&] {
      Schedule(parse_schedule_kind(c.schedule.kind), c.optim.lr, c.train.steps > 0 ? c.train.steps : int64_t{1} << 50,
               c.schedule.warmup_steps, c.schedule.min_lr);  // of epochs the number of steps is not known yet
    });
    if (c.parallel.pipeline > 1) {
      check([&] { schedule_of(c); });
      if (c.parallel.reduce != "step") wrong("parallel.reduce=", c.parallel.reduce, " is not possible with parallel.pipeline=", c.parallel.pipeline);
    } else if (c.parallel.virtual_stages > 1) {
      wrong("parallel.virtual_stages=", c.parallel.virtual_stages, " needs parallel.pipeline of 2 or more");
    }
    if (c.parallel.reduce != "step" && c.parallel.zero < 2)
      wrong("parallel.reduce=", c.parallel.reduce, " needs parallel.zero=2 or 3: other ranks' sums would have nowhere to add up");
    check([&] { (void)make_task(c.task.kind)->larger_is_better(c.eval.metric); });
    check([&] {
      const Mesh mesh = mesh_of(c, num_ranks);
      const int64_t within = c.parallel.shard_within;
      if (within > 0 && (c.parallel.zero == 0 || mesh.num_data() % within != 0))
        throw ConfigError(str("parallel.shard_within=", within, c.parallel.zero == 0 ? " needs parallel.zero=1, 2 or 3" : str(" does not divide the ",
                              mesh.num_data(), " copies of the model: use a divisor of that, or 0: all share out")));
    });
  }
  if (!c.data.eval.empty() && c.data.eval_fraction > 0) wrong("data.eval and data.eval_fraction are both set; set one");
}

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

void check_config(const Config& config, const CommandLine& line) {
  std::vector<std::string> problems;
  find_conflicts(config, line, 1, problems);
  if (!problems.empty()) throw ConfigError(joined(problems, "\n"));
}

void find_missing(const Config& c, const CommandLine& line, std::vector<std::string>& problems) {
  bool only_files = problems.empty();
  auto check = [&](const auto& open) {
    try {
      open();
    } catch (const Error& error) {
      problems.push_back(error.what());
      only_files = only_files && error.status() == kExitData;
    }
  };
  if (!c.model.path.empty()) check([&] { resolve_model_folder(c.model.path, c.model.revision, {true, c.model.tokenizer.empty()}); });
  if (!c.model.config.empty()) check([&] { read_model_config(c.model.config); });
  if (!c.model.tokenizer.empty()) check([&] { resolve_model_folder(c.model.tokenizer, "main", {false, true}); });
  check([&] { check_adapter(c.lora.path); });
  if (!c.data.chat_template.empty()) check([&] { ChatTemplate::find(c.data.chat_template, ""); });
  const std::string folder = c.run.dir.empty() ? default_run_dir(line.config_file) : c.run.dir;
  const bool plans_elsewhere = line.verb == "plan" && c.plan.ranks > 0, finished = fs::exists(folder + "/finished.json");
  if (!plans_elsewhere && (line.verb == "plan" || line.dry_run || !finished))  // a finished run needs no data
    for (const auto& [key, files] : {std::pair("data.train", &c.data.train), {"data.eval", &c.data.eval}})
      for (const std::string& file : *files)
        check([&] { RecordReader(parse_data_file(file, key, files->size())); });
  if (only_files && !problems.empty()) throw DataError(joined(problems, "\n"));
}

ModelSource find_model(const Config& config) {
  ModelSource source;
  if (!config.model.path.empty()) {
    source.folder = resolve_model_folder(config.model.path, config.model.revision, {true, config.model.tokenizer.empty()});
    if (!fs::exists(source.folder + "/config.json"))
      throw DataError(str("model folder ", source.folder, instead_of_model(source.folder)));
    source.config = read_model_config(source.folder);
    source.tokenizer_folder = source.folder;
    const bool is_folder = fs::is_directory(config.model.path);
    source.name = is_folder ? fs::absolute(config.model.path).lexically_normal().string() : config.model.path;
    if (!is_folder && config.model.revision != "main") source.revision = config.model.revision;
  } else {
    source.config = read_model_config(config.model.config);
    fs::path path = config.model.config;
    source.tokenizer_folder = fs::is_directory(path) ? path.string() : path.has_parent_path() ? path.parent_path().string() : ".";
  }
  if (!config.model.tokenizer.empty()) source.tokenizer_folder = resolve_model_folder(config.model.tokenizer, "main", {false, true});
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

LoraConfig lora_config(const Config& config) {
  LoraConfig lora;
  if (!config.lora.path.empty()) {
    PeftConfig peft = read_peft_config(config.lora.path);
    lora = {peft.rank, peft.alpha, peft.dropout, peft.use_rslora,
            adapter_modules(SafetensorsFolder(config.lora.path, "adapter_model").names())};
    if (lora.targets.empty()) throw DataError(str(config.lora.path, ": the adapter has no lora_A tensors"));
    return lora;
  }
  lora.rank = config.lora.rank;
  lora.alpha = config.lora.alpha > 0 ? config.lora.alpha : static_cast<double>(config.lora.rank);
  lora.dropout = config.lora.dropout;
  lora.rank_stabilized = config.lora.rslora;
  lora.targets = config.lora.targets;
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
  if (!config.lora.path.empty()) {
    LoraConfig lora = lora_config(config);
    std::set<std::string> paths;
    for (Linear* l : model->linears()) paths.insert(l->path);
    for (const auto& target : lora.targets)
      if (!paths.count(target))
        throw DataError(str(config.lora.path, ": the adapter changes ", target, ", which is no linear layer of a block of ",
                            shape.source, "; Trireme has adapters on those only"));
    attach_lora(*model, lora, seed);
  } else if (attach && config.lora.rank > 0) {
    attach_lora(*model, lora_config(config), seed);
  }
  return model;
}

std::unique_ptr<Transformer> build_model(const Config& config, const ModelSource& source, at::ScalarType dtype, bool attach,
                                         bool shapes_only, const ModelCut& cut, WeightFill* fill) {
  const auto seed = static_cast<uint64_t>(config.run.seed);
  at::NoGradGuard no_grad;
  auto model = model_shapes(config, source.config, dtype, attach);
  std::set<std::string> whole;
  for (const auto& p : model->parameters()) whole.insert(p.name);
  if (cut) cut(*model);
  using Stored = std::shared_ptr<const SafetensorsFolder>;  // opened once, whoever reads how often; null: random values
  const Stored base = source.folder.empty() ? nullptr : std::make_shared<SafetensorsFolder>(source.folder);
  const Stored adapter = config.lora.path.empty() ? nullptr : std::make_shared<SafetensorsFolder>(config.lora.path, adapter_options().stem);
  const auto load = [base, adapter, seed, range = source.config.initializer_range](const std::vector<Parameter>& parameters,
                                                                                   const std::set<std::string>* names_to_check) {
    at::NoGradGuard no_grad;
    for (const bool adapters : {false, true}) {
      std::vector<Parameter> targets = parameters;
      std::erase_if(targets, [&](const Parameter& p) { return is_adapter(p) != adapters; });
      LoadOptions options = adapters ? adapter_options() : LoadOptions();
      options.headers_only = names_to_check != nullptr, options.partial = !names_to_check;
      options.elsewhere = [&](const std::string& name) { return names_to_check->count(name) != 0; };
      if (const Stored& stored = adapters ? adapter : base) load_weights(*stored, targets, options);
      else if (!names_to_check) for (const auto& p : targets) fill_initial(p, seed, range);
    }
  };
  load(model->parameters(), &whole);
  const WeightFill fill_now = [load](const std::vector<Parameter>& parameters) { load(parameters, nullptr); };
  if (fill) *fill = fill_now;
  if (!shapes_only) model->materialize(at::kCPU, seed, fill ? std::function<bool(const std::string&)>() : [](const std::string&) { return false; });
  if (!shapes_only && !fill) fill_now(model->parameters());
  return model;
}

TextTools load_text_tools(const Config& config, const std::string& folder, const ModelConfig* model) {
  if (folder.empty()) throw ConfigError("no tokenizer: set model.tokenizer to a folder that holds tokenizer.json");
  TextTools tools{Tokenizer::load(folder), ChatTemplate::find(config.data.chat_template, folder)};
  if (model && tools.tokenizer.vocab_size() > model->vocab_size)
    throw DataError(str(tools.tokenizer.source(), ": the vocabulary has ", tools.tokenizer.vocab_size(),
                        " ids, but the embedding of the model (", model->source, ") has vocab_size ", model->vocab_size,
                        "; use the model's own tokenizer"));
  // The end token: tokenizer_config.json names it; else the model's config.json has its id.
  auto named = [&](const char* key) -> int64_t {
    std::string path = folder + "/tokenizer_config.json";
    if (!fs::exists(path)) return -1;
    Json json = read_json_file(path);
    if (!json.is_object() || !json.contains(key)) return -1;
    const Json& token = json[key].is_object() && json[key].contains("content") ? json[key]["content"] : json[key];
    if (!token.is_string()) return -1;
    return tools.tokenizer.token_to_id(token.get<std::string>()).value_or(-1);
  };
  // The id under `key` of the config.json beside the tokenizer, for verbs that have no model.
  auto configured = [&](const char* key) -> int64_t {
    std::string path = folder + "/config.json";
    Json json = !model && fs::exists(path) ? read_json_file(path) : Json();
    Json id = json.is_object() ? json.value(key, Json()) : Json();
    if (id.is_array() && !id.empty()) id = Json(id[0]);
    return id.is_number_integer() ? id.get<int64_t>() : -1;
  };
  tools.bos_id = named("bos_token");
  tools.eos_id = named("eos_token");
  if (tools.eos_id < 0) tools.eos_id = model && !model->eos_ids.empty() ? model->eos_ids.front() : configured("eos_token_id");
  if (tools.bos_id < 0) tools.bos_id = model && model->bos_id ? *model->bos_id : configured("bos_token_id");
  if (tools.eos_id < 0)
    for (const char* usual : {"<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>"})
      if (tools.eos_id < 0) tools.eos_id = tools.tokenizer.token_to_id(usual).value_or(-1);
  if (tools.chat) tools.chat->complete(tools.tokenizer, tools.bos_id, tools.eos_id);
  return tools;
}

std::optional<int64_t> end_of_turn(const Config& config, const TextTools& tools) {
  if (!tools.chat) return std::nullopt;
  EncodeOptions options;
  options.bos_id = tools.bos_id, options.eos_id = tools.eos_id, options.template_args = config.data.template_args;
  Record record;
  record.form = DataForm::kPromptCompletion;
  record.prompt = record.completion = "a";
  try {
    EncodedRecord turn = RecordEncoder(tools.tokenizer, &*tools.chat, options).encode(record, "the chat template");
    auto last = std::find(turn.learnt.rbegin(), turn.learnt.rend(), uint8_t{1});
    return turn.ids[static_cast<size_t>(turn.learnt.rend() - last) - 1];
  } catch (const DataError&) {  // a template of another purpose
    return std::nullopt;
  }
}

DataOptions data_options(const Config& config, const TextTools& tools, int64_t embedding_rows) {
  DataOptions options;
  const auto& d = config.data;
  options.train = d.train, options.eval = d.eval, options.eval_fraction = d.eval_fraction;
  options.format = d.format, options.learn = config.task.kind == "pretrain" ? "all" : d.learn;
  options.prompt_field = d.prompt_field, options.completion_field = d.completion_field, options.text_field = d.text_field;
  options.max_length = d.max_length, options.truncation = d.truncation, options.packing = d.packing;
  options.shuffle = d.shuffle, options.template_args = d.template_args, options.cache = d.cache;
  options.separator = d.separator, options.on_error = d.on_error;
  options.seed = static_cast<uint64_t>(config.run.seed);
  options.bos_id = tools.bos_id, options.eos_id = tools.eos_id;
  options.embedding_rows = embedding_rows;
  return options;
}

}  // namespace trireme
