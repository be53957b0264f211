// Files: whole reads, memory maps, atomic and durable writes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace trireme {

// Whole file as bytes. DataError: missing, a folder, unreadable, larger than max_bytes.
std::string read_file(const std::string& path, uint64_t max_bytes = ~0ull);

// Writes path.tmp, fsyncs it, renames it over path and fsyncs the folder: a reader sees the old file or the new one.
// SystemError names path and reason (full disk, no permission).
void write_file_atomic(const std::string& path, std::string_view bytes);

void fsync_path(const std::string& path);  // a file or a folder

// How a file begins that git left in place of one that git-lfs was to download.
inline constexpr char kGitLfsPointer[] = "version https://git-lfs";

// A file mapped read-only. Movable. DataError where it cannot be opened or is empty.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  const char* data() const { return data_; }
  uint64_t size() const { return size_; }
  std::string_view view() const { return {data_, size_}; }

 private:
  const char* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace trireme
