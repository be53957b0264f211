// The training run: rank 0 decides when to evaluate, save and stop; all ranks do it.
#pragma once

#include "base/check.h"
#include "comm/process.h"
#include "config/config.h"

namespace trireme {

// Runs `trireme train` (or only its plan) to the end. Collective. Returns the exit status: kExitDone, or kExitStopped
// after a signal or train.stop_after. Errors: AgreedError where all ranks saw it, any Error of one rank alone.
ExitStatus run_training(const Config& config, const CommandLine& line, const Process& process, bool plan_only);

}  // namespace trireme
