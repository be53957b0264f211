// This process among its peers: starts MPI, says who we are, ends MPI.
#pragma once

#include <functional>
#include <string>

namespace trireme {

// What the environment says about the ranks of this host and their threads, before MPI starts.
struct HostLoad {
  int num_local_ranks = 1;   // ranks on this host, as Open MPI or Slurm tells; else 1
  int threads_per_rank = 1;  // OMP_NUM_THREADS; where unset: cores / ranks, at least 1 (main gives it to ATen)
  int num_cores = 1;         // that this process may run on
  // More busy threads than cores: a rank that waits inside MPI must give its core away.
  bool oversubscribed() const { return num_local_ranks * threads_per_rank > num_cores; }
};
HostLoad read_host_load();

// RAII over MPI_Init_thread(MPI_THREAD_MULTIPLE) and MPI_Finalize. One object a program, made first thing in main() and
// destroyed last, when every rank is at its end: MPI_Finalize waits for all. An exception of one rank alone must so be
// caught while the Process lives, and end in abort(). Where MPI runs already (a test's main), it is used and not
// finalized.
//   - Started without a launcher it is a world of one, and MPI starts (0.3 s) only if it is needed.
//   - OMPI_MCA_mpi_yield_when_idle=1 is set first where the host is oversubscribed, unless the user has set it.
//   - ConfigError, with the command to use, where the environment says several tasks but the world is one process: an
//     mpirun of another MPI, srun without a PMIx plug-in, a Slurm script that forgot its mpirun.
//   - SystemError where MPI does not start.
class Process {
 public:
  explicit Process(int* argc = nullptr, char*** argv = nullptr);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  int local_rank() const { return local_rank_; }  // among the ranks of this host, from 0
  int local_size() const { return local_size_; }
  const std::string& host() const { return host_; }
  bool yields_when_idle() const { return yields_; }

  // Ends all ranks with this status at once, from any thread. For a rank that fails alone: its peers wait in
  // collectives. Never returns.
  [[noreturn]] static void abort(int status);

  static bool is_alone();   // a Process lives that has not started MPI
  static void start_mpi();  // where it does not run yet

 private:
  int rank_ = 0, size_ = 1, local_rank_ = 0, local_size_ = 1;
  std::string host_;
  bool yields_ = false, found_running_ = false;
};

// What is wrong with this start, and the command to use; empty where nothing is. `variable` reads the environment.
std::string launch_problem(const std::function<const char*(const char*)>& variable);

std::string host_name();

// Open MPI's own version text, for `doctor`.
std::string mpi_version();

}  // namespace trireme
