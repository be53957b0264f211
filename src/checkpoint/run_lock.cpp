#include "checkpoint/run_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>

#include "base/check.h"

namespace trireme {
namespace {

std::string this_host() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

}  // namespace

RunLock::RunLock(const std::string& folder) {
  std::string path = folder + "/run.lock";
  fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd_ < 0) throw SystemError(str("cannot write into run folder ", folder, ": ", errno_text(), "."));
  char text[400] = "", host[300] = "an unknown host";
  int pid = 0;
  bool held = flock(fd_, LOCK_EX | LOCK_NB) != 0;
  int reason = errno;
  if (pread(fd_, text, sizeof text - 1, 0) > 0) (void)std::sscanf(text, "%299s %d", host, &pid);
  // Some network file systems have no locks; then what the file says must do.
  if (held && reason != EWOULDBLOCK) held = pid > 0 && host == this_host() && pid != getpid() && kill(pid, 0) == 0;
  if (held) {
    close(fd_);
    throw ConfigError(str("run folder ", folder, " is in use by process ", pid, " on ", host,
                          ". Wait for it or end it, or name another folder with run.dir."));
  }
  std::string own = str(this_host(), " ", getpid(), "\n");
  if (ftruncate(fd_, 0) != 0 || pwrite(fd_, own.data(), own.size(), 0) != static_cast<ssize_t>(own.size())) {
    std::string why = errno_text();
    close(fd_);
    throw SystemError(str("cannot write ", path, ": ", why, "."));
  }
}

// The file stays: removing it would let two runs lock two files of one name.
RunLock::~RunLock() {
  (void)!ftruncate(fd_, 0);
  close(fd_);
}

}  // namespace trireme
