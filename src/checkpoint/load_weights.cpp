#include "checkpoint/load_weights.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <filesystem>
#include <set>

#include "base/check.h"
#include "base/json.h"
#include "checkpoint/huge_pages.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kChunkBytes = 1 << 20;  // of one read: fits the cache, so that converting it costs no memory traffic
constexpr size_t kMaxListed = 8;           // names in one message

std::atomic<uint64_t> bytes_read{0};

// "a, b, c and 12 more"
std::string listed(const std::vector<std::string>& items) {
  std::string text;
  for (size_t i = 0; i < std::min(items.size(), kMaxListed); ++i) text += (i ? ", " : "") + items[i];
  if (items.size() > kMaxListed) text += str(" and ", items.size() - kMaxListed, " more");
  return text;
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

class Descriptor {
 public:
  explicit Descriptor(const std::string& path) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) throw DataError(str("cannot open ", path, ": ", errno_text(), "."));
    posix_fadvise(fd_, 0, 0, POSIX_FADV_SEQUENTIAL);
  }
  ~Descriptor() { close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  operator int() const { return fd_; }

 private:
  int fd_;
};

void read_exactly(int fd, char* to, uint64_t bytes, uint64_t offset, const std::string& path) {
  while (bytes > 0) {
    ssize_t done = pread(fd, to, bytes, static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) throw SystemError(str("cannot read ", path, ": ", errno_text(), "."));
    if (done == 0) throw DataError(str(path, " was cut short while it was read."));
    to += done, offset += static_cast<uint64_t>(done), bytes -= static_cast<uint64_t>(done);
  }
}

// One target and the tensor that fills it.
struct Match {
  const Parameter* target;
  std::string name;  // in the file
  const SafetensorsFile* file;
};

// Is the slice one run of bytes in the file? Whole rows are, and a part of one row.
bool is_run(const Parameter& target) {
  bool is_one = true;  // so far, of the dims before
  for (int64_t d = 0; d < target.value.dim(); ++d) {
    if (!is_one && target.value.size(d) != target.shard.global_shape[static_cast<size_t>(d)]) return false;
    is_one = is_one && target.value.size(d) == 1;
  }
  return true;
}

// Elements of the whole tensor before the slice's first, row-major.
int64_t first_element(const ShardSpec& shard) {
  int64_t first = 0;
  for (size_t d = 0; d < shard.offset.size(); ++d) first = first * shard.global_shape[d] + shard.offset[d];
  return first;
}

// A piece of work for one thread: `count` elements of a run, from element `first` of the target on.
struct Piece {
  const Match* match;
  int64_t first, count;
};

void read_piece(const Piece& piece, int fd) {
  const Match& match = *piece.match;
  const SafetensorsInfo& info = match.file->info(match.name);
  uint64_t item = c10::elementSize(info.dtype);
  const Parameter& target = *match.target;
  uint64_t offset = info.offset + static_cast<uint64_t>(first_element(target.shard) + piece.first) * item;
  bytes_read += static_cast<uint64_t>(piece.count) * item;

  at::Tensor flat = target.value.detach().view({-1}).narrow(0, piece.first, piece.count);
  if (flat.is_cpu() && flat.scalar_type() == info.dtype) {
    read_exactly(fd, static_cast<char*>(flat.data_ptr()), static_cast<uint64_t>(piece.count) * item, offset,
                 match.file->path());
    return;
  }
  at::Tensor buffer = at::empty({piece.count}, info.dtype);
  read_exactly(fd, static_cast<char*>(buffer.data_ptr()), buffer.nbytes(), offset, match.file->path());
  flat.copy_(buffer);
}

// Columns, or a target that is not contiguous: through the map, which touches only the pages that hold the slice.
void copy_slice(const Match& match) {
  const Parameter& target = *match.target;
  at::Tensor source = match.file->view(match.name);
  for (int64_t d = 0; d < source.dim(); ++d)
    source = source.narrow(d, target.shard.offset[static_cast<size_t>(d)], target.value.size(d));
  target.value.detach().copy_(source);
  bytes_read += source.nbytes();
  match.file->release(match.name);
}

void check_shard(const Parameter& target) {
  const ShardSpec& shard = target.shard;
  auto dims = static_cast<size_t>(target.value.dim());
  TRIREME_CHECK(shard.global_shape.size() == dims && shard.offset.size() == dims, target.name);
  for (size_t d = 0; d < dims; ++d)
    TRIREME_CHECK(
        shard.offset[d] >= 0 && shard.offset[d] + target.value.size(static_cast<int64_t>(d)) <= shard.global_shape[d],
        target.name, " dim ", d);
}

std::vector<Match> match_targets(const SafetensorsFolder& folder, const std::vector<Parameter>& targets,
                                 const LoadOptions& options) {
  std::vector<Match> matches;
  std::vector<std::string> missing, surplus, differing;
  std::set<std::string> used;
  for (const Parameter& target : targets) {
    check_shard(target);
    std::string name = options.name_in_file ? options.name_in_file(target.name) : target.name;
    const std::string& prefix = options.optional_prefix;
    if (!folder.contains(name) && !prefix.empty() && name.rfind(prefix, 0) == 0 &&
        folder.contains(name.substr(prefix.size())))
      name = name.substr(prefix.size());
    if (!folder.contains(name)) {
      missing.push_back(name);
      continue;
    }
    used.insert(name);
    const SafetensorsFile& file = folder.file_of(name);
    if (file.info(name).shape != target.shard.global_shape)
      differing.push_back(str(name, " is ", shape_text(file.info(name).shape), " in the file, but the model's is ",
                              shape_text(target.shard.global_shape)));
    matches.push_back({&target, name, &file});
  }
  auto elsewhere = [&](const std::string& name) {
    return options.elsewhere && (options.elsewhere(name) || options.elsewhere(options.optional_prefix + name));
  };
  for (const std::string& name : options.partial ? std::vector<std::string>() : folder.names())
    if (!used.count(name) && !elsewhere(name) && std::none_of(options.tolerated.begin(), options.tolerated.end(),
                                          [&](const std::string& end) { return ends_with(name, end); }))
      surplus.push_back(name);

  std::string text;
  if (!missing.empty()) text += str(" Missing (", missing.size(), "): ", listed(missing), ".");
  if (!surplus.empty()) text += str(" Not part of the model (", surplus.size(), "): ", listed(surplus), ".");
  if (!differing.empty()) text += str(" Of another shape (", differing.size(), "): ", listed(differing), ".");
  if (!text.empty())
    throw DataError(str(folder.folder(), ": the tensors are not those of the model that config.json describes.", text));
  return matches;
}

}  // namespace

// --- the folder
// -------------------------------------------------------------------------------------------------------

SafetensorsFolder::SafetensorsFolder(const std::string& folder, const std::string& stem) : folder_(folder) {
  std::error_code error;
  if (!fs::exists(folder, error)) throw DataError(str("model folder ", folder, " does not exist."));
  if (!fs::is_directory(folder, error)) throw DataError(str("model folder ", folder, " is not a folder."));
  std::string single = stem + ".safetensors", index = single + ".index.json";
  if (fs::exists(folder + "/" + single, error)) {
    add(single);
    return;
  }
  if (!fs::exists(folder + "/" + index, error)) {
    bool empty = true;
    std::string pickle;
    for (const auto& entry : fs::directory_iterator(folder, error)) {
      empty = false;
      std::string ending = entry.path().extension().string();
      if (ending == ".bin" || ending == ".pt" || ending == ".pth" || ending == ".ckpt")
        pickle = entry.path().filename().string();
    }
    if (error) throw DataError(str("cannot list ", folder, ": ", error.message(), "."));
    if (empty) throw DataError(str("model folder ", folder, " is empty."));
    if (!pickle.empty())
      throw DataError(str(folder, " has no ", single, ", only ", pickle,
                          ", a pickle, which can run code and is not read: ",
                          "convert it to safetensors (transformers: from_pretrained, then save_pretrained)."));
    throw DataError(str(folder, " has neither ", single, " nor ", index, "."));
  }

  std::string path = folder + "/" + index;
  Json json = read_json_file(path);
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object())
    throw DataError(str(path, ": 'weight_map' is missing or not an object."));
  std::set<std::string> files;
  for (const auto& [name, file] : json["weight_map"].items()) {
    if (!file.is_string()) throw DataError(str(path, ": the file of tensor '", name, "' is not a string."));
    std::string text = file.get<std::string>();
    // Only plain names: a path could read what lies outside the model.
    if (text.find_first_of(std::string("/\\\0", 3)) != std::string::npos || !ends_with(text, ".safetensors"))
      throw DataError(str(path, ": tensor '", name, "' is said to be in ", dump_json(file),
                          ", which is not the name of a .safetensors file in this folder."));
    files.insert(text);
  }
  for (const std::string& file : files) {
    if (!fs::exists(folder + "/" + file, error))
      throw DataError(str(path, " lists ", file, ", which is not in the folder: the download is incomplete."));
    add(file);
  }
  for (const auto& [name, file] : json["weight_map"].items()) {
    auto found = file_of_.find(name);
    if (found == file_of_.end() || files_[found->second]->path() != folder + "/" + file.get<std::string>())
      throw DataError(str(path, ": tensor '", name, "' is not in ", file.get<std::string>(), "."));
  }
}

void SafetensorsFolder::add(const std::string& file) {
  files_.push_back(std::make_unique<SafetensorsFile>(folder_ + "/" + file));
  for (const std::string& name : files_.back()->names()) {
    auto [place, fresh] = file_of_.emplace(name, files_.size() - 1);
    if (!fresh)
      throw DataError(
          str(folder_, ": tensor '", name, "' is in both ", files_[place->second]->path(), " and ", file, "."));
  }
}

std::vector<std::string> SafetensorsFolder::names() const {
  std::vector<std::string> names;
  for (const auto& [name, file] : file_of_) names.push_back(name);
  return names;
}

const SafetensorsFile& SafetensorsFolder::file_of(const std::string& name) const {
  auto found = file_of_.find(name);
  if (found == file_of_.end()) throw DataError(str(folder_, " has no tensor '", name, "'."));
  return *files_[found->second];
}

// --- loading
// ----------------------------------------------------------------------------------------------------------

uint64_t weight_bytes_read() { return bytes_read; }

void load_weights(const std::string& folder, const std::vector<Parameter>& targets, const LoadOptions& options) {
  load_weights(SafetensorsFolder(folder, options.stem), targets, options);
}

void load_weights(const SafetensorsFolder& folder, const std::vector<Parameter>& targets, const LoadOptions& options) {
  std::vector<Match> matches = match_targets(folder, targets, options);
  if (options.headers_only) return;
  std::stable_sort(matches.begin(), matches.end(), [](const Match& a, const Match& b) {
    return std::pair(a.file->path(), a.file->info(a.name).offset) <
           std::pair(b.file->path(), b.file->info(b.name).offset);
  });

  std::map<const SafetensorsFile*, std::unique_ptr<Descriptor>> descriptors;
  std::vector<Piece> pieces;
  std::vector<const Match*> slices;
  for (const Match& match : matches) {
    const at::Tensor& value = match.target->value;
    if (value.numel() == 0) continue;
    if (!value.is_contiguous() || !is_run(*match.target)) {
      slices.push_back(&match);
      continue;
    }
    ask_for_huge_pages(value);
    auto& descriptor = descriptors[match.file];
    if (!descriptor) descriptor = std::make_unique<Descriptor>(match.file->path());
    auto step = static_cast<int64_t>(kChunkBytes / c10::elementSize(match.file->info(match.name).dtype));
    for (int64_t first = 0; first < value.numel(); first += step)
      pieces.push_back({&match, first, std::min(step, value.numel() - first)});
  }

  std::exception_ptr failure;
  // One stretch of the files for each thread: the kernel reads ahead of it.
#pragma omp parallel for schedule(static)
  for (size_t i = 0; i < pieces.size(); ++i) {
    try {
      read_piece(pieces[i], *descriptors.at(pieces[i].match->file));
    } catch (...) {
#pragma omp critical
      if (!failure) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
  for (const Match* match : slices) copy_slice(*match);
}

}  // namespace trireme
