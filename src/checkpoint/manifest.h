// manifest.json of a checkpoint <-> what it says. Written last, so a folder that has one was complete once.
#pragma once

#include "base/hdf5.h"
#include "base/json.h"
#include "base/tensor.h"

namespace trireme {

constexpr int64_t kCheckpointVersion = 1;

struct StoredPiece {
  std::string file, dataset;
  std::vector<int64_t> offset, shape;  // of the slice within the whole tensor
};

struct StoredTensor {
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape;
  std::vector<StoredPiece> pieces;  // disjoint; together the whole
};

struct StoredFile {
  uint64_t bytes = 0;
  std::string hash;  // XXH3-128
};

struct Manifest {
  int64_t step = 0;
  std::map<std::string, StoredFile> files;
  std::map<std::string, StoredTensor> tensors;
  Json state;
};

// Element types that a checkpoint can hold: a bool is a byte in HDF5. ConfigError for others.
Hdf5Type hdf5_type_for(at::ScalarType dtype);
std::string stored_dtype_name(at::ScalarType dtype);  // float32, bfloat16, int64, bool, ...
at::ScalarType stored_dtype(const std::string& name);  // the reverse; DataError for an unknown name

Json manifest_to_json(const Manifest& manifest);

// A checkpoint's folder is "step-N". step_of() gives N, and -1 for any other name.
std::string step_name(int64_t step);
int64_t step_of(const std::string& name);

// Reads manifest.json of a checkpoint folder and checks it against manifest.hash. DataError: missing, damaged, written
// by a later version, of another step than the folder's name says, or it contradicts itself.
Manifest read_manifest(const std::string& folder);

// Writes manifest.json and manifest.hash. SystemError.
void write_manifest(const std::string& folder, const Manifest& manifest);

// Compares a file of the checkpoint with what the manifest says; "" where it is the same, else what is wrong.
std::string damage_of(const std::string& folder, const std::string& file, const StoredFile& expected);

}  // namespace trireme
