// The folder of token files: what was used is marked, what nobody uses any more is deleted.
#include <filesystem>
#include <set>

#include "base/check.h"
#include "base/log.h"
#include "data/token_file.h"

namespace trireme {

namespace fs = std::filesystem;

void mark_token_file_used(const std::string& path) {
  std::error_code read_only;  // a cache that others may only read has no marks, and nothing is deleted from it
  fs::last_write_time(fs::path(path).replace_extension(".json"), fs::file_time_type::clock::now(), read_only);
}

// Files are named by a content hash (base/hash.h); whatever else is in the folder is not ours.
bool is_ours(const fs::path& path) {
  const std::string name = path.filename().string();
  return name.find_first_not_of("0123456789abcdef") == 32 && name[32] == '.';
}

// Everything of one token file has its stem; the youngest of these files tells when it was made or used.
TokenCacheUse prune_token_cache(const std::string& folder, std::chrono::seconds age) {
  TokenCacheUse use;
  std::set<fs::path> young, all;
  std::error_code error;
  const auto oldest = fs::file_time_type::clock::now() - age;
  auto stem_of = [](const fs::path& path) { return path.filename().string().substr(0, 32); };
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    if (!is_ours(entry.path())) continue;
    all.insert(entry.path());
    if (entry.last_write_time(error) >= oldest || error) young.insert(stem_of(entry.path()));
  }
  for (const fs::path& path : all) {
    uint64_t bytes = fs::file_size(path, error);
    if (error) continue;
    const bool kept = young.count(stem_of(path)) != 0 || !fs::remove(path, error);
    (kept ? use.bytes : use.deleted_bytes) += bytes;
    if (path.extension() == ".h5") ++(kept ? use.files : use.deleted_files);
  }
  if (use.deleted_files > 0)
    log_info(str("token cache ", folder, ": deleted ", use.deleted_files, " token files (", use.deleted_bytes >> 20,
                 " MiB) that were not used for ", age.count() / 86400, " days"));
  return use;
}

}  // namespace trireme
