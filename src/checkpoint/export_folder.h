// A model as a Hugging Face folder that transformers loads.
#pragma once

#include "base/json.h"
#include "checkpoint/safetensors.h"

namespace trireme {

// Writes the weights (safetensors.h), then config.json (as given), and copies what is there of generation_config.json and
// licence from `model` and of tokenizer and chat template from `tokenizer`, bytes as they are ("": nothing). Into one of
// these folders is refused (ConfigError). Collective where the tensors gather; with `writes` false only the gathers are
// done.
void export_model_folder(const std::string& folder, const std::string& model, const std::string& tokenizer, const Json& config,
                         const std::vector<TensorSource>& tensors, bool writes = true,
                         uint64_t max_shard_bytes = 5'000'000'000);

// Copies the tokenizer's files and chat template only. For adapters.
void copy_tokenizer_files(const std::string& source, const std::string& folder);

}  // namespace trireme
