// The safetensors format (https://github.com/huggingface/safetensors): 8 bytes header length N, N bytes of JSON
// {name: {dtype, shape, data_offsets}}, then the values, little-endian and row-major.
//
// A file that comes in is foreign. It is accepted only if it keeps every rule of the format's own Rust reader: N at
// most 100,000,000, header begins with '{', is valid UTF-8 and JSON without duplicate keys; tensors lie back to back
// from 0 to the end of the file without hole or overlap; sizes agree with shape and dtype, computed without overflow.
// Anything else is a DataError that names file, tensor and values.
#pragma once

#include "base/file.h"
#include "base/tensor.h"

namespace trireme {

struct SafetensorsInfo {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  uint64_t offset;  // of the first byte in the file
  uint64_t bytes;
};

// Names as in files: F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL F8_E4M3 F8_E5M2.
const char* safetensors_dtype_name(at::ScalarType dtype);  // ConfigError for a dtype that the format lacks

inline std::string shape_text(at::IntArrayRef shape) { return c10::str(shape); }  // [2, 3]

class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return path_; }
  const std::vector<std::string>& names() const { return names_; }  // by offset in the file
  bool contains(const std::string& name) const { return infos_.count(name) != 0; }
  const SafetensorsInfo& info(const std::string& name) const;  // DataError where there is no such tensor
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // The tensor, read-only, as a view of the mapped file, which it keeps alive; a copy where the file does not align it.
  // Whoever truncates the file meanwhile kills the reader: for files that may change use load_weights(), which reads.
  at::Tensor view(const std::string& name) const;

  // Tells the system that the pages of this tensor are not needed any more, so that they stop counting as memory.
  void release(const std::string& name) const;

 private:
  std::string path_;
  std::shared_ptr<MappedFile> file_;
  std::vector<std::string> names_;
  std::map<std::string, SafetensorsInfo> infos_;
  std::map<std::string, std::string> metadata_;
};

// A tensor to be written. `get` is called once, when its turn comes, so that only one tensor must be in memory; it may
// be a collective that gathers the tensor from all ranks.
struct TensorSource {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  std::function<at::Tensor()> get;  // of that shape; any device, any dtype (it is converted)

  static TensorSource of(const std::string& name, const at::Tensor& value) {
    return {name, value.scalar_type(), value.sizes().vec(), [value] { return value; }};
  }
};

// Writes one file: to path.tmp, synced, then renamed, with space reserved first. Metadata "format": "pt" is added,
// which transformers wants. Tensors are stored by descending element size, else in the given order. SystemError names
// path and reason.
void write_safetensors(const std::string& path, const std::vector<TensorSource>& tensors,
                       const std::map<std::string, std::string>& metadata = {}, bool writes = true);

constexpr uint64_t kMaxShardBytes = 5'000'000'000;

// Writes `folder`/<stem>.safetensors, or, above max_shard_bytes, <stem>-00001-of-0000N.safetensors with
// <stem>.safetensors.index.json, the names that transformers reads; files of an earlier save under this stem go.
// With `writes` false (also above) nothing is written, but every get() is called in the same order: the other ranks of a
// gathering save call it so. A rank that fails to write still calls every get() before it throws, so no peer waits for ever.
void write_safetensors_folder(const std::string& folder, const std::vector<TensorSource>& tensors,
                              uint64_t max_shard_bytes = kMaxShardBytes, bool writes = true,
                              const std::string& stem = "model", const std::map<std::string, std::string>& metadata = {});

}  // namespace trireme
