// Weights from a Hugging Face model folder into tensors that are there already.
#pragma once

#include "base/parameter.h"
#include "checkpoint/safetensors.h"

namespace trireme {

// All tensors of a folder: <stem>.safetensors, or the shards that <stem>.safetensors.index.json lists. DataError: the
// folder is missing or empty, has no safetensors (a .bin or .pt is never opened: pickle runs code), the index names a
// missing file, a file outside the folder, or a tensor that is not where it says.
class SafetensorsFolder {
 public:
  explicit SafetensorsFolder(const std::string& folder, const std::string& stem = "model");

  const std::string& folder() const { return folder_; }
  std::vector<std::string> names() const;  // sorted
  bool contains(const std::string& name) const { return file_of_.count(name) != 0; }
  const SafetensorsFile& file_of(const std::string& name) const;  // DataError where there is no such tensor
  const SafetensorsInfo& info(const std::string& name) const { return file_of(name).info(name); }
  at::Tensor view(const std::string& name) const { return file_of(name).view(name); }

 private:
  void add(const std::string& file);

  std::string folder_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, size_t> file_of_;  // tensor -> files_
};

struct LoadOptions {
  std::string stem = "model";
  // Name in the file of the tensor with this name; empty: the same.
  std::function<std::string(const std::string&)> name_in_file;
  // A tensor is also found without this prefix: folders of a bare model (no head) lack it.
  std::string optional_prefix = "model.";
  // Surplus tensors whose names end so are passed over: a stored copy of a tied head, and rotary buffers of old files.
  std::vector<std::string> tolerated = {"lm_head.weight", "rotary_emb.inv_freq"};
  std::function<bool(const std::string&)> elsewhere;  // surplus tensors that other ranks hold; empty: none
  bool headers_only = false;  // names and shapes are checked, nothing is read
  bool partial = false;       // the targets are some of the model's: nothing is surplus
};

// Fills every target with the slice that its shard names, converted to the target's dtype, on its device. Everything is
// checked before the first byte is read; then every byte needed is read once, by all threads, straight into its place;
// memory grows by no more than the largest tensor. DataError lists what is missing, what is surplus, and shapes that
// differ; a file cut short meanwhile is one too.
void load_weights(const SafetensorsFolder& folder, const std::vector<Parameter>& targets, const LoadOptions& options = {});
void load_weights(const std::string& folder, const std::vector<Parameter>& targets, const LoadOptions& options = {});

uint64_t weight_bytes_read();  // from files of weights, by this process so far

}  // namespace trireme
