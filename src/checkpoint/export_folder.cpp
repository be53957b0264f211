#include "checkpoint/export_folder.h"

#include <filesystem>

#include "base/check.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

constexpr const char* kTokenizerFiles[] = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",  "vocab.json",
    "merges.txt",     "tokenizer.model",       "chat_template.jinja",     "chat_template.json",
};
constexpr const char* kModelFiles[] = {"generation_config.json", "LICENSE", "LICENSE.txt", "USE_POLICY.md"};

void copy_if_there(const std::string& source, const std::string& folder, const char* file) {
  if (!fs::exists(source + "/" + file)) return;
  write_file_atomic(folder + "/" + file, read_file(source + "/" + file, 1ull << 30));
}

}  // namespace

void copy_tokenizer_files(const std::string& source, const std::string& folder) {
  for (const char* file : kTokenizerFiles) copy_if_there(source, folder, file);
}

void export_model_folder(const std::string& folder, const std::string& source, const Json& config,
                         const std::vector<TensorSource>& tensors, bool writes, uint64_t max_shard_bytes) {
  std::error_code error;
  if (!source.empty() && fs::equivalent(source, folder, error))  // all ranks see this, so all refuse
    throw ConfigError(str("the export folder ", folder, " is the folder of the model itself. Name another one."));
  write_safetensors_folder(folder, tensors, max_shard_bytes, writes);
  if (!writes) return;
  write_file_atomic(folder + "/config.json", dump_json_pretty(config));
  if (source.empty()) return;
  copy_tokenizer_files(source, folder);
  for (const char* file : kModelFiles) copy_if_there(source, folder, file);
}

}  // namespace trireme
