#include "checkpoint/manifest.h"

#include <filesystem>

#include "base/check.h"
#include "base/file.h"
#include "base/hash.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

struct DtypeRow {
  const char* name;
  at::ScalarType dtype;
  Hdf5Type stored;
};
constexpr DtypeRow kDtypes[] = {
    {"float64", at::kDouble, Hdf5Type::kFloat64}, {"float32", at::kFloat, Hdf5Type::kFloat32},
    {"float16", at::kHalf, Hdf5Type::kFloat16},   {"bfloat16", at::kBFloat16, Hdf5Type::kBfloat16},
    {"int64", at::kLong, Hdf5Type::kInt64},       {"int32", at::kInt, Hdf5Type::kInt32},
    {"int16", at::kShort, Hdf5Type::kInt16},      {"int8", at::kChar, Hdf5Type::kInt8},
    {"uint8", at::kByte, Hdf5Type::kUint8},       {"bool", at::kBool, Hdf5Type::kUint8},
};

const DtypeRow& row_of(at::ScalarType dtype) {
  for (const DtypeRow& row : kDtypes)
    if (row.dtype == dtype) return row;
  throw ConfigError(str("a checkpoint cannot hold values of type ", c10::toString(dtype), "."));
}

Manifest parse_manifest(const Json& json) {
  Manifest manifest;
  manifest.step = json.at("step").get<int64_t>();
  if (manifest.step < 0) throw std::runtime_error("its step is negative");
  for (const auto& [name, file] : json.at("files").items()) {
    if (name.find('/') != std::string::npos) throw std::runtime_error("a file outside the folder");
    manifest.files[name] = {file.at("bytes").get<uint64_t>(), file.at("hash").get<std::string>()};
  }
  for (const auto& [name, entry] : json.at("tensors").items()) {
    StoredTensor& tensor = manifest.tensors[name];
    tensor.dtype = stored_dtype(entry.at("dtype").get<std::string>());
    tensor.shape = entry.at("shape").get<std::vector<int64_t>>();
    for (const Json& item : entry.at("pieces")) {
      StoredPiece piece{item.at("file").get<std::string>(), item.at("dataset").get<std::string>(),
                        item.at("offset").get<std::vector<int64_t>>(), item.at("shape").get<std::vector<int64_t>>()};
      bool fits = piece.offset.size() == tensor.shape.size() && piece.shape.size() == tensor.shape.size() &&
                  manifest.files.count(piece.file) != 0;
      for (size_t d = 0; fits && d < tensor.shape.size(); ++d)
        fits = piece.offset[d] >= 0 && piece.shape[d] >= 0 && piece.offset[d] <= tensor.shape[d] &&
               piece.shape[d] <= tensor.shape[d] - piece.offset[d];
      if (!fits) throw std::runtime_error("a piece of " + name + " lies outside of it");
      tensor.pieces.push_back(std::move(piece));
    }
  }
  manifest.state = json.at("state");
  return manifest;
}

}  // namespace

Hdf5Type hdf5_type_for(at::ScalarType dtype) { return row_of(dtype).stored; }
std::string stored_dtype_name(at::ScalarType dtype) { return row_of(dtype).name; }

at::ScalarType stored_dtype(const std::string& name) {
  for (const DtypeRow& row : kDtypes)
    if (name == row.name) return row.dtype;
  throw DataError(str("unknown dtype ", name, " in a checkpoint."));
}

std::string step_name(int64_t step) { return "step-" + std::to_string(step); }

int64_t step_of(const std::string& name) {
  constexpr size_t kPrefix = 5, kMaxDigits = 18;  // so many fit int64_t
  if (!name.starts_with("step-") || name.size() == kPrefix || name.size() > kPrefix + kMaxDigits) return -1;
  if (name.find_first_not_of("0123456789", kPrefix) != std::string::npos) return -1;
  int64_t step = std::stoll(name.substr(kPrefix));
  return step_name(step) == name ? step : -1;
}

Json manifest_to_json(const Manifest& manifest) {
  Json files = Json::object(), tensors = Json::object();
  for (const auto& [name, file] : manifest.files) files[name] = {{"bytes", file.bytes}, {"hash", file.hash}};
  for (const auto& [name, tensor] : manifest.tensors) {
    Json pieces = Json::array();
    for (const StoredPiece& piece : tensor.pieces)
      pieces.push_back(
          {{"file", piece.file}, {"dataset", piece.dataset}, {"offset", piece.offset}, {"shape", piece.shape}});
    Json entry = {{"dtype", stored_dtype_name(tensor.dtype)}, {"shape", tensor.shape}, {"pieces", std::move(pieces)}};
    tensors.get_ref<Json::object_t&>().emplace_back(name, std::move(entry));
  }
  return {{"format", "trireme checkpoint"}, {"version", kCheckpointVersion}, {"step", manifest.step},
          {"trireme", TRIREME_VERSION},     {"files", files},                {"tensors", tensors},
          {"state", manifest.state}};
}

void write_manifest(const std::string& folder, const Manifest& manifest) {
  std::string text = dump_json(manifest_to_json(manifest)) + "\n";
  write_file_atomic(folder + "/manifest.json", text);
  write_file_atomic(folder + "/manifest.hash", hash_bytes(text) + "\n");
}

Manifest read_manifest(const std::string& folder) {
  std::string path = folder + "/manifest.json";
  if (!fs::exists(path)) throw DataError(str(folder, " is not a checkpoint: it has no manifest.json."));
  std::string text = read_file(path, 1ull << 30), expected = read_file(folder + "/manifest.hash", 1000);
  if (hash_bytes(text) + "\n" != expected)
    throw DataError(str(path, " is damaged: its hash is not the one in manifest.hash."));
  Json json = parse_json(text, path);
  Manifest manifest;
  try {
    if (json.at("format") != "trireme checkpoint") throw std::runtime_error("not a checkpoint of Trireme");
    if (json.at("version").get<int64_t>() > kCheckpointVersion)
      throw std::runtime_error(
          str("its version is ", json.at("version").dump(), "; this Trireme reads up to ", kCheckpointVersion));
    manifest = parse_manifest(json);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw DataError(str(path, " cannot be used: ", error.what(), "."));
  }
  if (int64_t named = step_of(fs::path(folder).filename().string()); named >= 0 && named != manifest.step)
    throw DataError(str(folder, " holds step ", manifest.step, ": it was renamed. Give it back its name."));
  return manifest;
}

std::string damage_of(const std::string& folder, const std::string& file, const StoredFile& expected) {
  std::string path = folder + "/" + file;
  std::error_code error;
  uint64_t bytes = fs::file_size(path, error);
  if (error) return str(path, " is missing (", error.message(), ").");
  if (bytes != expected.bytes) return str(path, " has ", bytes, " bytes instead of ", expected.bytes, ".");
  try {
    if (hash_file(path) != expected.hash) return str(path, " is damaged: its hash differs from the manifest's.");
  } catch (const Error& unreadable) {
    return unreadable.what();
  }
  return "";
}

}  // namespace trireme
