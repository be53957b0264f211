// LoRA adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors, whose tensors are
// named base_model.model.<module>.lora_A.weight [rank, in] and .lora_B.weight [out, rank].
#pragma once

#include "base/json.h"
#include "checkpoint/load_weights.h"

namespace trireme {

// What Trireme computes of PEFT's LoraConfig. scale = alpha / rank, or alpha / sqrt(rank) with use_rslora.
struct PeftConfig {
  int64_t rank = 8;
  double alpha = 8;
  double dropout = 0;
  bool use_rslora = false;
  std::vector<std::string> target_modules;  // names, or one text: "all-linear" or a regular expression
  bool targets_are_text = false;            // target_modules holds that one text
  std::string base_model;                   // name or folder; "" where the file has null
  std::string revision;                     // of a name; "" where the file has null
  bool use_dora = false;
};

Json peft_config_to_json(const PeftConfig& config);

// `source` begins messages. DataError: another PEFT method, a wrong type or range, or an option that Trireme does not
// compute, by name: patterns of rank or alpha, biases, modules_to_save, a base model changed by initialisation
// (PiSSA, OLoRA, LoftQ, CorDA), and any unknown key that is set.
PeftConfig peft_config_from_json(const Json& json, const std::string& source);
PeftConfig read_peft_config(const std::string& folder);

// The modules that have an adapter, from the names of its tensors.
std::vector<std::string> adapter_modules(const std::vector<std::string>& tensor_names);

// Writes the folder. The tensors carry PEFT's names. `writes` as write_safetensors_folder(). `base`: how the weights were quantized that the
// adapter was trained beside, in words; empty: not, or whoever wrote the folder did not say. It is metadata of the tensors' file, where PEFT
// does not look: its older versions stop at a key of adapter_config.json that they do not know.
void write_adapter(const std::string& folder, const Json& config, const std::vector<TensorSource>& tensors, bool writes = true, const std::string& base = "");
std::string base_of_adapter(const std::string& folder);

// How load_weights() is to read an adapter's folder into targets that carry PEFT's names.
LoadOptions adapter_options();

}  // namespace trireme
