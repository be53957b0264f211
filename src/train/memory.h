// Memory of this process and of this machine.
#pragma once

#include <cstdint>
#include <string>

namespace trireme {

uint64_t peak_resident_bytes();  // of this process, at most so far

// What programs may still take: MemAvailable of the machine, or less where a control group (v1 or v2; a container, a Slurm
// job) or one of the groups it is in has less left. Cached files count as free. `root`: where /proc and /sys are.
uint64_t available_bytes(const std::string& root = "");

}  // namespace trireme
