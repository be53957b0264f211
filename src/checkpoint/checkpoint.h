// Checkpoints: a transaction over all ranks, in a form that knows no ranks.
//
// <folder>/step-N/
//   shard-RRRRR.h5   what one rank wrote: tensors or slices of them, one HDF5 dataset each
//   manifest.json    {format, version, step, trireme, files: {name: {bytes, hash}},
//                     tensors: {name: {dtype, shape, pieces: [{file, dataset, offset, shape}]}}, state: the caller's}
//   manifest.hash    XXH3-128 of manifest.json
//   all.h5           whole tensors for h5ls and h5py (virtual datasets); never read by Trireme
// <folder>/latest, <folder>/best: one line, "step-N", for people: Trireme never reads them
// <folder>/step-N.abandoned: set aside when the run was resumed from an earlier step; a folder holds one branch
//
// Every rank writes into step-N.tmp/, syncs and hashes; all agree; rank 0 writes the manifest and renames to step-N. A
// step-N folder is therefore whole, or was damaged later, which the hashes tell. Tensors that several ranks hold are
// written by one of them: the bytes are dealt out evenly. Any layout loads any other: pieces and targets are slices of
// global tensors and are intersected.
#pragma once

#include <functional>
#include <set>
#include <thread>

#include "base/parameter.h"
#include "checkpoint/manifest.h"
#include "comm/communicator.h"

namespace trireme {

// A tensor of the state and the slice of the whole that this rank holds. Names may contain '/', which makes groups in
// HDF5: model/..., optimizer/exp_avg/...
using NamedTensor = Parameter;

// One whole checkpoint that was found, verified and can be loaded.
class Checkpoint {
 public:
  int64_t step() const { return manifest_.step; }
  const std::string& folder() const { return folder_; }
  const Json& state() const { return manifest_.state; }
  const std::map<std::string, StoredTensor>& tensors() const { return manifest_.tensors; }

  // Fills the targets, bit for bit. Local: no communication. DataError lists names that are missing, names that no
  // target and no other rank asks for (unless `partial`), and shapes and dtypes that differ. Optimizer state of checkpoints
  // that hold it flat is taken too. check() is the part of it that reads nothing; its targets may be on the meta device.
  void load(const std::vector<NamedTensor>& targets, bool partial = false, const std::set<std::string>& of_others = {}) const;
  void check(const std::vector<NamedTensor>& targets, bool partial = false, const std::set<std::string>& of_others = {}) const;

 private:
  friend class CheckpointStore;
  friend Checkpoint open_checkpoint(const std::string& folder);
  Checkpoint(std::string folder, Manifest manifest) : folder_(std::move(folder)), manifest_(std::move(manifest)) {}

  std::string folder_;
  Manifest manifest_;
};

// The names that any rank has: for load() where ranks hold different tensors. Collective.
std::set<std::string> names_of_all(const std::vector<NamedTensor>& tensors, const Communicator& comm);

// Reads and verifies one checkpoint folder without communication (for export and the like). DataError says what is
// wrong.
Checkpoint open_checkpoint(const std::string& folder);

// The checkpoints of one run. All calls but pending() and finished() are collective over `comm`, and end
// with the same result or the same error on every rank.
class CheckpointStore {
 public:
  // keep: how many of the newest stay; 0 keeps all. The best always stays.
  CheckpointStore(std::string folder, const Communicator& comm, int64_t keep);
  CheckpointStore(CheckpointStore&&) noexcept;
  ~CheckpointStore();  // waits for the writing thread; a checkpoint that was not committed stays a .tmp folder

  // Creates the folder and undoes what killed saves left. SystemError where the folder is not writable. For the start.
  void prepare();

  // Saves at once, straight from the tensors. best_step: the step of the run's best checkpoint so far, which stays; 0: none.
  // On failure (SystemError names path and reason) the earlier checkpoints are untouched.
  void save(int64_t step, const std::vector<NamedTensor>& tensors, const Json& state, int64_t best_step = 0);

  // The same in the background: copies what this rank writes to host memory, returns, and a thread writes. One save at a
  // time: a pending one is waited for first. `state` is rank 0's.
  void start_save(int64_t step, const std::vector<NamedTensor>& tensors, const Json& state, int64_t best_step = 0);
  bool pending() const { return job_ != nullptr; }
  // Local: has this rank's thread written its part? Take the minimum over the ranks in the step's own small all-reduce,
  // and call wait() where it is 1: then no rank waits for another.
  bool finished() const;
  // Ends the pending save: waits for the thread, agrees, commits. Nothing to do without one. Throws what went wrong.
  void wait();

  // The newest checkpoint that is whole; broken ones are named in a warning and passed over. None: no checkpoint at
  // all. DataError: there are some, but all are broken.
  std::optional<Checkpoint> newest();
  // A checkpoint that the user names by its folder, of this run or another. DataError says what is wrong with it.
  Checkpoint open(const std::string& path);

  // The run goes on after `step`: later checkpoints are of a branch that was left, and are set aside as step-N.abandoned.
  void start_branch(int64_t step, int64_t best_step);
  // Sees to it that the step-N folder `path` is in this store: one of another store is verified and copied. Returns what
  // is wrong with it, "" where nothing is. SystemError where it cannot be copied.
  std::string adopt(const std::string& path);

  const std::string& folder() const { return folder_; }

 private:
  struct Job;

  void make_plan(const std::vector<NamedTensor>& tensors);
  std::string path_of(int64_t step) const { return folder_ + "/" + step_name(step); }
  std::string temporary(int64_t step) const { return path_of(step) + ".tmp"; }
  void begin(int64_t step, const std::vector<NamedTensor>& tensors, const Json& state, int64_t best_step, bool copies);
  void commit(const Job& job, const std::vector<std::string>& reports);
  void point(int64_t step, int64_t best_step) const;
  void prune(const Job& job);
  std::string agree(const std::string& error) const;
  std::string on_rank0(const std::function<void()>& action) const;
  std::vector<std::string> gather_everywhere(const std::string& text) const;
  std::optional<Checkpoint> open_together(const std::string& path, std::string& why) const;
  std::vector<std::string> list_together() const;

  std::string folder_;
  Communicator comm_;
  int64_t keep_;
  // Who writes what; made at the first save and kept while every rank holds the same tensors.
  std::string planned_table_;
  std::map<std::string, StoredTensor> plan_;
  std::vector<std::pair<size_t, std::string>> mine_;  // index of a tensor of this rank, its dataset
  std::unique_ptr<Job> job_;
  std::jthread cleaner_;  // rank 0: deletes what was given up
};

}  // namespace trireme
