// Hub names to folders, through the cache of Hugging Face's own tools (never through the network).
#pragma once

#include <string>

namespace trireme {

// A folder is returned as it is. A hub name (org/name, or name) is looked up in the cache: $HF_HUB_CACHE, else
// $HF_HOME/hub, else ~/.cache/huggingface/hub, by models--org--name/refs/<revision> -> snapshots/<commit>.
// ConfigError: neither a folder nor in the cache; the command that downloads it is named. DataError: what can only be a
// path does not exist, or the cache is damaged. A hub name's folder must hold the `needed` files, else a download was not
// finished: a ConfigError with the command again.
struct NeededFiles {
  bool model = false;      // config.json, and model.safetensors or the index with every file that it names
  bool tokenizer = false;  // tokenizer.json
};
// `key`: of the configuration, that says so.
std::string resolve_model_folder(const std::string& name, const std::string& revision = "main", NeededFiles needed = {}, const char* key = "model.path");

}  // namespace trireme
