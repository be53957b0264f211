#include <algorithm>
#include <filesystem>
#include <functional>
#include <numeric>
#include <set>

#include "base/error_text.h"
#include "base/check.h"
#include "base/file.h"
#include "base/log.h"
#include "checkpoint/checkpoint.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kBufferBytes = 16 << 20;
constexpr size_t kMaxListed = 8;

struct Complaint {
  const char* what;
  std::vector<std::string> items;

  std::string text() const {
    if (items.empty()) return "";
    std::string text = str(" ", what, " (", items.size(), "): ");
    for (size_t i = 0; i < std::min(items.size(), kMaxListed); ++i) text += (i ? ", " : "") + items[i];
    return text + (items.size() > kMaxListed ? ", ..." : "") + ".";
  }
};

// Copies what a piece and a target have in common. Returns the number of elements.
int64_t copy_overlap(const Hdf5Dataset& dataset, const StoredPiece& piece, at::ScalarType dtype,
                     const NamedTensor& target) {
  std::vector<int64_t> in_piece, in_target, extent;
  int64_t count = 1;
  at::Tensor value = target.value.detach();
  for (size_t d = 0; d < piece.shape.size(); ++d) {
    int64_t begin = std::max(piece.offset[d], target.shard.offset[d]);
    int64_t end =
        std::min(piece.offset[d] + piece.shape[d], target.shard.offset[d] + value.size(static_cast<int64_t>(d)));
    if (end <= begin) return 0;
    in_piece.push_back(begin - piece.offset[d]);
    in_target.push_back(begin - target.shard.offset[d]);
    extent.push_back(end - begin);
    count *= end - begin;
  }
  if (piece.shape.empty()) {
    at::Tensor buffer = at::empty({}, dtype);
    dataset.read(buffer.data_ptr(), 0, 1);
    value.copy_(buffer);
    return 1;
  }
  int64_t row = 1;  // elements of the piece for one index of dim 0
  for (size_t d = 1; d < piece.shape.size(); ++d) row *= piece.shape[d];
  int64_t step = std::max<int64_t>(1, static_cast<int64_t>(kBufferBytes / c10::elementSize(dtype)) / row);
  for (int64_t first = 0; first < extent[0]; first += step) {
    std::vector<int64_t> shape = piece.shape;
    shape[0] = std::min(step, extent[0] - first);
    at::Tensor source = at::empty(shape, dtype);
    dataset.read(source.data_ptr(), static_cast<uint64_t>((in_piece[0] + first) * row),
                 static_cast<uint64_t>(shape[0] * row));
    at::Tensor destination = value.narrow(0, in_target[0] + first, shape[0]);
    for (size_t d = 1; d < piece.shape.size(); ++d) {
      source = source.narrow(static_cast<int64_t>(d), in_piece[d], extent[d]);
      destination = destination.narrow(static_cast<int64_t>(d), in_target[d], extent[d]);
    }
    destination.copy_(source);
  }
  return count;
}

int64_t product(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// Checkpoints written before ZeRO hold the optimizer's state as flat tensors, whole.
bool is_flat_form(const StoredTensor& stored, const std::vector<int64_t>& shape) {
  return stored.shape.size() == 1 && shape.size() > 1 && stored.shape[0] == product(shape) && stored.pieces.size() == 1;
}

}  // namespace

void Checkpoint::check(const std::vector<NamedTensor>& targets, bool partial, const std::set<std::string>& of_others) const {
  Complaint missing{"Missing", {}}, surplus{"Not asked for", {}}, differing{"Different", {}};
  std::set<std::string> asked;
  for (const NamedTensor& target : targets) {
    asked.insert(target.name);
    auto found = manifest_.tensors.find(target.name);
    if (found == manifest_.tensors.end()) {
      missing.items.push_back(target.name);
    } else if ((found->second.shape != target.shard.global_shape && !is_flat_form(found->second, target.shard.global_shape)) ||
               found->second.dtype != target.value.scalar_type()) {
      differing.items.push_back(str(target.name, " is ", c10::str(at::IntArrayRef(found->second.shape)), " ",
                                    stored_dtype_name(found->second.dtype), " in the checkpoint, ",
                                    c10::str(at::IntArrayRef(target.shard.global_shape)), " ",
                                    stored_dtype_name(target.value.scalar_type()), " in this run"));
    }
  }
  for (const auto& [name, tensor] : manifest_.tensors)
    if (!partial && !asked.count(name) && !of_others.count(name)) surplus.items.push_back(name);
  std::string complaints = missing.text() + surplus.text() + differing.text();
  if (!complaints.empty())
    throw DataError(str(folder_, ": the tensors of the checkpoint are not those of this run.", complaints));
}

void Checkpoint::load(const std::vector<NamedTensor>& targets, bool partial, const std::set<std::string>& of_others) const {
  check(targets, partial, of_others);
  std::map<std::string, Hdf5File> files;
  for (const NamedTensor& target : targets) {
    const StoredTensor& tensor = manifest_.tensors.at(target.name);
    NamedTensor flat = target;
    const bool is_flat = is_flat_form(tensor, target.shard.global_shape);
    if (is_flat) flat = {target.name, at::empty({tensor.shape[0]}, target.value.options()), {tensor.shape, {0}, false}};
    int64_t copied = 0;
    for (const StoredPiece& piece : tensor.pieces) {
      auto file = files.find(piece.file);
      if (file == files.end()) file = files.emplace(piece.file, Hdf5File::open(folder_ + "/" + piece.file)).first;
      Hdf5Dataset dataset = file->second.open_dataset(piece.dataset);
      if (dataset.type() != hdf5_type_for(tensor.dtype) ||
          dataset.shape() != std::vector<uint64_t>(piece.shape.begin(), piece.shape.end()))
        throw DataError(str(folder_, "/", piece.file, ": dataset ", piece.dataset, " is not what the manifest says."));
      copied += copy_overlap(dataset, piece, tensor.dtype, flat);
    }
    if (copied != flat.value.numel())
      throw DataError(str(folder_, ": the pieces of ", target.name, " hold ", copied, " of its ", flat.value.numel(),
                          " values."));
    if (!is_flat) continue;
    at::Tensor slice = flat.value.view(target.shard.global_shape);
    for (size_t d = 0; d < target.shard.offset.size(); ++d) {
      const auto dim = static_cast<int64_t>(d);
      slice = slice.narrow(dim, target.shard.offset[d], target.value.size(dim));
    }
    target.value.detach().copy_(slice);
  }
}

std::set<std::string> names_of_all(const std::vector<NamedTensor>& tensors, const Communicator& comm) {
  std::set<std::string> names;
  for (const NamedTensor& tensor : tensors) names.insert(tensor.name);
  for (const std::string& text : comm.gather_bytes(dump_json(Json(names))))
    for (const Json& name : parse_json(text, "names of tensors")) names.insert(name.get<std::string>());
  return parse_json(comm.broadcast_bytes(dump_json(Json(names))), "names of tensors").get<std::set<std::string>>();
}

Checkpoint open_checkpoint(const std::string& folder) {
  Manifest manifest = read_manifest(folder);
  for (const auto& [name, file] : manifest.files)
    if (std::string damage = damage_of(folder, name, file); !damage.empty()) throw DataError(damage);
  return Checkpoint(folder, std::move(manifest));
}

// The ranks share the work of hashing. `why` tells on every rank what is wrong where nothing is returned.
std::optional<Checkpoint> CheckpointStore::open_together(const std::string& path, std::string& why) const {
  std::string error;
  std::optional<Checkpoint> checkpoint;
  try {
    Manifest manifest = read_manifest(path);
    int turn = 0;
    for (const auto& [file, expected] : manifest.files)
      if (turn++ % comm_.size() == comm_.rank() && error.empty()) error = damage_of(path, file, expected);
    checkpoint = Checkpoint(path, std::move(manifest));
  } catch (const std::exception& failure) {
    error = text_of(failure);
  }
  why = agree(error);
  return why.empty() ? checkpoint : std::nullopt;
}

// Folders named step-N, the highest first, as rank 0 sees them.
std::vector<std::string> CheckpointStore::list_together() const {
  std::vector<int64_t> steps;
  std::string why = on_rank0([&] {
    std::error_code error;
    for (fs::directory_iterator entry(folder_, error), end; !error && entry != end; entry.increment(error))
      if (int64_t step = step_of(entry->path().filename().string()); step >= 0) steps.push_back(step);
    if (error && error != std::errc::no_such_file_or_directory)
      throw SystemError(str("cannot read the folder ", folder_, ": ", error.message()));
  });
  if (!why.empty()) throw SystemError(why);
  std::sort(steps.rbegin(), steps.rend());
  Json list = parse_json(comm_.broadcast_bytes(dump_json(Json(steps))), "list of checkpoints");
  std::vector<std::string> names;
  for (const Json& step : list) names.push_back(step_name(step.get<int64_t>()));
  return names;
}

std::optional<Checkpoint> CheckpointStore::newest() {
  std::string first_error;
  for (const std::string& name : list_together()) {
    std::string why;
    std::optional<Checkpoint> checkpoint = open_together(folder_ + "/" + name, why);
    if (checkpoint) return checkpoint;
    if (first_error.empty()) first_error = why;
    if (comm_.rank() == 0) log_warn(str("checkpoint ", folder_, "/", name, " is broken and passed over: ", why));
  }
  if (!first_error.empty())
    throw DataError(str(folder_, ": every checkpoint is broken; the newest: ", first_error,
                        " Restore one, or start afresh in another run.dir."));
  return std::nullopt;
}

Checkpoint CheckpointStore::open(const std::string& path) {
  std::string why;
  std::optional<Checkpoint> checkpoint = open_together(path, why);
  if (!checkpoint) throw DataError(why);
  return *checkpoint;
}

}  // namespace trireme
