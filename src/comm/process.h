// This process among its peers: starts MPI, says who we are, ends MPI.
#pragma once

#include <string>

namespace trireme {

// What the environment says about the ranks of this host and their threads, before MPI starts.
struct HostLoad {
  int num_local_ranks = 1;   // ranks on this host (OMPI_COMM_WORLD_LOCAL_SIZE, SLURM_TASKS_PER_NODE's own count, else 1)
  int threads_per_rank = 1;  // OMP_NUM_THREADS; 1 where unset and several ranks share the host, else the cores
  int num_cores = 1;         // that this process may run on
  // More busy threads than cores: waiting inside MPI must give its core away.
  bool oversubscribed() const { return num_local_ranks * threads_per_rank > num_cores; }
};
HostLoad read_host_load();

// RAII over MPI_Init_thread(MPI_THREAD_MULTIPLE) and MPI_Finalize. One object a program, made first thing in main(),
// destroyed last (all Communicators before it). Works without mpirun as a world of one. Where MPI runs already (a test's
// main), it is used and not finalized.
//   - OMPI_MCA_mpi_yield_when_idle=1 is set first where the host is oversubscribed and the user has not set it.
//   - ConfigError, on a rank that alone sees a world of one though the launcher's environment says several (an mpirun
//     of another MPI, srun without --mpi=pmix); it names the command to use.
//   - SystemError where MPI does not start.
// If the destructor runs during an exception, MPI is finalized as well: main() decides before that whether to abort().
class Process {
 public:
  Process(int* argc = nullptr, char*** argv = nullptr);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  int local_rank() const { return local_rank_; }  // among the ranks of this host, from 0
  int local_size() const { return local_size_; }
  const std::string& host() const { return host_; }
  bool yields_when_idle() const { return yields_; }

  // Ends all ranks with this status, at once, from any thread. For a rank that fails alone: its peers wait in
  // collectives. Never returns.
  [[noreturn]] static void abort(int status);

 private:
  int rank_ = 0, size_ = 1, local_rank_ = 0, local_size_ = 1;
  std::string host_;
  bool yields_ = false, owns_ = false;
};

std::string host_name();

// Open MPI's own version text, for `doctor`.
std::string mpi_version();

}  // namespace trireme
