#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <system_error>

#include "base/error_text.h"
#include "base/check.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/trace.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/huge_pages.h"

namespace trireme {

namespace fs = std::filesystem;

// One save under way on this rank.
struct CheckpointStore::Job {
  struct Part {
    std::string dataset;
    at::Tensor value;  // a copy, or the tensor itself
  };
  int64_t step = 0, best_step = 0;
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
            at::Tensor value = parts[i].value.cpu().contiguous();
            datasets[i].write(value.data_ptr(), 0, static_cast<uint64_t>(value.numel()));
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

// The names in a folder; none where it is not there.
std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(folder, none)) names.push_back(entry.path().filename().string());
  return names;
}

// What went wrong in `action`; "" where nothing did.
std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const fs::filesystem_error& failure) {
    return str("cannot write ", failure.path1().string(), ": ", failure.code().message(), ".");
  } catch (const std::exception& failure) {
    return text_of(failure);
  }
  return "";
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

// Rank 0 acts; every rank returns what went wrong there, "" where nothing did.
std::string CheckpointStore::on_rank0(const std::function<void()>& action) const {
  return agree(comm_.rank() == 0 ? error_of(action) : "");
}

void CheckpointStore::prepare() {
  constexpr std::string_view kReplaced = ".replaced.tmp";
  std::string error = on_rank0([&] {
    if (fs::create_directories(folder_)) fsync_path(fs::path(folder_).parent_path().string());
    if (access(folder_.c_str(), W_OK) != 0) throw SystemError(str("cannot write into ", folder_, ": ", errno_text(), "."));
    for (const std::string& name : names_in(folder_)) {  // killed between the two renames of commit()
      std::string original = folder_ + "/" + name.substr(0, name.size() - std::min(name.size(), kReplaced.size()));
      if (name.ends_with(kReplaced) && !fs::exists(original)) fs::rename(folder_ + "/" + name, original);
    }
    for (const std::string& name : names_in(folder_))
      if (name.ends_with(".tmp")) remove_folder(folder_ + "/" + name);
  });
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

// No rank may be alone with an error here: the others would wait for it in the next agreement.
void CheckpointStore::begin(int64_t step, const std::vector<NamedTensor>& tensors, const Json& state, int64_t best_step,
                            bool copies) {
  wait();
  make_plan(tensors);
  std::string error = on_rank0([&] {
    fs::remove_all(temporary(step));
    fs::create_directories(temporary(step));
  });
  if (!error.empty()) throw SystemError(error);

  auto job = std::make_unique<Job>();
  job->step = step, job->best_step = best_step, job->state = state, job->file = shard_file(comm_.rank());
  try {
    for (const auto& [index, dataset] : mine_) {
      at::Tensor value = tensors[index].value.detach();
      if (copies) {
        at::Tensor copy = at::empty(value.sizes(), at::TensorOptions(value.scalar_type()));
        ask_for_huge_pages(copy);
        value = copy.copy_(value);
      }
      job->parts.push_back({dataset, std::move(value)});
    }
  } catch (const std::exception&) {  // std::bad_alloc, or libtorch's own
    error = str("rank ", comm_.rank(), " has no memory for a copy of its tensors; set checkpoint.async=false, which needs none.");
  }
  error = agree(error);
  if (!error.empty()) {
    if (comm_.rank() == 0) remove_folder(temporary(step));
    throw SystemError(str("checkpoint of step ", step, " was not saved; the earlier ones are untouched: ", error));
  }
  job_ = std::move(job);
}

void CheckpointStore::start_save(int64_t step, const std::vector<NamedTensor>& tensors, const Json& state,
                                 int64_t best_step) {
  begin(step, tensors, state, best_step, true);
  try {
    job_->thread = std::thread([job = job_.get(), folder = temporary(step)] {
      Span span(TimeKind::kCheckpoint, "write checkpoint");
      job->write(folder);
    });
  } catch (const std::system_error&) {  // no more threads here: then at once
    job_->write(temporary(step));
  }
}

bool CheckpointStore::finished() const { return job_ && job_->done; }

void CheckpointStore::save(int64_t step, const std::vector<NamedTensor>& tensors, const Json& state, int64_t best_step) {
  begin(step, tensors, state, best_step, false);
  job_->write(temporary(step));
  wait();
  if (cleaner_.joinable()) cleaner_.join();
}

void CheckpointStore::wait() {
  if (!job_) return;
  std::unique_ptr<Job> job = std::move(job_);
  if (job->thread.joinable()) job->thread.join();
  std::string own = parse_json(job->report, "report").value("error", "");
  std::string error = agree(own);
  if (error.empty()) {
    std::vector<std::string> reports = comm_.gather_bytes(job->report);
    error = on_rank0([&] { commit(*job, reports); });
  }
  if (error.empty()) return;
  if (comm_.rank() == 0) remove_folder(temporary(job->step));
  throw SystemError(str("checkpoint of step ", job->step, " was not saved; the earlier ones are untouched: ", error,
                        " Once that is mended, the same command goes on."));
}

// Rank 0, once every rank has written its part.
void CheckpointStore::commit(const Job& job, const std::vector<std::string>& reports) {
  std::string folder = temporary(job.step), final_path = path_of(job.step);
  Manifest manifest{job.step, {}, plan_, job.state};
  for (int rank = 0; rank < comm_.size(); ++rank) {
    Json report = parse_json(reports[static_cast<size_t>(rank)], "report");
    if (report.contains("hash"))
      manifest.files[shard_file(rank)] = {report["bytes"].get<uint64_t>(), report["hash"].get<std::string>()};
  }
  write_view(folder + "/all.h5", plan_);
  write_manifest(folder, manifest);
  fsync_path(folder);
  // A step saved again replaces the old folder, whose place is never empty for longer than between two renames; were we
  // killed there, prepare() would put the old one back.
  if (fs::exists(final_path)) fs::rename(final_path, final_path + ".replaced.tmp");
  fs::rename(folder, final_path);
  fsync_path(folder_);
  // It is saved. What fails from here on is told, and tried again with the next one.
  std::string error = error_of([&] {
    point(job.step, job.best_step);
    prune(job);
  });
  if (!error.empty()) log_warn(str("after saving ", final_path, ": ", error));
}

// `latest` and `best`: nothing but a help for people.
void CheckpointStore::point(int64_t step, int64_t best_step) const {
  for (auto [name, target] : {std::pair("/latest", step), std::pair("/best", best_step)})
    if (fs::exists(path_of(target))) write_file_atomic(folder_ + name, step_name(target) + "\n");
    else fs::remove(folder_ + name);
}

// Deletes what keep-last-k does not want, and abandoned steps once the run has passed them.
void CheckpointStore::prune(const Job& job) {
  constexpr std::string_view kAbandoned = ".abandoned";
  std::vector<int64_t> steps;
  std::vector<std::string> leftovers;
  for (const std::string& name : names_in(folder_)) {
    const bool abandoned = name.ends_with(kAbandoned);
    const int64_t step = step_of(abandoned ? name.substr(0, name.size() - kAbandoned.size()) : name);
    if (name.ends_with(".tmp") || (abandoned && keep_ > 0 && step >= 0 && step <= job.step)) leftovers.push_back(folder_ + "/" + name);
    else if (!abandoned && step >= 0 && step <= job.step) steps.push_back(step);
  }
  std::sort(steps.rbegin(), steps.rend());
  for (size_t i = 0; keep_ > 0 && i < steps.size(); ++i) {
    if (static_cast<int64_t>(i) < keep_ || steps[i] == job.best_step) continue;
    std::string deleted = path_of(steps[i]) + ".deleted.tmp";
    fs::rename(path_of(steps[i]), deleted);  // at once no checkpoint any more, whenever we are killed
    leftovers.push_back(deleted);
  }
  // Freeing many gigabytes takes a while; no step should wait for it. What the cleaner before is still deleting is among
  // the leftovers too: one after the other, or two would delete the same folder.
  cleaner_ = std::jthread([leftovers, before = std::move(cleaner_)]() mutable {
    if (before.joinable()) before.join();
    for (const std::string& path : leftovers) remove_folder(path);
  });
}

void CheckpointStore::start_branch(int64_t step, int64_t best_step) {
  std::string error = on_rank0([&] {
    for (const std::string& name : names_in(folder_)) {
      if (step_of(name) <= step) continue;
      log_warn(str(folder_, "/", name, " is later than step ", step, ", where this run goes on: set aside as ", name, ".abandoned"));
      fs::remove_all(folder_ + "/" + name + ".abandoned");
      fs::rename(folder_ + "/" + name, folder_ + "/" + name + ".abandoned");
    }
    point(step, best_step);
    fsync_path(folder_);
  });
  if (!error.empty()) throw SystemError(error);
}

std::string CheckpointStore::adopt(const std::string& path) {
  const std::string own = folder_ + "/" + fs::path(path).filename().string();
  bool there = false;
  std::string why = on_rank0([&] {
    there = fs::exists(own + "/manifest.hash") && read_file(own + "/manifest.hash") == read_file(path + "/manifest.hash");
  });
  if (!why.empty() || comm_.agree(there) == 1) return why;
  if (!open_together(path, why)) return why;
  why = on_rank0([&] {
    fs::remove_all(own + ".tmp");
    fs::copy(path, own + ".tmp", fs::copy_options::recursive);
    for (const std::string& name : names_in(own + ".tmp")) fsync_path(own + ".tmp/" + name);
    fsync_path(own + ".tmp");
    fs::remove_all(own);
    fs::rename(own + ".tmp", own);
    fsync_path(folder_);
  });
  if (!why.empty()) throw SystemError(str("cannot take ", path, " over into this run: ", why));
  return "";
}

}  // namespace trireme
