// A model as a Hugging Face folder that transformers loads.
#pragma once

#include "base/json.h"
#include "checkpoint/safetensors.h"

namespace trireme {

// What a product says of conversations, where training said it otherwise than the tokenizer's folder.
struct ExportedChat {
  std::string chat_template;      // Jinja text, in place of the folder's own; "": that one
  Json special_tokens;            // {"eos_token": text, ...}: into tokenizer_config.json where it is silent
  std::vector<int64_t> end_ids;   // that end an answer: into generation_config.json, beside those that are there
};

// Copies what is there of tokenizer and chat template, bytes as they are but for what `chat` changes.
void copy_tokenizer_files(const std::string& source, const std::string& folder, const ExportedChat& chat = {});

// Writes the weights (safetensors.h), then config.json (as given), and copies what is there of generation_config.json and
// licence from `model` and of tokenizer and chat template from `tokenizer` ("": nothing). Into one of these folders is
// refused (ConfigError). With `writes` false it only calls every get(), for ranks that take part in gathering.
void export_model_folder(const std::string& folder, const std::string& model, const std::string& tokenizer, const Json& config,
                         const std::vector<TensorSource>& tensors, const ExportedChat& chat = {}, bool writes = true,
                         uint64_t max_shard_bytes = kMaxShardBytes);

}  // namespace trireme
