// trireme doctor: what this machine offers, and what to change.
#include "base/tensor.h"

#include <dlfcn.h>
#include <sys/statvfs.h>
#include <torch/version.h>
#include <unistd.h>

#include <filesystem>
#include <iostream>
#include <set>

#include "base/counted.h"
#include "comm/communicator.h"
#include "kernels/cublaslt.h"
#include "kernels/kernels.h"
#include "data/token_file.h"
#include "launch/verbs.h"
#include "train/memory.h"
#include "train/progress.h"

namespace trireme {
namespace {

std::string line_of(const std::string& what, const std::string& found, const std::string& change = "") {
  return str(what, std::string(what.size() < 14 ? 14 - what.size() : 1, ' '), found, "\n", change.empty() ? "" : "  change: " + change + "\n");
}
void say(const std::string& what, const std::string& found, const std::string& change = "") {
  std::cout << line_of(what, found, change);
}

void say_cuda() {
#ifdef TRIREME_CUDA
  int n = kernels::num_devices();
  const kernels::Versions v = kernels::versions();
  auto number = [](int version) { return str(version / 1000, ".", version % 1000 / 10); };
  say("CUDA", str("runtime ", number(v.runtime), ", ", v.driver == 0 ? "no driver" : "driver for up to " + number(v.driver), ", ", n,
                  n == 1 ? " device" : " devices", n == 0 ? "; training runs on the CPU" : ""));
  for (int i = 0; i < n; ++i) {
    kernels::DeviceReport d = kernels::probe_device(i);
    say(str("CUDA ", i), str(d.name, ", compute ", d.compute_major, ".", d.compute_minor, ", ", d.num_multiprocessors,
                             " multiprocessors, ", bytes_text(static_cast<double>(d.free_bytes)), " of ",
                             bytes_text(static_cast<double>(d.total_bytes)), " free; ",
                             d.failure.empty() ? "kernels of this build run" : "cannot be used: " + d.failure),
        d.failure.empty() ? "" : "compare the driver's CUDA version (nvidia-smi) with this build's");
  }
  try {
    const size_t version = kernels::load_cublaslt(kernels::kCublasLt).get_version();
    say("cuBLASLt", str(version / 10000, ".", version / 100 % 100, ".", version % 100));
  } catch (const std::runtime_error& error) {
    say("cuBLASLt", n == 0 ? "not found; not needed on the CPU" : "not found", n == 0 ? "" : error.what());
  }
#else
  say("CUDA", "not in this build (TRIREME_CUDA=OFF)");
#endif
}

void say_nccl() {
  void* nccl = ::dlopen("libnccl.so.2", RTLD_NOW);
  auto get = nccl ? reinterpret_cast<int (*)(int*)>(::dlsym(nccl, "ncclGetVersion")) : nullptr;
  int v = 0;
  if (!get || get(&v) != 0) return say("NCCL", "not found; not needed on the CPU");
  say("NCCL", str(v / 10000, ".", v / 100 % 100, ".", v % 100));
}

// The first line is the same on every rank of a host.
std::string this_host(const Process& process) {
  const HostLoad& load = process.load();
  std::string text = line_of("host", str(process.host(), ": ", counted(process.size(), "rank"), " in all, ", load.num_local_ranks, " here"));
  text += line_of("cores", str(load.num_cores, " for ", counted(load.num_local_ranks, "rank"), " of ", counted(load.threads_per_rank, "thread"),
                                mpi_yields_when_idle() ? "; a rank that waits gives its core away" : ""),
                  !load.oversubscribed() ? ""
                  : load.bound           ? "a rank is bound to fewer cores than it has threads: mpirun --bind-to none, or set OMP_NUM_THREADS"
                                         : "more threads than cores: set OMP_NUM_THREADS, or start fewer ranks");
  return text + line_of("memory", str(bytes_text(static_cast<double>(available_bytes())), " free"));
}

}  // namespace

ExitStatus verb_doctor(const Config& config, const CommandLine&, const Process& process) {
  const auto hosts = Communicator::world().gather_bytes(this_host(process));
  if (process.rank() != 0) return kExitDone;
  say("trireme", TRIREME_VERSION);
  say("MPI", mpi_version());
  std::set<std::string> told;
  for (const std::string& text : hosts)
    if (told.insert(text.substr(0, text.find('\n'))).second) std::cout << text;
  std::filesystem::path dir = config.run.dir.empty() ? std::filesystem::path("runs") : std::filesystem::path(config.run.dir);
  while (!dir.empty() && !std::filesystem::exists(dir)) dir = dir.parent_path();
  if (dir.empty()) dir = ".";
  struct statvfs disk {};
  bool writable = ::access(dir.c_str(), W_OK) == 0 && ::statvfs(dir.c_str(), &disk) == 0;
  double free = static_cast<double>(disk.f_bavail) * static_cast<double>(disk.f_frsize);
  say("file system", writable ? str(std::filesystem::absolute(dir).string(), ": ", bytes_text(free), " free") : str(dir.string(), " cannot be written"),
      !writable ? "set run.dir to a folder that can be written" : free < 1e9 ? "less than 1 GB is free" : "");
  const std::string cache = config.data.cache.empty() ? default_token_cache() : config.data.cache;
  const TokenCacheUse use = prune_token_cache(cache, std::chrono::hours(24 * 365 * 30));
  say("token cache", str(cache, ": ", use.files, " files, ", bytes_text(static_cast<double>(use.bytes))));
  say("libtorch", str(TORCH_VERSION, ", vector code ", at::get_cpu_capability()));
  say_cuda();
  say_nccl();
  return kExitDone;
}

}  // namespace trireme
