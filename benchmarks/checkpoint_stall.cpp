// How long a checkpoint holds up the training step, for mpirun -n N: a background save (its start, which copies to host
// memory, and its commit, once every rank has written) beside a save that is waited for.
// bench_checkpoint_stall FOLDER [MB a rank]: default 256, in tensors of 4 MB, half of them replicated. Medians of 7 of
// the slowest rank. JSON.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "checkpoint/checkpoint.h"
#include "comm/process.h"

namespace {

using namespace trireme;

constexpr int kRepeats = 7;
constexpr int64_t kElements = 1 << 20;

}  // namespace

int main(int argc, char** argv) {
  Process process(&argc, &argv);
  Process::start_mpi();
  if (argc < 2) {
    std::fprintf(stderr, "usage: bench_checkpoint_stall FOLDER [MB a rank]\n");
    return 2;
  }
  Communicator world = Communicator::world();
  std::string folder = std::string(argv[1]) + "/bench_checkpoint_stall";
  int num_tensors = std::max(2, (argc > 2 ? std::atoi(argv[2]) : 256) / 4);
  std::vector<NamedTensor> tensors;
  for (int i = 0; i < num_tensors; ++i) {
    at::Tensor value = at::randn({kElements});
    bool replicated = i % 2 == 0;
    tensors.push_back({"t" + std::to_string(i),
                       value,
                       {{replicated ? kElements : kElements * world.size()},
                        {replicated ? 0 : kElements * world.rank()},
                        replicated}});
  }
  auto timed = [&](auto&& run) {
    world.barrier();
    auto begin = std::chrono::steady_clock::now();
    run();
    return world.max(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  };
  auto median = [](std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
  };

  std::vector<double> start, commit, whole;
  CheckpointStore store(folder, world, 1);
  store.prepare();
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    start.push_back(timed([&] { store.start_save(2 * repeat, tensors, {}); }));
    while (world.agree(store.finished() ? 0 : 1) != 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    commit.push_back(timed([&] { store.wait(); }));
    whole.push_back(timed([&] { store.save(2 * repeat + 1, tensors, {}); }));
  }
  world.barrier();
  if (world.rank() == 0) {
    std::filesystem::remove_all(folder);
    Json result = {{"benchmark", "checkpoint_stall"},       {"ranks", world.size()},
                   {"bytes_a_rank", num_tensors * kElements * 4}, {"start_seconds", median(start)},
                   {"commit_seconds", median(commit)},      {"held_up_seconds", median(start) + median(commit)},
                   {"waited_for_seconds", median(whole)}};
    std::printf("%s\n", result.dump(2).c_str());
  }
  return 0;
}
