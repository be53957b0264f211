// Speed and memory of loading a safetensors model, beside plain reading of the same file, by turns. Page cache warm:
//   scan     the file through one reused buffer of 1 MiB a thread, kept nowhere (what `cat` costs)
//   read     the file into fresh memory (what any loader must at least do)
//   load     load_weights() into fresh memory, same dtype
//   convert  the same from the bf16 file into fp32 weights
// and from the disk, the file's pages dropped from the cache before each: cold_scan, cold_load.
// bench_load_speed FOLDER [GB]: writes a model of that size (default 2) there and removes it. Medians of 9. JSON.
#include <fcntl.h>
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "base/check.h"
#include "base/json.h"
#include "checkpoint/load_weights.h"

namespace {

using namespace trireme;
namespace fs = std::filesystem;

constexpr int64_t kTensorElements = 16 << 20;
constexpr int kRepeats = 9;

double seconds_of(const std::function<void()>& run) {
  auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// All threads read pieces of 1 MiB; into `keep` at their place, or over and over into a buffer.
void read_file_parallel(const std::string& path, char* keep) {
  constexpr uint64_t kPiece = 1 << 20;
  uint64_t bytes = fs::file_size(path);
  int fd = open(path.c_str(), O_RDONLY);
#pragma omp parallel
  {
    std::vector<char> buffer(keep ? 0 : kPiece);
#pragma omp for schedule(dynamic, 4)
    for (uint64_t at = 0; at < bytes; at += kPiece)
      TRIREME_CHECK(pread(fd, keep ? keep + at : buffer.data(), std::min(kPiece, bytes - at), static_cast<off_t>(at)) >
                    0);
  }
  close(fd);
}

// Drops the file's pages from the page cache; they are clean, as the writer synchronises.
void forget(const std::string& path) {
  int fd = open(path.c_str(), O_RDONLY);
  TRIREME_CHECK(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
  close(fd);
}

int64_t resident(const char* key) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (word == key) return status >> word, std::stoll(word) * 1024;
  return 0;
}

std::vector<Parameter> make_targets(int64_t num_tensors, at::ScalarType dtype) {
  std::vector<Parameter> targets;
  for (int64_t i = 0; i < num_tensors; ++i) {
    at::Tensor value = at::empty({kTensorElements / 4096, 4096}, dtype);
    targets.push_back({"t" + std::to_string(i), value, ShardSpec::whole(value)});
  }
  return targets;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: bench_load_speed FOLDER [GB]\n");
    return 2;
  }
  std::string folder = std::string(argv[1]) + "/bench_load_speed";
  auto num_tensors = static_cast<int64_t>((argc > 2 ? std::atof(argv[2]) : 2.0) * 1e9 / (2.0 * kTensorElements));
  std::vector<TensorSource> sources;
  for (int64_t i = 0; i < num_tensors; ++i)
    sources.push_back({"t" + std::to_string(i), at::kBFloat16, {kTensorElements / 4096, 4096}, [i] {
                         return at::full({kTensorElements / 4096, 4096}, static_cast<double>(i), at::kBFloat16);
                       }});
  write_safetensors_folder(folder, sources, ~0ull);
  std::string path = folder + "/model.safetensors";
  auto bytes = static_cast<double>(fs::file_size(path));

  std::map<std::string, std::vector<double>> seconds;
  int64_t extra = 0;
  for (int repeat = 0; repeat < kRepeats + 1; ++repeat) {
    std::map<std::string, double> now;
    now["scan"] = seconds_of([&] { read_file_parallel(path, nullptr); });
    {
      std::unique_ptr<char[]> memory(new char[static_cast<size_t>(bytes)]);  // not touched before
      now["read"] = seconds_of([&] { read_file_parallel(path, memory.get()); });
    }
    forget(path);
    now["cold_scan"] = seconds_of([&] { read_file_parallel(path, nullptr); });
    {
      std::vector<Parameter> targets = make_targets(num_tensors, at::kBFloat16);
      forget(path);
      now["cold_load"] = seconds_of([&] { load_weights(folder, targets); });
    }
    for (at::ScalarType dtype : {at::kBFloat16, at::kFloat}) {
      std::vector<Parameter> targets = make_targets(num_tensors, dtype);
      std::ofstream("/proc/self/clear_refs") << "5";  // the peak starts again
      int64_t before = resident("VmRSS:");
      now[dtype == at::kFloat ? "convert" : "load"] = seconds_of([&] { load_weights(folder, targets); });
      int64_t model = num_tensors * kTensorElements * static_cast<int64_t>(c10::elementSize(dtype));
      extra = std::max(extra, resident("VmHWM:") - before - model);
    }
    if (repeat == 0) continue;  // warms the page cache
    for (const auto& [name, value] : now) seconds[name].push_back(value);
  }
  fs::remove_all(folder);

  Json result = {{"benchmark", "load_speed"}, {"threads", omp_get_max_threads()}, {"file_bytes", bytes}};
  for (const auto& [name, values] : seconds) result["gigabytes_per_second"][name] = bytes / median(values) / 1e9;
  for (const char* other : {"scan", "read"}) result[str("load_over_", other)] = median(seconds[other]) / median(seconds["load"]);
  result["cold_load_over_cold_scan"] = median(seconds["cold_scan"]) / median(seconds["cold_load"]);
  result["memory_beside_the_model_bytes"] = extra;
  result["largest_tensor_bytes"] = kTensorElements * 4;
  std::printf("%s\n", result.dump(2).c_str());
  return 0;
}
