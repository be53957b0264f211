#include "train/signals.h"

#include <cerrno>
#include <csignal>
#include <ctime>
#include <initializer_list>

namespace trireme {
namespace {

volatile std::sig_atomic_t stop = 0;
volatile std::time_t first_seen[NSIG] = {};  // 0: never

std::time_t now() {  // clock_gettime may be called in a handler
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1;
}

// A batch system and a launcher may both pass a stop on, as the same signal or another: only a person's, of the same
// kind and later, means "at once".
extern "C" void on_stop(int signal) {
  const int error = errno;
  if (first_seen[signal] == 0) {
    first_seen[signal] = now();
  } else if (signal != SIGUSR1 && now() - first_seen[signal] >= 2) {  // whole seconds: more than one has passed
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
  stop = 1;
  errno = error;
}

}  // namespace

void install_stop_signals() {
  struct sigaction action {};
  action.sa_handler = on_stop;
  action.sa_flags = SA_RESTART;
  for (int signal : {SIGUSR1, SIGTERM, SIGINT}) sigaction(signal, &action, nullptr);
}

bool stop_requested() { return stop != 0; }

}  // namespace trireme
