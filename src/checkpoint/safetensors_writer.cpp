#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <set>

#include "base/check.h"
#include "base/json.h"
#include "checkpoint/safetensors.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

uint64_t bytes_of(const TensorSource& tensor) {
  uint64_t bytes = c10::elementSize(tensor.dtype);
  for (int64_t dim : tensor.shape) bytes *= static_cast<uint64_t>(dim);
  return bytes;
}

// Large elements first keeps every tensor aligned to its element size, which some readers need.
std::vector<const TensorSource*> file_order(const std::vector<TensorSource>& tensors) {
  std::vector<const TensorSource*> order;
  for (const TensorSource& tensor : tensors) order.push_back(&tensor);
  std::stable_sort(order.begin(), order.end(), [](const TensorSource* a, const TensorSource* b) {
    return c10::elementSize(a->dtype) > c10::elementSize(b->dtype);
  });
  return order;
}

std::string make_header(const std::vector<const TensorSource*>& order, std::map<std::string, std::string> metadata) {
  metadata.emplace("format", "pt");
  Json header = Json::object();
  header["__metadata__"] = metadata;
  uint64_t offset = 0;
  std::set<std::string> seen;
  for (const TensorSource* tensor : order) {
    TRIREME_CHECK(seen.insert(tensor->name).second && tensor->name != "__metadata__", "tensor name ", tensor->name);
    uint64_t end = offset + bytes_of(*tensor);
    Json entry = {
        {"dtype", safetensors_dtype_name(tensor->dtype)}, {"shape", tensor->shape}, {"data_offsets", {offset, end}}};
    header.get_ref<Json::object_t&>().emplace_back(tensor->name, std::move(entry));  // operator[] would search: O(n^2)
    offset = end;
  }
  std::string text = dump_json(header);
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return text;
}

// A file that is written front to back under a temporary name. Gone, unless committed.
class PendingFile {
 public:
  PendingFile(const std::string& path, uint64_t bytes) : path_(path), temporary_(path + ".tmp") {
    fd_ = open(temporary_.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0666);
    if (fd_ < 0) fail("create");
    if (bytes > 0 && fallocate(fd_, 0, 0, static_cast<off_t>(bytes)) != 0 && errno != EOPNOTSUPP) {
      int reason = errno;
      discard();
      errno = reason;
      fail("write");
    }
  }
  ~PendingFile() { discard(); }
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;

  void append(const void* data, uint64_t bytes) {
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
      ssize_t done = write(fd_, from, std::min<uint64_t>(bytes, 64 << 20));
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) fail("write");
      from += done, bytes -= static_cast<uint64_t>(done);
    }
  }

  void sync() {
    if (fsync(fd_) != 0) fail("write");
    close(fd_);
    fd_ = -1;
  }

  void commit() {
    if (std::rename(temporary_.c_str(), path_.c_str()) != 0) fail("rename");
    committed_ = true;
  }

 private:
  [[noreturn]] void fail(const char* action) {
    throw SystemError(str("cannot ", action, " ", temporary_, ": ", errno_text(), "."));
  }
  void discard() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
    if (!committed_) unlink(temporary_.c_str());
  }

  std::string path_, temporary_;
  int fd_ = -1;
  bool committed_ = false;
};

at::Tensor fetch(const TensorSource& tensor) {
  at::Tensor value = tensor.get().detach();
  TRIREME_CHECK(value.sizes() == at::IntArrayRef(tensor.shape), tensor.name, " has shape ", shape_text(value.sizes()));
  return value.to(at::kCPU, tensor.dtype).contiguous();
}

// Writes the file but does not rename it yet. Every get() is called, whatever fails.
std::unique_ptr<PendingFile> write_pending(const std::string& path, const std::vector<TensorSource>& tensors,
                                           const std::map<std::string, std::string>& metadata, bool writes,
                                           std::exception_ptr& failure) {
  std::vector<const TensorSource*> order = file_order(tensors);
  std::unique_ptr<PendingFile> file;
  auto attempt = [&](auto&& action) {
    if (!writes || failure) return;
    try {
      action();
    } catch (...) {
      failure = std::current_exception();
    }
  };
  attempt([&] {
    std::string header = make_header(order, metadata);
    uint64_t bytes = 8 + header.size(), length = header.size();
    for (const TensorSource* tensor : order) bytes += bytes_of(*tensor);
    file = std::make_unique<PendingFile>(path, bytes);
    char prefix[8];
    for (int i = 0; i < 8; ++i) prefix[i] = static_cast<char>(length >> (8 * i));
    file->append(prefix, 8);
    file->append(header.data(), header.size());
  });
  for (const TensorSource* tensor : order) {
    if (!writes || failure) {
      tensor->get();
      continue;
    }
    at::Tensor value = fetch(*tensor);
    attempt([&] { file->append(value.data_ptr(), value.nbytes()); });
  }
  attempt([&] { file->sync(); });
  return file;
}

// Is `file` one that a save under this stem writes? model.safetensors, model-00001-of-00003.safetensors, their index.
bool belongs_to(const std::string& stem, const std::string& file) {
  if (file == stem + ".safetensors" || file == stem + ".safetensors.index.json") return true;
  int consumed = 0;
  return file.rfind(stem + "-", 0) == 0 &&
         std::sscanf(file.c_str() + stem.size(), "-%*5d-of-%*5d.safetensors%n", &consumed) == 0 && consumed > 0 &&
         stem.size() + static_cast<size_t>(consumed) == file.size();
}

}  // namespace

void write_safetensors(const std::string& path, const std::vector<TensorSource>& tensors,
                       const std::map<std::string, std::string>& metadata, bool writes) {
  std::exception_ptr failure;
  std::unique_ptr<PendingFile> file = write_pending(path, tensors, metadata, writes, failure);
  if (failure) std::rethrow_exception(failure);
  if (!writes) return;
  file->commit();
  fs::path folder = fs::path(path).parent_path();
  fsync_path(folder.empty() ? "." : folder.string());
}

void write_safetensors_folder(const std::string& folder, const std::vector<TensorSource>& tensors,
                              uint64_t max_shard_bytes, bool writes, const std::string& stem, const std::map<std::string, std::string>& metadata) {
  std::vector<std::vector<TensorSource>> shards(1);
  uint64_t filled = 0, total = 0;
  for (const TensorSource& tensor : tensors) {
    uint64_t bytes = bytes_of(tensor);
    if (!shards.back().empty() && filled + bytes > max_shard_bytes) shards.emplace_back(), filled = 0;
    shards.back().push_back(tensor);
    filled += bytes, total += bytes;
  }

  std::exception_ptr failure;
  std::vector<std::unique_ptr<PendingFile>> pending;
  std::set<std::string> written;
  Json weight_map = Json::object();
  if (writes) {
    std::error_code error;
    fs::create_directories(folder, error);
    if (error)
      failure = std::make_exception_ptr(SystemError(str("cannot create ", folder, ": ", error.message(), ".")));
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    char number[48] = "";
    if (shards.size() > 1) std::snprintf(number, sizeof number, "-%05zu-of-%05zu", i + 1, shards.size());
    std::string file = stem + number + ".safetensors";
    for (const TensorSource& tensor : shards[i])
      weight_map.get_ref<Json::object_t&>().emplace_back(tensor.name, file);
    pending.push_back(write_pending(folder + "/" + file, shards[i], metadata, writes, failure));
    written.insert(file);
  }
  if (failure) std::rethrow_exception(failure);
  if (!writes) return;

  for (auto& file : pending) file->commit();
  std::string index = stem + ".safetensors.index.json";
  if (shards.size() > 1) {
    write_file_atomic(folder + "/" + index,
                      dump_json_pretty({{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}}));
    written.insert(index);
  }
  std::vector<fs::path> stale;
  for (const auto& entry : fs::directory_iterator(folder)) {
    std::string name = entry.path().filename().string();
    if (belongs_to(stem, name) && !written.count(name)) stale.push_back(entry.path());
  }
  for (const fs::path& path : stale) fs::remove(path);
  fsync_path(folder);
}

}  // namespace trireme
