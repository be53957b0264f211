#include "base/hdf5.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <numeric>

#include "scratch.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

class Hdf5Test : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = scratch_folder();
    path_ = folder_ + "/a.h5";
  }
  void TearDown() override { fs::remove_all(folder_); }
  template <typename F>
  std::string error_of(F&& f) {
    try {
      f();
    } catch (const Error& error) {
      kind_ = error.status();
      return error.what();
    }
    return "did not throw";
  }
  std::string folder_, path_;
  int kind_ = -1;
};

TEST_F(Hdf5Test, RoundTripOfEveryType) {
  std::vector<Hdf5Type> types = {Hdf5Type::kUint8,   Hdf5Type::kInt8,     Hdf5Type::kInt16,   Hdf5Type::kUint16,
                                 Hdf5Type::kInt32,   Hdf5Type::kUint32,   Hdf5Type::kInt64,   Hdf5Type::kUint64,
                                 Hdf5Type::kFloat16, Hdf5Type::kBfloat16, Hdf5Type::kFloat32, Hdf5Type::kFloat64};
  std::vector<unsigned char> bytes(6 * 8);
  std::iota(bytes.begin(), bytes.end(), 1);
  {
    Hdf5File file = Hdf5File::create(path_);
    for (Hdf5Type type : types)
      file.create_dataset(str("group/", hdf5_type_name(type)), type, {2, 3}).write(bytes.data(), 0, 6);
    file.create_dataset("scalar", Hdf5Type::kFloat64, {}).write_all(std::vector<double>{2.5});
    file.create_dataset("empty", Hdf5Type::kInt64, {0, 4});
    file.set_attribute("text", "häf\n");
    file.set_attribute("text", std::string(200000, 'x'));
    file.close();
  }
  Hdf5File file = Hdf5File::open(path_);
  EXPECT_EQ(file.dataset_names().size(), types.size() + 2);
  for (Hdf5Type type : types) {
    Hdf5Dataset dataset = file.open_dataset(str("group/", hdf5_type_name(type)));
    EXPECT_EQ(dataset.type(), type) << hdf5_type_name(type);
    EXPECT_EQ(dataset.shape(), (std::vector<uint64_t>{2, 3}));
    EXPECT_EQ(dataset.file_offset() % 64, 0u);
    std::vector<unsigned char> got(4 * hdf5_type_bytes(type));
    dataset.read(got.data(), 1, 4);
    EXPECT_TRUE(std::equal(got.begin(), got.end(), bytes.begin() + static_cast<long>(hdf5_type_bytes(type))));
  }
  EXPECT_EQ(file.open_dataset("scalar").read_all<double>(), std::vector<double>{2.5});
  EXPECT_TRUE(file.open_dataset("empty").read_all<int64_t>().empty());
  EXPECT_EQ(file.attribute("text"), std::string(200000, 'x'));
}

TEST_F(Hdf5Test, RefusesWithTheRightWords) {
  EXPECT_EQ(error_of([&] { Hdf5File::open(path_); }), "cannot open " + path_ + ": No such file or directory.");
  EXPECT_EQ(kind_, kExitData);
  EXPECT_EQ(error_of([&] { Hdf5File::create("/nowhere/a.h5"); }),
            "cannot create /nowhere/a.h5: No such file or directory.");
  EXPECT_EQ(kind_, kExitFailure);
  {
    Hdf5File file = Hdf5File::create(path_);
    file.create_dataset("ids", Hdf5Type::kInt32, {100000}).write_all(std::vector<int32_t>(100000, 7));
    file.close();
  }
  {
    Hdf5File file = Hdf5File::open(path_);
    EXPECT_EQ(error_of([&] { file.open_dataset("idx"); }), path_ + " has no dataset idx.");
    EXPECT_EQ(error_of([&] { file.attribute("key"); }), path_ + " has no attribute key.");
    EXPECT_EQ(error_of([&] { file.open_dataset("ids").read_all<int64_t>(); }),
              path_ + ": dataset ids holds int32, not int64.");
    EXPECT_THROW(file.open_dataset("ids").read(nullptr, 99999, 2), InternalError);
  }
  fs::resize_file(path_, 200000);
  EXPECT_NE(error_of([&] { Hdf5File::open(path_); }).find(path_ + " is not a whole HDF5 file: "), std::string::npos);
  fs::resize_file(path_, 0);
  EXPECT_NE(error_of([&] { Hdf5File::open(path_); }).find(path_ + " is not a whole HDF5 file: "), std::string::npos);
  EXPECT_EQ(kind_, kExitData);
}

TEST_F(Hdf5Test, ReadsWhileAnotherThreadsOwnDescriptorReadsTheOffset) {
  Hdf5File file = Hdf5File::create(path_);
  Hdf5Dataset dataset = file.create_dataset("ids", Hdf5Type::kInt32, {3});
  dataset.write_all(std::vector<int32_t>{4, 5, 6});
  std::FILE* raw = std::fopen(path_.c_str(), "rb");
  int32_t got[3];
  std::fseek(raw, static_cast<long>(dataset.file_offset()), SEEK_SET);
  EXPECT_EQ(std::fread(got, 4, 3, raw), 3u);
  std::fclose(raw);
  EXPECT_EQ(got[2], 6);
}

// A file size limit stands for a full disk: both make the system refuse the space.
TEST_F(Hdf5Test, FullDiskIsToldWhenSpaceIsReserved) {
  pid_t child = fork();
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    rlimit limit{1 << 20, 1 << 20};
    setrlimit(RLIMIT_FSIZE, &limit);
    std::string what = error_of([&] {
      Hdf5File file = Hdf5File::create(path_);
      file.create_dataset("small", Hdf5Type::kUint8, {1000});
      file.create_dataset("big", Hdf5Type::kUint8, {2 << 20});
    });
    bool right = what.find("cannot write " + path_ + ": File too large (") == 0 && kind_ == kExitFailure;
    if (!right) std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(right ? 0 : 1);  // exit, not _exit: HDF5's own end of process must also survive
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace trireme
