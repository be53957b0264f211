#include "checkpoint/peft.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace trireme {
namespace {

// Keys whose value does not change what an adapter computes once it is trained.
constexpr const char* kHarmless[] = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
};

constexpr char kBase[] = "trireme.base";

bool is_unset(const Json& value) {
  return value.is_null() || value == false || ((value.is_object() || value.is_array()) && value.empty());
}

// Initialisations that change the base model: with the unchanged base, the adapter alone computes something else.
bool changes_base(const Json& value) {
  if (!value.is_string()) return false;
  std::string text = value.get<std::string>();
  for (const char* safe : {"gaussian", "eva", "orthogonal"})
    if (text == safe) return false;
  return true;
}

double number(const Json& json, const char* key, double fallback, const std::string& source) {
  auto found = json.find(key);
  if (found == json.end()) return fallback;
  if (!found->is_number())
    throw DataError(str(source, ": '", key, "' is ", dump_json(*found), ", which is not a number."));
  return found->get<double>();
}

}  // namespace

Json peft_config_to_json(const PeftConfig& config) {
  Json targets = config.targets_are_text ? Json(config.target_modules.at(0)) : Json(config.target_modules);
  auto or_null = [](const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); };
  // PEFT's lora_alpha is a whole number wherever it is one.
  Json alpha = config.alpha == std::floor(config.alpha) ? Json(static_cast<int64_t>(config.alpha)) : Json(config.alpha);
  // The classic keys only: older versions of PEFT stop at a key that they do not know.
  return {{"alpha_pattern", Json::object()}, {"auto_mapping", nullptr},
          {"base_model_name_or_path", or_null(config.base_model)}, {"bias", "none"},
          {"fan_in_fan_out", false},         {"inference_mode", true},
          {"init_lora_weights", true},       {"layers_pattern", nullptr},
          {"layers_to_transform", nullptr},  {"lora_alpha", alpha},
          {"lora_dropout", config.dropout},  {"modules_to_save", nullptr},
          {"peft_type", "LORA"},             {"r", config.rank},
          {"rank_pattern", Json::object()},  {"revision", or_null(config.revision)},
          {"target_modules", targets},       {"task_type", "CAUSAL_LM"},
          {"use_dora", config.use_dora},               {"use_rslora", config.use_rslora}};
}

PeftConfig peft_config_from_json(const Json& json, const std::string& source) {
  if (!json.is_object()) throw DataError(str(source, " is not an object."));
  auto get = [&](const char* key) { return json.contains(key) ? json[key] : Json(nullptr); };
  if (get("peft_type") != "LORA")
    throw DataError(str(source, ": 'peft_type' is ", dump_json(get("peft_type")), "; only \"LORA\" is supported."));
  for (const auto& [key, value] : json.items()) {
    bool harmless = std::find(std::begin(kHarmless), std::end(kHarmless), key) != std::end(kHarmless);
    if (harmless || is_unset(value) || (key == "bias" && value == "none")) continue;
    throw DataError(str(source, ": '", key, "' is ", dump_json(value),
                        ", which is not supported. Retrain the adapter without it, ",
                        "or merge it into its base model with PEFT (merge_and_unload)."));
  }
  if (changes_base(get("init_lora_weights")))
    throw DataError(str(
        source, ": 'init_lora_weights' is ", dump_json(json["init_lora_weights"]), ", which changed the base model ",
        "too. Convert the adapter with PEFT (save_pretrained with path_initial_model_for_weight_conversion)."));

  PeftConfig config;
  double rank = number(json, "r", 8, source);
  if (rank != std::floor(rank) || rank < 1 || rank > 65536)
    throw DataError(str(source, ": 'r' is ", rank, "; a whole number from 1 to 65536 is needed."));
  config.rank = static_cast<int64_t>(rank);
  config.alpha = number(json, "lora_alpha", 8, source);
  config.dropout = number(json, "lora_dropout", 0, source);
  if (!(config.dropout >= 0 && config.dropout < 1))
    throw DataError(str(source, ": 'lora_dropout' is ", config.dropout, "; from 0 to below 1 is allowed."));
  config.use_rslora = get("use_rslora") == true;
  config.use_dora = get("use_dora") == true;
  Json targets = get("target_modules"), base = get("base_model_name_or_path");
  if (targets.is_string()) {
    config.target_modules = {targets.get<std::string>()};
    config.targets_are_text = true;
  } else if (targets.is_array() && !targets.empty() &&
             std::all_of(targets.begin(), targets.end(), [](const Json& item) { return item.is_string(); })) {
    config.target_modules = targets.get<std::vector<std::string>>();
  } else {
    throw DataError(
        str(source, ": 'target_modules' is ", dump_json(targets), "; a text or a list of names is needed."));
  }
  if (base.is_string()) config.base_model = base.get<std::string>();
  if (get("revision").is_string()) config.revision = json["revision"].get<std::string>();
  return config;
}

PeftConfig read_peft_config(const std::string& folder) {
  std::string path = folder + "/adapter_config.json";
  return peft_config_from_json(read_json_file(path, 16 << 20), path);
}

std::vector<std::string> adapter_modules(const std::vector<std::string>& tensor_names) {
  const std::string prefix = "base_model.model.", suffix = ".lora_A.weight";
  std::vector<std::string> modules;
  for (const std::string& name : tensor_names)
    if (name.size() > prefix.size() + suffix.size() && name.starts_with(prefix) && name.ends_with(suffix))
      modules.push_back(name.substr(prefix.size(), name.size() - prefix.size() - suffix.size()));
  return modules;
}

void write_adapter(const std::string& folder, const Json& config, const std::vector<TensorSource>& tensors, bool writes, const std::string& base) {
  for (const TensorSource& tensor : tensors)
    TRIREME_CHECK(tensor.name.rfind("base_model.model.", 0) == 0, tensor.name, " is not a name of PEFT");
  std::map<std::string, std::string> metadata;
  if (!base.empty()) metadata[kBase] = base;
  write_safetensors_folder(folder, tensors, ~0ull, writes, "adapter_model", metadata);
  if (!writes) return;
  write_file_atomic(folder + "/adapter_config.json", dump_json_pretty(config));
}

std::string base_of_adapter(const std::string& folder) {
  const SafetensorsFolder files(folder, "adapter_model");
  const std::vector<std::string> names = files.names();
  if (names.empty()) return "";
  const auto& metadata = files.file_of(names[0]).metadata();
  const auto found = metadata.find(kBase);
  return found == metadata.end() ? "" : found->second;
}

LoadOptions adapter_options() {
  LoadOptions options;
  options.stem = "adapter_model";
  options.optional_prefix.clear();
  options.tolerated.clear();
  return options;
}

}  // namespace trireme
