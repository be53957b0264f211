#include "base/hdf5.h"

#include <fcntl.h>
#include <hdf5.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>

namespace trireme {
namespace {

static_assert(std::endian::native == std::endian::little, "datasets are little-endian and read without conversion");
static_assert(sizeof(hid_t) == sizeof(int64_t));

constexpr uint64_t kMaxTransferBytes = 4 << 20;  // keeps one pwrite short, so that a killed or stopped thread ends soon
constexpr hsize_t kAlignmentBytes = 64;

// HDF5 prints its error stack unless told otherwise, once per thread. It also cleans up at the end of the process,
// which crashes when a file could not be closed (full disk); we close our files ourselves.
void silence() {
  static bool no_exit_handler = H5dont_atexit() >= 0;  // must come before any other call
  (void)no_exit_handler;
  thread_local bool silent = H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr) >= 0;
  (void)silent;
}

// The innermost entry of HDF5's error stack.
std::string reason() {
  std::string text;
  auto first = [](unsigned, const H5E_error2_t* entry, void* out) -> herr_t {
    auto* text = static_cast<std::string*>(out);
    if (text->empty() && entry->desc) *text = entry->desc;
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, first, &text);
  // "file write failed: time = ..., errno = 28, error message = 'No space left on device', buf = ..." says one thing.
  size_t begin = text.find("error message = '"), end = text.find('\'', begin + 17);
  if (begin < end && end != std::string::npos) return text.substr(begin + 17, end - begin - 17);
  return text.empty() ? "no reason given" : text;
}

// An HDF5 id that closes itself.
class Handle {
 public:
  Handle(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  ~Handle() {
    if (id_ >= 0) close_(id_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  operator hid_t() const { return id_; }
  bool ok() const { return id_ >= 0; }

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

struct FloatLayout {
  size_t sign, exponent, exponent_bits, mantissa_bits, bias;
};
constexpr FloatLayout kFloat16Layout{15, 10, 5, 10, 15};
constexpr FloatLayout kBfloat16Layout{15, 7, 8, 7, 127};

hid_t make_float(const FloatLayout& layout) {
  hid_t type = H5Tcopy(H5T_IEEE_F32LE);
  H5Tset_fields(type, layout.sign, layout.exponent, layout.exponent_bits, 0, layout.mantissa_bits);
  H5Tset_precision(type, 16);
  H5Tset_size(type, 2);
  H5Tset_ebias(type, layout.bias);
  return type;
}

hid_t make_type(Hdf5Type type) {
  switch (type) {
    case Hdf5Type::kUint8: return H5Tcopy(H5T_STD_U8LE);
    case Hdf5Type::kInt8: return H5Tcopy(H5T_STD_I8LE);
    case Hdf5Type::kInt16: return H5Tcopy(H5T_STD_I16LE);
    case Hdf5Type::kUint16: return H5Tcopy(H5T_STD_U16LE);
    case Hdf5Type::kInt32: return H5Tcopy(H5T_STD_I32LE);
    case Hdf5Type::kUint32: return H5Tcopy(H5T_STD_U32LE);
    case Hdf5Type::kInt64: return H5Tcopy(H5T_STD_I64LE);
    case Hdf5Type::kUint64: return H5Tcopy(H5T_STD_U64LE);
    case Hdf5Type::kFloat16: return make_float(kFloat16Layout);
    case Hdf5Type::kBfloat16: return make_float(kBfloat16Layout);
    case Hdf5Type::kFloat32: return H5Tcopy(H5T_IEEE_F32LE);
    case Hdf5Type::kFloat64: return H5Tcopy(H5T_IEEE_F64LE);
  }
  TRIREME_CHECK(false, "Hdf5Type ", static_cast<int>(type));
  return -1;
}

constexpr Hdf5Type kAllTypes[] = {Hdf5Type::kUint8,   Hdf5Type::kInt8,     Hdf5Type::kInt16,   Hdf5Type::kUint16,
                                  Hdf5Type::kInt32,   Hdf5Type::kUint32,   Hdf5Type::kInt64,   Hdf5Type::kUint64,
                                  Hdf5Type::kFloat16, Hdf5Type::kBfloat16, Hdf5Type::kFloat32, Hdf5Type::kFloat64};

Hdf5Type type_of(hid_t dataset, const std::string& where) {
  Handle stored(H5Dget_type(dataset), H5Tclose);
  for (Hdf5Type type : kAllTypes) {
    Handle candidate(make_type(type), H5Tclose);
    if (stored.ok() && H5Tequal(stored, candidate) > 0) return type;
  }
  throw DataError(str(where, " holds values of a type that Trireme does not write."));
}

Handle make_space(const std::vector<uint64_t>& shape) {
  if (shape.empty()) return {H5Screate(H5S_SCALAR), H5Sclose};
  std::vector<hsize_t> dims(shape.begin(), shape.end());
  return {H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr), H5Sclose};
}

Handle make_file_access() {
  hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_file_locking(access, false, true);
  H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
  H5Pset_alignment(access, 1, kAlignmentBytes);
  H5Pset_libver_bounds(access, H5F_LIBVER_V18, H5F_LIBVER_LATEST);  // attributes may be longer than 64 KB
  return {access, H5Pclose};
}

Handle make_link_creation() {
  hid_t links = H5Pcreate(H5P_LINK_CREATE);
  H5Pset_create_intermediate_group(links, 1);
  H5Pset_char_encoding(links, H5T_CSET_UTF8);
  return {links, H5Pclose};
}

Handle make_text_type() {
  hid_t type = H5Tcopy(H5T_C_S1);
  H5Tset_size(type, H5T_VARIABLE);
  H5Tset_cset(type, H5T_CSET_UTF8);
  return {type, H5Tclose};
}

int descriptor_of(hid_t file) {
  void* handle = nullptr;
  if (H5Fget_vfd_handle(file, H5P_DEFAULT, &handle) < 0 || !handle) return -1;
  return *static_cast<int*>(handle);
}

}  // namespace

uint64_t hdf5_type_bytes(Hdf5Type type) {
  switch (type) {
    case Hdf5Type::kUint8:
    case Hdf5Type::kInt8: return 1;
    case Hdf5Type::kInt16:
    case Hdf5Type::kUint16:
    case Hdf5Type::kFloat16:
    case Hdf5Type::kBfloat16: return 2;
    case Hdf5Type::kInt32:
    case Hdf5Type::kUint32:
    case Hdf5Type::kFloat32: return 4;
    case Hdf5Type::kInt64:
    case Hdf5Type::kUint64:
    case Hdf5Type::kFloat64: return 8;
  }
  return 0;
}

const char* hdf5_type_name(Hdf5Type type) {
  constexpr const char* kNames[] = {"uint8", "int8",   "int16",   "uint16",   "int32",   "uint32",
                                    "int64", "uint64", "float16", "bfloat16", "float32", "float64"};
  return kNames[static_cast<int>(type)];
}

// --- datasets
// ---------------------------------------------------------------------------------------------------------

Hdf5Dataset::Hdf5Dataset(int64_t id, std::string where) : id_(id), where_(std::move(where)) {
  fd_ = descriptor_of(Handle(H5Iget_file_id(id_), H5Fclose));  // through an external link it is another file
  Handle space(H5Dget_space(id_), H5Sclose);
  int rank = H5Sget_simple_extent_ndims(space);
  std::vector<hsize_t> dims(static_cast<size_t>(std::max(rank, 0)));
  if (rank > 0) H5Sget_simple_extent_dims(space, dims.data(), nullptr);
  shape_.assign(dims.begin(), dims.end());
  try {
    type_ = type_of(id_, where_);
    Handle creation(H5Dget_create_plist(id_), H5Pclose);
    if (rank < 0 || H5Pget_layout(creation) != H5D_CONTIGUOUS || H5Pget_external_count(creation) != 0)
      throw DataError(str(where_, " is not one contiguous array of numbers."));
    if (num_elements() == 0) return;
    haddr_t offset = H5Dget_offset(id_);
    struct stat status {};
    if (offset == HADDR_UNDEF || fstat(fd_, &status) != 0 || offset > static_cast<uint64_t>(status.st_size) ||
        num_elements() > (static_cast<uint64_t>(status.st_size) - offset) / hdf5_type_bytes(type_))
      throw DataError(str(where_, " lies outside its file: the file was cut short."));
    offset_ = offset;
  } catch (...) {
    H5Dclose(id_);
    throw;
  }
}

Hdf5Dataset::~Hdf5Dataset() {
  silence();
  if (id_ >= 0) H5Dclose(id_);
}

Hdf5Dataset::Hdf5Dataset(Hdf5Dataset&& other) noexcept
    : id_(std::exchange(other.id_, -1)), fd_(other.fd_), where_(std::move(other.where_)), type_(other.type_),
      shape_(std::move(other.shape_)), offset_(other.offset_) {}

uint64_t Hdf5Dataset::num_elements() const {
  uint64_t count = 1;
  for (uint64_t dim : shape_)
    if (__builtin_mul_overflow(count, dim, &count)) throw DataError(str(where_, " has an impossible shape."));
  return count;
}

void Hdf5Dataset::check_type(Hdf5Type wanted) const {
  if (type_ != wanted)
    throw DataError(str(where_, " holds ", hdf5_type_name(type_), ", not ", hdf5_type_name(wanted), "."));
}

void Hdf5Dataset::check_range(uint64_t first, uint64_t count) const {
  TRIREME_CHECK(first <= num_elements() && count <= num_elements() - first, where_, ": ", first, " + ", count, " of ",
                num_elements());
}

void Hdf5Dataset::write(const void* data, uint64_t first, uint64_t count) {
  check_range(first, count);
  const char* from = static_cast<const char*>(data);
  uint64_t at = offset_ + first * hdf5_type_bytes(type_), left = count * hdf5_type_bytes(type_);
  while (left > 0) {
    ssize_t done = pwrite(fd_, from, std::min(left, kMaxTransferBytes), static_cast<off_t>(at));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) throw SystemError(str("cannot write ", where_, ": ", errno_text(), "."));
    from += done, at += static_cast<uint64_t>(done), left -= static_cast<uint64_t>(done);
  }
}

void Hdf5Dataset::read(void* data, uint64_t first, uint64_t count) const {
  check_range(first, count);
  char* to = static_cast<char*>(data);
  uint64_t at = offset_ + first * hdf5_type_bytes(type_), left = count * hdf5_type_bytes(type_);
  while (left > 0) {
    ssize_t done = pread(fd_, to, std::min(left, kMaxTransferBytes), static_cast<off_t>(at));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) throw SystemError(str("cannot read ", where_, ": ", errno_text(), "."));
    if (done == 0) throw DataError(str(where_, " ends too early: the file was cut short."));
    to += done, at += static_cast<uint64_t>(done), left -= static_cast<uint64_t>(done);
  }
}

// --- files
// ------------------------------------------------------------------------------------------------------------

Hdf5File::Hdf5File(int64_t id, std::string path, bool writing) : id_(id), path_(std::move(path)), writing_(writing) {
  fd_ = descriptor_of(id_);
}

Hdf5File Hdf5File::create(const std::string& path) {
  silence();
  // HDF5's own message for this hides the reason in a paragraph.
  int fd = ::open(path.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0666);
  if (fd < 0) throw SystemError(str("cannot create ", path, ": ", errno_text(), "."));
  ::close(fd);
  Handle access = make_file_access();
  hid_t id = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access);
  if (id < 0) throw SystemError(str("cannot create ", path, ": ", reason(), "."));
  return Hdf5File(id, path, true);
}

Hdf5File Hdf5File::open(const std::string& path) {
  silence();
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw DataError(str("cannot open ", path, ": ", errno_text(), "."));
  ::close(fd);
  Handle access = make_file_access();
  hid_t id = H5Fopen(path.c_str(), H5F_ACC_RDONLY, access);
  if (id < 0) throw DataError(str(path, " is not a whole HDF5 file: ", reason(), "."));
  return Hdf5File(id, path, false);
}

Hdf5File::Hdf5File(Hdf5File&& other) noexcept
    : id_(std::exchange(other.id_, -1)), fd_(other.fd_), path_(std::move(other.path_)), writing_(other.writing_) {}

// Closes a file that may not be writable any more: what HDF5 still wants to write then goes to memory.
void Hdf5File::abandon() noexcept {
  if (writing_ && H5Fflush(id_, H5F_SCOPE_LOCAL) < 0 && fd_ >= 0) {
    int memory = memfd_create("abandoned", MFD_CLOEXEC);
    if (memory >= 0) dup2(memory, fd_), ::close(memory);
  }
  H5Fclose(id_);
  id_ = -1;
}

Hdf5File::~Hdf5File() {
  silence();
  if (id_ >= 0) abandon();
}

void Hdf5File::close() {
  silence();
  TRIREME_CHECK(id_ >= 0, path_, " is closed already");
  TRIREME_CHECK(H5Fget_obj_count(id_, H5F_OBJ_DATASET | H5F_OBJ_LOCAL) == 0, path_, " has open datasets");
  if (writing_ && H5Fflush(id_, H5F_SCOPE_LOCAL) < 0) {
    std::string why = reason();
    abandon();
    throw SystemError(str("cannot write ", path_, ": ", why, "."));
  }
  herr_t status = H5Fclose(std::exchange(id_, -1));
  if (status < 0) throw SystemError(str("cannot close ", path_, ": ", reason(), "."));
}

Hdf5Dataset Hdf5File::create_dataset(const std::string& name, Hdf5Type type, const std::vector<uint64_t>& shape) {
  silence();
  std::string where = str(path_, ": dataset ", name);
  Handle kind(make_type(type), H5Tclose);
  Handle space = make_space(shape), links = make_link_creation();
  Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  H5Pset_layout(creation, H5D_CONTIGUOUS);
  H5Pset_alloc_time(creation, H5D_ALLOC_TIME_EARLY);
  H5Pset_fill_time(creation, H5D_FILL_TIME_NEVER);
  Handle id(H5Dcreate2(id_, name.c_str(), kind, space, links, creation, H5P_DEFAULT), H5Dclose);
  if (!id.ok()) throw SystemError(str("cannot create ", where, ": ", reason(), "."));
  haddr_t end = 0;
  struct stat status {};
  if (H5Fget_eoa(id_, &end) < 0 || fstat(fd_, &status) != 0)
    throw SystemError(str("cannot create ", where, ": ", reason(), "."));
  if (end > static_cast<uint64_t>(status.st_size)) {
    off_t from = status.st_size, bytes = static_cast<off_t>(end) - status.st_size;
    // Where the file system cannot reserve space, the file only gets its length, and pwrite tells of a full disk.
    if (fallocate(fd_, 0, from, bytes) != 0 && (errno != EOPNOTSUPP || ftruncate(fd_, static_cast<off_t>(end)) != 0)) {
      std::string why = errno_text();
      H5Ldelete(id_, name.c_str(), H5P_DEFAULT);  // or closing would ask for the space again
      throw SystemError(str("cannot write ", path_, ": ", why, " (", end, " bytes needed so far)."));
    }
  }
  H5Iinc_ref(id);
  return Hdf5Dataset(id, where);
}

Hdf5Dataset Hdf5File::open_dataset(const std::string& name) const {
  silence();
  hid_t id = has_dataset(name) ? H5Dopen2(id_, name.c_str(), H5P_DEFAULT) : -1;
  if (id < 0) throw DataError(str(path_, " has no dataset ", name, "."));
  return Hdf5Dataset(id, str(path_, ": dataset ", name));
}

bool Hdf5File::has_dataset(const std::string& name) const {
  silence();
  H5O_info_t info;
  return H5Oget_info_by_name(id_, name.c_str(), &info, H5P_DEFAULT) >= 0 && info.type == H5O_TYPE_DATASET;
}

std::vector<std::string> Hdf5File::dataset_names() const {
  silence();
  std::vector<std::string> links, names;
  auto add = [](hid_t, const char* name, const H5L_info_t*, void* out) -> herr_t {
    static_cast<std::vector<std::string>*>(out)->emplace_back(name);
    return 0;
  };
  if (H5Lvisit(id_, H5_INDEX_NAME, H5_ITER_INC, add, &links) < 0)
    throw DataError(str("cannot list ", path_, ": ", reason(), "."));
  std::copy_if(links.begin(), links.end(), std::back_inserter(names), [&](const auto& n) { return has_dataset(n); });
  std::sort(names.begin(), names.end());
  return names;
}

void Hdf5File::create_virtual_dataset(const std::string& name, Hdf5Type type, const std::vector<uint64_t>& shape,
                                      const std::vector<Hdf5Piece>& pieces) {
  silence();
  Handle kind(make_type(type), H5Tclose);
  Handle space = make_space(shape), links = make_link_creation();
  Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  for (const Hdf5Piece& piece : pieces) {
    Handle source = make_space(piece.shape);
    std::vector<hsize_t> start(piece.offset.begin(), piece.offset.end()), count(piece.shape.begin(), piece.shape.end());
    if (!shape.empty()) H5Sselect_hyperslab(space, H5S_SELECT_SET, start.data(), nullptr, count.data(), nullptr);
    if (H5Pset_virtual(creation, space, piece.file.c_str(), piece.dataset.c_str(), source) < 0)
      throw SystemError(str("cannot describe ", path_, ": dataset ", name, ": ", reason(), "."));
  }
  H5Sselect_all(space);
  Handle id(H5Dcreate2(id_, name.c_str(), kind, space, links, creation, H5P_DEFAULT), H5Dclose);
  if (!id.ok()) throw SystemError(str("cannot create ", path_, ": dataset ", name, ": ", reason(), "."));
}

void Hdf5File::create_external_link(const std::string& name, const std::string& file, const std::string& dataset) {
  silence();
  Handle links = make_link_creation();
  if (H5Lcreate_external(file.c_str(), dataset.c_str(), id_, name.c_str(), links, H5P_DEFAULT) < 0)
    throw SystemError(str("cannot create ", path_, ": link ", name, ": ", reason(), "."));
}

void Hdf5File::set_attribute(const std::string& name, std::string_view text) {
  silence();
  Handle kind = make_text_type();
  Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  if (has_attribute(name)) H5Adelete(id_, name.c_str());
  Handle id(H5Acreate2(id_, name.c_str(), kind, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
  std::string copy(text);
  const char* value = copy.c_str();
  if (!id.ok() || H5Awrite(id, kind, &value) < 0)
    throw SystemError(str("cannot write ", path_, ": attribute ", name, ": ", reason(), "."));
}

std::string Hdf5File::attribute(const std::string& name) const {
  silence();
  if (!has_attribute(name)) throw DataError(str(path_, " has no attribute ", name, "."));
  Handle id(H5Aopen(id_, name.c_str(), H5P_DEFAULT), H5Aclose);
  Handle kind = make_text_type();
  char* value = nullptr;
  if (!id.ok() || H5Aread(id, kind, &value) < 0)
    throw DataError(str(path_, ": attribute ", name, " is not text: ", reason(), "."));
  std::string text = value ? value : "";
  H5free_memory(value);
  return text;
}

bool Hdf5File::has_attribute(const std::string& name) const {
  silence();
  return H5Aexists(id_, name.c_str()) > 0;
}

}  // namespace trireme
