// Communication of data parallelism, for mpirun -n 2 (or more): speed of the all-reduce beside MPI_Iallreduce and
// MPI_Allreduce, and the share of it that computation hides:
//   (sequential - overlapped) / (sequential - compute alone)
//   gradient buckets: sequential = compute, then all buckets; overlapped = the buckets are started at regular times while
//     computing
//   ZeRO-3: a forward and a backward over the blocks of ShardedWeights, whose first gather nothing can hide;
//     sequential = compute, then that without compute; overlapped = both together
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
#include "parallel/sharded_weights.h"

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

// For each of the runs, taken in turn: the median over the repeats of the slowest rank's time.
std::vector<double> median_seconds(const Communicator& world, const std::vector<std::function<void()>>& runs) {
  std::vector<std::vector<double>> times(runs.size());
  for (int i = 0; i < kRepeats + 2; ++i)
    for (size_t r = 0; r < runs.size(); ++r) {
      world.barrier();
      const double seconds = world.max(seconds_of(runs[r]));
      if (i >= 2) times[r].push_back(seconds);
    }
  std::vector<double> medians;
  for (auto& list : times) {
    std::sort(list.begin(), list.end());
    medians.push_back(list[list.size() / 2]);
  }
  return medians;
}

Json all_reduce_times(const Communicator& world) {
  Json rows = Json::array();
  for (int64_t bytes :
       {int64_t{64}, int64_t{4} << 10, int64_t{64} << 10, int64_t{1} << 20, int64_t{8} << 20, int64_t{32} << 20}) {
    at::Tensor x = at::zeros({bytes / 4});
    const int count = static_cast<int>(x.numel());
    const int calls = bytes <= (64 << 10) ? 50 : 1;  // the clock is coarse against a small one
    auto repeated = [&](std::function<void()> run) -> std::function<void()> {
      return [run, calls] { for (int i = 0; i < calls; ++i) run(); };
    };
    const std::vector<double> medians = median_seconds(world, {
        repeated([&] { world.all_reduce(x); }),
        repeated([&] {
          MPI_Request request;
          MPI_Iallreduce(MPI_IN_PLACE, x.data_ptr(), count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD, &request);
          MPI_Wait(&request, MPI_STATUS_IGNORE);
        })});
    Json row;
    row["bytes"] = bytes;
    size_t column = 0;
    for (const char* name : {"trireme_us", "mpi_iallreduce_us"})
      row[name] = medians[column++] / calls * 1e6;
    rows.push_back(row);
  }
  return rows;
}

Json share_row(const char* what, const char* compute, int64_t bytes, const std::vector<double>& medians) {
  const double computing = medians[0], sequential = medians[1], overlapped = medians[2];
  return {{"what", what},
          {"compute", compute},
          {"bytes", bytes},
          {"compute_ms", computing * 1e3},
          {"sequential_ms", sequential * 1e3},
          {"overlapped_ms", overlapped * 1e3},
          {"hidden_share", (sequential - overlapped) / (sequential - computing)}};
}

Json hidden_buckets(const Communicator& world, const char* compute, const std::function<void()>& piece) {
  std::vector<at::Tensor> buckets;
  for (int b = 0; b < kNumBuckets; ++b) buckets.push_back(at::zeros({kBucketBytes / 4}));
  std::vector<Work> works(kNumBuckets);
  auto start_all = [&] { for (int b = 0; b < kNumBuckets; ++b) works[b] = world.start_all_reduce(buckets[b]); };
  auto wait_all = [&] { for (Work& work : works) work.wait(); };
  // Taken in turn, so that whatever else the machine does falls on all alike. The computation goes on for as long again
  // after the last bucket, as a first layer's backward does.
  const std::vector<double> medians = median_seconds(world, {
      [&] { for (int b = 0; b < 2 * kNumBuckets; ++b) piece(); },
      [&] {
        for (int b = 0; b < 2 * kNumBuckets; ++b) piece();
        start_all();
        wait_all();
      },
      [&] {
        for (int b = 0; b < 2 * kNumBuckets; ++b) {
          piece();
          if (b < kNumBuckets) works[b] = world.start_all_reduce(buckets[b]);
          for (Work& work : works) work.test();
        }
        wait_all();
      }});
  return share_row("gradient buckets", compute, kNumBuckets * kBucketBytes, medians);
}

Json hidden_prefetch(const Communicator& world, const char* compute, const std::function<void()>& piece) {
  constexpr int kNumBlocks = 12;
  std::vector<Parameter> parameters;
  for (int b = 0; b < kNumBlocks; ++b) {
    at::Tensor w = at::zeros({kBucketBytes / 4}).requires_grad_();
    parameters.push_back({"model.layers." + std::to_string(b) + ".weight", w, ShardSpec::whole(w)});
  }
  const Holders holders = same_holders(parameters, world);
  const GradientReducer reducer(parameters, holders, {.bucket_bytes = kBucketBytes, .zero = 3});
  ShardedWeights weights(parameters, holders, reducer, 3, kBucketBytes);
  auto pass = [&](const std::function<void()>& each) {
    for (int b = 0; b < kNumBlocks; ++b) {
      weights.acquire(b, false);
      each();
      weights.release(b, false);
    }
    for (int b = kNumBlocks - 1; b >= 0; --b) {
      weights.acquire(b, true);
      each();
      weights.release(b, true);
    }
    weights.release_all();
  };
  const std::vector<double> medians = median_seconds(world, {
      [&] { for (int b = 0; b < 2 * kNumBlocks; ++b) piece(); },
      [&] {
        for (int b = 0; b < 2 * kNumBlocks; ++b) piece();
        pass([] {});
      },
      [&] { pass(piece); }});
  return share_row("ZeRO-3 prefetch", compute, (2 * kNumBlocks - 1) * kBucketBytes, medians);
}

}  // namespace

int main(int argc, char** argv) {
  Process process(&argc, &argv);
  Process::start_mpi();
  at::set_num_threads(process.load().threads_per_rank);
  Communicator world = Communicator::world();
  Json result;
  result["benchmark"] = "comm_overlap";
  result["ranks"] = process.size();
  result["threads"] = at::get_num_threads();
  result["cores"] = process.load().num_cores;
  result["yield_when_idle"] = process.load().oversubscribed();
  result["mpi"] = mpi_version();
  result["all_reduce"] = all_reduce_times(world);
  at::Tensor a = at::randn({384, 384}), b = at::randn({384, 384}), c = at::empty({384, 384});
  // Longer than a piece's communication takes: what is measured is whether it is hidden, not whether it could be.
  auto sleep = [] { std::this_thread::sleep_for(std::chrono::milliseconds(12)); };
  auto multiply = [&] { for (int i = 0; i < 6; ++i) at::mm_out(c, a, b); };
  result["overlap"] = Json::array();
  for (const auto& [name, piece] :
       std::vector<std::pair<const char*, std::function<void()>>>{{"sleep", sleep}, {"matrix products", multiply}})
    for (auto* hidden : {&hidden_buckets, &hidden_prefetch}) result["overlap"].push_back(hidden(world, name, piece));
  if (process.rank() == 0) std::printf("%s\n", result.dump(2).c_str());
  return 0;
}
