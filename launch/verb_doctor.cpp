// trireme doctor: what this machine offers, and what to change.
#include "base/tensor.h"

#include <dlfcn.h>
#include <sys/statvfs.h>
#include <torch/version.h>
#include <unistd.h>

#include <filesystem>
#include <iostream>

#include "kernels/kernels.h"
#include "launch/verbs.h"
#include "train/progress.h"

namespace trireme {
namespace {

void say(const std::string& what, const std::string& found, const std::string& change = "") {
  std::cout << what << std::string(what.size() < 14 ? 14 - what.size() : 1, ' ') << found << "\n";
  if (!change.empty()) std::cout << "  change: " << change << "\n";
}

void say_cuda() {
#ifdef TRIREME_CUDA
  int n = kernels::num_devices();
  if (n == 0) return say("CUDA", "no device or no driver; training runs on the CPU");
  for (int i = 0; i < n; ++i) {
    kernels::DeviceReport d = kernels::probe_device(i);
    say(str("CUDA ", i), str(d.name, ", compute ", d.compute_major, ".", d.compute_minor, ", ", d.num_multiprocessors,
                             " multiprocessors, ", bytes_text(static_cast<double>(d.free_bytes)), " of ",
                             bytes_text(static_cast<double>(d.total_bytes)), " free; ",
                             d.failure.empty() ? "kernels of this build run" : "cannot be used: " + d.failure),
        d.failure.empty() ? "" : "compare the driver's CUDA version (nvidia-smi) with this build's");
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

}  // namespace

ExitStatus verb_doctor(const Config& config, const CommandLine&, const Process& process) {
  if (process.rank() != 0) return kExitDone;
  HostLoad load = read_host_load();
  std::string mpi = mpi_version();
  say("trireme", TRIREME_VERSION);
  say("MPI", mpi.substr(0, mpi.find(',')));
  say("host", str(process.host(), ": ", process.size(), " ranks in all, ", load.num_local_ranks, " here"));
  say("cores", str(load.num_cores, " for ", load.num_local_ranks, " ranks of ", load.threads_per_rank, " threads"),
      load.oversubscribed() ? "more threads than cores: set OMP_NUM_THREADS, or start fewer ranks" : "");
  say("memory", str(bytes_text(static_cast<double>(available_bytes())), " free"));
  std::filesystem::path dir = config.run.dir.empty() ? std::filesystem::path("runs") : std::filesystem::path(config.run.dir);
  while (!dir.empty() && !std::filesystem::exists(dir)) dir = dir.parent_path();
  if (dir.empty()) dir = ".";
  struct statvfs disk {};
  bool writable = ::access(dir.c_str(), W_OK) == 0 && ::statvfs(dir.c_str(), &disk) == 0;
  double free = static_cast<double>(disk.f_bavail) * static_cast<double>(disk.f_frsize);
  say("file system", writable ? str(std::filesystem::absolute(dir).string(), ": ", bytes_text(free), " free") : str(dir.string(), " cannot be written"),
      !writable ? "set run.dir to a folder that can be written" : free < 1e9 ? "less than 1 GB is free" : "");
  say("libtorch", str(TORCH_VERSION, ", vector code ", at::get_cpu_capability()));
  say_cuda();
  say_nccl();
  return kExitDone;
}

}  // namespace trireme
