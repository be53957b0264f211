#include "train/signals.h"

#include <csignal>

namespace trireme {
namespace {

volatile std::sig_atomic_t stop = 0;

extern "C" void on_stop(int signal) {
  if (stop && signal != SIGUSR1) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
  stop = 1;
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
