#include "model/hf_config.h"

#include <algorithm>
#include <filesystem>

#include "base/check.h"

namespace trireme {
namespace {

// Reads keys with messages that begin with the file.
class Reader {
 public:
  Reader(const Json& json, std::string source) : json_(json), source_(std::move(source)) {}

  bool has(const char* key) const { return json_.contains(key) && !json_[key].is_null(); }
  int64_t size(const char* key, int64_t largest = 1 << 24) const {
    auto v = json_get<int64_t>(json_, key, source_);
    if (v < 1 || v > largest) throw DataError(str(source_, ": \"", key, "\" is ", v, "; allowed are 1 to ", largest));
    return v;
  }
  int64_t size_or(const char* key, int64_t fallback) const { return has(key) ? size(key) : fallback; }
  template <typename T>
  T get_or(const char* key, T fallback) const { return json_get_or<T>(json_, key, fallback, source_); }
  double positive_or(const char* key, double fallback) const {
    double v = get_or<double>(key, fallback);
    if (!(v > 0) || v > 1e30) throw DataError(str(source_, ": \"", key, "\" is ", v, "; it must be positive"));
    return v;
  }
  double positive(const char* key) const {
    json_get<double>(json_, key, source_);  // it must be there
    return positive_or(key, 1.0);
  }
  const Json& operator[](const char* key) const { return json_[key]; }

 private:
  const Json& json_;
  std::string source_;
};

// A family, and what transformers takes where its config.json is silent.
struct Family {
  const char* name;
  const char* architecture;
  int64_t num_kv_heads;  // 0: as many as query heads
  int64_t max_positions;
  double rope_theta;
  bool tie_embeddings;
};
constexpr Family kFamilies[] = {{"llama", "LlamaForCausalLM", 0, 2048, 1e4, false},
                                {"mistral", "MistralForCausalLM", 8, 131072, 1e4, false},
                                {"qwen2", "Qwen2ForCausalLM", 32, 32768, 1e4, false},
                                {"qwen3", "Qwen3ForCausalLM", 32, 32768, 1e4, false},
                                {"smollm3", "SmolLM3ForCausalLM", 4, 32768, 2e6, true}};

const Family* find_family(const std::string& name) {
  for (const Family& family : kFamilies)
    if (name == family.name) return &family;
  return nullptr;
}

// rope_parameters (transformers 5) or rope_scaling (4). `outer` reads what may stand beside it.
RopeConfig read_rope_options(const Json& options, const std::string& place, const Reader& outer, double theta,
                             int64_t max_positions) {
  if (!options.is_object()) throw DataError(str(place, ": an object is expected"));
  Reader r(options, place);
  if (options.contains("full_attention") || options.contains("sliding_attention"))
    throw DataError(str(place, " has parameters by kind of layer, which is not supported"));
  RopeConfig rope;
  rope.theta = r.positive_or("rope_theta", theta);
  if (outer.has("rope_theta") && rope.theta != theta)
    throw DataError(str(place, ": rope_theta ", rope.theta, " contradicts the rope_theta ", theta, " beside it; remove one"));
  if (r.get_or<double>("partial_rotary_factor", 1.0) != 1.0)
    throw DataError(str(place, ": a partial_rotary_factor other than 1 is not supported"));
  rope.type = r.get_or<std::string>("rope_type", r.get_or<std::string>("type", "default"));
  if (rope.type == "default") return rope;
  if (rope.type != "linear" && rope.type != "llama3" && rope.type != "yarn")
    throw DataError(str(place, ": rope type \"", rope.type, "\" is not supported; supported are default, linear, llama3, yarn"));
  rope.factor = r.positive("factor");
  if (rope.type == "linear") return rope;
  const char* original = "original_max_position_embeddings";  // beside the object it counts before that within, as in transformers
  rope.original_max_positions = outer.has(original) ? outer.size(original) : r.size_or(original, max_positions);
  if (rope.type == "llama3") {
    rope.low_freq_factor = r.positive("low_freq_factor");
    rope.high_freq_factor = r.positive("high_freq_factor");
    if (rope.high_freq_factor <= rope.low_freq_factor)
      throw DataError(str(place, ": high_freq_factor must be above low_freq_factor"));
    return rope;
  }
  rope.beta_fast = r.positive_or("beta_fast", 32.0);
  rope.beta_slow = r.positive_or("beta_slow", 1.0);
  if (r.has("attention_factor")) rope.attention_factor = r.positive("attention_factor");
  rope.mscale = r.get_or<double>("mscale", 0.0);
  rope.mscale_all_dim = r.get_or<double>("mscale_all_dim", 0.0);
  rope.truncate = r.get_or<bool>("truncate", true);
  return rope;
}

RopeConfig read_rope(const Reader& r, const std::string& source, double default_theta, int64_t max_positions) {
  RopeConfig rope;
  rope.theta = r.positive_or("rope_theta", default_theta);
  if (r.get_or<double>("partial_rotary_factor", 1.0) != 1.0)
    throw DataError(str(source, ": a partial_rotary_factor other than 1 is not supported"));
  std::optional<RopeConfig> found;
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!r.has(key) || r[key] == Json::object()) continue;
    RopeConfig options = read_rope_options(r[key], str(source, ": ", key), r, rope.theta, max_positions);
    if (found && !(*found == options))
      throw DataError(str(source, ": rope_scaling and rope_parameters contradict each other; remove one"));
    found = options;
  }
  return found.value_or(rope);
}

// Which layers see a window only, and how long it is.
void read_windows(const Reader& r, const Json& json, const std::string& source, ModelConfig& c) {
  const bool mistral = c.model_type == "mistral";
  c.window.assign(static_cast<size_t>(c.num_layers), -1);
  if (c.model_type == "llama" || (!mistral && !r.get_or<bool>("use_sliding_window", false))) return;
  // transformers' default, 4096, holds where a file is silent; null means no window.
  int64_t window = 4096;
  if (c.model_type == "smollm3" || json.contains("sliding_window")) {
    if (!r.has("sliding_window")) return;
    window = r.size("sliding_window", int64_t{1} << 31);
  }
  const bool listed = !mistral && r.has("layer_types");
  if (listed && (!r["layer_types"].is_array() || r["layer_types"].size() != c.window.size()))
    throw DataError(str(source, ": \"layer_types\" must list ", c.num_layers, " layers"));
  const int64_t first = mistral ? 0 : r.get_or<int64_t>("max_window_layers", 28);
  for (size_t l = 0; l < c.window.size(); ++l) {
    bool slides = c.model_type == "smollm3" ? !c.uses_rope[l] : static_cast<int64_t>(l) >= first;
    if (listed) {
      const Json& type = r["layer_types"][l];
      slides = type == "sliding_attention";
      if (!slides && type != "full_attention")
        throw DataError(str(source, ": \"layer_types\" has ", dump_json(type), "; supported are full_attention, sliding_attention"));
    }
    if (slides) c.window[l] = window;
  }
}

// In which form the weights are stored, as BitsAndBytesConfig of transformers says it; more is in the files (checkpoint/bitsandbytes.h).
std::string read_quantization(const Json& json, const std::string& source) {
  const auto refuse = [&](const std::string& what) { return DataError(str(source, ": ", what, " is not supported; supported is bitsandbytes in 4 or 8 bits. Take the model's original weights")); };
  const auto method = json_get_or<std::string>(json, "quant_method", "bitsandbytes", source);  // files of its first year do not say
  if (method != "bitsandbytes") throw refuse(str("quant_method ", dump_json(method)));
  const bool has_8_bits = json_get_or<bool>(json, "load_in_8bit", false, source), has_4_bits = json_get_or<bool>(json, "load_in_4bit", false, source);
  if (has_8_bits && has_4_bits) throw refuse("load_in_4bit=true beside load_in_8bit=true");
  if (has_8_bits) return "int8";
  if (!has_4_bits) throw refuse("load_in_4bit=false");
  const auto kind = json_get_or<std::string>(json, "bnb_4bit_quant_type", "fp4", source);
  if (kind != "nf4" && kind != "fp4") throw refuse(str("bnb_4bit_quant_type ", dump_json(kind)));
  return kind;
}

std::vector<int64_t> ids(const Reader& reader, const char* key, const std::string& source) {
  if (!reader.has(key)) return {};
  const Json& v = reader[key];
  std::vector<int64_t> out;
  for (const Json& id : v.is_array() ? v : Json::array({v})) {
    if (!id.is_number_integer()) throw DataError(str(source, ": \"", key, "\" must be an id or a list of ids"));
    out.push_back(id.get<int64_t>());
  }
  return out;
}

}  // namespace

ModelConfig model_config_from_json(const Json& json, const std::string& source) {
  if (!json.is_object()) throw DataError(str(source, ": an object is expected"));
  Reader r(json, source);
  ModelConfig c;
  c.raw = json;
  c.source = source;
  c.model_type = json_get<std::string>(json, "model_type", source);
  const Family* family = find_family(c.model_type);
  if (!family)
    throw DataError(str(source, ": model_type \"", c.model_type,
                        "\" is not supported; supported are llama, mistral, qwen2, qwen3, smollm3 (SmolLM and SmolLM2 are llama)"));
  // The limits together keep num_parameters() within 63 bits.
  c.vocab_size = r.size("vocab_size");
  c.hidden_size = r.size("hidden_size", 1 << 20);
  c.intermediate_size = r.size("intermediate_size");
  c.num_layers = r.size("num_hidden_layers", 4096);
  c.num_heads = r.size("num_attention_heads", 1 << 14);
  // null is as many as there are query heads; absent is the family's own number.
  bool silent = !json.contains("num_key_value_heads") && family->num_kv_heads > 0;
  c.num_kv_heads = r.size_or("num_key_value_heads", silent ? family->num_kv_heads : c.num_heads);
  bool qwen3 = c.model_type == "qwen3";
  if (!r.has("head_dim") && !qwen3 && c.hidden_size % c.num_heads != 0)
    throw DataError(str(source, ": hidden_size ", c.hidden_size, " is no multiple of num_attention_heads ", c.num_heads,
                        ", and there is no head_dim"));
  c.head_dim = r.has("head_dim") ? r.size("head_dim", 4096) : qwen3 ? 128 : c.hidden_size / c.num_heads;
  if (c.num_heads % c.num_kv_heads != 0)
    throw DataError(str(source, ": num_attention_heads ", c.num_heads, " is no multiple of num_key_value_heads ", c.num_kv_heads));
  if (c.head_dim % 2 != 0) throw DataError(str(source, ": head_dim ", c.head_dim, " is odd; rotary embedding needs an even one"));
  if (r.has("hidden_act") && r.get_or<std::string>("hidden_act", "silu") != "silu")
    throw DataError(str(source, ": hidden_act \"", r.get_or<std::string>("hidden_act", ""), "\" is not supported; supported is silu"));
  if (r.has("quantization_config")) c.quantization = read_quantization(r["quantization_config"], str(source, ": quantization_config"));
  if (r.get_or<double>("attention_dropout", 0.0) != 0.0)
    throw DataError(str(source, ": an attention_dropout other than 0 is not supported"));
  c.max_positions = r.size_or("max_position_embeddings", family->max_positions);
  c.rms_norm_eps = r.positive_or("rms_norm_eps", 1e-6);
  c.initializer_range = r.positive_or("initializer_range", 0.02);
  c.tie_embeddings = r.get_or<bool>("tie_word_embeddings", family->tie_embeddings);
  bool attention_bias = r.get_or<bool>("attention_bias", false);
  if (c.model_type == "qwen2") c.qkv_bias = true;
  else if (c.model_type != "mistral") c.qkv_bias = c.output_bias = attention_bias;
  c.mlp_bias = (c.model_type == "llama" || c.model_type == "smollm3") && r.get_or<bool>("mlp_bias", false);
  c.qk_norm = qwen3;
  c.rope = read_rope(r, source, family->rope_theta, c.max_positions);
  c.uses_rope.assign(static_cast<size_t>(c.num_layers), true);
  if (c.model_type == "smollm3") {
    int64_t interval = r.size_or("no_rope_layer_interval", 4);
    for (size_t l = 0; l < c.uses_rope.size(); ++l) c.uses_rope[l] = (static_cast<int64_t>(l) + 1) % interval != 0;
    if (r.has("no_rope_layers")) {
      const Json& layers = r["no_rope_layers"];
      if (!layers.is_array() || layers.size() < c.uses_rope.size())
        throw DataError(str(source, ": \"no_rope_layers\" must list ", c.num_layers, " layers"));
      for (size_t l = 0; l < c.uses_rope.size(); ++l) c.uses_rope[l] = layers[l] == 1;
    }
  }
  read_windows(r, json, source, c);
  c.dtype = r.get_or<std::string>("dtype", r.get_or<std::string>("torch_dtype", ""));
  if (c.dtype == "auto") c.dtype.clear();
  const std::vector<std::string> dtypes = {"", "float32", "bfloat16", "float16", "float64"};
  if (std::find(dtypes.begin(), dtypes.end(), c.dtype) == dtypes.end())
    throw DataError(str(source, ": dtype \"", c.dtype, "\" is not supported; supported are float32, bfloat16, float16, float64"));
  c.eos_ids = ids(r, "eos_token_id", source);
  for (int64_t id : c.eos_ids)
    if (id >= c.vocab_size)
      throw DataError(str(source, ": eos_token_id ", id, " is not below vocab_size ", c.vocab_size, "; a text would never end"));
  auto one = [&](const char* key) -> std::optional<int64_t> {
    auto list = ids(r, key, source);
    return list.empty() ? std::nullopt : std::optional(list.front());
  };
  c.bos_id = one("bos_token_id");
  c.pad_id = one("pad_token_id");
  return c;
}

std::vector<int64_t> end_ids_from_json(const Json& json, const std::string& source) {
  if (!json.is_object()) throw DataError(str(source, ": an object is expected"));
  return ids(Reader(json, source), "eos_token_id", source);
}

ModelConfig read_model_config(const std::string& path) {
  std::string file = std::filesystem::is_directory(path) ? path + "/config.json" : path;
  return model_config_from_json(read_json_file(file, 64 << 20), file);
}

int64_t ModelConfig::num_parameters() const {
  int64_t q = num_heads * head_dim, kv = num_kv_heads * head_dim;
  int64_t layer = hidden_size * (2 * q + 2 * kv) + 3 * hidden_size * intermediate_size + 2 * hidden_size;
  if (qkv_bias) layer += q + 2 * kv;
  if (output_bias) layer += hidden_size;
  if (mlp_bias) layer += 2 * intermediate_size + hidden_size;
  if (qk_norm) layer += 2 * head_dim;
  return num_layers * layer + hidden_size + vocab_size * hidden_size * (tie_embeddings ? 1 : 2);
}

Json model_config_to_json(const ModelConfig& config, const std::string& dtype) {
  Json json = config.raw;
  json.erase("quantization_config");
  if (json.contains("dtype")) json["dtype"] = dtype;
  if (json.contains("torch_dtype") || !json.contains("dtype")) json["torch_dtype"] = dtype;
  return json;
}

Json model_config_from_fields(const ModelConfig& c, const std::string& dtype) {
  Json j;
  j["architectures"] = Json::array({find_family(c.model_type)->architecture});
  j["model_type"] = c.model_type;
  j["vocab_size"] = c.vocab_size;
  j["hidden_size"] = c.hidden_size;
  j["intermediate_size"] = c.intermediate_size;
  j["num_hidden_layers"] = c.num_layers;
  j["num_attention_heads"] = c.num_heads;
  j["num_key_value_heads"] = c.num_kv_heads;
  j["head_dim"] = c.head_dim;
  j["hidden_act"] = "silu";
  j["max_position_embeddings"] = c.max_positions;
  j["rms_norm_eps"] = c.rms_norm_eps;
  j["initializer_range"] = c.initializer_range;
  j["tie_word_embeddings"] = c.tie_embeddings;
  if (c.model_type != "qwen2") j["attention_bias"] = c.qkv_bias;
  if (c.model_type == "llama" || c.model_type == "smollm3") j["mlp_bias"] = c.mlp_bias;
  Json rope;
  rope["rope_type"] = c.rope.type;
  if (c.rope.type != "default") rope["factor"] = c.rope.factor;
  if (c.rope.type == "llama3") {
    rope["low_freq_factor"] = c.rope.low_freq_factor;
    rope["high_freq_factor"] = c.rope.high_freq_factor;
  }
  if (c.rope.type == "yarn") {
    rope["beta_fast"] = c.rope.beta_fast;
    rope["beta_slow"] = c.rope.beta_slow;
    rope["truncate"] = c.rope.truncate;
    if (c.rope.attention_factor) rope["attention_factor"] = *c.rope.attention_factor;
    if (c.rope.mscale != 0) rope["mscale"] = c.rope.mscale;
    if (c.rope.mscale_all_dim != 0) rope["mscale_all_dim"] = c.rope.mscale_all_dim;
  }
  if (c.rope.original_max_positions > 0) rope["original_max_position_embeddings"] = c.rope.original_max_positions;
  j["rope_theta"] = c.rope.theta;
  if (c.rope.type != "default") j["rope_scaling"] = rope;
  rope["rope_theta"] = c.rope.theta;
  j["rope_parameters"] = rope;
  auto slides = std::find_if(c.window.begin(), c.window.end(), [](int64_t w) { return w > 0; });
  if (c.model_type == "mistral") j["sliding_window"] = slides == c.window.end() ? Json() : Json(*slides);
  if (slides != c.window.end() && c.model_type != "mistral") {
    j["use_sliding_window"] = true;
    j["sliding_window"] = *slides;
    Json types = Json::array();
    for (int64_t w : c.window) types.push_back(w > 0 ? "sliding_attention" : "full_attention");
    j["layer_types"] = types;
    j["max_window_layers"] = slides - c.window.begin();
  }
  if (c.model_type == "smollm3") {
    Json layers = Json::array();
    for (bool rope_used : c.uses_rope) layers.push_back(rope_used ? 1 : 0);
    j["no_rope_layers"] = layers;
  }
  j["bos_token_id"] = c.bos_id ? Json(*c.bos_id) : Json();
  if (c.pad_id) j["pad_token_id"] = *c.pad_id;
  j["eos_token_id"] = c.eos_ids.empty() ? Json() : c.eos_ids.size() == 1 ? Json(c.eos_ids[0]) : Json(c.eos_ids);
  j["torch_dtype"] = dtype;
  j["dtype"] = dtype;
  return j;
}

}  // namespace trireme
