#include "train/signals.h"

#include <csignal>
#include <cstring>

namespace trireme {
namespace {

volatile std::sig_atomic_t stop = 0;

extern "C" void on_stop(int signal) {
  if (stop && signal == SIGTERM) {
    std::signal(SIGTERM, SIG_DFL);
    std::raise(SIGTERM);
  }
  stop = 1;
}

}  // namespace

void install_stop_signals() {
  struct sigaction action {};
  action.sa_handler = on_stop;
  action.sa_flags = SA_RESTART;
  sigaction(SIGUSR1, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool stop_requested() { return stop != 0; }

}  // namespace trireme
