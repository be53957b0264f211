#include "checkpoint/safetensors.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/json.h"

namespace trireme {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;

struct DtypeName {
  const char* name;
  at::ScalarType dtype;
};
constexpr DtypeName kDtypes[] = {
    {"F64", at::kDouble}, {"F32", at::kFloat},   {"F16", at::kHalf},   {"BF16", at::kBFloat16},
    {"I64", at::kLong},   {"I32", at::kInt},     {"I16", at::kShort},  {"I8", at::kChar},
    {"U64", at::kUInt64}, {"U32", at::kUInt32},  {"U16", at::kUInt16}, {"U8", at::kByte},
    {"BOOL", at::kBool},  {"F8_E4M3", at::kFloat8_e4m3fn}, {"F8_E5M2", at::kFloat8_e5m2},
};

uint64_t read_length(const char* bytes) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(bytes[i]);
  return value;
}

uint64_t unsigned_value(const Json& value, const std::string& where, const char* what) {
  if (!value.is_number_unsigned())
    throw DataError(
        str(where, ": ", what, " holds ", value.dump(), ", which is not a whole number from 0 to 2^64 - 1."));
  return value.get<uint64_t>();
}

const Json& member(const Json& object, const char* key, const std::string& where) {
  auto found = object.find(key);
  if (found == object.end()) throw DataError(str(where, ": '", key, "' is missing."));
  return *found;
}

// One entry of the header; offset still counts from the start of the values.
SafetensorsInfo parse_info(const Json& entry, const std::string& where) {
  if (!entry.is_object())
    throw DataError(str(where, ": the entry is not an object with dtype, shape and data_offsets."));
  for (const auto& [key, value] : entry.items())
    if (key != "dtype" && key != "shape" && key != "data_offsets")
      throw DataError(str(where, ": unknown key '", key, "'."));

  SafetensorsInfo info{};
  const Json& dtype = member(entry, "dtype", where);
  auto known =
      std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const DtypeName& d) { return dtype == d.name; });
  if (known == std::end(kDtypes))
    throw DataError(str(where, ": dtype ", dump_json(dtype),
                        " is not supported; supported are F64 F32 F16 BF16 I64 I32 I16 "
                        "I8 U64 U32 U16 U8 BOOL F8_E4M3 F8_E5M2."));
  info.dtype = known->dtype;

  const Json& shape = member(entry, "shape", where);
  if (!shape.is_array()) throw DataError(str(where, ": 'shape' is not an array."));
  if (shape.size() > 64) throw DataError(str(where, ": 'shape' has ", shape.size(), " dims; 64 are allowed."));
  uint64_t bytes = c10::elementSize(info.dtype), nonzero = bytes;
  for (const Json& item : shape) {
    uint64_t dim = unsigned_value(item, where, "'shape'");
    // The product without the zeros is checked too: a tensor of such strides cannot be described.
    if (__builtin_mul_overflow(bytes, dim, &bytes) ||
        __builtin_mul_overflow(nonzero, std::max<uint64_t>(dim, 1), &nonzero) || nonzero > INT64_MAX)
      throw DataError(str(where, ": shape ", shape.dump(), " is larger than any file."));
    info.shape.push_back(static_cast<int64_t>(dim));
  }

  const Json& offsets = member(entry, "data_offsets", where);
  if (!offsets.is_array() || offsets.size() != 2) throw DataError(str(where, ": 'data_offsets' is not [begin, end]."));
  info.offset = unsigned_value(offsets[0], where, "'data_offsets'");
  uint64_t end = unsigned_value(offsets[1], where, "'data_offsets'");
  if (end < info.offset || end - info.offset != bytes)
    throw DataError(str(where, ": data_offsets [", info.offset, ", ", end, "] do not hold the ", bytes,
                        " bytes of shape ", shape.dump(), " in ", known->name, "."));
  info.bytes = bytes;
  return info;
}

}  // namespace

const char* safetensors_dtype_name(at::ScalarType dtype) {
  for (const DtypeName& known : kDtypes)
    if (known.dtype == dtype) return known.name;
  throw ConfigError(str("a safetensors file cannot hold values of type ", c10::toString(dtype), "."));
}

SafetensorsFile::SafetensorsFile(const std::string& path)
    : path_(path), file_(std::make_shared<MappedFile>(path)) {
  uint64_t size = file_->size();
  if (size < 8)
    throw DataError(
        str(path, ": too short for a safetensors file: ", size, " bytes, but the first 8 give the header's length."));
  if (file_->view().starts_with(kGitLfsPointer))
    throw DataError(str(path, ": a pointer of git-lfs, the file itself was not downloaded; run git lfs pull in its folder."));
  uint64_t header_bytes = read_length(file_->data());
  if (header_bytes > kMaxHeaderBytes && file_->view().starts_with('<'))
    throw DataError(str(path, ": not a safetensors file but a web page (HTML), as a server sends one that asks to log in or reports "
                        "an error; download the file again"));
  if (header_bytes > kMaxHeaderBytes)
    throw DataError(str(path, ": not a safetensors file: its header would have ", header_bytes, " bytes; ",
                        kMaxHeaderBytes, " are allowed."));
  if (header_bytes > size - 8)
    throw DataError(str(path, ": cut short: the header has ", header_bytes, " bytes, but the file ends after ",
                        size - 8, " of them. Download or copy it again."));
  std::string_view text(file_->data() + 8, header_bytes);
  if (text.empty() || text.front() != '{')
    throw DataError(str(path, ": not a safetensors file: its header does not begin with '{'."));

  const Json header = parse_json(text, path + ": header", 4);
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) throw DataError(str(path, ": '__metadata__' is not an object."));
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) throw DataError(str(path, ": '__metadata__' key '", key, "' is not a string."));
        metadata_[key] = value.get<std::string>();
      }
      continue;
    }
    infos_.emplace(name, parse_info(entry, str(path, ": tensor '", name, "'")));
    names_.push_back(name);
  }
  // Back to back from 0 to the end; an empty tensor sorts before the one that begins where it does.
  std::stable_sort(names_.begin(), names_.end(), [&](const auto& a, const auto& b) {
    const SafetensorsInfo &x = infos_.at(a), &y = infos_.at(b);
    return std::pair(x.offset, x.bytes) < std::pair(y.offset, y.bytes);
  });
  uint64_t values_begin = 8 + header_bytes, expected = 0;
  for (const std::string& name : names_) {
    SafetensorsInfo& info = infos_.at(name);
    if (info.offset != expected)
      throw DataError(str(path, ": tensor '", name, "' begins at ", info.offset, ", but the tensor before it ends at ",
                          expected, ": ", info.offset < expected ? "they overlap." : "there is a hole."));
    expected += info.bytes;
    if (expected > size - values_begin)
      throw DataError(str(path, ": cut short: tensor '", name, "' ends at ", expected, ", but only ",
                          size - values_begin, " bytes of values are there. Download or copy it again."));
    info.offset += values_begin;
  }
  if (expected != size - values_begin)
    throw DataError(
        str(path, ": the tensors end at ", expected, ", but ", size - values_begin, " bytes of values are there."));
}

const SafetensorsInfo& SafetensorsFile::info(const std::string& name) const {
  auto found = infos_.find(name);
  if (found == infos_.end()) throw DataError(str(path_, " has no tensor '", name, "'."));
  return found->second;
}

at::Tensor SafetensorsFile::view(const std::string& name) const {
  const SafetensorsInfo& tensor = info(name);
  if (tensor.bytes == 0) return at::empty(tensor.shape, tensor.dtype);
  char* data = const_cast<char*>(file_->data()) + tensor.offset;  // the mapping is read-only: writing would fault
  if (reinterpret_cast<uintptr_t>(data) % c10::elementSize(tensor.dtype) != 0) {
    at::Tensor copy = at::empty(tensor.shape, tensor.dtype);
    std::memcpy(copy.data_ptr(), data, tensor.bytes);
    return copy;
  }
  return at::from_blob(data, tensor.shape, [file = file_](void*) {}, tensor.dtype);
}

void SafetensorsFile::release(const std::string& name) const {
  const SafetensorsInfo& tensor = info(name);
  uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  uintptr_t begin = reinterpret_cast<uintptr_t>(file_->data()) + tensor.offset, end = begin + tensor.bytes;
  begin = begin / page * page;
  if (tensor.bytes > 0) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace trireme
