// Communication of data parallelism, for mpirun -n 2 (or more): speed of the all-reduce beside MPI_Iallreduce and
// MPI_Allreduce, and the share of it that computation hides:
//   (sequential - overlapped) / non-blocking time, where sequential = compute, then all buckets; overlapped = the buckets are
//   started at regular times while computing; non-blocking time = all buckets alone, started together.
// Compute is a sleep (the cores are free) or matrix products (they are not). Medians of 15. Prints one JSON object.
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

#include <ATen/Parallel.h>

#include "base/json.h"
#include "base/tensor.h"
#include "comm/communicator.h"
#include "comm/process.h"
#include "comm/progress.h"

namespace {

using namespace trireme;

constexpr int kRepeats = 15;
constexpr int kNumBuckets = 8;
constexpr int64_t kBucketBytes = 4 << 20;

double seconds_of(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Median over the repeats of the slowest rank's time.
double median_seconds(const Communicator& world, const std::function<void()>& run) {
  std::vector<double> times;
  for (int i = 0; i < kRepeats + 2; ++i) {
    world.barrier();
    const double seconds = world.max(seconds_of(run));
    if (i >= 2) times.push_back(seconds);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

Json all_reduce_times(const Communicator& world) {
  Json rows = Json::array();
  for (int64_t bytes : {int64_t{64}, int64_t{4} << 10, int64_t{64} << 10, int64_t{1} << 20, int64_t{8} << 20, int64_t{32} << 20}) {
    at::Tensor x = at::zeros({bytes / 4});
    const int count = static_cast<int>(x.numel());
    const int calls = bytes <= (64 << 10) ? 50 : 1;  // the clock is coarse against a small one
    auto timed = [&](const std::function<void()>& run) {
      return median_seconds(world, [&] { for (int i = 0; i < calls; ++i) run(); }) / calls * 1e6;
    };
    Json row;
    row["bytes"] = bytes;
    row["trireme_us"] = timed([&] { world.all_reduce(x); });
    row["mpi_iallreduce_us"] = timed([&] {
      MPI_Request request;
      MPI_Iallreduce(MPI_IN_PLACE, x.data_ptr(), count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD, &request);
      MPI_Wait(&request, MPI_STATUS_IGNORE);
    });
    row["mpi_allreduce_us"] =
        timed([&] { MPI_Allreduce(MPI_IN_PLACE, x.data_ptr(), count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); });
    at::Tensor half = at::zeros({bytes / 2}, at::kBFloat16);
    row["trireme_bf16_us"] = timed([&] { world.all_reduce(half); });
    rows.push_back(row);
  }
  return rows;
}

Json hidden_share(const Communicator& world, const char* compute, const std::function<void()>& piece) {
  std::vector<at::Tensor> buckets;
  for (int b = 0; b < kNumBuckets; ++b) buckets.push_back(at::zeros({kBucketBytes / 4}));
  std::vector<Work> works(kNumBuckets);
  auto wait_all = [&] { for (Work& work : works) work.wait(); };
  const double alone = median_seconds(world, [&] {
    for (int b = 0; b < kNumBuckets; ++b) works[b] = world.start_all_reduce(buckets[b]);
    wait_all();
  });
  // The computation goes on for as long again after the last bucket, as a first layer's backward does.
  const double sequential = median_seconds(world, [&] {
    for (int b = 0; b < 2 * kNumBuckets; ++b) piece();
    for (int b = 0; b < kNumBuckets; ++b) works[b] = world.start_all_reduce(buckets[b]);
    wait_all();
  });
  const double overlapped = median_seconds(world, [&] {
    for (int b = 0; b < 2 * kNumBuckets; ++b) {
      piece();
      if (b < kNumBuckets) works[b] = world.start_all_reduce(buckets[b]);
      for (Work& work : works) work.test();
    }
    wait_all();
  });
  Json row;
  row["compute"] = compute;
  row["bytes_reduced"] = kNumBuckets * kBucketBytes;
  row["nonblocking_ms"] = alone * 1e3;
  row["sequential_ms"] = sequential * 1e3;
  row["overlapped_ms"] = overlapped * 1e3;
  row["hidden_share"] = (sequential - overlapped) / alone;
  return row;
}

}  // namespace

int main(int argc, char** argv) {
  Process process(&argc, &argv);
  Process::start_mpi();
  at::set_num_threads(read_host_load().threads_per_rank);
  Communicator world = Communicator::world();
  Json result;
  result["benchmark"] = "comm_overlap";
  result["ranks"] = process.size();
  result["threads"] = at::get_num_threads();
  result["cores"] = read_host_load().num_cores;
  result["yield_when_idle"] = process.yields_when_idle();
  result["mpi"] = mpi_version();
  result["all_reduce"] = all_reduce_times(world);
  at::Tensor a = at::randn({384, 384}), b = at::randn({384, 384}), c = at::empty({384, 384});
  auto sleep = [] { std::this_thread::sleep_for(std::chrono::milliseconds(4)); };
  auto multiply = [&] { for (int i = 0; i < 6; ++i) at::mm_out(c, a, b); };
  result["overlap"] = Json::array();
  for (bool thread : {true, false}) {
    set_progress_thread(thread);
    for (const auto& [name, piece] : std::vector<std::pair<const char*, std::function<void()>>>{{"sleep", sleep}, {"matrix products", multiply}}) {
      Json row = hidden_share(world, name, piece);
      row["progress_thread"] = thread;
      result["overlap"].push_back(row);
    }
  }
  if (process.rank() == 0) std::printf("%s\n", result.dump(2).c_str());
  return 0;
}
