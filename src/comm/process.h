// This process among its peers: starts MPI, says who we are, ends MPI.
#pragma once

#include <bitset>
#include <functional>
#include <string>
#include <vector>

namespace trireme {

using CoreMask = std::bitset<1024>;  // the cores that a process may run on

// The ranks of this host, their threads and cores.
struct HostLoad {
  int num_local_ranks = 1;
  int num_cores = 1;         // that these ranks may run on, together
  double cores_of_rank = 1;  // of the rank that has fewest; a core that several ranks may use counts in parts
  int threads_per_rank = 1;  // OMP_NUM_THREADS; where unset: cores_of_rank, rounded down, at least 1
  bool bound = false;        // a rank may not run on all of these cores
  // More busy threads than cores: a rank that waits inside MPI must give its core away.
  bool oversubscribed() const { return threads_per_rank > cores_of_rank + 1e-9; }
};
// From the masks of all ranks of the host. `omp_threads`: OMP_NUM_THREADS, 0 where it is unset.
HostLoad host_load(const std::vector<CoreMask>& masks, int omp_threads);
// Before MPI starts, from this process's mask and the environment: how many ranks are here, as Open MPI or Slurm tells, and
// whether mpirun has bound each to cores of its own.
HostLoad guess_host_load(const CoreMask& mine, const std::function<const char*(const char*)>& variable);

// RAII over MPI_Init_thread(MPI_THREAD_MULTIPLE) and MPI_Finalize. One object a program, made first thing in main() and
// destroyed last, when every rank is at its end: MPI_Finalize waits for all. An exception of one rank alone must so be
// caught while the Process lives, and end in abort(). Where MPI runs already (a test's main), it is used and not
// finalized.
//   - Started without a launcher it is a world of one, and MPI starts (0.3 s) only if it is needed.
//   - OMPI_MCA_mpi_yield_when_idle=1 is set first where the host seems oversubscribed, unless the user has set it.
//   - ConfigError, with the command to use, where the environment says several tasks but the world is one process: an
//     mpirun of another MPI, srun without a PMIx plug-in, a Slurm script that forgot its mpirun.
//   - SystemError where MPI does not start.
//   - Where it has started MPI with peers, collectives and this object's end are watched (comm/watchdog.h, kCommTimeout_s).
class Process {
 public:
  explicit Process(int* argc = nullptr, char*** argv = nullptr);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  int local_size() const { return load_.num_local_ranks; }
  int local_rank() const { return local_rank_; }  // among those of this host
  const std::string& host() const { return host_; }
  const HostLoad& load() const { return load_; }

  // Ends all ranks with this status at once, from any thread. For a rank that fails alone: its peers wait in
  // collectives. Never returns.
  [[noreturn]] static void abort(int status);

  static bool is_alone();   // a Process lives that has not started MPI
  static void start_mpi();  // where it does not run yet

 private:
  int rank_ = 0, size_ = 1, local_rank_ = 0;
  HostLoad load_;
  std::string host_;
  bool found_running_ = false;
};

// What is wrong with this start, and the command to use; empty where nothing is. `variable` reads the environment.
std::string launch_problem(const std::function<const char*(const char*)>& variable);

std::string host_name();

// Whether a rank that waits gives its core away, as the MPI that runs says itself; false where none runs.
bool mpi_yields_when_idle();

// Name and number of the MPI library.
std::string mpi_version();

}  // namespace trireme
