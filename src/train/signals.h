// SIGUSR1 and SIGTERM ask a run to finish its step, save and exit with status 75. A second SIGTERM ends at once.
#pragma once

namespace trireme {

void install_stop_signals();
bool stop_requested();  // on this rank; the ranks agree in the step's all-reduce

}  // namespace trireme
