#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <set>

#include "base/error_text.h"
#include "base/check.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/log.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/huge_pages.h"

namespace trireme {

namespace fs = std::filesystem;

// One save under way on this rank.
struct CheckpointStore::Job {
  struct Part {
    std::string dataset;
    at::Tensor value;  // on the CPU, contiguous
  };
  int64_t step = 0;
  bool is_best = false;
  Json state;
  std::vector<Part> parts;
  std::string file;           // of this rank, within step-N.tmp
  std::string report;         // JSON {error} or {bytes, hash}
  std::thread thread;
  std::atomic<bool> done{false};

  ~Job() {
    if (thread.joinable()) thread.join();
  }

  // Writes, syncs and hashes this rank's file. Never throws: the outcome is in `report`.
  void write(const std::string& folder) noexcept {
    try {
      if (parts.empty()) {
        report = "{}";
      } else {
        std::string path = folder + "/" + file;
        Hdf5File shard = Hdf5File::create(path);
        {
          std::vector<Hdf5Dataset> datasets;  // all space first: a full disk is seen before anything is written
          for (const Part& part : parts) {
            auto sizes = part.value.sizes();
            datasets.push_back(shard.create_dataset(part.dataset, hdf5_type_for(part.value.scalar_type()),
                                                    std::vector<uint64_t>(sizes.begin(), sizes.end())));
          }
          for (size_t i = 0; i < parts.size(); ++i) {
            datasets[i].write(parts[i].value.data_ptr(), 0, static_cast<uint64_t>(parts[i].value.numel()));
            parts[i].value.reset();  // give the memory back early
          }
        }
        shard.close();
        fsync_path(path);
        report = dump_json({{"bytes", static_cast<uint64_t>(fs::file_size(path))}, {"hash", hash_file(path)}});
      }
    } catch (const std::exception& error) {
      report = dump_json({{"error", text_of(error)}});
    }
    done = true;
  }
};

namespace {

std::string shard_file(int rank) {
  char name[32];
  std::snprintf(name, sizeof name, "shard-%05d.h5", rank);
  return name;
}

uint64_t bytes_of(const std::vector<int64_t>& shape, at::ScalarType dtype) {
  uint64_t bytes = c10::elementSize(dtype);
  for (int64_t dim : shape) bytes *= static_cast<uint64_t>(dim);
  return bytes;
}

// all.h5: every tensor whole, stitched from the shards.
void write_view(const std::string& path, const std::map<std::string, StoredTensor>& tensors) {
  Hdf5File view = Hdf5File::create(path);
  for (const auto& [name, tensor] : tensors) {
    if (tensor.shape.empty() || bytes_of(tensor.shape, tensor.dtype) == 0) {
      view.create_external_link(name, tensor.pieces[0].file, tensor.pieces[0].dataset);
      continue;
    }
    std::vector<Hdf5Piece> pieces;
    for (const StoredPiece& piece : tensor.pieces)
      pieces.push_back({piece.file, piece.dataset, {piece.offset.begin(), piece.offset.end()},
                        {piece.shape.begin(), piece.shape.end()}});
    view.create_virtual_dataset(name, hdf5_type_for(tensor.dtype), {tensor.shape.begin(), tensor.shape.end()}, pieces);
  }
  view.close();
  fsync_path(path);
}

void remove_folder(const std::string& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) log_warn(str("cannot remove ", path, ": ", error.message()));
}

}  // namespace

CheckpointStore::CheckpointStore(std::string folder, const Communicator& comm, int64_t keep)
    : folder_(std::move(folder)), comm_(comm), keep_(keep) {}

CheckpointStore::CheckpointStore(CheckpointStore&&) noexcept = default;
CheckpointStore::~CheckpointStore() = default;

// The first rank's error, on every rank; "" where no rank has one. One integer where all is well.
std::string CheckpointStore::agree(const std::string& error) const {
  if (comm_.agree(error.empty() ? 0 : 1) == 0) return "";
  for (const std::string& text : gather_everywhere(error))
    if (!text.empty()) return text;
  return "unknown error";
}

// The text of every rank, by rank, on every rank.
std::vector<std::string> CheckpointStore::gather_everywhere(const std::string& text) const {
  Json all = comm_.gather_bytes(text);
  return parse_json(comm_.broadcast_bytes(dump_json(all)), "texts of the ranks").get<std::vector<std::string>>();
}

void CheckpointStore::prepare() {
  std::string error;
  if (comm_.rank() == 0) {
    try {
      fs::create_directories(folder_);
      if (access(folder_.c_str(), W_OK) != 0)
        throw SystemError(str("cannot write into ", folder_, ": ", errno_text(), "."));
      std::vector<fs::path> leftovers;
      for (const auto& entry : fs::directory_iterator(folder_))
        if (entry.path().extension() == ".tmp") leftovers.push_back(entry.path());
      for (const fs::path& path : leftovers) remove_folder(path.string());
    } catch (const fs::filesystem_error& failure) {
      error = str("cannot create ", folder_, ": ", failure.code().message(), ".");
    } catch (const std::exception& failure) {
      error = text_of(failure);
    }
  }
  error = agree(error);
  if (!error.empty()) throw SystemError(error);
}

// Every rank tells its tensors; each slice goes to the holder that has least to write so far. All ranks compute the
// same plan from the same tables.
void CheckpointStore::make_plan(const std::vector<NamedTensor>& tensors) {
  Json table = Json::array();
  for (const NamedTensor& tensor : tensors)
    table.push_back({tensor.name, stored_dtype_name(tensor.value.scalar_type()), tensor.shard.global_shape,
                     tensor.shard.offset, tensor.value.sizes().vec()});
  std::string text = dump_json(table);
  if (comm_.agree(text == planned_table_ ? 0 : 1) == 0) return;

  struct Slice {
    at::ScalarType dtype;
    std::vector<int64_t> global_shape;
    std::vector<int> holders;
  };
  using Key = std::tuple<std::string, std::vector<int64_t>, std::vector<int64_t>>;  // name, offset, shape
  std::map<Key, Slice> slices;
  std::vector<std::string> tables = gather_everywhere(text);
  for (int rank = 0; rank < comm_.size(); ++rank)
    for (const Json& row : parse_json(tables[static_cast<size_t>(rank)], "table of tensors")) {
      Key key{row[0].get<std::string>(), row[3].get<std::vector<int64_t>>(), row[4].get<std::vector<int64_t>>()};
      Slice& slice = slices[key];
      slice.dtype = stored_dtype(row[1].get<std::string>());
      slice.global_shape = row[2].get<std::vector<int64_t>>();
      slice.holders.push_back(rank);
    }

  plan_.clear();
  std::vector<uint64_t> load(static_cast<size_t>(comm_.size()), 0);
  std::map<Key, std::string> my_slices;
  for (const auto& [key, slice] : slices) {
    const auto& [name, offset, shape] = key;
    int writer = *std::min_element(slice.holders.begin(), slice.holders.end(), [&](int a, int b) {
      return load[static_cast<size_t>(a)] < load[static_cast<size_t>(b)];
    });
    uint64_t bytes = bytes_of(shape, slice.dtype);
    load[static_cast<size_t>(writer)] += bytes + 1;
    std::string dataset = name;
    if (shape != slice.global_shape)
      for (size_t d = 0; d < offset.size(); ++d) dataset += (d ? "," : "@") + std::to_string(offset[d]);
    StoredTensor& tensor = plan_[name];
    TRIREME_CHECK(tensor.pieces.empty() || (tensor.shape == slice.global_shape && tensor.dtype == slice.dtype),
                  name, " differs between ranks");
    tensor.dtype = slice.dtype, tensor.shape = slice.global_shape;
    tensor.pieces.push_back({shard_file(writer), dataset, offset, shape});
    if (writer == comm_.rank()) my_slices[key] = dataset;
  }
  for (const auto& [name, tensor] : plan_) {
    uint64_t covered = 0;
    for (const StoredPiece& piece : tensor.pieces) covered += bytes_of(piece.shape, tensor.dtype);
    TRIREME_CHECK(covered == bytes_of(tensor.shape, tensor.dtype), "slices of ", name, " hold ", covered, " bytes of ",
                  bytes_of(tensor.shape, tensor.dtype));
  }
  mine_.clear();
  for (size_t i = 0; i < tensors.size(); ++i) {
    auto found = my_slices.find({tensors[i].name, tensors[i].shard.offset, tensors[i].value.sizes().vec()});
    if (found != my_slices.end()) mine_.emplace_back(i, found->second);
  }
  planned_table_ = std::move(text);
}

void CheckpointStore::start_save(int64_t step, const std::vector<NamedTensor>& tensors, const Json& state,
                                 bool is_best) {
  wait();
  make_plan(tensors);
  std::string error;
  if (comm_.rank() == 0) {
    try {
      fs::remove_all(temporary(step));
      fs::create_directories(temporary(step));
    } catch (const fs::filesystem_error& failure) {
      error = str("cannot create ", temporary(step), ": ", failure.code().message(), ".");
    }
  }
  error = agree(error);
  if (!error.empty()) throw SystemError(error);

  job_ = std::make_unique<Job>();
  job_->step = step, job_->is_best = is_best, job_->state = state, job_->file = shard_file(comm_.rank());
  for (const auto& [index, dataset] : mine_) {
    at::Tensor copy = at::empty(tensors[index].value.sizes(), at::TensorOptions(tensors[index].value.scalar_type()));
    ask_for_huge_pages(copy);
    copy.copy_(tensors[index].value.detach());
    job_->parts.push_back({dataset, std::move(copy)});
  }
  job_->thread = std::thread([job = job_.get(), folder = temporary(step)] { job->write(folder); });
}

bool CheckpointStore::finished() const { return job_ && job_->done; }

void CheckpointStore::save(int64_t step, const std::vector<NamedTensor>& tensors, const Json& state, bool is_best) {
  start_save(step, tensors, state, is_best);
  wait();
  if (cleaner_.joinable()) cleaner_.join();
}

void CheckpointStore::wait() {
  if (!job_) return;
  std::unique_ptr<Job> job = std::move(job_);
  job->thread.join();
  std::string own = parse_json(job->report, "report").value("error", "");
  std::string error = agree(own);
  if (error.empty()) {
    std::vector<std::string> reports = comm_.gather_bytes(job->report);
    if (comm_.rank() == 0) {
      try {
        commit(*job, reports);
      } catch (const fs::filesystem_error& failure) {
        error = str("cannot write ", temporary(job->step), ": ", failure.code().message(), ".");
      } catch (const std::exception& failure) {
        error = text_of(failure);
      }
    }
    error = agree(error);
  }
  if (error.empty()) return;
  if (comm_.rank() == 0) remove_folder(temporary(job->step));
  throw SystemError(str("checkpoint of step ", job->step, " was not saved; the earlier ones are untouched: ", error));
}

// Rank 0, once every rank has written its part.
void CheckpointStore::commit(const Job& job, const std::vector<std::string>& reports) {
  std::string folder = temporary(job.step), name = "step-" + std::to_string(job.step),
              final_path = folder_ + "/" + name;
  Manifest manifest{job.step, {}, plan_, job.state};
  for (int rank = 0; rank < comm_.size(); ++rank) {
    Json report = parse_json(reports[static_cast<size_t>(rank)], "report");
    if (report.contains("hash"))
      manifest.files[shard_file(rank)] = {report["bytes"].get<uint64_t>(), report["hash"].get<std::string>()};
  }
  write_view(folder + "/all.h5", plan_);
  write_manifest(folder, manifest);
  fsync_path(folder);
  // A step saved again (after a resume from an earlier one) replaces the old folder, whose place is never empty for
  // longer than between two renames; were we killed there, the loader would take the one before.
  if (fs::exists(final_path)) fs::rename(final_path, final_path + ".replaced.tmp");
  fs::rename(folder, final_path);
  fsync_path(folder_);
  write_file_atomic(folder_ + "/latest", name + "\n");
  if (job.is_best) write_file_atomic(folder_ + "/best", name + "\n");
  prune(job.step);
}

// Deletes what keep-last-k does not want. Later steps than this one are of a branch that was left by resuming from an
// earlier checkpoint: they are set aside, so that they are not taken for the newest.
void CheckpointStore::prune(int64_t step) {
  auto pointed = [&](const char* pointer) {
    std::string path = folder_ + "/" + pointer;
    std::string text = fs::exists(path) ? read_file(path, 1000) : "";
    return text.substr(0, text.find('\n'));
  };
  std::set<std::string> kept = {pointed("latest"), pointed("best")};
  std::vector<int64_t> steps;
  std::vector<fs::path> leftovers;
  for (const auto& entry : fs::directory_iterator(folder_)) {
    std::string name = entry.path().filename().string();
    if (entry.path().extension() == ".tmp") leftovers.push_back(entry.path());
    if (name.rfind("step-", 0) == 0 && name.find_first_not_of("0123456789", 5) == std::string::npos && name.size() > 5)
      steps.push_back(std::stoll(name.substr(5)));
  }
  std::sort(steps.rbegin(), steps.rend());
  int64_t num_kept = 0;
  for (int64_t other : steps) {
    std::string name = "step-" + std::to_string(other), path = folder_ + "/" + name;
    if (other > step) {
      if (kept.count(name)) continue;
      log_warn(str(path, " is later than the step just saved: set aside as ", name, ".abandoned"));
      remove_folder(path + ".abandoned");
      fs::rename(path, path + ".abandoned");
      continue;
    }
    if (++num_kept <= keep_ || keep_ <= 0 || kept.count(name)) continue;
    fs::rename(path, path + ".deleted.tmp");  // at once no checkpoint any more, whenever we are killed
    leftovers.push_back(path + ".deleted.tmp");
  }
  // Freeing many gigabytes takes a while; no step should wait for it.
  cleaner_ = std::jthread([leftovers] {
    for (const fs::path& path : leftovers) remove_folder(path.string());
  });
}

}  // namespace trireme
