#include "base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <utility>

#include "base/check.h"

namespace trireme {
namespace {

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

uint64_t open_size(const std::string& path, int fd) {
  struct stat info {};
  if (fd < 0) throw DataError(str("cannot open ", path, ": ", errno_text()));
  if (::fstat(fd, &info) != 0) throw DataError(str("cannot read ", path, ": ", errno_text()));
  if (S_ISDIR(info.st_mode)) throw DataError(str(path, " is a folder, a file is expected"));
  return static_cast<uint64_t>(info.st_size);
}

}  // namespace

std::string read_file(const std::string& path, uint64_t max_bytes) {
  Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  uint64_t expected = open_size(path, file.fd);
  if (expected > max_bytes)
    throw DataError(str(path, " has ", expected, " bytes; at most ", max_bytes, " are read of such a file"));
  std::string bytes;
  bytes.reserve(expected);
  char piece[1 << 16];
  for (;;) {  // to the end, not to st_size: pipes and /proc files report 0
    ssize_t n = ::read(file.fd, piece, sizeof piece);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw DataError(str("cannot read ", path, ": ", errno_text()));
    if (n == 0) return bytes;
    bytes.append(piece, static_cast<size_t>(n));
    if (bytes.size() > max_bytes) throw DataError(str(path, " has more than ", max_bytes, " bytes"));
  }
}

void fsync_path(const std::string& path) {
  Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd < 0 || ::fsync(file.fd) != 0) throw SystemError(str("cannot sync ", path, ": ", errno_text()));
}

void write_file_atomic(const std::string& path, std::string_view bytes) {
  std::string temporary = path + ".tmp";
  {
    Descriptor file{::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)};
    if (file.fd < 0) throw SystemError(str("cannot write ", path, ": ", errno_text()));
    for (size_t done = 0; done < bytes.size();) {
      ssize_t n = ::write(file.fd, bytes.data() + done, bytes.size() - done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) throw SystemError(str("cannot write ", path, ": ", errno_text()));
      done += static_cast<size_t>(n);
    }
    if (::fsync(file.fd) != 0) throw SystemError(str("cannot sync ", path, ": ", errno_text()));
  }
  if (::rename(temporary.c_str(), path.c_str()) != 0)
    throw SystemError(str("cannot rename ", temporary, " to ", path, ": ", errno_text()));
  auto folder = std::filesystem::path(path).parent_path();
  fsync_path(folder.empty() ? "." : folder.string());
}

MappedFile::MappedFile(const std::string& path) {
  Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  size_ = open_size(path, file.fd);
  if (size_ == 0) throw DataError(str(path, " is empty"));
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (address == MAP_FAILED) throw DataError(str("cannot map ", path, ": ", errno_text()));
  data_ = static_cast<const char*>(address);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<char*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

}  // namespace trireme
