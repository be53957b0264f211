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

template <size_t N>
void copy_what_is_there(const std::string& source, const std::string& folder, const char* const (&files)[N]) {
  if (source.empty()) return;
  for (const char* file : files)
    if (fs::exists(source + "/" + file))
      write_file_atomic(folder + "/" + file, read_file(source + "/" + file, 1ull << 30));
}

}  // namespace

void copy_tokenizer_files(const std::string& source, const std::string& folder) {
  copy_what_is_there(source, folder, kTokenizerFiles);
}

void export_model_folder(const std::string& folder, const std::string& model, const std::string& tokenizer, const Json& config,
                         const std::vector<TensorSource>& tensors, bool writes, uint64_t max_shard_bytes) {
  std::error_code error;
  for (const std::string& source : {model, tokenizer})
    if (!source.empty() && fs::equivalent(source, folder, error))  // all ranks see this, so all refuse
      throw ConfigError(str("the export folder ", folder, " is the folder of the model itself. Name another one."));
  write_safetensors_folder(folder, tensors, max_shard_bytes, writes);
  if (!writes) return;
  write_file_atomic(folder + "/config.json", dump_json_pretty(config));
  copy_what_is_there(model, folder, kModelFiles);
  copy_tokenizer_files(tokenizer, folder);
}

}  // namespace trireme
