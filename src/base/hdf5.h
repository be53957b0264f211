// HDF5 files: whole contiguous datasets of plain numbers, and text attributes. The one place that knows the C API.
//
// HDF5 lays out the file; the values themselves go by pread and pwrite at the dataset's offset, because Debian's HDF5
// 1.10 holds one global lock during every call and a token reader must not wait for a checkpoint being written. Space
// is reserved when a dataset is created, so a full disk is told before anything is written. File locking is off
// (network file systems lack it; our files have a single writer). Data is aligned to 64 bytes. HDF5 parsers have a
// history of memory errors: open only files whose hash is known, never a stranger's.
//
// SystemError: cannot be created or written (the path and HDF5's own reason are named). DataError: cannot be opened or
// read, no such dataset or attribute, another type or shape than asked for. HDF5 itself prints nothing.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"

namespace trireme {

// bfloat16 is a custom 16-bit float type, which h5py and h5dump show as numbers.
enum class Hdf5Type {
  kUint8,
  kInt8,
  kInt16,
  kUint16,
  kInt32,
  kUint32,
  kInt64,
  kUint64,
  kFloat16,
  kBfloat16,
  kFloat32,
  kFloat64
};
uint64_t hdf5_type_bytes(Hdf5Type type);
const char* hdf5_type_name(Hdf5Type type);  // uint8, ..., float64

template <typename T>
constexpr Hdf5Type hdf5_type_of();
template <> constexpr Hdf5Type hdf5_type_of<uint8_t>() { return Hdf5Type::kUint8; }
template <> constexpr Hdf5Type hdf5_type_of<int8_t>() { return Hdf5Type::kInt8; }
template <> constexpr Hdf5Type hdf5_type_of<int16_t>() { return Hdf5Type::kInt16; }
template <> constexpr Hdf5Type hdf5_type_of<uint16_t>() { return Hdf5Type::kUint16; }
template <> constexpr Hdf5Type hdf5_type_of<int32_t>() { return Hdf5Type::kInt32; }
template <> constexpr Hdf5Type hdf5_type_of<uint32_t>() { return Hdf5Type::kUint32; }
template <> constexpr Hdf5Type hdf5_type_of<int64_t>() { return Hdf5Type::kInt64; }
template <> constexpr Hdf5Type hdf5_type_of<uint64_t>() { return Hdf5Type::kUint64; }
template <> constexpr Hdf5Type hdf5_type_of<float>() { return Hdf5Type::kFloat32; }
template <> constexpr Hdf5Type hdf5_type_of<double>() { return Hdf5Type::kFloat64; }

// A contiguous dataset. Lives no longer than its file. Movable; read() may be called from several threads. `first` and
// `count` are elements in row-major order.
class Hdf5Dataset {
 public:
  ~Hdf5Dataset();
  Hdf5Dataset(Hdf5Dataset&& other) noexcept;
  Hdf5Dataset& operator=(Hdf5Dataset&&) = delete;

  Hdf5Type type() const { return type_; }
  const std::vector<uint64_t>& shape() const { return shape_; }
  uint64_t num_elements() const;

  // Raw values in the dataset's own type; no conversion.
  void write(const void* data, uint64_t first, uint64_t count);
  void read(void* data, uint64_t first, uint64_t count) const;
  template <typename T>
  void write_all(const std::vector<T>& values);       // same type, else DataError; same number, else InternalError
  template <typename T>
  std::vector<T> read_all() const;                    // DataError where the type differs

  // Byte offset of the first element in the file: element i is the little-endian value at offset + i * type bytes.
  // Valid from creation on, and stays so. 0 where the dataset is empty.
  uint64_t file_offset() const { return offset_; }

 private:
  friend class Hdf5File;
  Hdf5Dataset(int64_t id, std::string where);
  void check_type(Hdf5Type wanted) const;
  void check_range(uint64_t first, uint64_t count) const;

  int64_t id_;
  int fd_ = -1;  // HDF5's own, of the file that holds the values
  std::string where_;  // "file: dataset"; begins messages
  Hdf5Type type_ = Hdf5Type::kUint8;
  std::vector<uint64_t> shape_;
  uint64_t offset_ = 0;
};

// One part of a virtual dataset: all of `dataset` in `file` (relative to the folder of the virtual file) placed at
// `offset`.
struct Hdf5Piece {
  std::string file, dataset;
  std::vector<uint64_t> offset, shape;
};

class Hdf5File {
 public:
  static Hdf5File create(const std::string& path);       // replaces a file that is there
  static Hdf5File open(const std::string& path);         // to read
  ~Hdf5File();                                           // closes; failures are only seen by close()
  Hdf5File(Hdf5File&& other) noexcept;
  Hdf5File& operator=(Hdf5File&&) = delete;

  const std::string& path() const { return path_; }

  // Space is reserved at once and not filled. '/' in a name makes groups. An empty shape is a scalar; a dim may be 0.
  Hdf5Dataset create_dataset(const std::string& name, Hdf5Type type, const std::vector<uint64_t>& shape);
  Hdf5Dataset open_dataset(const std::string& name) const;
  bool has_dataset(const std::string& name) const;
  std::vector<std::string> dataset_names() const;         // of all groups, sorted
  // For viewers: missing files read as zeros without an error, so programs must read the pieces themselves.
  void create_virtual_dataset(const std::string& name, Hdf5Type type, const std::vector<uint64_t>& shape,
                              const std::vector<Hdf5Piece>& pieces);

  // A name that leads to a dataset of another file (relative to the folder of this one).
  void create_external_link(const std::string& name, const std::string& file, const std::string& dataset);

  // UTF-8 text attributes of the file's root.
  void set_attribute(const std::string& name, std::string_view text);
  std::string attribute(const std::string& name) const;
  bool has_attribute(const std::string& name) const;

  // Writes what HDF5 holds back and closes; all datasets must be gone. SystemError. Does not sync to disk: fsync_path()
  // does.
  void close();

 private:
  Hdf5File(int64_t id, std::string path, bool writing);
  void abandon() noexcept;

  int64_t id_;
  int fd_ = -1;  // HDF5's own
  std::string path_;
  bool writing_;
};

template <typename T>
void Hdf5Dataset::write_all(const std::vector<T>& values) {
  check_type(hdf5_type_of<T>());
  TRIREME_CHECK(values.size() == num_elements(), where_, ": ", values.size(), " values for ", num_elements());
  write(values.data(), 0, values.size());
}

template <typename T>
std::vector<T> Hdf5Dataset::read_all() const {
  check_type(hdf5_type_of<T>());
  std::vector<T> values(num_elements());
  read(values.data(), 0, values.size());
  return values;
}

}  // namespace trireme
