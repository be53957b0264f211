// Ranks that do not do what the others do, for run_watchdog_test.py: watchdog_ranks WHAT RANK FOLDER [TIMEOUT]. All ranks but
// RANK add up 8 numbers as the third operation of the group "work"; RANK does WHAT.
#include "base/tensor.h"

#include <mpi.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>

#include "base/log.h"
#include "comm/communicator.h"
#include "comm/process.h"
#include "comm/watch_channel.h"
#include "comm/watchdog.h"
#include "train/agreement.h"

using namespace trireme;

namespace {

void differ(const std::string& what, const Communicator& work, const Communicator& other) {
  at::Tensor x = at::ones({8});
  if (what == "operation") work.all_gather(at::empty({8 * work.size()}), x);
  else if (what == "size") work.all_reduce(at::ones({16}));
  else if (what == "type") work.all_reduce(at::ones({8}, at::kInt));
  else if (what == "reduction") work.all_reduce(x, ReduceOp::kMax);
  else if (what == "barrier") work.barrier();
  else if (what == "order") other.barrier(), work.all_reduce(x);
  else if (what == "root") work.broadcast(x, 2), std::this_thread::sleep_for(std::chrono::seconds(60));
  else if (what == "message") work.receive(x, 0, 5);
  else if (what == "sleeps") std::this_thread::sleep_for(std::chrono::seconds(60));
  else if (what == "posts") {
    const Work ahead = work.start_receive(at::empty({8}), 0, 5);
    std::this_thread::sleep_for(std::chrono::seconds(60));
  } else if (what == "stops") std::this_thread::sleep_for(std::chrono::milliseconds(1500)), std::raise(SIGSTOP);  // after a word to rank 0
  else if (what != "ends") throw std::runtime_error(what);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argv[1], folder = argv[3];
  const bool differs = [&] { return std::getenv("OMPI_COMM_WORLD_RANK") == std::string(argv[2]); }();
  try {
    if (what == "starts") {  // RANK has started MPI, and comes no further
      int provided = 0;
      MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
      if (differs) std::raise(SIGSTOP);
      WatchChannel channel(3);
    }
    Process process(&argc, &argv);
    set_comm_timeout(argc > 4 ? std::atof(argv[4]) : 1800);
    if (!folder.empty()) set_flight_folder(folder);
    const Communicator world = Communicator::world(), work = world.split(0, world.rank(), "work"), other = world.split(0, world.rank(), "other");
    try {
      work.barrier();
      work.barrier();
      at::Tensor x = at::ones({8});
      if (what == "fails") {
        agree_on(world, [&] {
          if (differs) throw DataError("FILE is damaged");
          work.all_reduce(x);
        });
      } else if (what == "computes") {  // longer than the deadline, while a message is on its way that nobody waits for yet
        at::Tensor y = at::empty({8});
        Work ahead = work.start_receive(y, (work.rank() + 1) % work.size(), 5);
        std::this_thread::sleep_for(std::chrono::milliseconds(2500));
        work.send(x, (work.rank() + work.size() - 1) % work.size(), 5);
        ahead.wait();
      } else if (differs) differ(what, work, other);
      else if (what == "root") work.broadcast(x, 0), work.all_reduce(x);
      else if (what == "ends" || what == "order") work.all_reduce(x), other.barrier();
      else work.all_reduce(x);
    } catch (const std::exception& error) {
      log_message(LogLevel::kError, error.what());
      Process::abort(1);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 9;
  }
  return 0;
}
