#include "train/progress.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "base/check.h"
#include "base/log.h"

namespace trireme {

Progress::Progress(bool prints, bool alone) : prints_(prints) {
  const char* told = std::getenv("TRIREME_PROGRESS");
  live_ = told ? std::string(told) == "live" : alone && ::isatty(2) == 1;
}

void Progress::show(const std::string& line, int64_t step, int64_t every, bool last) {
  if (!prints_) return;
  const bool logs = step % every == 0 || last;
  if (logs && (!live_ || last)) return log_info(line);
  if (logs) log_quietly(line);
  const auto now = std::chrono::steady_clock::now();
  if (!live_ || now - shown_ < std::chrono::milliseconds(100)) return;
  shown_ = now;
  log_live(line);
}

uint64_t resident_bytes() {
  std::ifstream in("/proc/self/statm");
  uint64_t total = 0, resident = 0;
  in >> total >> resident;
  return resident * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
}

uint64_t peak_resident_bytes() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

uint64_t available_bytes() {
  uint64_t best = ~0ull;
  std::ifstream in("/proc/meminfo");
  for (std::string line; std::getline(in, line);)
    if (line.rfind("MemAvailable:", 0) == 0) best = std::stoull(line.substr(13)) * 1024;
  std::ifstream limit_file("/sys/fs/cgroup/memory.max"), used_file("/sys/fs/cgroup/memory.current");
  uint64_t limit = 0, used = 0;
  if (limit_file >> limit && used_file >> used && limit > used) best = std::min(best, limit - used);
  return best;
}

std::string bytes_text(double bytes) {
  char text[32];
  const char* unit = bytes >= 1 << 30 ? "GiB" : "MiB";
  std::snprintf(text, sizeof text, "%.2f %s", bytes / (bytes >= 1 << 30 ? 1 << 30 : 1 << 20), unit);
  return text;
}

std::string count_text(double count) {
  char text[32];
  if (count >= 1e9) std::snprintf(text, sizeof text, "%.2f B", count / 1e9);
  else if (count >= 1e6) std::snprintf(text, sizeof text, "%.2f M", count / 1e6);
  else if (count >= 1e3) std::snprintf(text, sizeof text, "%.1f k", count / 1e3);
  else std::snprintf(text, sizeof text, "%.0f", count);
  return text;
}

std::string duration_text(double seconds) {
  auto s = static_cast<long long>(seconds + 0.5);
  char text[32];
  if (s >= 3600) std::snprintf(text, sizeof text, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
  else std::snprintf(text, sizeof text, "%lld:%02lld", s / 60, s % 60);
  return text;
}

}  // namespace trireme
