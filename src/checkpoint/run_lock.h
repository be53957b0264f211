// One living run a run folder.
#pragma once

#include <string>

namespace trireme {

// Holds <folder>/run.lock, which names host and process, until destroyed or the process ends, however it ends. For
// rank 0 alone. ConfigError where a living run holds it, which names host and process; SystemError where the folder
// cannot be written. A file system without locks: refused if the process named is of this host and alive.
class RunLock {
 public:
  explicit RunLock(const std::string& folder);
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace trireme
