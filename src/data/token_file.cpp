#include "data/token_file.h"

#include <algorithm>
#include <cstdlib>

#include "base/check.h"
#include "base/hdf5.h"
#include "data/file_hash.h"

namespace trireme {
namespace {

std::string manifest_of(const std::string& path) { return path.substr(0, path.size() - 3) + ".json"; }

// Where a dataset of `count` values lies in the map.
template <typename T>
const T* place(const Hdf5File& file, const MappedFile& map, const char* name, uint64_t count) {
  Hdf5Dataset dataset = file.open_dataset(name);
  auto fail = [&](const char* what) { throw DataError(str("token file ", file.path(), ": dataset '", name, "' ", what)); };
  if (dataset.type() != hdf5_type_of<T>()) fail("has another type");
  if (dataset.shape() != std::vector<uint64_t>{count}) fail("has another length");
  uint64_t offset = dataset.file_offset();
  if (offset == 0 || offset % sizeof(T) != 0 || offset > map.size() || count > (map.size() - offset) / sizeof(T))
    fail("lies outside the file");
  return reinterpret_cast<const T*>(map.data() + offset);
}

uint64_t length_of(const Hdf5File& file, const char* name) {
  Hdf5Dataset dataset = file.open_dataset(name);
  if (dataset.shape().size() != 1)
    throw DataError(str("token file ", file.path(), ": dataset '", name, "' has another shape"));
  return dataset.shape()[0];
}

}  // namespace

std::string default_token_cache() {
  auto env = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value ? value : "");
  };
  if (auto folder = env("TRIREME_CACHE"); !folder.empty()) return folder + "/tokens";
  if (auto folder = env("XDG_CACHE_HOME"); !folder.empty()) return folder + "/trireme/tokens";
  if (auto folder = env("HOME"); !folder.empty()) return folder + "/.cache/trireme/tokens";
  throw ConfigError("no folder for token files: HOME is not set; name one with data.cache=FOLDER");
}

bool token_file_intact(const std::string& path, std::string* why) {
  try {
    std::string name = manifest_of(path);
    Json manifest = read_json_file(name, 1 << 20);
    auto bytes = static_cast<int64_t>(MappedFile(path).size());
    if (json_get<int64_t>(manifest, "bytes", name) != bytes)
      *why = str("it has ", bytes, " bytes instead of ", manifest["bytes"].get<int64_t>());
    else if (json_get<std::string>(manifest, "hash", name) != remembered_hash(path, path.substr(0, path.rfind('/'))))
      *why = "its content does not match its hash";
    else
      return true;
  } catch (const DataError& error) {
    *why = error.what();
  }
  return false;
}

std::string token_file_content(const std::string& path) {
  std::string name = manifest_of(path);
  return json_get<std::string>(read_json_file(name, 1 << 20), "content", name);
}

TokenFile::TokenFile(const std::string& path, std::vector<std::string> names_now) : path_(path), map_(path) {
  Hdf5File file = Hdf5File::open(path);
  if (!file.has_attribute("trireme_tokens") || file.attribute("trireme_tokens") != std::to_string(kTokenFileVersion))
    throw DataError(str("token file ", path, " is not of format version ", kTokenFileVersion, "; delete it"));
  uint64_t records = length_of(file, "forms"), tokens = length_of(file, "tokens");
  if (records == 0 || tokens == 0) throw DataError(str("token file ", path, " is empty; delete it"));
  tokens_ = place<int32_t>(file, map_, "tokens", tokens);
  learnt_ = place<uint8_t>(file, map_, "learnt", tokens);
  offsets_ = place<int64_t>(file, map_, "offsets", records + 1);
  files_ = place<int32_t>(file, map_, "files", records);
  lines_ = place<int64_t>(file, map_, "lines", records);
  forms_ = place<uint8_t>(file, map_, "forms", records);
  targets_ = place<int64_t>(file, map_, "targets", records);
  num_records_ = static_cast<int64_t>(records);
  num_tokens_ = static_cast<int64_t>(tokens);
  largest_id_ = std::atoll(file.attribute("largest_id").c_str());
  num_skipped_ = std::atoll(file.attribute("skipped").c_str());
  Json names = parse_json(file.attribute("files"), path);
  for (const Json& name : names) names_.push_back(name.is_string() ? name.get<std::string>() : std::string());
  if (names_now.size() == names_.size()) names_ = std::move(names_now);
  bool ordered = offsets_[0] == 0 && offsets_[records] == num_tokens_;
  for (uint64_t r = 0; ordered && r < records; ++r)
    ordered = offsets_[r] < offsets_[r + 1] && files_[r] >= 0 && static_cast<size_t>(files_[r]) < names_.size();
  if (!ordered) throw DataError(str("token file ", path, ": its records overlap or lie outside; delete it"));
}

std::string TokenFile::source(int64_t record) const {
  return str(names_[static_cast<size_t>(files_[record])], ":", lines_[record]);
}

}  // namespace trireme
