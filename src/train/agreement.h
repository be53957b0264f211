// Phases of start-up end with an agreement of all ranks: either every rank goes on, or every rank throws the same error.
#pragma once

#include <functional>

#include "base/check.h"
#include "comm/communicator.h"

namespace trireme {

// Every rank of the job throws it: rank 0 prints it, all finalize and return the same status.
struct AgreedError : Error {
  using Error::Error;
};

// Runs `phase` on every rank. If it threw an Error (or bad_alloc) on any, every rank throws an AgreedError with the text
// of the lowest rank that failed and the highest status. `phase` may hold collectives only before anything that can fail on
// one rank alone; else a rank that has left the phase says why after twenty seconds, and ends the job with its status.
void agree_on(const Communicator& comm, const std::function<void()>& phase);

}  // namespace trireme
