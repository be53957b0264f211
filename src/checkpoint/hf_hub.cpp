#include "checkpoint/hf_hub.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

// One part of a hub name, a revision or a commit: no path may hide in it.
bool is_plain(const std::string& text) {
  return !text.empty() && text.front() != '.' && text.front() != '-' && text.find("..") == std::string::npos &&
         std::all_of(text.begin(), text.end(),
                     [](unsigned char c) { return std::isalnum(c) || c == '.' || c == '_' || c == '-'; });
}

bool is_hub_name(const std::string& name) {
  size_t slash = name.find('/');
  return slash == std::string::npos ? is_plain(name)
                                    : is_plain(name.substr(0, slash)) && is_plain(name.substr(slash + 1));
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

std::string cache_folder() {
  if (std::string folder = environment("HF_HUB_CACHE"); !folder.empty()) return folder;
  if (std::string folder = environment("HF_HOME"); !folder.empty()) return folder + "/hub";
  if (std::string folder = environment("XDG_CACHE_HOME"); !folder.empty()) return folder + "/huggingface/hub";
  return environment("HOME") + "/.cache/huggingface/hub";
}

// The first of the needed files that is not there; "" where all are.
std::string missing_file(const fs::path& snapshot, NeededFiles needed) {
  auto has = [&](const std::string& file) { return fs::exists(snapshot / file); };
  if (needed.tokenizer && !has("tokenizer.json")) return "tokenizer.json";
  if (!needed.model) return "";
  if (!has("config.json")) return "config.json";
  const std::string index = "model.safetensors.index.json";
  if (!has(index)) return has("model.safetensors") ? "" : "model.safetensors";
  const Json json = read_json_file((snapshot / index).string());
  const Json files = json.is_object() ? json.value("weight_map", Json()) : Json();
  for (const Json& file : files)
    if (file.is_string() && !has(file.get<std::string>())) return file.get<std::string>();
  return "";
}

}  // namespace

std::string resolve_model_folder(const std::string& name, const std::string& revision, NeededFiles needed, const char* key) {
  const auto no_folder = [&](const char* what) {
    return DataError(str(key, "=", name, what, ": name a ", needed.model ? "Hugging Face model folder" : "folder with a tokenizer.json", ", or a hub name (org/name) that is in its cache"));
  };
  std::error_code error;
  if (fs::is_directory(name, error)) return name;
  if (fs::exists(name, error)) throw no_folder(" is a file");
  if (!is_hub_name(name)) throw no_folder(" does not exist");

  std::string model = "models--" + name;
  if (size_t slash = model.find('/'); slash != std::string::npos) model.replace(slash, 1, "--");
  std::string folder = cache_folder() + "/" + model, commit = revision;
  if (std::string ref = folder + "/refs/" + revision; is_plain(revision) && fs::exists(ref, error)) {
    commit = read_file(ref, 1000);
    commit = commit.substr(0, commit.find_first_of(" \r\n"));
    if (!is_plain(commit)) throw DataError(str(ref, " does not hold the name of a commit."));
  }
  std::string snapshot = folder + "/snapshots/" + commit;
  std::string command = "hf download " + name + (revision == "main" ? "" : " --revision " + revision);
  if (!is_plain(commit) || !fs::is_directory(snapshot, error))
    throw ConfigError(str("model ", name, " is neither a folder nor in the Hugging Face cache (", cache_folder(),
                          "). Download it with: ", command));
  if (std::string missing = missing_file(snapshot, needed); !missing.empty())
    throw ConfigError(str("model ", name, " has no ", missing, " in the Hugging Face cache (", snapshot,
                          "): not all of it was downloaded. Complete it with: ", command));
  return snapshot;
}

}  // namespace trireme
