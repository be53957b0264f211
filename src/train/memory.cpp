#include "train/memory.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace trireme {
namespace {

// The number behind `name` in a file of such lines; 0 where there is none.
uint64_t line_of(const std::string& file, const std::string& name) {
  std::ifstream in(file);
  uint64_t value = 0;
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    if (std::string word; words >> word && word == name && words >> value) return value;
  }
  return 0;
}

// Where the names of a control group's files differ between the two versions.
struct GroupFiles {
  const char *limit, *used, *inactive_cache, *active_cache;
};
constexpr GroupFiles kVersion1{"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"};
constexpr GroupFiles kVersion2{"memory.max", "memory.current", "inactive_file", "active_file"};

uint64_t left_in(const std::string& folder, const GroupFiles& files) {
  std::ifstream limit_file(folder + "/" + files.limit), used_file(folder + "/" + files.used);
  uint64_t limit = 0, used = 0;
  if (!(limit_file >> limit) || !(used_file >> used)) return ~0ull;  // "max", or not a group
  const std::string counters = folder + "/memory.stat";
  used -= std::min(used, line_of(counters, files.inactive_cache) + line_of(counters, files.active_cache));
  return limit - std::min(limit, used);
}

}  // namespace

uint64_t peak_resident_bytes() {
  constexpr uint64_t kUnit = 1024;
  return line_of("/proc/self/status", "VmHWM:") * kUnit;  // getrusage's would begin with that of whoever started this process
}

uint64_t available_bytes(const std::string& root) {
  uint64_t left = line_of(root + "/proc/meminfo", "MemAvailable:") * 1024;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "0::/path" of version 2, "4:memory:/path" of version 1
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool old = controllers.find(",memory,") != std::string::npos;
    if (!old && controllers != ",,") continue;
    const std::string mount = root + (old ? "/sys/fs/cgroup/memory" : "/sys/fs/cgroup");
    // In a container the path may be the host's, of which only the root is seen: every folder up to it is tried.
    for (std::filesystem::path path = line.substr(second + 1); ; path = path.parent_path()) {
      left = std::min(left, left_in(mount + path.string(), old ? kVersion1 : kVersion2));
      if (!path.has_relative_path()) break;
    }
  }
  return left;
}

}  // namespace trireme
