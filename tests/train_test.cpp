// Parts of the training run that need no run: memory, signals, words of errors.
#include "base/tensor.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "base/error_text.h"
#include "scratch.h"
#include "train/agreement.h"
#include "train/build.h"
#include "train/check_config.h"
#include "train/device_choice.h"
#include "train/memory.h"
#include "train/signals.h"
#include "train/timeline.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

// A folder of files as /proc and /sys have them.
class Machine {
 public:
  Machine() {
    root_ = scratch_folder();
    write("proc/meminfo", "MemTotal:  16000 kB\nMemFree:  10 kB\nMemAvailable:  8000 kB\n");
  }
  ~Machine() { fs::remove_all(root_); }
  void write(const std::string& file, const std::string& text) const {
    fs::create_directories(fs::path(root_ + "/" + file).parent_path());
    std::ofstream(root_ + "/" + file) << text;
  }
  uint64_t available() const { return available_bytes(root_); }

 private:
  std::string root_;
};

TEST(Memory, OfAMachineWithoutGroups) { EXPECT_EQ(Machine().available(), 8000u << 10); }

TEST(Memory, AContainerWithVersion2) {
  Machine machine;
  machine.write("proc/self/cgroup", "0::/\n");
  machine.write("sys/fs/cgroup/memory.max", "max\n");
  machine.write("sys/fs/cgroup/memory.current", "900000\n");
  EXPECT_EQ(machine.available(), 8000u << 10);
  machine.write("sys/fs/cgroup/memory.max", "1000000\n");
  EXPECT_EQ(machine.available(), 100'000u);
  // What was read from files is given back when programs need it.
  machine.write("sys/fs/cgroup/memory.stat", "anon 100000\nfile 800000\ninactive_file 700000\nactive_file 50000\n");
  EXPECT_EQ(machine.available(), 850'000u);
  machine.write("sys/fs/cgroup/memory.current", "5000000\n");  // as for a moment while the kernel reclaims
  EXPECT_EQ(machine.available(), 0u);
}

TEST(Memory, AJobInAGroupOfAGroup) {
  Machine machine;
  machine.write("proc/self/cgroup", "12:cpu,cpuacct:/\n0::/slurm/job_7/step_0\n");
  for (const char* group : {"slurm/job_7", "slurm/job_7/step_0"})
    machine.write(std::string("sys/fs/cgroup/") + group + "/memory.current", "200000\n");
  machine.write("sys/fs/cgroup/slurm/job_7/step_0/memory.max", "max\n");
  machine.write("sys/fs/cgroup/slurm/job_7/memory.max", "1000000\n");
  EXPECT_EQ(machine.available(), 800'000u);
}

TEST(Memory, Version1WithAPathOfTheHost) {
  Machine machine;
  machine.write("proc/self/cgroup", "9:name=systemd:/\n4:memory:/docker/abc\n0::/\n");
  machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n");
  machine.write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1500000\n");
  machine.write("sys/fs/cgroup/memory/memory.stat",
                "inactive_file 1\nactive_file 1\ntotal_inactive_file 400000\ntotal_active_file 100000\n");
  EXPECT_EQ(machine.available(), 1'000'000u);
  machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");  // no limit
  EXPECT_EQ(machine.available(), 8000u << 10);
}

TEST(CheckConfig, StepsAreWholeOrAFractionOfTheRun) {
  Config config;
  config.model.path = "m";
  config.data.train = {"a.jsonl"}, config.data.eval = {"b.jsonl"};
  config.train.epochs = 1;
  config.schedule.warmup_steps = 1000;  // whether it fits is known when the rows are counted
  config.eval.every = 2, config.checkpoint.every = 0.3;
  CommandLine line;
  line.verb = "train";
  EXPECT_NO_THROW(check_config(config, line));
  config.eval.every = 2.5, config.checkpoint.every = 2.7;
  try {
    check_config(config, line);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(),
                 "eval.every=2.5: a whole number of steps is expected, or a fraction of the run below 1\n"
                 "checkpoint.every=2.7: a whole number of steps is expected, or a fraction of the run below 1");
  }
}

// libtorch adds a stack trace to what it throws; nobody is to see it.
TEST(ErrorText, OutOfMemoryIsOneSentence) {
  const std::string words =
      "out of memory: lower train.micro_batch_size, eval.micro_batch_size, generate.max_tokens or data.max_length, set train.recompute=full, or start fewer ranks";
  try {
    agree_on(Communicator::world(), [] { at::empty({int64_t{1} << 50}); });
    FAIL();
  } catch (const AgreedError& error) {
    EXPECT_EQ(error.what(), words);
    EXPECT_EQ(error.status(), kExitFailure);
  }
  EXPECT_EQ(text_of(std::bad_alloc()), words);
  try {
    at::zeros({2}).add_(at::zeros({3}));
    FAIL();
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find('\n'), std::string::npos) << "no stack trace: this test proves nothing";
    EXPECT_EQ(text_of(error).find('\n'), std::string::npos) << text_of(error);
    EXPECT_TRUE(text_of(error).starts_with("libtorch: The size of tensor a (2) must match")) << text_of(error);
  }
}

// In processes of their own, which the signals may end.
TEST(Signals, ManyOfManyKindsAtOnceAreOneStop) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        install_stop_signals();
        for (int signal : {SIGUSR1, SIGTERM, SIGTERM, SIGINT, SIGUSR1, SIGINT}) ::raise(signal);
        _exit(stop_requested() ? 7 : 8);
      },
      testing::ExitedWithCode(7), "");
}

TEST(Signals, TheSecondOfAKindEndsAtOnce) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        install_stop_signals();
        ::raise(SIGTERM);
        std::this_thread::sleep_for(std::chrono::milliseconds(2100));
        ::raise(SIGINT);
        ::raise(SIGUSR1);
        ::raise(SIGTERM);
        _exit(7);
      },
      testing::KilledBySignal(SIGTERM), "");
}

// Three thirds of a percent each lose as much by rounding: the sum is 100.0 % all the same.
TEST(TimeShares, AddUpToAHundred) {
  EXPECT_EQ(time_shares_text({{"compute", 1}, {"bubble", 1}, {"data", 1}}), "compute 33.3 %, bubble 33.4 %, data 33.3 %");
  EXPECT_EQ(time_shares_text({{"compute", 8}, {"wait/data", 0.5}, {"wait/gradients", 0.25}, {"wait/tensor", 1}, {"wait/world", 0.25}, {"other", 1e-9}}),
            "compute 80.0 %, communication not hidden 20.0 % (gradients 7.5 %, other ranks 2.5 %, tensor 10.0 %)");
  EXPECT_EQ(time_shares_text({{"compute", 0}, {"other", 2}}), "other 100.0 %");
}

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

TEST(DeviceChoice, NamesWhyCudaHasNoDevice) {
  EXPECT_EQ(missing_devices_text(0, {.driver = 12080, .runtime = 13000}, ""), "the driver is for CUDA 12.8 at most, this build is of CUDA 13.0: update the driver");
  EXPECT_EQ(missing_devices_text(0, {.driver = 13010, .runtime = 13000}, "system not yet initialized"),
            "CUDA cannot say which devices are here (system not yet initialized): look at nvidia-smi");
  for (int driver : {0, 13000, 14000}) EXPECT_EQ(missing_devices_text(0, {.driver = driver, .runtime = 13000}, ""), "") << driver;  // there is none
  EXPECT_EQ(missing_devices_text(1, {.driver = 12080, .runtime = 13000}, ""), "");  // a driver for other versions too
}

TEST(DeviceChoice, RefusesADeviceThatTheKernelsDoNotRunOn) {
  const size_t needed = 163 << 10;
  const auto report = [](const char* name, int major, int minor, const char* failure = "") {
    kernels::DeviceReport found;
    found.name = name, found.compute_major = major, found.compute_minor = minor, found.failure = failure;
    return found;
  };
  const auto said = [&](const kernels::DeviceReport& report, size_t shared) { return refusal([&] { check_device_report(3, report, shared, needed); }); };
  EXPECT_EQ(said(report("A", 8, 0), needed), "");
  EXPECT_EQ(said(report("H", 9, 0), 227 << 10), "");
  EXPECT_EQ(said(report("A", 8, 0), 0), "");  // unknown
  EXPECT_EQ(said(report("Old", 7, 5, "kernel launch: no kernel image"), 64 << 10),
            "run.device: CUDA device 3 (Old) has compute capability 7.5, the kernels need 8.0 (A100) or newer: take another with CUDA_VISIBLE_DEVICES, or set run.device=cpu");
  EXPECT_EQ(said(report("Small", 8, 9), 99 << 10),
            "run.device: CUDA device 3 (Small) lets a block have 99 KiB of shared memory, the kernels need 163 KiB, as A100, H100 and newer cards of data centers "
            "have: take another with CUDA_VISIBLE_DEVICES, or set run.device=cpu");
  EXPECT_EQ(said(report("", 0, 0, "cudaSetDevice: busy"), 0),
            "run.device: CUDA device 3 cannot be used: cudaSetDevice: busy. Look at nvidia-smi, take another with CUDA_VISIBLE_DEVICES, or set run.device=cpu");
}

TEST(DeviceChoice, RanksThatSeeTheSameTakeThemInTurnAndARankThatIsAloneTakesItsFirst) {
  using Seen = std::vector<std::vector<std::string>>;
  const auto choose = [](const Seen& seen, bool share = false) { return device_of_ranks(seen, share, "run.device=cuda"); };
  const auto said = [&](const Seen& seen) { return refusal([&] { choose(seen); }); };
  EXPECT_EQ(choose({{"A", "B"}, {"A", "B"}}), (std::vector{0, 1}));
  EXPECT_EQ(choose({{"A"}, {"B"}, {"C"}}), (std::vector{0, 0, 0}));
  EXPECT_EQ(choose({{"A", "B"}, {"C", "D"}, {"A", "B"}, {"C", "D"}}), (std::vector{0, 0, 1, 1}));
  EXPECT_EQ(choose({{"A", "B"}, {"B", "A"}}), (std::vector{0, 0}));
  EXPECT_EQ(choose({{"", ""}, {"", ""}}), (std::vector{0, 1}));
  EXPECT_EQ(choose({{"A", "B"}, {}, {"A", "B"}}), (std::vector{0, 0, 1}));
  EXPECT_EQ(choose({{"A", "B"}, {"A", "B"}, {"A", "B"}}, true), (std::vector{0, 1, 0}));
  EXPECT_EQ(said({{"A"}, {"A"}}), "run.device=cuda: this host has 2 ranks but sees 1 device: start one rank a device, set run.device=cpu, or for tests comm.share_device=true");
  EXPECT_EQ(said({{""}, {""}}), said({{"A"}, {"A"}}));
  EXPECT_EQ(said({{"C"}, {"A", "B"}, {"A"}}),
            "run.device=cuda: ranks 1 and 2 of this host see different devices and would both take one of them: let each see those alone that are its own "
            "(CUDA_VISIBLE_DEVICES, srun --gpus-per-task), or all ranks the same");
}

}  // namespace
}  // namespace trireme
