// What is wrong with a configuration, all at once, before a run begins.
#pragma once

#include "config/config.h"

namespace trireme {

// Adds what contradicts each other or the number of ranks and, where nothing was wrong before, what is missing. Touches no file
// (but config.json, where the mesh is wrong, to name meshes that the model allows).
void find_conflicts(const Config& config, const CommandLine& line, int num_ranks, std::vector<std::string>& problems);
// The ranks of the run: of `plan` those of plan.ranks, where it is set.
inline int planned_ranks(const Config& config, const CommandLine& line, int num_ranks) {
  return line.verb == "plan" && config.plan.ranks > 0 ? static_cast<int>(config.plan.ranks) : num_ranks;
}
// Adds the files and folders that a training run is to read and that are not there, in the words of those who read them.
// DataError with all of them where nothing else is wrong.
void find_missing(const Config& config, const CommandLine& line, std::vector<std::string>& problems);

// What find_conflicts() finds for one rank, all in one ConfigError.
void check_config(const Config& config, const CommandLine& line);

}  // namespace trireme
