#include "checkpoint/hf_hub.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "base/check.h"
#include "base/file.h"

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

}  // namespace

std::string resolve_model_folder(const std::string& name, const std::string& revision) {
  std::error_code error;
  if (fs::is_directory(name, error)) return name;
  if (fs::exists(name, error)) throw DataError(str("model folder ", name, " is a file, not a folder."));
  if (!is_hub_name(name)) throw DataError(str("model folder ", name, " does not exist."));

  std::string model = "models--" + name;
  if (size_t slash = model.find('/'); slash != std::string::npos) model.replace(slash, 1, "--");
  std::string folder = cache_folder() + "/" + model, commit = revision;
  if (std::string ref = folder + "/refs/" + revision; is_plain(revision) && fs::exists(ref, error)) {
    commit = read_file(ref, 1000);
    commit = commit.substr(0, commit.find_first_of(" \r\n"));
    if (!is_plain(commit)) throw DataError(str(ref, " does not hold the name of a commit."));
  }
  std::string snapshot = folder + "/snapshots/" + commit;
  if (is_plain(commit) && fs::is_directory(snapshot, error)) return snapshot;
  throw ConfigError(str("model ", name, " is neither a folder nor in the Hugging Face cache (", cache_folder(),
                        "). Download it with: hf download ", name,
                        revision == "main" ? "" : " --revision " + revision));
}

}  // namespace trireme
