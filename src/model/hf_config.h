// config.json of a Hugging Face folder <-> ModelConfig. Reads the spellings of transformers 4 (torch_dtype, rope_theta +
// rope_scaling) and 5 (dtype, rope_parameters). The file is foreign: whatever it lacks, contradicts or asks for that the
// program cannot do is a DataError that names file and key.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "quant/stored_format.h"

namespace trireme {

// Rotary embedding. `type`: default, linear (Chen et al. 2023), llama3 (Llama 3.1), yarn (Peng et al. 2023).
struct RopeConfig {
  std::string type = "default";
  double theta = 10000.0;
  double factor = 1.0;
  double low_freq_factor = 1.0, high_freq_factor = 4.0;  // llama3
  int64_t original_max_positions = 0;                     // llama3, yarn: positions of the original training
  double beta_fast = 32.0, beta_slow = 1.0;               // yarn
  std::optional<double> attention_factor;                 // yarn: given, or computed from factor and the mscales
  double mscale = 0.0, mscale_all_dim = 0.0;              // yarn; 0 = absent
  bool truncate = true;                                   // yarn: round the ramp's ends to whole dims

  bool operator==(const RopeConfig&) const = default;
};

struct ModelConfig {
  std::string model_type = "llama";  // llama, mistral, qwen2, qwen3, smollm3
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0;
  int64_t num_layers = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int64_t max_positions = 0;
  double rms_norm_eps = 1e-6;
  double initializer_range = 0.02;  // std of random weights
  bool tie_embeddings = false;
  bool qkv_bias = false, output_bias = false, mlp_bias = false;  // which projections have a bias
  bool qk_norm = false;                                          // Qwen3: RMSNorm over each head of q and k
  std::vector<int64_t> window;   // [num_layers] a token sees the last window[l] tokens, itself included; -1 = all before
  std::vector<bool> uses_rope;   // [num_layers] false: no position embedding in this layer (SmolLM3)
  RopeConfig rope;
  std::string dtype;             // of the stored weights: float32, bfloat16, float16, float64; "" where the file is silent
  std::string quantization;      // of the stored weights: nf4, fp4 (bitsandbytes); "" where they are as they are
  std::map<std::string, StoredFormat> stored;  // then the layers that the files hold so, by path: of whoever has opened them
  std::vector<int64_t> eos_ids;  // may be empty
  std::optional<int64_t> bos_id, pad_id;
  Json raw;            // the file as read
  std::string source;  // its path; begins every message

  int64_t num_parameters() const;  // of the whole model; a tied embedding counts once
};

// `source` names the file in messages. DataError: unknown model_type (the supported are listed), activation other than
// silu, unsupported rope type or option, weights stored quantized otherwise than by bitsandbytes in 4 bits, sizes that are missing, not positive, absurd or
// contradict each other, two spellings of one thing that differ. Where the file is silent, transformers' defaults of the
// family hold.
ModelConfig model_config_from_json(const Json& json, const std::string& source);

// Reads `path`: a config.json, or a folder that holds one.
ModelConfig read_model_config(const std::string& path);

// What ends an answer by a generation_config.json ("eos_token_id": an id, a list of ids, or nothing). DataError.
std::vector<int64_t> end_ids_from_json(const Json& json, const std::string& source);

// What to write into an exported config.json: the file as read with only the dtype of the saved weights replaced, which are no longer quantized.
Json model_config_to_json(const ModelConfig& config, const std::string& dtype);

// A config.json built from the fields alone (raw ignored), in both spellings, which transformers 4 and 5 load.
Json model_config_from_fields(const ModelConfig& config, const std::string& dtype);

}  // namespace trireme
