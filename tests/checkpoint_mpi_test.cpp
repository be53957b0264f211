#include "checkpoint/checkpoint.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <mutex>

#include "base/check.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "checkpoint/manifest.h"
#include "scratch.h"

namespace {

// Between hold() and release(), whoever deletes a file named "held" waits, unless another deletes it too.
struct HeldFile {
  std::mutex mutex;
  std::condition_variable changed;
  bool released = true;
  int deleters = 0;

  void hold() {
    std::lock_guard lock(mutex);
    released = false;
    deleters = 0;
  }
  void wait() {
    std::unique_lock lock(mutex);
    ++deleters;
    changed.notify_all();
    changed.wait(lock, [this] { return released || deleters > 1; });
  }
  void release() {
    std::lock_guard lock(mutex);
    released = true;
    changed.notify_all();
  }
};
HeldFile held_file;

}  // namespace

// In place of libc's, which std::filesystem::remove_all calls.
extern "C" int unlinkat(int folder, const char* path, int flags) noexcept {
  if (std::string_view(path).ends_with("held")) held_file.wait();
  return static_cast<int>(syscall(SYS_unlinkat, folder, path, flags));
}

namespace trireme {
namespace {

namespace fs = std::filesystem;

// The value of a global tensor is a function of its place, so that any slice on any layout can be checked.
at::Tensor global_value(std::vector<int64_t> shape, at::ScalarType dtype, double scale) {
  int64_t count = 1;
  for (int64_t dim : shape) count *= dim;
  return ((at::arange(count, at::kDouble) * scale).remainder(251) - 100).to(dtype).view(shape);
}

struct GlobalTensor {
  std::string name;
  at::Tensor value;
  int sharded_dim;  // -1: replicated
};

std::vector<GlobalTensor> globals(double scale = 1) {
  return {{"model/embed.weight", global_value({7, 5}, at::kFloat, scale), -1},
          {"model/layers.0.up.weight", global_value({10, 6}, at::kBFloat16, scale), 0},
          {"model/layers.0.down.weight", global_value({6, 11}, at::kHalf, scale), 1},
          {"optimizer/exp_avg/flat", global_value({1001}, at::kDouble, scale), 0},
          {"optimizer/step", global_value({}, at::kLong, scale), -1},
          {"optimizer/mask", global_value({4}, at::kBool, scale), -1},
          {"optimizer/none", at::empty({0, 3}), -1}};
}

// The slices of one rank, uneven; filled, or zeros to be loaded into.
std::vector<NamedTensor> slices(const std::vector<GlobalTensor>& all, const Communicator& comm, bool filled) {
  std::vector<NamedTensor> mine;
  for (const GlobalTensor& tensor : all) {
    NamedTensor slice{tensor.name, tensor.value, ShardSpec::whole(tensor.value)};
    if (tensor.sharded_dim >= 0) {
      int64_t length = tensor.value.size(tensor.sharded_dim);
      int64_t begin = length * comm.rank() / comm.size(), end = length * (comm.rank() + 1) / comm.size();
      slice.value = tensor.value.narrow(tensor.sharded_dim, begin, end - begin);
      slice.shard.offset[static_cast<size_t>(tensor.sharded_dim)] = begin;
      slice.shard.replicated = false;
    }
    slice.value = filled ? slice.value.clone() : at::zeros_like(slice.value);
    mine.push_back(slice);
  }
  return mine;
}

void expect_equal(const std::vector<NamedTensor>& got, const std::vector<NamedTensor>& expected) {
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(at::equal(got[i].value, expected[i].value)) << got[i].name;
}

class CheckpointTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name;
    if (comm_.rank() == 0) name = scratch_folder();
    root_ = comm_.broadcast_bytes(name);
    folder_ = root_ + "/checkpoints";
  }
  void TearDown() override {
    comm_.barrier();
    if (comm_.rank() == 0) fs::remove_all(root_);
  }
  CheckpointStore store(int64_t keep = 0) {
    CheckpointStore store(folder_, comm_, keep);
    store.prepare();
    return store;
  }
  void save(CheckpointStore& store, int64_t step, int64_t best_step = 0) {
    store.save(step, slices(globals(static_cast<double>(step)), comm_, true), {{"step", step}}, best_step);
  }
  // Rank 0 changes the folder under the store.
  void on_rank0(const std::function<void()>& action) {
    comm_.barrier();
    if (comm_.rank() == 0) action();
    comm_.barrier();
  }
  // Names in the checkpoint folder, sorted.
  std::string listing() {
    comm_.barrier();
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder_)) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    std::string text;
    for (const std::string& name : names) text += name + " ";
    comm_.barrier();
    return text;
  }
  // Rank 0 changes one byte in the middle of a file.
  void damage(const std::string& file) {
    if (comm_.rank() == 0) {
      std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
      auto place = static_cast<std::streamoff>(fs::file_size(file) / 2);
      stream.seekg(place);
      char byte = static_cast<char>(stream.get());
      stream.seekp(place);
      stream.put(static_cast<char>(byte ^ 4));
    }
    comm_.barrier();
  }
  template <typename ErrorType, typename F>
  std::string error_of(F&& action) {
    try {
      action();
    } catch (const ErrorType& error) {
      return error.what();
    }
    return "no such error";
  }
  std::string read(const std::string& path) {
    std::ifstream stream(path);
    return {std::istreambuf_iterator<char>(stream), {}};
  }

  Communicator comm_ = Communicator::world();
  std::string root_, folder_;
};

TEST_F(CheckpointTest, LoadsOntoTheSameLayoutAndAnyOther) {
  CheckpointStore saved = store();
  EXPECT_FALSE(saved.newest().has_value());
  save(saved, 12);
  EXPECT_EQ(listing(), "latest step-12 ");
  std::optional<Checkpoint> found = saved.newest();
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->step(), 12);
  EXPECT_EQ(found->state(), (Json{{"step", 12}}));
  // The world again; groups of two ranks; each rank alone.
  for (const Communicator& layout :
       {comm_, comm_.split(comm_.rank() / 2, comm_.rank(), "pairs"), Communicator::self()}) {
    std::vector<NamedTensor> targets = slices(globals(12), layout, false);
    found->load(targets);
    expect_equal(targets, slices(globals(12), layout, true));
  }
  // Columns of what was saved in rows.
  at::Tensor up = globals(12)[1].value, columns = at::zeros({10, 2}, at::kBFloat16);
  found->load({{"model/layers.0.up.weight", columns, {{10, 6}, {0, 3}, false}}}, true);
  EXPECT_TRUE(at::equal(columns, up.narrow(1, 3, 2)));
}

// The form of optimizer state before it had the shape of its weight.
TEST_F(CheckpointTest, AFlatTensorLoadsIntoSlicesOfItsShape) {
  CheckpointStore saved = store();
  at::Tensor flat = at::arange(30, at::kFloat);
  saved.save(1, {{"optimizer/exp_avg/w", flat, ShardSpec::whole(flat)}}, {});
  at::Tensor columns = at::zeros({5, 2});
  saved.newest()->load({{"optimizer/exp_avg/w", columns, {{5, 6}, {0, 3}, false}}});
  EXPECT_TRUE(at::equal(columns, flat.view({5, 6}).narrow(1, 3, 2)));
  EXPECT_THROW(saved.newest()->load({{"optimizer/exp_avg/w", columns, {{5, 7}, {0, 3}, false}}}), DataError);
}

TEST_F(CheckpointTest, EveryTensorIsWrittenOnceAndTheWorkIsShared) {
  CheckpointStore saved = store();
  std::vector<NamedTensor> tensors;
  for (int i = 0; i < 8; ++i) {
    at::Tensor value = at::full({1000}, i, at::kFloat);
    tensors.push_back({str("t", i), value, ShardSpec::whole(value)});
  }
  saved.save(1, tensors, {});
  std::map<std::string, int> num_pieces;
  Checkpoint found = *saved.newest();
  for (const auto& [name, tensor] : found.tensors()) {
    EXPECT_EQ(tensor.pieces.size(), 1u);
    ++num_pieces[tensor.pieces[0].file];
  }
  EXPECT_EQ(num_pieces.size(), static_cast<size_t>(comm_.size()));
  for (const auto& [file, count] : num_pieces) EXPECT_EQ(count, 8 / comm_.size()) << file;
}

TEST_F(CheckpointTest, PlanFollowsTensorsThatChange) {
  CheckpointStore saved = store();
  save(saved, 1);
  at::Tensor other = at::arange(9);
  saved.save(2, {{"other", other, ShardSpec::whole(other)}}, {});
  at::Tensor loaded = at::zeros({9}, at::kLong);
  saved.newest()->load({{"other", loaded, ShardSpec::whole(loaded)}});
  EXPECT_TRUE(at::equal(loaded, other));
}

TEST_F(CheckpointTest, BackgroundSaveHoldsWhatWasThereWhenItBegan) {
  CheckpointStore saved = store();
  std::vector<NamedTensor> tensors = slices(globals(3), comm_, true);
  saved.start_save(3, tensors, {});
  EXPECT_TRUE(saved.pending());
  for (NamedTensor& tensor : tensors) tensor.value.zero_();
  while (comm_.agree(saved.finished() ? 0 : 1) != 0) {
  }
  EXPECT_EQ(listing(), "step-3.tmp ");  // no checkpoint before all agree
  saved.wait();
  EXPECT_FALSE(saved.pending());
  std::vector<NamedTensor> targets = slices(globals(3), comm_, false);
  saved.newest()->load(targets);
  expect_equal(targets, slices(globals(3), comm_, true));
}

TEST_F(CheckpointTest, AbandonedSaveLeavesTheOldOneAndIsCleanedUp) {
  {
    CheckpointStore saved = store();
    save(saved, 1);
    saved.start_save(2, slices(globals(2), comm_, true), {});
  }  // as if killed: written, never committed
  EXPECT_EQ(listing(), "latest step-1 step-2.tmp ");
  CheckpointStore again(folder_, comm_, 0);
  EXPECT_EQ(again.newest()->step(), 1);
  again.prepare();
  EXPECT_EQ(listing(), "latest step-1 ");
}

TEST_F(CheckpointTest, NothingIsAStepBeforeItsManifestIsWritten) {
  CheckpointStore saved = store();
  save(saved, 1);
  saved.start_save(2, slices(globals(2), comm_, true), {});
  on_rank0([&] { fs::create_directories(folder_ + "/step-2.tmp/manifest.json/in_the_way"); });
  EXPECT_THROW(saved.wait(), SystemError);
  EXPECT_EQ(listing(), "latest step-1 ");
}

TEST_F(CheckpointTest, BrokenOnesArePassedOver) {
  CheckpointStore saved = store();
  for (int step = 1; step <= 6; ++step) save(saved, step);
  damage(folder_ + "/step-6/shard-00000.h5");
  EXPECT_EQ(error_of<DataError>([&] { open_checkpoint(folder_ + "/step-6"); }),
            folder_ + "/step-6/shard-00000.h5 is damaged: its hash differs from the manifest's.");
  damage(folder_ + "/step-5/manifest.json");
  EXPECT_EQ(error_of<DataError>([&] { open_checkpoint(folder_ + "/step-5"); }),
            folder_ + "/step-5/manifest.json is damaged: its hash is not the one in manifest.hash.");
  std::string shard4 = folder_ + "/step-4/shard-00000.h5", shard3 = folder_ + "/step-3/shard-00000.h5";
  auto size4 = fs::file_size(shard4);
  comm_.barrier();
  if (comm_.rank() == 0) {
    fs::resize_file(shard4, size4 - 1);
    fs::remove(shard3);
    fs::remove(folder_ + "/step-2/manifest.json");
  }
  comm_.barrier();
  EXPECT_EQ(error_of<DataError>([&] { open_checkpoint(folder_ + "/step-4"); }),
            str(shard4, " has ", size4 - 1, " bytes instead of ", size4, "."));
  EXPECT_EQ(error_of<DataError>([&] { open_checkpoint(folder_ + "/step-3"); }),
            shard3 + " is missing (No such file or directory).");
  EXPECT_EQ(error_of<DataError>([&] { open_checkpoint(folder_ + "/step-2"); }),
            folder_ + "/step-2 is not a checkpoint: it has no manifest.json.");
  EXPECT_EQ(error_of<DataError>([&] { saved.open(folder_ + "/step-2"); }),
            folder_ + "/step-2 is not a checkpoint: it has no manifest.json.");
  EXPECT_EQ(saved.open(folder_ + "/step-1").step(), 1);
  std::optional<Checkpoint> found = saved.newest();
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->step(), 1);
  comm_.barrier();
  damage(folder_ + "/step-1/shard-00000.h5");
  EXPECT_EQ(error_of<DataError>([&] { saved.newest(); }),
            folder_ + ": every checkpoint is broken; the newest: " + folder_ +
                "/step-6/shard-00000.h5 is damaged: its hash "
                "differs from the manifest's. Restore one, or start afresh in another run.dir.");
}

// Their hashes are right: written by somebody else, or by a later Trireme.
TEST_F(CheckpointTest, ManifestsThatCannotBeUsed) {
  CheckpointStore saved = store();
  save(saved, 1);
  const std::string folder = folder_ + "/step-1", file = folder + "/manifest.json";
  const Json good = read_json_file(file);
  auto words = [&](const std::function<void(Json&)>& change) {
    on_rank0([&] {
      Json json = good;
      change(json);
      const std::string text = dump_json(json) + "\n";
      write_file_atomic(file, text);
      write_file_atomic(folder + "/manifest.hash", hash_bytes(text) + "\n");
    });
    return error_of<DataError>([&] { open_checkpoint(folder).load(slices(globals(1), comm_, false)); });
  };
  EXPECT_EQ(words([](Json&) {}), "no such error");
  EXPECT_EQ(words([](Json& json) { json["version"] = 1000; }),
            str(file, " cannot be used: its version is 1000; this Trireme reads up to ", kCheckpointVersion, "."));
  EXPECT_EQ(words([](Json& json) { json["files"]["../shard"] = json["files"]["shard-00000.h5"]; }),
            file + " cannot be used: a file outside the folder.");
  EXPECT_EQ(words([](Json& json) { json["tensors"]["model/embed.weight"]["pieces"] = Json::array(); }),
            folder + ": the pieces of model/embed.weight hold 0 of its 35 values.");
}

TEST_F(CheckpointTest, KeepsTheNewestAndTheBest) {
  CheckpointStore saved = store(2);
  for (int step = 1; step <= 5; ++step) save(saved, step, step < 2 ? 0 : 2);
  EXPECT_EQ(listing(), "best latest step-2 step-4 step-5 ");
  EXPECT_EQ(read(folder_ + "/latest"), "step-5\n");
  EXPECT_EQ(read(folder_ + "/best"), "step-2\n");
  save(saved, 5, 2);  // the same step again replaces it
  EXPECT_EQ(listing(), "best latest step-2 step-4 step-5 ");
  EXPECT_EQ(saved.newest()->step(), 5);
  save(saved, 6, 6);
  EXPECT_EQ(listing(), "best latest step-5 step-6 ");
}

// Saves that end while what was given up before is still being deleted.
TEST_F(CheckpointTest, WhatIsGivenUpIsDeletedOnceAndNoSaveWaitsForIt) {
  CheckpointStore saved = store(1);
  save(saved, 1);
  on_rank0([&] { std::ofstream(folder_ + "/step-1/held"); });
  held_file.hold();
  testing::internal::CaptureStderr();
  for (int step = 2; step <= 4; ++step) {
    saved.start_save(step, slices(globals(), comm_, true), {});
    saved.wait();
  }
  const bool was_there = comm_.agree(fs::exists(folder_ + "/step-1.deleted.tmp/held")) == 1;
  held_file.release();
  save(saved, 5);  // returns when all is deleted
  const std::string warnings = testing::internal::GetCapturedStderr();
  EXPECT_TRUE(was_there);
  EXPECT_EQ(warnings, "");
  EXPECT_EQ(listing(), "latest step-5 ");
}

TEST_F(CheckpointTest, StepsOfABranchThatWasLeftAreSetAside) {
  CheckpointStore saved = store(1);
  save(saved, 4, 4);
  save(saved, 8, 8);
  save(saved, 10, 8);
  EXPECT_EQ(listing(), "best latest step-10 step-8 ");
  saved.start_branch(8, 8);
  EXPECT_EQ(listing(), "best latest step-10.abandoned step-8 ");
  EXPECT_EQ(read(folder_ + "/latest"), "step-8\n");
  EXPECT_EQ(saved.newest()->step(), 8);
  save(saved, 9, 8);
  EXPECT_EQ(listing(), "best latest step-10.abandoned step-8 step-9 ");
  save(saved, 10, 8);  // the branch that was left is passed
  EXPECT_EQ(listing(), "best latest step-10 step-8 ");
  saved.start_branch(8, 0);
  EXPECT_EQ(listing(), "latest step-10.abandoned step-8 ");
}

TEST_F(CheckpointTest, TheBestOfAnotherFolderIsTakenOver) {
  CheckpointStore saved = store();
  save(saved, 3);
  CheckpointStore other(root_ + "/other", comm_, 0);
  other.prepare();
  EXPECT_EQ(saved.adopt(folder_ + "/step-3"), "");  // it is there
  EXPECT_EQ(other.adopt(folder_ + "/step-2"), folder_ + "/step-2 is not a checkpoint: it has no manifest.json.");
  EXPECT_EQ(other.adopt(folder_ + "/step-3"), "");
  std::vector<NamedTensor> targets = slices(globals(3), comm_, false);
  other.open(root_ + "/other/step-3").load(targets);
  expect_equal(targets, slices(globals(3), comm_, true));
  comm_.barrier();
  damage(folder_ + "/step-3/shard-00000.h5");
  EXPECT_EQ(other.adopt(folder_ + "/step-3"), "");  // taken over before
  on_rank0([&] { fs::remove_all(root_ + "/other/step-3"); });
  EXPECT_EQ(other.adopt(folder_ + "/step-3"), folder_ + "/step-3/shard-00000.h5 is damaged: its hash differs from the manifest's.");
}

TEST_F(CheckpointTest, KilledBetweenTheRenamesOfAReplacement) {
  CheckpointStore saved = store(1);
  save(saved, 1);
  on_rank0([&] {
    fs::rename(folder_ + "/step-1", folder_ + "/step-1.replaced.tmp");
    fs::create_directory(folder_ + "/step-1.tmp");
  });
  EXPECT_EQ(store(1).newest()->step(), 1);
  EXPECT_EQ(listing(), "latest step-1 ");
}

TEST_F(CheckpointTest, AFolderThatIsNoStepOrOfAnotherIsNoHindrance) {
  CheckpointStore saved = store(1);
  on_rank0([&] {
    for (const char* name : {"step-99999999999999999999", "step-007", "step-", "step-1.copy", "mine.abandoned"})
      fs::create_directory(folder_ + "/" + name);
  });
  save(saved, 1);
  EXPECT_EQ(saved.newest()->step(), 1);
  save(saved, 2);
  EXPECT_EQ(listing(), "latest mine.abandoned step- step-007 step-1.copy step-2 step-99999999999999999999 ");
  on_rank0([&] { fs::rename(folder_ + "/step-2", folder_ + "/step-9"); });
  EXPECT_EQ(error_of<DataError>([&] { saved.open(folder_ + "/step-9"); }),
            folder_ + "/step-9 holds step 2: it was renamed. Give it back its name.");
}

// `latest` cannot be written: a folder is in its place.
TEST_F(CheckpointTest, WhatFailsAfterTheCommitDoesNotUndoIt) {
  CheckpointStore saved = store(1);
  on_rank0([&] { fs::create_directories(folder_ + "/latest/full"); });
  EXPECT_NO_THROW(save(saved, 1));
  EXPECT_EQ(saved.newest()->step(), 1);
}

TEST_F(CheckpointTest, SaysWhichTensorsDiffer) {
  CheckpointStore saved = store();
  save(saved, 1);
  Checkpoint found = *saved.newest();
  std::vector<NamedTensor> targets = slices(globals(1), comm_, false);
  targets[0].name = "model/embedding.weight";
  targets[5] = {"optimizer/mask", at::zeros({5}, at::kBool), {{5}, {0}, true}};
  targets[4].value = at::zeros({}, at::kInt);
  EXPECT_EQ(
      error_of<DataError>([&] { found.load(targets); }),
      folder_ +
          "/step-1: the tensors of the checkpoint are not those of this run. Missing (1): model/embedding.weight. "
          "Not asked for (1): model/embed.weight. Different (2): optimizer/step is [] int64 in the checkpoint, [] "
          "int32 in "
          "this run, optimizer/mask is [4] bool in the checkpoint, [5] bool in this run.");
}

TEST_F(CheckpointTest, UnwritableFolderIsToldByEveryRank) {
  if (comm_.rank() == 0) std::ofstream(folder_) << "a file in the way";
  comm_.barrier();
  std::string what = error_of<SystemError>([&] { store(); });
  EXPECT_NE(what.find("cannot write " + folder_ + ": "), std::string::npos) << what;
  comm_.barrier();
}

// The last rank alone has no memory for the copy of a background save: nobody may wait for it in vain.
TEST_F(CheckpointTest, NoMemoryForTheCopyIsToldByAll) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "under a limit the sanitizer's own allocator ends the process";
#endif
  CheckpointStore saved = store();
  save(saved, 1);
  const bool last = comm_.rank() == comm_.size() - 1;
  at::Tensor big = at::zeros({last ? 16 << 20 : 1});
  std::vector<NamedTensor> tensors = {{last ? "big" : str("small.", comm_.rank()), big, ShardSpec::whole(big)}};
  rlimit before{};
  getrlimit(RLIMIT_AS, &before);
  if (last) {
    std::ifstream in("/proc/self/statm");
    uint64_t pages = 0;
    in >> pages;
    rlimit limit{pages * 4096 + (16 << 20), before.rlim_max};
    setrlimit(RLIMIT_AS, &limit);
  }
  std::string what = error_of<SystemError>([&] { saved.start_save(2, tensors, {}); });
  setrlimit(RLIMIT_AS, &before);
  EXPECT_EQ(what, str("checkpoint of step 2 was not saved; the earlier ones are untouched: rank ", comm_.size() - 1,
                      " has no memory for a copy of its tensors; set checkpoint.async=false, which needs none."));
  EXPECT_FALSE(saved.pending());
  EXPECT_EQ(listing(), "latest step-1 ");
  saved.save(2, tensors, {});
  EXPECT_EQ(saved.newest()->step(), 2);
}

// A file size limit on the last rank stands for a full disk there.
TEST_F(CheckpointTest, FullDiskOfOneRankIsToldByAllAndTheOldCheckpointStays) {
  CheckpointStore saved = store();
  save(saved, 1);
  at::Tensor big = at::ones({1 << 20});
  std::vector<NamedTensor> tensors = {{"big", big, {{(1 << 20) * comm_.size()}, {(1 << 20) * comm_.rank()}, false}}};
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, SIG_IGN);
  if (comm_.rank() == comm_.size() - 1) {
    rlimit limit{1 << 20, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  std::string what = error_of<SystemError>([&] { saved.save(2, tensors, {}); });
  setrlimit(RLIMIT_FSIZE, &before);
  char shard[32];
  std::snprintf(shard, sizeof shard, "shard-%05d.h5", comm_.size() - 1);
  EXPECT_EQ(what.find("checkpoint of step 2 was not saved; the earlier ones are untouched: cannot write " + folder_ +
                      "/step-2.tmp/" + shard + ": File too large ("), 0u) << what;
  EXPECT_EQ(listing(), "latest step-1 ");
  EXPECT_EQ(saved.newest()->step(), 1);
  saved.save(2, tensors, {});  // and it goes on once there is room
  EXPECT_EQ(saved.newest()->step(), 2);
}

// Takes up what an earlier process left, checks it, and saves on. The Python test kills it again and again in between.
TEST_F(CheckpointTest, GoesOnAfterAnotherProcess) {
  const char* given = std::getenv("TRIREME_INTEROP");
  const char* num_saves = std::getenv("TRIREME_NUM_SAVES");
  if (given) folder_ = given;
  int64_t first = 1, last = num_saves ? std::atoll(num_saves) : 3;
  for (int process = 0; process < 2; ++process) {
    CheckpointStore saved = store(2);
    if (std::optional<Checkpoint> found = saved.newest()) {
      std::vector<NamedTensor> targets = slices(globals(static_cast<double>(found->step())), comm_, false);
      found->load(targets);
      expect_equal(targets, slices(globals(static_cast<double>(found->step())), comm_, true));
      if (comm_.rank() == 0)
        std::printf("found step %lld\n", static_cast<long long>(found->step())), std::fflush(stdout);
      first = found->step() + 1;
    }
    for (int64_t step = first; step < first + last; ++step) save(saved, step);
    if (given) return;
  }
  EXPECT_EQ(listing(), str("latest step-", 2 * last - 1, " step-", 2 * last, " "));
}

// Whole tensors are in all.h5. The Python test runs this one, too, and reads the file with h5py.
TEST_F(CheckpointTest, ViewShowsWholeTensors) {
  if (const char* given = std::getenv("TRIREME_INTEROP")) folder_ = given;
  CheckpointStore saved = store();
  save(saved, 3);
  Hdf5File view = Hdf5File::open(folder_ + "/step-3/all.h5");
  EXPECT_EQ(view.dataset_names().size(), globals().size());
  EXPECT_EQ(view.open_dataset("optimizer/step").read_all<int64_t>(), std::vector<int64_t>{-100});
}

}  // namespace
}  // namespace trireme
