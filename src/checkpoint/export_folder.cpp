#include "checkpoint/export_folder.h"

#include <algorithm>
#include <filesystem>

#include "base/check.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

constexpr const char* kTokenizerFiles[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                                           "vocab.json",     "merges.txt",            "tokenizer.model"};
constexpr const char* kTemplateFiles[] = {"chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"};
constexpr const char* kModelFiles[] = {"generation_config.json", "LICENSE", "LICENSE.txt", "USE_POLICY.md"};

template <size_t N>
void copy_what_is_there(const std::string& source, const std::string& folder, const char* const (&files)[N]) {
  if (source.empty()) return;
  for (const char* file : files) {
    if (!fs::exists(source + "/" + file)) continue;
    fs::create_directories(fs::path(folder + "/" + file).parent_path());
    write_file_atomic(folder + "/" + file, read_file(source + "/" + file, 1ull << 30));
  }
}

// Rewrites a JSON file of the folder (an empty object where it is not there), if `change` says that it changed something.
template <typename F>
void edit_json(const std::string& file, const F& change) {
  Json json = fs::exists(file) ? read_json_file(file) : Json::object();
  if (json.is_object() && change(json)) write_file_atomic(file, dump_json_pretty(json));
}

}  // namespace

void copy_tokenizer_files(const std::string& source, const std::string& folder, const ExportedChat& chat) {
  copy_what_is_there(source, folder, kTokenizerFiles);
  if (chat.chat_template.empty()) return copy_what_is_there(source, folder, kTemplateFiles);
  write_file_atomic(folder + "/chat_template.jinja", chat.chat_template);
  edit_json(folder + "/tokenizer_config.json", [&](Json& json) {
    bool changed = json.erase("chat_template") > 0;  // one template, not two that differ
    for (const auto& [name, text] : chat.special_tokens.items())
      if (!json.contains(name) || json[name].is_null()) json[name] = text, changed = true;
    return changed;
  });
}

void export_model_folder(const std::string& folder, const std::string& model, const std::string& tokenizer, const Json& config,
                         const std::vector<TensorSource>& tensors, const ExportedChat& chat, bool writes, uint64_t max_shard_bytes) {
  if (!writes) return write_safetensors_folder(folder, tensors, max_shard_bytes, false);
  std::error_code error;
  for (const std::string& source : {model, tokenizer})
    if (!source.empty() && fs::equivalent(source, folder, error))
      throw ConfigError(str("the export folder ", folder, " is the folder of the model itself. Name another one."));
  write_safetensors_folder(folder, tensors, max_shard_bytes);
  write_file_atomic(folder + "/config.json", dump_json_pretty(config));
  copy_what_is_there(model, folder, kModelFiles);
  edit_json(folder + "/generation_config.json", [&](Json& json) {
    const Json there = json.value("eos_token_id", config.value("eos_token_id", Json()));
    Json all = there.is_array() ? there : there.is_null() ? Json::array() : Json::array({there});
    const size_t before = all.size();
    for (int64_t id : chat.end_ids)
      if (std::find(all.begin(), all.end(), Json(id)) == all.end()) all.push_back(id);
    if (all.size() == before) return false;
    json["eos_token_id"] = all.size() == 1 ? all[0] : all;
    return true;
  });
  copy_tokenizer_files(tokenizer, folder, chat);
}

}  // namespace trireme
