// When the ranks of a run do what (base/trace.h): the trace files of a run, and where the time went.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace trireme {

// Opens RUN/trace/rank-N.json on every rank; where a run goes on rank-N.2.json and so on. Its times are those of rank 0's
// clock: each rank's difference from it is measured with some short messages. Collective; AgreedError.
void open_run_trace(const std::string& run_dir, const Communicator& world);

// Where the time of all ranks went (time_spent() of each), in shares that add up to 100.0 %: "compute 71.0 %, communication
// not hidden 12.0 % (gradients 8.0 %, tensor 4.0 %), bubble 9.0 %, ...". What rounds to nothing is left out.
std::string time_shares_text(const std::map<std::string, double>& seconds);

// "time: ..." of the mean, and of the rank that computed least where there are several. Collective; the text is rank 0's.
std::vector<std::string> time_lines(const Communicator& world);

}  // namespace trireme
