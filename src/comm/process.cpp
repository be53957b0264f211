#include "comm/process.h"

#include <mpi.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "base/check.h"
#include "base/log.h"
#include "comm/watchdog.h"

namespace trireme {

namespace {

std::atomic<bool> alone = false;

// A positive integer at the beginning of the text; 0 where there is none.
int leading_count(const char* text) {
  if (text == nullptr) return 0;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  return end == text || value < 0 || value > 1'000'000 ? 0 : static_cast<int>(value);
}

bool has_launcher() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMIX_NAMESPACE", "PMI_RANK"})
    if (std::getenv(name) != nullptr) return true;
  return false;
}

const char* environment(const char* name) { return std::getenv(name); }

CoreMask my_cores() {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CoreMask mask;
  if (sched_getaffinity(0, sizeof cores, &cores) == 0)
    for (size_t core = 0; core < mask.size(); ++core) mask[core] = CPU_ISSET(core, &cores);
  return mask;
}

bool mpi_initialized() {
  int flag = 0;
  MPI_Initialized(&flag);
  return flag != 0;
}

}  // namespace

HostLoad host_load(const std::vector<CoreMask>& masks, int omp_threads) {
  CoreMask all;
  std::vector<int> num_users(all.size());
  for (const CoreMask& mask : masks) {
    all |= mask;
    for (size_t core = 0; core < mask.size(); ++core) num_users[core] += mask[core];
  }
  HostLoad load;
  load.num_local_ranks = static_cast<int>(masks.size());
  load.num_cores = std::max(1, static_cast<int>(all.count()));
  load.cores_of_rank = load.num_cores;
  for (const CoreMask& mask : masks) {
    double cores = 0;
    for (size_t core = 0; core < mask.size(); ++core)
      if (mask[core]) cores += 1.0 / num_users[core];
    load.cores_of_rank = std::min(load.cores_of_rank, cores);
    load.bound |= mask != all;
  }
  load.threads_per_rank = omp_threads > 0 ? omp_threads : std::max(1, static_cast<int>(load.cores_of_rank + 1e-9));
  return load;
}

HostLoad guess_host_load(const CoreMask& mine, const std::function<const char*(const char*)>& variable) {
  int num_ranks = 1;
  for (const char* name :
       {"OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"}) {  // Slurm: "2(x3),1": the first node's
    if (const int count = leading_count(variable(name)); count > 0) {
      num_ranks = count;
      break;
    }
  }
  const bool bound = leading_count(variable("OMPI_MCA_orte_bound_at_launch")) > 0;
  HostLoad load = host_load(std::vector<CoreMask>(bound ? 1 : static_cast<size_t>(num_ranks), mine),
                            leading_count(variable("OMP_NUM_THREADS")));
  load.num_local_ranks = num_ranks;
  load.bound = bound;
  return load;
}

std::string launch_problem(const std::function<const char*(const char*)>& variable) {
  if (variable("OMPI_COMM_WORLD_SIZE") != nullptr) return "";  // our own mpirun was asked for one rank
  if (const int tasks = leading_count(variable("SLURM_STEP_NUM_TASKS")); tasks > 1)
    return str("srun started ", tasks, " tasks (SLURM_STEP_NUM_TASKS=", tasks,
               ") but each is alone in its MPI world; use: srun --mpi=pmix -n ", tasks,
               " trireme ..., or inside the allocation: mpirun -n ", tasks, " trireme ...");
  if (variable("SLURM_STEP_NUM_TASKS") == nullptr)
    if (const int tasks = leading_count(variable("SLURM_NTASKS")); tasks > 1)
      return str("Slurm has allocated ", tasks, " tasks (SLURM_NTASKS=", tasks,
                 ") but trireme was started as one process; use: mpirun -n ", tasks,
                 " trireme ..., or for one process: srun -n 1 trireme ...");
  for (const char* name : {"PMI_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_SIZE"})
    if (const int tasks = leading_count(variable(name)); tasks > 1)
      return str(
          "the launcher started ", tasks, " processes (", name, "=", tasks,
          ") but it belongs to another MPI than the Open MPI that trireme was built with; use Open MPI's: mpirun -n ",
          tasks, " trireme ... (`trireme doctor` prints its version)");
  return "";
}

Process::Process(int* argc, char*** argv) : host_(host_name()) {
  CoreMask mine = my_cores();
  load_ = guess_host_load(mine, environment);
  found_running_ = mpi_initialized();
  if (!found_running_) {
    if (!has_launcher()) {
      if (const std::string problem = launch_problem(environment); !problem.empty()) throw ConfigError(problem);
      alone = true;
      set_log_rank(0, 1);
      return;
    }
    // Open MPI gives cores away only when it sees more ranks than slots, and the slots are often wrong.
    if (load_.oversubscribed()) setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
    int provided = 0;
    if (MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided) != MPI_SUCCESS)
      throw SystemError("MPI_Init_thread failed");
    if (provided != MPI_THREAD_MULTIPLE)
      throw SystemError(
          "this MPI does not support calls from several threads (MPI_THREAD_MULTIPLE); rebuild it with thread support");
  }
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
  MPI_Comm_size(MPI_COMM_WORLD, &size_);
  if (size_ == 1 && !found_running_) {
    if (const std::string problem = launch_problem(environment); !problem.empty()) {
      MPI_Finalize();
      throw ConfigError(problem);
    }
  }
  set_log_rank(rank_, size_);
  set_job_size(size_);
  if (!found_running_ && size_ > 1) {
    set_comm_timeout(kCommTimeout_s);
    open_watch_channel();
  }
  const FlightScope flight(job_group(), {"exchange of core masks", sizeof mine, next_job_operation()});
  MPI_Comm local = MPI_COMM_NULL;
  if (MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &local) != MPI_SUCCESS)
    throw SystemError("MPI_Comm_split_type failed");
  int num_local = 0;
  MPI_Comm_size(local, &num_local);
  MPI_Comm_rank(local, &local_rank_);
  std::vector<CoreMask> masks(static_cast<size_t>(num_local));
  MPI_Allgather(&mine, sizeof mine, MPI_BYTE, masks.data(), sizeof mine, MPI_BYTE, local);
  MPI_Comm_free(&local);
  load_ = host_load(masks, leading_count(environment("OMP_NUM_THREADS")));
}

Process::~Process() {
  alone = false;
  close_watch_channel();
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (!found_running_ && mpi_initialized() && !finalized) MPI_Finalize();
}

void Process::abort(int status) {
  std::fflush(nullptr);
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (mpi_initialized() && !finalized) MPI_Abort(MPI_COMM_WORLD, status);
  _exit(status);
}

bool Process::is_alone() { return alone; }

void Process::start_mpi() {
  if (mpi_initialized()) return;
  int provided = 0;
  if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided) != MPI_SUCCESS)
    throw SystemError("MPI_Init_thread failed");
}

std::string host_name() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "unknown";
}

bool mpi_yields_when_idle() {
  int provided = 0, index = 0, count = 0, value = 0;
  if (!mpi_initialized() || MPI_T_init_thread(MPI_THREAD_SINGLE, &provided) != MPI_SUCCESS) return false;
  MPI_T_cvar_handle handle{};
  if (MPI_T_cvar_get_index("mpi_yield_when_idle", &index) == MPI_SUCCESS &&
      MPI_T_cvar_handle_alloc(index, nullptr, &handle, &count) == MPI_SUCCESS) {
    if (count == 1) MPI_T_cvar_read(handle, &value);
    MPI_T_cvar_handle_free(&handle);
  }
  MPI_T_finalize();
  return value != 0;
}

std::string mpi_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);
  std::string version(text, static_cast<size_t>(std::max(0, length)));
  return version.substr(0, version.find(','));
}

}  // namespace trireme
