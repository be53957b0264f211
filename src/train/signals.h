// SIGUSR1, SIGTERM and SIGINT ask a run to finish its step, save and exit with status 75. A second SIGTERM or SIGINT ends
// it at once.
#pragma once

namespace trireme {

void install_stop_signals();
bool stop_requested();  // on this rank; the ranks agree in the step's all-reduce

}  // namespace trireme
