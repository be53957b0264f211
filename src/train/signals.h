// SIGUSR1, SIGTERM and SIGINT ask a run to finish its step, save and exit with status 75. The second SIGTERM, or
// the second SIGINT, ends it at once if it comes more than a second after the first.
#pragma once

namespace trireme {

void install_stop_signals();
bool stop_requested();  // on this rank; the ranks agree in the step's all-reduce

}  // namespace trireme
